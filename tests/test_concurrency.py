"""Many runs at once, and a cancellation at every step of a run: no cross-talk, nothing lost, nothing left behind."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stageflow import (
    CauseKind,
    Join,
    Pipeline,
    PipelineResults,
    PipelineTerminated,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageGraph,
    StageOutput,
    UnifiedPipelineCancelled,
    optional,
)
from tests.stages import (
    assert_whole,
    causes,
    chain,
    duration,
    fan,
    gives,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from trio.testing import MockClock

ERROR = ValueError("no such page")


def tasks_living() -> int:
    return trio.lowlevel.current_statistics().tasks_living


# Many runs of one graph


def arithmetic() -> Pipeline:
    """A diamond whose outputs follow from the run's data; every third run fails in `b`."""

    async def a(ctx: StageContext) -> dict[str, object]:
        await trio.sleep(ctx.data["n"] % 7)
        return {"n": ctx.data["n"], "run": ctx.run_id}

    async def b(ctx: StageContext) -> dict[str, object]:
        ctx.save_partial(n=ctx.data["n"])
        await trio.sleep(ctx.data["n"] % 5)
        if ctx.data["n"] % 3 == 0:
            raise ValueError(ctx.data["n"])
        return {"n": ctx.inputs["a"]["n"] * 2}

    async def c(ctx: StageContext) -> dict[str, object]:
        return {"n": ctx.inputs["a"]["n"] * 3}

    async def d(ctx: StageContext) -> dict[str, object]:
        return {"n": ctx.inputs["b"]["n"] + ctx.inputs["c"]["n"]}

    return (
        Pipeline("arithmetic")
        .with_stage("a", a)
        .with_stage("b", b, after="a")
        .with_stage("c", c, after="a")
        .with_stage("d", d, after=["b", "c"])
    )


async def test_two_hundred_runs_of_one_graph_do_not_see_each_other(autojump_clock: MockClock) -> None:
    graph = arithmetic().build()
    ended: dict[int, PipelineResults | StageExecutionError] = {}

    async def run(n: int) -> None:
        try:
            ended[n] = await graph.run({"n": n})
        except StageExecutionError as error:
            ended[n] = error

    before = tasks_living()
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for n in range(200):
            nursery.start_soon(run, n)
    assert tasks_living() == before
    assert trio.current_time() - begun == 6 + 4

    assert sorted(ended) == list(range(200))
    for n, end in ended.items():
        if isinstance(end, StageExecutionError):
            assert n % 3 == 0
            assert isinstance(end.original, ValueError)
            assert end.original.args == (n,)
            assert end.results.partial == {"b": {"n": n}}
        results = end.results if isinstance(end, StageExecutionError) else end
        assert_whole(results)
        assert results["a"]["run"] == results.run_id
        expected = {"a": n, "c": n * 3} | ({} if n % 3 == 0 else {"b": n * 2, "d": n * 5})
        assert {name: output["n"] for name, output in results.items()} == expected
    ids = {end.run_id for end in ended.values()}
    assert len(ids) == 200


async def test_runs_of_one_graph_end_independently_of_each_other(autojump_clock: MockClock) -> None:
    graph = fan(5, sleeps(3)).build()
    ended: dict[int, PipelineResults] = {}

    async def run(number: int) -> None:
        with trio.move_on_after(1 if number == 0 else 10):  # noqa: ASYNC912  # leaving a run is a checkpoint
            try:
                async with graph.open() as handle:
                    ended[number] = handle.results
                    await trio.sleep(2)
                    if number == 1:
                        handle.cancel("enough")
                    elif number == 2:
                        handle.cancel_branch("b3", "enough")
            except UnifiedPipelineCancelled:
                pass

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(run, number)
    assert [ended[number].status for number in range(4)] == [
        RunStatus.INTERRUPTED,
        RunStatus.CANCELLED,
        RunStatus.PARTIAL,
        RunStatus.SUCCEEDED,
    ]
    assert [duration(ended[number]) for number in range(4)] == [1, 2, 3, 3]


# Nothing is left behind


async def test_no_task_is_left_however_a_run_ends(autojump_clock: MockClock) -> None:
    before = tasks_living()
    for body in (gives(), sleeps(1, ERROR), sleeps(1, StageOutput.cancel("enough")), sleeps(9)):
        with trio.move_on_after(5):
            await results_of(fan(10, body))
        assert tasks_living() == before


async def test_what_a_run_held_is_freed_when_nobody_holds_its_results(autojump_clock: MockClock) -> None:
    class Thing:
        """Something an output may carry."""

    things: list[weakref.ref[Thing]] = []

    async def makes(ctx: StageContext) -> StageOutput:
        thing = Thing()
        things.append(weakref.ref(thing))
        await trio.sleep(1)
        return StageOutput.ok(thing=thing)

    graph = fan(3, makes).build()
    results = await graph.run()
    gc.collect()
    assert sum(thing() is not None for thing in things) == 3
    del results
    gc.collect()
    assert sum(thing() is not None for thing in things) == 0


@pytest.mark.parametrize("way", ["ok", "failure", "cancel", "cancel_branch", "scope", "open"])
async def test_three_hundred_runs_leave_no_object_behind(autojump_clock: MockClock, way: str) -> None:
    ends: dict[str, Any] = {
        "failure": ERROR,
        "cancel": StageOutput.cancel("enough"),
        "cancel_branch": StageOutput.cancel_branch("hopeless"),
    }
    then = ends.get(way)
    graph = fan(3, sleeps(1, then)).build()

    async def once() -> None:
        with trio.move_on_after(0.5 if way == "scope" else 9):
            if way == "open":
                async with graph.open() as run:
                    await run.wait()
            else:
                await results_of(graph)

    def count() -> Counter[str]:
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    for _ in range(5):
        await once()
    before = count()
    for _ in range(300):
        await once()
    more = count() - before
    for name in ("CancelScope", "CancelReason", "tuple"):  # Trio forgets the deadlines of closed scopes in batches
        del more[name]
    assert all(number < 100 for number in more.values()), more.most_common(5)


# A cancellation at every step


@attrs.define(eq=False)
class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before a task takes the given step, counted over all tasks."""

    scope: trio.CancelScope
    step: int
    taken: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken += 1
        if self.taken == self.step:
            self.scope.cancel()


@contextmanager
def cancelling(scope: trio.CancelScope, step: int) -> Generator[CancelAtStep]:
    """Within the block, a scope is cancelled at some step."""
    instrument = CancelAtStep(scope, step)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument
    finally:
        trio.lowlevel.remove_instrument(instrument)


@attrs.frozen
class Interruption:
    """What became of a run whose caller was cancelled at some step."""

    results: PipelineResults
    error: PipelineTerminated | None
    cancelled: bool  # whether the step was reached before the run had ended
    caught: bool  # whether Cancelled came through to the scope


async def interrupt(graph: StageGraph, step: int) -> Interruption:
    """Runs a graph, and cancels the scope around it at the given step."""
    error: PipelineTerminated | None = None
    run: Run | None = None
    before = tasks_living()
    with trio.CancelScope() as scope, cancelling(scope, step) as instrument:  # noqa: ASYNC912
        try:
            async with graph.open() as run:
                pass
        except PipelineTerminated as terminated:
            error = terminated
    assert tasks_living() == before
    assert run is not None
    return Interruption(run.results, error, instrument.taken >= step, scope.cancelled_caught)


async def interruptions(graph: StageGraph) -> list[Interruption]:
    """The same for every step there is, and for one more."""
    found: list[Interruption] = []
    while not found or found[-1].cancelled:
        found.append(await interrupt(graph, len(found) + 1))
    return found


async def asks_for_a_task(ctx: StageContext) -> StageOutput:
    ctx.nursery.start_soon(trio.sleep, 2)
    await trio.sleep(1)
    return StageOutput.ok(by=ctx.stage)


async def shields(ctx: StageContext) -> StageOutput:
    with trio.CancelScope(shield=True):
        await trio.sleep(1)
    return StageOutput.ok(by=ctx.stage)


async def opens_a_nursery(ctx: StageContext) -> StageOutput:
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(trio.sleep, 1)
    return StageOutput.ok(by=ctx.stage)


def diamond(**bodies: Any) -> Pipeline:
    return (
        Pipeline("diamond")
        .with_stage("a", bodies.get("a", gives()))
        .with_stage("b", bodies.get("b", sleeps(1)), after="a", on_failure=bodies.get("policy", "fail_fast"))
        .with_stage("b2", gives(), after="b")
        .with_stage("c", bodies.get("c", sleeps(2)), after="a")
        .with_stage("c2", gives(), after="c")
        .with_stage("d", sees(), after=["b2", "c2"], join=bodies.get("join", "all"))
        .with_stage("e", gives(), after="d")
    )


def roots() -> Pipeline:
    return (
        Pipeline("roots")
        .with_stage("r1", gives())
        .with_stage("r2", sleeps(1))
        .with_stage("r3", sleeps(2))
        .with_stage("j", sees(), after=["r1", "r2", optional("r3")])
    )


def nested(body: Any) -> Pipeline:
    return (
        Pipeline("nested")
        .with_stage("root", gives())
        .with_stage("x", sleeps(1), after="root")
        .with_stage("s", body, after="x")
        .with_stage("r", sleeps(3), after="x")
        .with_stage("inner", gives(), after=["s", "r"], join="settled")
        .with_stage("o", sleeps(2), after="root")
        .with_stage("outer", gives(), after=["inner", "o"], join="settled")
    )


GRAPHS: dict[str, Callable[[], Pipeline]] = {
    "one stage": lambda: chain(1),
    "a chain of immediate stages": lambda: chain(5),
    "a chain of sleeping stages": lambda: chain(4, sleeps(1)),
    "a fan of immediate stages": lambda: fan(4),
    "a fan of sleeping stages": lambda: fan(4, sleeps(1)),
    "a diamond": diamond,
    "a diamond joined early": lambda: diamond(join="any"),
    "a diamond joined by number": lambda: diamond(join=Join.n_of(1)),
    "several roots": roots,
    "a skip": lambda: diamond(b=returns(StageOutput.skip("nothing new")), join="any_settled"),
    "a cancelled branch": lambda: diamond(b=sleeps(1, StageOutput.cancel_branch("hopeless")), join="settled"),
    "a branch cancelled from within": lambda: nested(sleeps(1, StageOutput.cancel_branch("hopeless", of="x"))),
    "a nest": lambda: nested(sleeps(1)),
    "a cancel": lambda: diamond(b=sleeps(1, StageOutput.cancel("enough"))),
    "a failure": lambda: diamond(b=sleeps(1, ERROR)),
    "a failure at once": lambda: diamond(b=raises(ERROR), c=gives()),
    "a drained failure": lambda: diamond(b=sleeps(1, ERROR), policy="drain"),
    "an isolated failure": lambda: diamond(b=sleeps(1, ERROR), policy="isolate", join="settled"),
    "a tolerated failure": lambda: diamond(b=sleeps(1, ERROR), policy="tolerate", join="settled"),
    "background tasks, shields and nurseries": lambda: diamond(a=asks_for_a_task, b=shields, c=opens_a_nursery),
}


def test_there_are_twenty_graphs() -> None:
    assert len(GRAPHS) == 20


@pytest.mark.parametrize("shape", GRAPHS)
async def test_a_cancellation_at_any_step_loses_nothing_that_was_finished(
    autojump_clock: MockClock, shape: str
) -> None:
    graph = GRAPHS[shape]().build()
    whole = await results_of(graph)
    # What the caller did not end was ended as in the whole run; or, where that is ended from within, by that, before it
    # could start in the same tick.
    blamed: set[tuple[CauseKind, str | None]] = {(CauseKind.CALLER, None)}
    if whole.status in (RunStatus.FAILED, RunStatus.CANCELLED):
        blamed.add(causes(whole)["b"])

    found = await interruptions(graph)
    for interruption in found:
        results = interruption.results
        assert_whole(results)
        if interruption.caught:
            assert interruption.error is None
            assert results.status is RunStatus.INTERRUPTED
        else:
            ended_by_error = results.status in (RunStatus.FAILED, RunStatus.CANCELLED)
            assert results.status in (whole.status, RunStatus.SUCCEEDED, RunStatus.PARTIAL)
            assert (interruption.error is not None) == ended_by_error
        for name, output in results.items():
            assert output == whole[name]
            if graph.stages[name].join == Join.ALL:
                assert all(edge.stage in results for edge in graph.stages[name].after if edge.required)
        assert blamed >= {cause for name, cause in causes(results).items() if cause != causes(whole).get(name)}
    assert any(interruption.caught for interruption in found)
    assert not found[-1].caught
    assert states(found[-1].results) == states(whole)


async def run_at_every_step(graph: StageGraph) -> list[dict[str, StageOutput] | None]:
    """The same without a handle: what the run returned for each step, or `None` if Cancelled came through."""
    found: list[dict[str, StageOutput] | None] = []
    before, step, taken = tasks_living(), 0, 0
    while taken >= step:
        step += 1
        returned: dict[str, StageOutput] | None = None
        with trio.CancelScope() as scope, cancelling(scope, step) as instrument:
            returned = dict(await graph.run())
        taken = instrument.taken
        assert tasks_living() == before
        assert scope.cancelled_caught == (returned is None)
        found.append(returned)
    assert step > 5
    return found


@pytest.mark.parametrize("shape", ["a diamond", "a nest", "a fan of sleeping stages"])
async def test_run_without_a_handle_raises_cancelled_or_returns_everything(
    autojump_clock: MockClock, shape: str
) -> None:
    graph = GRAPHS[shape]().build()
    whole = dict(await graph.run())
    found = await run_at_every_step(graph)
    assert [returned for returned in found if returned is not None and returned != whole] == []
    assert found[0] is None
    assert found[-1] == whole


async def test_no_body_is_entered_once_the_caller_is_cancelled(autojump_clock: MockClock) -> None:
    """Not even in the very tick in which that happens."""
    late: list[str] = []

    async def looks(ctx: StageContext) -> None:
        if trio.current_effective_deadline() == -math.inf:
            late.append(ctx.stage)
        await trio.sleep(1)

    pipeline = diamond(a=looks, b=looks, c=looks).with_stage("f", looks, after="e").with_stage("g", looks, after="e")
    await run_at_every_step(pipeline.build())
    assert late == []
