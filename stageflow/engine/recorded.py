"""Runs that are recorded: how they begin, how they go on from what was recorded, and how they end.

A run that goes on is one whose collector is not empty at the beginning. Stages that had ended are in it as they ended,
the scheduler is told of them, and walkers pass them; of those that are tried again, there are the attempts. So nothing
else needs to know that there was another process before.
"""

from __future__ import annotations

import time
from operator import itemgetter
from typing import TYPE_CHECKING

import attrs

from stageflow.context import ContextSnapshot, PipelineContext
from stageflow.engine.execution import Execution
from stageflow.engine.maps import OverItems
from stageflow.engine.nested import Around
from stageflow.engine.paths import item_of
from stageflow.graph import Special
from stageflow.graph.branches import TRUNK
from stageflow.journal import StageState
from stageflow.journal.history import scope_within
from stageflow.journal.records import record_of, undo_of
from stageflow.journal.scribe import Scribe
from stageflow.journal.uncollected import uncollected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stageflow.journal import Cause
    from stageflow.journal.history import RunHistory, StageHistory
    from stageflow.stages import StageSpec

__all__ = ["children_on_record", "close", "record"]

_NOTED = Special(tried=False, effects=True)
_TRIED = Special()


def record(execution: Execution, scribe: Scribe) -> None:
    """Has a run recorded, and go on from what was recorded of it before."""
    scribe.book.told[execution.lose] = None
    specials = list(execution.plan.specials)
    for number in execution.plan.effects:
        special = specials[number]
        specials[number] = _NOTED if special is None else attrs.evolve(special, effects=True)
    execution.specials = specials
    if scribe.history is None:
        scribe.base, execution.collector.began_at = execution.collector.started, scribe.began_at
        return
    scribe.base = execution.collector.started - max(0.0, time.time() - scribe.began_at)
    execution.collector.started = scribe.base
    execution.collector.began_at = scribe.began_at
    with uncollected():
        _go_on(execution, scribe, scribe.history, specials)


async def close(execution: Execution, scribe: Scribe) -> None:
    """Has it recorded that a run has ended; shielded, for as long as the store has patience."""
    collector = execution.collector
    scribe.book.told.pop(execution.lose, None)
    records = [record for record in collector.slots if record is not None]
    assert collector.ended is not None
    if scribe.over is not None:  # before this process
        collector.ended = scribe.base + scribe.over
    cause = execution.cause if execution.ending is None else execution.ending
    await scribe.end(records, collector.status, cause, collector.ended)
    if scribe.book.failure is not None and execution.lost is None:
        execution.lost = scribe.book.failure


def _go_on(execution: Execution, scribe: Scribe, history: RunHistory, specials: list[Special | None]) -> None:
    shape, collector = execution.shape, execution.collector
    names = [execution.trunk.name, *shape.branch_names[1:]]
    settled: list[tuple[int, int, StageHistory]] = []
    for name, stage in history.stages.items():
        number = shape.index.get(name)
        if number is None:
            continue
        if stage.settled is not None:
            settled.append((stage.place, number, stage))
        elif stage.attempts:
            record = record_of(name, names[shape.branch_of[number]], stage, scribe.base, scribe.decode)
            record.state = StageState.PENDING  # and so it is, in this process
            collector.adopt(number, record)
            execution.prior[number] = stage
            special = specials[number]
            specials[number] = _TRIED if special is None else attrs.evolve(special, tried=True)
    settled.sort(key=itemgetter(0))
    read, base = scribe.decode, scribe.base
    values = scribe.values if history.compensation is None else None  # to undo it, no plan has looked at its outputs
    for _, number, stage in settled:
        name = shape.names[number]
        collector.adopt(number, record_of(name, names[shape.branch_of[number]], stage, base, read, values))
        assert stage.settled is not None
        if stage.settled.partly:
            execution.in_part.add(name)
    for stage_name, text in history.artifacts:
        if stage_name or text:
            execution.state.artifacts.append(scribe.decode(text))
    execution.undos = {name: undo_of(name, event) for name, event in history.undos.items()}
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
    failed = None if number is None else collector.slots[number]
    execution.verdict = started.cause if failed is None or failed.error is None else failed


def children_on_record(execution: Execution, spec: StageSpec) -> list[tuple[str, Execution | None]]:
    """Gives the runs that an earlier process had made within a stage, as far as they may have something to undo.

    `None` stands for one of which it is not known what it has run: only the code of the stage itself knows.
    """
    scribe = execution.scribe
    assert scribe is not None
    stage = None if scribe.history is None else scribe.history.stages.get(spec.name)
    known: list[tuple[str, Execution]] = []
    unknown: list[tuple[str, Execution | None]] = []
    for place, within in () if stage is None else stage.within.items():
        if within.taken or within.started is None:
            continue
        item = isinstance(spec.runner, OverItems)
        number, _, again = place.partition(".")
        title = f"{spec.name}[{number}]" + (f".{again}" if again else "") if item else f"{spec.name}/{place}"
        graph = spec.runner.plan.graph if item else getattr(spec.runner, "child", None)
        undoable = bool(scribe.undoable_on_record(within))
        if graph is None:
            if undoable:
                unknown.append((title, None))
            continue
        if not graph.plan.compensates and not undoable:
            continue
        state = execution.state
        own = f"{spec.name}[{number}]" if item else f"{spec.name}/{number}"  # the same in all attempts
        around = Around(
            run_id=state.run_id,
            depth=state.depth + 1,
            lent={},
            branch=own if item else None,
            key=f"{state.key or state.run_id}/{own}",
        )
        context = PipelineContext(
            run_id=within.started.run_id,
            correlation_id=state.origin.correlation_id or state.run_id,
            tenant=state.origin.tenant,
            data={} if within.value is None else scribe.decode(within.value),
            snapshot=state.origin.snapshot if item else ContextSnapshot(),
            metadata=state.origin.metadata if item else {},
        )
        scope = scope_within(scribe.scope, spec.name, place)
        child = Scribe(scribe.book, scope, within.started.run_id, within)
        child.began_at = within.started.began_at
        known.append((title, Execution(graph, context, around, child)))
        within.taken = True
    if known:  # they were before those of this process
        execution.undoable[spec.name] = [*known, *execution.undoable.get(spec.name, ())]
    return unknown


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
