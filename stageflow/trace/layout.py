"""Where in the tree of branches each stage is drawn, and which are folded together when there are too many.

The tree is drawn as lines. The stages of a strand stand one below the other, and the branches below a strand are
indented by one level; each level of a line is one character here, which `widen` makes as broad as there is room for.

A drawing has about `limit` lines, however large the graph is. When not every stage can have its own, those are shown
that come first in an order of importance, which the caller gives, and everything else is folded: what is hidden within
a strand in its place, what is hidden among the branches below a strand behind those that are shown. If a whole strand
is hidden, what is shown below it moves up, behind a dotted guide. So neither a long chain nor deep nesting nor a wide
fan makes a long drawing, and nothing here recurses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

from stageflow.graph.branches import TRUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow.graph import Shape

__all__ = ["Entry", "deepest", "fold", "samples", "widen"]

_BROAD = {
    " ": "   ",
    "│": "│  ",
    "┌": "┌─ ",
    "├": "├─ ",
    "└": "└─ ",
    "╒": "┌┄ ",
    "╞": "├┄ ",
    "╘": "└┄ ",
}


@final
@attrs.frozen
class Entry:
    """A line of the drawing.

    Attributes:
        stages: The stage that is drawn there, or all those that are folded into it.
        guides: What stands before it, a character for each level.
        under: What stands before further lines that belong to it, one level more.
    """

    stages: tuple[int, ...]
    guides: str
    under: str

    @property
    def folded(self) -> bool:
        """Whether it stands for several stages."""
        return len(self.stages) > 1


def fold(shape: Shape, order: Sequence[int], heights: Sequence[int], limit: int) -> list[Entry]:
    """Lays out a graph in about so many lines.

    Args:
        shape: The graph.
        order: The stages that may be shown if not all can be, the most important first.
        heights: For every stage, how many lines it takes.
        limit: How many lines there may be.
    """
    if sum(heights) <= limit:
        return _lay_out(shape, [True] * len(heights))
    candidates = order[:limit]
    low, high = 0, len(candidates)
    best = _lay_out(shape, _marked(heights, ()))
    while low < high:
        middle = (low + high + 1) // 2
        entries = _lay_out(shape, _marked(heights, candidates[:middle]))
        if sum(1 if entry.folded else heights[entry.stages[0]] for entry in entries) <= limit:
            low, best = middle, entries
        else:
            high = middle - 1
    return best


def samples(shape: Shape, weights: Sequence[float] | None = None) -> list[int]:
    """Chooses stages that can stand for the others: joins, the heaviest of sibling branches, both ends of a strand.

    Args:
        shape: The graph.
        weights: What counts as heavy, by branch; if left out, the first branches are chosen.

    Returns:
        The stages, the outermost first.
    """
    level = {TRUNK: (0, 0)}  # of the branches that are chosen: how deep, and which of their siblings
    found: list[tuple[int, int, int, int]] = []
    for branch in shape.branches:
        if branch.index not in level:
            continue
        depth, rank = level[branch.index]
        for place, number in enumerate(branch.strand):
            from_end = min(place, len(branch.strand) - 1 - place)
            if from_end < 2:
                found.append((depth, rank, from_end, number))
        below = [shape.branches[child] for child in branch.children]
        below.sort(key=lambda child: (not child.joins, -weights[child.index] if weights else 0.0, child.index))
        level.update((child.index, (depth + 1, place)) for place, child in enumerate(below[:4]))
    return [number for *_, number in sorted(found)]


def deepest(entries: Sequence[Entry]) -> int:
    """The number of levels of a drawing."""
    return max((len(entry.guides) for entry in entries), default=0)


def widen(guides: str, levels: int) -> str:
    """Gives the guides of a line of a drawing that has so many levels."""
    width = 3 if levels <= 8 else 2 if levels <= 14 else 1
    return "".join(_BROAD[level][:width] for level in guides)


def _marked(heights: Sequence[int], shown: Sequence[int]) -> list[bool]:
    marks = [False] * len(heights)
    for number in shown:
        marks[number] = True
    return marks


def _lay_out(shape: Shape, shown: Sequence[bool]) -> list[Entry]:
    entries: list[Entry] = []
    todo: list[Entry | tuple[int, str, str]] = [(TRUNK, "", "")]
    while todo:
        item = todo.pop()
        if isinstance(item, Entry):
            entries.append(item)
            continue
        index, guides, under = item
        branch = shape.branches[index]
        strand: list[list[int]] = []
        for number in branch.strand:
            if strand and not shown[number] and not shown[strand[-1][0]]:
                strand[-1].append(number)
            else:
                strand.append([number])
        below, hidden = _below(shape, index, shown)
        if not below and strand and not shown[strand[-1][0]]:
            strand[-1] += hidden
            hidden = []
        for place, numbers in enumerate(strand):
            leads_down = place == len(strand) - 1 and bool(below or hidden)
            entries.append(Entry(tuple(numbers), guides, under + ("│" if leads_down else " ")))
            guides = under
        rows: list[tuple[int, bool] | list[int]] = [*below, *([hidden] if hidden else [])]
        todo += reversed([_row(row, place, len(rows), under, top=not entries) for place, row in enumerate(rows)])
    return entries


def _row(
    row: tuple[int, bool] | list[int], place: int, count: int, under: str, *, top: bool
) -> Entry | tuple[int, str, str]:
    """Gives a branch below a strand, or what is folded behind the branches, the guides that it has in its place."""
    last = place == count - 1
    token = 2 if last else 0 if top and place == 0 else 1
    following = under + (" " if last else "│")
    if isinstance(row, list):
        return Entry(tuple(row), under + "┌├└"[token], following + " ")
    index, lifted = row
    return index, under + ("╒╞╘" if lifted else "┌├└")[token], following


def _below(shape: Shape, index: int, shown: Sequence[bool]) -> tuple[list[tuple[int, bool]], list[int]]:
    """Gives the branches to draw below a branch, each with whether it comes from further down, and what is hidden."""
    below: list[tuple[int, bool]] = []
    hidden: list[int] = []
    todo = [(child, False) for child in reversed(shape.branches[index].children)]
    while todo:
        child, lifted = todo.pop()
        branch = shape.branches[child]
        if any(shown[number] for number in branch.strand):
            below.append((child, lifted))
        else:
            hidden += branch.strand
            todo += [(further, True) for further in reversed(branch.children)]
    return below, hidden
