"""The drawing of a trace: a tree of branches, and on one scale of time when each stage ran."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Final, final

import trio
from rich.cells import cell_len
from rich.text import Text

from stageflow.journal import RunStatus, StageRecord, StageState
from stageflow.trace.layout import Entry, deepest, fold, samples, widen
from stageflow.trace.tracebacks import draw_errors, says_more
from stageflow.trace.undone import draw_compensation
from stageflow.trace.words import ascii_only, duration, durations, in_words, listed, one_line, shortened, why

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import ConsoleOptions

    from stageflow.trace.trace import Trace

__all__ = ["draw"]

_LINES = 50  # of the tree
_STATE, _TIME, _GAP = 11, 7, 2  # widths of columns, and what is between them
_SHORTEST_BAR, _LONGEST_BAR = 8, 40

# In this order they are counted. Colours only repeat what glyph and word say.
_LOOKS: Final = {
    StageState.FAILED: ("✗", "bold red"),
    StageState.CANCELLED: ("⊘", "yellow"),
    StageState.RUNNING: ("●", "cyan"),
    StageState.SUCCEEDED: ("✓", "green"),
    StageState.SKIPPED: ("–", "bright_black"),
    StageState.PENDING: ("○", "bright_black"),
}
_RUN_LOOKS: Final = {
    RunStatus.RUNNING: _LOOKS[StageState.RUNNING],
    RunStatus.SUCCEEDED: _LOOKS[StageState.SUCCEEDED],
    RunStatus.PARTIAL: ("✓", "yellow"),
    RunStatus.FAILED: _LOOKS[StageState.FAILED],
    RunStatus.CANCELLED: _LOOKS[StageState.CANCELLED],
    RunStatus.INTERRUPTED: _LOOKS[StageState.CANCELLED],
}


def draw(trace: Trace, options: ConsoleOptions) -> Iterator[Text]:
    """Draws a trace: what happened on the whole, the tree, and the errors with their tracebacks."""
    drawing = _Drawing(trace, options.max_width)
    for line in drawing.lines():
        yield _in_ascii(line) if options.ascii_only else line


def _in_ascii(line: Text) -> Text:
    line.plain = ascii_only(line.plain)
    return line


@final
class _Drawing:
    """A trace on its way to lines of a certain width."""

    def __init__(self, trace: Trace, width: int) -> None:
        self._trace = trace
        self._width = width
        self._now = _end_of(trace)
        self._details = [_details(record) for record in trace.records]
        heights = [1 + min(2, -(-len(" · ".join(detail)) // 64)) for detail in self._details]
        self._entries = fold(trace.shape, self._order(), heights, _LINES)
        self._levels = deepest(self._entries)
        self._names = self._width_of_names()
        bar = width - self._names - _STATE - _TIME - 3 * _GAP
        self._bar = 0 if bar < _SHORTEST_BAR else min(bar, _LONGEST_BAR)

    def lines(self) -> Iterator[Text]:
        yield from self._head()
        for entry in self._entries:
            if entry.folded:
                yield self._folded(entry)
            else:
                yield from self._stage(entry)
        if self._trace.compensation is not None:
            yield from draw_compensation(self._trace.compensation, self._width)
        yield from draw_errors(self._trace.records, self._width)

    def _order(self) -> list[int]:
        """The stages to show if not all can be: what went wrong, some of what that led to, and samples of the rest."""
        ranks = list(_LOOKS)
        wrong: list[tuple[int, int]] = []
        consequences: list[tuple[int, int]] = []
        for number, record in enumerate(self._trace.records):
            if record.error is not None:
                wrong.append((0, number))
            elif record.state is StageState.RUNNING or (record.cause and record.cause.stage in (None, record.name)):
                wrong.append((ranks.index(record.state), number))
            elif record.cause is not None:
                consequences.append((ranks.index(record.state), number))
        first, later = [number for _, number in sorted(wrong)], [number for _, number in sorted(consequences)]
        others = samples(self._trace.shape, self._weights())
        return list(dict.fromkeys([*first[:6], *others[:3], *first[6:24], *later[:6], *others]))

    def _weights(self) -> list[float]:
        """For every branch, how long it and everything below it took."""
        trace = self._trace
        spans = [(self._now, trace.started)] * len(trace.shape.branches)
        for branch in reversed(trace.shape.branches):
            begin, end = spans[branch.index]
            for record in (trace.records[number] for number in branch.strand):
                if record.started is not None:
                    begin = min(begin, record.started)
                    end = max(end, self._ended(record))
            spans[branch.index] = begin, end
            if branch.parent is not None:
                outer = spans[branch.parent]
                spans[branch.parent] = min(begin, outer[0]), max(end, outer[1])
        return [end - begin for begin, end in spans]

    def _ended(self, record: StageRecord) -> float:
        return self._now if record.ended is None else record.ended

    def _width_of_names(self) -> int:
        longest = 0
        for entry in self._entries:
            records = [self._trace.records[number] for number in entry.stages]
            if len(records) == 1:
                wanted = cell_len(one_line(records[0].name))
            else:
                wanted = min(28, len(_summary(records)) - _STATE - _GAP)  # so that there is room for its bar
            longest = max(longest, len(widen(entry.guides, self._levels)) + wanted)
        return min(longest, max(16, self._width - _STATE - _TIME - 3 * _GAP - 14))

    def _head(self) -> Iterator[Text]:
        trace = self._trace
        glyph, style = _RUN_LOOKS[trace.status]
        took = f"{'for' if trace.ended is None else 'in'} {duration(self._now - trace.started)}"
        yield Text.assemble(
            (one_line(trace.shape.pipeline), "bold"), "  ", (f"{glyph} {trace.status.value}", style), f" {took}"
        )
        yield Text(_counted(trace.records))
        yield Text(
            f"run {one_line(trace.run_id)}, began {trace.began_at:%Y-%m-%d %H:%M:%S %Z}".rstrip(), "bright_black"
        )
        yield Text()

    def _stage(self, entry: Entry) -> Iterator[Text]:
        number = entry.stages[0]
        record, detail = self._trace.records[number], self._details[number]
        glyph, style = _LOOKS[record.state]
        line = self._beginning(
            entry, one_line(record.name), "default" if record.started is not None else "bright_black"
        )
        _column(line, f"{glyph} {record.state.value}", style, _STATE)
        said = " · ".join(detail)
        inline = record.started is None or self._at_once(record)
        if inline and said and cell_len(said) <= self._bar + _GAP + _TIME:
            line.append(said, "bright_black")
            said, detail = "", []
        elif record.started is not None:
            if self._bar:
                _column(line, self._bar_of(record.started, self._ended(record)), style, self._bar)
            line.append(f"{duration(self._ended(record) - record.started):>{_TIME}}")
        line.rstrip()
        yield line
        prefix = widen(entry.under, self._levels)
        width = max(20, self._width - cell_len(prefix))
        most = 1 if record.error is not None and says_more(record.error) else 2
        for piece in [said] if len(said) <= width else detail:
            for part in textwrap.wrap(piece, width, max_lines=most, placeholder=" …", break_on_hyphens=False):
                yield _unbroken((prefix, "bright_black"), (part, "red" if record.error else "bright_black"))

    def _at_once(self, record: StageRecord) -> bool:
        """Whether a stage was skipped so soon that its bar would say nothing."""
        if record.state is not StageState.SKIPPED or record.duration is None:
            return False
        return record.duration * 2 * self._bar <= self._now - self._trace.started

    def _folded(self, entry: Entry) -> Text:
        records = [self._trace.records[number] for number in entry.stages]
        line = _unbroken((widen(entry.guides, self._levels), "bright_black"), (_summary(records), "italic"))
        begun = [record.started for record in records if record.started is not None]
        room = self._names + _GAP + _STATE - line.cell_len
        if begun and self._bar and room >= 0:
            line.append(" " * (room + _GAP))
            style = _LOOKS[records[0].state][1] if _alike(records) else "bright_black"
            line.append(self._bar_of(min(begun), max(map(self._ended, records))).rstrip(), style)
        return line

    def _beginning(self, entry: Entry, name: str, style: str) -> Text:
        guides = widen(entry.guides, self._levels)
        line = _unbroken((guides, "bright_black"))
        _column(line, shortened(name, self._names - len(guides)), style, self._names - len(guides))
        return line

    def _bar_of(self, begin: float, end: float) -> str:
        """A bar on the scale of the run, exact to half a cell and at least that long."""
        whole, halves = self._now - self._trace.started, 2 * self._bar
        first = last = 0
        if whole > 0:
            first = min(round((begin - self._trace.started) / whole * halves), halves - 1)
            last = round((end - self._trace.started) / whole * halves)
        last = max(last, first + 1)
        cells = ((first <= half < last, first <= half + 1 < last) for half in range(0, halves, 2))
        return "".join("━" if left and right else "╸" if left else "╺" if right else " " for left, right in cells)


def _end_of(trace: Trace) -> float:
    """When the scale of time ends: at the end of the run, or now."""
    if trace.ended is not None:
        return trace.ended
    try:
        return trio.current_time()
    except RuntimeError:  # looked at from outside of Trio: as far as one can know
        times = [time for record in trace.records for time in (record.started, record.ended) if time is not None]
        return max(times, default=trace.started)


def _details(record: StageRecord) -> list[str]:
    """What there is to say of a stage besides its state and its times."""
    parts = [why(record)]
    if record.error is not None and record.cause is None:
        parts.append(f"a task in its nursery raised {in_words(record.error)}")
    if record.after_cancel:
        parts.append("ended by itself while being cancelled")
    if record.partial and record.output is None:
        parts.append(f"partial: {listed(list(map(str, record.partial)), 8)}")
    parts += _more(record)
    return [part for part in parts if part]


def _more(record: StageRecord) -> list[str]:
    """What there is to say of a stage that few others have."""
    details = record.details
    parts: list[str] = []
    if details.earlier:
        parts.append(f"attempt {record.attempts}, the one before: {one_line(details.earlier[-1].reason or '')}")
    if details.waited >= 0.001:
        parts.append(f"waited {duration(details.waited)} for its turn")
    if details.items:
        parts.append(f"without output: {listed([item.name for item in details.items.values()], 4)}")
    if details.overran:
        parts.append(f"its cleanup took too long: {listed(details.overran, 4)}")
    runs = len(details.children)
    if runs:
        parts.append(f"{runs} run{'s'[: runs > 1]} within, the last {details.children[-1].status.value}")
    return parts


def _summary(records: Sequence[StageRecord]) -> str:
    """What there is to say of several stages in one line."""
    states = _counted(records, total=False)
    text = f"… {len(records):,} more " + (states.split(" ", 1)[1] if _alike(records) else f"({states})")
    lengths = [record.duration for record in records if record.duration is not None]
    return f"{text}, {durations(lengths)}" if lengths else text


def _alike(records: Sequence[StageRecord]) -> bool:
    return all(record.state is records[0].state for record in records)


def _counted(records: Sequence[StageRecord], *, total: bool = True) -> str:
    counts = Counter(record.state for record in records)
    states = [f"{counts[state]:,} {state.value}" for state in _LOOKS if counts[state]]
    if not total:
        return ", ".join(states)
    stages = f"{len(records):,} stage{'' if len(records) == 1 else 's'}"
    return f"{stages} {states[0].split(' ', 1)[1]}" if len(states) == 1 else f"{stages}: {', '.join(states)}"


def _column(line: Text, text: str, style: str, width: int) -> None:
    line.append(text, style)
    line.append(" " * (width - cell_len(text) + _GAP))


def _unbroken(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
