"""CONTRACT-003: partial results. Whatever ends a run, what was finished is in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    Pipeline,
    PipelineTerminated,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageTimeoutError,
    UnifiedPipelineCancelled,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    Witness,
    assert_whole,
    end,
    gives,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

ERROR = ValueError("no such page")


async def test_1_a_chain_that_fails_in_the_middle_keeps_its_beginning() -> None:
    pipeline = (
        Pipeline("chain")
        .with_stage("A", gives(x=1))
        .with_stage("B", raises(ERROR), after="A")
        .with_stage("C", gives(), after="B")
    )
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    assert dict(caught.value.results) == {"A": StageOutput.ok(x=1)}
    assert states(caught.value.results) == {"A": OK, "B": FAILED, "C": SKIPPED}


def fork(b: float, c: float) -> Pipeline:
    """A → {B, C}: B fails after so many seconds, C succeeds after so many."""
    return (
        Pipeline("fork")
        .with_stage("A", gives(x=1))
        .with_stage("B", sleeps(b, ERROR), after="A")
        .with_stage("C", sleeps(c), after="A")
    )


async def test_2_a_failure_after_its_sibling_finished_keeps_both(autojump_clock: MockClock) -> None:
    results = await results_of(fork(b=2, c=1))
    assert dict(results) == {"A": StageOutput.ok(x=1), "C": StageOutput.ok(by="C")}
    assert_whole(results)


async def test_2_a_failure_while_its_sibling_runs_ends_that_and_keeps_its_partial(autojump_clock: MockClock) -> None:
    results = await results_of(fork(b=1, c=2))
    assert states(results) == {"A": OK, "B": FAILED, "C": CANCELLED}
    assert results.partial == {"B": {"begun": "B"}, "C": {"begun": "C"}}
    assert times(results)["C"] == (0, 1)
    assert_whole(results)


async def test_2_an_immediate_sibling_of_a_failure_is_kept_in_1000_of_1000_runs() -> None:
    pipeline = (
        Pipeline("fork")
        .with_stage("A", gives())
        .with_stage("B", raises(ERROR), after="A")
        .with_stage("C", gives(), after="A")
    )
    kept = 0
    for _ in range(1000):
        kept += "C" in await results_of(pipeline)
    assert kept == 1000


@pytest.mark.parametrize("failing", ["B", "C"])
async def test_3_a_join_of_which_one_failed_never_starts(autojump_clock: MockClock, failing: str) -> None:
    witness = Witness()
    pipeline = Pipeline("join", on_failure="isolate")
    for name in ("B", "C"):
        pipeline = pipeline.with_stage(name, sleeps(1, ERROR if name == failing else None))
    results = await results_of(pipeline.with_stage("D", witness.of(sees()), after=["B", "C"]))
    other = {"B": "C", "C": "B"}[failing]
    assert states(results) == {failing: FAILED, other: OK, "D": SKIPPED}
    assert witness.entered == []


async def test_4_a_failing_join_keeps_everything_before_it(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("join")
    for number, name in enumerate("ABC"):
        pipeline = pipeline.with_stage(name, sleeps(number))
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.with_stage("D", raises(ERROR), after=["A", "B", "C"]).run()
    assert list(caught.value.results) == ["A", "B", "C"]
    assert states(caught.value.results)["D"] is FAILED


# 5. One script: A at once, then B for 1 s, C for 3 s and D for 1.5 s; at 2 s something ends it all.

ENDINGS: dict[str, tuple[Any, dict[str, Any], RunStatus, type[PipelineTerminated] | None]] = {
    "fail": (sleeps(2, StageOutput.fail(ERROR)), {}, RunStatus.FAILED, StageExecutionError),
    "an exception": (sleeps(2, ERROR), {}, RunStatus.FAILED, StageExecutionError),
    "cancel": (sleeps(2, StageOutput.cancel("enough")), {}, RunStatus.CANCELLED, UnifiedPipelineCancelled),
    "a timeout": (sleeps(9), {"timeout": 2}, RunStatus.FAILED, StageTimeoutError),
    "the caller's scope": (sleeps(9), {}, RunStatus.INTERRUPTED, None),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_5_the_same_script_keeps_the_same_values_whatever_ends_it(autojump_clock: MockClock, ending: str) -> None:
    ends, options, status, raised = ENDINGS[ending]
    pipeline = (
        Pipeline("script")
        .with_stage("A", gives(x=[1]))
        .with_stage("B", sleeps(1), after="A")
        .with_stage("C", sleeps(3), after="A")
        .with_stage("D", sleeps(1.5), after="A")
        .with_stage("E", ends, after="A", **options)
        .with_stage("F", gives(), after=["B", "D"])
        .with_stage("G", gives(), after=["C", "E"])
    )
    ended = await end(pipeline, within=2 if ending == "the caller's scope" else 60)
    results = ended.results
    assert type(ended.error) is (raised or type(None))
    assert ended.caught == (raised is None)
    assert results.status is status
    assert dict(results) == {
        "A": StageOutput.ok(x=[1]),
        "B": StageOutput.ok(by="B"),
        "D": StageOutput.ok(by="D"),
        "F": StageOutput.ok(by="F"),
    }
    assert list(results) == ["A", "B", "D", "F"]
    assert results.partial == {"C": {"begun": "C"}, "E": {"begun": "E"}}
    assert states(results)["C"] is CANCELLED
    assert states(results)["G"] is SKIPPED
    assert times(results)["C"] == (0, 2)
    assert_whole(results)


async def test_6_the_partial_results_of_a_nested_pipeline_that_fails_are_reached_from_the_parents_error(
    autojump_clock: MockClock,
) -> None:
    child = (
        Pipeline("child")
        .with_stage("A", gives(x=1))
        .with_stage("B", sleeps(1, ERROR), after="A")
        .with_stage("C", sleeps(9), after="A")
        .with_stage("D", gives(), after=["B", "C"])
    )
    pipeline = (
        Pipeline("parent")
        .with_stage("before", gives(x=2))
        .with_stage("nest", child, after="before")
        .with_stage("after", gives(), after="nest")
    )
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    error = caught.value
    assert dict(error.results) == {"before": StageOutput.ok(x=2)}
    assert states(error.results) == {"before": OK, "nest": FAILED, "after": SKIPPED}
    (results,) = error.results.children["nest"]
    assert dict(results) == {"A": StageOutput.ok(x=1)}
    assert results.partial == {"B": {"begun": "B"}, "C": {"begun": "C"}}
    assert states(results) == {"A": OK, "B": FAILED, "C": CANCELLED, "D": SKIPPED}
    assert isinstance(error.original, StageExecutionError)
    assert error.original.original is ERROR
    assert dict(error.original.results) == dict(results)
    assert results.trace.status is RunStatus.FAILED
    assert_whole(results)


async def test_partial_results_read_the_same_way_from_either_error() -> None:
    for body in (raises(ERROR), returns(StageOutput.cancel("enough"))):
        pipeline = Pipeline("either").with_stage("A", gives(x=1)).with_stage("B", body, after="A")
        with pytest.raises((UnifiedPipelineCancelled, StageExecutionError)) as caught:
            await pipeline.run()
        assert isinstance(caught.value, PipelineTerminated)
        assert caught.value.results["A"]["x"] == 1
        assert caught.value.results.require("A") is caught.value.results["A"]


async def test_values_saved_on_the_way_survive_a_body_that_never_ends_well(autojump_clock: MockClock) -> None:
    async def crawls(ctx: StageContext) -> None:
        pages: list[int] = []
        for page in range(100):
            await trio.sleep(1)
            pages.append(page)
            ctx.save_partial(pages=pages)

    results = await results_of(Pipeline("crawl").with_stage("crawl", crawls, timeout=3.5))
    assert results.partial == {"crawl": {"pages": [0, 1, 2]}}
