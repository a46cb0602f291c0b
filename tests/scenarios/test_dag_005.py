"""DAG-005: fan-outs of 50 to 10,000, some failing. Nothing is lost, and the cost per stage is flat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from stageflow import Pipeline, RunStatus, StageContext, StageExecutionError
from tests.scenarios.cost import calls_of_a_run
from tests.stages import FAILED, OK, SKIPPED, duration, fan, gives, results_of, sees, sleeps, states

if TYPE_CHECKING:
    from trio.testing import MockClock


def failing_fan(width: int, on_failure: str) -> Pipeline:
    """root → b0, b1 … → join (settled); every seventh fails."""

    async def maybe_fails(ctx: StageContext) -> dict[str, object]:
        number = int(ctx.stage[1:])
        if number % 7 == 0:
            raise ValueError(number)
        return {"n": number}

    pipeline = Pipeline("failing", on_failure=on_failure).with_stage("root", gives())
    names = [f"b{number}" for number in range(width)]
    for name in names:
        pipeline = pipeline.with_stage(name, maybe_fails, after="root")
    return pipeline.with_stage("join", sees(), after=names, join="settled")


@pytest.mark.parametrize("width", [50, 500, 2000])
async def test_nothing_is_lost_though_some_fail(width: int) -> None:
    with pytest.raises(StageExecutionError) as caught:
        await failing_fan(width, "isolate").run()
    results = caught.value.results
    bad = {f"b{number}" for number in range(0, width, 7)}
    assert {record.name for record in caught.value.failures} == bad
    assert {name for name, state in states(results).items() if state is FAILED} == bad
    assert len(results) == width - len(bad) + 2
    assert all(results[f"b{number}"]["n"] == number for number in range(width) if number % 7)
    assert results["join"]["saw"] == sorted(f"b{number}" for number in range(width) if number % 7)


@pytest.mark.parametrize("width", [50, 500, 2000])
async def test_immediate_siblings_of_a_failure_are_all_kept(width: int) -> None:
    results = await results_of(failing_fan(width, "fail_fast"))
    bad = {f"b{number}" for number in range(0, width, 7)}
    assert {name for name, state in states(results).items() if state is FAILED} == bad
    assert {name for name, state in states(results).items() if state is SKIPPED} == {"join"}
    assert len(results) == width - len(bad) + 1


@pytest.mark.parametrize("width", [50, 500, 2000])
async def test_branches_run_at_once(autojump_clock: MockClock, width: int) -> None:
    results = await fan(width, sleeps(1)).run()
    assert duration(results) == 1
    assert results.status is RunStatus.SUCCEEDED


async def test_ten_thousand_branches_do_not_recurse() -> None:
    results = await fan(10_000).run()
    assert set(states(results).values()) == {OK}
    assert len(results) == 10_002 > sys.getrecursionlimit()


async def test_the_cost_of_a_branch_does_not_depend_on_how_many_there_are() -> None:
    narrow, _ = await calls_of_a_run(fan(100).build())
    wide, _ = await calls_of_a_run(fan(3000).build())
    assert wide / 3002 <= narrow / 102 * 1.1
