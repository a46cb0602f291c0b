"""Whether one type can stand where another was: for the edges of a graph, and when a contract changes."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Literal, Union, final, get_args, get_origin, is_typeddict

import attrs

from stageflow.stages.fields import Field, fields_of, is_record, origin_of, plain
from stageflow.stages.policy import spelled

__all__ = ["Breaks", "Difference", "Reading", "compatibility", "differences", "weaknesses"]


@final
class Breaks(enum.Flag):
    """Whom a difference between two contracts concerns."""

    PRODUCERS = enum.auto()
    """The new contract refuses what stages give that follow the old one."""
    CONSUMERS = enum.auto()
    """The new contract does not promise what stages rely on that follow the old one."""
    STORED = enum.auto()
    """Values that were kept under the old contract cannot be read under the new one."""


@final
@attrs.frozen(kw_only=True)
class Difference:
    """One difference between two types.

    Attributes:
        path: Where, as one would write it: ``doc.pages[].title``.
        what: What is different, in words.
        breaks: Whom that concerns; empty if nobody.
    """

    path: str
    what: str
    breaks: Breaks

    def __str__(self) -> str:
        concerned = ", ".join(str(member.name).lower() for member in Breaks if member in self.breaks)
        return f"{self.path}: {self.what}{f' (breaks {concerned})' if concerned else ''}"


@final
class Reading(enum.Enum):
    """What is done with a value of the one type where the other is wanted."""

    HANDED = enum.auto()
    """It is handed over as it is, as from stage to stage."""
    PROMISED = enum.auto()
    """Likewise, but the types are versions of each other, so that an enumeration is what its values are."""
    STRUCTURED = enum.auto()
    """It is plain data, as it was stored or as a stage gives a mapping, and checked by a `Contract`."""


_MISSING: Final = "there is no such field"
_GONE: Final = "the field is gone"
_ALIKE: Final[tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...]] = (
    ((list, tuple, Sequence, MutableSequence), (list, tuple)),
    ((set, frozenset, AbstractSet, MutableSet), (set, frozenset)),
    ((dict, Mapping, MutableMapping), (Mapping,)),
)
"""Containers that a contract makes of each other, and what else it makes them of."""


def compatibility(old: Any, new: Any, *, root: str = "value") -> tuple[Difference, ...]:
    """Compares two versions of a contract.

    Args:
        old: The type as it was.
        new: The type as it is.
        root: What the value is called in paths.

    Returns:
        The differences, and whom each of them breaks. A producer breaks if what it gives under the old contract is
        refused now, a consumer if what it gets now is not what it relied on, a stored value if it cannot be read any
        more. Nested types are walked through. Nothing is returned for types that are the same.
    """
    found: dict[tuple[str, str], Difference] = {}
    for given, wanted, reading, missing, breaks in (
        (old, new, Reading.STRUCTURED, "the field is new, and required", Breaks.PRODUCERS | Breaks.STORED),
        (new, old, Reading.PROMISED, _GONE, Breaks.CONSUMERS),
    ):
        for path, what in differences(given, wanted, root, reading):
            said = missing if what == _MISSING else what
            before = found.get((path, said))
            both = breaks if before is None else breaks | before.breaks
            found[path, said] = Difference(path=path, what=said, breaks=both)
    for path, what in _harmless(old, new, root, frozenset()):
        found.setdefault((path, what), Difference(path=path, what=what, breaks=Breaks(0)))
    return tuple(found.values())


def differences(given: Any, wanted: Any, path: str, reading: Reading = Reading.HANDED, /) -> Iterator[tuple[str, str]]:
    """Says where a value of one type would not do where another type is wanted; nothing if it would."""
    yield from _differences(given, wanted, path, reading, frozenset())


def weaknesses(declared: Any) -> Iterator[str]:
    """Says where a class promises less than a class that it derives from, so that it cannot stand in its place."""
    origin = origin_of(declared)
    if not is_record(declared) or is_typeddict(origin):
        return
    fields = fields_of(declared) or {}
    for base in origin.__mro__[1:]:
        for name, field in (fields_of(base) or {}).items():
            own, here = origin.__qualname__, f"{origin.__qualname__}.{name}"
            found = differences(fields[name].declared, field.declared, here) if name in fields else ()
            yield from (
                f"{path} is weaker than in {base.__qualname__}, which {own} derives from: {what}"
                for path, what in found
            )


def _differences(
    given: Any, wanted: Any, path: str, reading: Reading, seen: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    given, wanted = plain(given), plain(wanted)
    if given == wanted or wanted is Any or wanted is object or (id(given), id(wanted)) in seen:
        return
    seen |= {(id(given), id(wanted))}
    if given is Any:
        yield path, f"gives anything, wanted {spelled(wanted)}"
    elif _is_union(given):
        for member in get_args(given):
            yield from _differences(member, wanted, path, reading, seen)
    elif get_origin(given) is Literal:
        extra = [value for value in get_args(given) if not _fits(value, wanted, reading)]
        if extra:
            yield path, f"gives {', '.join(map(repr, extra))}, wanted {spelled(wanted)}"
    elif _is_union(wanted):
        options = [list(_differences(given, member, path, reading, seen)) for member in get_args(wanted)]
        real = [member for member in get_args(wanted) if member is not type(None)]
        if all(options):
            best = options[get_args(wanted).index(real[0])] if len(real) == 1 and is_record(given) else None
            yield from best or [(path, _other(given, wanted))]
    elif is_record(given) and is_record(wanted):
        yield from _records(given, wanted, path, reading, seen)
    elif _is_enum(given) and _is_enum(wanted) and reading is not Reading.HANDED:
        extra = [member.value for member in given if not _fits(member.value, wanted, reading)]
        if extra:
            yield path, f"gives {', '.join(map(repr, extra))}, wanted {spelled(wanted)}"
    else:
        yield from _containers(given, wanted, path, reading, seen)


def _fits(value: Any, wanted: Any, reading: Reading) -> bool:
    """Whether a value that a literal names is of a type."""
    wanted = plain(wanted)
    if _is_union(wanted):
        return any(_fits(value, member, reading) for member in get_args(wanted))
    if get_origin(wanted) is Literal:
        return any(type(option) is type(value) and option == value for option in get_args(wanted))
    if _is_enum(wanted) and reading is not Reading.HANDED and not isinstance(value, wanted):
        return any(type(member.value) is type(value) and member.value == value for member in wanted)
    return wanted in (Any, object) or not list(_containers(type(value), wanted, "", reading, frozenset()))


def _records(
    given: Any, wanted: Any, path: str, reading: Reading, seen: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Classes with fields: a subclass will do, and so will what has the same fields."""
    of_mapping, to_mapping = is_typeddict(origin_of(given)), is_typeddict(origin_of(wanted))
    structured = reading is Reading.STRUCTURED
    if of_mapping is not to_mapping and (to_mapping or not structured):
        yield path, _other(given, wanted)  # a mapping is no instance of a class, nor the other way round
        return
    by = "key" if structured else "name"
    has = {getattr(field, by): field for field in (fields_of(given) or {}).values() if field.init or not structured}
    needs = {getattr(field, by): field for field in (fields_of(wanted) or {}).values() if field.init or not structured}
    derived = not to_mapping and issubclass(origin_of(given), origin_of(wanted))
    for name, field in needs.items():
        if name not in has:
            # An instance has every field, be there a default or not; a mapping may leave out what has one.
            if field.required or not (structured or to_mapping or derived):
                yield f"{path}.{name}", _MISSING
        else:
            if (structured or to_mapping) and field.required and not has[name].required:
                yield f"{path}.{name}", "the field may be missing"
            yield from _differences(has[name].declared, field.declared, f"{path}.{name}", reading, seen)
    if structured and not derived and getattr(origin_of(wanted), "__extra_fields__", "forbid") != "ignore":
        yield from ((f"{path}.{name}", _GONE) for name in has if name not in needs)


def _containers(
    given: Any, wanted: Any, path: str, reading: Reading, seen: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    source, target = origin_of(given), origin_of(wanted)
    if source is int and target is float:
        return
    if not _stands_for(source, target, reading):
        yield path, _other(given, wanted)
        return
    has, needs = get_args(given), get_args(wanted)
    if wanted == tuple[()] or (needs and target is tuple and needs[-1] is not ...):
        if source is not tuple or given is tuple or len(has) != len(needs) or has[-1:] == (...,):
            yield path, _other(given, wanted)
            return
        for place, (one, other) in enumerate(zip(has, needs, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]", reading, seen)
    elif len(needs) == 2 and issubclass(target, Mapping):
        fields: dict[str, Field] = fields_of(given) or {}
        if fields:  # of a TypedDict
            yield from _differences(str, needs[0], f"{path} (keys)", reading, seen)
            for name, field in fields.items():
                yield from _differences(field.declared, needs[1], f"{path}.{name}", reading, seen)
            return
        of_key, of_value = has if len(has) == 2 else (Any, Any)
        yield from _differences(of_key, needs[0], f"{path} (keys)", reading, seen)
        yield from _differences(of_value, needs[1], f"{path}[]", reading, seen)
    elif needs and given != tuple[()]:
        for element in dict.fromkeys(argument for argument in has or (Any,) if argument is not ...):
            yield from _differences(element, needs[0], f"{path}[]", reading, seen)


def _stands_for(source: Any, target: Any, reading: Reading) -> bool:
    if not (isinstance(source, type) and isinstance(target, type)) or is_typeddict(target):
        return False
    if reading is Reading.STRUCTURED:
        if source is bool and target is not bool:
            return target is object  # a contract takes True for no number
        for alike, accepted in _ALIKE:
            if target in alike:
                return (
                    source in alike or (is_typeddict(source) and accepted == (Mapping,)) or issubclass(source, accepted)
                )
    try:
        return issubclass(source, target)
    except TypeError:  # a protocol that cannot be checked
        return True


def _harmless(old: Any, new: Any, path: str, seen: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Fields that are new or gone, which may concern nobody."""
    old, new = _without_none(old), _without_none(new)
    if id(new) in seen or old == new:
        return
    seen |= {id(new)}
    if is_record(old) and is_record(new):
        has, needs = fields_of(old) or {}, fields_of(new) or {}
        for name, field in needs.items():
            if name not in has and not field.required:
                yield f"{path}.{name}", "the field is new"
            elif name in has:
                yield from _harmless(has[name].declared, field.declared, f"{path}.{name}", seen)
        yield from ((f"{path}.{name}", _GONE) for name in has if name not in needs)
    elif get_args(old) and get_args(new) and not _is_union(old) and not _is_union(new):
        for (place, one), (_, other) in zip(_elements(old), _elements(new), strict=False):
            yield from _harmless(one, other, path + place, seen)


def _elements(declared: Any) -> list[tuple[str, Any]]:
    """Gives the types of what is in a container, each with what it adds to a path."""
    origin, arguments = origin_of(declared), get_args(declared)
    if len(arguments) == 2 and isinstance(origin, type) and issubclass(origin, Mapping):
        return [(" (keys)", arguments[0]), ("[]", arguments[1])]
    if origin is tuple and arguments[-1] is not ...:
        return [(f"[{place}]", argument) for place, argument in enumerate(arguments)]
    return [("[]", argument) for argument in arguments if argument is not ...]


def _other(given: Any, wanted: Any) -> str:
    return f"gives {spelled(given)}, wanted {spelled(wanted)}"


def _without_none(declared: Any) -> Any:
    """Gives the one type that a value has if it is not `None`; any other as it is."""
    declared = plain(declared)
    real = [member for member in get_args(declared) if member is not type(None)] if _is_union(declared) else []
    return plain(real[0]) if len(real) == 1 else declared


def _is_union(declared: Any) -> bool:
    return get_origin(declared) in (Union, types.UnionType)


def _is_enum(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, enum.Enum)
