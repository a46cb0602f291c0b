"""The errors of a run with their tracebacks, trimmed to what their reader has written."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import textwrap
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from rich.text import Text

from stageflow.errors import RecordedError
from stageflow.trace.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stageflow.journal import StageRecord

__all__ = ["draw_errors", "says_more", "trimmed"]

_ENGINE = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(trio.__file__).parent}{os.sep}")
_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = tuple(
    f"{Path(_path).resolve()}{os.sep}" for key in ("stdlib", "platstdlib") if (_path := sysconfig.get_path(key))
)
_ERRORS = 3  # shown with their tracebacks
_FRAME = re.compile(r' *\|? *File "(.+)", line \d+')
_LINES = 36  # of all tracebacks together


def draw_errors(records: Sequence[StageRecord], width: int) -> Iterator[Text]:
    """Draws those errors of a run of which there is more to say than a line, the first ones first."""
    failed = [record for record in records if record.error is not None]
    failed.sort(key=lambda record: len(records) if record.place is None else record.place)
    shown: list[tuple[str, list[str]]] = []
    seen = 0
    for record in failed:
        if len(shown) == _ERRORS:
            break
        seen += 1
        if record.error is not None and says_more(record.error):
            shown.append((one_line(record.name), trimmed(record.error)))
    for name, lines in shown:
        yield Text()
        yield Text.assemble(("✗ ", "bold red"), (name, "bold"), no_wrap=True, overflow="ellipsis")
        most = _LINES // len(shown)
        if len(lines) > most:
            left_out = len(lines) - most + 1
            lines[most // 3 : most // 3 + left_out] = [f"… {left_out} more lines"]
        for line in lines:
            yield from _fitted(line, width)
    if seen < len(failed):
        yield Text(f"\n… {len(failed) - seen:,} more errors; see .error of the records", "italic")


def says_more(error: BaseException) -> bool:
    """Whether there is more to an error than its type and a short message."""
    lines = trimmed(error)
    return len(lines) > 1 or len(lines[0]) > 100


def _fitted(line: str, width: int) -> Iterator[Text]:
    """Gives a line of a traceback: what is code is cut off at the right margin, what are words goes on below."""
    margin, text = "  ", line
    if text.lstrip().startswith("| "):  # in a group
        margin += text[: text.index("| ") + 2]
        text = text[text.index("| ") + 2 :]
    if text.startswith("  "):
        style = "bright_black" if text.lstrip().startswith("File ") else "default"
        yield Text.assemble(margin, (text, style), no_wrap=True, overflow="ellipsis")
        return
    for part in textwrap.wrap(text, max(20, width - len(margin)), break_on_hyphens=False) or [""]:
        yield Text(f"{margin}{part}".rstrip(), no_wrap=True, overflow="ellipsis")


def trimmed(error: BaseException) -> list[str]:
    """Gives an error as Python prints it, with the frames of the user's code only, in groups and causes as well.

    What is installed, Python's own library, Trio and stageflow are left out, except for the package that the stage
    itself belongs to.

    Returns:
        Its lines. One line means that there is nothing to see but type and message.
    """
    if isinstance(error, RecordedError):
        return _of_another_process(error)
    whole = traceback.TracebackException.from_exception(error)
    own = _package_of(whole.stack)
    for part in _parts(whole):
        part.stack = traceback.StackSummary.from_list(
            [_plain(frame) for frame in part.stack if _is_users(frame.filename, own)]
        )
    lines = "".join(whole.format()).rstrip().splitlines()
    if not whole.stack and lines and lines[0].startswith("Traceback"):
        del lines[0]  # there is none left
    return lines or [type(error).__name__]


def _of_another_process(error: RecordedError) -> list[str]:
    """Gives what was kept of an error, with the frames of the user's code only, as far as text can tell."""
    lines: list[str] = []
    shown = True
    for line in error.traceback.rstrip().splitlines():
        frame = _FRAME.match(line)
        if frame is not None:
            shown = _is_users(frame[1], None)
        elif not line.startswith("    "):
            shown = True
        if shown and not line.strip(" ~^").startswith("~") and line.strip(" ~^"):
            lines.append(line)
    if not any(_FRAME.match(line) for line in lines) and lines and lines[0].startswith("Traceback"):
        del lines[0]
    return lines or [str(error)]


def _parts(whole: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """An error, its causes, and the members of groups."""
    todo = [whole]
    while todo:
        part = todo.pop()
        yield part
        todo += [linked for linked in (part.__cause__, part.__context__) if linked is not None]
        todo += getattr(part, "exceptions", None) or []


def _package_of(stack: traceback.StackSummary) -> str | None:
    """The directory of the installed package that a stage belongs to, if it is an installed one."""
    for frame in stack:
        if frame.filename.startswith(_ENGINE):
            continue
        package = _installed_package(frame.filename)
        if package is not None or not _is_standard(frame.filename):
            return package
    return None


def _installed_package(filename: str) -> str | None:
    parts = Path(filename).parts
    for place, part in enumerate(parts):
        if part in _INSTALLED:
            return str(Path(*parts[: place + 2]))
    return None


def _is_standard(filename: str) -> bool:
    return filename.startswith("<frozen ") or str(Path(filename).resolve()).startswith(_STANDARD)


def _is_users(filename: str, own: str | None) -> bool:
    if filename.startswith(_ENGINE):
        return False
    package = _installed_package(filename)
    return package == own if package is not None else not _is_standard(filename)


def _plain(frame: traceback.FrameSummary) -> traceback.FrameSummary:
    """Gives a frame with its file named from the working directory, if it is below that, and a single line of code."""
    with contextlib.suppress(ValueError, OSError):
        frame.filename = str(Path(frame.filename).relative_to(Path.cwd()))
    frame.colno = frame.end_colno = None  # no carets, which every version of Python draws in another way
    return frame
