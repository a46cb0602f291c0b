"""What is frozen reads like the original, and cannot be changed."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow import FrozenDict, FrozenList
from stageflow.frozen import freeze

if TYPE_CHECKING:
    from collections.abc import Callable

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=3)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
ORDERED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LEAVES, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=20,
)
PLAIN = ORDERED | st.lists(st.sets(LEAVES, max_size=3) | ORDERED, max_size=3) | st.sets(LEAVES, max_size=3)


def assert_frozen(value: Any) -> None:
    """That there is nothing in it that could be changed."""
    assert type(value) not in (dict, list, set)
    if issubclass(type(value), dict):
        value = tuple(value.values())
    if issubclass(type(value), (list, tuple)):
        for item in value:
            assert_frozen(item)


# Laws


def law(values: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Checks a claim on many values; how long that takes is of no account."""
    return lambda claim: settings(deadline=None)(given(values)(claim))


@law(PLAIN)
def test_what_is_frozen_equals_the_original_and_is_frozen_all_through(value: Any) -> None:
    frozen = freeze(value)
    assert frozen == value
    assert value == frozen
    assert_frozen(frozen)


@law(PLAIN)
def test_freezing_again_costs_nothing(value: Any) -> None:
    frozen = freeze(value)
    assert freeze(frozen) is frozen


@law(ORDERED)
def test_it_prints_like_the_original_and_the_original_stays_as_it_was(value: Any) -> None:
    before = repr(value)
    frozen = freeze(value)
    assert repr(frozen) == before
    assert repr(value) == before
    assert not isinstance(value, (FrozenDict, FrozenList))


@law(JSON)
def test_json_encodes_it_like_the_original(value: Any) -> None:
    assert json.dumps(freeze(value)) == json.dumps(value)
    assert json.dumps(freeze(value), indent=2, sort_keys=True) == json.dumps(value, indent=2, sort_keys=True)


COPIES: list[Callable[[Any], Any]] = [
    *(
        lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ),
    copy.copy,
    copy.deepcopy,
]


@law(PLAIN)
def test_it_survives_pickle_and_copy_frozen(value: Any) -> None:
    frozen = freeze(value)
    for how in COPIES:
        twin = how(frozen)
        assert twin == frozen
        assert type(twin) is type(frozen)
        assert_frozen(twin)


@law(st.dictionaries(st.text(max_size=3), PLAIN, max_size=4))
def test_the_constructors_freeze_as_well(value: dict[str, Any]) -> None:
    made: list[FrozenDict[str, Any]] = [FrozenDict(value), FrozenDict(value.items()), FrozenDict(**value)]
    for frozen in made:
        assert type(frozen) is FrozenDict
        assert frozen == value
        assert_frozen(frozen)
    values = list(value.values())
    listed: FrozenList[Any] = FrozenList(values)
    assert type(listed) is FrozenList
    assert listed == values
    assert_frozen(listed)


# Writing

MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "dict[...] =": lambda d: d.__setitem__("a", 1),
    "del dict[...]": lambda d: d.__delitem__("a"),
    "dict |=": lambda d: d.__ior__({"a": 1}),
    "dict.clear": lambda d: d.clear(),
    "dict.pop": lambda d: d.pop("a"),
    "dict.pop missing": lambda d: d.pop("zzz", None),
    "dict.popitem": lambda d: d.popitem(),
    "dict.setdefault": lambda d: d.setdefault("b", 1),
    "dict.update": lambda d: d.update(a=1),
    "list[...] =": lambda d: d["a"].__setitem__(0, 1),
    "list[:] =": lambda d: d["a"].__setitem__(slice(None), []),
    "del list[...]": lambda d: d["a"].__delitem__(0),
    "list +=": lambda d: d["a"].__iadd__([1]),
    "list *=": lambda d: d["a"].__imul__(2),
    "list.append": lambda d: d["a"].append(1),
    "list.extend": lambda d: d["a"].extend([1]),
    "list.insert": lambda d: d["a"].insert(0, 1),
    "list.pop": lambda d: d["a"].pop(),
    "list.remove": lambda d: d["a"].remove(3),
    "list.clear": lambda d: d["a"].clear(),
    "list.sort": lambda d: d["a"].sort(),
    "list.reverse": lambda d: d["a"].reverse(),
}


def test_every_method_that_writes_is_listed() -> None:
    reading = {"copy", "fromkeys", "get", "items", "keys", "values", "count", "index"}
    for builtin in (dict, list):
        methods = {name for name in vars(builtin) if not name.startswith("__")} - reading
        listed = {name.split(".")[1].split()[0] for name in MUTATIONS if name.startswith(f"{builtin.__name__}.")}
        assert listed == methods


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_write_is_refused_and_changes_nothing(mutation: str) -> None:
    frozen = freeze({"a": [3, 1, 2]})
    kind = mutation.removeprefix("del ")[:4]
    with pytest.raises(TypeError, match=f"this {kind} is immutable.*make a copy with {kind}"):
        MUTATIONS[mutation](frozen)
    assert frozen == {"a": [3, 1, 2]}


def test_there_are_no_attributes_to_write_either() -> None:
    things: list[Any] = [freeze({}), freeze([])]
    for frozen in things:
        with pytest.raises(AttributeError):
            frozen.x = 1


def test_a_changed_version_is_made_of_a_plain_copy() -> None:
    frozen = freeze({"a": [1]})
    plain: Any
    for plain in (dict(frozen), frozen | {"b": 2}, frozen.copy(), {**frozen}):
        assert type(plain) is dict
        plain["b"] = 2
        assert plain == {"a": [1], "b": 2}
    values = frozen["a"]
    copies: list[Any] = [list(values), values.__add__([]), values[:], values.copy(), [*values]]
    for plain in copies:
        assert not isinstance(plain, FrozenList)
        plain.append(2)
        assert plain == [1, 2]


# What passes by reference


class Point(NamedTuple):
    x: Any
    y: Any


class Thing:
    pass


REFERRED: list[Any] = [
    Thing(),
    Point([1], 2),
    OrderedDict(a=[1]),
    bytearray(b"x"),
    range(3),
    frozenset({1}),
    (1, ("x",)),
]


@pytest.mark.parametrize("value", REFERRED, ids=lambda value: type(value).__name__)
def test_everything_else_passes_by_reference(value: Any) -> None:
    assert freeze(value) is value
    assert freeze([value])[0] is value
    assert FrozenDict[str, Any](a=value)["a"] is value


# Shape


def test_what_is_shared_stays_shared() -> None:
    shared = [1, {"x": 1}]
    frozen = freeze({"a": shared, "b": [shared], "c": (shared,)})
    assert frozen["a"] is frozen["b"][0] is frozen["c"][0]
    both = FrozenDict[str, Any](a=shared, b=shared)
    assert both["a"] is both["b"]


def circles() -> dict[str, Any]:
    d: dict[str, Any] = {}
    d["me"] = d
    x: list[Any] = [1]
    x.append(x)
    d["list"] = x
    d["both"] = [{"up": d}]
    return d


def test_a_circle_stays_a_circle() -> None:
    frozen = freeze(circles())
    assert frozen["me"] is frozen
    assert frozen["list"][1] is frozen["list"]
    assert frozen["both"][0]["up"] is frozen
    assert repr(frozen) == repr(circles())
    assert type(frozen["both"][0]) is FrozenDict


@pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy])
def test_a_circle_can_be_copied_as_that_of_plain_data_can(how: Callable[[Any], Any]) -> None:
    how(circles())
    twin = how(freeze(circles()))
    twin = pickle.loads(twin) if isinstance(twin, bytes) else twin
    assert type(twin) is FrozenDict
    assert twin["me"] is twin
    assert twin["list"][1] is twin["list"]
    assert twin["both"][0]["up"] is twin


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "dicts": lambda inner: {"in": inner},
    "lists": lambda inner: [inner],
    "tuples in lists": lambda inner: [(inner,)],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_depth_is_limited_by_memory_only(wrap: Callable[[Any], Any]) -> None:
    value: Any = ["bottom"]
    for _ in range(100_000):
        value = wrap(value)
    frozen: Any = freeze(value)
    depth = 0
    while frozen != ["bottom"]:
        assert type(frozen) in (FrozenDict, FrozenList, tuple)
        frozen = frozen["in" if isinstance(frozen, dict) else 0]
        depth += 1
    assert depth >= 100_000
