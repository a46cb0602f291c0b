"""Which elements of two lists belong together: a guess that decides how small a `Delta` is, and nothing else."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from stageflow.frozen import FrozenDict, FrozenList

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["paired"]

_LEAVES = frozenset({str, int, float, bool, type(None), bytes, complex})


def paired(old: list[Any], new: list[Any]) -> list[tuple[int, int]]:
    """Gives the places of which the elements are compared with each other, as growing pairs.

    Whatever it gives, the delta is exact; how well it guesses decides how small it is.
    """
    if min(len(old), len(new)) == 0:
        return []
    if len(old) == len(new) == 1:
        return [(0, 0)]
    shared = set(map(id, old)) & set(map(id, new))
    befores, afters = ([_likeness(value, shared) for value in values] for values in (old, new))
    pairs: list[tuple[int, int]] = []
    start, begin = 0, 0
    for stop, end in [*_anchors(befores, afters), (len(old), len(new))]:
        # Between two anchors: from the end as far as it is alike, and then place by place.
        alike = 0
        while alike < min(stop - start, end - begin) and befores[stop - 1 - alike] == afters[end - 1 - alike]:
            alike += 1
        left = min(stop - start, end - begin) - alike
        pairs.extend((start + number, begin + number) for number in range(left))
        pairs.extend((stop - number, end - number) for number in range(alike, 0, -1))
        if stop < len(old) or end < len(new):
            pairs.append((stop, end))
        start, begin = stop + 1, end + 1
    return pairs


def _anchors(old: list[Hashable], new: list[Hashable]) -> list[tuple[int, int]]:
    """Gives the places of what is there exactly once on either side, in the longest chain that is in order on both."""
    olds, news = Counter(old), Counter(new)
    places = {value: place for place, value in enumerate(old) if olds[value] == news[value] == 1}
    ends: list[int] = []  # of the chains of every length, the least old place at which one ends
    lasts: list[tuple[int, int, Any]] = []  # and that chain, as its last pair and those before
    for after, value in enumerate(new):
        if value in places:
            before = places[value]
            length = bisect_left(ends, before)
            chain = (before, after, lasts[length - 1] if length else None)
            ends[length : length + 1] = [before]
            lasts[length : length + 1] = [chain]
    link: Any = lasts[-1] if lasts else None
    anchors: list[tuple[int, int]] = []
    while link is not None:
        before, after, link = link
        anchors.append((before, after))
    return anchors[::-1]


def _likeness(value: Any, shared: set[int]) -> Hashable:
    """Gives what two values have in common that are likely the same; looks at what is directly in it, and no deeper."""
    kind = cast("Any", type(value))
    if kind in _LEAVES:
        return kind, value
    if id(value) in shared:
        return kind, id(value)
    if kind is FrozenDict:
        return kind, frozenset((key, _outside(inner)) for key, inner in value.items())
    if kind in (FrozenList, tuple):
        return kind, tuple(map(_outside, value))
    return kind, id(value)


def _outside(value: Any) -> Hashable:
    kind = cast("Any", type(value))
    return (kind, value) if kind in _LEAVES else (kind,)
