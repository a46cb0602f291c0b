"""The saga: undoing what the stages of a run have done, when the run has failed or was cancelled.

Order. What a stage did is undone after everything that used it has been: the graph is walked backwards, over those
stages that were entered. Stages that need no undo are passed; what does not depend on each other is undone at once,
under a limit. If an undo fails for good, what its stage had used is held: undoing that underneath what is still there
could only make things worse.

Doubt. A stage that was entered and did not succeed may have taken effect or not. Its undo is called with no output, and
has to find out.

Truth. An undo is on record before it is called, and when it has ended; only then the next one is called. A run is
compensated when every undo that it needs has ended well, and not before. COMPENSATING is a door of one way: a run that
has gone through is never gone on with, whatever happens, but the undoing is, by whoever resumes it.

Runs within a stage, and the items of a map, are undone before the stage itself. A run within that has failed by itself
has been undone by itself.

The undos are in the task of who runs the run, when everything else has ended; so nothing of the run can cancel them.
The caller can: a run that is cancelled while it is undone is INTERRUPTED, and can be resumed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast, final

import trio

from stageflow.context import StageContext
from stageflow.engine.branch import CALLER
from stageflow.engine.undoing import Undoing
from stageflow.errors import in_words
from stageflow.graph.branches import TRUNK
from stageflow.journal import RunStatus, StageState
from stageflow.journal.undo import CompensationRecord, CompensationStatus, UndoRecord, UndoState
from stageflow.stages import Default

if TYPE_CHECKING:
    from stageflow.engine.execution import Execution
    from stageflow.journal import Cause, StageRecord
    from stageflow.stages import StageSpec

__all__ = ["Saga", "compensate", "undo_branch"]


async def compensate(execution: Execution, status: RunStatus) -> None:  # noqa: ASYNC910  # mostly there is nothing to do
    """Undoes what a run has done, if it has ended in a way that says so.

    Args:
        execution: The run; all of its stages have settled.
        status: What it has come to.

    Raises:
        trio.Cancelled: The caller has cancelled it; what is undone by then is on record.
    """
    if execution.lost is not None or execution.fatal is not None:
        return  # noqa: ASYNC910
    asked = {RunStatus.FAILED: "fail", RunStatus.CANCELLED: "cancel", RunStatus.INTERRUPTED: "interrupt"}.get(status)
    if not execution.going_back and asked not in execution.graph.settings.compensate_on:
        if execution.trunk_undone and execution.trunk.cause is not None:
            await undo_branch(execution, TRUNK, execution.trunk.cause)
        return  # noqa: ASYNC910
    pivot = _past_pivot(execution)
    if pivot is not None:
        _note_pivot(execution, pivot)
        return  # noqa: ASYNC910
    if not execution.going_back and not _has_undos(execution):
        return  # noqa: ASYNC910
    saga = Saga(execution, execution.cause or execution.ending or CALLER)
    if status is not RunStatus.INTERRUPTED or execution.going_back:
        await saga.run()
        return
    deadline = trio.current_time() + execution.graph.settings.compensation_budget
    with trio.CancelScope(shield=True, deadline=deadline):
        await saga.run()


async def undo_branch(execution: Execution, branch: int, cause: Cause) -> None:
    """Undoes what was done in a branch, and in those below it.

    Raises:
        trio.Cancelled: The run ends, and undoes it then, or the caller has cancelled it.
    """
    numbers: list[int] = []
    todo = [branch]
    for index in todo:  # grows on the way
        numbers += execution.shape.branches[index].strand
        todo += execution.shape.branches[index].children
    saga = Saga(execution, cause)
    await saga.undo_part(frozenset(numbers))


@final
class Saga:
    """Undoes a run, or a part of it, with all that it has run within itself.

    Args:
        execution: The run.
        cause: Why it is undone.
    """

    def __init__(self, execution: Execution, cause: Cause) -> None:
        self._execution = execution
        self._cause = cause
        self._room = trio.Semaphore(execution.graph.settings.undo_limit)
        if execution.collector.compensation is None:
            execution.collector.compensation = CompensationRecord(cause)
        self.record: CompensationRecord = execution.collector.compensation

    async def run(self) -> None:
        """Undoes the run as a whole.

        Raises:
            trio.Cancelled: The caller has cancelled it.
        """
        execution, record, scribe = self._execution, self.record, self._execution.scribe
        record.cause, record.status = self._cause, CompensationStatus.COMPENSATING
        if scribe is not None and not await scribe.compensating(execution, self._cause):
            return
        execution.going_back = True
        self._note_what_is_gone()
        await self._undo_run(execution, "", None)
        record.conclude()
        if scribe is not None:
            await scribe.compensated(record.status)

    async def undo_part(self, numbers: frozenset[int]) -> None:
        """Undoes some of its stages.

        Raises:
            trio.Cancelled: The run ends, or the caller has cancelled it.
        """
        self.record.status = CompensationStatus.COMPENSATING
        await self._undo_run(self._execution, "", numbers)
        self.record.conclude()

    def _note_what_is_gone(self) -> None:
        """Notes of stages that are no longer in the graph that nobody knows how to undo them."""
        execution, scribe = self._execution, self._execution.scribe
        if scribe is None or scribe.history is None:
            return
        for name in scribe.undoable_on_record():
            if name not in execution.graph.stages:
                undo = self._record(execution, name, name)
                undo.state, undo.reason = UndoState.FAILED, "the pipeline has no such stage any more"

    # One run

    async def _undo_run(self, execution: Execution, prefix: str, only: frozenset[int] | None) -> bool:
        """Undoes a run; tells whether nothing of it is left that should have been undone."""
        slots, dependencies = execution.collector.slots, execution.shape.dependencies
        ran = {
            number
            for number, record in enumerate(slots)
            if record is not None and record.attempts and (only is None or number in only)
        }
        users: dict[int, list[int]] = {number: [] for number in ran}
        for number in ran:
            for other in dependencies[number]:
                if other in ran:
                    users[other].append(number)
        left = {number: len(after) for number, after in users.items()}
        stopped: set[int] = set()  # what could not be undone, or was not
        if only is not None:
            stopped |= _used_outside(execution, ran)

        async def undo(number: int, nursery: trio.Nursery) -> None:
            name = prefix + execution.shape.names[number]
            if number in stopped:  # since something outside has used it
                self._note(execution, name, number, UndoState.NOT_NEEDED, "something outside of the branch has used it")
            elif any(user in stopped for user in users[number]):
                stopped.add(number)
                culprits = [prefix + execution.shape.names[user] for user in users[number] if user in stopped]
                self._note(execution, name, number, UndoState.HELD, f"{culprits[0]!r}, which used it, is still there")
            elif not await self._undo_stage(execution, prefix, number):
                stopped.add(number)
            for other in dependencies[number]:
                if other in ran:
                    left[other] -= 1
                    if not left[other]:
                        nursery.start_soon(undo, other, nursery)

        async with trio.open_nursery() as nursery:
            for number in sorted(ran, reverse=True):
                if not left[number]:
                    nursery.start_soon(undo, number, nursery)
        return not stopped

    # One stage

    async def _undo_stage(self, execution: Execution, prefix: str, number: int) -> bool:
        """Undoes a stage, after what was run within it; tells whether it is no longer in the way."""
        spec = execution.graph.stages[execution.shape.names[number]]
        record = execution.collector.slots[number]
        assert record is not None
        well = True
        for title, child in children_of(execution, spec):
            if child is None:
                reason = "it was run by another process, with ctx.run_pipeline(); declare it with with_stage()"
                undo = cast("dict[str, UndoRecord]", self.record.undos).setdefault(title, UndoRecord(title))
                undo.state, undo.reason = UndoState.FAILED, reason
                well = False
            else:  # what it has undone by itself, when it failed, stays undone
                well &= await self._undo_run(child, prefix if child.title is not None else f"{prefix}{title}/", None)
        name = prefix + (spec.name if execution.title is None else execution.title)
        if not well:
            self._note(execution, name, number, UndoState.HELD, "what was run within it is still there")
            return False
        if spec.irrevocable:
            self._note(execution, name, number, UndoState.IRREVOCABLE, "")
            return True
        if spec.compensate is None:
            return True
        if record.state is StageState.SKIPPED:
            self._note(execution, name, number, UndoState.NOT_NEEDED, "it skipped itself")
            return True
        if record.state is not StageState.SUCCEEDED and spec.compensate_when == "succeeded":
            self._note(execution, name, number, UndoState.NOT_NEEDED, f"it has {record.state.value}")
            return True
        undo = self._record(execution, spec.name, name)
        if undo.state is UndoState.UNDONE:
            return True  # by an earlier process, or with its branch
        undo.best_effort = spec.compensate.best_effort
        async with self._room:
            return await self._call(execution, spec, record, undo) or undo.best_effort

    async def _call(self, execution: Execution, spec: StageSpec, record: StageRecord, undo: UndoRecord) -> bool:
        """Calls the undo of a stage, until it has ended well or may not be tried again; tells whether it has."""
        compensation, scribe = spec.compensate, execution.scribe
        assert compensation is not None
        limit = compensation.timeout
        if isinstance(limit, Default):
            limit = execution.graph.settings.default_timeout
        seconds = math.inf if limit is None else limit
        output = record.output if record.state is StageState.SUCCEEDED else None
        undo.state = UndoState.PENDING
        undo.started = trio.current_time() if undo.started is None else undo.started
        tried = 0
        while True:
            undo.attempts, tried = undo.attempts + 1, tried + 1
            if scribe is not None and not await scribe.undoing(spec.name, undo):
                return False  # it must be on record before it is called
            host = Undoing(execution, record, undo, self._cause, trio.current_time() + seconds)
            try:
                with trio.CancelScope(deadline=host.deadline) as host.scope:
                    await compensation.undo(StageContext(host, host.part), output)
                failure: Exception | None = None
                if host.scope.cancelled_caught:
                    failure = TimeoutError(f"ran longer than its limit of {seconds:g} s")
            except Exception as error:
                failure = error
            retry = compensation.retry
            if failure is None or tried >= retry.attempts or not retry.matches(failure):
                break
            undo.error, undo.reason = failure, in_words(failure)
            await trio.sleep(retry.delay_after(tried))
        undo.state = UndoState.UNDONE if failure is None else UndoState.FAILED
        undo.error, undo.reason = failure, "" if failure is None else in_words(failure)
        undo.ended = trio.current_time()
        if scribe is not None:
            await scribe.undone(spec.name, undo)
        return failure is None

    def _record(self, execution: Execution, stage: str, name: str) -> UndoRecord:
        undo = execution.undos.get(stage)
        if undo is None:
            undo = execution.undos[stage] = UndoRecord(name)
        undo.stage = name
        cast("dict[str, UndoRecord]", self.record.undos)[name] = undo
        return undo

    def _note(self, execution: Execution, name: str, number: int, state: UndoState, reason: str) -> None:
        """Notes what has become of a stage without its undo being called; of stages that have none, nothing is said."""
        spec = execution.graph.stages[execution.shape.names[number]]
        if spec.compensate is None and not spec.irrevocable:
            return
        undo = self._record(execution, spec.name, name)
        if undo.state is not UndoState.UNDONE:
            undo.state, undo.reason, undo.ended = state, reason, trio.current_time()
            if execution.scribe is not None:
                execution.scribe.not_undone(spec.name, undo)


def _note_pivot(execution: Execution, pivot: str) -> None:
    """Notes that nothing is undone, since the run is past the point of no return."""
    undos: dict[str, UndoRecord] = {}
    for number, spec in enumerate(execution.graph.stages.values()):
        record = execution.collector.slots[number]
        if spec.compensate is not None and record is not None and record.attempts:
            reason = f"{pivot!r}, the point of no return, has succeeded; resume the run"
            undos[spec.name] = UndoRecord(spec.name, UndoState.NOT_NEEDED, reason)
    if undos:
        execution.collector.compensation = CompensationRecord(
            execution.cause or execution.ending or CALLER, CompensationStatus.NOT_NEEDED, undos
        )


def _used_outside(execution: Execution, ran: set[int]) -> set[int]:
    """Gives those of some stages whose output a stage has used that is none of them, and has succeeded."""
    used: set[int] = set()
    for number, record in enumerate(execution.collector.slots):
        if number not in ran and record is not None and record.state is StageState.SUCCEEDED:
            used.update(other for other in execution.shape.dependencies[number] if other in ran)
    return used


def _has_undos(execution: Execution) -> bool:
    """Whether anything of a run, or of what it has run within itself, says how it is undone."""
    for number, spec in enumerate(execution.graph.stages.values()):
        record = execution.collector.slots[number]
        if record is None or not record.attempts:
            continue
        if spec.compensate is not None or spec.irrevocable:
            return True
        if any(child is None or _has_undos(child) for _, child in children_of(execution, spec)):
            return True
    return False


def _past_pivot(execution: Execution) -> str | None:
    """Gives the stage by which a run is past the point of no return, if it is."""
    for number, spec in enumerate(execution.graph.stages.values()):
        record = execution.collector.slots[number]
        if spec.pivot and record is not None and record.state is StageState.SUCCEEDED:
            return spec.name
    return None


def children_of(execution: Execution, spec: StageSpec) -> list[tuple[str, Execution | None]]:
    """Gives the runs that a stage has made within itself and that may have something to undo, the last one first.

    Of what an earlier process ran there is only the journal; `None` stands for what cannot be known from it.
    """
    unknown: list[tuple[str, Execution | None]] = []
    if execution.scribe is not None and execution.scribe.history is not None:
        from stageflow.engine.recorded import children_on_record  # noqa: PLC0415  # only where there is a store

        unknown = children_on_record(execution, spec)
    return [*unknown, *execution.undoable.get(spec.name, ())][::-1]
