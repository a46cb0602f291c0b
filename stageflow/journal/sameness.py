"""Whether two values are the same, in type and value, all the way down."""

from __future__ import annotations

import datetime as dt
import enum
import pathlib
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

import attrs

from stageflow.frozen import FrozenDict, FrozenList
from stageflow.journal.kinds import (
    TO_JSON,
    UNSET,
    fields_of,
    shown,
    step_to,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Difference", "find_difference", "same"]


def same(one: Any, other: Any, *, root: str = "data") -> str | None:
    """Says where two values differ, in type or value, all the way down.

    NaN is the same as NaN, but 0.0 is not the same as -0.0, nor 1 as 1.0 or True. What is frozen is the same as what is
    not: `FrozenDict` as `dict`, `FrozenList` as `list`, `frozenset` as `set`. The order of a mapping does not count.
    Instances of classes with fields are the same if all fields are, whatever their ``==`` says; those of registered
    classes if what is stored of them is; those of any other class if they are equal.

    Returns:
        The deepest path at which they differ; `None` if they are the same.
    """
    try:
        difference = find_difference(one, other)
    except RecursionError:
        return root  # too deep to tell
    return None if difference is None else root + "".join(reversed(difference.steps))


@attrs.define(eq=False)
class Difference:
    """Two parts of values that differ, and where they are: the steps from there up to the values."""

    one: Any
    other: Any
    steps: list[str] = attrs.field(factory=list[str])

    def under(self, step: str) -> Difference:
        """Adds a step upwards."""
        self.steps.append(step)
        return self


_AS: Final[Mapping[Any, Any]] = {FrozenDict: dict, FrozenList: list, set: frozenset}
_EQUAL: Final = frozenset({str, int, bool, type(None), bytes, dt.date, dt.timedelta})
"""What is the same if it is equal."""


def _moment(value: Any) -> Any:
    zone: Any = value.tzinfo
    return value.replace(tzinfo=None), value.fold, type(zone), _WHAT_COUNTS.get(type(zone), lambda zone: zone)(zone)


_WHAT_COUNTS: Final[dict[Any, Callable[[Any], Any]]] = {
    float: repr,
    complex: lambda value: (repr(value.real), repr(value.imag)),
    Decimal: Decimal.as_tuple,
    dt.datetime: _moment,
    dt.time: _moment,
    dt.timezone: lambda zone: (zone.utcoffset(None), zone.tzname(None)),
    ZoneInfo: lambda zone: zone.key,
    uuid.UUID: lambda value: (value.int, value.is_safe),
    **dict.fromkeys((pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath), str),
}
"""For builtins that are equal sometimes without being the same, or the same without being equal: what tells."""


def find_difference(one: Any, other: Any) -> Difference | None:
    """Gives where two values differ; `None` if they are the same."""
    if one is other:
        return None
    kind = _AS.get(type(one), type(one))
    if kind is not _AS.get(type(other), type(other)):
        return Difference(one, other)
    if kind in _EQUAL:
        return None if one == other else Difference(one, other)
    if kind is dict:
        return _difference_of_mappings(one, other)
    if kind is frozenset:
        return _difference_of_mappings(dict.fromkeys(one), dict.fromkeys(other))
    if kind is list or kind is tuple:
        if len(one) != len(other):
            return Difference(one, other)
        for place, (part, found) in enumerate(zip(one, other, strict=True)):
            difference = find_difference(part, found)
            if difference is not None:
                return difference.under(f"[{place}]")
        return None
    try:
        if kind in TO_JSON:
            return find_difference(TO_JSON[kind](one), TO_JSON[kind](other))
        if kind in _WHAT_COUNTS:
            is_same = _WHAT_COUNTS[kind](one) == _WHAT_COUNTS[kind](other)
        elif not issubclass(kind, enum.Enum) and (fields := fields_of(kind)) is not None:
            for name, _ in fields:
                difference = find_difference(getattr(one, name, UNSET), getattr(other, name, UNSET))
                if difference is not None:
                    return difference.under(f".{name}")
            return None
        else:
            is_same = bool(one == other)
    except RecursionError:
        raise
    except Exception:  # it is the user's ==, or what was registered
        is_same = False
    return None if is_same else Difference(one, other)


def _difference_of_mappings(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> Difference | None:
    if len(one) != len(other):
        return Difference(one, other)
    there = {key: (key, part) for key, part in other.items()}
    missing: list[tuple[Any, Any]] = []
    for key, part in one.items():
        found = there.pop(key, None)
        if found is None:
            missing.append((key, part))
            continue
        difference = find_difference(key, found[0])
        if difference is not None:
            return difference.under(f"{{{shown(key)}}}")
        difference = find_difference(part, found[1])
        if difference is not None:
            return difference.under(step_to(key))
    # Keys may be the same without being equal, like NaN, or what has no == of its own. Order is likely to be kept.
    left = list(there.values())
    for pair in missing:
        match = next((place for place, candidate in enumerate(left) if find_difference(pair, candidate) is None), None)
        if match is None:
            return Difference(pair[0], UNSET).under(f"{{{shown(pair[0])}}}")
        del left[match]
    return None
