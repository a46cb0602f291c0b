"""How the command ends: its exit codes, which error means which, and how an error is said in one line."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, final

from stageflow.errors import (
    CheckpointError,
    CompensationError,
    ContractViolation,
    DefinitionError,
    LeaseLostError,
    ResumeRefusedError,
    RunExistsError,
    RunParkedError,
    TenantMismatchError,
    UnifiedPipelineCancelled,
    UnknownRunError,
)
from stageflow.journal.plan import Action

if TYPE_CHECKING:
    from stageflow.errors import StageflowError
    from stageflow.journal.plan import ResumePlan

__all__ = ["Exit", "UsageError", "exit_of", "in_one_line", "ways_on"]

_REFUSED = (CompensationError, ResumeRefusedError, RunParkedError, LeaseLostError)
_USAGE = (DefinitionError, RunExistsError, UnknownRunError, TenantMismatchError)


@final
class Exit(enum.IntEnum):
    """The exit codes of the command. They do not change."""

    WELL = 0
    FAILED = 1
    """The audit found something, or the run failed."""
    USAGE = 2
    """The command was not understood, or asks for what is not there."""
    REFUSED = 3
    """The run was not resumed: it has changed, is in doubt, was undone, is parked, or another process has it."""
    STORE = 4
    """The run could not be recorded, or what is recorded could not be read."""
    CANCELLED = 5
    """A stage cancelled the run."""
    INTERRUPTED = 130
    """Ctrl-C."""


class UsageError(Exception):
    """The command asks for something that is not there. Said without a traceback."""


def exit_of(error: StageflowError) -> Exit:
    """Gives the exit code that an error means."""
    if isinstance(error, _REFUSED):
        return Exit.REFUSED
    if isinstance(error, _USAGE) or (isinstance(error, ContractViolation) and error.stage is None):
        return Exit.USAGE
    if isinstance(error, UnifiedPipelineCancelled):
        return Exit.CANCELLED
    return Exit.STORE if isinstance(error, CheckpointError) else Exit.FAILED


def in_one_line(error: StageflowError) -> str:
    """Says an error in one line, and what to do about it in words of the command."""
    if isinstance(error, ResumeRefusedError) and error.plan is not None:
        plan = error.plan
        steps = "; ".join(map(str, plan.blocked[:5])) + ("; …" if len(plan.blocked) > 5 else "")
        return f"run {plan.run_id} of {plan.pipeline!r} was not resumed: {steps}; say {ways_on(plan)}"
    if isinstance(error, RunParkedError):
        return (
            f"run {error.run_id} was resumed {error.recoveries} times, and each time its process died before the run "
            f"ended; see what kills it, then say --unpark"
        )
    return " ".join(str(error).split())


def ways_on(plan: ResumePlan) -> str:
    """Says which options would let a run be resumed that is blocked."""
    changed = any(step.action is not Action.IN_DOUBT for step in plan.blocked)
    doubtful = any(step.action is Action.IN_DOUBT for step in plan.blocked)
    return " and ".join(["--on-change reuse or rerun"] * changed + ["--in-doubt rerun"] * doubtful)
