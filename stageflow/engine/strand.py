"""The walker: the task that runs the stages of a branch one after the other, under one cancel scope.

The scope carries the limit of the stage that is running. It is re-armed for each stage instead of being made anew, and
replaced only when it has fired. Around it is the nursery of the branch, in which nested branches are tasks, and in
which the walker stays until everything below has settled.

What is decided where
---------------------
A body can end in three ways, and each is decided in one place:

- it returns or raises: `Walker._walk` sees that, and it is written before anything else is awaited. A body that
  returned has succeeded even if its scope was cancelled meanwhile: what counts is that this was not what ended it;
- its limit ends it: the walker's scope says so by ``cancelled_caught``, in `Walker.run`;
- something further out ends it: `trio.Cancelled` passes through, and the branch writes what that left behind.

The check for cancellation *after* a stage is the same as that *before* the next one: no stage is started out of a
cancelled branch, and the one just finished is marked `after_cancel`.

What an ending means for others takes effect at the end of the scheduler tick in which it was written
(`Execution.at_end_of_tick`). So stages that were ready in the same tick get to their first checkpoint, and which
immediate results exist does not depend on the order in which Trio happens to run them.

From branch to branch
---------------------
When the strand of a branch is done and there is nothing below it, its nursery is empty and its scopes are as good as
new. If a join that waited for it lives in the same parent, that is just what the join needs: the walker lets a tick
pass, as starting a task would, and goes on with the join under the same nursery and scope. In layers of stages most
branches come about like that, and cost little more than a stage of a chain.
"""

from __future__ import annotations

import contextvars
import inspect
import math
from typing import TYPE_CHECKING, final

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from stageflow.context import StageContext
from stageflow.engine.attempt import Suspended, as_failure, as_output
from stageflow.errors import ContractViolation, DefinitionError, in_words
from stageflow.journal import Cause, CauseKind, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import OnFailure

if TYPE_CHECKING:
    from stageflow.engine.branch import BranchRun
    from stageflow.stages.stage import Condition

__all__ = ["Walker"]

_OK = StageStatus.OK
_CONDITION = StageOutput(StageStatus.SKIP, reason="when= said no")
_LONGEST_TURN = 0.001  # seconds, on Trio's clock, of uninterrupted work after which a strand lets other tasks run


@final
class Walker:
    """A task that walks the strand of a branch, and then, maybe, that of another.

    Attributes:
        branch: The branch it is in.
        at: Where on the strand it is.
        current: The stage that is running.
        last: The stage that ended last.
        lender: The stage that asked for the nursery last.
        untold: Stages that have settled, of which others have not heard yet.
        nursery: The nursery of the branch.
    """

    # No slots: most of these are as here when a branch is entered, and what is not set costs nothing.
    current: StageRecord | None = None
    last: StageRecord | None = None
    lender: StageRecord | None = None
    untold: tuple[int, ...] = ()
    _absent: Cause | None = None  # why the stage before gave no output, if it gave none
    _extended: tuple[StageRecord, float] | None = None  # the stage that has extended its limit last, and by how much

    def __init__(self, branch: BranchRun) -> None:
        self.branch = branch
        self.at = branch.at
        self._execution = branch.execution
        self._scope: trio.CancelScope  # around the bodies
        self._armed: float  # its deadline
        self.nursery: trio.Nursery
        branch.walker = self

    def enter(self, branch: BranchRun) -> None:
        """Goes on with another branch."""
        self.branch = branch
        self.at = branch.at
        self.current = self.last = self.lender = self._absent = None
        self.untold = ()
        branch.walker = self

    async def run(self) -> None:  # noqa: ASYNC910  # leaving a nursery is a checkpoint
        """Runs the branch and everything below it. It raises nothing: what has happened is written down."""
        limits = self._execution.plan.timeouts
        while True:
            raised: BaseException | None = None
            try:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    self.branch.open(nursery)
                    while True:
                        ending: StageOutput | None = None
                        now = trio.current_time()
                        # A short limit is better set when the stage is there.
                        limit = limits[self.branch.strand[self.at]] if self.at < len(self.branch.strand) else math.inf
                        self._armed = now + (limit if limit > _LONGEST_TURN else math.inf)
                        with trio.CancelScope(deadline=self._armed) as self._scope:
                            ending = await self._walk(now)
                            while ending is None and self.branch.successor is not None and self._may_be_left():
                                self.branch.close()
                                await cancel_shielded_checkpoint()  # a join never starts in the tick that made it ready
                                if not self._goes_on():
                                    break
                                self.branch.open(nursery)
                                ending = await self._walk(trio.current_time())
                        if not self._scope.cancelled_caught:
                            # Without an ending the strand is done, or the run starts nothing any more.
                            if ending is None or not await self._conclude(ending):
                                break
                        elif self.current is not None and not await self._conclude(
                            self._time_is_up(), CauseKind.TIMEOUT
                        ):
                            break
                        # Otherwise a stage had ended in spite of its limit, and just the scope is spent.
                    if self.branch.parent is None and not self.branch.strand:
                        self._execution.scheduler.launch_roots()
            except BaseException as error:  # noqa: ASYNC103  # the branch sees to it
                raised = error
            branch = self.branch
            try:
                if raised is not None or branch.interrupted or branch.unheard or self.at < len(branch.strand):
                    await branch.cut_short(raised)
            finally:
                branch.close()
            if branch.successor is None or not self._goes_on():
                return

    def _may_be_left(self) -> bool:
        """Whether the strand is done, there is nothing below it, and nursery and scope could serve another branch."""
        branch = self.branch
        return not (
            self.lender is not None
            or self.at < len(branch.strand)
            or branch.plan.children
            or branch.parent is None
            or branch.interrupted
            or branch.unheard
            or self.nursery.cancel_scope.cancel_called
            or self._scope.cancel_called
        )

    def _goes_on(self) -> bool:
        """Goes on to the branch that waited for this one last, or has another task do so; tells which."""
        branch, self.branch.successor = self.branch.successor, None
        assert branch is not None
        assert branch.parent is not None
        execution = self._execution
        if not _is_same(contextvars.copy_context(), execution.scheduler.task_context):
            # A stage has set context variables, which are not for others to see.
            assert branch.parent.nursery is not None
            execution.scheduler.start(branch, branch.parent.nursery)
            return False
        self.enter(branch)
        trio.lowlevel.current_task().name = branch.name
        return True

    async def _walk(self, now: float) -> StageOutput | None:
        """Runs stages until the strand is done (`None`), or until one ends in a way that is to be concluded.

        This is the loop in which all the time goes, hence one function, and no call that can be done without.
        """
        execution, branch = self._execution, self.branch
        strand, collector, plan = branch.strand, execution.collector, execution.plan
        limits, bodies, conditions = plan.timeouts, plan.bodies, plan.conditions
        rest = now + _LONGEST_TURN
        try:
            while True:
                await checkpoint_if_cancelled()
                if self.at == len(strand):
                    return None
                if now >= rest:
                    self.last = None  # a cancellation that comes now did not come while it ran
                    await checkpoint()
                    now = trio.current_time()
                    rest = now + _LONGEST_TURN
                if execution.drained is not None:
                    return None
                number = strand[self.at]
                if self._absent is not None and not plan.starts_bare[number]:
                    self._settled(number, collector.skip(number, self._absent, now))
                    now = trio.current_time()
                    continue

                self.current = record = collector.begin(number, branch.name, now)
                due = now + limits[number]
                if due < self._armed or due - self._armed > _LONGEST_TURN:
                    self._arm(due)
                try:
                    context = StageContext(branch, record)
                    condition = conditions[number]
                    if condition is None or await self._is_met(condition, context, record):
                        body = bodies[number](context)
                        try:
                            trap = body.send(None)
                        except StopIteration as end:
                            returned = end.value
                        else:
                            if due != self._armed:
                                self._arm(due if self._extended is None else self.due)
                            returned = await Suspended(body, trap)
                            rest = trio.current_time() + _LONGEST_TURN
                        output = as_output(returned, record.name)
                    else:
                        output = _CONDITION
                except trio.Cancelled:
                    raise
                except BaseException as raised:
                    failure = as_failure(raised)
                    if failure is None:
                        raise
                    return StageOutput(StageStatus.FAIL, reason=in_words(failure), error=failure)

                now = trio.current_time()
                if output.status is _OK:
                    collector.succeed(record, output, now)
                elif output.status is StageStatus.SKIP:
                    kind = CauseKind.CONDITION if output is _CONDITION else CauseKind.SKIP
                    collector.settle(record, StageState.SKIPPED, Cause(kind, record.name, output.reason or ""), now)
                else:
                    return output
                self._settled(number, record)
        except trio.Cancelled:
            if self.current is None and self.last is not None and self.last.started is not None:
                self.last.after_cancel = True
            raise

    async def _is_met(self, condition: Condition, context: StageContext, record: StageRecord) -> bool:
        """Asks a condition; the stage counts as entered only if it says yes, and has not cancelled the run itself."""
        started, record.started, record.attempts = record.started, None, 0
        met = condition(context)
        if inspect.isawaitable(met):
            if inspect.iscoroutine(met):
                met.close()
            raise TypeError(f"when= of stage {record.name!r} gave an awaitable; it takes a plain function")
        await checkpoint_if_cancelled()
        if met:
            record.started, record.attempts = started, 1
        return bool(met)

    def _arm(self, due: float) -> None:
        """Puts the scope's deadline where the limit on the current stage is.

        That is the dearest step of a stage that returns at once, so it is put off until the body waits for something.
        Until then the deadline may be that of a stage before, which is too early, but by a millisecond at most, and
        cannot take effect.
        """
        self._armed = due
        if self.limit == 0:
            self._scope.cancel(reason="a limit of 0 s")  # which shows at the first checkpoint, whatever the clock says
        else:
            self._scope.deadline = due

    def _settled(self, number: int, record: StageRecord) -> None:
        """Goes on to the next stage after one has settled."""
        self.current = None
        self.last = record
        self._absent = record.cause
        self.at += 1
        if self._execution.plan.followers[number]:
            plan = self.branch.plan
            leaving = None if plan.children or self.at < len(plan.strand) or self.lender is not None else self.branch
            self._execution.scheduler.propagate(number, record.cause, leaving)

    def _write_ending(
        self, number: int, record: StageRecord, ending: StageOutput, kind: CauseKind | None
    ) -> tuple[Cause, OnFailure | None, BranchRun]:
        """Writes how the current stage ended.

        Returns:
            Why it did; what that means for the run, `None` if just a branch is to end; and which branch that is.
        """
        execution = self._execution
        target = self.branch
        if ending.status is StageStatus.CANCEL_BRANCH:
            try:
                target = execution.branch_upstream(ending.of, number)
            except DefinitionError as error:
                ending = StageOutput.fail(error)
        now = trio.current_time()
        if ending.status is not StageStatus.FAIL:
            kind = CauseKind.CANCEL if ending.status is StageStatus.CANCEL else CauseKind.CANCEL_BRANCH
            cause = Cause(kind, record.name, ending.reason or "")
            execution.collector.settle(record, StageState.CANCELLED, cause, now)
            return cause, OnFailure.FAIL_FAST if kind is CauseKind.CANCEL else None, target
        if kind is None:
            kind = CauseKind.CONTRACT if isinstance(ending.error, ContractViolation) else CauseKind.FAILURE
        if kind is CauseKind.TIMEOUT:
            record.limit = self.limit
        cause = Cause(kind, record.name, ending.reason or "")
        execution.collector.fail(record, cause, ending, now)
        record.after_cancel = kind is not CauseKind.TIMEOUT and self._scope.cancel_called
        return cause, execution.plan.on_failure[number], target

    async def _conclude(self, ending: StageOutput, kind: CauseKind | None = None) -> bool:
        """Writes how the current stage ended and does what that means for others; tells whether the strand goes on."""
        record, execution, branch = self.current, self._execution, self.branch
        assert record is not None
        number = branch.strand[self.at]
        cause, policy, target = self._write_ending(number, record, ending, kind)
        self.current = None
        self.last = record
        self._absent = cause
        self.at += 1

        def act() -> None:
            if policy is None:
                target.end(cause)
            else:
                execution.note(record, cause, policy)
                execution.act()

        why = branch.why()
        if why is None:
            try:
                await checkpoint_if_cancelled()
            except trio.Cancelled:
                # By the caller, and then it means nothing to others; or just in the nursery that some stage had asked
                # for. The branch will know when that has closed.
                record.after_cancel = True
                self.untold += (number,)
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
            execution.scheduler.propagate(number, cause)
            return False  # noqa: ASYNC910
        execution.note(record, cause, policy)
        if policy is OnFailure.ISOLATE or policy is OnFailure.TOLERATE:
            execution.scheduler.propagate(number, cause)
            return True  # noqa: ASYNC910
        await execution.at_end_of_tick(execution.act)
        return False  # noqa: ASYNC910

    def _time_is_up(self) -> StageOutput:
        reason = self.limit_in_words()
        return StageOutput(StageStatus.FAIL, reason=reason, error=TimeoutError(reason))

    # What a branch asks for the contexts of its stages, of the one that is running

    @property
    def limit(self) -> float:
        """The limit on the current stage, in seconds."""
        limit = self._execution.plan.timeouts[self.branch.strand[self.at]]
        return limit if self._extended is None or self._extended[0] is not self.current else limit + self._extended[1]

    @property
    def due(self) -> float:
        """When that is reached, on Trio's clock."""
        return math.inf if self.current is None or self.current.started is None else self.current.started + self.limit

    @property
    def too_late(self) -> bool:
        """Whether the limit on the current stage has been reached."""
        return self._scope.cancel_called

    def limit_in_words(self) -> str:
        """What is said of a stage that has reached its limit."""
        return f"ran longer than its limit of {self.limit:g} s"

    def extend(self, seconds: float) -> None:
        """Moves the limit on the current stage."""
        if self.current is not None and 0 < self.limit < math.inf:
            before = 0.0 if self._extended is None or self._extended[0] is not self.current else self._extended[1]
            self._extended = self.current, before + seconds
            self._arm(self.due)


def _is_same(one: contextvars.Context, other: contextvars.Context) -> bool:
    """Whether two contexts hold the very same values; what is merely equal may still be another object."""
    return len(one) == len(other) and all(one.get(variable, one) is value for variable, value in other.items())
