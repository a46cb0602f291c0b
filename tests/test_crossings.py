"""Where limits, endings, guards and deadlines meet: each of these was a defect once."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from stageflow import (
    CauseKind,
    Limit,
    OnFailure,
    Pipeline,
    Retry,
    Run,
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
    causes,
    duration,
    end,
    gives,
    raises,
    results_of,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


SHUFFLE: Any = importlib.import_module("trio._core._run")._r  # by which Trio shuffles what is ready in one tick


async def fails_at_one(ctx: StageContext) -> None:
    await trio.sleep(1)
    raise ValueError("no such page")


async def test_a_run_that_drains_starts_no_stage_that_waits_for_its_turn(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("p", on_failure="drain", limits={"gpu": 1}).with_stage("a", fails_at_one)
    for name in "bcd":
        pipeline = pipeline.with_stage(name, sleeps(5), uses="gpu")
    results = await results_of(pipeline)
    assert sorted(state.value for name, state in states(results).items() if name != "a") == [
        "skipped",
        "skipped",
        "succeeded",
    ]
    assert duration(results) == 5
    assert {cause for name, cause in causes(results).items() if states(results)[name] is SKIPPED} == {
        (CauseKind.FAILURE, "a")
    }


async def test_a_stage_that_drains_a_run_does_not_start_the_one_that_gets_its_token(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p", on_failure="drain", max_running=1)
        .with_stage("a", fails_at_one, priority=9)
        .with_stage("b", sleeps(5))
    )
    results = await results_of(pipeline)
    if results.records["a"].waited == 0:
        assert states(results) == {"a": FAILED, "b": SKIPPED}


async def test_no_body_is_entered_because_a_failing_stage_gives_its_token_back(autojump_clock: MockClock) -> None:
    entered: list[str] = []

    async def notes(ctx: StageContext) -> None:
        entered.append(ctx.stage)
        if ctx.stage == "a":
            await fails_at_one(ctx)
        await trio.sleep(5)

    pipeline = Pipeline("p", max_running=1)
    for name in "abc":
        pipeline = pipeline.with_stage(name, notes, priority=9 if name == "a" else 0)
    results = await results_of(pipeline)
    assert set(entered) == {name for name, record in results.records.items() if record.started is not None}
    after = entered[entered.index("a") + 1 :]
    assert after == []


async def test_no_stage_is_sent_back_into_a_run_that_was_cancelled(autojump_clock: MockClock) -> None:
    entered: list[tuple[str, int]] = []

    async def draft(ctx: StageContext) -> dict[str, object]:
        if ctx.attempt == 2:
            with trio.CancelScope(shield=True):
                await trio.sleep(9)
        return {"v": ctx.attempt}

    async def between(ctx: StageContext) -> None:
        entered.append((ctx.stage, ctx.attempt))

    async def guard(ctx: StageContext) -> StageOutput:
        return StageOutput.retry("no", stage="draft")

    pipeline = (
        Pipeline("p")
        .with_stage("draft", draft)
        .with_stage("between", between, after="draft")
        .with_stage("guard", guard, after="between", retry=Retry(attempts=3))
    )
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        run.cancel("stop")
        with pytest.raises(UnifiedPipelineCancelled):
            await run.wait()
    assert entered == [("between", 1)]
    assert states(run.results)["between"] is OK


@pytest.mark.parametrize("seed", range(4))
async def test_each_of_two_branches_that_expire_at_once_has_a_cause_of_its_own(
    autojump_clock: MockClock, seed: int
) -> None:
    SHUFFLE.seed(seed)
    pipeline = (
        Pipeline("p")
        .with_stage("s", gives())
        .with_stage("x", gives(), after="s")
        .with_stage("x1", sleeps(9), after="x")
        .with_stage("x2", sleeps(9), after="x")
        .with_stage("a", sleeps(1), after="s")
        .with_stage("b", sleeps(1), after="s")
        .with_stage("j", gives(), after=["a", "b"])
        .with_stage("j1", sleeps(9), after="j")
        .with_stage("j2", sleeps(9), after="j")
        .with_branch(of="x", deadline=2)
        .with_branch(of="j", deadline=1)
    )
    results = await pipeline.run()
    reasons = {name: record.cause.reason for name, record in results.records.items() if record.cause is not None}
    assert reasons == {
        **dict.fromkeys(["x1", "x2"], "the branch reached its deadline of 2 s"),
        **dict.fromkeys(["j1", "j2"], "the branch reached its deadline of 1 s"),
    }


async def test_the_items_of_a_map_are_told_what_had_ended_their_branch(autojump_clock: MockClock) -> None:
    async def cuts(ctx: StageContext) -> None:
        nursery = ctx.nursery

        async def later() -> None:
            await trio.sleep(1)
            nursery.cancel_scope.cancel()

        nursery.start_soon(later)

    pipeline = Pipeline("p").with_stage("a", cuts).with_map("m", sleeps(9), over=lambda _: range(2), after="a")
    results = await pipeline.run()
    told = {name: results.records[name].cause for name in ("m", "m[0]", "m[1]")}
    assert {name: cause and (cause.kind, cause.stage) for name, cause in told.items()} == dict.fromkeys(
        told, (CauseKind.NURSERY, "a")
    )


async def test_a_loan_that_has_ended_gives_way_to_the_one_it_came_from(autojump_clock: MockClock) -> None:
    gpu = Limit(1)
    innermost = (
        Pipeline("innermost", limits={"gpu": gpu})
        .with_stage("slow", sleeps(2))
        .with_stage("x", sleeps(1), uses="gpu", after="slow")
    )

    async def leaves_behind(ctx: StageContext) -> None:
        async def within() -> None:
            await ctx.run_pipeline(innermost)

        ctx.nursery.start_soon(within)
        await trio.sleep(1)

    inner = Pipeline("inner", limits={"gpu": gpu}).with_stage("b", leaves_behind, uses="gpu")
    results = await Pipeline("p", limits={"gpu": gpu}).with_stage("a", inner, uses="gpu", timeout=20).run()
    assert duration(results) == 3


async def test_a_deadline_that_cuts_nothing_short_ends_nothing(autojump_clock: MockClock) -> None:
    async def late(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return {"a": 1}

    results = await Pipeline("p", deadline=1).with_stage("a", late).run()
    assert (results.status, results.records["a"].after_cancel) == (RunStatus.SUCCEEDED, True)


async def test_a_cancel_that_comes_after_the_callers_does_not_outrank_it(autojump_clock: MockClock) -> None:
    async def tidies(ctx: StageContext) -> None:
        try:
            await trio.sleep(9)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.sleep(1)

    run: Run | None = None
    with trio.move_on_after(1) as scope:
        async with Pipeline("p").with_stage("a", tidies).build().open() as run:

            async def late(run: Run) -> None:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1.5)
                run.cancel("late")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(late, run)
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert run is not None
    assert run.results.status is RunStatus.INTERRUPTED


@pytest.mark.parametrize("seed", range(6))
async def test_of_two_failures_of_one_instant_that_of_the_first_stage_is_raised(
    autojump_clock: MockClock, seed: int
) -> None:
    SHUFFLE.seed(seed)
    pipeline = Pipeline("p").with_stage("a", fails_at_one).with_stage("b", fails_at_one).with_stage("c", sleeps(9))
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    assert caught.value.stage == "a"
    assert causes(caught.value.results)["c"] == (CauseKind.FAILURE, "a")
    assert states(caught.value.results) == {"a": FAILED, "b": FAILED, "c": CANCELLED}


@pytest.mark.parametrize("policy", [OnFailure.FAIL_FAST, OnFailure.TOLERATE])
async def test_a_draft_that_fails_when_it_is_sent_back_is_what_the_run_raises(
    autojump_clock: MockClock, policy: OnFailure
) -> None:
    async def draft(ctx: StageContext) -> dict[str, object]:
        await trio.sleep(9 if ctx.feedback else 1)
        return {"text": "draft"}

    async def guard(ctx: StageContext) -> StageOutput:
        return StageOutput.retry("no", stage="draft")

    pipeline = (
        Pipeline("p")
        .with_stage("draft", draft, timeout=2)
        .with_stage("guard", guard, after="draft", retry=Retry(attempts=2), on_failure=policy)
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    assert (caught.value.stage, caught.value.limit) == ("draft", 2)


async def test_a_total_limit_says_what_the_time_was_spent_on(autojump_clock: MockClock) -> None:
    retry = Retry(attempts=9, delay=1)
    with pytest.raises(StageTimeoutError, match="its attempt before: ValueError: boom") as caught:
        await Pipeline("p").with_stage("a", raises(ValueError("boom")), retry=retry, total_timeout=2).run()
    assert isinstance(caught.value.original.__cause__, ValueError)

    gpu = Limit(1)
    await gpu.take()
    pipeline = Pipeline("p", limits={"gpu": gpu}).with_stage("a", gives(), uses="gpu", total_timeout=2)
    with pytest.raises(StageTimeoutError, match="it had waited 2 s for 'gpu'"):
        await pipeline.run()


async def test_a_retry_makes_good_for_a_child_that_succeeded_in_part(autojump_clock: MockClock) -> None:
    async def a(ctx: StageContext) -> None:
        child = Pipeline("child").with_stage("x", gives(), when=lambda _: ctx.attempt == 2)
        await ctx.run_pipeline(child)
        if ctx.attempt == 1:
            raise OSError("no route to host")

    results = await Pipeline("p").with_stage("a", a, retry=Retry(attempts=2)).run()
    assert results.status is RunStatus.SUCCEEDED


async def test_a_limit_of_no_time_is_for_the_first_checkpoint_of_the_stage_itself(autojump_clock: MockClock) -> None:
    results = await Pipeline("p").with_stage("a", gives(), timeout=0, when=lambda _: True).run()
    assert states(results) == {"a": OK}


async def test_a_limit_forgets_those_who_gave_up(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    await limit.take()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(limit.take)
        await trio.testing.wait_all_tasks_blocked()
        assert limit.waiting == 100
        nursery.cancel_scope.cancel()
    assert limit.waiting == 0
    limit.give_back()
    assert limit.take_nowait()
    assert (await end(Pipeline("p").with_stage("a", gives()))).error is None


@pytest.mark.parametrize("seed", range(6))
async def test_of_those_that_are_ready_at_once_the_first_by_priority_goes_first(
    autojump_clock: MockClock, seed: int
) -> None:
    SHUFFLE.seed(seed)
    order: list[str] = []

    async def works(ctx: StageContext) -> None:
        order.append(ctx.stage)
        await trio.sleep(1)

    pipeline = Pipeline("p", limits={"gpu": Limit(1, ageing=math.inf)})
    for name, priority in {"low": 0, "lowest": -1, "high": 3, "same": 3}.items():
        pipeline = pipeline.with_stage(name, works, uses="gpu", priority=priority)
    await pipeline.run()
    assert order == ["high", "same", "low", "lowest"]


async def test_a_failure_that_ends_a_run_does_so_after_one_that_was_isolated(autojump_clock: MockClock) -> None:
    async def fails_at_two(ctx: StageContext) -> None:
        await trio.sleep(2)
        raise ValueError("no such page")

    pipeline = (
        Pipeline("p")
        .with_stage("a", fails_at_one, on_failure="isolate")
        .with_stage("b", fails_at_two)
        .with_stage("c", sleeps(9))
        .with_stage("d", gives(), after="b")
    )
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    assert caught.value.stage == "a"
    assert [record.name for record in caught.value.failures] == ["a", "b"]
    assert causes(caught.value.results) == dict.fromkeys("bcd", (CauseKind.FAILURE, "b")) | {
        "a": (CauseKind.FAILURE, "a")
    }
    assert duration(caught.value.results) == 2


@pytest.mark.parametrize("policy", ["fail_fast", "drain"])
async def test_of_failures_in_one_instant_that_of_the_first_stage_is_raised_and_recorded_first(
    policy: Any, autojump_clock: MockClock
) -> None:
    pipeline = Pipeline("p", on_failure=policy)
    for name in "abcde":
        pipeline = pipeline.with_stage(name, fails_at_one)
    for _ in range(20):  # Trio lets what is ready at once have its turn in random order
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run()
        failures = caught.value.failures
        assert caught.value.stage == failures[0].name == "a"
        assert {record.name for record in failures} == set("abcde")
        assert [record.place for record in failures] == [0, 1, 2, 3, 4]
