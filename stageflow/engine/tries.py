"""The tries of one stage: of one that is tried again, must give signs of life, waits for limits, or guards another.

A plain stage has nothing of this: the walker awaits its body itself, under the scope that it re-arms for each stage.

Here every attempt has a scope of its own, whose deadline is the nearest of the limit on the attempt and the limit on
its silence. Around all attempts is one more, if there is a limit on all of them. As everywhere, a body that has
returned counts, whatever has been cancelled meanwhile, and ``cancelled_caught`` decides which limit it was.

A guard that finds the output of another stage wanting sends it back: `Tries._send_back` runs that stage again, and what
is between it and the guard, here, in the guard's own task. That is possible as long as nobody else has begun with the
output; and since the guard has not ended, whoever waits for both has not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import attrs
import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from stageflow.context import StageContext
from stageflow.engine.body import is_cancellation
from stageflow.engine.ending import kind_of
from stageflow.engine.paths import path_from
from stageflow.errors import DefinitionError, StagnationError, in_words
from stageflow.graph import Special
from stageflow.journal import Attempt, Cause, CauseKind, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import OnFailure
from stageflow.stages.limit import instead_of
from stageflow.stages.returned import as_output

if TYPE_CHECKING:
    from stageflow.engine.strand import Walker
    from stageflow.journal import StageRecord
    from stageflow.stages import Limit

__all__ = ["NotStarted", "Tries"]

_ORDINARY = Special()
_TOO_LONG = "ran longer than its total limit of"


class NotStarted(Exception):
    """A stage that waited for its turn is not started any more."""


@final
class Tries:
    """Makes the attempts of one stage, until it has an ending.

    Attributes:
        record: The stage's record.
        feedback: Why it is tried again.
        due: When the limit on the current attempt is reached.
        until: When the limit on all attempts is reached.
        scope: The scope of the current attempt.
        total: The scope of all attempts, if there is a limit on them.
        held: The limits of which it holds a token.
        raised: Whether the last attempt has raised its failure, and not returned it.
    """

    __slots__ = (
        "_beat",
        "_before",
        "_context",
        "_entered",
        "_number",
        "_special",
        "_walker",
        "due",
        "feedback",
        "held",
        "raised",
        "record",
        "scope",
        "total",
        "until",
    )

    def __init__(self, walker: Walker, number: int, record: StageRecord, context: StageContext) -> None:
        self._walker = walker
        self._number = number
        self._special = walker.execution.specials[number] or _ORDINARY
        self._context = context
        self._before = record.attempts - 1 if record.attempts else 0  # how many there were before these
        self._entered = record.details.began is not None  # whether any attempt has begun
        self._beat = math.inf  # when it will have been silent for too long
        self.record: StageRecord = record
        self.feedback: str | None = None
        self.due: float = math.inf
        self.until: float = math.inf
        self.scope: trio.CancelScope | None = None
        self.total: trio.CancelScope | None = None
        self.held: tuple[Limit, ...] = ()
        self.raised: bool = False
        prior = walker.execution.prior.pop(number, None) if walker.execution.prior else None
        if prior is not None:  # the attempts of earlier processes count as well
            self._before = record.attempts - 1 - prior.spent
            self.feedback = prior.feedback

    async def run(self) -> StageOutput:  # noqa: ASYNC910  # as the body does, or does not
        """Makes attempts until one is the last, and gives what that came to.

        Raises:
            trio.Cancelled: Something around the stage was cancelled.
        """
        total = self._special.total_timeout
        if total == math.inf:
            return await self._until_settled()
        ending: StageOutput | None = None
        until = trio.current_time() + total
        self.until = min(self.until, until)
        with trio.CancelScope(deadline=until) as self.total:
            if total == 0:
                self.total.cancel(reason="a limit of 0 s")
            ending = await self._until_settled()
        if ending is not None:
            self.record.after_cancel |= self.total.cancel_called
            return ending
        spec = self._walker.execution.graph.stages[self.record.name]
        return self._out_of_time(_TOO_LONG, total, f"total_timeout= of {spec.where}")

    async def _until_settled(self) -> StageOutput:  # noqa: ASYNC910
        retry, record = self._special.retry, self.record
        most = 1 if retry is None else retry.attempts
        again = False
        while True:
            began = trio.current_time()
            output = await self._attempt(again=again)
            made = record.attempts - self._before
            if not self._is_worth_another(output):
                return output
            if output.status is StageStatus.RETRY and output.of not in (None, record.name):
                if made >= most:
                    return _given_up(output, made)
                sent_back = await self._send_back(output, self._note(output, began))
                if sent_back is not None:
                    return sent_back
            elif made >= most:
                return _given_up(output, made) if output.status is StageStatus.RETRY else output
            else:
                self._note(output, began)
                if output.status is StageStatus.RETRY:
                    self.feedback = output.reason
                delay = 0.0 if retry is None else retry.delay_after(made)
                if delay:
                    await trio.sleep(delay)
                else:
                    await checkpoint()
            again = True

    def _is_worth_another(self, output: StageOutput) -> bool:
        if output.status is StageStatus.RETRY:
            return True
        if output.status is not StageStatus.FAIL:
            return False
        if output.recoverable or self.record.limit is not None:
            return True
        retry = self._special.retry
        return self.raised and retry is not None and retry.matches(output.error)

    def _note(self, output: StageOutput, began: float) -> Attempt:
        """Notes an attempt that is followed by another; of one that sends a stage back, that is not on record yet."""
        record = self.record
        attempt = Attempt(
            number=record.attempts,
            started=began if record.details.began is None else record.details.began,
            ended=trio.current_time(),
            reason=output.reason,
            error=output.error,
        )
        record.more.earlier = (*record.details.earlier, attempt)
        scribe = self._walker.execution.scribe
        if scribe is not None:
            asked = output.status is StageStatus.RETRY
            if not asked or output.of in (None, record.name):
                scribe.tried(record, attempt, output.reason if asked else None)
        return attempt

    async def _attempt(self, *, again: bool) -> StageOutput:  # noqa: ASYNC910
        """Makes one attempt: waits for what the stage uses, and runs its body under its limits."""
        await self._take_limits()
        try:
            record, walker = self.record, self._walker
            now = trio.current_time()
            record.more.began, record.details.limit = now, None
            record.attempts += again  # only now, for while it waited or slept there was no other attempt yet
            if record.attempts == 0:
                record.attempts, record.started = 1, now
            self._entered = True
            await walker.enter_on_record(record, self._special)
            limit, now = walker.execution.timeouts[self._number], trio.current_time()
            self.due, self._beat = now + limit, now + self._special.heartbeat
            output: StageOutput | None = None
            with trio.CancelScope(deadline=min(self.due, self._beat)) as scope:
                self.scope = scope
                if limit == 0:
                    scope.cancel(reason="a limit of 0 s")
                output = await self._enter()
            record.after_cancel = scope.cancel_called and not scope.cancelled_caught
            if scope.cancelled_caught or output is None:
                output = self._limit_reached(now)
            return output
        finally:
            self.scope = None
            self._give_back()

    async def _enter(self) -> StageOutput:  # noqa: ASYNC910
        try:
            self.raised = False
            returned = await self._walker.execution.plan.bodies[self._number](self._context)
            if self._walker.exits:
                await self._walker.run_exits()
            output = as_output(returned, self.record.name)
            if self._walker.transaction is not None:
                await self._walker.commit(self.record, output)
            return output
        except BaseException as raised:  # noqa: ASYNC103  # it is, unless there is a failure
            failure = await self._walker.failure_after(raised)  # noqa: ASYNC102, ASYNC120  # shielded there
            if failure is None:
                raise
            self.raised = True
            return StageOutput(StageStatus.FAIL, reason=in_words(failure), error=failure)  # noqa: ASYNC104

    def _limit_reached(self, began: float) -> StageOutput:
        execution, name = self._walker.execution, self.record.name
        if self._beat < self.due:
            source = f"heartbeat= of {execution.graph.stages[name].where}"
            return self._out_of_time("gave no sign of life for", self._special.heartbeat, source)
        return self._out_of_time("ran longer than its limit of", self.due - began, execution.source_of(name))

    def _out_of_time(self, what: str, limit: float, source: str) -> StageOutput:
        self.record.more.limit, self.record.details.source = limit, source
        record = self.record
        reason = f"{what} {limit:g} s"
        error = TimeoutError(reason)
        if what is _TOO_LONG:
            if record.details.earlier:
                error.__cause__ = record.details.earlier[-1].error
                reason += f"; its attempt before: {record.details.earlier[-1].reason}"
            if record.details.waited:
                uses = ", ".join(map(repr, self._special.uses)) or "its turn"
                reason += f"; it had waited {record.details.waited:g} s for {uses}"
        return StageOutput(StageStatus.FAIL, reason=reason, error=error)

    async def _take_limits(self) -> None:  # noqa: ASYNC910
        """Takes a token of everything that the stage uses, and waits where there is none.

        All stages take tokens in the same order, whatever the limits are called, so that no two wait for each other.
        """
        execution = self._walker.execution
        used = {execution.limits[name] for name in self._special.uses}
        wanted = sorted((instead_of(limit, execution.state.lent) for limit in used), key=lambda limit: limit.number)
        if execution.turns is not None:
            wanted.append(execution.turns)  # last, so that nobody has a turn only to wait for something else
        if not wanted:
            return  # noqa: ASYNC910
        record = self.record
        attempts, started, before = record.attempts, record.started, trio.current_time()
        if not self._entered:
            record.attempts -= 1
            record.started = started if record.attempts else None
        try:
            for limit in wanted:
                await self._wait_for(limit)
                self.held += (limit,)
            await checkpoint_if_cancelled()  # its turn may have come in the very tick in which it was cancelled
            self._look_whether_to_start()
        except BaseException:
            self._give_back()
            raise
        finally:
            now = trio.current_time()
            if now > before:
                record.more.waited += now - before
        record.attempts = attempts
        record.started = started if self._entered or record.details.earlier else now

    async def _wait_for(self, limit: Limit) -> None:  # noqa: ASYNC910  # take() has one
        """Waits for a token. If the run starts nothing any more, a stage that was not entered yet waits no longer."""
        waiting = self._walker.execution.waiting
        with trio.CancelScope() as scope:
            if not self._entered:
                waiting.add(scope)
            try:
                await limit.take(self._special.priority, self._number)
            finally:
                waiting.discard(scope)
        if scope.cancelled_caught:
            raise NotStarted

    def _look_whether_to_start(self) -> None:
        if not self._entered and self._walker.execution.drained is not None:
            raise NotStarted

    def _give_back(self) -> None:
        """Gives back the tokens; what was lent to a run that still goes, that run gives back."""
        loans = self._walker.execution.loans.pop(self.record.name, {}) if self.held else {}
        for taken in reversed(self.held):
            loan = loans.get(taken)
            if loan is None or not loan.outlive(taken):
                taken.give_back()
        self.held = ()

    # A guard, and the stage that it sends back

    async def _send_back(self, verdict: StageOutput, attempt: Attempt) -> StageOutput | None:  # noqa: ASYNC910
        """Runs the stage again that a guard has found wanting; gives how the guard ends, if that came to nothing."""
        execution, guard = self._walker.execution, self.record
        assert verdict.of is not None
        await checkpoint()  # whoever became ready with the guard has begun by now, or will not without it
        if execution.scribe is not None:
            # In one with what follows: or else a crash between the two would cost the guard one of its attempts.
            execution.scribe.tried(guard, attempt, None, together=True)
        try:
            path = path_from(execution, verdict.of, self._number)
        except DefinitionError as error:
            return StageOutput.fail(error)  # noqa: ASYNC910
        before = execution.collector.output(verdict.of)
        if execution.scribe is not None:
            names = [execution.shape.names[number] for number in path]
            execution.scribe.reopened(names, verdict.reason, trio.current_time())
        for place, number in enumerate(path):
            await checkpoint_if_cancelled()  # no body is entered any more then, and what had succeeded stays so
            output = await self._again(number, verdict.reason if place == 0 else None)
            if output is not None and output.status in (StageStatus.CANCEL, StageStatus.CANCEL_BRANCH):
                # What it says of the run or of its branch is said.
                of = output.of if output.status is StageStatus.CANCEL else output.of or execution.shape.names[number]
                return attrs.evolve(output, of=of)
            if output is None or output.status is not StageStatus.OK:
                name = execution.shape.names[number]
                if output is not None and output.status is StageStatus.SKIP:
                    return StageOutput.skip(f"{name!r}, sent back by {guard.name!r}, was skipped: {output.reason}")
                if output is not None and output.status is StageStatus.FAIL:
                    await self._tell(number)
                why = None if output is None else output.error
                why = why or RuntimeError(f"{name!r} gave no output when it was sent back")
                reason = f"{name!r}, sent back by {guard.name!r}: {in_words(why)}"
                return StageOutput(StageStatus.FAIL, reason=reason, error=why)
            if place == 0 and output.data == before.data:
                return StageOutput.fail(StagnationError(stage=verdict.of, guard=guard.name))
        return None  # noqa: ASYNC910

    async def _tell(self, number: int) -> None:  # noqa: ASYNC910  # at_end_of_tick is one
        """Does what it means for the run that a stage has failed which was sent back."""
        execution = self._walker.execution
        record, policy = execution.collector.slots[number], execution.plan.on_failure[number]
        assert record is not None
        assert record.cause is not None
        execution.note(record, record.cause, policy)
        if policy in (OnFailure.FAIL_FAST, OnFailure.DRAIN):
            await execution.at_end_of_tick(execution.act)

    async def _again(self, number: int, feedback: str | None) -> StageOutput | None:  # noqa: ASYNC910
        """Runs a stage again that had succeeded, and writes how it ends this time."""
        walker, guard = self._walker, self.record
        collector = walker.execution.collector
        record = collector.reopen(number, feedback, trio.current_time())
        walker.execution.scheduler.retract(number)
        walker.current = record
        walker.tries = tries = Tries(walker, number, record, StageContext(walker.branch, record))
        tries.feedback = feedback
        output: StageOutput | None = None
        try:
            output = await tries.run()
        except NotStarted:
            raise
        except BaseException as raised:
            if not is_cancellation(raised):
                walker.execution.dies_of(raised, record)  # here it is still known which stage it was
            raise
        finally:
            walker.current, walker.tries = guard, self
            self._write(record, output)
            if walker.execution.scribe is not None:
                scribe, partly = walker.execution.scribe, record.name in walker.execution.in_part
                tolerated = walker.execution.plan.on_failure[number] is OnFailure.TOLERATE
                receipt = scribe.settled(record, tolerated=tolerated and record.error is not None, partly=partly)
                await scribe.book.durable(receipt)  # noqa: ASYNC102  # shielded
            walker.execution.scheduler.propagate(number, record.cause)
        return output

    def _write(self, record: StageRecord, output: StageOutput | None) -> None:
        """Writes how a stage ended that was sent back; `None` if it was cancelled."""
        collector, now = self._walker.execution.collector, trio.current_time()
        reason = "" if output is None else output.reason or ""
        if output is None:
            cause = self._walker.branch.why() or self._walker.execution.drained
            if cause is None and self.total is not None and self.total.cancel_called:
                cause = Cause(CauseKind.TIMEOUT, self.record.name, f"{_TOO_LONG} {self._special.total_timeout:g} s")
            state = StageState.CANCELLED if record.error is None else StageState.FAILED
            collector.settle(record, state, cause or self._walker.branch.blame(), now)
        elif output.status is StageStatus.OK:
            collector.succeed(record, output, now)
        elif output.status is StageStatus.FAIL:
            collector.fail(record, Cause(kind_of(record, output), record.name, reason), output, now)
        elif output.status is StageStatus.SKIP:
            collector.settle(record, StageState.SKIPPED, Cause(CauseKind.SKIP, record.name, reason), now)
        else:
            kind = CauseKind.CANCEL if output.status is StageStatus.CANCEL else CauseKind.CANCEL_BRANCH
            collector.settle(record, StageState.CANCELLED, Cause(kind, record.name, reason), now)

    # What the stage's context asks

    def beat(self) -> None:
        """Notes a sign of life."""
        if self._special.heartbeat < math.inf and self.scope is not None:
            beat = trio.current_time() + self._special.heartbeat
            self.scope.deadline = min(self.due, beat)
            if not self.scope.cancel_called:  # or a stage that saves something on its way out would blur what ended it
                self._beat = beat

    @property
    def too_late(self) -> bool:
        """Whether the limit on the current attempt, or on all of them, has been reached."""
        return any(scope is not None and scope.cancel_called for scope in (self.scope, self.total))

    def extend(self, seconds: float) -> None:
        """Moves the limit on the current attempt."""
        if self.scope is not None and self.scope.deadline > -math.inf and self.due > trio.current_time():
            self.due += seconds
            self.scope.deadline = min(self.due, self._beat)


def _given_up(output: StageOutput, made: int) -> StageOutput:
    """What becomes of a stage that would be tried again, and may not."""
    reason = f"{output.reason}; given up after {made} attempt{'' if made == 1 else 's'}"
    return StageOutput(StageStatus.FAIL, reason=reason, error=RuntimeError(reason))
