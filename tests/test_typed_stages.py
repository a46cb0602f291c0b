"""Typed stages: edges, types, run inputs and the context, from a signature; and what is wrong with one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, TypedDict, cast

import attrs
import pytest
import trio

from stageflow import (
    CauseKind,
    ContractViolation,
    CycleError,
    DefinitionError,
    Fault,
    FrozenList,
    Pipeline,
    ProcessContext,
    Retry,
    StageContext,
    StageExecutionError,
    StageOutput,
    run_stage,
    stage,
)
from stageflow.stages import Dependency
from tests.stages import CANCELLED, FAILED, OK, SKIPPED, causes, gives, results_of, returns, states

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

    from trio.testing import MockClock

HERE = "test_typed_stages.py"


@attrs.frozen
class Page:
    title: str


@attrs.frozen
class Doc:
    page: Page
    words: int = 0


@attrs.frozen
class LongPage(Page):
    length: int = 0


@attrs.frozen
class Likewise:
    """Has all that a page has."""

    title: str
    more: int = 0


@attrs.frozen
class Untitled:
    text: str


class Row(TypedDict):
    id: int


UserId = NewType("UserId", int)


async def fetch(url: str) -> Page:
    return Page(url)


async def parse(fetch: Page) -> Doc:
    return Doc(fetch)


async def rank(parse: Doc, enrich: Row | None) -> dict[str, Any]:
    return {"title": parse.page.title, "enriched": enrich is not None}


async def enrich(fetch: Page) -> Row:
    return {"id": len(fetch.title)}


def after(pipeline: Pipeline) -> dict[str, list[tuple[str, bool]]]:
    return {
        name: [(edge.stage, edge.required) for edge in spec.after] for name, spec in pipeline.build().stages.items()
    }


def mistake(build: Callable[[], object]) -> str:
    with pytest.raises(DefinitionError) as caught:
        build()
    return str(caught.value)


def line_of(function: Any) -> int:
    return cast("int", function.__code__.co_firstlineno)


# Edges and inputs


async def test_a_pipeline_is_made_of_its_typed_stages_alone_in_any_order() -> None:
    stages: list[Any] = [fetch, parse, enrich, rank]
    for order in (stages, stages[::-1]):
        pipeline = Pipeline("p", stages=order)
        assert after(pipeline) == {
            "fetch": [],
            "parse": [("fetch", True)],
            "enrich": [("fetch", True)],
            "rank": [("parse", True), ("enrich", False)],
        }
        results = await pipeline.run({"url": "abc"})
        assert {name: output.data for name, output in results.items()} == {
            "fetch": Page("abc"),
            "parse": Doc(Page("abc")),
            "enrich": {"id": 3},
            "rank": {"title": "abc", "enriched": True},
        }


async def test_an_output_is_handed_on_by_reference() -> None:
    results = await Pipeline("p", stages=[fetch, parse]).run({"url": "abc"})
    assert results["parse"].data.page is results["fetch"].data


async def defaulted(fetch: Page = Page("none"), limit: int = 3) -> list[object]:
    return [fetch.title, limit]


@pytest.mark.parametrize(
    ("output", "seen"),
    [(StageOutput.ok(Page("x")), "x"), (StageOutput.skip("none today"), "none")],
)
async def test_a_parameter_with_a_default_is_optional(output: StageOutput, seen: str) -> None:
    pipeline = Pipeline("p").with_stage("fetch", returns(output), output=Page).with_stage("defaulted", defaulted)
    assert after(pipeline)["defaulted"] == [("fetch", False)]
    assert (await pipeline.run())["defaulted"].data == [seen, 3]
    assert (await pipeline.run({"limit": 4}))["defaulted"].data == [seen, 4]


async def test_a_default_stands_for_what_is_absent_and_not_for_none() -> None:
    async def bounded(limit: int | None = 10) -> list[int | None]:
        return [limit]

    async def strict(limit: int = 10) -> list[int]:
        return [limit]

    assert (await Pipeline("p", stages=[bounded]).run())["bounded"].data == [10]
    assert (await Pipeline("p", stages=[bounded]).run({"limit": None}))["bounded"].data == [None]
    results = await results_of(Pipeline("p", stages=[strict]), {"limit": None})
    error = results.records["strict"].error
    assert isinstance(error, ContractViolation)
    assert error.faults == (Fault(path="limit", found="None (NoneType)", wanted="int"),)


async def test_a_stage_that_may_give_nothing_gives_none_to_who_takes_it() -> None:
    async def fetch() -> Page | None:
        return None

    async def seen(fetch: Page | None) -> list[str]:
        return ["nothing" if fetch is None else fetch.title]

    assert (await Pipeline("p", stages=[fetch, seen]).run())["seen"].data == ["nothing"]
    message = mistake(Pipeline("p", stages=[fetch, parse]).build)
    assert "fetch: gives None, wanted Page" in message


async def test_the_context_may_stand_anywhere() -> None:
    async def first(ctx: StageContext, fetch: Page) -> list[str]:
        return [ctx.stage, fetch.title]

    async def last(fetch: Page, ctx: StageContext) -> list[str]:
        return [ctx.stage, fetch.title]

    async def named(fetch: Page, *, here: StageContext, url: str) -> list[str]:
        return [here.stage, fetch.title, url]

    pipeline = Pipeline("p", stages=[fetch, first, last, named])
    results = await pipeline.run({"url": "x"})
    assert results["first"].data == ["first", "x"]
    assert results["last"].data == ["last", "x"]
    assert results["named"].data == ["named", "x", "x"]
    assert after(pipeline)["named"] == [("fetch", True)]


async def test_a_parameter_that_is_named_like_its_own_stage_is_a_run_input() -> None:
    async def url(url: str) -> list[str]:
        return [url]

    pipeline = Pipeline("p", stages=[url])
    assert after(pipeline) == {"url": []}
    assert (await pipeline.run({"url": "x"}))["url"].data == ["x"]


async def test_run_inputs_come_from_a_mapping_or_an_instance_and_are_checked() -> None:
    @attrs.frozen
    class Job:
        url: object

    for data in ({"url": "x"}, Job("x")):
        assert (await Pipeline("p", stages=[fetch]).run(data))["fetch"].data == Page("x")
    for wrong in ({"url": 3}, Job(3)):
        results = await results_of(Pipeline("p", stages=[fetch]), cast("Any", wrong))
        error = results.records["fetch"].error
        assert isinstance(error, ContractViolation)
        assert str(error) == (
            "what the run's data gives is not what parameter 'url' of stage 'fetch' declares, str; change either:\n"
            "  url: wanted str, found 3 (int)"
        )


async def test_a_parameter_that_names_nothing_is_said_to_when_it_runs() -> None:
    with pytest.raises(StageExecutionError) as caught:
        await Pipeline("p", stages=[fetch]).run({"ulr": "x"})
    assert str(caught.value.original) == (
        "stage 'fetch' takes 'url: str', and there is no stage 'url', and no 'url' in the run's data "
        "(did you mean 'ulr'?); give it, as in run({'url': ...}), or say url: str | None"
    )
    assert isinstance(caught.value.original, ContractViolation)
    assert caught.value.original.faults == (Fault(path="data.url", found="nothing", wanted="str"),)
    assert causes(caught.value.results)["fetch"] == (CauseKind.CONTRACT, "fetch")


async def test_an_unannotated_optional_parameter_takes_anything() -> None:
    async def loose(fetch: Page, extra: Any = None) -> list[Any]:
        return [extra]

    results = await Pipeline("p", stages=[fetch, loose]).run({"url": "x", "extra": [1]})
    assert results["loose"].data == [[1]]


# Runners


class ByClass:
    name = "by_class"
    kind = "transform"
    made: list[ByClass] = []  # noqa: RUF012  # counts

    def __init__(self) -> None:
        self.made.append(self)

    async def execute(self, fetch: Page, ctx: StageContext) -> Doc:
        return Doc(fetch, len(ctx.stage))


class ByMethod:
    async def method(self, fetch: Page) -> Doc:
        return Doc(fetch, 1)

    async def __call__(self, fetch: Page) -> Doc:
        return Doc(fetch, 2)

    @classmethod
    async def of_class(cls, fetch: Page) -> Doc:
        return Doc(fetch, 3)

    @staticmethod
    async def of_nobody(fetch: Page) -> Doc:
        return Doc(fetch, 4)


async def several(words: int, fetch: Page, *, more: int = 0) -> Doc:
    return Doc(fetch, words + more)


def plain(fetch: Page) -> Doc:
    return Doc(fetch, threading.get_ident())


def decorates(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        (ByClass, 1),
        (ByMethod().method, 1),
        (ByMethod(), 2),
        (ByMethod.of_class, 3),
        (ByMethod.of_nobody, 4),
        (functools.partial(several, 5), 5),
        (functools.partial(several, 5, more=1), 6),
        (functools.partial(several, words=7), 7),
        (functools.partial(functools.partial(several, 5), more=2), 7),
        (decorates(parse), 0),
        (stage(parse), 0),
        (stage(name="other")(parse), 0),
    ],
    ids=lambda part: getattr(part, "__qualname__", type(part).__name__),
)
async def test_whatever_can_be_called_can_be_typed(runner: Any, words: int) -> None:
    pipeline = Pipeline("p", stages=[fetch]).with_stage("s", runner)
    assert after(pipeline)["s"] == [("fetch", True)]
    results = await pipeline.run({"url": "x", "words": 100})  # what a partial binds is bound
    assert results["s"].data == Doc(Page("x"), words)


async def test_a_class_is_made_once_per_run() -> None:
    ByClass.made.clear()
    pipeline = Pipeline("p", stages=[fetch, ByClass])
    assert ByClass.made == []
    assert (await pipeline.run({"url": "x"}))["by_class"].data == Doc(Page("x"), 8)
    assert len(ByClass.made) == 1


def with_context(fetch: Page, ctx: StageContext) -> Doc:
    ctx.save_partial(seen=fetch.title)
    return Doc(fetch, threading.get_ident())


@pytest.mark.parametrize("function", [plain, with_context])
async def test_a_plain_function_runs_in_a_thread(function: Any) -> None:
    results = await Pipeline("p", stages=[fetch]).with_stage("s", function).run({"url": "x"})
    assert results["s"].data.page == Page("x")
    assert results["s"].data.words != threading.get_ident()


async def price() -> Fraction:
    return Fraction(3, 2)


class Doubled:
    """A typed plain function that pickles as its source: a worker process need not be able to import this module."""

    def __call__(self, price: Fraction, ctx: ProcessContext) -> Fraction:
        raise AssertionError("it ran in this process")

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, ("lambda price, ctx: price * 2 * len(ctx.stage)",)


async def test_a_plain_function_with_processes_runs_in_a_process() -> None:
    pytest.importorskip("trio_parallel")
    pipeline = Pipeline("p", stages=[price]).with_stage("s", Doubled(), processes=True, timeout=60)
    results = await pipeline.run()
    assert results["s"].data == Fraction(3)


async def test_a_stage_run_alone_takes_its_inputs_by_name() -> None:
    assert (await run_stage(parse, inputs={"fetch": StageOutput.ok(Page("x"))})).data == Doc(Page("x"))
    assert (await run_stage(parse, inputs={"fetch": {"title": "x"}})).data == Doc(Page("x"))
    assert (await run_stage(fetch, {"url": "x"})).data == Page("x")


# Annotations


def test_names_local_to_a_function_are_found() -> None:
    @attrs.frozen
    class Local:
        x: int

    async def first() -> Local:
        return Local(1)

    async def second(first: Local) -> Local:
        return first

    assert after(Pipeline("p", stages=[first, second]))["second"] == [("first", True)]


def makes() -> Any:
    @attrs.frozen
    class Hidden:
        x: int

    async def hidden() -> Hidden:
        return Hidden(1)

    return stage(hidden)


async def test_a_decorated_stage_keeps_what_its_annotations_meant_where_it_was_written() -> None:
    assert (await Pipeline("p", stages=[makes()]).run())["hidden"].data.x == 1


async def test_a_name_means_what_it_means_where_the_function_was_written() -> None:
    class Page:
        """Another one than that of the module."""

    assert Page.__doc__
    pipeline = Pipeline("p", stages=[fetch, parse])
    assert (await pipeline.run({"url": "x"}))["fetch"].data.title == "x"


async def later(later_defined: Later) -> Later:
    return later_defined


@attrs.frozen
class Later:
    x: int


async def test_a_forward_reference_is_resolved_when_the_stage_is_declared() -> None:
    async def later_defined() -> Later:
        return Later(1)

    assert (await Pipeline("p", stages=[later, later_defined]).run())["later"].data == Later(1)


async def test_an_annotation_within_an_annotation_may_be_a_string() -> None:
    async def quoted(fetch: Page, notes: Annotated[Page | None, "of no meaning"] = None) -> list[Page]:
        return [fetch]

    assert (await Pipeline("p", stages=[fetch, quoted]).run({"url": "x"}))["quoted"].data == [Page("x")]


async def only_for_checkers(amount: Decimal, fetch: Page) -> None: ...


def test_what_is_imported_for_type_checkers_only_is_a_mistake() -> None:
    for declare in (
        lambda: Pipeline("p", stages=[only_for_checkers]),
        lambda: Pipeline("p").with_stage(stage(only_for_checkers)),
    ):
        assert mistake(declare) == (
            "stage 'only_for_checkers': an annotation names 'Decimal', which cannot be found when the program runs; "
            "import it outside of `if TYPE_CHECKING:`, and define it before the stage"
        )


def test_an_annotation_that_cannot_be_read_is_a_mistake() -> None:
    async def wrong(fetch: Page, other: Page) -> None: ...

    for annotation, essentials in (
        ("attrs.nothing", "AttributeError"),
        ("Page[int]", "TypeError"),
        ("not an annotation", "SyntaxError"),
    ):
        wrong.__annotations__["other"] = annotation
        message = mistake(lambda: Pipeline("p", stages=[wrong]))
        assert "stage 'wrong': an annotation cannot be read: " in message
        assert essentials in message


# What a stage gives


async def says(what: Literal["page", "skip", "bare"]) -> Page | StageOutput:
    match what:
        case "page":
            return Page("x")
        case "skip":
            return StageOutput.skip("nothing to do")
        case "bare":
            return StageOutput.ok(title="x")


async def test_a_stage_may_return_its_type_or_an_output() -> None:
    async def after_says(says: Page) -> list[str]:
        return [says.title]

    pipeline = Pipeline("p", stages=[says, after_says])
    for what in ("page", "bare"):
        results = await pipeline.run({"what": what})
        assert (results["says"].data, results["after_says"].data) == (Page("x"), ["x"])
    assert states(await pipeline.run({"what": "skip"})) == {"says": SKIPPED, "after_says": SKIPPED}
    assert states(await results_of(pipeline, {"what": "pages"})) == {"says": FAILED, "after_says": SKIPPED}


@pytest.mark.parametrize("returned", [{"title": 1}, None, Untitled("x"), [Page("x")], StageOutput.ok(Untitled("x"))])
async def test_the_return_annotation_is_a_contract(returned: Any) -> None:
    async def gives_page() -> Page:
        return cast("Page", returned)

    results = await results_of(Pipeline("p", stages=[gives_page]))
    assert causes(results) == {"gives_page": (CauseKind.CONTRACT, "gives_page")}


async def test_output_counts_in_place_of_the_annotation() -> None:
    async def gives_page() -> Page:
        return cast("Page", {"text": "x"})

    results = await Pipeline("p").with_stage("gives_page", gives_page, output=Untitled).run()
    assert results["gives_page"].data == Untitled("x")


@pytest.mark.parametrize("returns_", [Any, StageOutput, StageOutput | None, Any | None])
async def test_a_return_annotation_that_says_nothing_is_no_contract(returns_: Any) -> None:
    async def loose(x: int) -> Any:
        return {"x": x}

    loose.__annotations__["return"] = returns_
    assert (await Pipeline("p", stages=[loose]).run({"x": 1}))["loose"].data == {"x": 1}


async def test_a_typed_stage_may_return_what_only_a_contract_allows_also_through_interceptors() -> None:
    seen: list[StageOutput] = []

    class Sees:
        async def __call__(self, ctx: StageContext, proceed: Any) -> Any:
            seen.append(await proceed())
            return seen[-1]

    async def numbers() -> list[int]:
        return [1, 2]

    async def total(numbers: list[int]) -> int:
        return sum(numbers)

    async def nothing(total: int) -> None: ...

    results = await Pipeline("p", stages=[numbers, total, nothing], interceptors=[Sees()]).run()
    assert [results[name].data for name in ("numbers", "total", "nothing")] == [[1, 2], 3, None]
    assert isinstance(results["numbers"].data, FrozenList)
    assert [output.data for output in seen] == [[1, 2], 3, None]


# Mixing


async def test_after_adds_to_the_edges_of_the_parameters_and_may_say_more_of_them() -> None:
    pipeline = (
        Pipeline("p", stages=[fetch])
        .with_stage("before", gives())
        .with_stage("parse", parse, after="before")
        .with_stage("doc", stage(parse), after=[Dependency("fetch", required=False), "before"])
    )
    assert after(pipeline)["parse"] == [("before", True), ("fetch", True)]
    assert after(pipeline)["doc"] == [("fetch", False), ("before", True)]


async def test_what_after_makes_optional_and_the_parameter_does_not_is_a_violation_when_it_is_absent() -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("fetch", returns(StageOutput.skip("none today")), output=Page)
        .with_stage("parse", parse, after=Dependency("fetch", required=False))
    )
    results = await results_of(pipeline)
    error = results.records["parse"].error
    assert isinstance(error, ContractViolation)
    assert str(error) == ("stage 'parse' takes 'fetch: Page', and stage 'fetch' gave nothing; say fetch: Page | None")
    assert error.faults == (Fault(path="fetch", found="nothing", wanted="Page"),)


async def test_a_join_decides_when_a_typed_stage_starts() -> None:
    async def left() -> Page:
        return Page("left")

    async def right() -> StageOutput:
        return StageOutput.cancel_branch("not today")

    async def either(left: Page | None, right: Page | None) -> list[bool]:
        return [left is not None, right is not None]

    pipeline = Pipeline("p", stages=[left, right]).with_stage("either", either, join="any_settled")
    results = await pipeline.run()
    assert states(results) == {"left": OK, "right": CANCELLED, "either": OK}
    assert results["either"].data == [True, False]


@pytest.mark.parametrize(("join", "fits"), [("any", True), ("quorum", True)])
async def test_a_join_on_a_typed_stage_counts_its_parameters(join: str, fits: bool) -> None:
    async def one() -> Page:
        return Page("1")

    async def both(one: Page | None, fetch: Page | None) -> list[bool]:
        return [one is not None, fetch is not None]

    pipeline = Pipeline("p", stages=[one, fetch]).with_stage("both", both, join=join)
    assert states(await pipeline.run({"url": "x"}))["both"] is OK


async def test_when_and_retry_go_with_a_typed_stage() -> None:
    tries: list[int] = []

    async def flaky(fetch: Page, ctx: StageContext) -> Page:
        tries.append(ctx.attempt)
        return fetch if ctx.attempt == 2 else cast("Page", {})

    pipeline = Pipeline("p", stages=[fetch]).with_stage("flaky", flaky, retry=Retry(attempts=3, on=ContractViolation))
    assert (await pipeline.run({"url": "x"}))["flaky"].data == Page("x")
    assert tries == [1, 2]
    skipped = Pipeline("p", stages=[fetch]).with_stage(
        "parse", parse, when=lambda ctx: ctx.inputs["fetch"].data.title == "y"
    )
    assert states(await skipped.run({"url": "x"}))["parse"] is SKIPPED
    assert states(await skipped.run({"url": "y"}))["parse"] is OK


async def test_a_typed_stage_may_take_the_output_of_a_map_or_of_a_pipeline() -> None:
    async def page(ctx: StageContext) -> Mapping[str, object]:
        return {"title": ctx.data}

    async def titles(pages: list[Page], child: dict[str, Page]) -> list[str]:
        return [page.title for page in (*pages, *child.values())]

    pipeline = (
        Pipeline("p")
        .with_map("pages", page, over=lambda ctx: ["a", "b"], output=list[Page])
        .with_stage("child", Pipeline("child").with_stage("c", returns({"title": "c"})))
        .with_stage("titles", titles)
    )
    assert (await pipeline.run())["titles"].data == ["a", "b", "c"]


def test_a_circle_of_parameters_is_a_circle() -> None:
    async def a(b: Page) -> Page:
        return b

    async def b(a: Page) -> Page:
        return a

    with pytest.raises(CycleError):
        Pipeline("p", stages=[a, b]).build()


async def test_typed_stages_can_be_composed() -> None:
    outer = Pipeline("outer").compose(Pipeline("inner", stages=[fetch, parse]))
    assert (await outer.run({"url": "x"}))["parse"].data == Doc(Page("x"))
    given_by_outer = Pipeline("outer", stages=[fetch]).compose(Pipeline("inner", stages=[parse]))
    assert (await given_by_outer.run({"url": "x"}))["parse"].data == Doc(Page("x"))


async def test_typed_stages_can_be_composed_under_a_prefix() -> None:
    inner = Pipeline("inner", stages=[fetch, parse])
    twice = Pipeline("outer").compose(inner, prefix="x.").compose(inner, prefix="y.")
    assert after(twice)["x.parse"] == [("x.fetch", True)]
    assert (await twice.run({"url": "a"}))["y.parse"].data == Doc(Page("a"))


# What does not fit together


async def untitled() -> Untitled:
    return Untitled("x")


def test_a_mismatch_is_found_at_build_and_names_both_signatures_with_file_and_line() -> None:
    pipeline = Pipeline("p").with_stage("fetch", untitled).with_stage("parse", parse)
    line = line_of(test_a_mismatch_is_found_at_build_and_names_both_signatures_with_file_and_line) + 1
    assert mistake(pipeline.build) == (
        f"stage 'parse' ({__file__}:{line}) cannot take what stage 'fetch' gives; change either:\n"
        f"  fetch.title: there is no such field\n"
        f"  given by  untitled() -> Untitled ({__file__}:{line_of(untitled)})\n"
        f"  taken by  parse(fetch: Page) -> Doc ({__file__}:{line_of(parse)})"
    )


def test_a_mismatch_with_a_function_of_the_context_names_its_declaration() -> None:
    pipeline = Pipeline("p").with_stage("fetch", gives(), output=list[Page]).with_stage("parse", parse)
    line = line_of(test_a_mismatch_with_a_function_of_the_context_names_its_declaration) + 1
    message = mistake(pipeline.build)
    assert "\n  fetch: gives list[Page], wanted Page\n" in message
    assert f"\n  given by  stage 'fetch' ({__file__}:{line}), output=list[Page]\n" in message


@pytest.mark.parametrize(
    ("given_", "taken", "problem"),
    [
        (Page, Page, None),
        (LongPage, Page, None),
        (Likewise, Page, None),
        (Page, Likewise, "fetch.more: there is no such field"),
        (Page, LongPage, "fetch.length: there is no such field"),
        (Page, Untitled, "fetch.text: there is no such field"),
        (Page, Page | Doc, None),
        (Page | Doc, Page, "fetch.title: there is no such field"),
        (Page, dict, "gives Page, wanted dict"),
        (Page, Any, None),
        (Page, object, None),
        (int, float, None),
        (bool, int, None),
        (float, int, "gives float, wanted int"),
        (int, UserId, None),
        (UserId, int, None),
        (int, Annotated[int, "seconds"], None),
        (Literal["a"], str, None),
        (Literal["a", 1], str | int, None),
        (str, Literal["a"], "gives str, wanted Literal['a']"),
        (list[int], list[float], None),
        (list[Page], list[Untitled], "fetch[].text: there is no such field"),
        (list[int], tuple[int, ...], "gives list[int], wanted tuple[int, …]"),
        (tuple[int, ...], list[int], "gives tuple[int, …], wanted list[int]"),
        (tuple[int, str], tuple[int, ...], "fetch[]: gives str, wanted int"),
        (tuple[int, ...], tuple[()], "gives tuple[int, …], wanted tuple[()]"),
        (dict[str, int], Mapping[str, int], None),
        (Mapping[str, int], dict[str, int], "gives Mapping[str, int], wanted dict[str, int]"),
        (dict[str, int], dict[int, int], "fetch (keys): gives str, wanted int"),
        (Row, Mapping[str, object], None),
        (Row, dict[str, str], "fetch.id: gives int, wanted str"),
        (Row, Page, "gives Row, wanted Page"),
        (Page, Row, "gives Page, wanted Row"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_what_a_stage_takes_must_be_what_the_other_gives(given_: Any, taken: Any, problem: str | None) -> None:
    async def takes(fetch: object, other: int = 0) -> None: ...

    takes.__annotations__["fetch"] = taken
    pipeline = Pipeline("p").with_stage("fetch", gives(), output=given_).with_stage("takes", takes)
    if problem is None:
        pipeline.build()
    else:
        assert problem in mistake(pipeline.build)


async def test_a_producer_that_declares_nothing_is_checked_when_it_runs() -> None:
    for returned, state in (({"title": "x"}, OK), (Page("x"), OK), ({"title": 1}, FAILED), (Likewise("x"), FAILED)):
        pipeline = Pipeline("p").with_stage("fetch", returns(returned)).with_stage("parse", parse)
        results = await results_of(pipeline)
        assert states(results) == {"fetch": OK, "parse": state}
        if state is FAILED:
            error = results.records["parse"].error
            assert isinstance(error, ContractViolation)
            assert error.stage == "parse"
            assert str(error).startswith(
                "what stage 'fetch' gave is not what parameter 'fetch' of stage 'parse' declares, Page; change either:"
            )


@attrs.frozen
class Job:
    url: str
    limit: int = 3


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        ("str", None),
        ("str | None", None),
        ("object", None),
        ("int", "url: gives str, wanted int"),
        ("int | None", "url: gives str, wanted int | None"),
    ],
)
def test_a_run_input_must_be_what_the_inputs_say(annotation: str, problem: str | None) -> None:
    async def takes(url: Any, other: int = 0) -> None: ...

    takes.__annotations__["url"] = annotation
    pipeline = Pipeline("p", stages=[takes], inputs=Job)
    if problem is None:
        pipeline.build()
    else:
        message = mistake(pipeline.build)
        assert "stage 'takes'" in message
        assert f"{HERE}:" in message
        assert problem in message


def test_a_run_input_with_a_default_must_be_what_the_inputs_say_all_the_same() -> None:
    async def takes(url: int = 3) -> None: ...

    assert "url: gives str, wanted int" in mistake(Pipeline("p", stages=[takes], inputs=Job).build)


def test_a_parameter_that_names_neither_a_stage_nor_a_field_is_found_at_build_with_the_nearest_name() -> None:
    async def takes(limt: int) -> None: ...

    async def misses(fetsch: Page) -> None: ...

    async def far(colour: int) -> None: ...

    async def optional(limt: int | None) -> None: ...

    message = mistake(Pipeline("p", stages=[takes], inputs=Job).build)
    assert "takes 'limt: int', but no stage has that name, and neither has a field of Job" in message
    assert message.endswith("did you mean 'limit'?")
    message = mistake(Pipeline("p", stages=[far], inputs=Job).build)
    assert message.endswith("the inputs= of the pipeline; add it there, or say colour: ... | None")
    message = mistake(Pipeline("p", stages=[fetch, misses], inputs=Job).build)
    assert message.endswith("did you mean 'fetch'?")
    Pipeline("p", stages=[optional], inputs=Job).build()


def test_inputs_that_are_no_class_of_fields_are_not_looked_into() -> None:
    Pipeline("p", stages=[fetch], inputs=dict[str, str]).build()
    Pipeline("p", stages=[fetch], inputs=Any).build()


class NotAsync:
    name = "not_async"

    def execute(self, fetch: Page) -> Doc:
        return Doc(fetch)


class NeedsArguments:
    name = "needs"

    def __init__(self, url: str) -> None: ...

    async def execute(self, fetch: Page, url: str) -> Doc:
        return Doc(fetch)


async def generates(fetch: Page, url: str) -> Any:  # noqa: ASYNC900  # a mistake, to be refused
    yield fetch


def generates_plainly(fetch: Page, url: str) -> Any:
    yield fetch


async def unannotated(fetch, url):  # type: ignore[no-untyped-def]
    ...


UNABLE: list[tuple[Any, str]] = [
    (NotAsync, "no `async def execute(self, ctx)`"),
    (NeedsArguments, "cannot be instantiated without arguments"),
    (generates, "is an async generator; return once"),
    (generates_plainly, "is a generator; return once"),
    (unannotated, "cannot be called with the context"),
]


@pytest.mark.parametrize(("runner", "essentials"), UNABLE, ids=lambda part: getattr(part, "__name__", ""))
def test_what_could_not_run_cannot_be_declared(runner: Any, essentials: str) -> None:
    assert essentials in mistake(lambda: Pipeline("p").with_stage("s", runner))


def test_stages_without_a_name_are_refused() -> None:
    assert "which has no name" in mistake(lambda: Pipeline("p", stages=[functools.partial(several, 5)]))


async def test_a_body_that_takes_its_time_is_cancelled_like_every_other(autojump_clock: MockClock) -> None:
    async def slow(url: str) -> Page:
        await trio.sleep(1)
        return Page(url)

    pipeline = Pipeline("p").with_stage("slow", slow, timeout=0.5)
    assert states(await results_of(pipeline, {"url": "x"})) == {"slow": FAILED}
