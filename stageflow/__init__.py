"""Reliable DAG pipelines for Trio applications.

Declare stages and what each comes after; run them, each the moment its inputs are there; and hold in hand, whatever
ends the run, everything that had finished.
"""

from stageflow.context import Context, ContextSnapshot, OutputBag, PipelineContext, PipelineTimer, StageContext
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
    UnifiedPipelineCancelled,
    UnknownStageError,
)
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.journal import Attempt, Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.output import Artifact, StageOutput, StageStatus
from stageflow.pipeline import Pipeline, StageGraph, run_stage
from stageflow.stages import (
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
    optional,
    stage,
)
from stageflow.trace import Trace

PipelineCancelled = UnifiedPipelineCancelled

__all__ = [
    "Artifact",
    "Attempt",
    "Cause",
    "CauseKind",
    "Context",
    "ContextSnapshot",
    "ContractViolation",
    "CycleError",
    "DefinitionError",
    "DefinitionWarning",
    "DuplicateStageError",
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
    "Trace",
    "UnifiedPipelineCancelled",
    "UnknownStageError",
    "optional",
    "run_stage",
    "stage",
]
