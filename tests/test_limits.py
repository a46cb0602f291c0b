"""Limits: who waits, who goes first, what becomes of tokens; on every ending, and at every depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stageflow import (
    DefinitionError,
    Limit,
    Pipeline,
    PipelineResults,
    Retry,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    run_stage,
    stage,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    SKIPPED,
    Witness,
    duration,
    gives,
    results_of,
    returns,
    sleeps,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

    from stageflow.stages import Body

ERROR = ValueError("no such page")


@attrs.define
class Gauge:
    """Notes how many stages are in their bodies at once."""

    now: int = 0
    most: int = 0

    def of(self, body: Body) -> Body:
        async def gauged(ctx: StageContext) -> object:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await body(ctx)
            finally:
                self.now -= 1

        return gauged


def free(limit: Limit) -> int:
    """How many tokens a limit has, by what it shows."""
    return int(repr(limit).split()[1])


def side_by_side(width: int, body: Body, limits: dict[str, int | Limit] | None = None, **options: Any) -> Pipeline:
    """b0, b1, b2 … after nothing, of which each uses the GPU."""
    options.setdefault("uses", "gpu")
    pipeline = Pipeline("side by side", limits={"gpu": 1} if limits is None else limits)
    for number in range(width):
        pipeline = pipeline.with_stage(f"b{number}", body, **options)
    return pipeline


# How many at once


@pytest.mark.parametrize("tokens", [1, 2, 3, 100])
async def test_no_more_stages_run_than_there_are_tokens_and_no_fewer(autojump_clock: MockClock, tokens: int) -> None:
    gauge = Gauge()
    results = await side_by_side(12, gauge.of(sleeps(1)), {"gpu": tokens}).run()
    assert gauge.most == min(tokens, 12)
    assert duration(results) == -(-12 // tokens)
    assert results.status is RunStatus.SUCCEEDED


async def test_stages_that_do_not_use_it_do_not_wait(autojump_clock: MockClock) -> None:
    pipeline = side_by_side(2, sleeps(5)).with_stage("free", sleeps(1))
    results = await pipeline.run()
    assert times(results)["free"] == (0, 1)
    assert results.records["free"].waited == 0


async def test_each_run_has_tokens_of_its_own_if_the_limit_is_a_number(autojump_clock: MockClock) -> None:
    graph = side_by_side(2, sleeps(1)).build()
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(graph.run)
    assert trio.current_time() - begun == 2


async def test_runs_and_pipelines_share_a_limit_that_was_made_for_all_of_them(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(2)
    one = side_by_side(2, gauge.of(sleeps(1)), {"gpu": limit})
    other = Pipeline("other", limits={"card": limit}).with_stage("s", gauge.of(sleeps(1)), uses="card")
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one.run)
            nursery.start_soon(other.run)
    assert gauge.most == 2
    assert trio.current_time() - begun == 9 / 2 + 0.5
    assert free(limit) == 2


async def test_a_stage_that_uses_several_things_waits_for_all_of_them(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p", limits={"gpu": 1, "disk": 1})
        .with_stage("gpu", sleeps(2), uses="gpu")
        .with_stage("disk", sleeps(3), uses="disk")
        .with_stage("soon", sleeps(0.5))
        .with_stage("both", sleeps(1), after="soon", uses=["gpu", "disk"])
    )
    results = await pipeline.run()
    assert times(results)["both"] == (3, 4)
    assert results.records["both"].waited == 2.5


async def test_two_stages_that_name_two_things_in_different_orders_do_not_wait_for_each_other(
    autojump_clock: MockClock,
) -> None:
    pipeline = (
        Pipeline("p", limits={"a": 1, "b": 1})
        .with_stage("ab", sleeps(1), uses=["a", "b"])
        .with_stage("ba", sleeps(1), uses=["b", "a"])
    )
    for _ in range(10):
        assert duration(await pipeline.run()) == 2


async def test_two_pipelines_that_call_two_limits_by_each_others_names_do_not_wait_for_each_other(
    autojump_clock: MockClock,
) -> None:
    x, y = Limit(1), Limit(1)

    async def takes_both(pipeline: Pipeline) -> None:
        await pipeline.run()

    hold = sleeps(1)
    one = Pipeline("one", limits={"a": x, "b": y}).with_stage("s", hold, uses=["a", "b"], total_timeout=60)
    two = Pipeline("two", limits={"a": y, "b": x}).with_stage("s", hold, uses=["a", "b"], total_timeout=60)
    third = Pipeline("third", limits={"x": x, "y": y}).with_stage("x", hold, uses="x").with_stage("y", hold, uses="y")
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(takes_both, third)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(takes_both, one)
        nursery.start_soon(takes_both, two)
    assert trio.current_time() - begun == 3


async def test_one_limit_under_two_names_is_taken_once_by_a_stage_that_uses_both(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    pipeline = Pipeline("p", limits={"a": limit, "b": limit}).with_stage(
        "s", sleeps(1), uses=["a", "b"], total_timeout=60
    )
    assert duration(await pipeline.run()) == 1
    assert free(limit) == 1


async def test_a_stage_alone_has_what_it_uses(autojump_clock: MockClock) -> None:
    assert await run_stage(sleeps(1), uses="gpu") == StageOutput.ok(by="body")


# Who goes first


async def queue(*waiters: tuple[str, int, float], ageing: float = 1.0, hold: float = 0.0) -> list[str]:
    """Lets stages of a priority come after so many seconds, while a token is held; gives the order they are served in.

    The token is given back after `hold` seconds, and each that has it holds it for a millisecond.
    """
    limit, witness = Limit(1, ageing=ageing), Witness()
    await limit.take()
    async with trio.open_nursery() as nursery:

        async def one(name: str, priority: int, after: float) -> None:
            await trio.sleep(after)
            pipeline = Pipeline(name, limits={"gpu": limit})
            await pipeline.with_stage(name, witness.of(sleeps(0.001)), uses="gpu", priority=priority).run()

        for waiter in waiters:
            nursery.start_soon(one, *waiter)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(hold)
        limit.give_back()
    assert free(limit) == 1
    return witness.entered


async def test_among_those_that_wait_the_greater_priority_goes_first(autojump_clock: MockClock) -> None:
    waiters = (("low", -5, 0), ("middle", 0, 0), ("high", 5, 0))
    assert await queue(*waiters) == ["high", "middle", "low"]


async def test_among_equals_goes_first_who_came_first(autojump_clock: MockClock) -> None:
    names = [str(number) for number in range(8)]
    assert await queue(*((name, 3, 0) for name in names)) == names


async def test_a_second_of_waiting_makes_up_for_a_step_of_priority(autojump_clock: MockClock) -> None:
    assert await queue(("old", 0, 0), ("new", 2, 1.5), hold=5) == ["new", "old"]
    assert await queue(("old", 0, 0), ("new", 2, 2.5), hold=5) == ["old", "new"]


async def test_ageing_is_as_fast_as_the_limit_says(autojump_clock: MockClock) -> None:
    assert await queue(("old", 0, 0), ("new", 2, 19), hold=50, ageing=10) == ["new", "old"]
    assert await queue(("old", 0, 0), ("new", 2, 21), hold=50, ageing=10) == ["old", "new"]
    assert await queue(("old", 0, 0), ("new", 1, 9999), hold=10_000, ageing=math.inf) == ["new", "old"]


@pytest.mark.parametrize(("ageing", "served_at"), [(1.0, 6), (2.0, 11), (math.inf, 41)])
async def test_a_low_one_passes_a_stream_of_high_ones_when_it_is_old_enough(
    autojump_clock: MockClock, ageing: float, served_at: float
) -> None:
    limit = Limit(1, ageing=ageing)
    begun = trio.current_time()
    served: list[float] = []

    async def low() -> None:
        await limit.take(0)
        served.append(trio.current_time() - begun)
        limit.give_back()

    async def high() -> None:
        await limit.take(5)
        await trio.sleep(1)
        limit.give_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(high)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(low)
        for _ in range(40):
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(high)
            await trio.sleep(1)
    assert served == [served_at]


# What the record says


async def test_the_waiting_is_in_the_record_and_the_stage_starts_after_it(autojump_clock: MockClock) -> None:
    results = await side_by_side(3, sleeps(2)).run()
    assert sorted(record.waited for record in results.records.values()) == [0, 2, 4]
    for record in results.records.values():
        assert record.started is not None
        assert record.started - results.trace.started == record.waited
        assert record.duration == 2


async def test_the_waits_of_all_attempts_add_up(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    tries: list[int] = []

    async def fails_at_first(ctx: StageContext) -> StageOutput:
        tries.append(ctx.attempt)
        await trio.sleep(1)
        return StageOutput.fail("not yet", recoverable=True) if len(tries) == 1 else StageOutput.ok()

    pipeline = Pipeline("p", limits={"gpu": limit}).with_stage(
        "s", fails_at_first, uses="gpu", retry=Retry(attempts=2, delay=1)
    )
    run: list[PipelineResults] = []

    async def one() -> None:
        run.append(await pipeline.run())

    await limit.take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(3)
        limit.give_back()
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1.5)  # it has failed once, and waits for its delay
        await limit.take()
        await trio.sleep(2.5)  # it has waited for 2 s
        limit.give_back()
    (results,) = run
    record = results.records["s"]
    assert record.waited == 3 + 2
    assert record.attempts == 2
    assert tries == [1, 2]
    assert [attempt.ended - attempt.started for attempt in record.tries if attempt.ended] == [1, 1]
    assert duration(results) == 3 + 1 + 1 + 2 + 1


# Time


async def test_waiting_is_not_counted_against_the_limit_on_an_attempt(autojump_clock: MockClock) -> None:
    results = await side_by_side(5, sleeps(2), timeout=3).run()
    assert results.status is RunStatus.SUCCEEDED
    assert duration(results) == 10


async def test_the_limit_on_an_attempt_begins_with_its_token(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p", limits={"gpu": 1})
        .with_stage("first", sleeps(4))
        .with_stage("second", sleeps(9), after="first", uses="gpu", timeout=3)
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    assert (caught.value.stage, caught.value.limit, caught.value.elapsed) == ("second", 3, 3)
    limit = Limit(1)
    await limit.take()
    shared = Pipeline("p", limits={"gpu": limit}).with_stage("s", sleeps(9), uses="gpu", timeout=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after, 5, limit.give_back)
        with pytest.raises(StageTimeoutError) as caught:
            await shared.run()
    assert caught.value.elapsed == 3
    assert duration(caught.value.results) == 8
    assert caught.value.results.records["s"].waited == 5


async def after(seconds: float, action: Callable[[], object]) -> None:
    await trio.sleep(seconds)
    action()


async def test_waiting_is_counted_against_the_limit_on_all_attempts(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    await limit.take()
    witness = Witness()
    pipeline = Pipeline("p", limits={"gpu": limit}).with_stage(
        "s", witness.of(sleeps(1)), uses="gpu", total_timeout=5, retry=Retry(attempts=9)
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    error = caught.value
    assert error.limit == duration(error.results) == 5
    assert "total_timeout=" in error.source
    record = error.results.records["s"]
    assert (record.state, record.attempts) == (FAILED, 0)
    assert witness.entered == []
    limit.give_back()
    assert free(limit) == 1


async def test_a_token_is_not_held_while_a_stage_waits_for_its_next_attempt(autojump_clock: MockClock) -> None:
    tries: list[str] = []

    async def fails_at_first(ctx: StageContext) -> StageOutput:
        tries.append(ctx.stage)
        await trio.sleep(1)
        return StageOutput.ok() if tries.count(ctx.stage) == 2 else StageOutput.fail("not yet", recoverable=True)

    pipeline = (
        Pipeline("p", limits={"gpu": 1})
        .with_stage("first", fails_at_first, uses="gpu", priority=1, retry=Retry(attempts=2, delay=10))
        .with_stage("start", sleeps(0.5))
        .with_stage("other", sleeps(5), after="start", uses="gpu")
    )
    results = await pipeline.run()
    assert times(results)["other"] == (1, 6)
    assert times(results)["first"] == (0, 12)


# Tokens are given back


def acts(way: str) -> Callable[[trio.CancelScope, Run], None]:
    def act(scope: trio.CancelScope, run: Run) -> None:
        if way == "scope":
            scope.cancel()
        elif way == "run.cancel":
            run.cancel("enough")
        elif way == "cancel_branch":
            run.cancel_branch("a", "enough")

    return act


async def shields(ctx: StageContext) -> StageOutput:
    with trio.CancelScope(shield=True):
        await trio.sleep(3)
    return StageOutput.ok()


def never(_: StageContext) -> bool:
    return False


BODIES: dict[str, tuple[Body, dict[str, Any]]] = {
    "ok": (sleeps(2), {}),
    "failure": (sleeps(2, ERROR), {}),
    "fail": (sleeps(2, StageOutput.fail("no")), {}),
    "skip": (sleeps(2, StageOutput.skip("no")), {}),
    "cancel": (sleeps(2, StageOutput.cancel("no")), {}),
    "cancel_branch by itself": (sleeps(2, StageOutput.cancel_branch("no")), {}),
    "what no stage may return": (returns(5), {}),
    "timeout": (sleeps(9), {"timeout": 2}),
    "timeout of nothing": (sleeps(9), {"timeout": 0}),
    "heartbeat": (sleeps(9), {"heartbeat": 2}),
    "total timeout": (sleeps(9), {"total_timeout": 2}),
    "retries": (sleeps(2, ERROR), {"retry": Retry(attempts=3, delay=1)}),
    "retries of timeouts": (sleeps(9), {"retry": Retry(attempts=3, delay=1), "timeout": 2}),
    "condition": (sleeps(2), {"when": never}),
    "scope": (sleeps(9), {}),
    "run.cancel": (sleeps(9), {}),
    "cancel_branch": (sleeps(9), {}),
    "scope, shielded": (shields, {}),
}


@pytest.mark.parametrize("way", BODIES)
async def test_every_token_is_given_back_however_a_stage_ends(autojump_clock: MockClock, way: str) -> None:
    body, options = BODIES[way]
    gpu, disk = Limit(1), Limit(3)
    pipeline = (
        Pipeline("p", limits={"gpu": gpu, "disk": disk}, max_running=2)
        .with_stage("root", gives())
        .with_stage("a", body, after="root", uses=["gpu", "disk"], **options)
        .with_stage("b", body, after="root", uses=["gpu", "disk"], **options)
        .with_stage("c", body, after="root", uses="disk", **options)
    )
    await end_loosely(pipeline, acts(way.removesuffix(", shielded")))
    assert (free(gpu), free(disk)) == (1, 3)
    assert gpu.waiting == disk.waiting == 0
    # And they are as good as new.
    again = Pipeline("p", limits={"gpu": gpu}).with_stage("s", sleeps(1), uses="gpu")
    assert duration(await again.run()) == 1


async def end_loosely(pipeline: Pipeline, act: Callable[[trio.CancelScope, Run], None]) -> PipelineResults:
    """Like `end`, for stages that are tried again, or wait."""
    run: Run | None = None
    with trio.move_on_after(60) as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open() as run:
                await trio.sleep(1)
                act(scope, run)
        except (StageExecutionError, UnifiedPipelineCancelled):
            pass
    assert run is not None
    assert all(record.state.settled for record in run.results.records.values())
    return run.results


async def test_a_keyboard_interrupt_gives_the_token_back() -> None:
    async def interrupts(ctx: StageContext) -> None:
        await trio.lowlevel.checkpoint()
        raise KeyboardInterrupt

    limit = Limit(1)
    with pytest.raises(KeyboardInterrupt):
        await Pipeline("p", limits={"gpu": limit}).with_stage("s", interrupts, uses="gpu").run()
    assert free(limit) == 1


# Those that wait and are cancelled


async def test_a_stage_that_is_cancelled_while_it_waits_was_never_entered_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    limit, witness = Limit(1), Witness()
    await limit.take()
    pipeline = (
        Pipeline("p", limits={"gpu": limit, "disk": (disk := Limit(1))})
        .with_stage("root", gives())
        .with_stage("waits", witness.of(sleeps(1)), after="root", uses=["disk", "gpu"])
        .with_stage("other", sleeps(2), after="root")
    )
    results = await end_loosely(pipeline, lambda _, run: run.cancel_branch("waits", "enough"))
    record = results.records["waits"]
    assert (record.state, record.attempts, record.started) == (SKIPPED, 0, None)
    assert record.tries == ()
    assert record.cause is not None
    assert record.cause.reason == "enough"
    assert record.ended == results.trace.started + 1
    assert results["other"]
    assert witness.entered == []
    assert limit.waiting == 0
    assert free(disk) == 1  # which it held already
    limit.give_back()
    assert free(limit) == 1


async def test_the_waiting_of_a_stage_that_was_cancelled_meanwhile_is_in_its_record(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    await limit.take()
    pipeline = Pipeline("p", limits={"gpu": limit}).with_stage("s", sleeps(1), uses="gpu")
    results = await end_loosely(pipeline, lambda scope, _: scope.cancel())
    assert results.records["s"].waited == 1


async def test_a_stage_that_is_cancelled_while_it_waits_to_be_tried_again_was_entered_once(
    autojump_clock: MockClock,
) -> None:
    limit = Limit(1)
    pipeline = Pipeline("p", limits={"gpu": limit}).with_stage(
        "s", sleeps(0.25, ERROR), uses="gpu", retry=Retry(attempts=2, delay=0.25)
    )

    async def takes_it_meanwhile() -> None:
        await trio.sleep(0.375)
        await limit.take()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(takes_it_meanwhile)
        results = await end_loosely(pipeline, lambda scope, _: scope.cancel())
    record = results.records["s"]
    assert record.state is CANCELLED
    assert record.attempts == 1
    assert [attempt.number for attempt in record.tries] == [1]


async def test_a_waiter_that_gives_up_makes_room_for_the_next(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    await limit.take()
    order: list[str] = []

    async def waits(name: str, priority: int, patience: float) -> None:
        with trio.move_on_after(patience):
            await limit.take(priority)
            order.append(name)
            limit.give_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits, "impatient", 9, 1)
        nursery.start_soon(waits, "patient", 0, 99)
        await trio.sleep(2)
        assert limit.waiting == 1
        limit.give_back()
    assert order == ["patient"]
    assert free(limit) == 1


async def test_a_waiter_that_is_given_the_token_in_the_tick_in_which_it_is_cancelled_does_not_lose_it(
    autojump_clock: MockClock,
) -> None:
    limit = Limit(1)
    for first in ("cancel", "give_back"):
        await limit.take()
        took: list[str] = []

        async def waits(took: list[str] = took) -> None:
            await limit.take()
            took.append("it")
            limit.give_back()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits)
            await trio.testing.wait_all_tasks_blocked()
            if first == "cancel":
                nursery.cancel_scope.cancel()
                limit.give_back()
            else:
                limit.give_back()
                nursery.cancel_scope.cancel()
        assert took == ([] if first == "cancel" else ["it"])
        assert free(limit) == 1
        assert limit.waiting == 0


async def test_a_body_is_not_entered_in_a_scope_that_was_cancelled_before_even_if_there_is_a_token() -> None:
    witness, limit = Witness(), Limit(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await Pipeline("p", limits={"gpu": limit}).with_stage("s", witness.of(gives()), uses="gpu").run()
    assert scope.cancelled_caught
    assert witness.entered == []
    assert free(limit) == 1


# max_running


@pytest.mark.parametrize("most", [1, 2, 5])
async def test_no_more_stages_of_a_run_run_at_once_than_it_says(autojump_clock: MockClock, most: int) -> None:
    gauge = Gauge()
    pipeline = Pipeline("p", max_running=most)
    for number in range(10):
        pipeline = pipeline.with_stage(f"b{number}", gauge.of(sleeps(1)))
    results = await pipeline.run()
    assert gauge.most == most
    assert duration(results) == 10 / most
    assert results.status is RunStatus.SUCCEEDED


async def test_who_waits_for_its_turn_is_served_by_priority(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = Pipeline("p", max_running=1).with_stage("root", sleeps(1))
    for number in range(5):
        pipeline = pipeline.with_stage(f"b{number}", witness.of(sleeps(1)), after="root", priority=number)
    await pipeline.run()
    first, *rest = witness.entered  # the first to come finds a free turn
    assert rest == sorted(rest, reverse=True)
    assert sorted([first, *rest]) == [f"b{number}" for number in range(5)]


async def test_a_chain_runs_at_full_speed_however_few_may_run(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("p", max_running=1).with_stage("a", sleeps(1)).with_stage("b", sleeps(1), after="a")
    results = await pipeline.with_stage("c", Pipeline("c").with_stage("x", sleeps(1)), after="b").run()
    assert duration(results) == 3
    assert all(record.waited == 0 for record in results.records.values())


async def test_a_turn_is_not_taken_by_who_waits_for_something_else(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p", max_running=2, limits={"gpu": 1})
        .with_stage("a", sleeps(5), uses="gpu")
        .with_stage("b", sleeps(5), uses="gpu")
        .with_stage("c", sleeps(5))
        .with_stage("d", sleeps(5), after="c")
    )
    assert duration(await pipeline.run()) == 10


async def test_the_items_of_a_map_and_a_nested_pipeline_have_turns_of_their_own(autojump_clock: MockClock) -> None:
    gauge = Gauge()
    pipeline = Pipeline("p", max_running=1).with_map("m", gauge.of(sleeps(1)), over=lambda _: range(4))
    results = await pipeline.with_stage("nest", side_by_side(2, sleeps(1), {"gpu": 2}), after="m").run()
    assert gauge.most == 4
    assert duration(results) == 2


# No deadlock


def uses_gpu(limit: Limit, width: int, body: Body) -> Pipeline:
    """A child whose stages all use the limit."""
    return side_by_side(width, body, {"gpu": limit})


async def test_a_child_borrows_the_token_of_its_stage_one_of_its_stages_at_a_time(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(1)
    child = uses_gpu(limit, 3, gauge.of(sleeps(1)))
    results = await Pipeline("p", limits={"gpu": limit}).with_stage("nest", child, uses="gpu").run()
    assert results.status is RunStatus.SUCCEEDED
    assert gauge.most == 1
    assert duration(results) == 3
    assert free(limit) == 1


async def test_a_child_borrows_even_if_there_are_other_tokens(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(3)
    child = uses_gpu(limit, 3, gauge.of(sleeps(1)))
    await Pipeline("p", limits={"gpu": limit}).with_stage("nest", child, uses="gpu").run()
    assert gauge.most == 1


async def test_a_token_is_lent_two_levels_down_and_further(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(1)
    pipeline = uses_gpu(limit, 2, gauge.of(sleeps(1)))
    for _ in range(3):
        pipeline = Pipeline("p", limits={"gpu": limit}).with_stage("nest", pipeline, uses="gpu")
    assert duration(await pipeline.run()) == 2
    assert gauge.most == 1
    assert free(limit) == 1


async def test_a_token_is_lent_past_a_level_that_does_not_use_it(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    middle = Pipeline("middle").with_stage("nest", uses_gpu(limit, 2, sleeps(1)))
    results = await Pipeline("p", limits={"gpu": limit}).with_stage("nest", middle, uses="gpu").run()
    assert duration(results) == 2


async def test_children_that_a_stage_runs_beside_each_other_take_turns_at_its_token(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(1)
    child = uses_gpu(limit, 1, gauge.of(sleeps(1)))

    async def runs_three(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ctx.run_pipeline, child)

    results = await Pipeline("p", limits={"gpu": limit}).with_stage("nest", runs_three, uses="gpu").run()
    assert gauge.most == 1
    assert duration(results) == 3
    assert free(limit) == 1


async def test_stages_beside_each_other_lend_what_each_of_them_holds(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(2)
    child = uses_gpu(limit, 2, gauge.of(sleeps(1)))
    pipeline = Pipeline("p", limits={"gpu": limit})
    for number in range(4):
        pipeline = pipeline.with_stage(f"nest{number}", child, uses="gpu")
    results = await pipeline.run()
    assert gauge.most == 2
    assert duration(results) == 4
    assert free(limit) == 2


async def test_a_map_lends_its_token_to_its_items_one_at_a_time(autojump_clock: MockClock) -> None:
    gauge = Gauge()
    body = stage(uses="gpu")(gauge.of(sleeps(1)))
    pipeline = Pipeline("p", limits={"gpu": 2})
    results = await pipeline.with_map("m", body, over=lambda _: range(4), uses="gpu").run()
    assert gauge.most == 1
    assert duration(results) == 4
    gauge = Gauge()
    body = stage(uses="gpu")(gauge.of(sleeps(1)))
    results = await pipeline.with_map("m", body, over=lambda _: range(4)).run()
    assert gauge.most == 2
    assert duration(results) == 2


async def test_the_items_of_a_map_and_the_stages_beside_it_share_the_limits_of_their_run(
    autojump_clock: MockClock,
) -> None:
    gauge = Gauge()
    body = stage(uses="gpu")(gauge.of(sleeps(1)))
    pipeline = side_by_side(3, gauge.of(sleeps(1)), {"gpu": 2}).with_map("m", body, over=lambda _: range(3))
    assert duration(await pipeline.run()) == 3
    assert gauge.most == 2


async def test_a_child_that_was_cancelled_gives_back_what_it_had_borrowed(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    child = uses_gpu(limit, 3, sleeps(60))
    tries: list[int] = []

    async def bounds(ctx: StageContext) -> None:
        with trio.move_on_after(2):
            await ctx.run_pipeline(child)
        tries.append(ctx.attempt)
        results = await ctx.run_pipeline(uses_gpu(limit, 1, sleeps(1)))
        assert results["b0"]

    results = await Pipeline("p", limits={"gpu": limit}).with_stage("nest", bounds, uses="gpu").run()
    assert duration(results) == 3
    assert free(limit) == 1


async def test_a_child_of_a_stage_that_is_tried_again_borrows_again(autojump_clock: MockClock) -> None:
    limit = Limit(1)
    child = uses_gpu(limit, 2, sleeps(1, ERROR))
    results = await results_of(
        Pipeline("p", limits={"gpu": limit}).with_stage("nest", child, uses="gpu", retry=Retry(attempts=3))
    )
    assert results.records["nest"].attempts == 3
    assert duration(results) == 3
    assert free(limit) == 1


async def test_a_run_that_begins_when_the_stage_has_ended_borrows_nothing(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(1)
    child = uses_gpu(limit, 1, gauge.of(sleeps(3)))

    async def leaves_it(ctx: StageContext) -> None:
        async def later() -> None:
            await trio.sleep(1)
            await ctx.run_pipeline(child)

        ctx.nursery.start_soon(later)

    pipeline = (
        Pipeline("p", limits={"gpu": limit})
        .with_stage("leaves", leaves_it, uses="gpu")
        .with_stage("other", gauge.of(sleeps(5)), after="leaves", uses="gpu")
    )
    results = await pipeline.run()
    assert gauge.most == 1
    assert duration(results) == 8


async def test_a_run_that_outlives_its_stage_holds_on_to_what_it_has_borrowed(autojump_clock: MockClock) -> None:
    gauge, limit = Gauge(), Limit(1)
    child = uses_gpu(limit, 1, gauge.of(sleeps(3)))

    async def leaves_it(ctx: StageContext) -> None:
        ctx.nursery.start_soon(ctx.run_pipeline, child)
        await trio.sleep(1)

    pipeline = (
        Pipeline("p", limits={"gpu": limit})
        .with_stage("leaves", leaves_it, uses="gpu")
        .with_stage("other", gauge.of(sleeps(5)), after="leaves", uses="gpu")
    )
    await pipeline.run()
    assert free(limit) == 1
    assert gauge.most == 1


# Declarations


def test_an_unknown_limit_is_an_error_with_a_hint() -> None:
    with pytest.raises(DefinitionError, match="did you mean 'gpu'"):
        Pipeline("p", limits={"gpu": 1, "disk": 1}).with_stage("s", gives(), uses="gpo").build()
    with pytest.raises(DefinitionError, match="limits="):
        Pipeline("p").with_stage("s", gives(), uses="gpu").build()


@pytest.mark.parametrize(
    "limits", [{"gpu": 0}, {"gpu": -1}, {"gpu": 1.5}, {"gpu": True}, {"gpu": "2"}, {"": 1}, {1: 1}, ["gpu"], "gpu"]
)
def test_wrong_limits_show_where_they_are_written(limits: Any) -> None:
    with pytest.raises(DefinitionError):
        Pipeline("p", limits=limits)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "2", None, math.inf])
def test_a_limit_has_a_whole_number_of_tokens(tokens: Any) -> None:
    with pytest.raises(DefinitionError):
        Limit(tokens)


@pytest.mark.parametrize("ageing", [0, -1, math.nan, "1", None])
def test_a_limit_ages_by_a_positive_number_of_seconds(ageing: Any) -> None:
    with pytest.raises(DefinitionError):
        Limit(1, ageing=ageing)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "2"])
def test_a_wrong_max_running_shows_where_it_is_written(most: Any) -> None:
    with pytest.raises(DefinitionError):
        Pipeline("p", max_running=most)


@pytest.mark.parametrize("options", [{"uses": 5}, {"uses": [1]}, {"uses": ""}, {"priority": "high"}, {"priority": 1.5}])
def test_wrong_uses_and_priorities_show_where_they_are_written(options: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError):
        Pipeline("p", limits={"gpu": 1}).with_stage("s", gives(), **options)


# Laws


@attrs.frozen
class Guest:
    """Somebody who takes a token."""

    comes: int
    stays: int
    priority: int
    patience: int  # how long it waits, or stays


GUESTS = st.lists(
    st.builds(
        Guest,
        comes=st.integers(0, 10),
        stays=st.integers(0, 5),
        priority=st.integers(-10, 10),
        patience=st.integers(0, 40),
    ),
    max_size=20,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(guests=GUESTS, tokens=st.integers(1, 4), ageing=st.sampled_from([0.5, 1.0, 3.0, math.inf]))
async def test_never_more_tokens_are_in_use_than_there_are_and_every_patient_guest_is_served(
    autojump_clock: MockClock, guests: list[Guest], tokens: int, ageing: float
) -> None:
    limit = Limit(tokens, ageing=ageing)
    used = 0
    served: list[int] = []
    gone: list[int] = []

    async def guest(number: int, who: Guest) -> None:
        nonlocal used
        await trio.sleep(who.comes)
        with trio.move_on_after(who.patience):
            await limit.take(who.priority)
            try:
                used += 1
                assert used <= tokens
                assert not free(limit) or not limit.waiting
                served.append(number)
                await trio.sleep(who.stays)
            finally:
                used -= 1
                limit.give_back()
            return
        if number not in served:
            gone.append(number)

    async with trio.open_nursery() as nursery:
        for number, who in enumerate(guests):
            nursery.start_soon(guest, number, who)
    assert sorted(served + gone) == list(range(len(guests)))
    assert free(limit) == tokens
    assert limit.waiting == 0
    longest = sum(who.stays for who in guests)
    assert all(guests[number].patience <= longest for number in gone)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ends=st.lists(st.sampled_from(["ok", "fail", "timeout", "skip", "retry"]), min_size=1, max_size=8),
    tokens=st.integers(1, 3),
    most=st.sampled_from([None, 1, 2]),
    enough=st.integers(1, 30),
)
async def test_a_shared_limit_holds_and_is_whole_again_whatever_becomes_of_the_stages(
    autojump_clock: MockClock, ends: list[str], tokens: int, most: int | None, enough: int
) -> None:
    gauge, limit = Gauge(), Limit(tokens)
    bodies: dict[str, tuple[Body, dict[str, Any]]] = {
        "ok": (sleeps(2), {}),
        "fail": (sleeps(1, ERROR), {}),
        "timeout": (sleeps(9), {"timeout": 3}),
        "skip": (sleeps(1, StageOutput.skip("no")), {}),
        "retry": (sleeps(1, ERROR), {"retry": Retry(attempts=2, delay=1)}),
    }
    pipeline = Pipeline("p", limits={"gpu": limit}, max_running=most, on_failure="isolate")
    for number, way in enumerate(ends):
        body, options = bodies[way]
        pipeline = pipeline.with_stage(f"s{number}", gauge.of(body), uses="gpu", **options)
    with trio.move_on_after(enough):
        await results_of(pipeline)
    assert gauge.now == 0
    assert gauge.most <= min(tokens, most or 99)
    assert free(limit) == tokens
    assert limit.waiting == 0
