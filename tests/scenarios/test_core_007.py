"""CORE-007: a thousand runs in one process. Of a run that has ended and is held by nobody, nothing is left."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from stageflow import (
    Artifact,
    ContextSnapshot,
    Pipeline,
    PipelineContext,
    PipelineTerminated,
    Retry,
    StageContext,
    StageOutput,
)
from stageflow.interceptors import IdempotencyInterceptor

if TYPE_CHECKING:
    from collections.abc import Callable


RUNS = 1000
ROUND = 100


class Thing:
    """Something that a run makes."""


class Watch:
    """Makes things, and knows which are still there."""

    def __init__(self) -> None:
        self.made = 0
        self.things: weakref.WeakSet[Thing] = weakref.WeakSet()

    def thing(self) -> Thing:
        self.made += 1
        thing = Thing()
        self.things.add(thing)
        return thing


def succeeding(watch: Watch) -> Pipeline:
    async def makes(ctx: StageContext) -> dict[str, object]:
        ctx.save_partial(thing=watch.thing())
        ctx.add_artifact(Artifact(name="made", data=watch.thing()))
        ctx.on_exit(repr, watch.thing())
        await trio.lowlevel.checkpoint()
        return {"thing": watch.thing(), "rows": [1, {"x": 1}]}

    return Pipeline("p").with_stage("a", makes).with_stage("b", makes, after="a").with_stage("c", makes, after="a")


def failing(watch: Watch) -> Pipeline:
    async def fails(ctx: StageContext) -> None:
        thing = watch.thing()
        ctx.save_partial(thing=thing)
        raise ValueError("no", thing)

    return succeeding(watch).with_stage("fails", fails, after="b").with_stage("d", fails, after="fails")


def retrying(watch: Watch) -> Pipeline:
    async def tries(ctx: StageContext) -> StageOutput:
        thing = watch.thing()
        if ctx.attempt < 3:
            raise ValueError("not yet", thing)
        return StageOutput.ok(thing=thing)

    return Pipeline("p").with_stage("tries", tries, retry=Retry(attempts=3, delay=1))


def cancelling(watch: Watch) -> Pipeline:
    async def cancels(ctx: StageContext) -> StageOutput:
        ctx.save_partial(thing=watch.thing())
        await trio.sleep(1)
        return StageOutput.cancel("enough")

    async def sleeps(ctx: StageContext) -> None:
        ctx.save_partial(thing=watch.thing())
        await trio.sleep_forever()

    return Pipeline("p").with_stage("cancels", cancels).with_stage("sleeps", sleeps)


def nesting(watch: Watch) -> Pipeline:
    async def nests(ctx: StageContext) -> dict[str, object]:
        with_thing = ctx.fork(data={"thing": watch.thing()}, snapshot=ctx.snapshot.evolve(thing=watch.thing()))
        results = await ctx.run_pipeline(succeeding(watch), with_thing)
        return {"thing": results["a"]["thing"]}

    return Pipeline("p").with_stage("nests", nests)


def mapping(watch: Watch) -> Pipeline:
    async def each(ctx: StageContext) -> dict[str, object]:
        if ctx.data["n"] == 1:
            raise ValueError("no", watch.thing())
        return {"thing": watch.thing()}

    def items(ctx: StageContext) -> list[dict[str, object]]:
        return [{"n": number, "thing": watch.thing()} for number in range(3)]

    return Pipeline("p").with_map("each", each, over=items, tolerate=1)


def timing_out(watch: Watch) -> Pipeline:
    async def sleeps(ctx: StageContext) -> None:
        ctx.save_partial(thing=watch.thing())
        await trio.sleep_forever()

    return Pipeline("p").with_stage("sleeps", sleeps, timeout=1)


def in_the_background(watch: Watch) -> Pipeline:
    async def starts(ctx: StageContext) -> None:
        ctx.nursery.start_soon(trio.sleep, 1)
        ctx.save_partial(thing=watch.thing())

    return Pipeline("p").with_stage("starts", starts)


KINDS: list[Callable[[Watch], Pipeline]] = [
    succeeding,
    failing,
    retrying,
    cancelling,
    nesting,
    mapping,
    timing_out,
    in_the_background,
]


async def run(pipeline: Any, watch: Watch) -> None:
    """Runs it once, with something of its own in every part of its context, and keeps nothing."""
    context = PipelineContext(
        data={"thing": watch.thing()},
        snapshot=ContextSnapshot({"thing": watch.thing()}).evolve(thing=watch.thing()),
        metadata={"thing": watch.thing()},
        artifacts=[Artifact(name="given", data=watch.thing())],
    )
    try:
        results = await pipeline.run(context)
    except PipelineTerminated as error:
        results = error.results
    assert results.status
    assert results.trace


def there_is() -> tuple[int, int]:
    """How many objects there are: those that can hold others, and blocks of memory."""
    for _ in range(3):
        gc.collect()
    return len(gc.get_objects()), sys.getallocatedblocks()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("built", [True, False], ids=["one graph", "a graph for each"])
async def test_nothing_that_a_run_made_outlives_it(
    kind: Callable[[Watch], Pipeline], built: bool, autojump_clock: MockClock
) -> None:
    watch = Watch()
    graph = kind(watch).build()
    for _ in range(20):
        await run(graph if built else kind(watch), watch)
    gc.collect()
    assert watch.made >= 20 * 5
    assert list(watch.things) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_runs_leave_as_much_as_the_first_hundred(kind: Callable[[Watch], Pipeline]) -> None:
    watch = Watch()
    graph = kind(watch).build()

    async def runs(number: int) -> None:
        for _ in range(number):
            await run(graph, watch)

    def after(number: int) -> tuple[int, int]:
        # A loop for each round, for Trio forgets the deadlines that have gone a thousand at a time.
        trio.run(runs, number, clock=MockClock(autojump_threshold=0))
        return there_is()

    objects, blocks = after(ROUND)
    more_objects, more_blocks = after(RUNS - ROUND)
    # One object kept for every run would be 900; a cache somewhere may fill up.
    assert more_objects - objects < 100
    assert more_blocks - blocks < 300
    assert list(watch.things) == []


async def test_a_run_leaves_nothing_for_the_collector_of_cycles_to_find() -> None:
    """What is referred to in no circle goes at once, so that memory does not depend on when the collector runs."""
    watch = Watch()
    graph = succeeding(watch).build()
    await run(graph, watch)
    gc.collect()
    gc.disable()
    try:
        await run(graph, watch)
        await trio.lowlevel.checkpoint()
        left = list(watch.things)
    finally:
        gc.enable()
    assert left == []


async def test_what_is_remembered_under_keys_is_bounded() -> None:
    watch = Watch()

    async def makes(ctx: StageContext) -> dict[str, object]:
        return {"thing": watch.thing()}

    once = IdempotencyInterceptor(lambda ctx: str(ctx.data["n"]), parameters=lambda ctx: None, keep=10)
    graph = Pipeline("p", interceptors=[once]).with_stage("makes", makes).build()
    for number in range(RUNS):
        await graph.run({"n": number})
    gc.collect()
    assert watch.made == RUNS
    assert len(watch.things) == 10
