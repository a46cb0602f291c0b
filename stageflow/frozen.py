"""Deep immutability for plain data: `FrozenDict`, `FrozenList`, and `freeze`, which makes them.

They are subclasses of the builtins, so that whatever reads a `dict` or a `list` (``==``, ``json.dumps``, ``**``,
pattern matching, a C extension) reads them at the same speed. The price is that ``dict.__setitem__(frozen, …)`` gets
around
them: a lock against mistakes, not against intent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast, final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["FrozenDict", "FrozenList", "freeze"]

K = TypeVar("K")
V = TypeVar("V")

_plain_dict: Any = dict
_plain_list: Any = list
_LEAVES = frozenset({str, int, float, bool, type(None), bytes, complex})


def _refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
    kind, thaw = ("dict", "dict(...)") if isinstance(self, dict) else ("list", "list(...)")
    raise TypeError(
        f"this {kind} is immutable: inputs, outputs and run data are shared between stages; "
        f"make a copy with {thaw} and change that"
    )


@final
class FrozenDict(dict[K, V], Generic[K, V]):
    """A dict that cannot be changed, with everything inside it frozen as well.

    Reads, compares, prints, pickles and JSON-encodes like the dict it was made of. ``|`` and `copy` give a plain dict.
    """

    __slots__ = ()

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = (), /, **more: V) -> None:
        super().__init__(items, **more)
        if not _LEAVES.issuperset(map(type, self.values())):
            _fill_all({}, [(self, dict(self))])

    __setitem__: Any = _refuse
    __delitem__: Any = _refuse
    __ior__: Any = _refuse
    clear: Any = _refuse
    pop: Any = _refuse
    popitem: Any = _refuse
    setdefault: Any = _refuse
    update: Any = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (), dict(self)

    def __setstate__(self, state: dict[K, V]) -> None:
        # Unpickling and copying fill a circle after it was made; nobody else may.
        if self:
            _refuse(self)
        super().update(state)

    def __copy__(self) -> FrozenDict[K, V]:
        return self


@final
class FrozenList(list[V], Generic[V]):
    """A list that cannot be changed, with everything inside it frozen as well.

    Reads, compares, prints, pickles and JSON-encodes like the list it was made of. Slices, ``+`` and `copy` give a
    plain list.
    """

    __slots__ = ()

    def __init__(self, items: Iterable[V] = (), /) -> None:
        super().__init__(items)
        if not _LEAVES.issuperset(map(type, self)):
            _fill_all({}, [(self, list(self))])

    __setitem__: Any = _refuse
    __delitem__: Any = _refuse
    __iadd__: Any = _refuse
    __imul__: Any = _refuse
    append: Any = _refuse
    extend: Any = _refuse
    insert: Any = _refuse
    pop: Any = _refuse
    remove: Any = _refuse
    clear: Any = _refuse
    sort: Any = _refuse
    reverse: Any = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (), list(self)

    def __setstate__(self, state: list[V]) -> None:
        if self:
            _refuse(self)
        super().extend(state)

    def __copy__(self) -> FrozenList[V]:
        return self


def freeze(value: Any) -> Any:
    """Gives an immutable equal of plain data; anything else comes back as it is.

    `dict` becomes `FrozenDict`, `list` becomes `FrozenList`, `set` becomes `frozenset`, and a tuple that holds any of
    them is rebuilt. Subclasses of these (`OrderedDict`, named tuples) and all other objects pass by reference. What is
    frozen already costs nothing. Depth is limited by memory only (directly nested tuples aside), and structure that is
    shared or circular stays so.
    """
    kind = cast("Any", type(value))
    if kind is FrozenDict or kind in _LEAVES:
        return value
    memo: dict[int, Any] = {}
    pending: _Pending = []
    frozen = _shell(value, memo, pending)
    _fill_all(memo, pending)
    return frozen


# Freezing works from the top down: every container gets an empty frozen shell, which is put in its place at once and
# filled later, from a list of pending work. So neither depth nor a circle needs the interpreter's stack.

_Pending = list[tuple[Any, Any]]  # (shell, what it is to hold)


def _shell(value: Any, memo: dict[int, Any], pending: _Pending) -> Any:
    kind = cast("Any", type(value))
    if kind is dict or kind is list:
        shell: Any = memo.get(id(value))
        if shell is None:
            cls: Any = FrozenDict if kind is dict else FrozenList
            shell = memo[id(value)] = cls.__new__(cls)  # empty, for less than calling it
            pending.append((shell, value))
        return shell
    if kind is set:
        return frozenset(value)
    if kind is tuple:
        parts = tuple([_shell(part, memo, pending) for part in value])
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    return value


def _fill_all(memo: dict[int, Any], pending: _Pending) -> None:
    while pending:
        shell, source = pending.pop()
        if type(shell) is FrozenDict:
            _plain_dict.update(shell, source)
            if not _LEAVES.issuperset(map(type, source.values())):
                for key, value in source.items():
                    if type(value) not in _LEAVES:
                        _plain_dict.__setitem__(shell, key, _shell(value, memo, pending))
        else:
            flat = _LEAVES.issuperset(map(type, source))
            parts = source if flat else [_shell(value, memo, pending) for value in source]
            _plain_list.__setitem__(shell, slice(None), parts)
