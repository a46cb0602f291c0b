"""What can be stored besides plain JSON, and how: for each class, the tagged tree that is written and how it is read.

A tag is ``{"$": name, "v": body}``. The name of a builtin is a word of this module; that of a class is where it can be
imported, ``module:qualname``. Reading calls the builtins below, classes with fields, enums, and what was registered,
nothing else. But it imports the modules of classes, so a journal is to be kept as safe as what is on `sys.path`.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime as dt
import enum
import functools
import importlib
import io
import keyword
import operator
import pathlib
import pickle
import sys
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast, final
from zoneinfo import ZoneInfo

import attrs
import cattrs

from stageflow.errors import DefinitionError, in_words
from stageflow.frozen import FrozenDict, FrozenList

__all__ = [
    "TAGS",
    "TO_JSON",
    "UNSET",
    "Reading",
    "Undecodable",
    "Unstorable",
    "Writing",
    "class_of",
    "fields_of",
    "frozen_dict",
    "frozen_list",
    "read_hook_of",
    "register_journal_type",
    "shown",
    "step_to",
    "write_hook_of",
]

T = TypeVar("T")


@final
class _Unset:
    """What a field has that was never set."""

    def __repr__(self) -> str:
        return "nothing"


UNSET: Final = _Unset()


class _SomewhereInside(Exception):
    """Something about a part of a value.

    Attributes:
        steps: The way from the value to the part; the last step comes first, as it is found out.
        root: What the value is called.
        shown_steps: How many steps to show, if not all of them.
        why: What is the matter, in words.
    """

    def __init__(self, why: str, steps: Iterable[str] = (), *, root: str = "") -> None:
        super().__init__(why)
        self.why: str = why
        self.steps: list[str] = list(steps)
        self.root: str = root
        self.shown_steps: int | None = None

    @property
    def path(self) -> str:
        """Where, as one would write it: ``data.pages[3].title``."""
        return self.root + "".join(self.steps[::-1][: self.shown_steps])

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@final
class Unstorable(_SomewhereInside):
    """A value, or a part of it, that would not come back as it is."""


@final
class Undecodable(_SomewhereInside):
    """Something that was written, and cannot be read."""


class Writing(Protocol):
    """What a hook that writes can ask for."""

    def part(self, value: Any, step: str) -> Any:
        """Gives the tree of a part."""
        ...


class Reading(Protocol):
    """What a hook that reads can ask for."""

    def part(self, tree: Any, step: str) -> Any:
        """Gives the part that a tree stands for."""
        ...


WriteHook: TypeAlias = Callable[[Any, Writing], Any]
ReadHook: TypeAlias = Callable[[Any, Reading], Any]


def shown(value: Any) -> str:
    """Gives a value in a few characters, whatever its `repr` does."""
    try:
        text = repr(value)
    except Exception:  # it is the user's, or an int too long to be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}…"


def step_to(key: Any) -> str:
    """Gives the step from a mapping to what it has under a key: ``.title``, ``['odd key']``."""
    plain = type(key) is str and key.isidentifier() and not keyword.iskeyword(key)
    return f".{key}" if plain else f"[{shown(key)}]"


# What is read is filled by the methods of `dict` and `list`: `FrozenDict` would look for what is to be frozen in it,
# and here everything is.
_dict: Any = dict
_list: Any = list


def frozen_dict(items: Any) -> Any:
    """Gives a `FrozenDict` of what is frozen already."""
    frozen = _dict.__new__(FrozenDict)
    _dict.update(frozen, items)
    return frozen


def frozen_list(items: Iterable[Any]) -> Any:
    """Gives a `FrozenList` of what is frozen already."""
    frozen = _list.__new__(FrozenList)
    _list.extend(frozen, items)
    return frozen


# Names


def _name_of(kind: type) -> str:
    """Gives the tag of a class.

    Raises:
        Unstorable: It could not be found again under that name.
    """
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = class_of(name)
    except Undecodable:
        found = None
    if found is not kind:
        raise Unstorable(
            f"its class {kind.__qualname__} cannot be imported again as {name!r}; define it at the top of a module"
        )
    return name


def class_of(name: str) -> type:
    """Gives the class of a tag.

    Raises:
        Undecodable: There is none.
    """
    module_name, _, qualname = name.partition(":")
    if not qualname:
        raise Undecodable(f"the tag {name!r} is unknown; was this written by a later version of stageflow?")
    try:
        found = cast("Any", sys.modules.get(module_name) or importlib.import_module(module_name))
        for part in qualname.split("."):
            found = cast("Any", vars(found))[part]  # getattr may call what is written there
    except RecursionError:
        raise
    except Exception as error:  # importing runs the user's code
        raise Undecodable(
            f"its class {name!r} cannot be imported ({in_words(error)}); if it was moved or renamed, leave it there "
            f"under its old name too"
        ) from error
    if not isinstance(found, type) or f"{found.__module__}:{found.__qualname__}" != name:
        raise Undecodable(f"{name!r} is no class of that name")
    return found


# Classes with fields

_WITH_CONTENT: Final[tuple[Any, ...]] = (
    *(str, int, float, complex, bytes, bytearray, list, dict, set, frozenset, collections.deque, BaseException),
    *(dt.date, dt.time, dt.timedelta, dt.tzinfo, Decimal, Fraction, uuid.UUID, pathlib.PurePath),
)
"""What has more in it than fields, also where a class with fields derives from it."""


def fields_of(kind: Any) -> list[tuple[str, str | None]] | None:
    """Gives the fields of an attrs class, a dataclass or a named tuple; `None` for what has none.

    Returns:
        For each field its name, and what its class calls it when it is made, or `None` if it cannot be given.
    """
    if issubclass(kind, tuple):
        names: tuple[str, ...] | None = getattr(cast("object", kind), "_fields", None)
        return None if names is None else [(name, name) for name in names]
    if issubclass(kind, _WITH_CONTENT):
        return None  # there is more to them than their fields
    if attrs.has(kind):
        return [(field.name, (field.alias or field.name) if field.init else None) for field in attrs.fields(kind)]
    if dataclasses.is_dataclass(kind):
        return [(field.name, field.name if field.init else None) for field in dataclasses.fields(kind)]
    return None


def _record_writer(kind: type) -> WriteHook:
    name = _name_of(kind)
    fields = [(attribute, key) for attribute, key in fields_of(kind) or () if key]

    def write(value: Any, writing: Writing) -> Any:
        body = {key: writing.part(getattr(value, attribute, UNSET), f".{attribute}") for attribute, key in fields}
        return {"$": name, "v": body}

    return write


def _record_reader(kind: Any) -> ReadHook:
    known = {key: attribute for attribute, key in fields_of(kind) or () if key}

    def read(tree: Any, reading: Reading) -> Any:
        gone = [key for key in tree if key not in known]
        if gone:
            raise Undecodable(f"{kind.__qualname__} no longer has the field {gone[0]!r}")
        return kind(**{key: reading.part(part, f".{known[key]}") for key, part in tree.items()})

    return read


# Enums


def _has_fields(kind: Any) -> bool:
    return fields_of(kind) is not None


def _is_enum(kind: Any) -> bool:
    return issubclass(kind, enum.Enum)


def _enum_writer(kind: Any) -> WriteHook:
    name = _name_of(kind)

    def write(member: Any, writing: Writing) -> Any:
        if isinstance(member, enum.Flag):
            return {"$": name, "v": writing.part(member.value, ".value")}
        if kind.__members__.get(member.name) is not member:
            raise Unstorable(f"it is no member of {kind.__qualname__} that has a name")
        return {"$": name, "v": member.name}

    return write


def _enum_reader(kind: Any) -> ReadHook:
    if issubclass(kind, enum.Flag):
        return functools.partial(_read_flags, kind)

    def read(tree: Any, _: Reading) -> Any:
        if tree not in kind.__members__:
            raise Undecodable(f"{kind.__qualname__} no longer has the member {tree!r}")
        return kind.__members__[tree]

    return read


def _read_flags(kind: Any, tree: Any, reading: Reading) -> Any:
    value = reading.part(tree, ".value")
    found = kind(value)
    if found.value != value:  # Python 3.11.2, for one, drops the bits that it does not know
        raise ValueError(f"{value!r} is no combination of {kind.__qualname__}")
    return found


# Builtins


def _pairs(value: Any, writing: Writing) -> Any:
    return [[writing.part(key, f"{{{shown(key)}}}"), writing.part(item, step_to(key))] for key, item in value.items()]


def _read_pairs(tree: Any, reading: Reading) -> Any:
    keys = [reading.part(key, "{…}") for key, _ in tree]
    return frozen_dict([(key, reading.part(item, step_to(key))) for key, (_, item) in zip(keys, tree, strict=True)])


def _each(value: Any, writing: Writing) -> Any:
    return [writing.part(item, f"[{place}]") for place, item in enumerate(value)]


def _read_each(tree: Any, reading: Reading) -> Any:
    return [reading.part(part, f"[{place}]") for place, part in enumerate(tree)]


def _elements(value: Any, writing: Writing) -> Any:
    # Sorted, for the order of a set changes from process to process, and what is the same shall be written the same.
    return sorted([writing.part(item, f"{{{shown(item)}}}") for item in value], key=repr)


def _path(kind: Any) -> tuple[Any, str, WriteHook, ReadHook]:
    write: WriteHook = lambda value, writing: writing.part(str(value), "")  # noqa: E731
    return kind, kind.__name__, write, lambda tree, reading: kind(reading.part(tree, ""))


def _datetime(value: dt.datetime | dt.time, writing: Writing) -> Any:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, writing.part(value.tzinfo, ".tzinfo")]


def _read_datetime(kind: Any, tree: Any, reading: Reading) -> Any:
    text, fold, zone = tree
    return kind.fromisoformat(text).replace(fold=fold, tzinfo=reading.part(zone, ".tzinfo"))


def _timezone(value: dt.timezone, writing: Writing) -> Any:
    offset, name = value.utcoffset(None), value.tzname(None)
    named = [] if name == dt.timezone(offset).tzname(None) else [writing.part(name, "")]
    return [_timedelta(offset, writing), *named]


def _read_timezone(tree: Any, reading: Reading) -> Any:
    offset, *named = tree
    return dt.timezone(dt.timedelta(*offset), *(reading.part(name, "") for name in named))


def _timedelta(value: dt.timedelta, _: Writing) -> Any:
    return [value.days, value.seconds, value.microseconds]


def _zone(value: ZoneInfo, _: Writing) -> Any:
    try:
        value.__reduce__()  # it alone knows whether a zone was read from a file, which may say anything
    except pickle.PicklingError:
        raise Unstorable("it is a time zone without a name, or read from a file; use ZoneInfo(key)") from None
    return value.key


def _uuid(value: uuid.UUID, _: Writing) -> Any:
    return str(value) if value.is_safe is uuid.SafeUUID.unknown else [str(value), value.is_safe.value]


def _read_uuid(tree: Any, _: Reading) -> Any:
    text, safe = (tree, None) if isinstance(tree, str) else tree
    return uuid.UUID(text, is_safe=uuid.SafeUUID(safe))


_BUILTINS: Final[tuple[tuple[Any, str, WriteHook, ReadHook], ...]] = (
    # The first four are plain, unless JSON would lose something: then they come here.
    (
        str,
        "str",
        lambda s, _: s.encode("utf-8", "surrogatepass").hex(),
        lambda t, _: bytes.fromhex(t).decode("utf-8", "surrogatepass"),
    ),
    (int, "int", lambda i, _: hex(i), lambda t, _: int(t, 16)),
    (float, "float", lambda f, _: str(f), lambda t, _: float(t)),
    (dict, "dict", _pairs, _read_pairs),
    (tuple, "tuple", _each, lambda t, r: tuple(_read_each(t, r))),
    (frozenset, "set", _elements, lambda t, r: frozenset(r.part(part, "{…}") for part in t)),
    (bytes, "bytes", lambda b, _: base64.b64encode(b).decode(), lambda t, _: base64.b64decode(t, validate=True)),
    (complex, "complex", lambda c, w: _each((c.real, c.imag), w), lambda t, r: complex(*_read_each(t, r))),
    (Decimal, "decimal", lambda d, _: str(d), lambda t, _: Decimal(t)),
    (Fraction, "fraction", lambda f, w: _each(f.as_integer_ratio(), w), lambda t, r: Fraction(*_read_each(t, r))),
    (dt.datetime, "datetime", _datetime, functools.partial(_read_datetime, dt.datetime)),
    (dt.time, "time", _datetime, functools.partial(_read_datetime, dt.time)),
    (dt.date, "date", lambda d, _: d.isoformat(), lambda t, _: dt.date.fromisoformat(t)),
    (dt.timedelta, "timedelta", _timedelta, lambda t, _: dt.timedelta(*t)),
    (dt.timezone, "timezone", _timezone, _read_timezone),
    (ZoneInfo, "zone", _zone, lambda t, _: ZoneInfo(t)),
    (uuid.UUID, "uuid", _uuid, _read_uuid),
    *map(_path, (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)),
)

TAGS: Final[Mapping[str, Any]] = {tag: kind for kind, tag, _, _ in _BUILTINS}
"""The class of each tag that is a word of this module."""


def _tagged(tag: str, to_body: WriteHook) -> WriteHook:
    return lambda value, writing: {"$": tag, "v": to_body(value, writing)}


_WRITERS: Final[dict[Any, WriteHook]] = {kind: _tagged(tag, write) for kind, tag, write, _ in _BUILTINS}
_WRITERS[set] = _WRITERS[frozenset]
_READERS: Final[dict[Any, ReadHook]] = {kind: read for kind, _, _, read in _BUILTINS}
_READERS[set] = _READERS[frozenset]

_REFUSED: Final[tuple[tuple[Any, str], ...]] = (
    (_Unset, "it was never set; give the field a value"),
    (BaseException, "it is an exception; keep what matters of it, such as str(error)"),
    (type, "it is a class; keep its name"),
    (types.ModuleType, "it is a module; keep its name"),
    ((types.FunctionType, types.BuiltinFunctionType, types.MethodType), "it is a function; keep what it gives"),
    (io.IOBase, "it is an open file; keep its path, or what is in it"),
    (Iterator, "it can be read only once; make a list of it"),
    ((bytearray, memoryview), "it is a view of memory that may change; make bytes of it"),
    (dt.tzinfo, "it is a time zone of another library; use zoneinfo.ZoneInfo or datetime.timezone"),
)


def _refuse(value: Any, _: Writing) -> Any:
    for kinds, words in _REFUSED:
        if isinstance(value, kinds):
            raise Unstorable(words)
    kind = cast("Any", type(value))
    base = next((base.__name__ for base in kind.__mro__[1:] if base in _WRITERS or base is list), None)
    give = f"a plain {base}" if base else "a mapping, or an instance of an attrs class or a dataclass"
    raise Unstorable(
        f"it is an instance of {kind.__qualname__}; give {give}, or say with register_journal_type how it is stored"
    )


def _reader_refusing(kind: Any) -> ReadHook:
    def refuse(*_: Any) -> Any:
        raise Undecodable(
            f"{kind.__module__}:{kind.__qualname__} has no fields and is not registered; if register_journal_type was "
            f"called for it when this was written, call it again before it is read"
        )

    return refuse


# What decides on the hook of a class, and what makes it. The last one that admits a class is asked.
_Choice: TypeAlias = tuple[Callable[[Any], bool], Callable[[Any], WriteHook], Callable[[Any], ReadHook]]
_CHOICES: Final[list[_Choice]] = [
    (lambda _: True, lambda _: _refuse, _reader_refusing),
    (_has_fields, _record_writer, _record_reader),
    (_is_enum, _enum_writer, _enum_reader),
    (lambda kind: kind in _WRITERS, lambda kind: _WRITERS[kind], lambda kind: _READERS[kind]),
]


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    for choice in _CHOICES:
        _choose(converter, choice)
    return converter


def _choose(converter: cattrs.Converter, choice: _Choice) -> None:
    admits, make_writer, make_reader = choice
    converter.register_unstructure_hook_factory(admits, cast("Any", make_writer))
    converter.register_structure_hook_factory(admits, cast("Any", make_reader))


# cattrs has hooks of its own for these and all that derives from them, and asks those before any factory.
_PREEMPTED: Final = (str, bytes, int, float, pathlib.Path)


def write_hook_of(kind: Any) -> WriteHook:
    """Gives the hook that writes the instances of a class, or refuses them."""
    if issubclass(kind, _PREEMPTED):
        return next(make for admits, make, _ in reversed(_CHOICES) if admits(kind))(kind)
    writer: WriteHook = cast("Any", _converter().get_unstructure_hook(kind))
    return writer


def read_hook_of(kind: Any) -> ReadHook:
    """Gives the hook that reads the instances of a class, or says why it cannot."""
    if issubclass(kind, _PREEMPTED):
        return next(make for admits, _, make in reversed(_CHOICES) if admits(kind))(kind)
    reader: ReadHook = cast("Any", _converter().get_structure_hook(kind))
    return reader


TO_JSON: Final[dict[Any, Callable[[Any], Any]]] = {}
"""What was registered: for each class, what is stored of an instance."""


def register_journal_type(kind: type[T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> None:
    """Says how instances of a class are stored; without that, only those of classes with fields, and enums, are.

    It holds from then on, in the whole process; a process that resumes a run has to say the same before that. It is for
    the class itself, and not for what derives from it. Two instances count as the same if what is stored of them is.

    Args:
        kind: The class.
        to_json: A function that gives what is to be stored of an instance: anything that can be stored.
        from_json: A function that makes an instance of that. It is given dicts and lists frozen.

    Raises:
        DefinitionError: The class cannot be found again by its name, or is one that is stored as it is.

    Example::

        register_journal_type(OrderedDict, lambda value: list(value.items()), OrderedDict)
    """
    if kind in _WRITERS or kind in (bool, type(None), list, FrozenDict, FrozenList):
        raise DefinitionError(f"{kind.__qualname__} is stored as it is; register a class of your own")
    try:
        name = _name_of(kind)
    except Unstorable as error:
        raise DefinitionError(error.why.removeprefix("its ")) from None

    def write(value: Any, writing: Writing) -> Any:
        try:
            body = to_json(value)
        except Exception as error:
            raise Unstorable(f"what was registered to store it raised {in_words(error)}") from error
        return {"$": name, "v": writing.part(body, "")}

    def read(tree: Any, reading: Reading) -> Any:
        value = from_json(reading.part(tree, ""))
        if type(value) is not kind:
            raise Undecodable(f"what was registered to read {name} gave an instance of {type(value).__qualname__}")
        return value

    choice: _Choice = (functools.partial(operator.is_, kind), lambda _: write, lambda _: read)
    _choose(_converter(), choice)
    _CHOICES.append(choice)
    TO_JSON[kind] = to_json
