"""Contracts: the type that a value must have, and by path everything that is not as the type wants it.

cattrs checks values and structures mappings, with hooks that are strict: nothing is converted that is not the same
thing in another form. A mapping becomes the class that it describes; a list may stand for a tuple and a tuple for a
list, since JSON knows but one of them; a whole number may stand for a float. An instance of a declared class passes as
it is: it was checked when it was made.

This module is imported when the first contract is declared, for it brings cattrs along.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Literal, NoReturn, TypeAlias, Union, cast, final, get_args, get_origin, is_typeddict

import attrs
import cattrs
from cattrs.errors import ForbiddenExtraKeysError, IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, typeddicts

from stageflow.errors import ContractViolation, DefinitionError, Fault
from stageflow.stages.policy import spelled

__all__ = ["Contract"]

Hook: TypeAlias = Callable[[Any, Any], Any]
_SHOWN = 60  # characters of a value that is shown
_MOST = 20  # faults that a message lists


@final
class Contract:
    """The type that is declared for a value.

    Args:
        declared: A class, or anything else that can be an annotation.
        where: Where that was declared, for messages: ``"output= of stage 'parse' (file:12)"``.

    Raises:
        DefinitionError: It is no type, or none that can be checked.
    """

    __slots__ = ("_class", "_hook", "declared", "where")

    def __init__(self, declared: Any, where: str) -> None:
        self.declared = None if declared is type(None) else declared
        self.where = where
        # What is of just this class needs no further look.
        self._class: Any = declared if isinstance(declared, type) and _is_record(declared) else None
        try:
            self._hook: Hook = _converter().get_structure_hook(declared)
        except Exception as error:
            raise DefinitionError(f"{where} takes a type that values can be checked against: {error}") from error

    def check(self, value: Any, *, stage: str | None, root: str, giver: str | None = None) -> Any:
        """Gives a value as the contract wants it: the value itself, or what a mapping describes.

        Args:
            value: The value.
            stage: The stage to which it matters.
            root: What the value is called in the paths of faults.
            giver: Who gave it, in words, if it was not the stage.

        Raises:
            ContractViolation: It is not as the contract wants it; all faults are listed.
        """
        if type(value) is self._class:
            return value
        try:
            return self._hook(value, self.declared)
        except Exception as error:
            faults = _faults(error, root)
        lines = [f"\n  {fault}" for fault in faults[:_MOST]]
        if len(faults) > _MOST:
            lines.append(f"\n  and {len(faults) - _MOST} more")
        count = "is not" if len(faults) == 1 else f"is in {len(faults)} ways not"
        raise ContractViolation(
            f"{giver or f'what stage {stage!r} gave'} {count} what {self.where} declares, {spelled(self.declared)}; "
            f"change either:{''.join(lines)}",
            stage=stage,
            faults=tuple(faults),
        )


# What does not fit


class _Mismatch(TypeError):
    """A value that is not of the type it should have."""

    def __init__(self, value: Any, wanted: str) -> None:
        self.value = value
        self.wanted = wanted
        super().__init__(f"wanted {wanted}")


def _mismatch(value: Any, declared: Any) -> NoReturn:
    raise _Mismatch(value, spelled(declared))


def _faults(error: Exception, root: str) -> list[Fault]:
    """Reads the tree of errors that cattrs raises."""
    causes: list[tuple[BaseException, Any]] = []

    def remember(cause: BaseException, declared: Any) -> str:
        causes.append((cause, declared))
        return ""

    paths = cattrs.transform_error(error, root, remember)
    return [
        fault
        for path, (cause, declared) in zip(paths, causes, strict=True)
        for fault in _fault(path.removeprefix(" @ "), cause, declared)
    ]


def _fault(path: str, cause: BaseException, declared: Any) -> Iterable[Fault]:
    match cause:
        case _Mismatch():
            yield Fault(path=path, found=_shown(cause.value), wanted=cause.wanted)
        case ForbiddenExtraKeysError():
            for name in sorted(map(str, cause.extra_fields)):
                yield Fault(path=f"{path}.{name}", found="a field", wanted="no such field")
        case KeyError():
            wanted = "this field" if declared is None else spelled(declared)
            yield Fault(path=path, found="nothing", wanted=wanted)
        case _:  # what a validator of the class raised
            yield Fault(path=path, found=f"{type(cause).__name__}: {cause}", wanted="what its class accepts")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # it is the user's
        return f"an object that cannot be shown ({type(value).__name__})"
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return f"{text} ({type(value).__name__})"


# What fits


@functools.cache
def _converter() -> cattrs.Converter:
    """Gives the converter that is strict. Of its hooks, the last one that admits a type is asked."""
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    factories: list[tuple[Callable[[Any], bool], Callable[[Any], Hook]]] = [
        (_is_class, lambda _: _instance),
        (_is_record, lambda declared: _record_hook(converter, declared)),
        (is_typeddict, lambda declared: _typeddict_hook(converter, declared)),
        (_is_container, lambda declared: _container_hook(converter, declared)),
        (_is_enum, lambda _: _enum),
        (_is_none, lambda _: _none),
        (_is_anything, lambda _: _anything),
        (_is_literal, lambda _: _literal),
        (_is_union, lambda declared: _union_hook(converter, declared)),
    ]
    for admits, make in factories:
        converter.register_structure_hook_factory(admits, cast("Any", make))
    # cattrs asks what is registered for a class itself before all of these, and has such hooks for the builtins.
    for kind, hook in ((int, _int), (float, _float), (bool, _instance), (str, _instance), (bytes, _instance)):
        converter.register_structure_hook(kind, cast("Any", hook))
    return converter


def _origin(declared: Any) -> Any:
    return get_origin(declared) or declared


def _is_class(declared: Any) -> bool:
    return isinstance(declared, type)


def _is_container(declared: Any) -> bool:
    return _origin(declared) in _CONTAINERS


def _is_enum(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, enum.Enum)


def _is_none(declared: Any) -> bool:
    return declared is None or declared is type(None)


def _is_anything(declared: Any) -> bool:
    return declared is Any or declared is object


def _is_record(declared: Any) -> bool:
    origin = _origin(declared)
    return isinstance(origin, type) and (attrs.has(origin) or dataclasses.is_dataclass(origin))


def _is_literal(declared: Any) -> bool:
    return get_origin(declared) is Literal


def _is_union(declared: Any) -> bool:
    return get_origin(declared) in (Union, types.UnionType)


def _instance(value: Any, declared: Any) -> Any:
    return value if isinstance(value, declared) else _mismatch(value, declared)


def _anything(value: Any, _: Any) -> Any:
    return value


def _none(value: Any, _: Any) -> None:
    if value is not None:
        _mismatch(value, None)


def _int(value: Any, declared: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else _mismatch(value, declared)


def _float(value: Any, declared: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            exact = float(value)
        except OverflowError:
            _mismatch(value, declared)
        return exact if exact == value else _mismatch(value, declared)
    return value if isinstance(value, float) else _mismatch(value, declared)


def _literal(value: Any, declared: Any) -> Any:
    for option in get_args(declared):
        if type(option) is type(value) and option == value:
            return option
    return _mismatch(value, declared)


def _enum(value: Any, declared: Any) -> Any:
    if isinstance(value, declared):
        return value
    for member in cast("Iterable[enum.Enum]", declared):
        if type(member.value) is type(value) and member.value == value:
            return member
    raise _Mismatch(value, f"{declared.__name__} ({', '.join(repr(m.value) for m in declared)})")


def _record_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    """For attrs classes and dataclasses."""
    origin = _origin(declared)
    forbid = getattr(origin, "__extra_fields__", "forbid") != "ignore"
    make: Any = make_dict_structure_fn
    structure: Any = make(declared, converter, _cattrs_forbid_extra_keys=forbid)

    def hook(value: Any, _: Any) -> Any:
        if isinstance(value, origin):
            return value
        return structure(value, declared) if isinstance(value, Mapping) else _mismatch(value, declared)

    return hook


def _typeddict_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    gen: Any = typeddicts
    structure: Any = gen.make_dict_structure_fn(declared, converter)

    def hook(value: Any, _: Any) -> Any:
        return structure(value, declared) if isinstance(value, Mapping) else _mismatch(value, declared)

    return hook


_CONTAINERS: Final[Mapping[Any, tuple[tuple[type, ...], Any]]] = {
    list: ((list, tuple), list),
    Sequence: ((list, tuple), list),
    tuple: ((list, tuple), tuple),
    set: ((set, frozenset), set),
    frozenset: ((set, frozenset), frozenset),
    AbstractSet: ((set, frozenset), frozenset),
    dict: ((Mapping,), dict),
    Mapping: ((Mapping,), dict),
    MutableMapping: ((Mapping,), dict),
}
"""For each container: what may stand for it, and what is made of it."""


def _container_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    """For lists, tuples, sets and mappings, of anything."""
    origin, arguments = _origin(declared), get_args(declared)
    accepted, made_by = _CONTAINERS[origin]
    make: Any = made_by
    if make is dict:
        of_key, of_value = arguments or (Any, Any)

        def of_mapping(value: Any, _: Any) -> Any:
            if not _is_mapping(value):
                _mismatch(value, declared)
            mapping: Mapping[Any, Any] = value
            keys = _each(converter, mapping, [of_key] * len(mapping), declared, list(mapping))
            values = _each(converter, mapping.values(), [of_value] * len(mapping), declared, list(mapping))
            return dict(zip(keys, values, strict=True))

        return of_mapping
    fixed = (origin is tuple and arguments and arguments[-1] is not ...) or declared == tuple[()]
    element = arguments[0] if arguments and not fixed else Any

    def of_elements(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted):
            _mismatch(value, declared)
        elements = cast("Sequence[Any]", value)
        if fixed and len(elements) != len(arguments):
            _mismatch(value, declared)
        wanted = arguments if fixed else [element] * len(elements)
        return make(_each(converter, elements, wanted, declared, range(len(elements))))

    return of_elements


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
        except Exception as error:
            note_of: Any = IterableValidationNote
            note: Any = note_of(f"element {place!r}", place, of)
            error.__notes__ = [*getattr(error, "__notes__", []), note]
            errors.append(error)
    if errors:
        group: Any = IterableValidationError  # pyright has its own idea of how groups are made
        raise group(f"while checking {spelled(declared)}", errors, declared)
    return found


def _union_hook(converter: cattrs.Converter, declared: Any) -> Hook:
    """The first member that a value fits counts; for a single one besides `None`, the faults are those of that one."""
    members = get_args(declared)
    real = [member for member in members if member is not type(None)]

    def hook(value: Any, _: Any) -> Any:
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
            except Exception:  # then it is another one
                continue
        return _mismatch(value, declared)

    return hook
