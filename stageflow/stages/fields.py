"""What a type consists of: the fields of a class or a TypedDict, with their types as one would write them there."""

from __future__ import annotations

import dataclasses
import inspect
from typing import (
    TYPE_CHECKING,
    Any,
    NotRequired,
    Required,
    TypeVar,
    cast,
    final,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import attrs

from stageflow.errors import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Field", "fields_of", "is_record", "origin_of", "parts_of", "plain"]


@final
@attrs.frozen(kw_only=True)
class Field:
    """A field.

    Attributes:
        name: What it is called in an instance.
        key: What it is called where an instance is made: in a mapping, or by its `__init__`.
        declared: Its type; of a generic class, with the arguments put in.
        required: Whether it has to be given.
        init: Whether it can be given.
    """

    name: str
    key: str
    declared: Any
    required: bool
    init: bool = True


def origin_of(declared: Any) -> Any:
    """Gives the class of which a type is made: ``list`` for ``list[int]``."""
    return get_origin(declared) or declared


def plain(declared: Any) -> Any:
    """Gives what a NewType or an annotated type stands for."""
    while True:
        if hasattr(declared, "__supertype__"):
            declared = declared.__supertype__
        elif hasattr(declared, "__metadata__"):
            declared = declared.__origin__
        else:
            return type(None) if declared is None else declared


def is_record(declared: Any) -> bool:
    """Whether it has fields: an attrs class, a dataclass or a TypedDict."""
    origin = origin_of(declared)
    return isinstance(origin, type) and (
        attrs.has(origin) or dataclasses.is_dataclass(origin) or is_typeddict(cast("object", origin))
    )


def fields_of(declared: Any) -> dict[str, Field] | None:
    """Gives the fields of a class or a TypedDict, by name; `None` for what has no fields.

    Raises:
        DefinitionError: An annotation names something that cannot be found.
    """
    if not is_record(declared):
        return None
    origin = origin_of(declared)
    try:
        fields = _read(origin)
    except NameError as error:
        raise DefinitionError(
            f"an annotation of {origin.__qualname__} names {error.name!r}, which cannot be found when the program "
            f"runs; import it outside of `if TYPE_CHECKING:`, or tell attrs where it is: "
            f"attrs.resolve_types({origin.__name__}, localns=locals())"
        ) from None
    if not (get_args(declared) or hasattr(origin, "__orig_bases__")):
        return fields
    return {
        name: attrs.evolve(field, declared=_filled(field.declared, _arguments(declared, _owner(origin, name))))
        for name, field in fields.items()
    }


def parts_of(declared: Any) -> list[Any]:
    """Gives the types that a type is made of, one level down."""
    fields = fields_of(declared)
    return (
        [field.declared for field in fields.values() if field.init] if fields is not None else list(get_args(declared))
    )


def _read(origin: Any) -> dict[str, Field]:
    if is_typeddict(origin):
        hints = get_type_hints(origin, include_extras=True)
        return {name: _item(origin, name, hint) for name, hint in hints.items()}
    if attrs.has(origin):
        return {
            field.name: Field(
                name=field.name,
                key=field.alias or field.name,
                declared=Any if field.type is None else field.type,
                required=field.init and field.default is attrs.NOTHING,
                init=field.init,
            )
            for field in attrs.fields(cast("Any", attrs.resolve_types(origin)))
        }
    hints = get_type_hints(origin, include_extras=True)
    return {
        field.name: Field(
            name=field.name,
            key=field.name,
            declared=hints.get(field.name, Any),
            required=field.init
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING,
            init=field.init,
        )
        for field in dataclasses.fields(origin)
    }


def _item(origin: Any, name: str, hint: Any) -> Field:
    """Gives an item of a TypedDict.

    It cannot tell itself what is required if annotations are strings, as after ``from __future__ import annotations``.
    """
    required = name in origin.__required_keys__
    while get_origin(hint) in (Required, NotRequired):
        required = get_origin(hint) is Required
        hint = get_args(hint)[0]
    return Field(name=name, key=name, declared=hint, required=required)


def _owner(origin: Any, name: str) -> Any:
    """Gives the class, among those that a class derives from, that has an annotation."""
    bases = _typeddict_bases(origin) if is_typeddict(origin) else origin.__mro__
    return next((base for base in bases if name in inspect.get_annotations(base)), origin)


def _typeddict_bases(origin: Any) -> list[Any]:
    # A TypedDict has the annotations of its bases among its own, so the one that knows nothing more is the owner.
    found = [origin]
    for base in getattr(origin, "__orig_bases__", ()):
        if is_typeddict(origin_of(base)):
            found = [*_typeddict_bases(origin_of(base)), *found]
    return found


def _arguments(declared: Any, owner: Any) -> Mapping[Any, Any]:
    """Gives what stands for the type variables of a class, as seen from a type that derives from it."""
    origin = origin_of(declared)
    own = dict(zip(getattr(origin, "__parameters__", ()), get_args(declared), strict=False))
    if origin is owner:
        return own
    for base in origin.__dict__.get("__orig_bases__", origin.__bases__):
        kind = origin_of(base)
        if kind is owner or (isinstance(kind, type) and owner in _above(kind)):
            return _arguments(_filled(base, own), owner)
    return {}


def _above(kind: Any) -> Any:
    return _typeddict_bases(kind) if is_typeddict(kind) else kind.__mro__


def _filled(declared: Any, arguments: Mapping[Any, Any]) -> Any:
    """Puts types in the place of type variables; anything in that of those that are left open."""
    if isinstance(declared, TypeVar):
        return arguments.get(declared, Any)
    parameters: tuple[Any, ...] = getattr(declared, "__parameters__", ())
    if not parameters or (isinstance(cast("object", declared), type) and get_origin(declared) is None):
        return declared
    return declared[tuple(arguments.get(parameter, Any) for parameter in parameters)]
