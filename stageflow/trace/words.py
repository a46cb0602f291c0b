"""Times, names and causes in words that are short enough for a line of a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len

from stageflow.errors import RecordedError
from stageflow.journal import CauseKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow.journal import StageRecord

__all__ = ["ascii_only", "duration", "durations", "in_words", "listed", "one_line", "shortened", "why"]

_ENDED = {
    CauseKind.FAILURE: "failed",
    CauseKind.TIMEOUT: "timed out",
    CauseKind.HEARTBEAT: "gave no sign of life",
    CauseKind.DEADLINE: "reached its deadline",
    CauseKind.CONTRACT: "returned what it may not",
    CauseKind.SKIP: "was skipped",
    CauseKind.CONDITION: "was skipped",
    CauseKind.CANCEL: "cancelled the run",
    CauseKind.CANCEL_BRANCH: "ended its branch",
    CauseKind.CALLER: "was cancelled",
    CauseKind.CHECKPOINT: "could not be recorded",
    CauseKind.NURSERY: "had its nursery cancelled",
}
_ASCII = str.maketrans(
    {
        **dict(zip("│┌├└─┄━╸╺", "|,|`-.===", strict=True)),
        **dict(zip("✓✗⊘●○–…·µ", "+x/*o-~|u", strict=True)),
    }
)


def duration(seconds: float) -> str:
    """Gives a length of time in three digits and the unit that suits it: ``"1.20 ms"``, ``"4m 05s"``."""
    if seconds <= 0:
        return "0 s"
    if seconds < 59.95:
        for factor, unit in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")):
            value = float(f"{seconds * factor:.3g}")
            if value < 1000 or unit == "s":
                digits = 2 if value < 10 else 1 if value < 100 else 0
                return f"{value:.{digits}f} {unit}"
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02}{smaller}"
    return f"{whole // 60}m {whole % 60:02}s"


def durations(lengths: Sequence[float]) -> str:
    """Gives the range of several lengths of time: ``"1.20–3.40 ms"``."""
    low, high = duration(min(lengths)), duration(max(lengths))
    if low == high:
        return low
    if low.split(" ")[1:] == high.split(" ")[1:] and "m " not in low:
        low = low.split(" ")[0]
    return f"{low}–{high}"


def one_line(text: str) -> str:
    """Gives a text in one line, without what could do something to a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def shortened(text: str, width: int) -> str:
    """Cuts out the middle of a text that is longer than so many cells of a terminal."""
    if cell_len(text) <= width:
        return text
    head = _fitting(text, width // 2)
    tail = _fitting(text[::-1], max(0, width - 1 - cell_len(head)))[::-1]
    return f"{head}…{tail}"


def listed(names: Sequence[str], most: int) -> str:
    """Gives names with commas between them, and the number of those that are too many."""
    shown = [shortened(one_line(name), 40) for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most:,} more"
    return ", ".join(shown)


def in_words(error: BaseException) -> str:
    """Gives an error in one line: its type and message."""
    if isinstance(error, RecordedError):  # which says both
        return _message(error)
    return f"{type(error).__name__}: {_message(error)}".removesuffix(": ")


def why(record: StageRecord) -> str:
    """Says why a stage did not succeed; the empty string if there is nothing to say."""
    cause = record.cause
    if cause is None:
        return ""
    reason = one_line(cause.reason)
    if cause.stage is not None and cause.stage != record.name:
        return f"because '{shortened(one_line(cause.stage), 40)}' {_ENDED[cause.kind]}"
    match cause.kind, cause.stage:
        case CauseKind.CANCEL, None:
            return f"Run.cancel: {reason}"
        case CauseKind.CANCEL_BRANCH, None:
            return f"Run.cancel_branch: {reason}"
        case CauseKind.CANCEL, _:
            return f"cancelled the run: {reason}"
        case CauseKind.CANCEL_BRANCH, _:
            return f"ended its branch: {reason}"
        case CauseKind.FAILURE, _ if record.error is not None and reason == _message(record.error):
            # It was given to `StageOutput.fail`; a RuntimeError was made there, from words.
            return reason if type(record.error) is RuntimeError else in_words(record.error)
        case _:
            return reason


def ascii_only(text: str) -> str:
    """Gives a drawing in characters that every terminal has."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def _message(error: BaseException) -> str:
    try:
        return one_line(str(error))
    except Exception:  # a user's class may do anything
        return "(its message cannot be shown)"


def _fitting(text: str, width: int) -> str:
    taken = 0
    for place, char in enumerate(text):
        taken += cell_len(char)
        if taken > width:
            return text[:place]
    return text
