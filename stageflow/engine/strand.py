"""The strand of a branch: its stages, run one after the other in one task and under one cancel scope.

The scope carries the limit of the stage that is running. It is re-armed for each stage instead of being made anew, and
replaced only when it has fired.

What is decided where
---------------------
A body can end in three ways, and each is decided in one place:

- it returns or raises: `Strand._walk` sees that, and it is written before anything else is awaited. A body that
  returned has succeeded even if its scope was cancelled meanwhile: what counts is that this was not what ended it;
- its limit ends it: the strand's scope says so by ``cancelled_caught``, in `Strand.run_strand`;
- something further out ends it: `trio.Cancelled` passes through, and the branch writes what that left behind.

The check for cancellation *after* a stage is the same as that *before* the next one: no stage is started out of a
cancelled branch, and the one just finished is marked `after_cancel`.

What an ending means for others takes effect at the end of the scheduler tick in which it was written
(`Execution.at_end_of_tick`). So stages that were ready in the same tick get to their first checkpoint, and which
immediate results exist does not depend on the order in which Trio happens to run them.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from stageflow.context import StageContext
from stageflow.engine.attempt import Suspended, as_failure, as_output
from stageflow.engine.collector import Inputs
from stageflow.errors import ContractViolation, DefinitionError, in_words
from stageflow.journal import Cause, CauseKind, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import OnFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stageflow.context.stage_context import RunState, StagePart
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.execution import Execution
    from stageflow.graph import Branch
    from stageflow.stages.stage import Condition

__all__ = ["Strand"]

_OK = StageStatus.OK
_CONDITION = StageOutput(StageStatus.SKIP, reason="when= said no")
_LONGEST_TURN = 0.001  # seconds, on Trio's clock, of uninterrupted work after which a strand lets other tasks run


class Strand(ABC):
    """The stages of one branch of one run. `BranchRun` puts the nursery around them.

    Attributes:
        branch: Which branch it is.
        name: The branch's name.
        state: What the contexts of the run share.
        unheard: What endings mean for the run, unless it turns out that the caller had cancelled it before.
    """

    __slots__ = (
        "_absent",
        "_armed",
        "_at",
        "_current",
        "_due",
        "_execution",
        "_last",
        "_limit",
        "_present",
        "_rested",
        "_scope",
        "_untold",
        "branch",
        "name",
        "state",
        "unheard",
    )

    def __init__(self, execution: Execution, branch: Branch, at: int, present: tuple[str, ...] | None) -> None:
        self._execution = execution
        self.branch = branch
        self.name = execution.shape.branch_names[branch.index]
        self.state: RunState = execution.state
        self._at: int = at  # where on the strand it is
        self._absent: Cause | None = None  # why the stage before gave no output, if it gave none
        self._present = present  # what the first stage may see, if it does not wait for all of its inputs
        self._current: StageRecord | None = None  # the stage that is running
        self._last: StageRecord | None = None  # the stage that ended last
        self.unheard: tuple[Callable[[], None], ...] = ()
        self._untold: tuple[int, ...] = ()  # stages that have settled, of which others have not heard yet
        self._rested = 0.0  # when this task last let others run
        self._scope: trio.CancelScope  # around the bodies
        self._armed = math.inf  # its deadline
        self._limit: float | None = None  # the limit on the current stage
        self._due = math.inf  # when that is reached

    @abstractmethod
    def end(self, cause: Cause) -> None:
        """Cancels the branch and everything below it, unless that is happening already."""

    @abstractmethod
    def why(self) -> Cause | None:
        """Why the branch is being cancelled, as far as that is known: the nearest cause counts."""

    @abstractmethod
    def leaving(self) -> BranchRun | None:
        """The branch itself, if it ends as soon as its strand does and that is done."""

    @abstractmethod
    def ending(self, stage: StagePart) -> str | None:
        """Why the work of its stages is being cancelled, in words."""

    @abstractmethod
    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        """Gives the branch's nursery to a stage that runs."""

    async def run_strand(self) -> None:  # noqa: ASYNC910  # _walk has one
        going_on = True
        while going_on:
            ending: StageOutput | None = None
            self._rested = now = trio.current_time()
            self._armed = due = now + self._first_limit()
            with trio.CancelScope(deadline=due) as self._scope:
                ending = await self._walk(now)
            if not self._scope.cancelled_caught:
                if ending is None:
                    break  # the strand is done, or the run starts nothing any more
                going_on = await self._conclude(ending)
            elif self._current is not None:
                going_on = await self._conclude(self._time_is_up(), CauseKind.TIMEOUT)
            # Otherwise a stage had ended in spite of its limit, and just the scope is spent.
        if self.branch.parent is None and not self.branch.strand:
            self._execution.launch_roots()

    def _first_limit(self) -> float:
        """The limit to make the scope with: a short one is better set when the stage is there."""
        if self._at == len(self.branch.strand):
            return math.inf
        limit = self._execution.plan.timeouts[self.branch.strand[self._at]]
        return limit if limit is not None and limit > _LONGEST_TURN else math.inf

    async def _walk(self, now: float) -> StageOutput | None:
        """Runs stages until the strand is done (`None`), or until one ends in a way that is to be concluded.

        This is the loop in which all the time goes, hence one function, and no call that can be done without.
        """
        execution, strand = self._execution, self.branch.strand
        collector, plan = execution.collector, execution.plan
        try:
            while True:
                await checkpoint_if_cancelled()
                if self._at == len(strand):
                    return None
                if now - self._rested >= _LONGEST_TURN:
                    self._last = None  # a cancellation that comes now did not come while it ran
                    await checkpoint()
                    self._rested = now = trio.current_time()
                if execution.drained is not None:
                    return None
                number = strand[self._at]
                if self._absent is not None and not plan.starts_bare[number]:
                    self._settled(number, collector.skip(number, self._absent, now))
                    now = trio.current_time()
                    continue

                self._current = record = collector.begin(number, self.name, now)
                self._limit = limit = plan.timeouts[number]
                self._due = due = math.inf if limit is None else now + limit
                if due != self._armed and not 0.0 < due - self._armed <= _LONGEST_TURN:
                    self._arm()
                try:
                    context = StageContext(self, record)
                    condition = plan.conditions[number]
                    if condition is None or await self._is_met(condition, context, record):
                        body = plan.bodies[number](context)
                        try:
                            trap = body.send(None)
                        except StopIteration as end:
                            returned = end.value
                        else:
                            if due != self._armed:
                                self._arm()
                            returned = await Suspended(body, trap)
                            self._rested = trio.current_time()
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
            if self._current is None and self._last is not None and self._last.started is not None:
                self._last.after_cancel = True
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

    def _arm(self) -> None:
        """Puts the scope's deadline where the limit on the current stage is.

        That is the dearest step of a stage that returns at once, so it is put off until the body waits for something.
        Until then the deadline may be that of a stage before, which is too early, but by a millisecond at most, and
        cannot take effect.
        """
        self._armed = self._due
        if self._limit == 0:
            self._scope.cancel(reason="a limit of 0 s")  # which shows at the first checkpoint, whatever the clock says
        else:
            self._scope.deadline = self._due

    def _settled(self, number: int, record: StageRecord) -> None:
        """Goes on to the next stage after one has settled."""
        self._current = None
        self._last = record
        self._absent = record.cause
        self._at += 1
        if self._execution.plan.followers[number]:
            self._execution.propagate(number, record.cause, self.leaving())

    def _write_ending(
        self, number: int, record: StageRecord, ending: StageOutput, kind: CauseKind | None
    ) -> tuple[Cause, OnFailure | None, Strand]:
        """Writes how the current stage ended.

        Returns:
            Why it did; what that means for the run, `None` if just a branch is to end; and which branch that is.
        """
        execution = self._execution
        target: Strand = self
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
            record.limit = self._limit
        cause = Cause(kind, record.name, ending.reason or "")
        execution.collector.fail(record, cause, ending, now)
        record.after_cancel = kind is not CauseKind.TIMEOUT and self._scope.cancel_called
        return cause, execution.plan.on_failure[number], target

    async def _conclude(self, ending: StageOutput, kind: CauseKind | None = None) -> bool:
        """Writes how the current stage ended and does what that means for others; tells whether the strand goes on."""
        record, execution = self._current, self._execution
        assert record is not None
        number = self.branch.strand[self._at]
        cause, policy, target = self._write_ending(number, record, ending, kind)
        self._current = None
        self._last = record
        self._absent = cause
        self._at += 1

        def act() -> None:
            if policy is None:
                target.end(cause)
            else:
                execution.note(record, cause, policy)
                execution.act()

        why = self.why()
        if why is None:
            try:
                await checkpoint_if_cancelled()
            except trio.Cancelled:
                # By the caller, and then it means nothing to others; or just in the nursery that some stage had asked
                # for. `BranchRun` will know when that has closed.
                record.after_cancel = True
                self._untold += (number,)
                self.unheard += (act,)
                raise
        else:
            # If everything was being ended, it means nothing to others either; if just a branch was, it is news.
            record.after_cancel = True
            if why is execution.ending:
                return False  # noqa: ASYNC910

        if policy is None:
            if target is self:
                act()
            else:
                await execution.at_end_of_tick(act)
            execution.propagate(number, cause)
            return False  # noqa: ASYNC910
        execution.note(record, cause, policy)
        if policy is OnFailure.ISOLATE or policy is OnFailure.TOLERATE:
            execution.propagate(number, cause)
            return True  # noqa: ASYNC910
        await execution.at_end_of_tick(execution.act)
        return False  # noqa: ASYNC910

    def _time_is_up(self) -> StageOutput:
        reason = f"ran longer than its limit of {self._limit or 0.0:g} s"
        return StageOutput(StageStatus.FAIL, reason=reason, error=TimeoutError(reason))

    # What the contexts of its stages ask (`StageHost`), as far as the strand knows it

    def deadline_of(self, stage: StagePart) -> float:
        return min(self._due, self.state.deadline) if self._current is stage else self.state.deadline

    def extend_limit(self, stage: StagePart, seconds: float) -> None:
        if self._current is not stage:
            raise RuntimeError(f"stage {stage.name!r} has ended, so there is no limit to extend")
        if self._scope.cancel_called:
            raise RuntimeError(f"stage {stage.name!r} has reached its limit, so it is too late to extend it")
        if self._limit:
            self._limit += seconds
            self._due += seconds
            self._arm()

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        execution = self._execution
        names: tuple[str, ...] | None = None
        if self._present is not None and stage.name == execution.shape.names[self.branch.strand[0]]:
            names = self._present
        if names is None:
            number = execution.shape.index[stage.name]
            names = tuple(execution.shape.names[other] for other in execution.shape.dependencies[number])
        return Inputs(names, execution.collector.outputs, lambda name: execution.missing_input(stage.name, name))
