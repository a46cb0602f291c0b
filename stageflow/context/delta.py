"""`Delta`: what has changed between two immutable values, as a list of changes by path.

Values that were made from each other share what they have in common, so most of what two versions hold is the very same
object, and is passed over at once. What a delta holds is as large as the change, not as what was changed: one message
more in a list of thousands is one `Change`, wherever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast, final

import attrs

from stageflow.context.alignment import paired
from stageflow.frozen import FrozenDict, FrozenList, freeze

__all__ = ["Change", "Delta", "difference"]

Path: TypeAlias = tuple[Any, ...]


@final
@attrs.frozen
class Change:
    """One change.

    Attributes:
        op: ``"add"``, ``"remove"`` or ``"replace"``, as in RFC 6902.
        path: The keys and places that lead to what is changed, from the outside in.
        value: What is there afterwards, deeply frozen; `None` where it was removed.

    Raises:
        ValueError: There is no such `op`.
        TypeError: `path` is no tuple.
    """

    op: str = attrs.field(validator=attrs.validators.in_(("add", "remove", "replace")))
    path: Path = attrs.field(validator=attrs.validators.instance_of(tuple))
    value: Any = attrs.field(default=None, converter=freeze)  # pyright: ignore[reportUnknownVariableType]

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
        around: list[Any] = [freeze(value)]  # so that the outermost value is in something, like any other
        for change in self.changes:
            _make(change, around)
        return freeze(around[0])


# Applying


def _make(change: Change, around: list[Any]) -> None:
    """Makes a change in place. Frozen containers on the way give way to plain copies, which are frozen in the end."""
    *way, last = (0, *change.path)
    holder: Any = around
    for step in way:
        _check(change, step, holder)
        # What is plain is such a copy: a value that is frozen has nothing plain in it.
        if cast("Any", type(holder[step])) not in (dict, list):
            holder[step] = _thawed(holder[step], change)
        holder = holder[step]
    if change.op == "add" and type(holder) is dict:
        holder[last] = change.value
    elif change.op == "add" and holder is not around:
        _check(change, last, holder, room=len(holder) + 1)
        holder.insert(last, change.value)
    elif change.op == "remove" and holder is around:
        raise _misfit(change, "the outermost value can be replaced only")
    else:
        _check(change, last, holder)
        if change.op == "remove":
            del holder[last]
        else:
            holder[last] = change.value


def _thawed(value: Any, change: Change) -> dict[Any, Any] | list[Any]:
    """Gives a plain copy of a container, with everything in it frozen."""
    kind = cast("Any", type(value))
    if kind is FrozenDict:
        return dict(value)
    if issubclass(kind, Mapping):
        return dict(FrozenDict(value))
    if issubclass(kind, list):
        return list(FrozenList(value))
    raise _misfit(change, f"there is nothing inside {type(value).__name__!r}")


def _check(change: Change, step: Any, holder: Any, *, room: int | None = None) -> None:
    if type(holder) is dict:
        if step not in holder:
            raise _misfit(change, f"there is no {step!r}")
    elif type(step) is not int or not 0 <= step < (len(holder) if room is None else room):
        raise _misfit(change, f"there is no place {step!r} among {len(holder)} elements")


def _misfit(change: Change, why: str) -> ValueError:
    return ValueError(
        f"the change {change.op!r} at {change.path!r} does not fit: {why}; apply a delta to the value it was made from"
    )


# Comparing


@attrs.define(eq=False)
class _Pair:
    """Two values at one place, and the pair of containers that they are in."""

    old: Any
    new: Any
    around: _Pair | None = None
    step: Any = None
    changes_before: int | None = None  # how many changes there were when it was entered

    @property
    def key(self) -> tuple[int, int]:
        return id(self.old), id(self.new)

    def path(self) -> Path:
        steps: list[Any] = []
        pair = self
        while pair.around is not None:
            steps.append(pair.step)
            pair = pair.around
        return tuple(reversed(steps))

    def change(self, op: str, step: Any, value: Any = None) -> Change:
        """A change inside it."""
        return Change(op, (*self.path(), step), value)


def difference(old: Any, new: Any) -> Delta:
    """Gives what has changed from one frozen value to another, exactly: ``difference(a, b).apply(a) == b``.

    Builtin values are the same only if they are of the same type all through; other objects, if they say so.
    """
    changes: list[Change] = []
    inside: set[tuple[int, int]] = set()  # the pairs around the one that is being compared
    equal: set[tuple[int, int]] = set()  # what is shared need not be compared again
    todo = [_Pair(old, new)]  # a list instead of recursion, for values may be deep
    while todo:
        pair = todo[-1]
        if pair.changes_before is not None:
            todo.pop()
            inside.discard(pair.key)
            if pair.changes_before == len(changes):
                equal.add(pair.key)
            continue
        if pair.key in inside:  # a circle, in which what is changed has no one path
            return Delta((Change("replace", (), new),))
        kind = cast("Any", type(pair.old))
        if pair.old is not pair.new and kind is type(pair.new) and kind in (FrozenDict, FrozenList):
            if pair.key in equal:
                todo.pop()
                continue
            pair.changes_before = len(changes)
            inside.add(pair.key)
            (_mappings if kind is FrozenDict else _lists)(pair, changes, todo)
            continue
        todo.pop()
        if not _equal(pair.old, pair.new):
            changes.append(Change("replace", pair.path(), pair.new))
    return Delta(tuple(changes))


def _mappings(pair: _Pair, changes: list[Change], todo: list[_Pair]) -> None:
    old, new = pair.old, pair.new
    own = {key: key for key in new}
    gone = {key for key in old if key not in own or not _equal(key, own[key])}  # 1 and True are one key to a dict
    changes.extend(pair.change("remove", key) for key in old if key in gone)
    for key, after in new.items():
        if key in gone or key not in old:
            changes.append(pair.change("add", key, after))
        elif old[key] is not after:
            todo.append(_Pair(old[key], after, pair, key))


def _lists(pair: _Pair, changes: list[Change], todo: list[_Pair]) -> None:
    """Leaves out what both begin and end with, and pairs what is alike in between; the rest has gone, or is new."""
    old, new = pair.old, pair.new
    start, least = 0, min(len(old), len(new))
    while start < least and _is_same(old[start], new[start]):
        start += 1
    end = 0
    while end < least - start and _is_same(old[-1 - end], new[-1 - end]):
        end += 1
    pairs = paired(old[start : len(old) - end], new[start : len(new) - end])
    befores, afters = {start + before for before, _ in pairs}, {start + after for _, after in pairs}
    # Every removal is made where nothing before it has moved, every addition where all before it is in its new place.
    gone = (place for place in range(len(old) - end - 1, start - 1, -1) if place not in befores)
    changes.extend(pair.change("remove", place) for place in gone)
    come = (place for place in range(start, len(new) - end) if place not in afters)
    changes.extend(pair.change("add", place, new[place]) for place in come)
    for before, after in pairs:
        if old[start + before] is not new[start + after]:
            todo.append(_Pair(old[start + before], new[start + after], pair, start + after))


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same without a look into containers."""
    return one is other or (type(one) not in (FrozenDict, FrozenList) and _equal(one, other))


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, in type as well: 1 is neither True nor 1.0, however deep."""
    todo: list[tuple[Any, Any]] = [(one, other)]
    seen: set[tuple[int, int]] = set()
    while todo:
        left, right = todo.pop()
        if left is right or (id(left), id(right)) in seen:
            continue
        kind = cast("Any", type(left))
        if kind is not type(right):
            return False
        if kind in (tuple, FrozenList):
            if len(left) != len(right):
                return False
            todo.extend(zip(left, right, strict=True))
        elif kind in (frozenset, FrozenDict):
            own = {key: key for key in left}
            if len(own) != len(right) or any(key not in own for key in right):
                return False
            todo.extend((own[key], key) for key in right)
            todo.extend((left[key], right[key]) for key in right if kind is FrozenDict)
        elif not _say_so(left, right) or (kind in (float, complex) and repr(left) != repr(right)):  # 0.0 and -0.0
            return False
        else:
            continue
        seen.add((id(left), id(right)))  # there may be circles
    return True


def _say_so(one: Any, other: Any) -> bool:
    try:
        equal: object = one == other
    except Exception:  # it is the user's, and may do anything
        return False
    return equal is True  # an array, for one, compares to an array
