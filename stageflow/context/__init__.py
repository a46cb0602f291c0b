"""What a stage sees: identity, data, inputs and time, through one interface."""

from stageflow.context.context import Context, PipelineContext
from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.stage_context import StageContext
from stageflow.context.timer import PipelineTimer

__all__ = [
    "Context",
    "ContextSnapshot",
    "PipelineContext",
    "PipelineTimer",
    "StageContext",
]
