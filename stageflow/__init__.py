"""Reliable DAG pipelines for Trio applications.

Declare stages and what each comes after; run them, each the moment its inputs are there; and hold in hand, whatever
ends the run, everything that had finished.
"""

from typing import TYPE_CHECKING

from stageflow.context import (
    Change,
    Context,
    ContextSnapshot,
    Delta,
    OutputBag,
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
    Fault,
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
    Breaks,
    Difference,
    Interceptor,
    Join,
    Limit,
    OnFailure,
    ProcessContext,
    Retry,
    Stage,
    StageKind,
    StageOptions,
    StageSpec,
    compatibility,
    optional,
    stage,
)
from stageflow.trace import Trace

if TYPE_CHECKING:
    from stageflow.stages.structure import register_structure_hook

PipelineCancelled = UnifiedPipelineCancelled


def __getattr__(name: str) -> object:
    # With this comes cattrs, which takes its time, and most programs do without.
    if name == "register_structure_hook":
        from stageflow.stages.structure import register_structure_hook  # noqa: PLC0415

        return register_structure_hook
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
