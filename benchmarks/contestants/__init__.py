"""The contestants: one module each, see `benchmarks.contestant.Contestant`."""
