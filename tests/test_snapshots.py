"""Snapshots are immutable versions; a delta between two of them is exact, and as small as the change."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow import Change, ContextSnapshot, Delta, FrozenDict, FrozenList
from stageflow.frozen import freeze

if TYPE_CHECKING:
    from collections.abc import Callable

DEEP = 30_000


def told(value: Any) -> Any:
    """What a value is, with its types; two values that are told alike are the same in type too."""
    kind = cast("Any", type(value))
    if issubclass(kind, dict):
        return kind, frozenset((told(key), told(inner)) for key, inner in value.items())
    if issubclass(kind, (list, tuple)):
        return kind, tuple(map(told, value))
    if issubclass(kind, frozenset):
        return kind, frozenset(map(told, value))
    return kind, repr(value)


def messages(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"message {each}", "meta": {"tokens": [each, 1]}} for each in range(number)]


def itself(value: Any) -> Any:
    return value


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def copied(value: Any) -> Any:
    """The same again, sharing nothing; as it comes out of a file."""
    return json.loads(json.dumps(value))


def delta_of(old: Any, new: Any) -> Delta:
    """The delta from one value to another, which is checked to be exact."""
    before, after = ContextSnapshot({"it": old}), ContextSnapshot({"it": new})
    delta = after.diff(before)
    following = before.apply(delta)
    assert following == after
    assert told(following["it"]) == told(after["it"])
    return delta


# Versions


def test_a_new_snapshot_is_version_zero_of_its_own() -> None:
    snapshot = ContextSnapshot({"a": 1})
    assert (snapshot.version, snapshot.parent, dict(snapshot)) == (0, None, {"a": 1})
    assert dict(ContextSnapshot()) == {}


def test_evolving_sets_values_and_leaves_the_version_before_as_it_was() -> None:
    first = ContextSnapshot({"a": [1], "b": 2})
    second = first.evolve(b=[3], c={"d": 4})
    assert (dict(first), first.version) == ({"a": [1], "b": 2}, 0)
    assert (dict(second), second.version) == ({"a": [1], "b": [3], "c": {"d": 4}}, 1)
    assert second.parent is first
    assert second["a"] is first["a"]
    assert type(second["b"]) is FrozenList
    assert type(second["c"]) is FrozenDict


def test_any_name_can_be_evolved() -> None:
    assert dict(ContextSnapshot().evolve(self=1, version=2, parent=3, changes=4)) == {
        "self": 1,
        "version": 2,
        "parent": 3,
        "changes": 4,
    }


def test_a_snapshot_cannot_be_changed_through_what_it_was_made_of() -> None:
    given_values: dict[str, Any] = {"a": [1]}
    added = [2]
    snapshot = ContextSnapshot(given_values).evolve(b=added)
    given_values["a"].append(9)
    given_values["c"] = 9
    added.append(9)
    assert dict(snapshot) == {"a": [1], "b": [2]}


@pytest.mark.parametrize("name", ["version", "parent", "_values", "other"])
def test_a_snapshot_has_no_attribute_to_write(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(ContextSnapshot({"a": 1}), name, 1)


def test_snapshots_are_equal_if_their_values_are_whatever_lies_behind_them() -> None:
    first = ContextSnapshot({"a": [1]})
    second = first.evolve(a=[2]).evolve(a=[1])
    assert first == second == {"a": [1]} == first
    assert first != first.evolve(a=[2])
    with pytest.raises(TypeError, match="unhashable"):
        hash(first)


def test_rolling_back_gives_the_version_itself() -> None:
    versions = [ContextSnapshot({"n": 0})]
    for number in range(1, 10):
        versions.append(versions[-1].evolve(n=number))
    for number, version in enumerate(versions):
        assert versions[-1].rollback(number) is version
    assert versions[4].rollback(4) is versions[4]
    other = versions[-1].rollback(4).evolve(n="other")
    assert (other.version, other.parent, other["n"]) == (5, versions[4], "other")
    assert other.rollback(0) is versions[0]


@pytest.mark.parametrize("version", [-1, 3, 100])
def test_rolling_back_to_what_is_not_before_it_says_so(version: int) -> None:
    snapshot = ContextSnapshot().evolve(a=1).evolve(a=2)
    with pytest.raises(ValueError, match=f"no version {version} before this one, which is version 2"):
        snapshot.rollback(version)


def test_a_snapshot_forgets_its_past_and_nothing_else() -> None:
    first = ContextSnapshot({"a": [1]})
    second = first.evolve(b=2)
    alone = second.forget()
    assert (alone, alone.version, alone.parent) == (second, 1, None)
    assert alone["a"] is first["a"]
    assert second.parent is first
    assert alone.evolve(c=3).version == 2
    with pytest.raises(ValueError, match="no version 0"):
        alone.rollback(0)


def test_the_past_may_be_as_long_as_memory_allows() -> None:
    snapshot = ContextSnapshot({"kept": [1]})
    first = snapshot
    for number in range(DEEP):
        snapshot = snapshot.evolve(n=number)
    assert snapshot.rollback(0) is first
    assert repr(snapshot) == f"ContextSnapshot(_values={{'kept': [1], 'n': {DEEP - 1}}}, version={DEEP})"
    del snapshot


@pytest.mark.parametrize("how", [pickled, copy.copy, copy.deepcopy])
def test_a_snapshot_survives_pickle_and_copy_with_all_its_past(how: Callable[[Any], Any]) -> None:
    snapshot = ContextSnapshot({"kept": [[1]]})
    for number in range(2_000):
        snapshot = snapshot.evolve(n=number)
    twin = how(snapshot)
    assert (twin, twin.version) == (snapshot, 2_000)
    assert type(twin["kept"]) is FrozenList
    assert twin.rollback(0) == {"kept": [[1]]}
    assert twin.rollback(1_000) == {"kept": [[1]], "n": 999}
    assert twin.rollback(0)["kept"] is twin["kept"]


# Deltas are exact

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.inf])
    | st.sampled_from(["", "a", "b", "0", "~", "/", "-"])
    | st.sampled_from([b"", b"a", 1j, 0j])
)
KEYS = st.sampled_from(["a", "b", "a/b", "~1", "", "0"]) | st.sampled_from(
    [0, 1, True, False, 1.0, (1,), (True,), None]
)
VALUES = st.recursive(
    LEAVES | st.frozensets(LEAVES, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=25,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("a~/0-"),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text("a~/0-", max_size=2), inner, max_size=4),
    max_leaves=25,
)


@st.composite
def edited(draw: st.DrawFn, values: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> tuple[Any, Any]:
    """A frozen value, and what became of it in a few edits; they share the rest, or nothing."""
    old: Any = freeze({"it": draw(values)})
    new: Any = old
    for _ in range(draw(st.integers(0, 4))):
        new = edit(draw, new, values, keys)
    if chance(draw):
        new = pickled(new)
    return old, freeze(new)


def chance(draw: st.DrawFn) -> bool:
    return draw(st.booleans())


def edit(draw: st.DrawFn, value: Any, values: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> Any:
    kind = cast("Any", type(value))
    if issubclass(kind, dict):
        items: dict[Any, Any] = dict(value)
        if items and chance(draw):
            key = draw(st.sampled_from(list(items)))
            items[key] = edit(draw, items[key], values, keys)
        elif items and chance(draw):
            del items[draw(st.sampled_from(list(items)))]
        else:
            key = draw(keys)
            items.pop(key, None)  # so that 1 may take the place of True
            items[key] = draw(values)
        return items
    if issubclass(kind, list):
        listed: list[Any] = list(value)
        place = draw(st.integers(0, len(listed)))
        if place < len(listed) and chance(draw):
            listed[place] = edit(draw, listed[place], values, keys)
        elif place < len(listed) and chance(draw):
            del listed[place]
        elif listed and chance(draw):
            listed = listed[place:] + listed[:place]
        else:
            listed.insert(place, draw(values))
        return listed
    return draw(values)


def exact(old: Any, new: Any) -> None:
    before, after = ContextSnapshot(old), ContextSnapshot(new)
    delta = after.diff(before)
    following = before.apply(delta)
    assert following == after
    assert told(dict(following)) == told(dict(after))
    assert (following.version, following.parent) == (1, before)
    assert bool(delta) == (told(dict(before)) != told(dict(after)))
    assert pickled(delta) == delta
    backwards = before.diff(after)
    assert told(dict(following.apply(backwards))) == told(dict(before))


@settings(deadline=None, max_examples=300)
@given(edited(VALUES, KEYS))
def test_a_delta_gives_the_one_version_from_the_other_exactly_in_type_too(versions: tuple[Any, Any]) -> None:
    exact(*versions)


@settings(deadline=None, max_examples=200)
@given(VALUES, VALUES)
def test_a_delta_is_exact_even_between_versions_that_have_nothing_in_common(old: Any, new: Any) -> None:
    exact({"it": freeze(old)}, {"it": freeze(new)})


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 5) | st.lists(st.integers(0, 2), max_size=2), max_size=12),
    st.lists(st.integers(0, 5) | st.lists(st.integers(0, 2), max_size=2), max_size=12),
)
def test_a_delta_between_lists_is_exact_however_their_elements_repeat(old: list[Any], new: list[Any]) -> None:
    exact({"it": freeze(old)}, {"it": freeze(new)})


TWINS: dict[str, tuple[Any, Any]] = {
    "1 and True": (1, True),
    "0 and False": (0, False),
    "1 and 1.0": (1, 1.0),
    "0.0 and -0.0": (0.0, -0.0),
    "in a list": ([1], [True]),
    "in a tuple": ((1,), (1.0,)),
    "in a list in a tuple": (([1],), ([True],)),
    "in a mapping in a tuple": (({"a": 1},), ({"a": True},)),
    "in a frozenset": (frozenset({1}), frozenset({True})),
    "as a key": ({1: "x"}, {True: "x"}),
    "in a tuple that is a key": ({(1, "a"): "x"}, {(True, "a"): "x"}),
    "list and tuple": ([1], (1,)),
    "str and bytes": ("a", b"a"),
    "empty ones": ({}, []),
}


@pytest.mark.parametrize(("old", "new"), TWINS.values(), ids=TWINS)
def test_what_is_equal_but_not_the_same_is_a_change(old: Any, new: Any) -> None:
    assert len(delta_of(old, new)) in (1, 2)
    assert len(delta_of(new, old)) in (1, 2)
    assert not delta_of(old, copy.deepcopy(old))


class Point(NamedTuple):
    x: Any


class Broken:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("nobody may compare me")

    __hash__ = None  # type: ignore[assignment]


class Array:
    """Compares like an array of numpy, to an array."""

    def __eq__(self, other: object) -> Array:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return self

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("make", [Broken, Array, object, lambda: math.nan * 1])
def test_an_object_that_cannot_be_compared_is_replaced_by_the_other(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    old, new = ContextSnapshot({"a": one, "b": [one]}), ContextSnapshot({"a": other, "b": [other]})
    following = old.apply(new.diff(old))
    assert following["a"] is other
    assert following["b"][0] is other
    assert not old.evolve(c=1).diff(old.evolve(c=1))


def test_an_object_that_says_it_is_equal_is_no_change() -> None:
    assert not delta_of(Point(1), Point(1))
    assert not delta_of(OrderedDict(a=1), OrderedDict(a=1))
    assert delta_of(OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)).changes[0].path == ("it",)


# … and as small as the change


def paths(delta: Delta) -> list[tuple[str, tuple[Any, ...]]]:
    return [(change.op, change.path) for change in delta]


@pytest.mark.parametrize("same", [itself, copied], ids=["shared", "read anew"])
def test_what_one_does_with_a_list_of_messages_costs_what_one_does(same: Callable[[Any], Any]) -> None:
    old = freeze(messages(200))
    new = list(same(old))
    more: dict[str, Any] = {"role": "user", "content": "more", "meta": {}}
    assert paths(delta_of(old, [*new, more])) == [("add", ("it", 200))]
    assert paths(delta_of(old, [more, *new])) == [("add", ("it", 0))]
    assert paths(delta_of(old, [*new[:100], more, *new[100:]])) == [("add", ("it", 100))]
    assert paths(delta_of(old, [*new[:100], more, *new[101:]])) in (
        [("replace", ("it", 100, "content")), ("remove", ("it", 100, "meta", "tokens"))],
        [("remove", ("it", 100, "meta", "tokens")), ("replace", ("it", 100, "content"))],
    )
    assert paths(delta_of(old, new[:-1])) == [("remove", ("it", 199))]
    assert paths(delta_of(old, new[1:])) == [("remove", ("it", 0))]
    assert paths(delta_of(old, [*new[:100], *new[101:]])) == [("remove", ("it", 100))]
    assert paths(delta_of(old, [*new[10:], more])) == [
        *(("remove", ("it", place)) for place in reversed(range(10))),
        ("add", ("it", 190)),
    ]
    changed = {**new[100], "meta": {"tokens": [100, 2]}}
    assert paths(delta_of(old, [*new[:100], changed, *new[101:]])) == [("replace", ("it", 100, "meta", "tokens", 1))]
    assert paths(delta_of(old, [*new[:50], *new[51:100], changed, *new[101:]])) == [
        ("remove", ("it", 50)),
        ("replace", ("it", 99, "meta", "tokens", 1)),
    ]
    assert not delta_of(old, new)
    assert len(delta_of(old, [])) <= 200


def test_a_message_that_moves_is_removed_and_added() -> None:
    old = freeze(messages(200))
    assert paths(delta_of(old, [*old[1:], old[0]])) == [("remove", ("it", 0)), ("add", ("it", 199))]
    assert paths(delta_of(old, [old[199], *old[:199]])) == [("remove", ("it", 199)), ("add", ("it", 0))]


def test_a_list_of_messages_that_are_all_the_same_grows_and_shrinks_by_one_change() -> None:
    old = [{"role": "user", "content": "ok"} for _ in range(200)]
    assert len(delta_of(old, old[1:])) == 1
    assert len(delta_of(old, [*old, old[0]])) == 1


def test_a_nested_field_is_one_change_with_the_path_to_it() -> None:
    old: dict[str, Any] = {"profile": {"name": "ada", "tags": ["x", "y"]}, "n": 1}
    new = copied(old)
    new["profile"]["tags"][1] = "z"
    assert delta_of(old, new) == Delta((Change("replace", ("it", "profile", "tags", 1), "z"),))


def test_the_size_of_a_delta_does_not_depend_on_that_of_the_whole() -> None:
    def size(number: int) -> int:
        old = freeze(messages(number))
        new = copied(old)
        new[number // 2]["content"] = "changed"
        return len(pickle.dumps(delta_of(old, new)))

    assert size(1_000) <= size(10) + 8


def test_what_occurs_everywhere_is_compared_once() -> None:
    def shared(bottom: Any) -> Any:
        value = bottom
        for _ in range(100):
            value = [value, value]
        return freeze(value)

    old, new = ContextSnapshot({"it": shared(["x"])}), ContextSnapshot({"it": shared(["x"])})
    assert not new.diff(old)
    assert not ContextSnapshot({"it": (shared([1]),)}).diff(ContextSnapshot({"it": (shared([1]),)}))


# Structure is shared


def test_what_a_delta_does_not_touch_is_shared() -> None:
    old = ContextSnapshot({"messages": messages(10), "documents": [{"text": "x"}], "deep": {"a": {"b": [1]}, "c": {}}})
    new = old.evolve(
        messages=[*old["messages"][:5], {**old["messages"][5], "content": "new"}, *old["messages"][6:]],
        deep={**old["deep"], "a": {"b": [2]}},
    )
    following = old.apply(new.diff(old))
    assert following == new
    assert following["documents"] is old["documents"]
    assert following["deep"]["c"] is old["deep"]["c"]
    for place in range(10):
        assert (following["messages"][place] is old["messages"][place]) == (place != 5)
    assert following["messages"][5]["meta"] is old["messages"][5]["meta"]
    for value in (following["messages"], following["messages"][5], following["deep"], following["deep"]["a"]["b"]):
        assert type(value) in (FrozenDict, FrozenList)


def test_what_a_delta_brings_is_shared_with_where_it_came_from() -> None:
    old = ContextSnapshot({"messages": []})
    new = old.evolve(messages=messages(1), more={"a": []})
    following = old.apply(new.diff(old))
    assert following["messages"][0] is new["messages"][0]
    assert following["more"] is new["more"]


def test_a_delta_that_is_applied_twice_leaves_both_versions_alone() -> None:
    old = ContextSnapshot({"a": [[1]]})
    delta = Delta((Change("add", ("a", 0), [7]), Change("replace", ("a", 0, 0), 8), Change("add", ("a", 0, 1), 9)))
    assert [old.apply(delta), old.apply(delta), old] == [{"a": [[8, 9], [1]]}, {"a": [[8, 9], [1]]}, {"a": [[1]]}]


# Depth and circles

DEEPER: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "dicts": (lambda inner: {"in": inner}, "in"),
    "lists": (lambda inner: [inner], 0),
}


def deep(wrap: Callable[[Any], Any], value: Any, levels: int = DEEP) -> Any:
    for _ in range(levels):
        value = wrap(value)
    return freeze(value)


@pytest.mark.parametrize(("wrap", "step"), DEEPER.values(), ids=DEEPER)
def test_deep_values_need_no_recursion(wrap: Callable[[Any], Any], step: Any) -> None:
    old = ContextSnapshot({"it": deep(wrap, ["bottom"])})
    new = ContextSnapshot({"it": deep(wrap, ["changed"])})
    delta = new.diff(old)
    assert len(delta) == 1
    assert delta.changes[0] == Change("replace", ("it", *[step] * DEEP, 0), "changed")
    found = old.apply(delta)["it"]
    for _ in range(DEEP):
        assert type(found) in (FrozenDict, FrozenList)
        found = found[step]
    assert found == ["changed"]
    assert not new.diff(ContextSnapshot({"it": deep(wrap, ["changed"])}))


def test_deep_values_in_tuples_need_no_recursion() -> None:
    def wrap(inner: Any) -> Any:
        return [(inner,)]

    old = ContextSnapshot({"it": deep(wrap, "bottom")})
    assert not ContextSnapshot({"it": deep(wrap, "bottom")}).diff(old)
    delta = ContextSnapshot({"it": deep(wrap, "changed")}).diff(old)
    assert [change.path for change in delta] == [("it", 0)]


def test_versions_of_a_circle_differ_by_the_whole() -> None:
    def circle(number: int) -> ContextSnapshot:
        it: dict[str, Any] = {"n": number, "list": []}
        it["me"] = it
        it["list"].append(it["list"])
        return ContextSnapshot({"it": it})

    one, two = circle(1), circle(2)
    following = one.apply(two.diff(one))
    assert following["it"]["n"] == following["it"]["me"]["me"]["n"] == 2
    assert following["it"]["me"]["list"][0][0] is following["it"]["list"]
    assert not one.evolve(n=1).diff(one.evolve(n=1))


# A delta that does not fit

SNAPSHOT = ContextSnapshot({"a": [1, {"b": "c"}], "t": (1, 2), "s": "str"})
MISFITS: dict[str, Change] = {
    "removes an unknown key": Change("remove", ("x",)),
    "replaces an unknown key": Change("replace", ("x",), 1),
    "goes through an unknown key": Change("add", ("x", "y"), 1),
    "removes beyond the end": Change("remove", ("a", 2)),
    "replaces beyond the end": Change("replace", ("a", 2), 1),
    "adds beyond the end": Change("add", ("a", 3), 1),
    "goes beyond the end": Change("replace", ("a", 2, "b"), 1),
    "counts from the end": Change("replace", ("a", -1), 1),
    "takes a key for a place": Change("replace", ("a", "0"), 1),
    "takes True for a place": Change("replace", ("a", True), 1),
    "goes into a string": Change("replace", ("s", 0), "x"),
    "goes into a number": Change("add", ("a", 0, "x"), 1),
    "goes into a tuple": Change("replace", ("t", 0), 1),
    "removes all": Change("remove", ()),
    "makes it no mapping": Change("replace", (), [1]),
    "makes it nothing": Change("replace", (), None),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_change_that_does_not_fit_says_so(change: Change) -> None:
    with pytest.raises(ValueError, match=r"does not fit|snapshot is a mapping"):
        SNAPSHOT.apply(Delta((Change("add", ("new",), 1), change)))
    assert SNAPSHOT == {"a": [1, {"b": "c"}], "t": (1, 2), "s": "str"}


def test_a_misfit_says_what_where_and_why() -> None:
    with pytest.raises(ValueError, match="fit") as caught:
        SNAPSHOT.apply(Delta((Change("remove", ("a", 2)),)))
    assert str(caught.value) == (
        "the change 'remove' at ('a', 2) does not fit: there is no place 2 among 2 elements; "
        "apply a delta to the value it was made from"
    )


def test_a_change_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="'op' must be in"):
        Change("move", ("a",), 1)
    with pytest.raises(TypeError, match="'path' must be"):
        Change("add", "a", 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_delta_can_be_applied_to_plain_values_which_it_leaves_alone() -> None:
    inner = [1]
    value: dict[str, Any] = {"a": inner, "o": OrderedDict(x=inner)}
    changes = Change("add", ("a", 1), [2]), Change("add", ("o", "x", 0), 0), Change("add", ("a", 1, 0), 3)
    assert Delta(changes).apply(value) == {"a": [1, [3, 2]], "o": {"x": [0, 1]}}
    assert (value, inner) == ({"a": [1], "o": {"x": [1]}}, [1])


# As values, and as JSON


def test_deltas_and_changes_compare_pickle_and_copy() -> None:
    old, new = ContextSnapshot({"a": [1]}), ContextSnapshot({"a": [1, {"b": []}], "c": 2})
    delta = new.diff(old)
    assert delta == new.diff(old) != Delta()
    assert len(delta) == 2
    assert list(delta) == list(delta.changes)
    assert not Delta()
    for twin in (pickled(delta), copy.copy(delta), copy.deepcopy(delta)):
        assert twin == delta
        assert old.apply(twin) == new
    assert Change("add", ("a",), [1]) == Change("add", ("a",), [1]) != Change("add", ("a",), [2])
    assert hash(Delta((Change("add", ("a",), 1),))) == hash(Delta((Change("add", ("a",), 1),)))


def test_deltas_and_changes_cannot_be_changed() -> None:
    values = [1]
    change = Change("add", ("a",), values)
    values.append(2)
    assert change.value == [1]
    with pytest.raises(TypeError, match="immutable"):
        change.value.append(2)
    things: list[tuple[Any, str]] = [(change, "op"), (Delta(), "changes")]
    for thing, name in things:
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(thing, name, None)


def patched(document: Any, patch: list[dict[str, Any]]) -> Any:
    """Applies a JSON patch to plain JSON, as RFC 6902 says: `add`, `remove` and `replace`."""
    for operation in patch:
        op, pointer = operation["op"], operation["path"]
        assert set(operation) == {"op", "path"} | (set[str]() if op == "remove" else {"value"})
        assert pointer == "" or pointer.startswith("/")
        steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
        if not steps:
            assert op == "replace"
            document = operation["value"]
            continue
        target = document
        for step in steps[:-1]:
            target = target[int(step) if type(target) is list else step]
        in_list = type(target) is list
        last: Any = int(steps[-1]) if in_list else steps[-1]
        if op == "remove":
            del target[last]
        elif op == "replace":
            target[last]  # which has to be there
            target[last] = operation["value"]
        elif in_list:
            assert 0 <= last <= len(target)
            target.insert(last, operation["value"])
        else:
            target[last] = operation["value"]
    return document


@settings(deadline=None, max_examples=300)
@given(edited(JSON, st.text("a~/0-", max_size=2)))
def test_a_json_patch_does_what_rfc_6902_says(versions: tuple[Any, Any]) -> None:
    old, new = versions
    patch = json.dumps(ContextSnapshot(new).diff(ContextSnapshot(old)).to_json_patch())
    found = patched(json.loads(json.dumps(old)), json.loads(patch))
    assert json.dumps(found, sort_keys=True) == json.dumps(new, sort_keys=True)


def test_a_json_patch_escapes_what_a_pointer_may_not_hold() -> None:
    old, new = ContextSnapshot({"a/b": {"~1": [0]}, "": 1}), ContextSnapshot({"a/b": {"~1": [0, {"x": 1}]}})
    assert new.diff(old).to_json_patch() == [
        {"op": "remove", "path": "/"},
        {"op": "add", "path": "/a~1b/~01/1", "value": {"x": 1}},
    ]
