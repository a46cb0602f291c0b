"""What the end of a stage that did not succeed means for others: it is written down first, and done then.

What it means takes effect at the end of the scheduler tick in which it was written (`Execution.at_end_of_tick`). So
stages that were ready in the same tick get to their first checkpoint, and which immediate results exist does not depend
on the order in which Trio happens to run them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint_if_cancelled

from stageflow.engine.paths import branch_upstream
from stageflow.errors import ContractViolation, DefinitionError
from stageflow.journal import Cause, CauseKind, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import OnFailure

if TYPE_CHECKING:
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.strand import Walker

__all__ = ["conclude", "kind_of"]


async def conclude(walker: Walker, ending: StageOutput) -> bool:
    """Writes how the current stage ended and does what that means for others; tells whether the strand goes on.

    Raises:
        trio.Cancelled: The caller had cancelled the run before, or somebody the branch's nursery.
    """
    record, execution, branch = walker.current, walker.execution, walker.branch
    assert record is not None
    cause, policy, target = _write(walker, record, ending)
    number, scope_cancelled = walker.leave(cause)
    record.after_cancel |= ending.status is StageStatus.FAIL and record.limit is None and scope_cancelled
    scribe = execution.scribe
    if scribe is not None and policy is None and target.why() is None:
        scribe.branch_ended(target.name, cause, undo=ending.compensate, together=True)
    receipt = None if scribe is None else scribe.settled(record, tolerated=policy is OnFailure.TOLERATE)

    def act() -> None:
        if policy is None:
            target.end(cause, undo=ending.compensate)
        else:
            execution.note(record, cause, policy)
            execution.act()

    why = branch.why()
    if why is None:
        try:
            await checkpoint_if_cancelled()
        except trio.Cancelled:
            # By the caller, and then it means nothing to others; or just in the nursery that some stage had asked for.
            # The branch will know when that has closed.
            record.after_cancel = True
            walker.untold += (number,)
            branch.unheard += (act,)
            raise
    else:
        # If everything was being ended, it means nothing to others either; if just a branch was, it is news.
        record.after_cancel = True
        if why is execution.ending:
            return False  # noqa: ASYNC910

    if policy is None:
        if target is branch:
            act()
        else:
            await execution.at_end_of_tick(act)
        if scribe is not None:
            await scribe.book.durable(receipt)
        execution.scheduler.propagate(number, cause)
        return False  # noqa: ASYNC910
    execution.note(record, cause, policy)
    if policy is OnFailure.ISOLATE or policy is OnFailure.TOLERATE:
        if scribe is not None:
            await scribe.book.durable(receipt)
        execution.scheduler.propagate(number, cause)
        return True  # noqa: ASYNC910
    await execution.at_end_of_tick(execution.act)
    return False  # noqa: ASYNC910


def _write(walker: Walker, record: StageRecord, ending: StageOutput) -> tuple[Cause, OnFailure | None, BranchRun]:
    """Writes how a stage ended.

    Returns:
        Why it did; what that means for the run, `None` if just a branch is to end; and which branch that is.
    """
    execution, target = walker.execution, walker.branch
    number = execution.shape.index[record.name]
    if ending.status is StageStatus.RETRY:
        ending = StageOutput.fail(f"{ending.reason}; it asks to be tried again, but has no retry= that allows it")
    if ending.status is StageStatus.CANCEL_BRANCH:
        try:
            target = branch_upstream(execution, ending.of, number)
        except DefinitionError as error:
            ending = StageOutput.fail(error)
    now = trio.current_time()
    if ending.status is not StageStatus.FAIL:
        kind = CauseKind.CANCEL if ending.status is StageStatus.CANCEL else CauseKind.CANCEL_BRANCH
        cause = Cause(kind, record.name, ending.reason or "")
        execution.collector.settle(record, StageState.CANCELLED, cause, now)
        return cause, OnFailure.FAIL_FAST if kind is CauseKind.CANCEL else None, target
    cause = Cause(kind_of(record, ending), record.name, ending.reason or "")
    execution.collector.fail(record, cause, ending, now)
    return cause, execution.plan.on_failure[number], target


def kind_of(record: StageRecord, failed: StageOutput) -> CauseKind:
    """Tells what sort of failure it is with which a stage has ended."""
    if record.limit is not None:
        return CauseKind.HEARTBEAT if record.details.source.startswith("heartbeat=") else CauseKind.TIMEOUT
    return CauseKind.CONTRACT if isinstance(failed.error, ContractViolation) else CauseKind.FAILURE
