"""Contracts: what fits a type, what does not, and how it is said; and when the engine asks."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import math
import os
import pathlib
import pickle
from collections.abc import Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Protocol,
    Required,
    TypedDict,
    TypeVar,
    cast,
    runtime_checkable,
)

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stageflow import (
    CauseKind,
    ContractViolation,
    DefinitionError,
    Fault,
    FrozenDict,
    FrozenList,
    Pipeline,
    PipelineContext,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
    run_stage,
    stage,
)
from stageflow.frozen import freeze
from stageflow.stages.contract import Contract
from tests.stages import FAILED, OK, SKIPPED, Witness, causes, gives, raises, results_of, returns, states

T = TypeVar("T")
LIST: Any = list
TUPLE: Any = tuple
DICT: Any = dict


@attrs.frozen
class Page:
    title: str
    number: int = 0


@attrs.frozen
class Doc:
    pages: list[Page]
    by: str | None = None


@attrs.frozen
class Tree:
    value: int
    children: list[Tree] = attrs.field(factory=list["Tree"])


@attrs.frozen
class Box(Generic[T]):
    item: T


@attrs.frozen
class Crate(Generic[T]):
    box: Box[T]
    boxes: list[Box[T]]


@attrs.frozen
class Ints(Box[int]):
    more: str = ""


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Row(TypedDict):
    id: int
    name: NotRequired[str]


class Partial(TypedDict, total=False):
    id: Required[int]
    name: str


class Pair(NamedTuple):
    left: int
    right: str


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Plain:
    """A class that nobody knows anything of."""


class Whole(int):
    """A number with a class of its own."""


@runtime_checkable
class Closable(Protocol):
    def close(self) -> None: ...


class Unaskable(Protocol):
    def close(self) -> None: ...


@attrs.frozen
class Loose:
    __extra_fields__ = "ignore"
    title: str


@attrs.frozen
class Aliased:
    _secret: int
    name: str = attrs.field(alias="called", default="")
    made: int = attrs.field(init=False, default=3)


UserId = NewType("UserId", int)
PAGE, POINT, PLAIN, NOW = Page("a"), Point(1), Plain(), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def check(declared: Any, value: object) -> Any:
    return Contract(declared, "output= of stage 's'").check(value, stage="s", root="s")


def faults(declared: Any, value: object) -> list[tuple[str, str, str]]:
    with pytest.raises(ContractViolation) as caught:
        check(declared, value)
    return [(fault.path, fault.found, fault.wanted) for fault in caught.value.faults]


def refuses(declared: Any, value: object) -> bool:
    return faults(declared, value) != []


def same(value: Any, other: Any) -> bool:
    """Whether they are equal and of the same types, all the way down."""
    if type(value) is not type(other):
        return False
    if issubclass(type(value), dict):
        return same(list(value.items()), list(other.items()))
    if issubclass(type(value), (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other) or value is other


# Strictness: every builtin against every other

SAMPLES: dict[type, object] = {
    type(None): None,
    bool: True,
    int: 1,
    float: 1.5,
    complex: 1j,
    str: "1",
    bytes: b"1",
    bytearray: bytearray(b"1"),
    list: [1],
    tuple: (1,),
    set: {1},
    frozenset: frozenset({1}),
    dict: {"1": 1},
    type: int,
    datetime.datetime: NOW,
    decimal.Decimal: decimal.Decimal(1),
    pathlib.PurePosixPath: pathlib.PurePosixPath("1"),
    range: range(1),
    Page: PAGE,
    Point: POINT,
    Colour: Colour.RED,
    Plain: PLAIN,
}
ALSO = {
    # Another form of the same thing, and what comes of it.
    (float, int): 1.0,
    (list, tuple): [1],
    (tuple, list): (1,),
    (set, frozenset): {1},
    (frozenset, set): frozenset({1}),
    (Colour, int): Colour.ONE,
}


def named(part: object) -> str:
    """Name a parameter of a test, the same in every process, in which sets have orders of their own."""
    if isinstance(part, (set, frozenset)):
        return f"{{{', '.join(sorted(map(repr, cast('set[object]', part))))}}}"[:40]
    return repr(part)[:40]


@pytest.mark.parametrize("declared", SAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given_", SAMPLES, ids=lambda kind: kind.__name__)
def test_a_builtin_stands_for_no_other_but_a_whole_number_and_a_container_of_its_kind(
    declared: type, given_: type
) -> None:
    value: Any = SAMPLES[given_]
    if declared is given_:
        assert same(check(declared, value), value)
    elif (declared, given_) in ALSO:
        assert same(check(declared, value), ALSO[declared, given_])
    else:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
        wanted = {type(None): "None", Colour: "Colour ('red', 1)"}.get(declared, declared.__qualname__)
        if given_ is dict and declared in (Page, Point):
            return  # a mapping is taken for its fields: below
        assert faults(declared, value) == [("s", f"{shown} ({given_.__name__})", wanted)]


FITS: list[tuple[Any, object, object]] = [
    (Any, PLAIN, PLAIN),
    (object, PLAIN, PLAIN),
    (None, None, None),
    (float, 0, 0.0),
    (float, math.inf, math.inf),
    (float, 2**53, 2.0**53),
    (int | None, None, None),
    (int | str, "1", "1"),
    (float | int, 1, 1),
    (int | float, 1.0, 1.0),
    (float | str, 1, 1.0),
    (list[int] | list[str], ["a"], ["a"]),
    (Page | Point, {"x": 1}, Point(1)),
    (list[Page] | Page, {"title": "a"}, PAGE),
    (str | Colour, "red", "red"),
    (Colour | str, "red", "red"),
    (Literal["a", 1], 1, 1),
    (Literal[True], True, True),
    (Literal[Colour.RED], Colour.RED, Colour.RED),
    (Literal["a"] | None, None, None),
    (Colour, "red", Colour.RED),
    (Colour, 1, Colour.ONE),
    (Level, 1, Level.LOW),
    (Mode, "fast", Mode.FAST),
    (int, Level.LOW, Level.LOW),
    (str, Mode.FAST, Mode.FAST),
    (Whole, Whole(1), Whole(1)),
    (int, Whole(1), Whole(1)),
    (list[int], (1, 2), [1, 2]),
    (list[int], freeze([1, 2]), [1, 2]),
    (list, [1, "a"], [1, "a"]),
    (Sequence[int], (1,), [1]),
    (MutableSequence[int], (1,), [1]),
    (FrozenList[int], [1], FrozenList([1])),
    (collections.deque[int], [1], collections.deque([1])),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[int, ...], [], ()),
    (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
    (tuple[()], [], ()),
    (tuple, [1, "a"], (1, "a")),
    (set[int], frozenset({1}), {1}),
    (frozenset[int], {1}, frozenset({1})),
    (AbstractSet[int], {1}, frozenset({1})),
    (MutableSet[int], frozenset({1}), {1}),
    (dict[str, int], freeze({"a": 1}), {"a": 1}),
    (dict[str, list[Page]], {"a": [{"title": "a"}]}, {"a": [PAGE]}),
    (dict[int, float], {1: 1}, {1: 1.0}),
    (dict[Colour, int], {"red": 1}, {Colour.RED: 1}),
    (Mapping[str, Any], {"a": PLAIN}, {"a": PLAIN}),
    (MutableMapping[str, int], {"a": 1}, {"a": 1}),
    (FrozenDict[str, int], {"a": 1}, FrozenDict({"a": 1})),
    (collections.OrderedDict[str, int], {"a": 1}, collections.OrderedDict({"a": 1})),
    (UserId, 1, 1),
    (list[UserId], [1], [1]),
    (Annotated[int, "seconds"], 1, 1),
    (list[Annotated[int, "seconds", 3]], [1], [1]),
    (Final[int], 1, 1),
    (Row, {"id": 1}, {"id": 1}),
    (Row, freeze({"id": 1, "name": "a"}), {"id": 1, "name": "a"}),
    (Partial, {"id": 1}, {"id": 1}),
    (Page, {"title": "a"}, PAGE),
    (Page, freeze({"number": 0, "title": "a"}), PAGE),
    (Doc, {"pages": [{"title": "a"}, PAGE]}, Doc([PAGE, PAGE])),
    (Doc, {"pages": (), "by": None}, Doc([])),
    (Point, {"x": 1, "y": 2}, Point(1, 2.0)),
    (Tree, {"value": 1, "children": [{"value": 2}]}, Tree(1, [Tree(2)])),
    (Box[int], {"item": 1}, Box(1)),
    (Box[list[Page]], {"item": [{"title": "a"}]}, Box([PAGE])),
    (Box, {"item": PLAIN}, Box(PLAIN)),
    (Crate[int], {"box": {"item": 1}, "boxes": [{"item": 2}]}, Crate(Box(1), [Box(2)])),
    (Ints, {"item": 1}, Ints(1)),
    (Loose, {"title": "a", "colour": "red"}, Loose("a")),
    (Aliased, {"secret": 1, "called": "b"}, Aliased(1, called="b")),
    (Pair, Pair(1, "a"), Pair(1, "a")),
    (list[Page], [PAGE], [PAGE]),
]


@pytest.mark.parametrize(("declared", "value", "made"), FITS, ids=named)
def test_what_fits_is_given_back_as_what_was_declared(declared: Any, value: object, made: object) -> None:
    assert same(check(declared, value), made)


MISFITS: list[tuple[Any, object, list[tuple[str, str, str]]]] = [
    (int, 1.0, [("s", "1.0 (float)", "int")]),
    (float, 2**53 + 1, [("s", "9007199254740993 (int)", "float")]),
    (Whole, 1, [("s", "1 (int)", "Whole")]),
    (Level, 2, [("s", "2 (int)", "Level (1)")]),
    (Level, True, [("s", "True (bool)", "Level (1)")]),
    (Mode, "slow", [("s", "'slow' (str)", "Mode ('fast')")]),
    (Colour, True, [("s", "True (bool)", "Colour ('red', 1)")]),
    (Colour, 1.0, [("s", "1.0 (float)", "Colour ('red', 1)")]),
    (Literal["a", 1], True, [("s", "True (bool)", "Literal['a', 1]")]),
    (Literal["a", 1], 1.0, [("s", "1.0 (float)", "Literal['a', 1]")]),
    (int | str, 1.5, [("s", "1.5 (float)", "int | str")]),
    (int | str, True, [("s", "True (bool)", "int | str")]),
    (Page | Point, {"z": 1}, [("s", "{'z': 1} (dict)", "Page | Point")]),
    (Page | None, {"title": 1}, [("s.title", "1 (int)", "str")]),
    (list[int] | list[str], [1, "a"], [("s", "[1, 'a'] (list)", "list[int] | list[str]")]),
    (list[int], "12", [("s", "'12' (str)", "list[int]")]),
    (list[str], "12", [("s", "'12' (str)", "list[str]")]),
    (MutableSequence[str], "ab", [("s", "'ab' (str)", "MutableSequence[str]")]),
    (collections.deque[str], "ab", [("s", "'ab' (str)", "deque[str]")]),
    (MutableSet[str], "ab", [("s", "'ab' (str)", "MutableSet[str]")]),
    (list[int], {1: 1}, [("s", "{1: 1} (dict)", "list[int]")]),
    (list[int], {1}, [("s", "{1} (set)", "list[int]")]),
    (set[int], [1], [("s", "[1] (list)", "set[int]")]),
    (list[int], [1, True, "3"], [("s[1]", "True (bool)", "int"), ("s[2]", "'3' (str)", "int")]),
    (tuple[int, str], (1,), [("s", "(1,) (tuple)", "tuple[int, str]")]),
    (tuple[int, str], (1, "a", 2), [("s", "(1, 'a', 2) (tuple)", "tuple[int, str]")]),
    (tuple[int, str], ("a", 1), [("s[0]", "'a' (str)", "int"), ("s[1]", "1 (int)", "str")]),
    (tuple[int, ...], (1, None), [("s[1]", "None (NoneType)", "int")]),
    (tuple[()], (1,), [("s", "(1,) (tuple)", "tuple[()]")]),
    (dict[str, int], {"a": "1"}, [("s['a']", "'1' (str)", "int")]),
    (dict[str, int], {1: 1}, [("s[1]", "1 (int)", "str")]),
    (dict[str, int], [("a", 1)], [("s", "[('a', 1)] (list)", "dict[str, int]")]),
    (collections.OrderedDict[str, int], "a", [("s", "'a' (str)", "OrderedDict[str, int]")]),
    (set[Colour], {"red", Colour.RED}, [("s", "", "set[Colour]")]),
    (dict[Colour, int], {"red": 1, Colour.RED: 2}, [("s", "", "dict[Colour, int]")]),
    (UserId, "1", [("s", "'1' (str)", "int")]),
    (Annotated[int, "seconds"], "1", [("s", "'1' (str)", "int")]),
    (pathlib.Path, "/tmp", [("s", "'/tmp' (str)", "Path")]),
    (datetime.datetime, "2026-01-01", [("s", "'2026-01-01' (str)", "datetime")]),
    (decimal.Decimal, 1, [("s", "1 (int)", "Decimal")]),
    (Closable, 1, [("s", "1 (int)", "Closable")]),
    (Plain, {}, [("s", "{} (dict)", "Plain")]),
    (Pair, (1, "a"), [("s", "(1, 'a') (tuple)", "Pair")]),
    (Page, {}, [("s.title", "nothing", "str")]),
    (Page, None, [("s", "None (NoneType)", "Page")]),
    (Page, "title", [("s", "'title' (str)", "Page")]),
    (Page, [("title", "a")], [("s", "[('title', 'a')] (list)", "Page")]),
    (Page, POINT, [("s", "Point(x=1, y=0.0) (Point)", "Page")]),
    (Page, {"title": None}, [("s.title", "None (NoneType)", "str")]),
    (
        Page,
        {"titel": "a"},
        [("s.title", "nothing", "str"), ("s.titel", "'a' (str)", "no such field (did you mean 'title'?)")],
    ),
    (Page, {"title": "a", "colour": 1}, [("s.colour", "1 (int)", "no such field")]),
    (Page, {"title": "a", 1: 1}, [("s.1", "1 (int)", "no such field")]),
    (Row, {"name": "a"}, [("s.id", "nothing", "int")]),
    (Row, {"id": 1, "name": None}, [("s.name", "None (NoneType)", "str")]),
    (Row, {"id": 1, "age": 2}, [("s.age", "2 (int)", "no such field")]),
    (Row, [("id", 1)], [("s", "[('id', 1)] (list)", "Row")]),
    (Partial, {}, [("s.id", "nothing", "int")]),
    (Loose, {"titel": "a"}, [("s.title", "nothing", "str")]),
    (Box[int], {"item": "1"}, [("s.item", "'1' (str)", "int")]),
    (Ints, {"item": "1"}, [("s.item", "'1' (str)", "int")]),
    (
        Crate[int],
        {"box": {"item": "1"}, "boxes": [{"item": 1}, {"item": None}]},
        [("s.box.item", "'1' (str)", "int"), ("s.boxes[1].item", "None (NoneType)", "int")],
    ),
    (
        Tree,
        {"value": 1, "children": [{"value": 2, "children": [{"value": "3"}]}, 4]},
        [("s.children[0].children[0].value", "'3' (str)", "int"), ("s.children[1]", "4 (int)", "Tree")],
    ),
    (
        Aliased,
        {"_secret": 1},
        [("s.secret", "nothing", "int"), ("s._secret", "1 (int)", "no such field (did you mean 'secret'?)")],
    ),
    (Aliased, {"secret": 1, "made": 2}, [("s.made", "2 (int)", "no such field")]),
    (
        dict[str, Doc],
        {"a": {"pages": [{"title": 1}]}, "b": {"pages": 2}},
        [("s['a'].pages[0].title", "1 (int)", "str"), ("s['b'].pages", "2 (int)", "list[Page]")],
    ),
]


@pytest.mark.parametrize(("declared", "value", "expected"), MISFITS, ids=named)
def test_what_does_not_fit_is_refused_with_every_path(
    declared: Any, value: object, expected: list[tuple[str, str, str]]
) -> None:
    found = faults(declared, value)
    assert [(path, wanted) for path, _, wanted in found] == [(path, wanted) for path, _, wanted in expected]
    assert all(text == should or not should for (_, text, _), (_, should, _) in zip(found, expected, strict=True))


def test_the_first_member_of_a_union_counts_wherever_another_order_was_declared_before() -> None:
    first: Any
    second: Any
    for first, second in ((Page, Loose), (Loose, Page)) * 2:
        assert type(check(first | second, {"title": "a"})) is first
        assert type(check(LIST[first | second], [{"title": "a"}])[0]) is first
        assert type(check(DICT[str, TUPLE[first | second]], {"x": [{"title": "a"}]})["x"][0]) is first
        assert faults(first | second, 1) == [("s", "1 (int)", f"{first.__name__} | {second.__name__}")]


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (Page, PAGE),
        (Page, attrs.evolve(PAGE, title=cast("str", 3))),  # it was checked when it was made, or was not
        (Point, POINT),
        (Box[int], Box(1)),
        (Box, Ints(1)),
        (Plain, PLAIN),
        (Closable, open),
        (datetime.date, NOW),
        (Page | None, PAGE),
        (Page | Point, POINT),
        (object, PLAIN),
        (Pair, Pair(1, "a")),
    ],
    ids=named,
)
def test_an_instance_passes_by_reference(declared: Any, value: object) -> None:
    if declared is Closable:
        with pathlib.Path(__file__).open(encoding="utf-8") as file:
            assert check(declared, file) is file
        return
    assert check(declared, value) is value


def test_instances_within_plain_data_pass_by_reference_too() -> None:
    made = check(dict[str, list[Page | None]], {"a": [PAGE, None]})
    assert made["a"][0] is PAGE


@pytest.mark.parametrize(
    ("declared", "essentials"),
    [
        (3, "3 is none"),
        ("int", "'int' is a string: give the type itself"),
        (T, "T is a type variable: say what it stands for"),
        (LIST[T], "T is a type variable"),
        (dict[str, list[type[int]]], "type[int] is none"),
        (collections.Counter[str], "Counter[str] is none"),
        (Unaskable, "decorate it with @runtime_checkable"),
        (list[Unaskable], "decorate it with @runtime_checkable"),
        (attrs.make_class("Holder", {"what": attrs.field(type=Unaskable)}), "decorate it with @runtime_checkable"),
        (attrs.make_class("Lost", {"what": attrs.field(type=cast("type", "Nowhere"))}), "'Nowhere'"),
    ],
    ids=named,
)
def test_what_cannot_be_checked_cannot_be_declared_however_deep_it_is(declared: Any, essentials: str) -> None:
    for declare in (
        lambda: Pipeline("p").with_stage("s", gives(), output=declared),
        lambda: stage(name="s", output=declared)(gives()),
        lambda: Pipeline("p", inputs=declared),
    ):
        with pytest.raises(DefinitionError) as caught:
            declare()
        message = str(caught.value)
        assert essentials in message
        assert ("output= of stage 's'" in message) != ("inputs= of the pipeline" in message)
        assert "hook" not in message  # of which only cattrs knows


# Messages


def test_one_fault_is_one_sentence_and_one_line() -> None:
    with pytest.raises(ContractViolation) as caught:
        check(Doc, {"pages": [{"title": "a"}, {"title": 3}]})
    assert str(caught.value) == (
        "what stage 's' gave is not what output= of stage 's' declares, Doc; change either:\n"
        "  s.pages[1].title: wanted str, found 3 (int)"
    )
    assert caught.value.stage == "s"
    assert caught.value.faults == (Fault(path="s.pages[1].title", found="3 (int)", wanted="str"),)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_several_faults_are_counted_and_listed_in_their_order() -> None:
    with pytest.raises(ContractViolation) as caught:
        check(Doc, {"pages": [{"title": 1}, {}], "bye": 2})
    assert str(caught.value) == (
        "what stage 's' gave is in 3 ways not what output= of stage 's' declares, Doc; change either:\n"
        "  s.pages[0].title: wanted str, found 1 (int)\n"
        "  s.pages[1].title: wanted str, found nothing\n"
        "  s.bye: wanted no such field (did you mean 'by'?), found 2 (int)"
    )


@pytest.mark.parametrize(("count", "last"), [(20, "  s[19]: wanted int, found None (NoneType)"), (21, "  and 1 more")])
def test_a_message_lists_twenty_faults_and_the_error_has_all(count: int, last: str) -> None:
    with pytest.raises(ContractViolation) as caught:
        check(list[int], [None] * count)
    lines = str(caught.value).splitlines()
    assert lines[-1] == last
    assert len(lines) == min(count, 21) + 1
    assert [fault.path for fault in caught.value.faults] == [f"s[{place}]" for place in range(count)]


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_a_long_value_is_cut_and_one_that_cannot_be_shown_is_named() -> None:
    assert faults(int, "x" * 100) == [("s", f"'{'x' * 58}… (str)", "int")]
    assert faults(int, Unshowable()) == [("s", "an object that cannot be shown (Unshowable)", "int")]


def test_a_violation_survives_pickle_and_copy() -> None:
    with pytest.raises(ContractViolation) as caught:
        check(Doc, {})
    for other in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert isinstance(other, ContractViolation)
        assert (str(other), other.stage, other.faults) == (str(caught.value), "s", caught.value.faults)


def test_data_that_holds_itself_or_is_nested_beyond_the_stack_is_refused_and_not_died_of() -> None:
    circle: dict[str, Any] = {"value": 1, "children": []}
    circle["children"].append(circle)
    deep: dict[str, Any] = {"value": 1}
    for _ in range(20_000):
        deep = {"value": 1, "children": [deep]}
    for value in (circle, deep, freeze(deep)):
        (fault,) = faults(Tree, value)
        assert fault[0] == "s"
        assert "nested too deep to be checked, or holds itself" in fault[1]


# When the engine asks


async def test_a_mapping_is_made_into_the_class_and_what_comes_after_sees_that() -> None:
    async def after(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(title=ctx.inputs["a"].data.title)

    pipeline = Pipeline("p").with_stage("a", returns({"title": "x"}), output=Page).with_stage("b", after, after="a")
    results = await pipeline.run()
    assert results["a"] == StageOutput.ok(Page("x"))
    assert results["b"]["title"] == "x"


@pytest.mark.parametrize(
    ("declared", "returned", "data"),
    [
        (Page, StageOutput.ok(title="x"), Page("x")),
        (Page, {"title": "x"}, Page("x")),
        (Page, FrozenDict({"title": "x"}), Page("x")),
        (Page | None, None, None),
        (None, None, None),
        (None, StageOutput.ok(), None),
        (list[int], [1, 2], [1, 2]),
        (list[int], StageOutput.ok([1, 2]), [1, 2]),
        (list[Page], [{"title": "x"}], [Page("x")]),
        (int, 1, 1),
        (float, 1, 1.0),
        (str, "x", "x"),
        (Row, {"id": 1}, {"id": 1}),
        (Partial, StageOutput.ok(id=1), {"id": 1}),
        (dict[str, int], StageOutput.ok(), {}),
        (Mapping[str, Any], {"x": [1]}, {"x": [1]}),
    ],
    ids=named,
)
async def test_what_a_stage_may_return_follows_from_its_contract(declared: Any, returned: object, data: object) -> None:
    for interceptors in ([], [passes]):
        pipeline = Pipeline("p", interceptors=interceptors).with_stage("a", returns(returned), output=declared)
        output = (await pipeline.run())["a"]
        assert output.data == data
        assert isinstance(output.data, type(freeze(data)))


class Passes:
    """Nothing but what is inside."""

    async def __call__(self, ctx: StageContext, proceed: Any) -> Any:
        output = await proceed()
        assert isinstance(output, StageOutput)
        return output


@attrs.frozen
class Instead:
    """Something else than what is inside."""

    value: object

    async def __call__(self, ctx: StageContext, proceed: Any) -> Any:
        await proceed()
        return self.value


passes = Passes()


async def test_an_instance_goes_through_a_run_by_reference() -> None:
    page = Page("x")
    for body in (returns(page), returns(StageOutput.ok(page))):
        results = await Pipeline("p", interceptors=[passes]).with_stage("a", body, output=Page).run()
        assert results["a"].data is page


@pytest.mark.parametrize(
    "returned",
    [
        {"title": 1},
        {},
        None,
        StageOutput.ok(),
        StageOutput.ok(titel="x"),
        Point(1),
        [Page("x")],
        "x",
        StageOutput.ok(3),
    ],
    ids=named,
)
async def test_a_breach_is_a_failure_of_its_own_kind(returned: object) -> None:
    pipeline = Pipeline("p").with_stage("a", returns(returned), output=Page).with_stage("b", gives(), after="a")
    with pytest.raises(StageExecutionError, match=r"(is|in 2 ways) not what output= of stage 'a'") as caught:
        await pipeline.run()
    results = caught.value.results
    assert states(results) == {"a": FAILED, "b": SKIPPED}
    assert causes(results)["a"] == (CauseKind.CONTRACT, "a")
    assert isinstance(caught.value.original, ContractViolation)
    assert caught.value.__cause__ is caught.value.original
    assert caught.value.original.stage == "a"
    assert {fault.path.split(".")[0] for fault in caught.value.original.faults} == {"a"}
    assert "a" not in results


async def test_the_message_names_the_line_of_the_declaration() -> None:
    line = cast("Any", test_the_message_names_the_line_of_the_declaration).__code__.co_firstlineno + 2
    pipeline = Pipeline("p").with_stage("a", returns({}), output=Page)
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    assert f"output= of stage 'a' ({__file__}:{line}) declares, Page; change either:" in str(caught.value.original)


@pytest.mark.parametrize(
    ("output", "state"),
    [
        (StageOutput.skip("nothing to do"), StageState.SKIPPED),
        (StageOutput.fail("no", titel=3), StageState.FAILED),
        (StageOutput.cancel_branch("enough"), StageState.CANCELLED),
        (StageOutput.cancel("enough"), StageState.CANCELLED),
    ],
    ids=lambda part: str(part.status) if isinstance(part, StageOutput) else "",
)
async def test_what_is_not_ok_is_not_checked(output: StageOutput, state: StageState) -> None:
    for interceptors in ([], [passes]):
        pipeline = Pipeline("p", interceptors=interceptors).with_stage("a", returns(output), output=Page)
        results = await results_of(pipeline)
        assert states(results) == {"a": state}
        assert causes(results)["a"][0] is not CauseKind.CONTRACT


async def test_a_stage_that_raises_is_not_checked() -> None:
    results = await results_of(Pipeline("p").with_stage("a", raises(ValueError("no")), output=Page))
    assert causes(results) == {"a": (CauseKind.FAILURE, "a")}


@pytest.mark.parametrize(
    ("value", "fits"), [({"title": "x"}, True), (Page("y"), True), ({"title": 1}, False), ([1], False)]
)
async def test_what_an_interceptor_gives_is_checked_in_place_of_what_the_stage_gave(value: object, fits: bool) -> None:
    for inner in ({"title": 1}, {"title": "z"}):  # whatever that was
        pipeline = Pipeline("p", interceptors=[Instead(value)]).with_stage("a", returns(inner), output=Page)
        results = await results_of(pipeline)
        assert states(results) == {"a": OK if fits else FAILED}
        assert fits or causes(results) == {"a": (CauseKind.CONTRACT, "a")}


async def test_without_a_contract_nothing_has_changed_of_what_a_stage_may_return() -> None:
    for interceptors in ([], [passes]):
        results = await results_of(Pipeline("p", interceptors=interceptors).with_stage("a", returns([1])))
        assert causes(results) == {"a": (CauseKind.CONTRACT, "a")}


def gives_in_turn(*values: object) -> Any:
    """A stage that gives one of these at each attempt."""

    async def body(ctx: StageContext) -> object:
        ctx.save_partial(attempt=ctx.attempt)
        return values[ctx.attempt - 1]

    return body


@pytest.mark.parametrize(
    ("on", "state", "attempts"),
    [(Exception, OK, 2), (ContractViolation, OK, 2), (TypeError, OK, 2), (OSError, FAILED, 1)],
)
async def test_a_breach_is_tried_again_if_it_matches(on: type[Exception], state: StageState, attempts: int) -> None:
    pipeline = Pipeline("p").with_stage(
        "a", gives_in_turn({"title": 1}, {"title": "x"}), output=Page, retry=Retry(attempts=3, on=on)
    )
    record = (await results_of(pipeline)).records["a"]
    assert (record.state, record.attempts) == (state, attempts)
    if state is OK:
        assert record.output == StageOutput.ok(Page("x"))


async def test_the_partial_output_of_a_breach_is_kept() -> None:
    results = await results_of(Pipeline("p").with_stage("a", gives_in_turn({"title": 1}), output=Page))
    assert results.records["a"].partial == {"attempt": 1}


async def test_a_breach_may_be_tolerated_like_every_failure() -> None:
    pipeline = Pipeline("p").with_stage("a", returns({}), output=Page, on_failure="tolerate").with_stage("b", gives())
    results = await pipeline.run()
    assert results.status is RunStatus.PARTIAL
    assert causes(results) == {"a": (CauseKind.CONTRACT, "a")}


async def test_output_on_a_decorated_stage_counts_and_with_stage_overrides_it() -> None:
    @stage(output=Page)
    async def made(ctx: StageContext) -> Mapping[str, object]:
        return {"title": "x"}

    assert (await Pipeline("p", stages=[made]).run())["made"].data == Page("x")
    assert (await Pipeline("p").with_stage(made).run())["made"].data == Page("x")
    overridden = await Pipeline("p").with_stage(made, output=Loose).run()
    assert overridden["made"].data == Loose("x")
    assert (await run_stage(made)).data == Page("x")
    assert (await run_stage(returns({"title": "x"}), output=Page)).data == Page("x")


async def test_a_breach_of_a_stage_run_alone_is_its_failure() -> None:
    with pytest.raises(StageExecutionError) as caught:
        await run_stage(returns({"title": 1}), output=Page)
    assert isinstance(caught.value.original, ContractViolation)


def test_a_run_without_contracts_pays_nothing() -> None:
    async def body(ctx: StageContext) -> None: ...

    graph = Pipeline("p").with_stage("a", body).build()
    assert graph.plan.bodies[0] is body
    assert graph.admits is None


# Run inputs


@attrs.frozen
class Job:
    url: str
    limit: int = 3
    pages: Sequence[Page] = ()


async def data_of(ctx: StageContext) -> StageOutput:
    return StageOutput.ok([ctx.data])


@pytest.mark.parametrize(
    ("context", "job"),
    [
        ({"url": "x"}, Job("x")),
        (freeze({"url": "x", "limit": 4}), Job("x", 4)),
        ({"url": "x", "pages": [{"title": "a"}]}, Job("x", pages=[Page("a")])),
        (Job("x"), Job("x")),
        (PipelineContext(data=Job("x")), Job("x")),
        (PipelineContext(data={"url": "x"}, tenant="a"), Job("x")),
    ],
    ids=named,
)
async def test_run_inputs_are_made_into_the_class_they_describe(context: Any, job: Job) -> None:
    results = await Pipeline("p", inputs=Job).with_stage("a", data_of, output=list[Job]).run(context)
    assert results["a"].data == [job]


async def test_an_instance_of_the_inputs_is_handed_in_by_reference() -> None:
    job = Job("x")
    results = await Pipeline("p", inputs=Job).with_stage("a", data_of, output=list[Job]).run(job)
    assert results["a"].data[0] is job


@pytest.mark.parametrize(
    ("context", "essentials"),
    [
        (None, "data.url: wanted str, found nothing"),
        ({}, "data.url: wanted str, found nothing"),
        ({"url": 1}, "data.url: wanted str, found 1 (int)"),
        ({"url": "x", "limit": "3"}, "data.limit: wanted int, found '3' (str)"),
        ({"url": "x", "limits": 3}, "data.limits: wanted no such field (did you mean 'limit'?), found 3 (int)"),
        ({"url": "x", "pages": [{"title": 1}]}, "data.pages[0].title: wanted str, found 1 (int)"),
        (Page("x"), "data: wanted Job, found Page(title='x', number=0) (Page)"),
        (PipelineContext(data=3), "data: wanted Job, found 3 (int)"),
    ],
    ids=named,
)
async def test_with_wrong_inputs_nothing_starts(context: Any, essentials: str) -> None:
    witness = Witness()
    pipeline = Pipeline("p", inputs=Job).with_stage("a", witness.of(gives()))
    with pytest.raises(ContractViolation) as caught:
        await pipeline.run(context)
    assert str(caught.value) == (
        "what the run was given as data is not what inputs= of pipeline 'p' declares, Job; change either:\n  "
        + essentials
    )
    assert caught.value.stage is None
    with pytest.raises(ContractViolation):
        async with pipeline.build().open(context):
            raise AssertionError("a run that cannot start is not opened")
    assert witness.entered == []


async def test_inputs_may_be_a_typeddict_or_a_mapping() -> None:
    for declared in (Row, dict[str, int], Mapping[str, int]):
        results = await Pipeline("p", inputs=declared).with_stage("a", data_of, output=list[Any]).run({"id": 1})
        assert results["a"].data == [{"id": 1}]
        with pytest.raises(ContractViolation, match="data"):
            await Pipeline("p", inputs=declared).with_stage("a", data_of).run({"id": "1"})


async def test_a_pipeline_within_a_stage_checks_its_own_inputs() -> None:
    @attrs.frozen
    class Inner:
        fetch: Page

    child = Pipeline("child", inputs=Inner).with_stage("c", data_of, output=list[Inner])
    outer = (
        Pipeline("p")
        .with_stage("fetch", returns({"title": "x"}), output=Page)
        .with_stage("child", child, after="fetch")
    )
    results = await outer.run()
    assert results["child"]["c"] == [Inner(Page("x"))]
    wrong = Pipeline("p").with_stage("fetch", returns({"titel": "x"})).with_stage("child", child, after="fetch")
    results = await results_of(wrong)
    assert states(results) == {"fetch": OK, "child": FAILED}
    error = results.records["child"].error
    assert isinstance(error, ContractViolation)
    assert error.faults[0].path == "data.fetch.title"


async def test_an_item_of_a_map_over_a_pipeline_is_its_input() -> None:
    child = Pipeline("child", inputs=Page).with_stage("c", data_of, output=list[Page])
    pipeline = Pipeline("p").with_map("m", child, over=lambda ctx: [{"title": "a"}, Page("b")])
    results = await pipeline.run()
    assert [item["c"] for item in results["m"].data] == [[Page("a")], [Page("b")]]


async def test_an_item_that_is_no_input_of_the_pipeline_is_an_item_that_failed() -> None:
    child = Pipeline("child", inputs=Page).with_stage("c", data_of, output=list[Page])
    pipeline = Pipeline("p").with_map("m", child, over=lambda ctx: [{"title": "a"}, {"title": 1}], tolerate=1)
    items = (await pipeline.run())["m"].data
    assert [None if item is None else item["c"] for item in items] == [[Page("a")], None]


async def test_the_inputs_of_a_pipeline_are_not_those_of_the_items_of_its_maps() -> None:
    pipeline = Pipeline("p", inputs=Job).with_map("m", data_of, over=lambda ctx: [1, 2])
    results = await pipeline.run({"url": "x"})
    assert results["m"].data == [[1], [2]]


async def test_a_contract_of_a_map_is_for_the_list_of_its_outputs() -> None:
    async def page(ctx: StageContext) -> Mapping[str, object]:
        return {"title": ctx.data}

    for items, state in ((["a"], OK), ([1], FAILED)):
        over = returns_items(items)
        results = await results_of(Pipeline("p").with_map("m", page, over=over, output=list[Page]))
        assert states(results) == {"m": state}


def returns_items(items: list[Any]) -> Any:
    def over(ctx: StageContext) -> list[Any]:
        return items

    return over


# Laws

LEAVES: list[Any] = [int, float, bool, str, type(None), bytes]


def types_of(depth: int) -> st.SearchStrategy[Any]:
    inner = st.sampled_from(LEAVES) if depth == 0 else types_of(depth - 1)
    if depth == 0:
        return inner
    return st.one_of(
        inner,
        inner.map(lambda of: LIST[of]),
        inner.map(lambda of: TUPLE[of, ...]),
        st.tuples(inner, inner).map(lambda both: TUPLE[both]),
        inner.map(lambda of: DICT[str, of]),
        st.tuples(inner, inner).map(lambda both: both[0] | both[1]),
        st.sampled_from(
            [Page, Doc, Tree, Point, Row, Partial, Box[int], Box[list[str]], Colour, Literal["a", 1, True]]
        ),
    )


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "a", "red", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["title", "number", "pages", "value", "children", "x", "y", "id", "name", "item"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def bare(value: Any) -> Any:
    """What JSON would make of it."""
    kind: Any = value.__class__
    if issubclass(kind, enum.Enum):
        return value.value
    if attrs.has(kind):
        return {field.name: bare(getattr(value, field.name)) for field in attrs.fields(kind)}
    if dataclasses.is_dataclass(kind):
        return {field.name: bare(getattr(value, field.name)) for field in dataclasses.fields(kind)}
    if issubclass(kind, dict):
        return {key: bare(item) for key, item in value.items()}
    return [bare(item) for item in value] if issubclass(kind, (list, tuple)) else value


def equal(value: Any, made: Any) -> bool:
    """Whether nothing was made another value; defaults may have been added, and a whole number become a float."""
    kinds: Any = (value.__class__, made.__class__)
    if kinds == (dict, dict):
        return set(value) <= set(made) and all(equal(value[key], made[key]) for key in value)
    if kinds == (list, list):
        return len(value) == len(made) and all(map(equal, value, made))
    return bool(value == made) and kinds in ((int, float), (kinds[1], kinds[1]))


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
# Twenty values in each; with `STAGEFLOW_FULL=1` it is a million of them.
MANY = 50_000 if os.environ.get("STAGEFLOW_FULL") == "1" else 40


@settings(max_examples=MANY, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(declared=types_of(2), values=st.lists(JSON, min_size=20, max_size=20))
def test_values_come_through_equal_or_are_refused_and_never_differ_in_silence(declared: Any, values: list[Any]) -> None:
    for value in values:
        frozen = freeze(value)
        assert frozen == value
        try:
            made = check(declared, frozen)
        except ContractViolation:
            found = [[fault[::2] for fault in faults(declared, each)] for each in (value, frozen)]
            assert found[0] == found[1]
            continue
        assert equal(value, bare(made)), (value, made)
        assert bare(check(declared, freeze(made))) == bare(made)  # and what came through comes through again


PAGES = st.builds(Page, st.text(), st.integers())
INSTANCES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(),
    type(None): st.none(),
    Colour: st.sampled_from(Colour),
    Page: PAGES,
    Doc: st.builds(Doc, st.lists(PAGES), st.none() | st.text()),
    Tree: st.builds(Tree, st.integers(), st.lists(st.builds(Tree, st.integers()))),
    Point: st.builds(Point, st.integers(), st.floats(allow_nan=False)),
    Row: st.fixed_dictionaries({"id": st.integers()}, optional={"name": st.text()}),
    Partial: st.fixed_dictionaries({"id": st.integers()}, optional={"name": st.text()}),
    Box[int]: st.builds(Box, st.integers()),
    Box[list[str]]: st.builds(Box, st.lists(st.text())),
}


def values_of(declared: Any) -> st.SearchStrategy[Any]:
    """What type checkers would call a value of the type."""
    if declared in INSTANCES:
        return INSTANCES[declared]
    origin: Any = getattr(declared, "__origin__", None)
    arguments: Any = declared.__args__
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(st.text(), values_of(arguments[1]), max_size=3)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple and arguments[-1] is ...:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    parts = [values_of(argument) for argument in arguments]
    return st.tuples(*parts) if origin is tuple else st.one_of(parts)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(declared=types_of(2), data=st.data())
def test_a_value_that_is_of_the_type_is_never_refused(declared: Any, data: st.DataObject) -> None:
    value = data.draw(values_of(declared))
    made = check(declared, value)
    assert bare(made) == bare(value)
    assert bare(check(declared, freeze(made))) == bare(made)
