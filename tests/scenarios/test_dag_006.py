"""DAG-006: chains of 100 to 10,000. The cost per stage is flat, and nothing recurses."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from tests.scenarios.cost import calls_of_a_run
from tests.stages import chain

if TYPE_CHECKING:
    from stageflow import StageContext


async def adds_one(ctx: StageContext) -> dict[str, object]:
    return {"n": 1 + sum(output["n"] for output in ctx.inputs.values())}


@pytest.mark.parametrize("length", [100, 1000, 10_000])
async def test_a_chain_hands_values_on_to_its_end(length: int) -> None:
    results = await chain(length, adds_one).run()
    assert len(results) == length
    assert results[f"s{length - 1}"]["n"] == length


async def test_a_chain_longer_than_the_stack_is_deep_runs_in_one_task() -> None:
    depths: set[int] = set()

    async def looks(ctx: StageContext) -> None:
        frame, depth = inspect.currentframe(), 0
        while frame is not None:
            frame, depth = frame.f_back, depth + 1
        depths.add(depth)

    await chain(5000, looks).run()
    assert len(depths) == 1


async def test_the_cost_of_a_stage_does_not_depend_on_how_many_there_are() -> None:
    short, _ = await calls_of_a_run(chain(100).build())
    long, _ = await calls_of_a_run(chain(5000).build())
    assert long / 5000 <= short / 100 * 1.1
