"""Contracts: the type that a value must have, and by path everything that is not as the type wants it.

cattrs checks values and structures mappings, with hooks that are strict: nothing is converted that is not the same
thing in another form. A mapping becomes the class that it describes; a list may stand for a tuple and a tuple for a
list, since JSON knows but one of them; a whole number may stand for a float. An instance of a declared class passes as
it is: it was checked when it was made.

This module is imported when the first contract is declared, for it brings cattrs along.
"""

from __future__ import annotations

import collections
import difflib
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
    final,
    get_args,
    get_origin,
    is_typeddict,
)

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)

from stageflow.errors import ContractViolation, DefinitionError, Fault, in_words
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.stages.compatibility import weaknesses
from stageflow.stages.fields import fields_of, is_record, origin_of, parts_of
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
        self.declared: Any = None if declared is type(None) else declared
        self.where: str = where
        # What is of just this class needs no further look.
        self._class: Any = declared if isinstance(declared, type) and _is_class_with_fields(declared) else None
        try:
            _prove(declared, [])
        except StructureHandlerNotFoundError as error:
            raise DefinitionError(
                f"{where} takes a type that values can be checked against, and {_unusable(error.type_)}"
            ) from None
        except DefinitionError as error:
            raise DefinitionError(f"{where}: {error}") from None
        self._hook: Hook = _converter().get_structure_hook(declared)

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
        except RecursionError:
            deep = f"{type(value).__name__} that is nested too deep to be checked, or holds itself"
            faults = [Fault(path=root, found=f"a {deep}", wanted=spelled(self.declared))]
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


_NOTHING: Final = object()


def _mismatch(value: Any, declared: Any) -> NoReturn:
    raise _Mismatch(value, spelled(declared))


def _noted(error: Exception, note: Any) -> Exception:
    """Gives an error that knows where it happened, as cattrs notes it."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]
    return error


def _faults(error: Exception, root: str) -> list[Fault]:
    """Reads the tree of errors that was raised."""
    causes: list[BaseException] = []

    def remember(cause: BaseException, _: Any) -> str:
        causes.append(cause)
        return ""

    paths = cattrs.transform_error(error, root, remember)
    return [_fault(path.removeprefix(" @ "), cause) for path, cause in zip(paths, causes, strict=True)]


def _fault(path: str, cause: BaseException) -> Fault:
    if isinstance(cause, _Mismatch):
        found = "nothing" if cause.value is _NOTHING else _shown(cause.value)
        return Fault(path=path, found=found, wanted=cause.wanted)
    return Fault(path=path, found=_said(cause), wanted="what its class accepts")  # a validator of the class raised


def _said(cause: BaseException) -> str:
    """Gives in words what a validator raised; those of attrs raise more than that, which concerns nobody."""
    if cause.args and isinstance(cause.args[0], str) and any(isinstance(arg, attrs.Attribute) for arg in cause.args):
        return f"{type(cause).__name__}: {cause.args[0]}"
    return in_words(cause)


def _unusable(declared: Any) -> str:
    if isinstance(declared, str):
        return f"{declared!r} is a string: give the type itself"
    if isinstance(declared, TypeVar):
        return f"{declared.__name__} is a type variable: say what it stands for"
    return f"{spelled(declared)} is none"


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
    converter = cattrs.Converter()
    factories: list[tuple[Callable[[Any], bool], Callable[[Any], Hook]]] = [
        (_is_other_generic, _refused),
        (_is_class, _class_hook),
        (is_record, lambda declared: _record_hook(converter, declared)),
        (_is_container, lambda declared: _container_hook(converter, declared)),
        (_is_enum, lambda _: _enum),
        (_is_none, lambda _: _none),
        (_is_anything, lambda _: _anything),
        (_is_literal, lambda _: _literal),
        (_is_union, lambda declared: _union_hook(converter, declared)),
    ]
    for admits, make in factories:
        converter.register_structure_hook_factory(admits, cast("Any", make))
    # cattrs asks what is registered for a class itself, or for a base of it, before all of these, and has such hooks.
    for kind, hook in ((int, _int), (float, _float), (str, _instance), (bytes, _instance), (pathlib.Path, _instance)):
        converter.register_structure_hook(kind, cast("Any", functools.partial(_builtin, kind, hook)))
    converter.register_structure_hook(bool, cast("Any", _instance))
    return converter


def _prove(declared: Any, seen: list[Any]) -> None:
    """Sees whether values can be checked against a type, and all that it is made of."""
    if declared in seen:
        return
    seen.append(declared)
    _converter().get_structure_hook(declared)
    for weakness in weaknesses(declared):
        raise DefinitionError(f"{weakness}; narrow it, or derive from something else")
    if not _is_literal(declared):
        for part in parts_of(getattr(declared, "__supertype__", declared)):
            if part is not ... and not _is_note(declared, part):
                _prove(part, seen)


def _is_note(declared: Any, part: Any) -> bool:
    """Whether it is what an annotated type says besides the type."""
    return hasattr(declared, "__metadata__") and part is not get_args(declared)[0]


def _is_class(declared: Any) -> bool:
    return isinstance(declared, type)


def _is_class_with_fields(declared: Any) -> bool:
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


def _is_literal(declared: Any) -> bool:
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
    """For attrs classes, dataclasses and TypedDicts."""
    origin = origin_of(declared)
    of_mapping = is_typeddict(origin)
    ignores = getattr(origin, "__extra_fields__", "forbid") == "ignore"
    fields = {field.key: field for field in (fields_of(declared) or {}).values() if field.init}

    def hook(value: Any, _: Any) -> Any:
        if not of_mapping and isinstance(value, origin):
            return value
        if not _is_mapping(value):
            _mismatch(value, declared)
        found: dict[str, Any] = {}
        errors: list[Exception] = []
        for key, field in fields.items():
            try:
                if key in value:
                    found[key] = converter.get_structure_hook(field.declared)(value[key], field.declared)
                elif field.required:
                    _mismatch(_NOTHING, field.declared)
            except RecursionError:
                raise
            except Exception as error:
                errors.append(_noted(error, _note_of(AttributeValidationNote, key, field.declared)))
        for key in () if ignores else [key for key in value if key not in fields]:
            near = difflib.get_close_matches(str(key), [name for name in fields if name not in value], n=1)
            wanted = f"no such field (did you mean {near[0]!r}?)" if near else "no such field"
            errors.append(_noted(_Mismatch(value[key], wanted), _note_of(AttributeValidationNote, str(key), Any)))
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
            _mismatch(value, declared)
        mapping: Mapping[Any, Any] = value
        of_key, of_value = get_args(declared) or (Any, Any)
        keys = _each(converter, mapping, [of_key] * len(mapping), declared, list(mapping))
        values = _each(converter, mapping.values(), [of_value] * len(mapping), declared, list(mapping))
        return _whole(make(zip(keys, values, strict=True)), mapping, declared)

    def of_elements(value: Any, declared: Any) -> Any:
        if not isinstance(value, accepted):
            _mismatch(value, declared)
        elements, arguments = cast("Sequence[Any]", value), get_args(declared)
        if origin is tuple and (declared == tuple[()] or (arguments and arguments[-1] is not ...)):
            if len(elements) != len(arguments):
                _mismatch(value, declared)
            wanted: Sequence[Any] = arguments
        else:
            wanted = [arguments[0] if arguments else Any] * len(elements)
        return _whole(make(_each(converter, elements, wanted, declared, range(len(elements)))), elements, declared)

    return of_mapping if accepted == (Mapping,) else of_elements


def _whole(made: Any, of: Any, declared: Any) -> Any:
    """Gives what was made of a container, unless two things in it have become one: ``{"red", Color.RED}``."""
    return made if len(made) == len(of) else _mismatch(of, declared)


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
        return _mismatch(value, declared)

    return hook
