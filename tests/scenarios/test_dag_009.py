"""DAG-009: timeouts and cancellation, to the exact moment."""

from __future__ import annotations

import gc
from contextlib import aclosing, asynccontextmanager
from typing import IO, TYPE_CHECKING, Any, Self

import pytest
import trio

from stageflow import (
    CauseKind,
    DefinitionError,
    Pipeline,
    PipelineResults,
    Retry,
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
    from collections.abc import AsyncGenerator
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


async def test_row_4_an_async_generator_is_cleaned_up_and_leaks_no_timeout(autojump_clock: MockClock) -> None:
    """100 values, one every 50 ms, under a limit of 200 ms; the generator holds a cancel scope open while it yields."""
    log: list[str] = []

    @asynccontextmanager
    async def resource() -> AsyncGenerator[None, None]:
        log.append("opened")
        try:
            yield
        finally:
            log.append("closed")

    async def produces() -> AsyncGenerator[int, None]:  # noqa: ASYNC900  # it is what is tested
        async with resource():
            for number in range(100):
                await trio.sleep(0.05)
                yield number  # noqa: ASYNC119  # likewise

    async def consumes(ctx: StageContext) -> StageOutput:
        got: list[int] = []
        async with aclosing(produces()) as values:
            async for value in values:
                got.append(value)
                ctx.save_partial(got=tuple(got))
        return StageOutput.ok(got=got)

    with pytest.raises(StageTimeoutError) as caught:
        await Pipeline("row 4").with_stage("s", consumes, timeout=0.2).run()
    assert log == ["opened", "closed"]
    assert caught.value.partial == {"got": (0, 1, 2)}
    assert caught.value.limit == 0.2
    assert caught.value.elapsed == pytest.approx(0.2)
    await trio.sleep(60)  # no scope of the run is left around the caller


async def test_row_4_a_limit_never_ends_what_comes_after_the_stage(autojump_clock: MockClock) -> None:
    """Of a generator that is left half way, the timeout inside stays in it (PEP 789)."""

    async def ticks() -> AsyncGenerator[int, None]:  # noqa: ASYNC900  # it is what is tested
        for number in range(100):
            await trio.sleep(0.05)
            yield number

    async def takes_one(ctx: StageContext) -> StageOutput:
        async with aclosing(ticks()) as values:
            return StageOutput.ok(first=await anext(values))

    results = await (
        Pipeline("row 4")
        .with_stage("one", takes_one, timeout=0.2)
        .with_stage("next", sleeps(10), after="one", timeout=20)
        .run()
    )
    assert results["one"]["first"] == 0
    assert times(results)["next"] == (0.05, 10.05)


async def test_row_7_of_three_limits_the_nearest_fires_and_the_stage_decides(autojump_clock: MockClock) -> None:
    async def decides(ctx: StageContext) -> StageOutput:
        with trio.move_on_after(3) as own:
            await trio.sleep(8)
        return StageOutput.ok(gave_up=own.cancelled_caught, left=ctx.timer.remaining)

    results = await Pipeline("row 7").with_stage("s", decides, timeout=5).run()
    assert results["s"].data == {"gave_up": True, "left": 2}
    assert (duration(results), results.status) == (3, RunStatus.SUCCEEDED)


async def test_row_7_a_limit_of_the_stages_own_that_it_lets_out_is_a_failure_and_no_timeout(
    autojump_clock: MockClock,
) -> None:
    async def strict(ctx: StageContext) -> None:
        with trio.fail_after(3):
            await trio.sleep(8)

    with pytest.raises(StageExecutionError) as caught:
        await Pipeline("row 7").with_stage("s", strict, timeout=5).run()
    assert type(caught.value) is StageExecutionError
    assert isinstance(caught.value.original, trio.TooSlowError)
    assert duration(caught.value.results) == 3


async def test_edge_a_cleanup_that_runs_long_is_bounded_and_reported(autojump_clock: MockClock) -> None:
    log: list[str] = []

    async def tidies(ctx: StageContext) -> None:
        async def disconnect() -> None:
            try:
                await trio.sleep(60)
            finally:
                log.append("disconnect")

        ctx.on_exit(disconnect)
        try:
            await trio.sleep(60)
        finally:
            with ctx.cleanup():
                await trio.sleep(60)  # noqa: ASYNC102  # ctx.cleanup() is one
            log.append("tidied")

    pipeline = Pipeline("long", cleanup_timeout=2).with_stage("s", tidies, timeout=1)
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    assert log == ["tidied", "disconnect"]
    assert (caught.value.limit, caught.value.elapsed) == (1, 5)
    first, second = caught.value.results.records["s"].details.overran
    assert first == "ctx.cleanup()"
    assert second.endswith("disconnect")


async def test_edge_a_heartbeat_every_second_keeps_a_stage_of_ten_alive_under_a_limit_of_two(
    autojump_clock: MockClock,
) -> None:
    async def beats(ctx: StageContext) -> None:
        for _ in range(10):
            await trio.sleep(1)
            ctx.heartbeat()

    results = await Pipeline("alive").with_stage("s", beats, heartbeat=2).run()
    assert (duration(results), states(results)) == (10, {"s": OK})


async def test_edge_a_nested_pipeline_of_a_minute_ends_with_the_limit_of_five_seconds_around_it(
    autojump_clock: MockClock,
) -> None:
    child = chain(3, sleeps(2)).with_stage("long", sleeps(60), after="s2", timeout=None)
    pipeline = (
        Pipeline("parent")
        .with_stage("before", gives())
        .with_stage("nested", child, after="before", timeout=5)
        .with_stage("after", gives(), after="nested")
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    error = caught.value
    assert (error.stage, error.limit, error.elapsed, duration(error.results)) == ("nested", 5, 5, 5)
    assert states(error.results) == {"before": OK, "nested": FAILED, "after": SKIPPED}
    (within,) = error.results.children["nested"]
    assert list(within) == ["s0", "s1"]
    assert states(within) == {"s0": OK, "s1": OK, "s2": CANCELLED, "long": SKIPPED}
    assert within.partial == {"s2": {"begun": "s2"}}
    assert times(within)["s2"] == (4, 5)


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=1)}, {"heartbeat": 60}])
async def test_edge_a_thousand_runs_time_out_in_the_same_instant(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    graph = Pipeline("many").with_stage("s", sleeps(60), timeout=0.1, **options).build()
    ended: set[tuple[float, float]] = set()
    begun = trio.current_time()

    async def run() -> None:
        results = await results_of(graph)
        ended.add((duration(results), trio.current_time() - begun))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(run)
    assert ended == {(0.1, 0.1)}


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=2)}, {"heartbeat": 0.05, "total_timeout": 5}])
async def test_edge_ten_thousand_timed_out_stages_leave_memory_at_its_plateau(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    """What is counted are the objects that the garbage collector knows, after each of five rounds of 2,000 timeouts."""
    pipeline = Pipeline("plateau", on_failure="isolate").with_stage("root", gives())
    for number in range(100):
        pipeline = pipeline.with_stage(f"s{number}", sleeps(60), after="root", timeout=0.1, **options)
    graph = pipeline.build()

    async def round_of() -> int:
        for _ in range(20 // options["retry"].attempts if "retry" in options else 20):
            await results_of(graph)
        gc.collect()
        return len(gc.get_objects())

    await round_of()
    counts = [await round_of() for _ in range(5)]
    assert max(counts) - min(counts) < 500  # of 2,000 stages, not one object in four is left
