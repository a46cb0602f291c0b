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
What an ending other than success means for others is in `stageflow.engine.ending`.

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
from typing import TYPE_CHECKING, Any, final

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from stageflow.context import StageContext
from stageflow.engine.body import Suspended, as_failure
from stageflow.engine.cleanup import run_exits
from stageflow.engine.ending import conclude
from stageflow.engine.tries import NotStarted, Tries
from stageflow.errors import in_words
from stageflow.journal import Cause, CauseKind, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages.returned import as_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from stageflow.context.transaction import Transaction
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.execution import Execution
    from stageflow.graph import Special
    from stageflow.stages.stage import Condition

__all__ = ["Walker"]

_OK = StageStatus.OK
_CONDITION = StageOutput(StageStatus.SKIP, reason="when= said no")
_LONGEST_TURN = 0.001  # seconds, on Trio's clock, of uninterrupted work after which a strand lets other tasks run


@final
class Walker:
    """A task that walks the strand of a branch, and then, maybe, that of another.

    Attributes:
        execution: The run.
        branch: The branch it is in.
        at: Where on the strand it is.
        current: The stage that is running.
        last: The stage that ended last.
        lender: The stage that asked for the nursery last.
        untold: Stages that have settled, of which others have not heard yet.
        nursery: The nursery of the branch.
        tries: The attempts at the current stage, if they are made one by one.
        absent: Why the stage before gave no output, if it gave none.
        exits: What the current attempt has left to be called when it has ended, with names.
        transaction: What it wants to have written with its end.
    """

    # No slots: most of these are as here when a branch is entered, and what is not set costs nothing.
    current: StageRecord | None = None
    last: StageRecord | None = None
    lender: StageRecord | None = None
    untold: tuple[int, ...] = ()
    tries: Tries | None = None
    exits: tuple[tuple[str, Callable[[], object]], ...] = ()
    absent: Cause | None = None
    transaction: Transaction | None = None
    _extended: tuple[StageRecord, float] | None = None  # the stage that has extended its limit last, and by how much

    def __init__(self, branch: BranchRun) -> None:
        self.branch: BranchRun = branch
        self.at: int = branch.at
        self.execution: Execution = branch.execution
        self._scope: trio.CancelScope  # around the bodies
        self._armed: float  # its deadline
        self.nursery: trio.Nursery
        branch.walker = self

    def enter(self, branch: BranchRun) -> None:
        """Goes on with another branch."""
        self.branch = branch
        self.at = branch.at
        self.current = self.last = self.lender = self.absent = None
        self.untold = ()
        branch.walker = self

    async def run(self) -> None:  # noqa: ASYNC910  # leaving a nursery is a checkpoint
        """Runs the branch and everything below it. It raises nothing: what has happened is written down."""
        limits = self.execution.armed
        while True:  # noqa: ASYNC913
            raised: BaseException | None = None
            try:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    self.branch.open(nursery)
                    while True:
                        ending: StageOutput | None = None
                        now = trio.current_time()
                        strand = self.branch.strand
                        # A short limit is better set when the stage is there.
                        limit = limits[strand[self.at]] if self.at < len(strand) else math.inf
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
                            if ending is None or not await conclude(self, ending):
                                break
                        elif self.current is not None and not await conclude(self, self._time_is_up()):
                            break
                        # Otherwise a stage had ended in spite of its limit, and just the scope is spent.
                    if self.branch.parent is None and not self.branch.strand:
                        self.execution.scheduler.launch_roots()
            except BaseException as error:  # noqa: ASYNC103  # the branch sees to it
                raised = error
            branch = self.branch
            try:
                cut = raised is not None or branch.interrupted or branch.unheard or self.at < len(branch.strand)
                if cut or (branch.expires < math.inf and branch.has_expired):
                    await branch.cut_short(raised)
            finally:
                branch.close()
            if branch.successor is None or not self._goes_on():
                return  # noqa: ASYNC910

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
            or branch.expires < math.inf
            or self.nursery.cancel_scope.cancel_called
            or self._scope.cancel_called
        )

    def _goes_on(self) -> bool:
        """Goes on to the branch that waited for this one last, or has another task do so; tells which."""
        branch, self.branch.successor = self.branch.successor, None
        assert branch is not None
        assert branch.parent is not None
        execution = self.execution
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
        execution, branch = self.execution, self.branch
        strand, collector, plan = branch.strand, execution.collector, execution.plan
        limits, bodies, specials = execution.armed, plan.bodies, execution.specials
        slots, scribe = collector.slots, execution.scribe
        rest = now + _LONGEST_TURN
        if scribe is not None:
            self._pass()
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
                if (before := slots[number]) is not None:  # an earlier process has seen to it
                    self.absent = before.cause
                    self.at += 1
                    continue
                if self.absent is not None and not plan.starts_bare[number]:
                    self._settled(number, collector.skip(number, self.absent, now))
                    now = trio.current_time()
                    continue

                self.current = record = collector.begin(number, branch.name, now)
                due = now + limits[number]
                if due < self._armed or due - self._armed > _LONGEST_TURN:
                    self._arm(due)
                try:
                    context = StageContext(branch, record)
                    special = specials[number]
                    body = bodies[number](context) if special is None else self._specially(special, number, context)
                    try:
                        trap = body.send(None)
                    except StopIteration as end:
                        returned = end.value
                    else:
                        if due != self._armed:
                            self._arm(due if self._extended is None else self.due)
                        if scribe is not None and special is None:
                            scribe.entered(record)
                        returned = await Suspended(body, trap)
                        rest = trio.current_time() + _LONGEST_TURN
                    if self.exits:
                        await self.run_exits()
                    output = as_output(returned, record.name)
                    if self.transaction is not None:
                        await self.commit(record, output)
                # What is to be called at the end of an attempt is called in a shielded scope.
                except NotStarted:
                    return None  # and is skipped with what is left
                except BaseException as raised:  # noqa: ASYNC103  # it is raised again, unless there is a failure
                    failure = await self.failure_after(raised)  # noqa: ASYNC102, ASYNC120
                    if failure is None:
                        raise
                    return StageOutput(StageStatus.FAIL, reason=in_words(failure), error=failure)  # noqa: ASYNC104

                now = trio.current_time()
                if output.status is _OK:
                    collector.succeed(record, output, now)
                elif output.status is StageStatus.SKIP:
                    kind = CauseKind.CONDITION if output is _CONDITION else CauseKind.SKIP
                    collector.settle(record, StageState.SKIPPED, Cause(kind, record.name, output.reason or ""), now)
                else:
                    return output
                if scribe is not None:
                    # Shielded: what comes after it is not to start before, and the branch is not to end.
                    await scribe.book.durable(scribe.settled(record, partly=record.name in execution.in_part))
                    now = trio.current_time()
                self._settled(number, record)
        except trio.Cancelled:
            if self.current is None and self.last is not None and self.last.started is not None:
                self.last.after_cancel = True
            raise

    def _pass(self) -> None:
        """Goes past what an earlier process has seen to already; there may be thousands of that."""
        strand, slots, at = self.branch.strand, self.execution.collector.slots, self.at
        while at < len(strand) and (before := slots[strand[at]]) is not None:
            self.absent = before.cause
            at += 1
        self.at = at

    async def _specially(self, special: Special, number: int, context: StageContext) -> Any:  # noqa: ASYNC910
        """Runs a stage of which there is something special: a condition, or how it is tried."""
        record = self.current
        assert record is not None
        if special.condition is not None and not await self._is_met(special.condition, context, record):
            return _CONDITION  # noqa: ASYNC910
        if not special.tried:
            await self.enter_on_record(record, special)
            return await self.execution.plan.bodies[number](context)
        self.tries = Tries(self, number, record, context)
        try:
            return await self.tries.run()
        finally:
            self.tries = None

    async def enter_on_record(self, record: StageRecord, special: Special) -> None:  # noqa: ASYNC910
        """Has it written that a stage is entered, if the run is recorded; before that, if it has effects.

        Raises:
            NotStarted: It could not be written.
        """
        scribe = self.execution.scribe
        if scribe is None:
            return  # noqa: ASYNC910
        receipt = scribe.entered(record, now=special.effects)
        if not special.effects:
            return  # noqa: ASYNC910
        await scribe.book.durable(receipt)
        if self.execution.lost is not None:
            record.attempts -= 1
            if record.attempts == 0:
                record.started = None
            raise NotStarted
        await checkpoint_if_cancelled()  # no body is entered out of a branch that was cancelled meanwhile

    async def commit(self, record: StageRecord, output: StageOutput) -> None:  # noqa: ASYNC910  # shielded
        """Writes the transaction of an attempt that has succeeded.

        Raises:
            Exception: It could not be written, and the attempt has failed.
        """
        transaction, self.transaction = self.transaction, None
        scribe = self.execution.scribe
        if output.status is not _OK or transaction is None or scribe is None or not transaction.statements:
            return  # noqa: ASYNC910
        partly = record.name in self.execution.in_part
        error = await scribe.commit(record, output, trio.current_time(), transaction.statements, partly=partly)
        if error is not None:
            raise error

    async def failure_after(self, raised: BaseException) -> Exception | None:  # noqa: ASYNC910  # shielded
        """Calls what an attempt has left to be called that raised this; gives its failure, `None` if there is none."""
        self.transaction = None
        try:
            await self.run_exits(raised)
        except Exception as error:
            return error  # noqa: ASYNC910
        return as_failure(raised)  # noqa: ASYNC910

    async def run_exits(self, raised: BaseException | None = None) -> None:  # noqa: ASYNC910  # shielded
        """Calls what the current attempt has left to be called.

        Raises:
            Exception: One of them raised it, and the attempt itself had raised nothing, or been cancelled.
        """
        if not self.exits:
            return  # noqa: ASYNC910
        assert self.current is not None
        await run_exits(self._take_exit, self.current, self.execution.graph.settings.cleanup_timeout, raised)

    def _take_exit(self) -> tuple[str, Callable[[], object]] | None:
        """Takes what is to be called next at the end of the attempt."""
        if not self.exits:
            return None
        *rest, last = self.exits
        self.exits = tuple(rest)
        return last

    async def _is_met(self, condition: Condition, context: StageContext, record: StageRecord) -> bool:
        """Asks a condition; the stage counts as entered only if it says yes, and has not cancelled the run itself."""
        started, attempts, record.started = record.started, record.attempts, None
        record.attempts -= 1
        met = condition(context)
        if inspect.isawaitable(met):
            if inspect.iscoroutine(met):
                met.close()
            raise TypeError(f"when= of stage {record.name!r} gave an awaitable; it takes a plain function")
        if self.limit > 0:  # a limit of no time is for the first checkpoint of the stage, and this is none of its
            await checkpoint_if_cancelled()
        if met:
            record.started, record.attempts = started, attempts
        return bool(met)  # noqa: ASYNC910

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
        self.absent = record.cause
        self.at += 1
        if self.execution.plan.followers[number]:
            plan = self.branch.plan
            leaving = None if plan.children or self.at < len(plan.strand) or self.lender is not None else self.branch
            self.execution.scheduler.propagate(number, record.cause, leaving)

    def _time_is_up(self) -> StageOutput:
        record = self.current
        assert record is not None
        record.more.limit, record.details.source = self.limit, self.execution.source_of(record.name)
        reason = self.limit_in_words()
        return StageOutput(StageStatus.FAIL, reason=reason, error=TimeoutError(reason))

    def leave(self, cause: Cause) -> tuple[int, bool]:
        """Stands behind the current stage, which has ended and gives nothing to the next; tells its number.

        Also tells whether its scope was cancelled.
        """
        number = self.branch.strand[self.at]
        self.last, self.current, self.absent = self.current, None, cause
        self.at += 1
        return number, self._scope.cancel_called

    # What a branch asks for the contexts of its stages, of the one that is running

    @property
    def limit(self) -> float:
        """The limit on the current stage, in seconds."""
        limit = self.execution.armed[self.branch.strand[self.at]]
        return limit if self._extended is None or self._extended[0] is not self.current else limit + self._extended[1]

    @property
    def due(self) -> float:
        """When that is reached, on Trio's clock."""
        if self.tries is not None:
            return min(self.tries.due, self.tries.until)
        return math.inf if self.current is None or self.current.started is None else self.current.started + self.limit

    @property
    def too_late(self) -> bool:
        """Whether the limit on the current stage has been reached."""
        return self._scope.cancel_called if self.tries is None else self.tries.too_late

    def limit_in_words(self) -> str:
        """What is said of a stage that has reached its limit."""
        return f"ran longer than its limit of {self.limit:g} s" if self.tries is None else "it has reached its limit"

    def extend(self, seconds: float) -> None:
        """Moves the limit on the current stage."""
        if self.tries is not None:
            self.tries.extend(seconds)
        elif self.current is not None and 0 < self.limit < math.inf:
            before = 0.0 if self._extended is None or self._extended[0] is not self.current else self._extended[1]
            self._extended = self.current, before + seconds
            self._arm(self.due)


def _is_same(one: contextvars.Context, other: contextvars.Context) -> bool:
    """Whether two contexts hold the very same values; what is merely equal may still be another object."""
    return len(one) == len(other) and all(one.get(variable, one) is value for variable, value in other.items())
