"""What one looks at: the trace of a run, and drawings of a graph."""

from stageflow.trace.trace import Trace

__all__ = ["Trace"]
