"""DAG-009: timeouts and cancellation, to the exact moment."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Self

import pytest
import trio

from stageflow import (
    CauseKind,
    DefinitionError,
    Pipeline,
    PipelineResults,
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
    causes,
    chain,
    duration,
    end,
    gives,
    results_of,
    returns,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from trio.testing import MockClock


async def test_row_1_a_stage_over_its_limit_ends_at_exactly_that(autojump_clock: MockClock) -> None:
    saw: list[bool] = []

    async def slow(ctx: StageContext) -> None:
        try:
            await trio.sleep(0.5)
        except trio.Cancelled:
            saw.append(True)
            raise

    begun = trio.current_time()
    with pytest.raises(StageTimeoutError) as caught:
        await Pipeline("row 1").with_stage("slow", slow, timeout=0.1).run()
    assert trio.current_time() - begun == 0.1
    assert saw == [True]
    error = caught.value
    assert (error.stage, error.limit, error.elapsed) == ("slow", 0.1, 0.1)
    assert "'slow'" in str(error)
    assert "limit of 0.1 s" in str(error)
    record = error.results.records["slow"]
    assert record.state is FAILED
    assert record.limit == 0.1
    assert causes(error.results) == {"slow": (CauseKind.TIMEOUT, "slow")}


async def test_row_2_a_stage_within_its_limit_is_well(autojump_clock: MockClock) -> None:
    results = await Pipeline("row 2").with_stage("quick", sleeps(0.1), timeout=5).run()
    assert states(results) == {"quick": OK}
    assert duration(results) == 0.1


async def test_row_3_both_slow_branches_end_together_and_what_was_done_stays(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = (
        Pipeline("row 3", default_timeout=0.2)
        .with_stage("root", sleeps(0.1))
        .with_stage("slow_a", sleeps(5), after="root")
        .with_stage("slow_b", sleeps(5), after="root")
        .with_stage("aggregate", witness.of(gives()), after=["slow_a", "slow_b"])
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    results = caught.value.results
    assert dict(results) == {"root": StageOutput.ok(by="root")}
    assert witness.entered == []
    assert times(results) == {
        "root": (0, 0.1),
        "slow_a": (0.1, 0.1 + 0.2),
        "slow_b": (0.1, 0.1 + 0.2),
        "aggregate": (None, 0.1 + 0.2),
    }
    assert states(results)["slow_a"] is states(results)["slow_b"] is FAILED
    assert {record.name for record in caught.value.failures} == {"slow_a", "slow_b"}
    assert_whole(results)


async def test_row_5_an_open_file_is_closed(autojump_clock: MockClock, tmp_path: Path) -> None:
    files: list[IO[str]] = []

    async def works(ctx: StageContext) -> None:
        with (tmp_path / "log.txt").open("w") as file:  # noqa: ASYNC230  # a file of its own, written at once
            files.append(file)
            file.write("begun")
            await trio.sleep(60)

    results = await results_of(Pipeline("row 5").with_stage("work", works, kind="work", timeout=0.1))
    assert duration(results) == 0.1
    assert [file.closed for file in files] == [True]
    assert (tmp_path / "log.txt").read_text() == "begun"


async def test_row_6_an_async_resource_sees_the_cancellation(autojump_clock: MockClock) -> None:
    class Resource:
        exits: list[tuple[type[BaseException] | None, float]]

        def __init__(self) -> None:
            self.exits = []

        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            traceback: TracebackType | None,
        ) -> None:
            self.exits.append((kind, trio.current_time() - begun))

    resource = Resource()

    async def holds(ctx: StageContext) -> None:
        async with resource:
            await trio.sleep(60)

    begun = trio.current_time()
    results = await results_of(Pipeline("row 6").with_stage("holds", holds, timeout=0.1))
    assert resource.exits == [(trio.Cancelled, 0.1)]
    assert states(results) == {"holds": FAILED}


async def test_row_8_fifty_runs_end_together(autojump_clock: MockClock) -> None:
    graph = Pipeline("row 8").with_stage("slow", sleeps(5), timeout=0.1).build()
    ended: list[PipelineResults] = []

    async def run() -> None:
        ended.append(await results_of(graph))

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(run)
    assert trio.current_time() - begun == 0.1
    assert [duration(results) for results in ended] == [0.1] * 50
    assert {causes(results)["slow"] for results in ended} == {(CauseKind.TIMEOUT, "slow")}


async def test_row_9_a_limit_of_zero_expires_at_the_first_checkpoint(autojump_clock: MockClock) -> None:
    reached: list[str] = []

    async def checkpoints(ctx: StageContext) -> None:
        reached.append("body")
        await trio.lowlevel.checkpoint()
        reached.append("beyond")

    with pytest.raises(StageTimeoutError) as caught:
        await Pipeline("row 9").with_stage("s", checkpoints, timeout=0).run()
    assert reached == ["body"]
    assert (caught.value.limit, caught.value.elapsed) == (0, 0)
    assert "limit of 0 s" in str(caught.value)


@pytest.mark.parametrize("before", [5, 0, None])
async def test_row_9_a_limit_of_zero_does_not_touch_what_has_no_checkpoint_nor_its_neighbours(
    autojump_clock: MockClock, before: float | None
) -> None:
    pipeline = (
        Pipeline("row 9")
        .with_stage("a", gives(), timeout=before)
        .with_stage("s", gives(), timeout=0, after="a")
        .with_stage("b", sleeps(1), timeout=5, after="s")
        .with_stage("c", gives(), timeout=0, after="b")
    )
    results = await pipeline.run()
    assert set(states(results).values()) == {OK}
    assert duration(results) == 1


async def test_row_9_none_is_no_limit(autojump_clock: MockClock) -> None:
    week = 7 * 24 * 3600
    assert duration(await chain(1, sleeps(29)).run()) == 29
    results = await Pipeline("row 9").with_stage("s", sleeps(week), timeout=None).run()
    assert duration(results) == week
    results = await Pipeline("row 9", default_timeout=None).with_stage("s", sleeps(week)).run()
    assert duration(results) == week
    results = await Pipeline("row 9").with_stage("s", sleeps(week), timeout=float("inf")).run()
    assert duration(results) == week


def test_row_9_a_negative_limit_is_a_definition_error() -> None:
    with pytest.raises(DefinitionError, match="negative"):
        Pipeline("row 9").with_stage("s", gives(), timeout=-0.1)
    with pytest.raises(DefinitionError, match="negative"):
        Pipeline("row 9", default_timeout=-1)


async def test_row_10_a_cancel_in_the_middle_of_a_chain() -> None:
    witness = Witness()
    pipeline = (
        Pipeline("row 10")
        .with_stage("first", witness.of(gives(x=1)))
        .with_stage("second", witness.of(returns(StageOutput.cancel("wrong account"))), after="first")
        .with_stage("third", witness.of(gives()), after="second")
    )
    with pytest.raises(UnifiedPipelineCancelled, match="wrong account") as caught:
        await pipeline.run()
    assert witness.entered == ["first", "second"]
    assert dict(caught.value.results) == {"first": StageOutput.ok(x=1)}
    assert states(caught.value.results) == {"first": OK, "second": CANCELLED, "third": SKIPPED}
    assert (caught.value.stage, caught.value.reason) == ("second", "wrong account")
    assert caught.value.results.status is RunStatus.CANCELLED


# The edges


async def test_edge_a_duration_of_exactly_the_limit_is_too_long(autojump_clock: MockClock) -> None:
    """On a tie the outer limit wins, and the stage's is outside of the sleep."""
    for pipeline in (
        Pipeline("tie").with_stage("s", sleeps(0.1), timeout=0.1),
        Pipeline("tie", default_timeout=0.1).with_stage("a", gives()).with_stage("s", sleeps(0.1), after="a"),
    ):
        results = await results_of(pipeline)
        assert states(results)["s"] is FAILED
        assert causes(results)["s"] == (CauseKind.TIMEOUT, "s")
        assert duration(results) == 0.1


async def test_edge_a_tie_with_the_caller_is_the_callers(autojump_clock: MockClock) -> None:
    ended = await end(Pipeline("tie").with_stage("s", sleeps(5), timeout=0.1), within=0.1)
    assert ended.caught
    assert states(ended.results) == {"s": CANCELLED}
    assert causes(ended.results) == {"s": (CauseKind.CALLER, None)}


async def test_edge_a_result_in_the_tick_of_the_deadline_counts(autojump_clock: MockClock) -> None:
    """The body is woken before the deadline is looked at, and returns after."""

    async def returns_in_time(ctx: StageContext) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        autojump_clock.jump(0.1)  # now the deadline has come, but the body goes on without a checkpoint
        return {"in": "time"}

    witness = Witness()
    pipeline = (
        Pipeline("tick")
        .with_stage("s", returns_in_time, timeout=0.1)
        .with_stage("next", witness.of(sleeps(0.1)), after="s", timeout=0.2)
    )
    results = await pipeline.run()
    assert results["s"]["in"] == "time"
    assert states(results) == {"s": OK, "next": OK}
    assert times(results)["s"] == (0, 0.1)
    assert times(results)["next"][0] == 0.1


async def test_edge_a_result_after_the_deadline_was_seen_and_put_aside_counts(autojump_clock: MockClock) -> None:
    async def shields(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.1)
        return {"in": "time"}

    results = await Pipeline("shield").with_stage("s", shields, timeout=0.1).run()
    assert results["s"]["in"] == "time"
    assert states(results) == {"s": OK}


@pytest.mark.parametrize("policy", ["fail_fast", "isolate", "tolerate"])
async def test_edge_a_timeout_in_a_fan_in(autojump_clock: MockClock, policy: str) -> None:
    witness = Witness()
    pipeline = Pipeline("fan-in").with_stage("root", gives())
    for number in range(5):
        options: dict[str, Any] = {"timeout": 0.25 if number == 3 else None, "on_failure": policy}
        pipeline = pipeline.with_stage(
            f"b{number}", sleeps(5 if number == 3 else 0.125 * number), after="root", **options
        )
    pipeline = pipeline.with_stage("join", witness.of(gives()), after=[f"b{number}" for number in range(5)])
    pipeline = pipeline.with_stage("rest", gives(), after=[f"b{number}" for number in range(5)], join="any_settled")
    results = await results_of(pipeline)
    assert causes(results)["b3"] == (CauseKind.TIMEOUT, "b3")
    assert times(results)["b3"] == (0, 0.25)
    assert states(results)["join"] is SKIPPED
    assert times(results)["join"] == (None, 0.25)
    assert causes(results)["join"] == (CauseKind.TIMEOUT, "b3")
    assert witness.entered == []
    if policy == "fail_fast":
        assert set(results) == {"root", "b0", "b1", "b2"}  # b2 ends in the same tick
        assert states(results)["b4"] is CANCELLED
    else:
        assert set(results) == {"root", "b0", "b1", "b2", "b4", "rest"}
        assert duration(results) == 0.5
    assert_whole(results)


async def test_a_timeout_is_a_failure_whatever_its_policy(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("policy", on_failure="isolate").with_stage("s", sleeps(5), timeout=1)
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.with_stage("other", sleeps(3)).run()
    assert isinstance(caught.value, StageTimeoutError)
    assert isinstance(caught.value, TimeoutError)
    assert duration(caught.value.results) == 3


async def test_the_limit_is_of_one_stage_and_not_of_its_strand(autojump_clock: MockClock) -> None:
    results = await chain(10, sleeps(29)).run()
    assert duration(results) == 290
    assert results.status is RunStatus.SUCCEEDED
