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

import itertools
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast, final

import trio

from stageflow.context import StageContext
from stageflow.engine.body import as_failure, is_cancellation
from stageflow.engine.branch import CALLER
from stageflow.engine.maps import OverItems
from stageflow.engine.undoing import Undoing
from stageflow.errors import in_words
from stageflow.graph.branches import TRUNK
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.journal.undo import CompensationRecord, CompensationStatus, UndoRecord, UndoState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import Default

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping

    from stageflow.engine.execution import Execution
    from stageflow.journal.history import StageHistory
    from stageflow.stages import StageSpec

__all__ = ["Saga", "compensate", "undo_branch"]

_NOTHING: tuple[bool, tuple[str, ...]] = False, ()


async def compensate(execution: Execution, status: RunStatus) -> None:  # noqa: ASYNC910  # mostly there is nothing to do
    """Undoes what a run has done, if it has ended in a way that says so.

    Args:
        execution: The run; all of its stages have settled.
        status: What it has come to.

    Raises:
        trio.Cancelled: The caller has cancelled it; what is undone by then is on record.
    """
    if execution.lost is not None or execution.fatal is not None or execution.spared:
        return  # noqa: ASYNC910
    asked = {RunStatus.FAILED: "fail", RunStatus.CANCELLED: "cancel", RunStatus.INTERRUPTED: "interrupt"}.get(status)
    if not execution.going_back and asked not in execution.graph.settings.compensate_on:
        record = execution.collector.compensation
        if execution.trunk_undone and execution.trunk.cause is not None:
            await undo_branch(execution, TRUNK, execution.trunk.cause)
        elif record is not None and record.left and status is not RunStatus.INTERRUPTED:
            # A branch was being undone when the run ended; that is finished, whatever becomes of the rest.
            await Saga(execution, record.cause or CALLER).undo_part(record.left)
        return  # noqa: ASYNC910
    pivot = None if execution.going_back else _past_pivot(execution)
    if pivot is not None:
        _note_pivot(execution, pivot, range(len(execution.collector.slots)))
        return  # noqa: ASYNC910
    if not execution.going_back and not _has_undos(execution):
        return  # noqa: ASYNC910
    saga = Saga(execution, _cause_of(execution))
    if status is not RunStatus.INTERRUPTED or execution.going_back:
        await saga.run()
        return
    deadline = trio.current_time() + execution.graph.settings.compensation_budget
    with trio.CancelScope(shield=True, deadline=deadline):
        await saga.run()


async def undo_branch(execution: Execution, branch: int, cause: Cause) -> None:  # noqa: ASYNC910  # likewise
    """Undoes what was done in a branch, and in those below it, unless the run is past its point of no return.

    Raises:
        trio.Cancelled: The run ends, and undoes it then, or the caller has cancelled it.
    """
    numbers: list[int] = []
    todo = [branch]
    for index in todo:  # grows on the way
        numbers += execution.shape.branches[index].strand
        todo += execution.shape.branches[index].children
    pivot = _past_pivot(execution)
    if pivot is not None and not any(execution.shape.names[number] in execution.undos for number in numbers):
        _note_pivot(execution, pivot, numbers)
        return  # noqa: ASYNC910
    await Saga(execution, cause).undo_part(frozenset(numbers))


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
        everything = frozenset(range(len(execution.collector.slots)))
        record.cause = self._cause
        record.begin(everything)
        if scribe is not None and not await scribe.compensating(execution, self._cause):
            return  # noqa: ASYNC910  # it has waited for the store
        execution.going_back = True
        await self._undo_run(execution, "", None)
        record.conclude(everything)
        if scribe is not None:
            await scribe.compensated(record.status)

    async def undo_part(self, numbers: frozenset[int]) -> None:
        """Undoes some of its stages.

        Raises:
            trio.Cancelled: The run ends, or the caller has cancelled it.
        """
        self.record.begin(numbers)
        await self._undo_run(self._execution, "", numbers)
        self.record.conclude(numbers)

    # One run

    async def _undo_run(
        self, execution: Execution, prefix: str, only: frozenset[int] | None, *, alone: bool = False
    ) -> bool:
        """Undoes a run; tells whether nothing of it is left that should have been undone.

        Args:
            execution: The run.
            prefix: What stands before the names of its stages.
            only: The stages that are to be undone; `None` for all.
            alone: Whether the prefix alone is the name of its only stage, since it is an item of a map.
        """
        names, dependencies = execution.shape.names, execution.shape.dependencies
        paths = [prefix if alone else prefix + name for name in names]
        ran = {number for number in range(len(names)) if (only is None or number in only) and _ran(execution, number)}
        users: dict[int, list[int]] = {number: [] for number in ran}
        for number in ran:
            for other in dependencies[number]:
                if other in ran:
                    users[other].append(number)
        left = {number: len(after) for number, after in users.items()}
        stopped: dict[int, str] = {}  # what could not be undone
        outside = set[int]() if only is None else _used_outside(execution, ran)
        kept: dict[int, str] = {}  # what is not undone, since something outside of the branch has used it
        said = {} if execution.scribe is None else execution.scribe.undoable_on_record(execution.scribe.history)
        gone = {} if only is not None else self._note_what_is_gone(execution, prefix, said)
        held = {index: path for path, before in gone.items() for index in before}

        async def undo(number: int, nursery: trio.Nursery) -> None:  # noqa: ASYNC910  # a task of its own
            path, after = paths[number], users[number]
            held_by = next((stopped[user] for user in after if user in stopped), held.get(number))
            kept_by = next((kept[user] for user in after if user in kept), None)
            if number in outside:
                kept[number] = path
                reason = "something outside of the branch has used it"
                self._note(execution, path, number, UndoState.NOT_NEEDED, reason)
            elif held_by is not None:
                stopped[number] = path
                self._note(execution, path, number, UndoState.HELD, f"{held_by!r}, which used it, is still there")
            elif kept_by is not None:
                kept[number] = path
                self._note(execution, path, number, UndoState.NOT_NEEDED, f"{kept_by!r}, which used it, stays")
            elif not await self._undo_stage(execution, path, number, had_undo=said.get(names[number], _NOTHING)[0]):
                stopped[number] = path
            for other in dependencies[number]:
                if other in ran:
                    left[other] -= 1
                    if not left[other]:
                        nursery.start_soon(undo, other, nursery)

        async with _open_nursery() as nursery:
            for number in sorted(ran, reverse=True):
                if not left[number]:
                    nursery.start_soon(undo, number, nursery)
        return not stopped and not gone

    def _note_what_is_gone(
        self, execution: Execution, prefix: str, said: Mapping[str, tuple[bool, tuple[str, ...]]]
    ) -> dict[str, list[int]]:
        """Notes of stages that are no longer there that nobody knows how they are undone; gives what each had used."""
        index, gone = execution.shape.index, dict[str, list[int]]()
        for name, (_, before) in said.items():
            path = prefix + name
            if name not in index and not self._was_undone(execution, name, path, "has no such stage any more"):
                gone[path] = [index[other] for other in before if other in index]
        return gone

    def _was_undone(self, execution: Execution, name: str, path: str, why: str) -> bool:
        """Whether a stage was undone before of which nobody knows any more how it is; if not, that is noted."""
        undo = self._record(execution, name, path)
        if undo.state is UndoState.UNDONE:
            return True
        undo.state, undo.reason, undo.ended = UndoState.FAILED, f"the pipeline {why}", trio.current_time()
        if execution.scribe is not None:
            execution.scribe.not_undone(name, undo)
        return False

    # One stage

    async def _undo_stage(self, execution: Execution, path: str, number: int, *, had_undo: bool) -> bool:
        """Undoes a stage, after what was run within it; tells whether it is no longer in the way."""
        spec = execution.graph.stages[execution.shape.names[number]]
        record = execution.collector.record(number)
        if _is_taken_over(execution, record):
            self._note(execution, path, number, UndoState.NOT_NEEDED, "it is that of the run that this was forked from")
            return True  # noqa: ASYNC910
        if not await self._undo_within(execution, spec, path):
            self._note(execution, path, number, UndoState.HELD, "what was run within it is still there")
            return False
        if _skipped_itself(record):
            self._note(execution, path, number, UndoState.NOT_NEEDED, "it skipped itself")
            return True
        if spec.irrevocable:
            self._note(execution, path, number, UndoState.IRREVOCABLE, "")
            return True
        if spec.compensate is None:
            why = "does not say any more how it is undone"
            return not had_undo or self._was_undone(execution, spec.name, path, why)
        if spec.compensate_when == "succeeded" and not _has_succeeded(execution, record):
            self._note(execution, path, number, UndoState.NOT_NEEDED, f"it has {record.state.value}")
            return True
        undo = self._record(execution, spec.name, path)
        if undo.state is UndoState.UNDONE:
            return True  # by an earlier process, or with its branch
        undo.best_effort = spec.compensate.best_effort
        if execution.scribe is not None and not execution.scribe.book.is_open:
            return undo.best_effort and undo.state is UndoState.FAILED  # it must be on record before it is called
        async with self._room:
            return await self._call(execution, spec, record, undo) or undo.best_effort

    async def _undo_within(self, execution: Execution, spec: StageSpec, path: str) -> bool:
        """Undoes what was run within a stage: the last run first, but all items of a map at once."""
        over_items = spec.runner if isinstance(spec.runner, OverItems) else None
        alone = over_items is not None and over_items.plan.stage is not None
        left: list[str] = []

        async def undo(child: Execution, title: str) -> None:
            prefix = path + title[len(spec.name) :]
            # What it has undone by itself, when it failed, stays undone.
            if not await self._undo_run(child, prefix if alone else f"{prefix}/", None, alone=alone):
                left.append(title)

        def attempt(each: tuple[str, Execution | None]) -> str:
            return each[0] if over_items is None else each[0].rpartition("]")[2]

        for _, together in itertools.groupby(children_of(execution, spec), attempt):
            async with _open_nursery() as nursery:
                for title, child in together:
                    if child is not None:
                        nursery.start_soon(undo, child, title)
                        continue
                    left.append(title)
                    name = path + title[len(spec.name) :]
                    undo_of_all = cast("dict[str, UndoRecord]", self.record.undos).setdefault(name, UndoRecord(name))
                    undo_of_all.state = UndoState.FAILED
                    undo_of_all.reason = (
                        "it was run by another process, with ctx.run_pipeline(); declare it with with_stage()"
                    )
        return not left  # noqa: ASYNC910  # mostly nothing was

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
                return False  # noqa: ASYNC910  # it must be on record before it is called
            host = Undoing(execution, record, undo, self._cause, trio.current_time() + seconds)
            returned: object = None
            out_of_time = False
            try:
                with trio.CancelScope(deadline=host.deadline) as host.scope:
                    returned = await compensation.undo(StageContext(host, host.part), output)
                failure = _said_by(returned)
                if host.scope.cancelled_caught:
                    out_of_time, failure = True, TimeoutError(f"ran longer than its limit of {seconds:g} s")
            except BaseException as raised:  # noqa: ASYNC103  # it is, unless there is a failure
                failure = as_failure(raised)
                if failure is None:
                    raise
            retry = compensation.retry
            if failure is None or tried >= retry.attempts or not (out_of_time or retry.matches(failure)):
                break
            undo.error, undo.reason = failure, in_words(failure)
            await trio.sleep(retry.delay_after(tried))
        undo.state = UndoState.UNDONE if failure is None else UndoState.FAILED
        undo.error, undo.reason = failure, "" if failure is None else in_words(failure)
        undo.ended = trio.current_time()
        if scribe is not None:
            await scribe.undone(spec.name, undo)
        return failure is None  # noqa: ASYNC910  # as the undo does

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


def _note_pivot(execution: Execution, pivot: str, numbers: Iterable[int]) -> None:
    """Notes that nothing is undone, since the run is past the point of no return."""
    names, stages = execution.shape.names, execution.graph.stages
    reason = f"{pivot!r}, the point of no return, has succeeded; resume the run"
    undos = {
        names[number]: UndoRecord(names[number], UndoState.NOT_NEEDED, reason)
        for number in numbers
        if stages[names[number]].compensate is not None and _ran(execution, number)
    }
    record = execution.collector.compensation
    if record is not None:  # of a branch that was undone before
        record.undos = {**undos, **record.undos}
    elif undos:
        execution.collector.compensation = CompensationRecord(
            _cause_of(execution), CompensationStatus.NOT_NEEDED, undos
        )


def _cause_of(execution: Execution) -> Cause:
    """Why a run is undone."""
    verdict = execution.verdict
    if isinstance(verdict, StageRecord) and verdict.cause is None and verdict.error is not None:
        # It had ended well, and a task failed that it left in its nursery.
        return Cause(CauseKind.FAILURE, verdict.name, in_words(verdict.error))
    return execution.cause or execution.ending or CALLER


def _ran(execution: Execution, number: int) -> bool:
    """Whether a stage was entered, in this process or an earlier one."""
    record = execution.collector.record(number)  # of a run within that nobody has gone on with, not all have settled
    if record.attempts:
        return True
    # Of a stage without effects of its own it may not be on record that it was entered, but that others were within it.
    stage = _history_of(execution, record.name)
    return stage is not None and bool(stage.within)


def _is_taken_over(execution: Execution, record: StageRecord) -> bool:
    """Whether a stage was run by the run that this one was forked from, and not by this one."""
    stage = _history_of(execution, record.name)
    return stage is not None and 0 < record.attempts == stage.inherited


def _skipped_itself(record: StageRecord) -> bool:
    """Whether a stage says that it has done nothing. After another attempt it does not speak for that one."""
    cause = record.cause
    own = cause is not None and cause.kind is CauseKind.SKIP and cause.stage == record.name
    return own and record.attempts == 1


def _has_succeeded(execution: Execution, record: StageRecord) -> bool:
    """Whether a stage has ever succeeded, also if it was sent back since, or is run again."""
    if record.state is StageState.SUCCEEDED or any(attempt.output is not None for attempt in record.details.earlier):
        return True
    stage = _history_of(execution, record.name)
    return stage is not None and stage.succeeded


def _history_of(execution: Execution, name: str) -> StageHistory | None:
    history = None if execution.scribe is None else execution.scribe.history
    return None if history is None else history.stages.get(name)


def _said_by(returned: object) -> Exception | None:
    """Gives the failure that an undo has returned, if it has returned one."""
    if not isinstance(returned, StageOutput) or returned.status in (StageStatus.OK, StageStatus.SKIP):
        return None
    return returned.error or RuntimeError(f"the undo returned {returned.status.value}: {returned.reason}")


@asynccontextmanager
async def _open_nursery() -> AsyncGenerator[trio.Nursery]:
    """Opens a nursery that raises what has ended it, and no group of that.

    All that can be is that it was cancelled, or what no run may hold back, like `KeyboardInterrupt`.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        rest = group if is_cancellation(group) else group.split(trio.Cancelled)[1] or group
        raise _first_of(rest) from None  # noqa: ASYNC123  # it is the first time that it is raised here


def _first_of(raised: BaseException) -> BaseException:
    while isinstance(raised, BaseExceptionGroup):
        raised = cast("BaseExceptionGroup[BaseException]", raised).exceptions[0]
    return raised


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
        if not _ran(execution, number) or _is_taken_over(execution, execution.collector.record(number)):
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
