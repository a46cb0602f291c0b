"""What the engine costs: against the same work written by hand in Trio, and against what one would pick instead."""
