"""What a stage is known by: what changes each part of a fingerprint, and what changes nothing."""

from __future__ import annotations

import enum
import functools
import gc
import importlib.util
import itertools
import json
import linecache
import os
import subprocess
import sys
import textwrap
import typing
import weakref
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, NewType, NotRequired, TypedDict, TypeVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow import (
    DefinitionError,
    Join,
    Pipeline,
    Retry,
    StageContext,
    StageGraph,
    StageKind,
    StageSpec,
    optional,
    stage,
)
from stageflow.graph.fingerprint import Fingerprint, check_former_names, fingerprint, fingerprints
from tests.stages import chain, returns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
_numbers = itertools.count()


async def body(ctx: StageContext) -> None:
    return None


def plain(ctx: StageContext) -> None:
    return None


def written(source: str, name: str = "body", *, line: int = 0, readable: bool = True) -> Any:
    """Gives what a module defines, as if that had been imported from a file of its own."""
    file, text = f"<written {next(_numbers)}>", "\n" * line + textwrap.dedent(source)
    if readable:
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace = dict(globals())
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    return namespace[name]


def imported(path: Path) -> Any:
    """Gives ``body`` of a module in a file."""
    spec = importlib.util.spec_from_file_location(f"imported_{next(_numbers)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.body


def of(runner: Any, pipeline: Pipeline | None = None, /, **options: Any) -> Fingerprint:
    """Gives the fingerprint of a stage that is declared so."""
    pipeline = Pipeline("p", limits={"gpu": 1, "disk": 1}) if pipeline is None else pipeline
    return fingerprints(pipeline.with_stage("x", runner, **options).build())["x"]


def last(pipeline: Pipeline) -> Fingerprint:
    """Gives the fingerprint of the stage that is declared as x."""
    return fingerprints(pipeline.build())["x"]


# Code

SOURCE = '''
async def body(ctx, rows=3, *, flag=None):
    """Reads rows."""
    # the old way
    found = [row for row in ctx.data if row != 'gone']
    total: int = 0
    def inner(row):
        """Adds one."""
        return row + total
    for row in found:
        total += inner(row)
    return {"total": total, **(flag or {})}
'''

SAME = {
    "a comment": ("# the old way", "# a new way, which nobody knows"),
    "a comment less": ("    # the old way\n", ""),
    "the docstring": ("Reads rows.", "Reads all rows."),
    "no docstring": ('    """Reads rows."""\n', ""),
    "the docstring of an inner function": ("Adds one.", "Adds another."),
    "quotes": ("'gone'", '"gone"'),
    "white space": ("row + total", "(row  +  total)"),
    "lines": ("[row for row in ctx.data if row != 'gone']", "[\n  row\n  for row in ctx.data if row != 'gone'\n ]"),
    "an annotation": ("ctx,", "ctx: StageContext,"),
    "an annotation of what is returned": ("flag=None):", "flag=None) -> dict[str, int]:"),
    "an annotation of a default": ("rows=3", "rows: int = 3"),
    "an annotation of a variable less": ("total: int = 0", "total = 0"),
    "a variable that is only annotated": ("    total: int", "    later: str\n    total: int"),
    "an annotation in an inner function": ("inner(row):", "inner(row: int) -> int:"),
    "a pass": ("total += inner(row)", "total += inner(row)\n        pass"),
    "lines above": ("\nasync def", "\nimport os\n\n\nasync def"),
    "lines below": ("\nasync def", "\nasync def before(ctx): ...\nasync def"),
    "its own name": ("\nasync def body", "\nasync def renamed(ctx): ...\nasync def body"),
}

EDITED = {
    "a constant": ("'gone'", "'lost'"),
    "a number": ("total: int = 0", "total: int = 1"),
    "an operator": ("row + total", "row - total"),
    "a name": ("ctx.data", "ctx.metadata"),
    "a statement more": ("    for row", "    print(found)\n    for row"),
    "the order of statements": (
        "    found = [row for row in ctx.data if row != 'gone']\n    total: int = 0\n",
        "    total: int = 0\n    found = [row for row in ctx.data if row != 'gone']\n",
    ),
    "a default": ("rows=3", "rows=4"),
    "a parameter": ("flag=None", "flag=None, other=None"),
    "a default in an inner function": ("inner(row):", "inner(row, by=1):"),
    "a decorator of an inner function": ("    def inner", "    @functools.cache\n    def inner"),
    "what is unpacked": ("**(flag or {})", '"flag": (flag or {})'),
    "none for zero": ("total: int = 0", "total: int = None"),
}


def edited(edit: tuple[str, str]) -> str:
    assert SOURCE.count(edit[0]) == 1
    return SOURCE.replace(*edit)


@pytest.mark.parametrize("edit", SAME.values(), ids=SAME)
def test_what_is_not_done_does_not_count(edit: tuple[str, str]) -> None:
    assert of(written(edited(edit))) == of(written(SOURCE))


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
def test_an_edited_body_changes_the_code_and_nothing_else(edit: tuple[str, str]) -> None:
    assert of(written(edited(edit))).differences(of(written(SOURCE))) == ("code",)


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
def test_an_edited_body_shows_without_its_source(edit: tuple[str, str]) -> None:
    without = [of(written(text, readable=False)) for text in (SOURCE, edited(edit))]
    assert without[0].differences(without[1]) == ("code",)


@pytest.mark.parametrize("edit", ["a comment", "the docstring", "white space", "an annotation", "lines above"])
def test_what_is_not_done_does_not_count_without_the_source(edit: str) -> None:
    without = [of(written(text, readable=False)) for text in (SOURCE, edited(SAME[edit]))]
    assert without[0] == without[1]


def test_a_function_that_can_be_read_is_not_taken_for_an_equal_one_that_cannot() -> None:
    one, other = written(SOURCE), written(SOURCE, readable=False)
    assert one.__code__ == other.__code__
    assert of(other).differences(of(one)) == ("code",)


def test_the_name_of_the_function_does_not_count() -> None:
    assert of(written(SOURCE.replace("def body", "def other"), "other")) == of(written(SOURCE))


def test_a_decorator_that_leaves_the_function_alone_does_not_count() -> None:
    marked = "def mark(function): return function\n@mark\n" + SOURCE.lstrip()
    assert of(written(marked)) == of(written(SOURCE))


def test_the_decorator_of_a_stage_counts_by_its_options_only() -> None:
    assert of(stage(name="y", timeout=5)(body)) == of(body, timeout=5)


def test_a_decorator_that_wraps_the_function_counts_and_so_does_what_it_wraps() -> None:
    source = """
    def wrap(function):
        @functools.wraps(function)
        async def wrapper(ctx):
            return await function(ctx)
        return wrapper

    @wrap
    async def body(ctx):
        return 1
    """
    wrapped, bare = of(written(source)), of(written("async def body(ctx): return 1"))
    assert wrapped.differences(bare) == ("code",)
    assert of(written(source.replace("return 1", "return 2"))).differences(wrapped) == ("code",)
    assert of(written(source.replace("return await", "return None or await"))).differences(wrapped) == ("code",)


def test_a_plain_function_is_not_an_async_one() -> None:
    one, other = written("async def body(ctx): return 1"), written("def body(ctx): return 1")
    assert of(one, timeout=None).differences(of(other)) == ("code",)


@pytest.mark.parametrize("annotation", ["int", "str"])
def test_the_fields_of_a_class_within_count(annotation: str) -> None:
    source = "async def body(ctx):\n    class Page:\n        'A page.'\n        title: str\n    return Page"
    same = of(written(source.replace("str", annotation))) == of(written(source))
    assert same is (annotation == "str")


def test_lambdas_on_one_line_are_told_apart() -> None:
    one, two, again = written("body = [lambda ctx: 1, lambda ctx: 2, lambda ctx:  1  # again\n]")
    assert of(one).differences(of(two)) == ("code",)
    assert of(one) == of(again)


def test_sets_in_a_lambda_have_no_order() -> None:
    one, other = written("body = [lambda ctx: 1 in {1, 9, 5}, lambda ctx: 1 in {5, 1, 9}]")
    assert of(one) == of(other)


def test_numbers_that_are_too_long_to_print_are_read() -> None:
    source = f"async def body(ctx): return 0x{'f' * 9999}"
    assert of(written(source)) != of(written(source.replace("fff", "ffe", 1)))
    assert of(written(source, readable=False)) == of(written(source, readable=False))


def test_an_expression_that_is_very_deep_is_read() -> None:
    source = f"async def body(ctx): return {' + '.join(['ctx'] * 800)}"
    assert of(written(source)) != of(written(source + " + ctx"))


def test_a_file_may_be_moved(tmp_path: Path) -> None:
    for name in ("one.py", "other.py"):
        (tmp_path / name).write_text(SOURCE)
    assert of(imported(tmp_path / "one.py")) == of(imported(tmp_path / "other.py"))


def test_a_file_that_was_edited_since_does_not_say_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "stages.py"
    path.write_text(SOURCE)
    running = imported(path)
    path.write_text(edited(EDITED["a constant"]) + "# and longer\n")
    assert of(running) == of(written(SOURCE, readable=False))
    assert of(running) != of(imported(path))


def test_a_file_in_which_something_was_inserted_since_still_says_it(tmp_path: Path) -> None:
    path = tmp_path / "stages.py"
    path.write_text(SOURCE)
    running = imported(path)
    path.write_text(f"import os\n\n\n{SOURCE}")
    assert of(running) == of(written(SOURCE))


def test_a_file_that_cannot_be_parsed_any_more_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "stages.py"
    path.write_text(SOURCE)
    running = imported(path)
    path.write_text("def (:")
    assert of(running) == of(written(SOURCE, readable=False))


def test_reading_a_file_again_warns_of_nothing() -> None:
    source = "async def body(ctx): return 1 if ctx is None else '{}'".format(r"\\d")
    assert of(written(source)) == of(written(source, line=3))


# What a function holds


def count(ctx: StageContext, by: object = None, *more: object, **named: object) -> None:
    return None


def recount(ctx: StageContext, by: object = None, *more: object, **named: object) -> None:
    return print()


def after_another(value: object, ctx: StageContext) -> None:
    return None


partial = functools.partial


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Thing:
    def __init__(self, value: object = None) -> None:
        self.value = value


class Other:
    pass


def holding(value: object) -> Any:
    async def holder(ctx: StageContext) -> object:
        return value

    return holder


def by_default(value: object) -> Any:
    async def defaulted(ctx: StageContext, value: object = value, *, again: object = value) -> object:
        return value

    return defaulted


def by_argument(value: object) -> Any:
    return partial(count, by=value)


def by_position(value: object) -> Any:
    return partial(after_another, value)


HOLDERS: list[Callable[[object], Any]] = [holding, by_default, by_argument, by_position]
UNLIKE: dict[str, tuple[object, object]] = {
    "numbers": (1, 2),
    "a number and its float": (1, 1.0),
    "a number and a truth": (1, True),
    "a number and its text": (1, "1"),
    "texts": ("a", "b"),
    "a text and its bytes": ("a", b"a"),
    "nothing and its text": (None, "None"),
    "tuples": ((1, ("a",)), (1, ("b",))),
    "a tuple and its text": ((1,), "(1)"),
    "frozen sets": (frozenset({1, 2}), frozenset({1, 3})),
    "members of an enumeration": (Colour.RED, Colour.BLUE),
    "classes": (Thing, Other),
    "objects of several classes": (Thing(), Other()),
    "an object and its class": (Thing(), Thing),
    "functions": (count, recount),
    "partial functions": (partial(count, by=1), partial(count, by=2)),
}
ALIKE: dict[str, tuple[object, object]] = {
    "equal tuples": ((1, ("a", None)), (1, ("a", None))),
    "objects of one class": (Thing(1), Thing(2)),
    "lists": ([1], [2]),
    "a function that is written twice": (holding(1), holding(1)),
}


@pytest.mark.parametrize("hold", HOLDERS)
@pytest.mark.parametrize("pair", UNLIKE.values(), ids=UNLIKE)
def test_a_function_counts_by_the_constants_that_it_holds(
    hold: Callable[[object], Any], pair: tuple[object, object]
) -> None:
    one, other = map(hold, pair)
    assert of(one).differences(of(other)) == ("code",)


@pytest.mark.parametrize("hold", HOLDERS)
@pytest.mark.parametrize("pair", ALIKE.values(), ids=ALIKE)
def test_a_function_does_not_count_by_the_state_of_what_it_holds(
    hold: Callable[[object], Any], pair: tuple[object, object]
) -> None:
    one, other = map(hold, pair)
    assert of(one) == of(other)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(), st.tuples))
def test_a_constant_counts_the_same_every_time(value: object) -> None:
    assert of(holding(value)) == of(holding(value))


def test_the_order_of_named_arguments_does_not_count() -> None:
    assert of(partial(count, a=1, b=2)) == of(partial(count, b=2, a=1))


def test_a_partial_function_is_not_the_function() -> None:
    assert of(partial(count)).differences(of(count)) == ("code",)


def test_a_function_that_holds_itself_is_read() -> None:
    def recursive(step: int) -> Any:
        async def again(ctx: StageContext) -> Any:
            return again if ctx.attempt == step else other

        async def other(ctx: StageContext) -> Any:
            return again

        return again

    assert of(recursive(1)) == of(recursive(1))
    assert of(recursive(1)) != of(recursive(2))


def test_a_function_whose_variables_are_not_set_yet_is_read() -> None:
    async def early(ctx: StageContext) -> object:
        return later

    found = of(early)
    later = 3
    assert found != of(early)
    assert later


METHOD = """
class {name}:
    def __init__(self, state=None):
        self.state = state
    async def execute(self, ctx):
        '''Does it.'''
        return {returned}
    async def __call__(self, ctx):
        return {returned}
    async def run(self, ctx):
        return {returned}
"""


def made(name: str = "Work", returned: int = 1) -> Any:
    return written(METHOD.format(name=name, returned=returned), name)


def callable_only(kind: Any) -> Any:
    """Gives an instance that has no execute."""
    del kind.execute
    return kind()


WAYS: dict[str, Callable[[Any], Any]] = {
    "a class of stages": lambda kind: kind,
    "an instance": lambda kind: kind(),
    "a bound method": lambda kind: kind().run,
    "something callable": callable_only,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_object_counts_by_its_method(way: Callable[[Any], Any]) -> None:
    assert of(way(made(returned=1))) == of(way(made(returned=1)))
    assert of(way(made(returned=1))).differences(of(way(made(returned=2)))) == ("code",)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_object_counts_by_the_name_of_its_class(way: Callable[[Any], Any]) -> None:
    assert of(way(made("Work"))).differences(of(way(made("Toil")))) == ("code",)


def test_a_class_of_stages_is_known_as_its_instances_are_whatever_their_state() -> None:
    kind = made()
    assert of(kind) == of(kind()) == of(kind(state=3))


def test_what_is_written_in_c_counts_by_its_name() -> None:
    assert of(print) == of(print)
    assert of(print).differences(of(repr)) == ("code",)


def test_a_cached_function_counts_by_what_is_cached() -> None:
    cached = functools.lru_cache
    assert of(cached(count)) == of(cached(count))
    assert of(cached(count)).differences(of(cached(recount))) == ("code",)


# Version


def test_a_declared_version_stands_for_the_code() -> None:
    assert of(body, version="2").code == "version:2"
    assert of(body, version="2") == of(returns(3), version="2")


def test_another_version_is_a_difference_and_so_is_one_that_is_new_or_gone() -> None:
    two = of(body, version="2")
    assert two.differences(of(body, version="3")) == ("version",)
    assert two.differences(of(body)) == ("version",)
    assert of(body).differences(two) == ("version",)


def test_a_version_does_not_cover_what_is_nested() -> None:
    def outer(value: int, version: str = "1") -> Fingerprint:
        return of(Pipeline("inner").with_stage("y", returns(value)), version=version)

    assert outer(1) == outer(1)
    assert outer(1).differences(outer(2)) == ("code",)
    assert outer(1).differences(outer(1, "2")) == ("version",)
    assert outer(1).differences(outer(2, "2")) == ("version", "code")


def test_a_version_within_covers_the_code_within() -> None:
    def outer(value: int, version: str) -> Fingerprint:
        return of(Pipeline("inner").with_stage("y", returns(value), version=version))

    assert outer(1, "1") == outer(2, "1")
    assert outer(1, "1").differences(outer(1, "2")) == ("code",)


# Contract


@attrs.frozen
class Node:
    value: int
    after: Node | None = None


class Row(NamedTuple):
    number: int


class Keys(TypedDict):
    title: str
    pages: NotRequired[int]


@attrs.frozen
class Box(Generic[T]):
    content: T
    inner: Box[T] | None = None


Number = NewType("Number", int)

CLASS = """
import attrs, dataclasses, enum
from typing import *
@{kind}
class {name}{bases}:
    {fields}
"""


def page(
    kind: str = "attrs.frozen", *, title: str = "str", more: str = "pages: int", bases: str = "", name: str = "Page"
) -> Any:
    return written(CLASS.format(kind=kind, fields=f"title: {title}; {more}", bases=bases, name=name), name)


def typed_dict(**arguments: str) -> Any:
    return page("final", bases="(TypedDict)", **arguments)


def colours(**members: object) -> Any:
    return enum.Enum("Colours", members)


CONTRACTS: dict[str, tuple[Any, Any]] = {
    "no contract": (dict[str, int], Any),
    "elements": (list[int], list[str]),
    "containers": (list[int], set[int]),
    "values of a mapping": (dict[str, int], dict[str, float]),
    "a tuple of one or many": (tuple[int], tuple[int, ...]),
    "optional": (dict[str, int], dict[str, int] | None),
    "a union": (int | str, int | bytes),
    "literals": (Literal["a", "b"], Literal["a"]),
    "literals of another type": (Literal[1], Literal["1"]),
    "a class": (page(), page(name="Leaf")),
    "the type of a field": (page(), page(title="bytes")),
    "a field more": (page(), page(more="pages: int; more: int")),
    "the name of a field": (page(), page(more="sheets: int")),
    "a default": (page(), page(more="pages: int = 0")),
    "a dataclass": (page("dataclasses.dataclass"), page("dataclasses.dataclass", title="bytes")),
    "a TypedDict": (typed_dict(), typed_dict(title="bytes")),
    "what a TypedDict needs": (typed_dict(), typed_dict(more="pages: NotRequired[int]")),
    "a class for a TypedDict": (page(), typed_dict()),
    "a field of what is in a field": (page(title="page()"), page(title="page(title='bytes')")),
    "what is in a list of a class": (list.__class_getitem__(page()), list.__class_getitem__(page(title="bytes"))),
    "a member more": (colours(RED=1), colours(RED=1, BLUE=2)),
    "the value of a member": (colours(RED=1), colours(RED=2)),
    "an argument of a generic class": (Box[int], Box[str]),
    "a named tuple": (Row, NamedTuple("Row", [("number", str)])),
}


@pytest.mark.parametrize("pair", CONTRACTS.values(), ids=CONTRACTS)
def test_another_type_of_output_changes_the_contract_and_nothing_else(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert of(body, output=one).differences(of(body, output=other)) == ("contract",)


SAME_CONTRACTS: dict[str, tuple[Any, Any]] = {
    "another class with the same fields": (page(), page()),
    "the order of fields": (
        typed_dict(title="str; pages: int", more="more: str"),
        typed_dict(more="more: str; pages: int"),
    ),
    "the order of members": (colours(RED=1, BLUE=2), colours(BLUE=2, RED=1)),
    "the order of a union": (int | str | None, None | str | int),
    "the order of literals": (Literal["a", "b"], Literal["b", "a"]),
    "the old way to write it": (typing.Optional[typing.List[int]], list[int] | None),  # noqa: UP006, UP045
    "an annotated type": (Annotated[int, "positive"], int),
    "a new type": (Number, int),
    "a new type within": (list[Number], list[int]),
}


@pytest.mark.parametrize("pair", SAME_CONTRACTS.values(), ids=SAME_CONTRACTS)
def test_a_type_that_is_only_written_differently_changes_nothing(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert of(body, output=one) == of(body, output=other)


@pytest.mark.parametrize("type_", [Node, list[Node], Box[int], Box[Node]])
def test_a_type_that_has_itself_within_is_read(type_: Any) -> None:
    assert of(body, output=type_) == of(body, output=type_)
    assert of(body, output=type_) != of(body)


def test_what_a_typed_stage_takes_is_its_contract() -> None:
    source = "def body(rows: list[int], limit: int = 3) -> dict[str, int]: return {}"
    found = of(written(source))
    for before, after in (("list[int]", "list[str]"), ("limit: int", "limit: int | None"), ("dict[str, int]", "dict")):
        assert of(written(source.replace(before, after))).differences(found) == ("contract",)
    assert of(written(source.replace("limit: int = 3", "limit: int"))).differences(found) == ("code", "contract")


def test_the_context_of_a_typed_stage_is_no_part_of_its_contract() -> None:
    source = "def body(rows: list[int], ctx: StageContext) -> None: return None"
    assert of(written(source.replace(", ctx: StageContext", ""))).differences(of(written(source))) == ("code",)


def test_a_typed_stage_may_take_what_cannot_be_hashed() -> None:
    def takes(type_: Any) -> Fingerprint:
        async def typed(y: Any, z: int) -> None:
            return None

        typed.__annotations__["y"] = type_
        return of(typed, Pipeline("p").with_stage("y", body, output=int))

    assert takes(Annotated[int, []]) == takes(int)


# Edges


def among(**options: Any) -> Fingerprint:
    pipeline = Pipeline("p").with_stage("a", body).with_stage("b", body).with_stage("c", body)
    return of(body, pipeline, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"after": "a"},
        {"after": ["a", "b", "c"]},
        {"after": ["a", optional("b")]},
        {"after": ["a", "c"]},
        {"after": ["a", "b"], "join": "any"},
        {"after": ["a", "b"], "join": Join.n_of(1)},
        {"after": ["a", "b"], "join": Join.n_of(2)},
    ],
)
def test_what_a_stage_comes_after_changes_the_edges_and_nothing_else(options: Any) -> None:
    assert among(**options).differences(among(after=["a", "b"])) == ("edges",)


def test_the_order_of_what_a_stage_comes_after_does_not_count() -> None:
    assert among(after=["b", optional("c"), "a"]) == among(after=["a", "b", optional("c")])


def test_a_parameter_that_stands_for_a_stage_is_an_edge() -> None:
    async def takes(rows: object, limit: int) -> None:
        return None

    alone, bound = of(takes), of(takes, Pipeline("p").with_stage("rows", body))
    assert alone.differences(bound) == ("edges",)


def test_a_stage_under_its_former_name_is_the_same_edge() -> None:
    def renamed(name: str) -> StageGraph:
        return Pipeline("p").with_stage(name, body).with_stage("x", body, after=name).build()

    before, after = renamed("old"), renamed("new")
    assert fingerprints(after)["x"].differences(fingerprints(before)["x"]) == ("edges",)
    assert fingerprints(after, known_as={"new": "old"})["x"] == fingerprints(before)["x"]
    spec = after.stages["x"]
    assert fingerprint(spec, after.settings, known_as={"new": "old"}) == fingerprints(before)["x"]


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_declaration_does_not_matter(order: list[str]) -> None:
    edges = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}

    def build(order: list[str]) -> StageGraph:
        pipeline = Pipeline("p")
        for name in order:
            pipeline = pipeline.with_stage(name, holding(name), after=edges[name])
        return pipeline.build()

    assert fingerprints(build(order)) == fingerprints(build(sorted(order)))


# Policy


def always(ctx: StageContext) -> bool:
    return True


POLICIES: dict[str, dict[str, Any]] = {
    "kind": {"kind": StageKind.AGENT},
    "timeout": {"timeout": 5},
    "no timeout": {"timeout": None},
    "total_timeout": {"total_timeout": 5},
    "heartbeat": {"heartbeat": 5},
    "retry": {"retry": Retry()},
    "on_failure": {"on_failure": "tolerate"},
    "uses": {"uses": "gpu"},
    "when": {"when": always},
}
RETRIES: dict[str, Any] = {
    "attempts": {"attempts": 4},
    "delay": {"delay": 1},
    "factor": {"factor": 3},
    "max_delay": {"max_delay": 30},
    "jitter": {"jitter": 0.5},
    "on": {"on": OSError},
}


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_how_a_stage_is_run_changes_the_policy_and_nothing_else(options: dict[str, Any]) -> None:
    assert of(body, **options).differences(of(body)) == ("policy",)


@pytest.mark.parametrize("options", RETRIES.values(), ids=RETRIES)
def test_how_a_stage_is_tried_again_changes_the_policy(options: dict[str, Any]) -> None:
    assert of(body, retry=Retry(**options)).differences(of(body, retry=Retry())) == ("policy",)


@pytest.mark.parametrize("option", ["abandon_on_cancel", "processes"])
def test_where_a_plain_function_runs_is_policy(option: str) -> None:
    assert of(plain, None, **{option: True}).differences(of(plain)) == ("policy",)


def test_a_condition_counts_by_its_code() -> None:
    one, two, again = written("body = [lambda ctx: 1, lambda ctx: 2, lambda ctx: 1]")
    assert of(body, when=one).differences(of(body, when=two)) == ("policy",)
    assert of(body, when=one) == of(body, when=again)


def test_the_same_policy_in_other_words_changes_nothing() -> None:
    assert of(body, timeout=5, kind="work", uses=["gpu", "disk"]) == of(
        body, timeout=5.0, kind=StageKind.WORK, uses=("disk", "gpu")
    )
    assert of(body, retry=Retry(delay=1, on=(OSError, KeyError))) == of(
        body, retry=Retry(delay=1.0, on=(KeyError, OSError, KeyError))
    )


def test_priority_and_interceptors_and_where_it_was_declared_change_nothing() -> None:
    async def around(ctx: StageContext, proceed: Any) -> Any:
        return await proceed()

    assert of(body, priority=3) == of(body)
    assert of(body, Pipeline("other", interceptors=[around], deadline=3, max_running=2)) == of(body)
    assert of(body, aka="y") == of(body)


def test_what_the_pipeline_says_counts_for_a_stage_that_does_not_say_it() -> None:
    other = Pipeline("p", default_timeout=5, on_failure="drain")
    assert of(body, other).differences(of(body)) == ("policy",)
    assert of(body, other) == of(body, timeout=5, on_failure="drain")
    assert of(body, other, timeout=7, on_failure="isolate") == of(body, timeout=7, on_failure="isolate")


def test_a_default_limit_is_not_for_what_it_is_not_for() -> None:
    other = Pipeline("p", default_timeout=5)
    assert of(plain, other) == of(plain)


# What runs others


def nesting(runner: Any = body, *, name: str = "y", settings: Any = None, **options: Any) -> Fingerprint:
    inner: dict[str, Any] = settings or {}
    return of(Pipeline("inner", **inner).with_stage("before", body).with_stage(name, runner, **options))


def mapping(runner: Any = body, *, name: str = "x", over: Any = "items", **options: Any) -> Fingerprint:
    pipeline = Pipeline("p").with_stage("items", body).with_stage("others", body)
    return fingerprints(pipeline.with_map(name, runner, over=over, **options).build())[name]


NESTED: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"runner": plain, "timeout": None}, "code"),
    "contract": ({"output": dict[str, int]}, "contract"),
    "edges": ({"after": "before"}, "edges"),
    "policy": ({"retry": Retry()}, "policy"),
    "the deadline of the run within": ({"settings": {"deadline": 3}}, "policy"),
    "the inputs of the run within": ({"settings": {"inputs": Keys}}, "contract"),
}


@pytest.mark.parametrize(("options", "what"), NESTED.values(), ids=NESTED)
def test_a_stage_that_is_a_pipeline_counts_by_all_of_its_stages(options: dict[str, Any], what: str) -> None:
    found = nesting(**options).differences(nesting(timeout=None) if "timeout" in options else nesting())
    assert found == (what,)


def test_the_names_of_the_stages_within_count() -> None:
    assert nesting(name="z").differences(nesting()) == ("code", "contract", "edges", "policy")


def test_a_stage_deep_within_counts() -> None:
    def deep(value: int) -> Fingerprint:
        inner = Pipeline("0").with_stage("y", returns(value))
        for number in range(1, 5):
            inner = Pipeline(str(number)).with_stage("y", inner)
        return of(inner)

    assert deep(1) == deep(1)
    assert deep(1).differences(deep(2)) == ("code",)


MAPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "limit": ({"limit": 3}, ("policy",)),
    "tolerate": ({"tolerate": 1}, ("policy",)),
    "a part that is tolerated": ({"tolerate": 0.0}, ("policy",)),
    "its own policy": ({"retry": Retry()}, ("policy",)),
    "its own contract": ({"output": list[int]}, ("contract",)),
    "the code of an item": ({"runner": returns(1)}, ("code",)),
    "the policy of an item": ({"runner": stage(timeout=5)(body)}, ("policy",)),
    "over": ({"over": "others", "after": "items"}, ("edges",)),
    "over a function": ({"over": plain, "after": "items"}, ("code", "edges")),
}


@pytest.mark.parametrize(("options", "what"), MAPS.values(), ids=MAPS)
def test_a_map_counts_by_its_items_and_how_it_goes_over_them(options: dict[str, Any], what: tuple[str, ...]) -> None:
    assert mapping(**options).differences(mapping()) == what


def test_another_function_that_a_map_goes_over_is_code() -> None:
    one, two, again = written("body = [lambda ctx: [1], lambda ctx: [2], lambda ctx: [1]]")
    assert mapping(over=one).differences(mapping(over=two)) == ("code",)
    assert mapping(over=one) == mapping(over=again)


def test_a_map_of_a_pipeline_is_not_the_pipeline() -> None:
    inner = Pipeline("inner").with_stage("y", body)
    assert mapping(inner).differences(mapping(body)) == ("code", "contract", "edges", "policy")


def test_the_name_of_a_map_does_not_count() -> None:
    assert mapping(name="renamed") == mapping()


# Asking


def test_fingerprints_are_those_of_every_stage() -> None:
    graph = chain(3).build()
    found = fingerprints(graph)
    assert found == {name: fingerprint(spec, graph.settings) for name, spec in graph.stages.items()}


def test_fingerprints_are_kept_as_long_as_the_graph() -> None:
    graph = chain(3).build()
    found = fingerprints(graph)
    assert fingerprints(graph) is found
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None
    assert found


def test_a_fingerprint_goes_through_a_journal() -> None:
    found = of(body, version="2")
    data = json.loads(json.dumps(found.as_dict()))
    assert Fingerprint.from_dict(data) == found
    assert Fingerprint.from_dict({**data, "later": "more"}) == found
    with pytest.raises(KeyError):
        Fingerprint.from_dict({"code": "1"})


def test_digests_are_sixteen_hexadecimal_digits() -> None:
    assert {len(bytes.fromhex(digest)) for digest in of(body).as_dict().values()} == {8}


def test_differences_come_in_one_order_whichever_side_is_asked() -> None:
    one, other = of(body), mapping(retry=Retry(), output=list[int], runner=plain)
    assert one.differences(other) == other.differences(one) == ("code", "contract", "edges", "policy")
    assert one.differences(one) == ()


SCRIPT = """
import attrs, enum, functools, json
from typing import Literal
from stageflow import Pipeline, Retry
from stageflow.graph.fingerprint import fingerprints

Colours = enum.Enum("Colours", "RED BLUE GREEN")

@attrs.frozen
class Page:
    title: str | bytes | int | None
    colour: Colours | Literal["a", "b", "c"]

def closure(value, other):
    async def body(ctx):
        return value, other, ctx in {"a", "b", "c"}
    return body

async def typed(first: Page, second: int | str = 3) -> Page | None:
    return None

pipeline = (
    Pipeline("p", limits={"gpu": 1, "disk": 1, "net": 1})
    .with_stage("first", closure(frozenset("abcdef"), object()), output=Page, uses={"gpu", "disk", "net"})
    .with_stage("second", lambda ctx: ctx in {"a", "b", "c"}, when=lambda ctx: ctx in {"d", "e", "f"})
    .with_stage("typed", typed, retry=Retry(on=(OSError, KeyError, ValueError)))
    .with_stage("partial", functools.partial(lambda ctx, **more: None, x={1}, y=object(), z=print))
    .with_map("map", typed, over=lambda ctx: {"x", "y", "z"}, after={"first", "second", "typed"})
)
print(json.dumps({name: each.as_dict() for name, each in fingerprints(pipeline.build()).items()}))
"""


def test_fingerprints_are_the_same_in_every_process_and_in_every_place(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    for seed in ("1", "2"):
        place = tmp_path / seed
        place.mkdir()
        (place / f"script_{seed}.py").write_text("\n" * int(seed) + SCRIPT)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        script = [sys.executable, str(place / f"script_{seed}.py")]
        said.append(json.loads(subprocess.run(script, env=environment, check=True, capture_output=True).stdout))
    assert said[0] == said[1]
    assert list(said[0]) == ["first", "second", "partial", "typed", "map"]


def test_thousands_of_stages_that_share_a_function_cost_a_few_calls_each() -> None:
    fingerprints(chain(1, body).build())  # which reads this file, once
    graph = chain(2_000, body).build()
    calls = 0

    def count_calls(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count_calls)
    try:
        fingerprints(graph)
    finally:
        sys.setprofile(before)
    assert calls < 25 * len(graph)


# Former names


def specs(*pipelines: Pipeline) -> list[StageSpec]:
    return [spec for pipeline in pipelines for spec in pipeline.build().stages.values()]


def test_former_names_that_mean_one_stage_each_are_fine() -> None:
    check_former_names(specs(Pipeline("p").with_stage("a", body, aka=["b", "c"]).with_stage("d", body, aka="e")))


@pytest.mark.parametrize("first", [True, False])
def test_a_former_name_may_not_be_the_name_of_another_stage(first: bool) -> None:
    renamed, other = Pipeline("p").with_stage("new", body, aka="old"), Pipeline("p").with_stage("old", body)
    with pytest.raises(
        DefinitionError, match=r"aka= of stage 'new'.*'old', which is the name of stage 'old'"
    ) as caught:
        check_former_names(specs(renamed, other) if first else specs(other, renamed))
    assert (caught.value.stage, caught.value.option) == ("new", "aka")


def test_two_stages_may_not_have_had_the_same_name() -> None:
    both = Pipeline("p").with_stage("a", body, aka="old").with_stage("b", body, aka=["older", "old"])
    with pytest.raises(DefinitionError, match=r"aka= of stage 'b'.*'old', which is a former name also of stage 'a'"):
        check_former_names(specs(both))


def test_a_stage_that_got_its_former_name_by_composing_is_fine() -> None:
    inner = Pipeline("inner").with_stage("a", body, aka="left.a")
    check_former_names(specs(Pipeline("p").compose(inner, prefix="left.")))
