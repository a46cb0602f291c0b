"""The record of a stage, made of what is known of it from a journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.errors import RecordedError
from stageflow.journal.record import Attempt, StageRecord, StageState
from stageflow.journal.undo import CompensationRecord, UndoRecord
from stageflow.output import StageOutput, StageStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stageflow.journal.events import AttemptEnded, ErrorNote, StageSettled, UndoEnded
    from stageflow.journal.history import RunHistory, StageHistory

__all__ = ["compensation_of", "record_of", "undo_of"]


def record_of(
    name: str,
    branch: str,
    stage: StageHistory | None,
    started: float,
    read: Callable[[str], Any],
    values: Mapping[str, Any] | None = None,
) -> StageRecord:
    """Gives the record of a stage from what is known of it; PENDING, if nothing is.

    Args:
        name: The stage.
        branch: The branch it is in.
        stage: What is known of it, if anything is.
        started: When the run began.
        read: What reads the user's values.
        values: What outputs carry, by stage, of those that were read already; all others can wait. If there is none,
            the output is read now.
    """
    if stage is None:
        return StageRecord(name, branch)
    event = stage.settled
    if event is None:
        begun = None if stage.first is None else started + stage.first
        record = StageRecord(name, branch, attempts=stage.attempts, started=begun)
        if stage.running or stage.spent:  # it was entered, or is about to be tried again
            record.state = StageState.RUNNING
    else:
        record = StageRecord(
            name,
            branch,
            event.state,
            event.attempts,
            None if event.started is None else started + event.started,
            None if event.ended is None else started + event.ended,
            place=stage.place,
        )
        if stage.value is None:
            pass
        elif values is None or name in values:
            value = read(stage.value) if values is None else values[name]
            record.output = StageOutput(StageStatus.OK, value)
        else:
            record.put_off(read, stage.value)
        if not event.plain:
            _settle(record, event, started, read)
    if stage.earlier:
        record.more.earlier = tuple(_attempt(attempt, started) for attempt in stage.earlier)
    return record


def _settle(record: StageRecord, event: StageSettled, started: float, read: Callable[[str], Any]) -> None:
    record.cause, record.after_cancel, record.recoverable = event.cause, event.after_cancel, event.recoverable
    if event.partial is not None:
        record.partial = read(event.partial)
    if event.error is not None:
        record.error = _error_of(event.error)
    if event.began is not None:
        record.more.began = started + event.began
    if event.waited:
        record.more.waited = event.waited
    if event.limit is not None:
        record.more.limit, record.more.source = event.limit, event.source
    if event.overran:
        record.more.overran = event.overran
    items: dict[int, StageRecord] = {}
    for note in event.items:
        item = f"{record.name}[{note.number}]"
        items[note.number] = StageRecord(item, item, note.state, note.attempts, cause=note.cause)
        items[note.number].error = None if note.error is None else _error_of(note.error)
    if items:
        record.more.items = items


def compensation_of(history: RunHistory) -> CompensationRecord | None:
    """Gives what was undone of a run, as far as it is known; `None` if nothing was to be."""
    undos: dict[str, UndoRecord] = {}
    _collect(history, "", undos)
    started = history.compensation
    if started is None and not undos:
        return None
    record = CompensationRecord(None if started is None else started.cause, undos=undos)
    if started is None:  # just branches were undone
        record.conclude()
    elif history.compensated is not None:
        record.status = history.compensated
    return record


def _collect(history: RunHistory, prefix: str, undos: dict[str, UndoRecord]) -> None:
    for name, event in history.undos.items():
        undos[prefix + name] = undo_of(prefix + name, event)
    for name, stage in history.stages.items():
        for place, within in stage.within.items():
            _collect(within, f"{prefix}{name}/{place}/", undos)


def undo_of(name: str, event: UndoEnded) -> UndoRecord:
    """Gives the record of the undoing of a stage."""
    undo = UndoRecord(name, event.state, event.reason, event.attempts)
    undo.error = None if event.error is None else _error_of(event.error)
    return undo


def _attempt(event: AttemptEnded, started: float) -> Attempt:
    return Attempt(
        number=event.attempt,
        started=started + event.started,
        ended=started + event.ended,
        reason=event.reason,
        error=None if event.error is None else _error_of(event.error),
    )


def _error_of(note: ErrorNote) -> RecordedError:
    """Gives what stands for an exception of which only words were kept."""
    kind = note.kind.rpartition(":")[2]
    return RecordedError(f"{kind}: {note.message}" if note.message else kind, kind=note.kind, traceback=note.traceback)
