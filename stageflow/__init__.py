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
    CheckpointError,
    CompensationError,
    ContractViolation,
    CycleError,
    DefinitionError,
    DefinitionWarning,
    DuplicateStageError,
    IdempotencyConflictError,
    LeaseLostError,
    MaxDepthError,
    MissingOutputError,
    OutputConflictError,
    PipelineTerminated,
    ProcessKilledError,
    RecordedError,
    ResumeRefusedError,
    RunExistsError,
    RunParkedError,
    StageExecutionError,
    StageflowError,
    StageTimeoutError,
    StagnationError,
    StoreError,
    TenantMismatchError,
    UnifiedPipelineCancelled,
    UnknownRunError,
    UnknownStageError,
    UnstorableValueError,
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
    "Compensation": "stageflow.stages.compensation",
    "CompensationRecord": "stageflow.journal.undo",
    "CompensationStatus": "stageflow.journal.undo",
    "Delta": "stageflow.context.delta",
    "Difference": "stageflow.stages.compatibility",
    "Fault": "stageflow.stages.fault",
    "OutputBag": "stageflow.context.bag",
    "ProcessContext": "stageflow.stages.threads",
    "ResumePlan": "stageflow.journal.plan",
    "Retry": "stageflow.stages.retry",
    "RunInfo": "stageflow.journal.store",
    "Store": "stageflow.journal.store",
    "Trace": "stageflow.trace",
    "Transaction": "stageflow.context.transaction",
    "UndoRecord": "stageflow.journal.undo",
    "UndoState": "stageflow.journal.undo",
    "compatibility": "stageflow.stages.compatibility",
    "open_store": "stageflow.journal.store",
    "register_journal_type": "stageflow.journal.codec",
    "register_structure_hook": "stageflow.stages.structure",
}

if TYPE_CHECKING:
    from stageflow.context.bag import OutputBag
    from stageflow.context.delta import Change, Delta
    from stageflow.context.transaction import Transaction
    from stageflow.journal.codec import register_journal_type
    from stageflow.journal.plan import ResumePlan
    from stageflow.journal.store import RunInfo, Store, open_store
    from stageflow.journal.undo import CompensationRecord, CompensationStatus, UndoRecord, UndoState
    from stageflow.stages.compatibility import Breaks, Difference, compatibility
    from stageflow.stages.compensation import Compensation
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
    "CheckpointError",
    "Compensation",
    "CompensationError",
    "CompensationRecord",
    "CompensationStatus",
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
    "LeaseLostError",
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
    "RecordedError",
    "ResumePlan",
    "ResumeRefusedError",
    "Retry",
    "Run",
    "RunExistsError",
    "RunInfo",
    "RunParkedError",
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
    "Store",
    "StoreError",
    "TenantMismatchError",
    "Trace",
    "Transaction",
    "UndoRecord",
    "UndoState",
    "UnifiedPipelineCancelled",
    "UnknownRunError",
    "UnknownStageError",
    "UnstorableValueError",
    "compatibility",
    "open_store",
    "optional",
    "register_journal_type",
    "register_structure_hook",
    "run_stage",
    "stage",
]
