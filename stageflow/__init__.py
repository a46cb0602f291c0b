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
    MissingOutputError,
    OutputConflictError,
    PipelineTerminated,
    StageExecutionError,
    StageflowError,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    UnknownStageError,
)
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.output import Artifact, StageOutput, StageStatus
from stageflow.pipeline import Pipeline, StageGraph, run_stage
from stageflow.stages import Join, OnFailure, Stage, StageKind, StageOptions, StageSpec, optional, stage
from stageflow.trace import Trace

PipelineCancelled = UnifiedPipelineCancelled

__all__ = [
    "Artifact",
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
    "Join",
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
    "Trace",
    "UnifiedPipelineCancelled",
    "UnknownStageError",
    "optional",
    "run_stage",
    "stage",
]
