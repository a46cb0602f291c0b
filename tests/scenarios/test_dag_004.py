"""DAG-004: much work of high priority, little of low, few places: the low always finishes; waiting is no error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from stageflow import Limit, Pipeline, RunStatus, StageContext, StageOutput
from tests.stages import OK, duration, sleeps, states

if TYPE_CHECKING:
    from trio.testing import MockClock

KIN = [(50, 2, 3), (100, 5, 5), (20, 10, 1), (200, 1, 2), (10, 10, 1)]


@pytest.mark.parametrize(("high", "low", "limit"), KIN)
async def test_all_work_finishes_in_the_shortest_time_there_is(
    autojump_clock: MockClock, high: int, low: int, limit: int
) -> None:
    pipeline = Pipeline("p", limits={"gpu": limit}, default_timeout=2)  # which the waiting does not count against
    for number in range(high):
        pipeline = pipeline.with_stage(f"high{number}", sleeps(1), uses="gpu", priority=10)
    for number in range(low):
        pipeline = pipeline.with_stage(f"low{number}", sleeps(1), uses="gpu", priority=0)
    results = await pipeline.run()
    assert results.status is RunStatus.SUCCEEDED
    assert set(states(results).values()) == {OK}
    assert duration(results) == -(-(high + low) // limit)


@pytest.mark.parametrize("limit", [1, 3])
async def test_low_work_finishes_although_high_work_never_stops_coming(autojump_clock: MockClock, limit: int) -> None:
    gpu = Limit(limit)
    served: list[tuple[str, float]] = []
    begun = trio.current_time()

    async def works(ctx: StageContext) -> StageOutput:
        served.append((ctx.pipeline, trio.current_time() - begun))
        await trio.sleep(1)
        return StageOutput.ok()

    async def run(name: str, priority: int) -> None:
        await Pipeline(name, limits={"gpu": gpu}).with_stage("s", works, uses="gpu", priority=priority).run()

    async with trio.open_nursery() as nursery:
        for _ in range(2 * limit):
            nursery.start_soon(run, "high", 10)
        await trio.sleep(0.5)
        for _ in range(2):
            nursery.start_soon(run, "low", 0)
        for _ in range(40):
            for _ in range(limit):  # as many as can be served
                nursery.start_soon(run, "high", 10)
            await trio.sleep(1)
    low = [at for name, at in served if name == "low"]
    assert len(low) == 2
    # When the high ones that are next have come ten seconds after it, it is as good as they.
    assert all(10 < at <= 14 for at in low)
    assert len(served) == 42 * limit + 2
