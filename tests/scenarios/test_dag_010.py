"""DAG-010: bursts of runs, with failures and recoveries: every failure surfaces once, and there is no cross-talk."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from stageflow import Pipeline, PipelineResults, Retry, RunStatus, StageContext, StageExecutionError, StageOutput
from tests.stages import assert_whole, duration

if TYPE_CHECKING:
    from trio.testing import MockClock

STAGES = 10


def burst() -> Pipeline:
    """Two lines of stages that join; a stage fails where the run's data say so, and otherwise adds its own number."""

    async def step(ctx: StageContext) -> StageOutput:
        number = int(ctx.stage[1:])
        ctx.save_partial(run=ctx.data["run"])
        await trio.sleep(1)
        if number in ctx.data["bad"]:
            raise ValueError(ctx.data["run"], number)
        return StageOutput.ok(run=ctx.data["run"], sum=number + sum(each["sum"] for each in ctx.inputs.values()))

    pipeline = Pipeline("burst").with_stage("s0", step).with_stage("s1", step)
    for number in range(2, STAGES - 1):
        pipeline = pipeline.with_stage(f"s{number}", step, after=f"s{number - 2}")
    last = STAGES - 1
    return pipeline.with_stage(f"s{last}", step, after=[f"s{last - 1}", f"s{last - 2}"])


async def run_all(bad: list[list[int]]) -> dict[int, PipelineResults | StageExecutionError]:
    graph = burst().build()
    ended: dict[int, PipelineResults | StageExecutionError] = {}

    async def run(number: int) -> None:
        try:
            ended[number] = await graph.run({"run": number, "bad": bad[number]})
        except StageExecutionError as error:
            ended[number] = error

    async with trio.open_nursery() as nursery:
        for number in range(len(bad)):
            nursery.start_soon(run, number)
    return ended


@pytest.mark.parametrize("runs", [25, 50, 100, 150])
async def test_a_burst_of_runs_takes_as_long_as_one_of_them(autojump_clock: MockClock, runs: int) -> None:
    begun = trio.current_time()
    ended = await run_all([[]] * runs)
    assert trio.current_time() - begun == 6
    for number, results in ended.items():
        assert isinstance(results, PipelineResults)
        assert results.status is RunStatus.SUCCEEDED
        assert {output["run"] for output in results.values()} == {number}
        assert results[f"s{STAGES - 1}"]["sum"] == STAGES * (STAGES - 1) // 2
    assert len({results.run_id for results in ended.values()}) == runs


async def test_of_a_hundred_runs_with_failing_stages_every_failure_surfaces_once_and_where_it_belongs(
    autojump_clock: MockClock,
) -> None:
    chance = random.Random(10)
    bad = [[stage for stage in range(STAGES) if chance.random() < 0.15] for _ in range(100)]
    ended = await run_all(bad)
    assert len(ended) == 100
    for number, end in ended.items():
        results = end.results if isinstance(end, StageExecutionError) else end
        assert_whole(results)
        assert {output["run"] for output in results.values()} <= {number}
        assert all(partial == {"run": number} for partial in results.partial.values())
        assert isinstance(end, StageExecutionError) == bool(bad[number])
        failed = [name for name, record in results.records.items() if record.error is not None]
        assert {int(name[1:]) for name in failed} <= set(bad[number])
        if isinstance(end, StageExecutionError):
            assert isinstance(end.original, ValueError)
            assert end.original.args == (number, int(str(end.stage)[1:]))
            assert [record.name for record in end.failures] == sorted(failed, key=lambda name: place_of(results, name))
            assert end.failures[0].name == end.stage
            assert len({id(record.error) for record in end.failures}) == len(end.failures)
    assert 0 < sum(isinstance(end, StageExecutionError) for end in ended.values()) < 100


def place_of(results: PipelineResults, name: str) -> int:
    place = results.records[name].place
    assert place is not None
    return place


async def test_thirty_runs_recover_each_after_its_own_failures(autojump_clock: MockClock) -> None:
    async def flaky(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        if ctx.attempt <= ctx.data["failures"]:
            raise ValueError(ctx.data["run"], ctx.attempt)
        return StageOutput.ok(run=ctx.data["run"], attempt=ctx.attempt)

    graph = Pipeline("recovers").with_stage("flaky", flaky, retry=Retry(attempts=4, delay=1, factor=1)).build()
    found: dict[int, PipelineResults] = {}

    async def run(number: int) -> None:
        found[number] = await graph.run({"run": number, "failures": number % 4})

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(run, number)
    for number, results in found.items():
        failures = number % 4
        assert dict(results["flaky"]) == {"run": number, "attempt": failures + 1}
        assert duration(results) == 1 + 2 * failures
        assert results.status is RunStatus.SUCCEEDED
        tries = results.records["flaky"].tries
        errors = [attempt.error for attempt in tries if isinstance(attempt.error, ValueError)]
        assert [error.args for error in errors] == [(number, attempt) for attempt in range(1, failures + 1)]
