"""What happens: a graph is run, branch by branch, and everything that ends is collected."""

from stageflow.engine.results import PipelineResults
from stageflow.engine.run import Begin, Run, open_run, run_to_end

__all__ = ["Begin", "PipelineResults", "Run", "open_run", "run_to_end"]
