"""Declaring pipelines: what one may write, and that every mistake shows where it was written."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from stageflow import (
    CycleError,
    DefinitionError,
    DefinitionWarning,
    DuplicateStageError,
    Join,
    OnFailure,
    Pipeline,
    Stage,
    StageContext,
    StageGraph,
    StageKind,
    StageOptions,
    StageOutput,
    StageSpec,
    UnknownStageError,
    optional,
    run_stage,
    stage,
)
from stageflow.stages import DEFAULT, Dependency
from tests.stages import OK, chain, gives, returns, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

HERE = "test_declaring.py"


async def body(ctx: StageContext) -> Mapping[str, object]:
    return {"by": ctx.stage}


class ByClass:
    """A stage that counts how often it was made, and how often it ran."""

    name = "by class"
    kind = StageKind.WORK
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.ran = 0

    async def execute(self, ctx: StageContext) -> Mapping[str, object]:
        self.ran += 1
        return {"made": self.made, "ran": self.ran}


class ByProperties:
    """The protocol to the letter."""

    @property
    def name(self) -> str:
        return "by properties"

    @property
    def kind(self) -> StageKind:
        return StageKind.AGENT

    async def execute(self, ctx: StageContext) -> StageOutput:
        return StageOutput.ok(by=ctx.stage)


class OnlyExecute:
    async def execute(self, ctx: StageContext) -> None:
        return None


class Callee:
    async def __call__(self, ctx: StageContext) -> Mapping[str, object]:
        return {"by": ctx.stage}

    async def method(self, ctx: StageContext) -> Mapping[str, object]:
        return {"by": ctx.stage}


async def with_more(prefix: str, ctx: StageContext, *, suffix: str = "") -> Mapping[str, object]:
    return {"by": prefix + ctx.stage + suffix}


# Runners

RUNNERS: dict[str, tuple[Any, Mapping[str, object]]] = {
    "async function": (body, {"by": "s"}),
    "class": (ByClass, {"made": 1, "ran": 1}),
    "class with properties": (ByProperties, {"by": "s"}),
    "class without a name": (OnlyExecute, {}),
    "instance": (ByProperties(), {"by": "s"}),
    "instance without a name": (OnlyExecute(), {}),
    "partial": (functools.partial(with_more, "p-", suffix="!"), {"by": "p-s!"}),
    "method": (Callee().method, {"by": "s"}),
    "callable": (Callee(), {"by": "s"}),
    "partial of a method": (functools.partial(Callee().method), {"by": "s"}),
    "decorated": (stage(body), {"by": "s"}),
    "lambda of nothing but attributes": (returns({"x": 1}), {"x": 1}),
}


@pytest.mark.parametrize(("runner", "output"), RUNNERS.values(), ids=RUNNERS)
async def test_everything_that_is_an_async_stage_may_be_declared(runner: Any, output: Mapping[str, object]) -> None:
    ByClass.made = 0
    results = await Pipeline("p").with_stage("s", runner).run()
    assert results["s"].data == output
    ByClass.made = 0
    assert (await run_stage(runner)).data.keys() == output.keys()


async def test_a_class_is_instantiated_once_per_run() -> None:
    ByClass.made = 0
    graph = Pipeline("p").with_stage(ByClass).with_stage("again", ByClass, after="by class").build()
    assert ByClass.made == 0
    for run in range(3):
        results = await graph.run()
        assert results["by class"] == StageOutput.ok(made=2 * run + 1, ran=1)
        assert results["again"] == StageOutput.ok(made=2 * run + 2, ran=1)


async def test_an_instance_serves_all_runs() -> None:
    instance = ByClass()
    graph = Pipeline("p").with_stage(instance).build()
    assert [(await graph.run())["by class"]["ran"] for _ in range(3)] == [1, 2, 3]
    assert isinstance(instance, Stage)


@pytest.mark.parametrize(
    ("runner", "name", "kind"),
    [
        (ByClass, "by class", StageKind.WORK),
        (ByClass(), "by class", StageKind.WORK),
        (ByProperties(), "by properties", StageKind.AGENT),
        (stage(body), "body", StageKind.TRANSFORM),
        (stage(name="other", kind="guard")(body), "other", StageKind.GUARD),
    ],
)
def test_a_stage_may_bring_its_name_and_kind(runner: Any, name: str, kind: StageKind) -> None:
    spec = Pipeline("p").with_stage(runner).build().stages[name]
    assert spec.kind is kind
    assert Pipeline("p").with_stage("mine", runner, kind="route").build().stages["mine"].kind is StageKind.ROUTE


def test_a_decorated_function_carries_its_options_and_is_still_a_function() -> None:
    @stage(after="fetch", timeout=5, join="settled", on_failure="tolerate")
    async def count(ctx: StageContext) -> None:
        """Counts."""

    assert (getattr(count, "__name__", ""), count.__doc__, count.name) == ("count", "Counts.", "count")
    assert isinstance(count, Stage)
    graph = Pipeline("p").with_stage("fetch", body).with_stage(count).with_stage("c2", count, timeout=7).build()
    first, second = graph.stages["count"], graph.stages["c2"]
    assert first.after == second.after == (Dependency("fetch"),)
    assert first.join == second.join == Join.SETTLED
    assert first.on_failure is second.on_failure is OnFailure.TOLERATE
    assert (first.timeout, second.timeout) == (5.0, 7.0)


async def test_a_decorated_function_can_be_called_and_run_alone() -> None:
    @stage
    async def double(ctx: StageContext) -> Mapping[str, object]:
        return {"n": ctx.data["n"] * 2}

    assert await run_stage(double, {"n": 4}) == StageOutput.ok(n=8)
    seen: list[StageContext] = []

    async def calls(ctx: StageContext) -> object:
        seen.append(ctx)
        return await double(ctx)

    assert (await Pipeline("p").with_stage("calls", calls).run({"n": 5}))["calls"]["n"] == 10


def test_options_are_read_as_members_or_their_lower_case_names() -> None:
    spec = (
        Pipeline("p", on_failure="isolate")
        .with_stage("a", body)
        .with_stage("b", body)
        .with_stage("c", body, after=["a", optional("b")], join="quorum", kind="enrich", on_failure="drain", timeout=2)
        .build()
        .stages["c"]
    )
    assert spec.join is Join.QUORUM
    assert spec.kind is StageKind.ENRICH
    assert spec.on_failure is OnFailure.DRAIN
    assert spec.timeout == 2.0
    assert spec.after == (Dependency("a"), Dependency("b", required=False))
    assert spec.declared_at is not None
    assert spec.declared_at[0].endswith(HERE)


def test_what_is_not_said_is_left_to_the_pipeline() -> None:
    spec = chain(1).build().stages["s0"]
    assert spec.timeout is DEFAULT
    assert spec.on_failure is DEFAULT
    assert (spec.kind, spec.join, spec.when, spec.after) == (StageKind.TRANSFORM, Join.ALL, None, ())


def test_the_options_of_stages_are_the_same_wherever_one_declares_them() -> None:
    fields = set(inspect.signature(StageSpec).parameters)
    assert set(StageOptions.__annotations__) == fields - {
        "name",
        "runner",
        "body",
        "declared_at",
        "plain",
        "unlimited",
        "typed",
        "sources",
        "bind",
    }


# Mistakes


async def generator(ctx: StageContext) -> AsyncIterator[int]:  # noqa: ASYNC900  # a mistake, to be refused
    yield 1


def plain(ctx: StageContext) -> None:
    return None


def plain_generator(ctx: StageContext) -> Iterator[int]:
    yield 1


async def two_arguments(one, two) -> None:  # type: ignore[no-untyped-def]
    return None


class NeedsArguments(OnlyExecute):
    def __init__(self, url: str) -> None:
        self.url = url


class PlainExecute:
    def execute(self, ctx: StageContext) -> None:
        return None


async def async_condition(ctx: StageContext) -> bool:
    return True


decorate: Any = stage  # as those write it who check no types


def declared(*arguments: Any, **options: Any) -> Callable[[], Pipeline]:
    return lambda: Pipeline("p").with_stage("a", body).with_stage(*arguments, **options)


MISTAKES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no pipeline name": (lambda: Pipeline(""), ["pipeline", "name"]),
    "an empty name": (declared("", body), ["a stage needs a name", "''"]),
    "a padded name": (declared(" x", body), ["white space", "' x'"]),
    "a name that is none": (declared(3, body), ["name", "3"]),
    "a duplicate name": (declared("a", body), ["'a'", f"{HERE}:", "unique"]),
    "no runner": (declared("x"), ["'x'", "no runner", "with_stage('x', runner)"]),
    "no name": (declared(body), ["body has no name of its own", "with_stage("]),
    "after itself": (declared("x", body, after="x"), ["'x' → 'x'"]),
    "after one twice": (declared("x", body, after=["a", optional("a")]), ["'x'", "'a' twice"]),
    "after nothing of the kind": (declared("x", body, after=3), ["after= of stage 'x'", "3"]),
    "after a list of such": (declared("x", body, after=["a", 3]), ["after= of stage 'x'", "3"]),
    "after an empty name": (declared("x", body, after=""), ["after= of stage 'x'", "''"]),
    "optional nothing": (lambda: optional(""), ["optional()", "''"]),
    "an unknown join": (
        declared("x", body, join="anyone"),
        ["join= of stage 'x' is 'anyone'", "did you mean 'any'", "'any_settled'"],
    ),
    "a join by number in words": (declared("x", body, after="a", join="n_of"), ["Join.n_of(2)"]),
    "a join of more than there are": (declared("x", body, after="a", join=Join.n_of(2)), ["'x'", "2 of 1"]),
    "a join of none": (lambda: Join.n_of(0), ["at least 1", "0"]),
    "an unknown kind": (declared("x", body, kind="router"), ["'x'", "'router'", "'route'"]),
    "an unknown policy": (declared("x", body, on_failure="retry"), ["'x'", "'retry'", "'tolerate'"]),
    "a policy for single stages": (lambda: Pipeline("p", on_failure="tolerate"), ["tolerate", "with_stage()"]),
    "a negative limit": (declared("x", body, timeout=-1), ["timeout= of stage 'x'", "negative", "None is no limit"]),
    "a limit that is no number": (declared("x", body, timeout="5"), ["timeout= of stage 'x'", "'5'", "seconds"]),
    "a limit that is not a number": (declared("x", body, timeout=float("nan")), ["timeout= of stage 'x'"]),
    "a negative default limit": (lambda: Pipeline("p", default_timeout=-0.5), ["default_timeout", "negative"]),
    "a condition that is none": (declared("x", body, when=True), ["when= of stage 'x'", "True"]),
    "an async condition": (declared("x", body, when=async_condition), ["when= of stage 'x'", "plain function"]),
    "an option with a typo": (declared("x", body, timout=3), ["'x'", "'timout'", "did you mean 'timeout'?"]),
    "an option that does not exist": (declared("x", body, zzz=3), ["'x'", "'zzz'", "on_failure"]),
    "a plain generator": (declared("x", plain_generator), ["'x'", "a generator", "return once"]),
    "a limit on a thread": (
        declared("x", plain, timeout=1),
        ["timeout=", "'x'", "nothing can stop"],
    ),
    "a total limit on a thread": (declared("x", plain, total_timeout=1), ["total_timeout=", "'x'", "processes=True"]),
    "a heartbeat of a thread": (declared("x", plain, heartbeat=1), ["heartbeat=", "'x'", "abandon_on_cancel=True"]),
    "an async stage in a process": (declared("x", body, processes=True), ["processes=", "'x'", "async"]),
    "an async stage to be abandoned": (declared("x", body, abandon_on_cancel=True), ["abandon_on_cancel=", "async"]),
    "a retry that is none": (declared("x", body, retry=3), ["retry=", "'x'", "Retry(attempts=3)", "3"]),
    "a priority that is none": (declared("x", body, priority="high"), ["priority=", "'x'", "'high'", "whole number"]),
    "a limit that is no name": (declared("x", body, uses=3), ["uses=", "'x'", "name of a limit", "3"]),
    "an empty version": (declared("x", body, version=""), ["version= of stage 'x'", "not empty", "''"]),
    "a version of white space": (declared("x", body, version=" "), ["version= of stage 'x'", "not empty"]),
    "a version that is a number": (
        declared("x", body, version=2),
        ["version= of stage 'x'", "not 2", 'write it as a string: version="2"'],
    ),
    "a version that is none": (declared("x", body, version=None), ["version= of stage 'x'", "None"]),
    "a former name that is none": (declared("x", body, aka=3), ["aka= of stage 'x'", "before", "3"]),
    "an empty former name": (declared("x", body, aka=["y", ""]), ["aka= of stage 'x'", "''"]),
    "a padded former name": (declared("x", body, aka=" y"), ["aka= of stage 'x'", "white space", "' y'"]),
    "its own former name": (declared("x", body, aka=["y", "x"]), ["aka= of stage 'x'", "the stage itself"]),
    "a former name twice": (declared("x", body, aka=["y", "y"]), ["aka= of stage 'x'", "'y' twice"]),
    "former names in a mapping": (declared("x", body, aka={"y": 1}), ["aka= of stage 'x'", "or several"]),
    "a generator": (declared("x", generator), ["'x'", "async generator", "save_partial()"]),
    "no function at all": (declared("x", 42), ["'x'", "cannot be run", "42"]),
    "a function of too much": (declared("x", cast("Any", two_arguments)), ["'x'", "called with the context", "two"]),
    "a class that needs arguments": (declared("x", NeedsArguments), ["'x'", "without arguments", "url"]),
    "a class without execute": (declared("x", Callee), ["'x'", "Callee", "async def execute(self, ctx)"]),
    "a class that is not async": (declared("x", PlainExecute), ["'x'", "PlainExecute", "async def execute"]),
    "a decorator's name": (lambda: decorate("x"), ["@stage(name='x')"]),
    "an empty decorator's name": (lambda: decorate(name="")(body), ["needs a name"]),
    "a name that comes second": (declared(body, "x"), ["with_stage('x', function body)"]),
    "a condition of nothing": (declared("x", body, when=lambda: True), ["'x'", "asked with the context"]),
    "after a mapping": (declared("x", body, after={"a": 1}), ["after= of stage 'x'", "a list"]),
    "after a function": (declared("x", body, after=body), ["after= of stage 'x'", "function body", "a stage's name"]),
    "after names in one string": (
        lambda: declared("x", body, after="a, b")().build(),
        ["'a, b'", "several names are written as a list"],
    ),
    "a policy with a typo": (lambda: Pipeline("p", on_failure="failfast"), ["did you mean 'fail_fast'?"]),
    "composing something else": (lambda: Pipeline("p").compose(cast("Any", 3)), ["compose()", "3"]),
    "run_stage with a list": (
        lambda: trio.run(lambda: run_stage(body, inputs=cast("Any", ["a"]))),
        ["inputs=", "mapping"],
    ),
    "a decorator's option": (lambda: decorate(timout=3)(body), ["'body'", "did you mean 'timeout'?"]),
    "run_stage after something": (lambda: trio.run(lambda: run_stage(body, after="a")), ["inputs="]),
    "no stages": (lambda: Pipeline("empty").build(), ["'empty'", "no stages", "with_stage()"]),
    "after an unknown stage": (
        lambda: declared("x", body, after="aa")().build(),
        ["'x'", f"{HERE}:", "'aa'", "did you mean 'a'?"],
    ),
    "a cycle": (
        lambda: (
            chain(1)
            .with_stage("x", body, after="z")
            .with_stage("y", body, after="x")
            .with_stage("z", body, after=["s0", "y"])
            .build()
        ),
        ["circle", "'x' → 'y'", "remove one of these edges"],
    ),
}


@pytest.mark.parametrize(("mistake", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_definition_error_that_says_what_and_where(
    mistake: Callable[[], object], parts: list[str]
) -> None:
    with pytest.raises(DefinitionError) as caught:
        mistake()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def test_errors_of_names_carry_them() -> None:
    with pytest.raises(UnknownStageError) as unknown:
        Pipeline("p").with_stage("fetch", body).with_stage("x", body, after="fetsch").build()
    assert (unknown.value.stage, unknown.value.suggestions) == ("fetsch", ("fetch",))
    with pytest.raises(DuplicateStageError) as duplicate:
        Pipeline("p").with_stage("a", body).with_stage("a", body)
    assert duplicate.value.stage == "a"
    with pytest.raises(CycleError) as cycle:
        Pipeline("p").with_stage("a", body, after="c").with_stage("b", body, after="a").with_stage(
            "c", body, after="b"
        ).with_stage("d", body, after="c").build()
    names = cycle.value.cycle
    assert names[0] == names[-1]
    assert set(names) == {"a", "b", "c"}
    assert all(second == {"a": "b", "b": "c", "c": "a"}[first] for first, second in itertools.pairwise(names))


def test_a_message_names_the_line_of_the_declaration() -> None:
    pipeline = Pipeline("p")
    line = inspect.currentframe()
    assert line is not None
    pipeline = pipeline.with_stage("x", body, after="nowhere")
    with pytest.raises(UnknownStageError, match=f"{HERE}:{line.f_lineno - 1}"):
        pipeline.build()


def test_a_mistake_leaves_the_pipeline_as_it_was() -> None:
    pipeline = Pipeline("p").with_stage("a", body)
    with pytest.raises(DefinitionError):
        pipeline.with_stage("b", body, timeout=-1)
    with pytest.raises(DefinitionError):
        pipeline.with_stage("b", body, after="b")
    with pytest.raises(DuplicateStageError):
        pipeline.with_stage("a", body)
    assert len(pipeline) == 1
    assert list(pipeline.with_stage("b", body).build().stages) == ["a", "b"]


# Pipelines are values


def test_with_stage_leaves_the_old_pipeline_as_it_was() -> None:
    empty = Pipeline("p", on_failure="isolate", default_timeout=7)
    one = empty.with_stage("a", body)
    two = one.with_stage("b", body, after="a")
    assert [len(pipeline) for pipeline in (empty, one, two)] == [0, 1, 2]
    assert list(one.build().stages) == ["a"]
    assert list(two.build().stages) == ["a", "b"]
    assert two.settings.on_failure is OnFailure.ISOLATE
    assert two.build().settings.default_timeout == 7
    assert repr(two) == "<Pipeline 'p', 2 stages>"
    with pytest.raises(DefinitionError, match="no stages"):
        empty.build()


def test_forks_of_one_pipeline_do_not_see_each_other() -> None:
    base = Pipeline("p").with_stage("a", body)
    left = base.with_stage("l", body, after="a").with_stage("same", body, timeout=1)
    right = base.with_stage("r", body, after="a").with_stage("same", body, timeout=2)
    third = base.with_stage("l", body)
    assert sorted(left.build().stages) == ["a", "l", "same"]
    assert sorted(right.build().stages) == ["a", "r", "same"]
    assert sorted(third.build().stages) == ["a", "l"]
    assert left.build().stages["same"].timeout == 1
    assert right.build().stages["same"].timeout == 2
    assert list(base.build().stages) == ["a"]


async def test_a_pipeline_builds_once_and_keeps_the_graph() -> None:
    pipeline = chain(2)
    graph = pipeline.build()
    assert pipeline.build() is graph
    assert isinstance(graph, StageGraph)
    assert len(graph) == 2
    assert states(await pipeline.run()) == {"s0": OK, "s1": OK}


def test_the_order_of_declaration_does_not_matter() -> None:
    edges: list[tuple[str, list[str]]] = [("a", []), ("b", ["a"]), ("c", ["a"]), ("d", ["b", "c"])]
    forwards = Pipeline("p")
    backwards = Pipeline("p")
    for name, after in edges:
        forwards = forwards.with_stage(name, body, after=after)
    for name, after in reversed(edges):
        backwards = backwards.with_stage(name, body, after=after)
    for pipeline in (forwards, backwards):
        shape = pipeline.build().shape
        branches = {tuple(shape.names[number] for number in branch.strand): branch.parent for branch in shape.branches}
        assert branches == {("a",): None, ("b",): 0, ("c",): 0, ("d",): 0}


def test_a_chain_of_twenty_thousand_declared_backwards_builds() -> None:
    pipeline = Pipeline("long")
    for number in reversed(range(20_000)):
        pipeline = pipeline.with_stage(f"s{number}", body, after=f"s{number - 1}" if number else ())
    shape = pipeline.build().shape
    assert shape.names[:2] == ("s0", "s1")
    assert len(shape.branches) == 1
    assert shape.branches[0].strand == tuple(range(20_000))


# compose


def inner() -> Pipeline:
    return (
        Pipeline("inner", on_failure="isolate", default_timeout=3)
        .with_stage("i1", body)
        .with_stage("i2", body, after=optional("i1"), timeout=9)
        .with_stage("i3", body, after=["i1", "i2"], join="any")
    )


def test_compose_adds_the_stages_of_another_pipeline_after_some_of_its_own() -> None:
    outer = Pipeline("outer").with_stage("a", body).with_stage("b", body)
    composed = outer.compose(inner(), after=["a", optional("b")], prefix="x.")
    stages = composed.build().stages
    assert sorted(stages) == ["a", "b", "x.i1", "x.i2", "x.i3"]
    assert stages["x.i1"].after == (Dependency("a"), Dependency("b", required=False))
    assert stages["x.i2"].after == (Dependency("x.i1", required=False),)
    assert stages["x.i3"].after == (Dependency("x.i1"), Dependency("x.i2"))
    assert stages["x.i3"].join is Join.ANY
    assert stages["x.i2"].timeout == 9
    assert stages["x.i1"].timeout is DEFAULT
    assert composed.settings.on_failure is OnFailure.FAIL_FAST
    assert len(outer) == 2
    assert len(inner()) == 3


async def test_a_pipeline_may_be_composed_several_times_under_prefixes() -> None:
    twice = Pipeline("twice").with_stage("a", gives())
    twice = twice.compose(inner(), after="a", prefix="one.").compose(inner(), after="one.i3", prefix="two.")
    results = await twice.with_stage("end", body, after="two.i3").run()
    assert set(states(results).values()) == {OK}
    assert len(results) == 8


@pytest.mark.parametrize("after", ["a", ["a"], optional("a"), (), ["a", "b"]])
def test_compose_without_a_prefix_keeps_the_names(after: Any) -> None:
    outer = Pipeline("outer").with_stage("a", body).with_stage("b", body)
    stages = outer.compose(inner(), after=after).build().stages
    assert sorted(stages) == ["a", "b", "i1", "i2", "i3"]
    expected = [after] if isinstance(after, (str, Dependency)) else list(after)
    assert [edge.stage for edge in stages["i1"].after] == [
        edge if isinstance(edge, str) else edge.stage for edge in expected
    ]


def test_a_composed_pipeline_may_name_stages_of_the_outer_one() -> None:
    needs = Pipeline("needs").with_stage("n", body, after="a")
    stages = Pipeline("outer").with_stage("a", body).compose(needs, prefix="x.").build().stages
    assert stages["x.n"].after == (Dependency("a"),)


def test_compose_refuses_names_that_are_taken_and_what_cannot_come_before() -> None:
    outer = Pipeline("outer").with_stage("a", body).with_stage("i2", body)
    with pytest.raises(DuplicateStageError, match="'i2'") as caught:
        outer.compose(inner())
    assert caught.value.stage == "i2"
    with pytest.raises(DefinitionError, match="needs a name"):
        outer.compose(inner(), after="", prefix="x.")
    with pytest.raises(UnknownStageError, match="did you mean 'a'"):
        outer.compose(inner(), after="aa", prefix="x.").build()
    assert len(outer) == 2


# Routes


def always(ctx: StageContext) -> bool:
    return True


def routes(join: str | None, *, kind: str = "route", condition: bool = True, loose: bool = False) -> Pipeline:
    when = always if condition else None
    pipeline = (
        Pipeline("routes")
        .with_stage("route", body, kind=kind)
        .with_stage("high", body, after="route", when=when)
        .with_stage("low", body, after="route", when=when)
        .with_stage("default", body, after="route")
    )
    after: list[Any] = [optional("high") if loose else "high", "low", "default"]
    return pipeline.with_stage("end", body, after=after, join=join or "all")


def test_an_all_join_over_stages_that_exclude_each_other_is_warned_of() -> None:
    with pytest.warns(DefinitionWarning) as caught:
        routes(None).build()
    assert len(caught) == 1
    message = str(caught[0].message)
    parts = ["'end'", f"{HERE}:", "'high'", "'low'", "'route'", 'join="any_settled"']
    assert [part for part in parts if part not in message] == [], message
    assert caught[0].filename.endswith(HERE)


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda: routes("any_settled"),
        lambda: routes("settled"),
        lambda: routes(None, kind="transform"),
        lambda: routes(None, condition=False),
        lambda: routes(None, loose=True),
    ],
)
def test_what_may_well_be_meant_is_not_warned_of(pipeline: Callable[[], Pipeline]) -> None:
    pipeline().build()  # a warning would be an error


def test_a_graph_is_frozen() -> None:
    graph = chain(2).build()
    for name in ("name", "plan", "stages", "on_failure"):
        with pytest.raises(AttributeError, match="frozen"):
            setattr(graph, name, None)
    with pytest.raises(TypeError):
        cast("Any", graph.stages)["x"] = 1


def test_the_warning_of_an_exclusive_join_sees_through_nested_branches_and_says_where_the_join_is() -> None:
    pipeline = (
        Pipeline("nested")
        .with_stage("route", body, kind="route")
        .with_stage("high", body, after="route", when=lambda ctx: True)
        .with_stage("high 1", body, after="high")
        .with_stage("high 2", body, after="high")
        .with_stage("low", body, after="route", when=lambda ctx: False)
        .with_stage("join", body, after=["high 1", "low"])
    )
    with pytest.warns(DefinitionWarning, match="'high 1', 'low'") as caught:
        pipeline.build()
    assert caught[0].filename.endswith(HERE)


@pytest.mark.parametrize("mode", ["al", "", "n"])
def test_a_join_of_no_known_mode_cannot_be_made(mode: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        Join(mode)


@pytest.mark.parametrize(
    ("options", "essentials"),
    [({"join": "any"}, "comes after nothing"), ({"join": "settled"}, "say after=")],
)
def test_a_join_that_waits_for_nothing_is_a_mistake(options: Any, essentials: str) -> None:
    with pytest.raises(DefinitionError, match=essentials):
        Pipeline("p").with_stage("a", body, **options)


def test_no_stage_is_called_like_the_outermost_branch() -> None:
    with pytest.raises(DefinitionError, match="outermost branch"):
        Pipeline("p").with_stage("trunk", body)


async def renamed(ctx: StageContext) -> None:
    return None


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline("p").with_stage("x", renamed, version="2", aka=["y", "z"]),
        Pipeline("p").with_stage(stage(name="x", version="2", aka=("y", "z"))(renamed)),
        Pipeline("p").with_stage(stage(name="x", version="1", aka="w")(renamed), version="2", aka=iter(["y", "z"])),
        Pipeline("p").with_map("x", renamed, over=lambda ctx: (), version="2", aka=["y", "z"]),
        Pipeline("p").with_stage("x", Pipeline("q").with_stage("a", renamed), version="2", aka=["y", "z"]),
    ],
    ids=["with_stage", "stage", "with_stage after stage", "with_map", "a pipeline"],
)
def test_a_stage_may_say_which_version_it_is_and_what_it_was_called(pipeline: Pipeline) -> None:
    spec = pipeline.build().stages["x"]
    assert (spec.version, spec.aka) == ("2", ("y", "z"))


def test_a_stage_need_not_say_which_version_it_is_and_what_it_was_called() -> None:
    spec = chain(1).build().stages["s0"]
    assert (spec.version, spec.aka) == (None, ())


@pytest.mark.parametrize(("options", "option"), [({"version": 2}, "version"), ({"aka": 2}, "aka")])
def test_a_mistake_in_what_a_stage_was_carries_the_option(options: Any, option: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        declared("x", body, **options)()
    assert (caught.value.stage, caught.value.option) == ("x", option)
