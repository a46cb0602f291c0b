"""The part of a trace that shows what was undone: a line for each stage that says how, below the tree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.text import Text

from stageflow.journal.undo import CompensationStatus, UndoState
from stageflow.trace.words import duration, one_line, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stageflow.journal.undo import CompensationRecord, UndoRecord

__all__ = ["draw_compensation"]

_LINES = 30
_LOOKS: Final = {
    UndoState.FAILED: ("✗", "bold red"),
    UndoState.HELD: ("⊘", "yellow"),
    UndoState.PENDING: ("○", "yellow"),
    UndoState.IRREVOCABLE: ("!", "yellow"),
    UndoState.UNDONE: ("✓", "green"),
    UndoState.NOT_NEEDED: ("–", "bright_black"),
}
_STATUS_LOOKS: Final = {
    CompensationStatus.COMPENSATING: ("●", "cyan"),
    CompensationStatus.COMPENSATED: ("✓", "green"),
    CompensationStatus.NOT_NEEDED: ("–", "bright_black"),
    CompensationStatus.FAILED: ("✗", "bold red"),
}


def draw_compensation(record: CompensationRecord, width: int) -> Iterator[Text]:
    """Draws what was undone, in order of time; if that is too much, first what was not."""
    glyph, style = _STATUS_LOOKS[record.status]
    yield Text()
    yield Text.assemble(("Compensation", "bold"), "  ", (f"{glyph} {record.status.value}", style), no_wrap=True)
    undos = sorted(record.undos.values(), key=_begun)
    if len(undos) > _LINES:
        ranks = list(_LOOKS)
        undos.sort(key=lambda undo: ranks.index(undo.state))
    shown = undos[:_LINES]
    names = min(max((cell_len(one_line(undo.stage)) for undo in shown), default=0), max(16, width // 3))
    for undo in shown:
        yield _line(undo, names)
    if len(undos) > len(shown):
        yield Text(f"… {len(undos) - len(shown):,} more", "italic")


def _begun(undo: UndoRecord) -> tuple[float, str]:
    """When it was begun with. Those of one instant are sorted by name: Trio wakes them in any order."""
    began = undo.ended if undo.started is None else undo.started
    return math.inf if began is None else began, undo.stage


def _line(undo: UndoRecord, names: int) -> Text:
    glyph, style = _LOOKS[undo.state]
    name = shortened(one_line(undo.stage), names)
    line = Text(name + " " * (names - cell_len(name) + 2), no_wrap=True, overflow="ellipsis")
    line.append(f"{glyph} {undo.state.value}", style)
    said: list[str] = []
    if undo.started is not None and undo.ended is not None:
        said.append(duration(undo.ended - undo.started))
    if undo.attempts > 1:
        said.append(f"attempt {undo.attempts}")
    if undo.reason:
        said.append(one_line(undo.reason))
    if undo.best_effort and undo.state is UndoState.FAILED:
        said.append("best effort")
    if said:
        line.append(f"  {' · '.join(said)}", "bright_black")
    return line
