"""Reliable DAG pipelines for Trio applications.

Declare stages and what each comes after; run them, each the moment its inputs are there; and hold in hand, whatever
ends the run, everything that had finished.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from stageflow.context import (
    Context,
    ContextSnapshot,
    PipelineContext,
    PipelineTimer,
    StageContext,
)
from stageflow.engine import PipelineResults, Run
from stageflow.errors import (
    ContractViolation,
    CycleError,
    DefinitionError,
    DefinitionWarning,
    DuplicateStageError,
    IdempotencyConflictError,
    MaxDepthError,
    MissingOutputError,
    OutputConflictError,
    PipelineTerminated,
    ProcessKilledError,
    StageExecutionError,
    StageflowError,
    StageTimeoutError,
    StagnationError,
    TenantMismatchError,
    UnifiedPipelineCancelled,
    UnknownStageError,
)
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.journal import Attempt, Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.output import Artifact, StageOutput, StageStatus
from stageflow.pipeline import Pipeline
from stageflow.running import StageGraph, run_stage
from stageflow.stages import (
    Interceptor,
    Join,
    Limit,
    OnFailure,
    Stage,
    StageKind,
    StageOptions,
    StageSpec,
    optional,
    stage,
)

# What only some programs use is loaded when they ask for it, by this table. Type checkers read the imports below it.
_LATER = {
    "Breaks": "stageflow.stages.compatibility",
    "Change": "stageflow.context.delta",
    "Delta": "stageflow.context.delta",
    "Difference": "stageflow.stages.compatibility",
    "Fault": "stageflow.stages.fault",
    "OutputBag": "stageflow.context.bag",
    "ProcessContext": "stageflow.stages.threads",
    "Retry": "stageflow.stages.retry",
    "Trace": "stageflow.trace",
    "compatibility": "stageflow.stages.compatibility",
    "register_structure_hook": "stageflow.stages.structure",
}

if TYPE_CHECKING:
    from stageflow.context.bag import OutputBag
    from stageflow.context.delta import Change, Delta
    from stageflow.stages.compatibility import Breaks, Difference, compatibility
    from stageflow.stages.fault import Fault
    from stageflow.stages.retry import Retry
    from stageflow.stages.structure import register_structure_hook
    from stageflow.stages.threads import ProcessContext
    from stageflow.trace import Trace
else:
    # Type checkers take a module that has this for one that has any name at all.
    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_LATER[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


PipelineCancelled = UnifiedPipelineCancelled

__all__ = [
    "Artifact",
    "Attempt",
    "Breaks",
    "Cause",
    "CauseKind",
    "Change",
    "Context",
    "ContextSnapshot",
    "ContractViolation",
    "CycleError",
    "DefinitionError",
    "DefinitionWarning",
    "Delta",
    "Difference",
    "DuplicateStageError",
    "Fault",
    "FrozenDict",
    "FrozenList",
    "IdempotencyConflictError",
    "Interceptor",
    "Join",
    "Limit",
    "MaxDepthError",
    "MissingOutputError",
    "OnFailure",
    "OutputBag",
    "OutputConflictError",
    "Pipeline",
    "PipelineCancelled",
    "PipelineContext",
    "PipelineResults",
    "PipelineTerminated",
    "PipelineTimer",
    "ProcessContext",
    "ProcessKilledError",
    "Retry",
    "Run",
    "RunStatus",
    "Stage",
    "StageContext",
    "StageExecutionError",
    "StageGraph",
    "StageKind",
    "StageOptions",
    "StageOutput",
    "StageRecord",
    "StageSpec",
    "StageState",
    "StageStatus",
    "StageTimeoutError",
    "StageflowError",
    "StagnationError",
    "TenantMismatchError",
    "Trace",
    "UnifiedPipelineCancelled",
    "UnknownStageError",
    "compatibility",
    "optional",
    "register_structure_hook",
    "run_stage",
    "stage",
]
