"""What happens: a graph is run, branch by branch, and everything that ends is collected."""

from stageflow.engine.maps import MapPlan, OverItems
from stageflow.engine.nested import MAX_DEPTH, Within
from stageflow.engine.results import PipelineResults
from stageflow.engine.run import Run, open_run, run_to_end

__all__ = ["MAX_DEPTH", "MapPlan", "OverItems", "PipelineResults", "Run", "Within", "open_run", "run_to_end"]
