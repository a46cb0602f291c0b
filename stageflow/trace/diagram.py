"""Drawings of a graph: a tree of its branches for the terminal, and a flowchart in the language of Mermaid."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, final

import attrs
from rich.cells import cell_len
from rich.text import Text

from stageflow.graph import Graph
from stageflow.graph.branches import TRUNK
from stageflow.stages import Default, Join, StageKind
from stageflow.trace.layout import deepest, fold, samples, widen
from stageflow.trace.words import ascii_only, listed, one_line, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, ConsoleOptions, RenderableType

    from stageflow.stages import StageSpec

__all__ = ["mermaid", "tree"]

_LINES = 56
_KIND = max(len(kind.value) for kind in StageKind)
_GAP = 2

# Around the label of a stage, by its kind.
_SHAPES = {StageKind.ROUTE: ("{", "}"), StageKind.GUARD: ("{{", "}}")}
_UNSAFE = re.compile(r"^[-+]|(?<=\d)\.(?=\s)|[^\w\s.:/,()=+-]")


def tree(graph: Graph) -> RenderableType:
    """Gives a graph as a tree of its branches, each stage with what was declared of it."""
    return _Tree(graph)


def mermaid(graph: Graph) -> str:
    """Gives a graph as a Mermaid flowchart, its branches as subgraphs; the same text for the same graph.

    A dotted edge is an optional one. What decides whether a stage starts is written on the edges to it: a join other
    than `Join.ALL`, and ``when`` for a condition.
    """
    shape = graph.shape
    lines = ["flowchart TD"]
    todo: list[tuple[int, int | None]] = [(0, TRUNK)]  # how far it is indented, and the branch; None ends a subgraph
    while todo:
        depth, index = todo.pop()
        if index is None:
            lines.append(f"{'    ' * depth}end")
            continue
        branch = shape.branches[index]
        if index != TRUNK:
            lines.append(f'{"    " * depth}subgraph b{index}["{_label(shape.branch_names[index])}"]')
            todo.append((depth, None))
        for number in branch.strand:
            opening, closing = _SHAPES.get(graph.stages[shape.names[number]].kind, ("[", "]"))
            lines.append(f'{"    " * (depth + 1)}s{number}{opening}"{_label(shape.names[number])}"{closing}')
        todo += ((depth + 1, child) for child in reversed(branch.children))
    for number, name in enumerate(shape.names):
        spec = graph.stages[name]
        said = [] if spec.join == Join.ALL else [_join(spec.join)]
        said += [] if spec.when is None else ["when"]
        label = f"|{', '.join(said)}|" if said else ""
        for edge in spec.after:
            arrow = "-->" if edge.required else "-.->"
            lines.append(f"    s{shape.index[edge.stage]} {arrow}{label} s{number}")
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    """Gives a name with everything that means something to Mermaid as a character code."""
    return _UNSAFE.sub(lambda found: f"#{ord(found[0])};", one_line(name))


@final
@attrs.frozen
class _Tree:
    """A graph, to be drawn when it is printed."""

    graph: Graph

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self._lines(options.max_width):
            if options.ascii_only:
                line.plain = ascii_only(line.plain)
            line.rstrip()
            yield line

    def _lines(self, width: int) -> Iterator[Text]:
        graph, shape = self.graph, self.graph.shape
        notes = [_notes(graph, graph.stages[name]) for name in shape.names]
        entries = fold(shape, samples(shape), [1 + len(", ".join(note)) // 40 for note in notes], _LINES)
        levels = deepest(entries)
        longest = (
            len(widen(entry.guides, levels)) + cell_len(one_line(shape.names[entry.stages[0]]))
            for entry in entries
            if not entry.folded
        )
        names = min(max(longest, default=0), max(16, (width - _KIND) * 2 // 5))
        yield from _head(graph)
        for entry in entries:
            guides = widen(entry.guides, levels)
            if entry.folded:
                yield _line((guides, "bright_black"), (f"… {len(entry.stages):,} more", "italic"))
                continue
            spec = graph.stages[shape.names[entry.stages[0]]]
            name = shortened(one_line(spec.name), names - len(guides))
            line = _line((guides, "bright_black"), (name, "bold" if spec.kind is StageKind.ROUTE else ""))
            line.append(" " * (names - line.cell_len + _GAP))
            line.append(f"{spec.kind.value:{_KIND + _GAP}}", "bright_black")
            room = max(20, width - names - _KIND - 2 * _GAP)
            said = _wrapped(notes[entry.stages[0]], room)
            line.append(said[0])
            yield line
            under = widen(entry.under, levels)
            for part in said[1:]:
                yield _line((f"{under:{names + _KIND + 2 * _GAP}}", "bright_black"), (part, ""))


def _head(graph: Graph) -> Iterator[Text]:
    stages, branches = len(graph), len(graph.shape.branches)
    limit = "no limit" if graph.settings.default_timeout is None else f"{graph.settings.default_timeout:g} s"
    yield Text(one_line(graph.name), "bold", no_wrap=True, overflow="ellipsis")
    yield Text(f"{stages:,} stage{'s'[: stages > 1]} in {branches:,} branch{'es' if branches > 1 else ''}")
    policy = graph.settings.on_failure.value
    yield Text(f"unless a stage says otherwise: timeout {limit}, on failure {policy}", "bright_black")
    yield Text()


def _notes(graph: Graph, spec: StageSpec) -> list[str]:
    """What was declared of a stage, as far as it does not go without saying."""
    notes: list[str] = []
    if spec.after:
        names = [edge.stage if edge.required else f"optional {edge.stage}" for edge in spec.after]
        notes.append(f"after {listed(names, 5)}")
    if spec.join != Join.ALL:
        notes.append(f"join {_join(spec.join)}")
    if spec.when is not None:
        notes.append(f"when {_name_of(spec.when)}")
    if not isinstance(spec.timeout, Default) and spec.timeout != graph.settings.default_timeout:
        notes.append("no timeout" if spec.timeout is None else f"timeout {spec.timeout:g} s")
    if spec.total_timeout is not None:
        notes.append(f"total timeout {spec.total_timeout:g} s")
    if spec.heartbeat is not None:
        notes.append(f"heartbeat {spec.heartbeat:g} s")
    if spec.retry is not None:
        notes.append(f"up to {spec.retry.attempts} attempts")
    if spec.uses:
        notes.append(f"uses {listed(spec.uses, 5)}")
    if spec.priority:
        notes.append(f"priority {spec.priority}")
    if not isinstance(spec.on_failure, Default) and spec.on_failure is not graph.settings.on_failure:
        notes.append(f"on failure {spec.on_failure.value}")
    return notes


def _join(join: Join) -> str:
    return f"n_of {join.count}" if join.mode == "n_of" else join.mode


def _name_of(condition: Callable[..., object]) -> str:
    name = getattr(condition, "__name__", type(condition).__name__)
    return "a condition holds" if name == "<lambda>" else one_line(name)


def _wrapped(notes: list[str], width: int) -> list[str]:
    text = " · ".join(notes)
    if cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    for note in notes:
        lines += textwrap.wrap(note, width, max_lines=2, placeholder=" …", break_on_hyphens=False)
    return lines


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
