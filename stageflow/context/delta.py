"""`Delta`: what has changed between two immutable values, as a list of changes by path.

Values that were made from each other share what they have in common, so most of what two versions hold is the very same
object, and is passed over at once. What a delta holds is as large as the change, not as what was changed: one message
more in a list of thousands is one `Change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, final

import attrs

from stageflow.frozen import FrozenDict, FrozenList, freeze

__all__ = ["Change", "Delta", "difference"]

Path: TypeAlias = tuple[Any, ...]
_GONE = object()


@final
@attrs.frozen
class Change:
    """One change.

    Attributes:
        op: ``"add"``, ``"remove"`` or ``"replace"``, as in RFC 6902.
        path: The keys and places that lead to what is changed, from the outside in.
        value: What is there afterwards; `None` where it was removed.
    """

    op: str
    path: Path
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        """Gives it as an operation of a JSON patch (RFC 6902)."""
        steps = (str(step).replace("~", "~0").replace("/", "~1") for step in self.path)
        operation = {"op": self.op, "path": "".join(f"/{step}" for step in steps)}
        return operation if self.op == "remove" else {**operation, "value": self.value}


@final
@attrs.frozen
class Delta:
    """What has changed between two versions of a value; applied to the one, it gives the other.

    Attributes:
        changes: The changes, in the order in which they are to be made.
    """

    changes: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def to_json_patch(self) -> list[dict[str, Any]]:
        """Gives it as a JSON patch (RFC 6902), for values that are JSON."""
        return [change.to_json() for change in self.changes]

    def apply(self, value: Any) -> Any:
        """Gives the value after the changes. What they do not touch is shared, not copied.

        Raises:
            ValueError: A change does not fit the value: it is not the one that the delta was made from.
        """
        for change in self.changes:
            value = _changed(value, change, 0)
        return value


def difference(old: Any, new: Any) -> Delta:
    """Gives what has changed from one frozen value to another, exactly: ``difference(a, b).apply(a) == b``."""
    changes: list[Change] = []
    todo: list[tuple[Any, Any, Path]] = [(old, new, ())]
    while todo:  # a list instead of recursion, for values may be deep
        before, after, path = todo.pop()
        if before is after:
            continue
        if type(before) is FrozenDict and type(after) is FrozenDict:
            _mappings(before, after, path, changes, todo)
        elif type(before) is FrozenList and type(after) is FrozenList:
            _lists(before, after, path, changes, todo)
        elif not _equal(before, after):
            changes.append(Change("replace", path, after))
    return Delta(tuple(changes))


def _mappings(old: Any, new: Any, path: Path, changes: list[Change], todo: list[tuple[Any, Any, Path]]) -> None:
    changes.extend(Change("remove", (*path, key)) for key in old if key not in new)
    for key, after in new.items():
        before = old.get(key, _GONE)
        if before is _GONE:
            changes.append(Change("add", (*path, key), after))
        elif before is not after:
            todo.append((before, after, (*path, key)))


def _lists(old: Any, new: Any, path: Path, changes: list[Change], todo: list[tuple[Any, Any, Path]]) -> None:
    """Leaves out what both begin and end with, compares the rest place by place, and adds or removes what is left."""
    start, least = 0, min(len(old), len(new))
    while start < least and _is_same(old[start], new[start]):
        start += 1
    end = 0
    while end < least - start and _is_same(old[-1 - end], new[-1 - end]):
        end += 1
    split = least - end
    changes.extend(Change("remove", (*path, place)) for place in reversed(range(split, len(old) - end)))
    changes.extend(Change("add", (*path, place), new[place]) for place in range(split, len(new) - end))
    moved = (place for place in range(start, split) if old[place] is not new[place])
    todo.extend((old[place], new[place], (*path, place)) for place in moved)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same without a look into containers."""
    return one is other or (not isinstance(one, (FrozenDict, FrozenList)) and _equal(one, other))


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, in type as well: 1 is neither True nor 1.0."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    return _equal_tuples(one, other) if _is_tuple(one) else bool(one == other)


def _equal_tuples(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _changed(value: Any, change: Change, depth: int) -> Any:
    """Gives a value with one change made; the containers on the way are made anew, and nothing else is."""
    if depth == len(change.path):
        return freeze(change.value)
    step, last = change.path[depth], depth == len(change.path) - 1
    if _is_mapping(value):
        return _changed_mapping(dict(value), step, change, depth, last=last)
    if _is_list(value) and isinstance(step, int):
        items: list[Any] = list(value)
        adds = last and change.op == "add"
        if not 0 <= step < len(items) + adds:
            raise ValueError(f"a change at {change.path!r} does not fit: there are {len(items)} elements")
        if adds:
            items.insert(step, freeze(change.value))
        elif last and change.op == "remove":
            del items[step]
        else:
            items[step] = _changed(items[step], change, depth + 1)
        return FrozenList(items)
    raise ValueError(f"a change at {change.path!r} does not fit: there is no {step!r} in {type(value).__name__}")


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _changed_mapping(
    items: dict[Any, Any], step: Any, change: Change, depth: int, *, last: bool
) -> FrozenDict[Any, Any]:
    if last and change.op == "add":
        items[step] = freeze(change.value)
    elif step not in items:
        raise ValueError(f"a change at {change.path!r} does not fit: there is no {step!r}")
    elif last and change.op == "remove":
        del items[step]
    else:
        items[step] = _changed(items[step], change, depth + 1)
    return FrozenDict(items)
