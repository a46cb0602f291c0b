"""Compatibility: what is different between two versions of a contract, where, and whom it breaks."""

from __future__ import annotations

import copy
import dataclasses
import enum
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NewType, NotRequired, TypedDict, TypeVar, cast

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stageflow import Breaks, ContractViolation, DefinitionError, Difference, Pipeline, compatibility
from stageflow.frozen import freeze
from stageflow.stages.compatibility import differences
from stageflow.stages.contract import Contract
from stageflow.stages.fields import fields_of
from tests.stages import gives

T = TypeVar("T")
P, C, S, NOBODY = Breaks.PRODUCERS, Breaks.CONSUMERS, Breaks.STORED, Breaks(0)
PS, ALL = P | S, P | C | S
REQUIRED, NEW, GONE, LOOSER = (
    "the field is new, and required",
    "the field is new",
    "the field is gone",
    "the field may be missing",
)


def record(name: str = "Doc", /, **fields: Any) -> Any:
    """An attrs class with these fields; of a pair, the second is the default."""
    return attrs.make_class(name, {field: _attribute(of) for field, of in fields.items()}, kw_only=True, frozen=True)


def _attribute(of: Any) -> Any:
    pair = of.__class__ is tuple
    return attrs.field(type=of[0], default=of[1]) if pair else attrs.field(type=of)


def found(old: Any, new: Any, root: str = "doc") -> dict[str, tuple[str, Breaks]]:
    """The differences by path; each path has one."""
    differences_ = compatibility(old, new, root=root)
    assert len({difference.path for difference in differences_}) == len(differences_)
    return {difference.path: (difference.what, difference.breaks) for difference in differences_}


# Fields

FIELDS: dict[str, tuple[Any, Any, dict[str, tuple[str, Breaks]]]] = {
    "the same class": (record(a=int), record(a=int), {}),
    "another order": (record(a=int, b=str), record(b=str, a=int), {}),
    "added, required": (record(a=int), record(a=int, b=str), {"doc.b": (REQUIRED, PS)}),
    "added, with a default": (record(a=int), record(a=int, b=(str, "")), {"doc.b": (NEW, NOBODY)}),
    "removed": (record(a=int, b=str), record(a=int), {"doc.b": (GONE, ALL)}),
    "removed, with a default": (record(a=int, b=(str, "")), record(a=int), {"doc.b": (GONE, ALL)}),
    "renamed": (record(a=int), record(b=int), {"doc.a": (GONE, ALL), "doc.b": (REQUIRED, PS)}),
    "renamed, with a default": (record(a=int), record(b=(int, 0)), {"doc.a": (GONE, ALL), "doc.b": (NEW, NOBODY)}),
    "given a default": (record(a=int), record(a=(int, 0)), {}),
    "lost its default": (record(a=(int, 0)), record(a=int), {"doc.a": (LOOSER, PS)}),
    "another default": (record(a=(int, 0)), record(a=(int, 1)), {}),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field(case: str) -> None:
    old, new, expected = FIELDS[case]
    assert found(old, new) == expected


def test_a_field_that_was_retyped_breaks_everybody_in_both_words() -> None:
    assert compatibility(record(a=int), record(a=str), root="doc") == (
        Difference(path="doc.a", what="gives int, wanted str", breaks=PS),
        Difference(path="doc.a", what="gives str, wanted int", breaks=C),
    )


def tolerant(**fields: Any) -> Any:
    made = record(**fields)
    made.__extra_fields__ = "ignore"
    return made


def test_a_removed_field_does_not_break_who_gives_it_if_the_class_ignores_what_it_does_not_know() -> None:
    assert found(record(a=int, b=str), tolerant(a=int)) == {"doc.b": (GONE, C)}
    assert found(record(a=int, b=(str, "")), tolerant(a=int)) == {"doc.b": (GONE, C)}


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


@dataclasses.dataclass
class NewPoint:
    x: int
    z: int
    y: float = 0.0


def test_dataclasses_are_compared_like_attrs_classes_and_with_them() -> None:
    assert found(Point, NewPoint) == {"doc.z": (REQUIRED, PS)}
    assert found(record(x=int, y=(float, 0.0)), Point) == {}
    assert found(Point, record(x=int)) == {"doc.y": (GONE, ALL)}


# Types

TYPES: list[tuple[Any, Any, Breaks]] = [
    (int, int, NOBODY),
    (int, float, C),  # a consumer may rely on a whole number
    (float, int, PS),
    (bool, int, ALL),  # a contract takes True for no number, and 2 is no bool
    (int, bool, PS),
    (int, str, ALL),
    (int, Any, C),
    (Any, int, PS),
    (str, str | None, C),
    (str | None, str, PS),
    (int | str, str | int, NOBODY),
    (int | str, int | str | bytes, C),
    (int | str, int, PS),
    (int, UserId := NewType("UserId", int), NOBODY),
    (int, Annotated[int, "seconds"], NOBODY),
    (Literal["a"], Literal["a", "b"], C),
    (Literal["a", "b"], Literal["a"], PS),
    (Literal["a", "b"], Literal["b", "a"], NOBODY),
    (Literal["a"], str, C),
    (str, Literal["a"], PS),
    (Literal[1], Literal[True], ALL),
    (Literal["a", 1], str | int, C),
    (list[int], list[int], NOBODY),
    (list[int], list[float], C),
    (list[int], tuple[int, ...], C),
    (tuple[int, ...], list[int], C),
    (list[int], Sequence[int], C),
    (Sequence[int], list[int], NOBODY),
    (list[int], set[int], ALL),
    (set[int], frozenset[int], C),
    (list[int], list[Any], C),
    (list, list[int], PS),
    (tuple[int, str], tuple[int, str], NOBODY),
    (tuple[int, str], tuple[int, str, str], ALL),
    (tuple[int, int], tuple[int, ...], C),
    (tuple[int, ...], tuple[int, int], PS),
    (list[int], tuple[int], ALL),
    (tuple[int, ...], tuple[()], PS),
    (dict[str, int], dict[str, float], C),
    (dict[str, int], Mapping[str, int], C),
    (Mapping[str, int], dict[str, int], NOBODY),
    (dict[str, int], dict[int, int], ALL),
    (str, Sequence, ALL),
    (None, int | None, C),
]


@pytest.mark.parametrize(("old", "new", "breaks"), TYPES, ids=lambda part: str(part)[:30])
def test_a_type_that_was_widened_breaks_who_relies_on_it_and_one_that_was_narrowed_who_gives_it(
    old: Any, new: Any, breaks: Breaks
) -> None:
    total = NOBODY
    for difference in compatibility(old, new):
        total |= difference.breaks
    assert total == breaks


def test_the_words_of_a_difference() -> None:
    (difference,) = compatibility(record(a=list[str]), record(a=list[str | None]), root="doc")
    assert difference == Difference(path="doc.a[]", what="gives None, wanted str", breaks=C)
    assert str(difference) == "doc.a[]: gives None, wanted str (breaks consumers)"
    assert str(compatibility(record(), record(a=(int, 0)))[0]) == "value.a: the field is new"
    gone = compatibility(record(a=int), record())
    assert str(gone[0]) == "value.a: the field is gone (breaks producers, consumers, stored)"
    assert str(compatibility(Literal["a", "b", "c"], Literal["a"])[0]) == (
        "value: gives 'b', 'c', wanted Literal['a'] (breaks producers, stored)"
    )
    for other in (pickle.loads(pickle.dumps(difference)), copy.copy(difference)):
        assert other == difference


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class NewColour(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


def test_versions_of_an_enumeration_are_what_their_values_are() -> None:
    assert found(Colour, NewColour) == {"doc": ("gives 'green', wanted Colour", C)}
    assert found(NewColour, Colour) == {"doc": ("gives 'green', wanted Colour", PS)}
    # But between stages a member of one is no member of the other.
    assert list(differences(Colour, NewColour, "doc")) == [("doc", "gives Colour, wanted NewColour")]


class Row(TypedDict):
    id: int
    name: NotRequired[str]


class Stricter(TypedDict):
    id: int
    name: str


class Wider(TypedDict):
    id: int
    name: NotRequired[str]
    age: NotRequired[int]


def test_what_a_typeddict_requires_is_told_although_annotations_are_strings() -> None:
    assert found(Row, Stricter) == {"doc.name": (LOOSER, PS)}
    assert found(Stricter, Row) == {"doc.name": (LOOSER, C)}
    assert found(Row, Wider) == {"doc.age": (NEW, NOBODY)}
    assert found(Wider, Row) == {"doc.age": (GONE, PS)}  # a consumer has to do without it as it is
    assert found(Row, record(id=int, name=(str, ""))) == {"doc": ("gives Doc, wanted Row", C)}
    assert {difference.path: difference.breaks for difference in compatibility(Row, record(id=str))}["value"] == C
    assert [str(difference) for difference in compatibility(record(id=int), Row, root="doc")] == [
        "doc: gives Doc, wanted Row (breaks producers, stored)",
        "doc: gives Row, wanted Doc (breaks consumers)",
        "doc.name: the field is new",
    ]


# Nesting


LIST: Any = list
TUPLE: Any = tuple
DICT: Any = dict


def bare(of: Any) -> Any:
    return of


def listed(of: Any) -> Any:
    return LIST[of]


def mapped(of: Any) -> Any:
    return DICT[str, of]


def optional(of: Any) -> Any:
    return of | None


WAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fields": (bare, ""),
    "lists": (listed, "[]"),
    "mappings": (mapped, "[]"),
    "optionals": (optional, ""),
}


@pytest.mark.parametrize("depth", [1, 5, 20])
@pytest.mark.parametrize("through", WAYS)
def test_the_path_leads_to_what_is_nested(depth: int, through: str) -> None:
    wrap, place = WAYS[through]

    def nested(innermost: Any) -> Any:
        for level in range(depth):
            innermost = record(f"Level{level}", inner=wrap(innermost))
        return innermost

    path = "doc" + f".inner{place}" * depth
    old, new = nested(record(a=int, b=int)), nested(record(a=str, c=(int, 0)))
    assert {
        (difference.path, difference.what, difference.breaks) for difference in compatibility(old, new, root="doc")
    } == {
        (f"{path}.a", "gives int, wanted str", PS),
        (f"{path}.a", "gives str, wanted int", C),
        (f"{path}.b", GONE, ALL),
        (f"{path}.c", NEW, NOBODY),
    }


def test_the_places_of_a_tuple_are_told_apart() -> None:
    old, new = TUPLE[record(a=int), record(a=int)], TUPLE[record(a=int), record(a=int, b=(int, 0))]
    assert found(old, new) == {"doc[1].b": (NEW, NOBODY)}


@attrs.frozen
class Tree:
    value: int
    children: list[Tree]
    parent: Tree | None = None


@attrs.frozen
class NewTree:
    value: str
    children: list[NewTree]
    parent: NewTree | None = None


def test_classes_that_hold_themselves_are_walked_through_once() -> None:
    assert {str(difference) for difference in compatibility(Tree, NewTree, root="tree")} == {
        "tree.value: gives int, wanted str (breaks producers, stored)",
        "tree.value: gives str, wanted int (breaks consumers)",
    }
    assert compatibility(Tree, Tree) == ()


# Generic classes


@attrs.frozen
class Box(Generic[T]):
    item: T


@attrs.frozen
class Crate(Box[list[T]], Generic[T]):
    lid: T


@attrs.frozen
class Ints(Box[int]):
    more: int = 0


def test_the_arguments_of_a_generic_class_count() -> None:
    assert found(Box[int], Box[int]) == {}
    assert [difference.path for difference in compatibility(Box[int], Box[str], root="box")] == ["box.item"] * 2
    assert list(differences(Ints, Box[int], "box")) == []
    assert list(differences(Ints, Box[str], "box")) == [("box.item", "gives int, wanted str")]
    assert list(differences(Crate[int], Box[list[int]], "box")) == []
    assert list(differences(Crate[int], Box[list[str]], "box")) == [("box.item[]", "gives int, wanted str")]
    assert list(differences(Crate[int], Crate[str], "box")) == [
        ("box.item[]", "gives int, wanted str"),
        ("box.lid", "gives int, wanted str"),
    ]
    assert list(differences(Box[int], Box, "box")) == []
    assert list(differences(Box, Box[int], "box")) == [("box.item", "gives anything, wanted int")]


# Derived classes


@attrs.frozen
class Base:
    title: str | None
    number: float = 0.0


@attrs.frozen(kw_only=True)
class Narrower(Base):
    title: str
    number: int = 0
    more: str = ""


@attrs.frozen
class Weaker(Base):
    title: str | int | None = None  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]


@attrs.frozen
class WeakerBelow:
    inside: list[Weaker]


@attrs.frozen
class Further(Narrower):
    number: float = 0.0  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]


def test_a_derived_class_is_accepted_where_its_base_is() -> None:
    assert list(differences(Narrower, Base, "doc")) == []
    assert list(differences(list[Narrower], list[Base], "doc")) == []
    assert list(differences(Base, Narrower, "doc")) == [
        ("doc.title", "gives None, wanted str"),
        ("doc.number", "gives float, wanted int"),
        ("doc.more", "there is no such field"),
    ]


@pytest.mark.parametrize(
    ("declared", "what"),
    [
        (Weaker, "Weaker.title is weaker than in Base, which Weaker derives from: gives int, wanted str | None"),
        (list[Weaker], "Weaker.title is weaker than in Base"),
        (WeakerBelow, "Weaker.title is weaker than in Base"),
        (Further, "Further.number is weaker than in Narrower, which Further derives from: gives float, wanted int"),
    ],
    ids=str,
)
def test_a_class_that_is_weaker_than_its_base_cannot_be_declared(declared: Any, what: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p").with_stage("s", gives(), output=declared)
    assert what in str(caught.value)
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p", inputs=declared)
    assert what in str(caught.value)


def test_a_class_that_is_weaker_than_its_base_is_different_from_it() -> None:
    assert list(differences(Weaker, Base, "doc")) == [("doc.title", "gives int, wanted str | None")]


# Errors


def test_a_name_that_cannot_be_found_is_a_definition_error() -> None:
    lost = record("Lost", what="Nowhere")
    with pytest.raises(DefinitionError, match="an annotation of Lost names 'Nowhere', which cannot be found"):
        compatibility(lost, record(a=int))


# The law: what is said not to break producers and stored values, does not

LEAVES: list[Any] = [int, float, bool, str, type(None), Literal["a"], Literal["a", 1], Colour, NewColour]


def types_of(depth: int) -> st.SearchStrategy[Any]:
    if depth == 0:
        return st.sampled_from(LEAVES)
    inner = types_of(depth - 1)
    required = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    return st.one_of(
        inner,
        inner.map(lambda of: LIST[of]),
        inner.map(lambda of: TUPLE[of, ...]),
        st.tuples(inner, inner).map(lambda both: TUPLE[both]),
        inner.map(lambda of: DICT[str, of]),
        st.tuples(inner, inner).map(lambda both: both[0] | both[1] if both[0] is not both[1] else both[0]),
        required.map(lambda fields: record(**fields)),
        required.map(lambda fields: tolerant(**fields)),
        required.map(lambda fields: record(**{name: (of, None) for name, of in fields.items()})),
        required.map(lambda fields: TypedDict("Items", cast("Any", fields))),  # type: ignore[operator]
    )


def values_of(declared: Any) -> st.SearchStrategy[Any]:
    """Plain data that a contract takes."""
    fields = fields_of(declared)
    if fields is None:
        origin: Any = getattr(declared, "__origin__", None)
        arguments: Any = getattr(declared, "__args__", ())
        if origin is list:
            return st.lists(values_of(arguments[0]), max_size=2)
        if origin is tuple and arguments[-1] is ...:
            return st.lists(values_of(arguments[0]), max_size=2)
        if origin is tuple:
            return st.tuples(*map(values_of, arguments))
        if origin is dict:
            return st.dictionaries(st.sampled_from("xy"), values_of(arguments[1]), max_size=2)
        if origin is Literal:
            return st.sampled_from(arguments)
        if arguments:
            return st.one_of(*map(values_of, arguments))
        if declared in (Colour, NewColour):
            return st.sampled_from([member.value for member in cast("Any", declared)])
        simple: dict[Any, st.SearchStrategy[Any]] = {int: st.integers(-9, 9), float: st.floats(allow_nan=False)}
        return simple[declared] if declared in simple else st.from_type(declared)
    return st.fixed_dictionaries(
        {name: values_of(field.declared) for name, field in fields.items() if field.required},
        optional={name: values_of(field.declared) for name, field in fields.items() if not field.required},
    )


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(old=types_of(2), new=types_of(2), data=st.data())
def test_what_is_not_said_to_break_stored_values_can_be_read(old: Any, new: Any, data: st.DataObject) -> None:
    if any(difference.breaks & PS for difference in compatibility(old, new)):
        return
    value = data.draw(values_of(old))
    Contract(old, "old").check(freeze(value), stage=None, root="old")
    try:
        Contract(new, "new").check(freeze(value), stage=None, root="new")
    except ContractViolation as violation:
        raise AssertionError(f"{old} -> {new}: {violation}") from violation


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(one=types_of(2))
def test_a_type_is_compatible_with_itself(one: Any) -> None:
    assert compatibility(one, one) == ()
