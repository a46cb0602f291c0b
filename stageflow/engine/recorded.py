"""Runs that are recorded: how they begin, how they go on from what was recorded, and how they end.

A run that goes on is one whose collector is not empty at the beginning. Stages that had ended are in it as they ended,
the scheduler is told of them, and walkers pass them; of those that are tried again, there are the attempts. So nothing
else needs to know that there was another process before.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import attrs

from stageflow.context import PipelineContext
from stageflow.engine.execution import Execution
from stageflow.engine.maps import OverItems
from stageflow.engine.nested import Around
from stageflow.engine.paths import item_of
from stageflow.errors import RecordedError
from stageflow.graph import Special
from stageflow.graph.branches import TRUNK
from stageflow.journal import Attempt, StageRecord
from stageflow.journal.history import scope_within
from stageflow.journal.scribe import Scribe
from stageflow.journal.undo import UndoRecord
from stageflow.output import StageOutput, StageStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stageflow.journal import Cause
    from stageflow.journal.events import AttemptEnded, ErrorNote, StageSettled, UndoEnded
    from stageflow.journal.history import RunHistory, StageHistory
    from stageflow.stages import StageSpec

__all__ = ["children_on_record", "close", "record"]

_NOTED = Special(tried=False, effects=True)
_TRIED = Special()


def record(execution: Execution, scribe: Scribe) -> None:
    """Has a run recorded, and go on from what was recorded of it before."""
    scribe.book.told[execution.lose] = None
    specials = list(execution.plan.specials)
    for number, spec in enumerate(execution.graph.stages.values()):
        if spec.has_effects:
            special = specials[number]
            specials[number] = _NOTED if special is None else attrs.evolve(special, effects=True)
    execution.specials = specials
    if scribe.history is None:
        scribe.base = execution.collector.started
        return
    scribe.base = execution.collector.started - max(0.0, time.time() - scribe.began_at)
    execution.collector.started = scribe.base
    execution.collector.began_at = scribe.began_at
    _go_on(execution, scribe, scribe.history, specials)


async def close(execution: Execution, scribe: Scribe) -> None:
    """Has it recorded that a run has ended; shielded, for as long as the store has patience."""
    collector = execution.collector
    scribe.book.told.pop(execution.lose, None)
    records = [record for record in collector.slots if record is not None]
    assert collector.ended is not None
    cause = execution.cause if execution.ending is None else execution.ending
    await scribe.end(records, collector.status, cause, collector.ended)
    if scribe.book.failure is not None and execution.lost is None:
        execution.lost = scribe.book.failure


def _go_on(execution: Execution, scribe: Scribe, history: RunHistory, specials: list[Special | None]) -> None:
    shape, collector = execution.shape, execution.collector
    settled: list[tuple[int, int, StageHistory, StageSettled]] = []
    for name, stage in history.stages.items():
        number = shape.index.get(name)
        if number is None:
            continue
        if stage.settled is not None:
            settled.append((stage.place, number, stage, stage.settled))
        elif stage.attempts:
            collector.adopt(number, _begun(execution, scribe, number, stage))
            execution.prior[number] = stage
            special = specials[number]
            specials[number] = _TRIED if special is None else attrs.evolve(special, tried=True)
    for _, number, stage, event in sorted(settled, key=lambda each: each[0]):
        collector.adopt(number, _ended(execution, scribe, number, stage, event))
        if event.partly:
            execution.in_part.add(shape.names[number])
    for stage_name, text in history.artifacts:
        if stage_name or text:
            execution.state.artifacts.append(scribe.decode(text))
    execution.undos = {name: _undo(name, event) for name, event in history.undos.items()}
    if history.compensation is None:
        execution.scheduler.restore(_cut(execution, history.cut))
        execution.trunk.early_undos = tuple(
            (execution.shape.branch_of[execution.shape.index[name]], history.cut[name])
            for name in history.to_undo
            if name in execution.shape.index
        )
        execution.trunk_undone = execution.trunk.name in history.to_undo
        return
    # It went through the door: nothing is run any more, and it raises what it was going to raise.
    started = history.compensation
    execution.going_back = True
    number = None if started.stage is None else shape.index.get(started.stage)
    record = None if number is None else collector.slots[number]
    execution.verdict = started.cause if record is None or record.error is None else record


def children_on_record(execution: Execution, spec: StageSpec) -> list[tuple[str, Execution | None]]:
    """Gives the runs that an earlier process had made within a stage, as far as they may have something to undo.

    `None` stands for one of which it is not known what it has run: only the code of the stage itself knows.
    """
    scribe = execution.scribe
    assert scribe is not None
    stage = None if scribe.history is None else scribe.history.stages.get(spec.name)
    found: list[tuple[str, Execution | None]] = []
    for place, within in () if stage is None else stage.within.items():
        if within.taken or within.started is None:
            continue
        item = isinstance(spec.runner, OverItems)
        number, _, again = place.partition(".")
        title = f"{spec.name}[{number}]" + (f".{again}" if again else "") if item else f"{spec.name}/{place}"
        graph = spec.runner.plan.graph if item else getattr(spec.runner, "child", None)
        if graph is None:
            if scribe.says_how_to_undo(within):
                found.append((title, None))
            continue
        if not graph.plan.compensates:
            continue
        state = execution.state
        around = Around(
            run_id=state.run_id,
            depth=state.depth + 1,
            lent={},
            branch=title if item else None,
            key=f"{state.key or state.run_id}/{title}",
        )
        context = PipelineContext(
            run_id=within.started.run_id,
            correlation_id=state.origin.correlation_id or state.run_id,
            tenant=state.origin.tenant,
            data={} if within.value is None else scribe.decode(within.value),
        )
        scope = scope_within(scribe.scope, spec.name, place)
        child = Scribe(scribe.book, scope, within.started.run_id, within)
        child.began_at = within.started.began_at
        found.append((title, Execution(graph, context, around, child)))
        within.taken = True
        execution.undoable.setdefault(spec.name, []).append((title, cast("Execution", found[-1][1])))
    return [each for each in found if each[1] is None]


def _undo(name: str, event: UndoEnded) -> UndoRecord:
    undo = UndoRecord(name, event.state, event.reason, event.attempts)
    undo.error = None if event.error is None else _error(event.error)
    return undo


def _cut(execution: Execution, cut: Mapping[str, Cause]) -> dict[int, Cause]:
    """Gives the branches that were ended, by number; ends the trunk, and items of maps, where they are kept."""
    found: dict[int, Cause] = {}
    for name, cause in cut.items():
        if name == execution.trunk.name:
            execution.trunk.cause = cause
            execution.some_branch_ended = True
        elif name in execution.shape.index:
            branch = execution.shape.branch_of[execution.shape.index[name]]
            if branch != TRUNK:
                found[branch] = cause
        else:
            item = item_of(execution, name)
            if item is not None:
                execution.items_cut[item] = cause.reason
    return found


def _begun(execution: Execution, scribe: Scribe, number: int, stage: StageHistory) -> StageRecord:
    """The record of a stage that was entered before, and is tried again."""
    record = _named(execution, number)
    record.attempts = stage.attempts
    record.started = None if stage.first is None else scribe.base + stage.first
    record.more.earlier = tuple(_attempt(scribe, attempt) for attempt in stage.earlier)
    return record


def _ended(execution: Execution, scribe: Scribe, number: int, stage: StageHistory, event: StageSettled) -> StageRecord:
    """The record of a stage that has ended."""
    record, base = _named(execution, number), scribe.base
    record.state, record.attempts = event.state, event.attempts
    record.started = None if event.started is None else base + event.started
    record.ended = None if event.ended is None else base + event.ended
    record.cause, record.after_cancel, record.recoverable = event.cause, event.after_cancel, event.recoverable
    if stage.value is not None:
        value = scribe.values.get(record.name, scribe)
        record.output = StageOutput(StageStatus.OK, scribe.decode(stage.value) if value is scribe else value)
    if event.partial is not None:
        record.partial = scribe.decode(event.partial)
    if event.error is not None:
        record.error = _error(event.error)
    if stage.earlier:
        record.more.earlier = tuple(_attempt(scribe, attempt) for attempt in stage.earlier)
    if event.began is not None:
        record.more.began = base + event.began
    if event.waited:
        record.more.waited = event.waited
    if event.limit is not None:
        record.more.limit, record.more.source = event.limit, event.source
    if event.overran:
        record.more.overran = event.overran
    if event.items:
        items: dict[int, StageRecord] = {}
        for note in event.items:
            name = f"{record.name}[{note.number}]"
            items[note.number] = StageRecord(name, name, note.state, note.attempts, cause=note.cause)
            items[note.number].error = None if note.error is None else _error(note.error)
        record.more.items = items
    return record


def _named(execution: Execution, number: int) -> StageRecord:
    shape = execution.shape
    branch = shape.branch_of[number]
    return StageRecord(shape.names[number], execution.trunk.name if branch == TRUNK else shape.branch_names[branch])


def _attempt(scribe: Scribe, event: AttemptEnded) -> Attempt:
    return Attempt(
        number=event.attempt,
        started=scribe.base + event.started,
        ended=scribe.base + event.ended,
        reason=event.reason,
        error=None if event.error is None else _error(event.error),
    )


def _error(note: ErrorNote) -> RecordedError:
    kind = note.kind.rpartition(":")[2]
    return RecordedError(f"{kind}: {note.message}" if note.message else kind, kind=note.kind, traceback=note.traceback)
