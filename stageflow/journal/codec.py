"""How values are written into a journal, and read again: equal and of the same types, or refused when written.

Plain data goes the short way: if there are no types in it but those of JSON, then Python's own parser gives back what
was written, as one comparison shows. All else becomes a tree with tags, and what is read of that is compared, part by
part, with what was written. What is large is kept apart, by its content, so that what does not change is stored once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, cast, final

import attrs

from stageflow.errors import in_words
from stageflow.frozen import FrozenDict, FrozenList
from stageflow.journal.kinds import (
    TAGS,
    UNSET,
    Undecodable,
    Unstorable,
    class_of,
    frozen_dict,
    frozen_list,
    read_hook_of,
    register_journal_type,
    shown,
    step_to,
    write_hook_of,
)
from stageflow.journal.sameness import find_difference, same

__all__ = [
    "Encoded",
    "Undecodable",
    "Unstorable",
    "decode",
    "decode_tree",
    "encode",
    "reads_plainly",
    "register_journal_type",
    "same",
]

_LARGE_BYTES: Final = 1024
_DIGITS: Final = sys.int_info.default_max_str_digits
"""How many digits of an int Python will parse, unless somebody says otherwise."""
_SURE_DIGITS: Final = sys.int_info.str_digits_check_threshold
"""How many it will parse whatever somebody says."""
_LONG_NUMBER: Final = re.compile(f"[0-9]{{{_SURE_DIGITS}}}")
_LARGE_INT: Final = 2000
"""The most bits of an int that is parsed whatever somebody says. Among tags, larger ones are written in hex."""
_DEEPEST: Final = 100
"""How deep values may be nested: a few frames each, on the way there and back, are far from Python's limit."""

_LEAVES: Final = frozenset({str, int, float, bool, type(None)})
_type: Any = type  # the type of anything is unknown to a type checker
_STR: Final = frozenset({str})
_JOINING: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Surrogates that JSON would read as one character."""


@final
@attrs.frozen
class Encoded:
    """A value as it is stored.

    Attributes:
        text: JSON, in ASCII.
        blobs: The contents that the text refers to, by their SHA-256 in hex.
    """

    text: str
    blobs: Mapping[str, bytes]


_NO_BLOBS: Final[FrozenDict[str, bytes]] = FrozenDict()


def encode(value: Any, *, root: str = "data", threshold: int = 4096) -> Encoded:
    """Writes a value as JSON.

    Args:
        value: The value. Nothing in it may change meanwhile.
        root: What the value is called in the paths of refusals.
        threshold: The most characters that an item of the value, or a value that is no mapping, may have in the text;
            what is longer becomes a blob.

    Raises:
        Unstorable: It, or a part of it, would not come back as it is.
    """
    try:
        return _encoded_plain(value, threshold) or _encoded(value, threshold)
    except Unstorable as refusal:
        refusal.root = root
        raise
    except RecursionError:
        raise Unstorable("it is nested too deep to be written from here", root=root) from None


def decode(text: str, fetch: Callable[[str], bytes], *, root: str = "data") -> Any:
    """Reads what was written; dicts, lists and sets are frozen.

    Args:
        text: The text of what `encode` gave.
        fetch: A function that gives a blob by its key, or raises a `LookupError` or an `OSError`.
        root: What the value is called in the paths of errors.

    Raises:
        Undecodable: It cannot be read.
    """
    return _from_root(root, _Reader(fetch).read_text, text)


def reads_plainly(text: str) -> bool:
    """Whether what `encode` gave will be read whatever happens: it needs no class, no blob, and no large int.

    So there is no haste with reading it.
    """
    return (
        '"$"' not in text and "\\u0024" not in text and (len(text) < _SURE_DIGITS or _LONG_NUMBER.search(text) is None)
    )


def decode_tree(tree: Any, fetch: Callable[[str], bytes], *, root: str = "data") -> Any:
    """Reads what was written, and has been parsed since; see `decode`."""
    return _from_root(root, _Reader(fetch).read, tree)


def _from_root(root: str, read: Callable[[Any], Any], written: Any) -> Any:
    try:
        return read(written)
    except Undecodable as error:
        error.root = root
        raise
    except RecursionError:
        raise Undecodable("it is nested too deep to be read from here", root=root) from None


# The short way


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DUMPS: Final = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":")).encode
_WIDE: Final = json.JSONEncoder(check_circular=False, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_DECODER: Final = json.JSONDecoder(parse_constant=_not_json)


def _parsed(text: str) -> Any:
    tree, end = _DECODER.raw_decode(text)
    if end != len(text):
        raise ValueError(f"there is more after character {end}")
    return tree


def _encoded_plain(value: Any, threshold: int) -> Encoded | None:
    """Gives `None` for what has to go the long way."""
    if not _is_plain(value, _DEEPEST):
        return None
    try:
        text = _DUMPS(value)
        if _parsed(text) != value:  # there are surrogates that join
            return None
    except ValueError:  # NaN, an infinity, or an int too large to be parsed
        return None
    if len(text) > _DIGITS and sys.get_int_max_str_digits() != _DIGITS:
        return None  # an int may have been parsed that another process will not parse
    if len(text) <= threshold:
        return Encoded(text, _NO_BLOBS)
    blobs: dict[str, bytes] = {}
    return Encoded(_laid_out(value, text, threshold, _DUMPS, _WIDE, blobs), FrozenDict(blobs))


def _is_plain(value: Any, room: int) -> bool:
    kind = _type(value)
    if kind is dict or kind is FrozenDict:
        if not _STR.issuperset(map(type, value)) or "$" in value:
            return False
        parts = value.values()
    elif kind is list or kind is FrozenList:
        parts = value
    else:
        return kind in _LEAVES
    if not room:
        return False
    if not _LEAVES.issuperset(map(type, parts)):
        for part in parts:
            if type(part) not in _LEAVES and not _is_plain(part, room - 1):
                return False
    return True


def _frozen(tree: Any) -> Any:
    """Freezes what was parsed. It is faster than `freeze`, which has to reckon with circles."""
    kind = _type(tree)
    if kind is dict:
        for key, part in tree.items():
            if type(part) not in _LEAVES:
                tree[key] = _frozen(part)  # it was parsed for this, and is nobody else's
        return frozen_dict(tree)
    if kind is list:
        for number, part in enumerate(tree):
            if type(part) not in _LEAVES:
                tree[number] = _frozen(part)
        return frozen_list(tree)
    return tree


# The long way


def _encoded(value: Any, threshold: int) -> Encoded:
    tree = _Writer().write(value)
    blobs: dict[str, bytes] = {}

    def referred_to(content: bytes) -> Any:
        return {"$": "raw", "v": _kept(content, blobs)}

    dumps = json.JSONEncoder(check_circular=False, separators=(",", ":"), default=referred_to).encode
    wide = json.JSONEncoder(check_circular=False, ensure_ascii=False, separators=(",", ":"), default=referred_to).encode
    text = _laid_out(tree, dumps(tree), threshold, dumps, wide, blobs)
    try:
        again = _Reader(blobs.__getitem__).read(_parsed(text))
    except Undecodable as error:
        raise Unstorable(f"it could not be read again: {error.why}", error.steps) from error
    differs = find_difference(value, again)
    if differs is not None:
        raise Unstorable(
            f"it is {shown(differs.one)}, but would come back as {shown(differs.other)}; if its class changes "
            f"what it is given, or keeps what it is not given, say with register_journal_type how it is stored",
            differs.steps,
        )
    return Encoded(text, FrozenDict(blobs) if blobs else _NO_BLOBS)


def _kept(content: bytes, blobs: dict[str, bytes]) -> str:
    key = hashlib.sha256(content).hexdigest()
    blobs[key] = content
    return key


def _laid_out(
    tree: Any,
    text: str,
    threshold: int,
    dumps: Callable[[Any], str],
    wide: Callable[[Any], str],
    blobs: dict[str, bytes],
) -> str:
    """Gives a text in which what is too long is referred to."""
    if len(text) <= threshold:
        return text
    if not isinstance(tree, dict) or "$" in tree:
        return dumps({"$": "json", "v": _kept(_packed(tree, text, wide), blobs)})
    items = cast("Mapping[str, Any]", tree).items()
    parts = {key: dumps(part) for key, part in items}
    for key, part in items:
        if len(parts[key]) > threshold:
            parts[key] = dumps({"$": "json", "v": _kept(_packed(part, parts[key], wide), blobs)})
    return "{" + ",".join([f"{dumps(key)}:{part}" for key, part in parts.items()]) + "}"


def _packed(tree: Any, text: str, wide: Callable[[Any], str]) -> bytes:
    """Gives the content of a blob: UTF-8, which is a third of the size for most letters, if there is a need."""
    if "\\u" in text:
        try:
            return wide(tree).encode()
        except UnicodeEncodeError:  # there are lone surrogates
            pass
    return text.encode("ascii")


@final
class _Writer:
    """Makes trees of values. `bytes` in a tree are content that is kept apart."""

    __slots__ = ("_above",)

    def __init__(self) -> None:
        self._above: list[Any] = []  # what is being written, from the outside in

    def part(self, value: Any, step: str) -> Any:
        try:
            return self.write(value)
        except Unstorable as refusal:
            refusal.steps.append(step)
            raise

    def write(self, value: Any) -> Any:
        kind = _type(value)
        if kind is str:
            if value.isascii() or not _JOINING.search(value):
                return value
        elif kind is bool or value is None:
            return value
        elif kind is int:
            if value.bit_length() <= _LARGE_INT:
                return value
        elif kind is float:
            if math.isfinite(value):
                return value
        elif kind is bytes and len(value) > _LARGE_BYTES:
            return value
        self._above.append(value)
        if len(self._above) > _DEEPEST:
            self._too_deep()
        if kind is dict or kind is FrozenDict:
            tree = self._mapping(value)
        elif kind is list or kind is FrozenList:
            tree = self._elements(value)
        else:
            tree = write_hook_of(kind)(value, self)
        self._above.pop()
        return tree

    def _mapping(self, value: dict[Any, Any]) -> Any:
        if not _STR.issuperset(map(type, value)) or "$" in value or _JOINING.search("|".join(value)):
            return write_hook_of(dict)(value, self)
        tree: dict[str, Any] = {}
        key = ""
        try:
            for key, part in value.items():
                tree[key] = self.write(part)
        except Unstorable as refusal:
            refusal.steps.append(step_to(key))
            raise
        return tree

    def _elements(self, value: list[Any]) -> Any:
        tree: list[Any] = []
        write, add = self.write, tree.append
        try:
            for part in value:
                add(write(part))
        except Unstorable as refusal:
            refusal.steps.append(f"[{len(tree)}]")
            raise
        return tree

    def _too_deep(self) -> NoReturn:
        above = [id(value) for value in self._above]
        again = next((depth for depth, inner in enumerate(above) if inner in above[:depth]), None)
        if again is None:
            refusal = Unstorable(f"it is nested more than {_DEEPEST} deep; make it flat, or keep it in a file")
            refusal.shown_steps = 8
        else:
            refusal = Unstorable("it is also what it is in, and a circle cannot be written; refer to it by a name")
            refusal.shown_steps = again
        raise refusal


@final
class _Reader:
    """Makes values of trees."""

    __slots__ = ("_fetch",)

    def __init__(self, fetch: Callable[[str], bytes]) -> None:
        self._fetch = fetch

    def part(self, tree: Any, step: str) -> Any:
        try:
            return self.read(tree)
        except Undecodable as error:
            error.steps.append(step)
            raise

    def read_text(self, text: str) -> Any:
        try:
            tree = _parsed(text)
        except ValueError as error:
            raise Undecodable(f"it cannot be parsed: {in_words(error)}") from error
        return self.read(tree) if '"$"' in text or "\\u0024" in text else _frozen(tree)

    def read(self, tree: Any) -> Any:
        kind = _type(tree)
        if kind in _LEAVES:
            return tree
        if kind is dict:
            if "$" in tree:
                return self._tagged(tree)
            return frozen_dict(self._items(tree))
        if kind is list:
            return frozen_list(self._elements(tree))
        raise Undecodable(f"an instance of {kind.__qualname__} is no JSON")

    def _items(self, tree: dict[str, Any]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        key = ""
        try:
            for key, part in tree.items():
                items[key] = part if type(part) in _LEAVES else self.read(part)
        except Undecodable as error:
            error.steps.append(step_to(key))
            raise
        return items

    def _elements(self, tree: list[Any]) -> list[Any]:
        elements: list[Any] = []
        add = elements.append
        try:
            for part in tree:
                add(part if type(part) in _LEAVES else self.read(part))
        except Undecodable as error:
            error.steps.append(f"[{len(elements)}]")
            raise
        return elements

    def _tagged(self, tree: dict[str, Any]) -> Any:
        tag, body = tree["$"], tree.get("v", UNSET)
        if not isinstance(tag, str) or body is UNSET or len(tree) != 2:
            raise Undecodable(f"{shown(tree)} is no tag")
        if tag == "raw":
            return self._blob(body)
        if tag == "json":
            return self.read_text(self._blob(body).decode())
        kind = TAGS.get(tag) or class_of(tag)
        try:
            return read_hook_of(kind)(body, self)
        except (Undecodable, RecursionError):
            raise
        except Exception as error:  # a validator's, or that of what was registered; or the body is nonsense
            raise Undecodable(f"{shown(body)} cannot be read as {tag}: {in_words(error)}") from error

    def _blob(self, key: Any) -> bytes:
        if not isinstance(key, str):
            raise Undecodable(f"{shown(key)} is no key of a blob")
        try:
            content = self._fetch(key)
        except (LookupError, OSError) as error:
            raise Undecodable(f"its blob {key!r} cannot be fetched: {in_words(error)}") from error
        if hashlib.sha256(content).hexdigest() != key:
            raise Undecodable(f"its blob {key!r} is not what was stored under that key")
        return content
