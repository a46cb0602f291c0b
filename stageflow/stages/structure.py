"""How values are structured strictly: hooks of cattrs, which convert nothing that is not the same in another form."""

from __future__ import annotations

import collections
import enum
import functools
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from typing import (
    Any,
    Final,
    Literal,
    NoReturn,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    is_typeddict,
)

import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)

from stageflow.errors import DefinitionError, nearest
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.stages.fields import fields_of, is_record, origin_of
from stageflow.stages.policy import spelled

__all__ = [
    "NOTHING",
    "Hook",
    "Mismatch",
    "converter_of_contracts",
    "is_class_with_fields",
    "is_literal",
    "register_structure_hook",
]

T = TypeVar("T")
Hook: TypeAlias = Callable[[Any, Any], Any]


class Mismatch(TypeError):
    """A value that is not of the type it should have."""

    def __init__(self, value: Any, wanted: str) -> None:
        self.value = value
        self.wanted = wanted
        super().__init__(f"wanted {wanted}")


NOTHING: Final = object()


def mismatch(value: Any, declared: Any) -> NoReturn:
    raise Mismatch(value, spelled(declared))


def _noted(error: Exception, note: Any) -> Exception:
    """Gives an error that knows where it happened, as cattrs notes it."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]
    return error


def register_structure_hook(kind: type[T], hook: Callable[[Any, type[T]], T]) -> None:
    """Says how contracts shall make values of a class; without that, only its instances are accepted.

    It holds for every contract that is declared afterwards, in the whole process.

    Args:
        kind: The class.
        hook: A function of the value and the class, as cattrs has them. It gives an instance, or raises a `ValueError`
            or a `TypeError` that says what is wrong.

    Example::

        register_structure_hook(datetime, lambda value, _: datetime.fromisoformat(value))
    """

    def instance_or_made(value: Any, _: Any) -> Any:
        return value if isinstance(value, kind) else hook(value, kind)

    converter_of_contracts().register_structure_hook(kind, instance_or_made)


@functools.cache
def converter_of_contracts() -> cattrs.Converter:
    """Gives the converter that is strict. Of its hooks, the last one that admits a type is asked."""
    converter = cattrs.Converter()
    factories: list[tuple[Callable[[Any], bool], Callable[[Any], Hook]]] = [
        (_is_other_generic, _refused),
        (_is_class, _class_hook),
        (is_record, lambda declared: _record_hook(converter, declared)),
        (_is_container, lambda declared: _container_hook(converter, declared)),
        (_is_enum, lambda _: _enum),
        (_is_none, lambda _: _none),
        (_is_anything, lambda _: _anything),
        (is_literal, lambda _: _literal),
        (_is_union, lambda declared: _union_hook(converter, declared)),
    ]
    for admits, make in factories:
        converter.register_structure_hook_factory(admits, cast("Any", make))
    # cattrs asks what is registered for a class itself, or for a base of it, before all of these, and has such hooks.
    for kind, hook in ((int, _int), (float, _float), (str, _instance), (bytes, _instance), (pathlib.Path, _instance)):
        converter.register_structure_hook(kind, cast("Any", functools.partial(_builtin, kind, hook)))
    converter.register_structure_hook(bool, cast("Any", _instance))
    return converter


def _is_class(declared: Any) -> bool:
    return isinstance(declared, type)


def is_class_with_fields(declared: Any) -> bool:
    """Whether it is a class whose instances have fields."""
    return is_record(declared) and not is_typeddict(origin_of(declared))


def _is_other_generic(declared: Any) -> bool:
    return isinstance(get_origin(declared), type) and not hasattr(declared, "__metadata__")


def _is_container(declared: Any) -> bool:
    return origin_of(declared) in _CONTAINERS


def _is_enum(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, enum.Enum)


def _is_none(declared: Any) -> bool:
    return declared is None or declared is type(None)


def _is_anything(declared: Any) -> bool:
    return declared is Any or declared is object


def is_literal(declared: Any) -> bool:
    """Whether it is a `typing.Literal`."""
    return get_origin(declared) is Literal


def _is_union(declared: Any) -> bool:
    return get_origin(declared) in (Union, types.UnionType)


def _refused(declared: Any) -> NoReturn:
    raise StructureHandlerNotFoundError("", declared)


def _class_hook(declared: Any) -> Hook:
    try:
        isinstance(None, declared)
    except TypeError:  # a protocol that cannot be asked
        raise DefinitionError(
            f"{declared.__qualname__} cannot be asked what belongs to it; decorate it with @runtime_checkable"
        ) from None
    return _instance


def _builtin(kind: type, hook: Hook, value: Any, declared: Any) -> Any:
    """For a builtin, and for what derives from it."""
    if declared is kind:
        return hook(value, declared)
    return _enum(value, declared) if _is_enum(declared) else _instance(value, declared)


def _instance(value: Any, declared: Any) -> Any:
    return value if isinstance(value, declared) else mismatch(value, declared)


def _anything(value: Any, _: Any) -> Any:
    return value


def _none(value: Any, _: Any) -> None:
    if value is not None:
        mismatch(value, None)


def _int(value: Any, declared: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else mismatch(value, declared)


def _float(value: Any, declared: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            exact = float(value)
        except OverflowError:
            mismatch(value, declared)
        return exact if exact == value else mismatch(value, declared)
    return value if isinstance(value, float) else mismatch(value, declared)


def _literal(value: Any, declared: Any) -> Any:
    for option in get_args(declared):
        if type(option) is type(value) and option == value:
            return option
    return mismatch(value, declared)


def _enum(value: Any, declared: Any) -> Any:
    if isinstance(value, declared):
        return value
    for member in cast("Iterable[enum.Enum]", declared):
        if type(member.value) is type(value) and member.value == value:
            return member
    raise Mismatch(value, f"{declared.__name__} ({', '.join(repr(m.value) for m in declared)})")


def _record_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    """For attrs classes, dataclasses and TypedDicts."""
    origin = origin_of(declared)
    of_mapping = is_typeddict(origin)
    ignores = getattr(origin, "__extra_fields__", "forbid") == "ignore"
    fields = {field.key: field for field in (fields_of(declared) or {}).values() if field.init}

    def hook(value: Any, _: Any) -> Any:
        if not of_mapping and isinstance(value, origin):
            return value
        if not _is_mapping(value):
            mismatch(value, declared)
        found: dict[str, Any] = {}
        errors: list[Exception] = []
        for key, field in fields.items():
            try:
                if key in value:
                    found[key] = converter.get_structure_hook(field.declared)(value[key], field.declared)
                elif field.required:
                    mismatch(NOTHING, field.declared)
            except RecursionError:
                raise
            except Exception as error:
                errors.append(_noted(error, _note_of(AttributeValidationNote, key, field.declared)))
        for key in () if ignores else [key for key in value if key not in fields]:
            near = nearest(str(key), (name for name in fields if name not in value))
            wanted = f"no such field (did you mean {near[0]!r}?)" if near else "no such field"
            errors.append(_noted(Mismatch(value[key], wanted), _note_of(AttributeValidationNote, str(key), Any)))
        if not errors:
            if of_mapping:
                return found
            try:
                return origin(**found)
            except Exception as error:  # a validator's, which is the user's
                errors.append(error)
        raise _group(ClassValidationError, errors, declared)

    return hook


def _note_of(kind: Any, place: Any, declared: Any) -> Any:
    return kind(f"at {place!r}", place, declared)


def _group(kind: Any, errors: list[Exception], declared: Any) -> Exception:
    group: Exception = kind(f"while checking {spelled(declared)}", errors, declared)
    return group


_CONTAINERS: Final[Mapping[Any, tuple[tuple[type, ...], Any]]] = {
    list: ((list, tuple), list),
    Sequence: ((list, tuple), list),
    MutableSequence: ((list, tuple), list),
    FrozenList: ((list, tuple), FrozenList),
    collections.deque: ((collections.deque, list, tuple), collections.deque),
    tuple: ((list, tuple), tuple),
    set: ((set, frozenset), set),
    MutableSet: ((set, frozenset), set),
    frozenset: ((set, frozenset), frozenset),
    AbstractSet: ((set, frozenset), frozenset),
    dict: ((Mapping,), dict),
    Mapping: ((Mapping,), dict),
    MutableMapping: ((Mapping,), dict),
    FrozenDict: ((Mapping,), FrozenDict),
    collections.OrderedDict: ((Mapping,), collections.OrderedDict),
}
"""For each container: what may stand for it, and what is made of it."""


def _container_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    """For lists, tuples, sets and mappings, of anything.

    cattrs keeps hooks by type, and `list[A | B]` is equal to `list[B | A]`, where it matters which comes first. So what
    a hook is called with counts here, and not what it was made for.
    """
    origin = origin_of(declared)
    accepted, make = _CONTAINERS[origin]

    def of_mapping(value: Any, declared: Any) -> Any:
        if not _is_mapping(value):
            mismatch(value, declared)
        mapping: Mapping[Any, Any] = value
        of_key, of_value = get_args(declared) or (Any, Any)
        keys = _each(converter, mapping, [of_key] * len(mapping), declared, list(mapping))
        values = _each(converter, mapping.values(), [of_value] * len(mapping), declared, list(mapping))
        return _whole(make(zip(keys, values, strict=True)), mapping, declared)

    def of_elements(value: Any, declared: Any) -> Any:
        if not isinstance(value, accepted):
            mismatch(value, declared)
        elements, arguments = cast("Sequence[Any]", value), get_args(declared)
        if origin is tuple and (declared == tuple[()] or (arguments and arguments[-1] is not ...)):
            if len(elements) != len(arguments):
                mismatch(value, declared)
            wanted: Sequence[Any] = arguments
        else:
            wanted = [arguments[0] if arguments else Any] * len(elements)
        return _whole(make(_each(converter, elements, wanted, declared, range(len(elements)))), elements, declared)

    return of_mapping if accepted == (Mapping,) else of_elements


def _whole(made: Any, of: Any, declared: Any) -> Any:
    """Gives what was made of a container, unless two things in it have become one: ``{"red", Color.RED}``."""
    return made if len(made) == len(of) else mismatch(of, declared)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _each(
    converter: cattrs.Converter, values: Iterable[Any], wanted: Sequence[Any], declared: Any, places: Iterable[Any]
) -> list[Any]:
    """Checks the elements of a container; collects what is wrong with any of them."""
    found: list[Any] = []
    errors: list[Exception] = []
    for value, of, place in zip(values, wanted, places, strict=True):
        try:
            found.append(converter.get_structure_hook(of)(value, of))
        except RecursionError:
            raise
        except Exception as error:
            errors.append(_noted(error, _note_of(IterableValidationNote, place, of)))
    if errors:
        raise _group(IterableValidationError, errors, declared)
    return found


def _union_hook(converter: cattrs.Converter, _: Any) -> Hook:
    """The first member that a value fits counts; for a single one besides `None`, the faults are those of that one."""

    def hook(value: Any, declared: Any) -> Any:
        members = get_args(declared)
        real = [member for member in members if member is not type(None)]
        if value is None and len(real) < len(members):
            return None
        if len(real) == 1:
            return converter.get_structure_hook(real[0])(value, real[0])
        for member in real:
            if isinstance(member, type) and type(value) is member:
                return converter.get_structure_hook(member)(value, member)
        for member in real:
            try:
                return converter.get_structure_hook(member)(value, member)
            except RecursionError:
                raise
            except Exception:  # then it is another one
                continue
        return mismatch(value, declared)

    return hook
