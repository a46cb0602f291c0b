"""Whether one type can stand where another was: for the edges of a graph, and when a contract changes."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, Union, cast, final, get_args, get_origin, get_type_hints, is_typeddict

import attrs

from stageflow.stages.policy import spelled

__all__ = ["Breaks", "Difference", "compatibility", "differences", "fields_of"]


@final
class Breaks(enum.Flag):
    """Whom a difference between two contracts concerns."""

    PRODUCERS = enum.auto()
    """Stages that give what the old contract wants: the new one refuses it."""
    CONSUMERS = enum.auto()
    """Stages that rely on what the old contract promises: the new one does not promise it."""
    STORED = enum.auto()
    """Values that were kept under the old contract: they cannot be read under the new one."""


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


@attrs.frozen(kw_only=True)
class _Field:
    declared: Any
    required: bool


_MISSING = "there is no such field"
_SEQUENCES = (list, Sequence, tuple)


def compatibility(old: Any, new: Any, *, root: str = "value") -> tuple[Difference, ...]:
    """Compares two versions of a contract.

    Args:
        old: The type as it was.
        new: The type as it is.
        root: What the value is called in paths.

    Returns:
        Every difference, with whom it breaks: a producer breaks if what it gives under the old contract is refused now,
        a consumer if what it gets now is not what it relied on, a stored value if it cannot be read any more. Nested
        types are walked through. Nothing is returned for types that are the same.
    """
    found: dict[tuple[str, str], Difference] = {}
    for given, wanted, missing, breaks in (
        (old, new, "the field is new, and required", Breaks.PRODUCERS | Breaks.STORED),
        (new, old, "the field is gone", Breaks.CONSUMERS),
    ):
        for path, what in differences(given, wanted, root):
            said = missing if what == _MISSING else what
            before = found.get((path, said))
            both = breaks if before is None else breaks | before.breaks
            found[path, said] = Difference(path=path, what=said, breaks=both)
    for path, what in _additions(old, new, root, frozenset()):
        found.setdefault((path, what), Difference(path=path, what=what, breaks=Breaks(0)))
    return tuple(found.values())


def differences(given: Any, wanted: Any, path: str) -> Iterator[tuple[str, str]]:
    """Says where a value of one type would not do where another type is wanted; nothing if it would."""
    yield from _differences(given, wanted, path, frozenset())


def _differences(given: Any, wanted: Any, path: str, seen: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    given, wanted = _plain(given), _plain(wanted)
    if given == wanted or wanted is Any or wanted is object or (id(given), id(wanted)) in seen:
        return
    seen |= {(id(given), id(wanted))}
    if given is Any:
        yield path, f"gives anything, wanted {spelled(wanted)}"
    elif _is_union(given):
        for member in get_args(given):
            yield from _differences(member, wanted, path, seen)
    elif _is_union(wanted):
        options = [list(_differences(given, member, path, seen)) for member in get_args(wanted)]
        real = [member for member in get_args(wanted) if member is not type(None)]
        if all(options):
            best = options[get_args(wanted).index(real[0])] if len(real) == 1 and _is_record(given) else None
            yield from best or [(path, _other(given, wanted))]
    elif get_origin(given) is Literal:
        yield from _literal(given, wanted, path)
    elif _is_record(given) and _is_record(wanted):
        yield from _records(given, wanted, path, seen)
    else:
        yield from _containers(given, wanted, path, seen)


def _literal(given: Any, wanted: Any, path: str) -> Iterator[tuple[str, str]]:
    if get_origin(wanted) is Literal:
        extra = [value for value in get_args(given) if value not in get_args(wanted)]
        if extra:
            yield path, f"gives {', '.join(map(repr, extra))}, wanted {spelled(wanted)}"
    elif not all(isinstance(wanted, type) and isinstance(value, wanted) for value in get_args(given)):
        yield path, _other(given, wanted)


def _records(given: Any, wanted: Any, path: str, seen: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Classes with fields: a subclass will do, and so will what has the same fields."""
    if isinstance(given, type) and isinstance(wanted, type) and not is_typeddict(wanted) and issubclass(given, wanted):
        return
    if is_typeddict(given) is not is_typeddict(wanted):  # a mapping is no instance of a class, nor the other way round
        yield path, _other(given, wanted)
        return
    has, needs = _fields(given), _fields(wanted)
    for name, field in needs.items():
        if name not in has:
            if field.required:
                yield f"{path}.{name}", _MISSING
        else:
            if field.required and not has[name].required:
                yield f"{path}.{name}", "the field may be missing"
            yield from _differences(has[name].declared, field.declared, f"{path}.{name}", seen)


def _containers(given: Any, wanted: Any, path: str, seen: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    source, target = get_origin(given) or given, get_origin(wanted) or wanted
    if source is int and target is float:
        return
    if not (isinstance(source, type) and isinstance(target, type) and _stands_for(source, target)):
        yield path, _other(given, wanted)
        return
    has, needs = get_args(given), get_args(wanted)
    if not needs:
        return
    if issubclass(target, Mapping):
        of_key, of_value = has or (Any, Any)
        yield from _differences(of_key, needs[0], f"{path} (keys)", seen)
        yield from _differences(of_value, needs[1], f"{path}[]", seen)
    elif issubclass(target, tuple) and needs[-1] is not ...:
        if len(has) != len(needs) or (has and has[-1] is ...):
            yield path, _other(given, wanted)
            return
        for place, (one, other) in enumerate(zip(has, needs, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]", seen)
    elif issubclass(target, (Sequence, AbstractSet)):
        for element in dict.fromkeys(argument for argument in has or (Any,) if argument is not ...):
            yield from _differences(element, needs[0], f"{path}[]", seen)


def _stands_for(source: type, target: type) -> bool:
    try:
        return issubclass(source, target) or (target in _SEQUENCES and source in _SEQUENCES)
    except TypeError:  # a protocol that cannot be checked
        return True


def _additions(old: Any, new: Any, path: str, seen: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Fields that are new and concern nobody, since they have a default."""
    old, new = _plain(old), _plain(new)
    if id(new) in seen:
        return
    seen |= {id(new)}
    if _is_record(old) and _is_record(new):
        has, needs = _fields(old), _fields(new)
        for name, field in needs.items():
            if name not in has and not field.required:
                yield f"{path}.{name}", "the field is new"
            elif name in has:
                yield from _additions(has[name].declared, field.declared, f"{path}.{name}", seen)
    elif get_args(old) and get_args(new) and not _is_union(old) and not _is_union(new):
        for one, other in zip(get_args(old), get_args(new), strict=False):
            yield from _additions(one, other, f"{path}[]", seen)


def _other(given: Any, wanted: Any) -> str:
    return f"gives {spelled(given)}, wanted {spelled(wanted)}"


def _plain(declared: Any) -> Any:
    """Gives what an alias, a NewType or an annotated type stands for."""
    while True:
        if hasattr(declared, "__supertype__"):
            declared = declared.__supertype__
        elif hasattr(declared, "__metadata__"):
            declared = declared.__origin__
        else:
            return type(None) if declared is None else declared


def _is_union(declared: Any) -> bool:
    return get_origin(declared) in (Union, types.UnionType)


def _is_record(declared: Any) -> bool:
    origin: Any = get_origin(declared) or declared
    return isinstance(cast("object", origin), type) and (
        attrs.has(origin) or dataclasses.is_dataclass(origin) or is_typeddict(origin)
    )


def fields_of(declared: Any) -> dict[str, Any] | None:
    """Gives the types of the fields of a class or a TypedDict by name; `None` for what has no fields."""
    if not _is_record(declared):
        return None
    return {name: field.declared for name, field in _fields(declared).items()}


def _fields(declared: Any) -> dict[str, _Field]:
    origin: Any = get_origin(declared) or declared
    hints = get_type_hints(origin)
    if is_typeddict(origin):
        return {name: _Field(declared=of, required=name in origin.__required_keys__) for name, of in hints.items()}
    if attrs.has(origin):
        own = attrs.fields(cast("Any", attrs.resolve_types(origin)))
        return {
            field.alias or field.name: _Field(
                declared=hints.get(field.name, Any), required=field.default is attrs.NOTHING
            )
            for field in own
            if field.init
        }
    return {
        field.name: _Field(
            declared=hints.get(field.name, Any),
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(origin)
        if field.init
    }
