"""DAG-002: a stage of high priority behind five of low priority, on one shared resource, is served before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from stageflow import Limit, Pipeline
from tests.stages import Witness, sleeps, times

if TYPE_CHECKING:
    from trio.testing import MockClock


async def test_it_goes_next_when_the_one_that_has_the_resource_is_done(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = Pipeline("p", limits={"gpu": 1})
    for number in range(5):
        pipeline = pipeline.with_stage(f"low{number}", witness.of(sleeps(1)), uses="gpu", priority=0)
    pipeline = pipeline.with_stage("soon", sleeps(0.5)).with_stage(
        "high", witness.of(sleeps(1)), after="soon", uses="gpu", priority=10
    )
    results = await pipeline.run()
    assert witness.entered[1] == "high"
    assert times(results)["high"] == (1, 2)
    assert results.records["high"].waited == 0.5
    assert sorted(record.waited for name, record in results.records.items() if name[:3] == "low") == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("tokens", [1, 2, 3])
async def test_it_goes_before_the_waiting_runs_of_others(autojump_clock: MockClock, tokens: int) -> None:
    limit, witness = Limit(tokens), Witness()

    async def run(name: str, priority: int) -> None:
        pipeline = Pipeline(name, limits={"gpu": limit})
        await pipeline.with_stage(name, witness.of(sleeps(1)), uses="gpu", priority=priority).run()

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(run, f"low{number}", 0)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(run, "high", 10)
    served = [f"low{number}" for number in range(5)]
    served.insert(tokens, "high")
    assert witness.entered[:tokens] == served[:tokens]
    assert sorted(witness.entered[: 2 * tokens]) == sorted(served[: 2 * tokens])
    assert "high" in witness.entered[tokens : 2 * tokens]
