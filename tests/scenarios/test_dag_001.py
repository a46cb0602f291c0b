"""DAG-001: cycles are shown; neither a long chain nor a wide diamond troubles the build."""

from __future__ import annotations

import itertools

import pytest

from stageflow import CycleError, Pipeline, StageGraph
from tests.stages import OK, fan, gives, states


def circle(names: list[str]) -> StageGraph:
    """One stage before a circle of stages, and one behind it."""
    pipeline = Pipeline("circle").with_stage("before", gives())
    for number, name in enumerate(names):
        pipeline = pipeline.with_stage(name, gives(), after=[names[number - 1], *(["before"] if number == 0 else [])])
    return pipeline.with_stage("behind", gives(), after=names[-1]).build()


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_a_cycle_is_shown_in_the_direction_of_its_edges(length: int) -> None:
    names = [f"s{number}" for number in range(length)]
    with pytest.raises(CycleError) as caught:
        circle(names)
    cycle = caught.value.cycle
    assert cycle[0] == cycle[-1]
    assert sorted(cycle[1:]) == sorted(names)
    assert all(names[names.index(second) - 1] == first for first, second in itertools.pairwise(cycle))
    assert f"{cycle[0]!r} → {cycle[1]!r}" in str(caught.value)


def test_a_cycle_in_a_long_graph_is_found_among_what_is_fine() -> None:
    pipeline = Pipeline("long").with_stage("s0", gives())
    for number in range(1, 2000):
        pipeline = pipeline.with_stage(f"s{number}", gives(), after=f"s{number - 1}")
    pipeline = pipeline.with_stage("x", gives(), after=["s1999", "z"]).with_stage("y", gives(), after="x")
    with pytest.raises(CycleError) as caught:
        pipeline.with_stage("z", gives(), after="y").with_stage("end", gives(), after="z").build()
    assert set(caught.value.cycle) == {"x", "y", "z"}


async def test_a_chain_of_two_thousand_declared_backwards_runs() -> None:
    pipeline = Pipeline("backwards")
    for number in reversed(range(2000)):
        pipeline = pipeline.with_stage(f"s{number}", gives(), after=f"s{number - 1}" if number else ())
    results = await pipeline.run()
    assert list(results) == [f"s{number}" for number in range(2000)]


async def test_a_wide_diamond_runs() -> None:
    results = await fan(1000).run()
    assert set(states(results).values()) == {OK}
    assert next(iter(results)) == "root"
    assert list(results)[-1] == "join"
