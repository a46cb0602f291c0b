"""What happens: a graph is run, branch by branch, and everything that ends is collected."""

from stageflow.engine.maps import MapPlan
from stageflow.engine.nested import MAX_DEPTH
from stageflow.engine.results import PipelineResults
from stageflow.engine.run import Run, open_run, run_to_end

__all__ = ["MAX_DEPTH", "MapPlan", "PipelineResults", "Run", "open_run", "run_to_end"]
