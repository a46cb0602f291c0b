"""What a stage sees: identity, data, inputs and time, through one interface."""

from stageflow.context.bag import OutputBag
from stageflow.context.context import Context, PipelineContext
from stageflow.context.delta import Change, Delta
from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.stage_context import StageContext
from stageflow.context.timer import PipelineTimer

__all__ = [
    "Change",
    "Context",
    "ContextSnapshot",
    "Delta",
    "OutputBag",
    "PipelineContext",
    "PipelineTimer",
    "StageContext",
]
