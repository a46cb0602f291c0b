"""Tiny stages and pipelines, and the few words in which tests say what became of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs
import trio

from stageflow import (
    CauseKind,
    Pipeline,
    PipelineContext,
    PipelineResults,
    PipelineTerminated,
    Run,
    StageContext,
    StageGraph,
    StageOutput,
    StageState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stageflow.stages import Body

OK, FAILED, CANCELLED, SKIPPED = StageState.SUCCEEDED, StageState.FAILED, StageState.CANCELLED, StageState.SKIPPED
PENDING, RUNNING = StageState.PENDING, StageState.RUNNING

Runnable: TypeAlias = Pipeline | StageGraph
Description: TypeAlias = PipelineContext | Mapping[str, Any] | None


# Bodies


def returns(value: object) -> Body:
    """A stage that returns this, at once."""

    async def body(ctx: StageContext) -> object:
        return value

    return body


def gives(**fields: Any) -> Body:
    """A stage that succeeds at once, with these fields or else with its own name."""

    async def body(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(fields or {"by": ctx.stage})

    return body


def sleeps(seconds: float, then: StageOutput | Exception | None = None) -> Body:
    """A stage that saves a partial output, sleeps, and then succeeds with its own name, or ends like this."""

    async def body(ctx: StageContext) -> StageOutput:
        ctx.save_partial(begun=ctx.stage)
        await trio.sleep(seconds)
        if isinstance(then, Exception):
            raise then.with_traceback(None)  # or that of every run would hang on it
        return StageOutput.ok(by=ctx.stage) if then is None else then

    return body


def raises(error: BaseException) -> Body:
    """A stage that raises this, at once."""

    async def body(ctx: StageContext) -> StageOutput:
        raise error.with_traceback(None)

    return body


def sees() -> Body:
    """A stage that gives the names of its inputs."""

    async def body(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(saw=sorted(ctx.inputs))

    return body


@attrs.define
class Witness:
    """Notes which stages were entered, and in which order."""

    entered: list[str] = attrs.field(factory=list[str])

    def of(self, body: Body) -> Body:
        """The same stage, but seen by the witness."""

        async def seen(ctx: StageContext) -> object:
            self.entered.append(ctx.stage)
            return await body(ctx)

        return seen


# Shapes


def chain(length: int, body: Body | None = None) -> Pipeline:
    """s0 → s1 → s2 …"""
    pipeline = Pipeline("chain").with_stage("s0", body or gives())
    for number in range(1, length):
        pipeline = pipeline.with_stage(f"s{number}", body or gives(), after=f"s{number - 1}")
    return pipeline


def fan(width: int, body: Body | None = None, **options: Any) -> Pipeline:
    """root → b0, b1, b2 … → join"""
    pipeline = Pipeline("fan").with_stage("root", gives())
    names = [f"b{number}" for number in range(width)]
    for name in names:
        pipeline = pipeline.with_stage(name, body or gives(), after="root", **options)
    return pipeline.with_stage("join", gives(), after=names)


# What became of them


@attrs.frozen
class Ended:
    """A run that has ended."""

    results: PipelineResults
    error: PipelineTerminated | None
    caught: bool  # whether a cancel scope around it caught its cancellation


async def end(
    runnable: Runnable, act: Callable[[trio.CancelScope, Run], None] | None = None, *, within: float = math.inf
) -> Ended:
    """Opens it and lets it come to its end, in a scope of at most so many seconds.

    `act` is called with that scope and the run when a second is over.
    """
    run: Run | None = None
    error: PipelineTerminated | None = None
    graph = runnable.build() if isinstance(runnable, Pipeline) else runnable
    with trio.move_on_after(within) as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with graph.open() as run:
                if act is not None:
                    await trio.sleep(1)
                    act(scope, run)
        except PipelineTerminated as terminated:
            error = terminated
    assert run is not None
    assert_whole(run.results)
    assert error is None or dict(error.results) == dict(run.results)
    return Ended(run.results, error, scope.cancelled_caught)


async def results_of(runnable: Runnable, ctx: Description = None) -> PipelineResults:
    """Runs it, and gives its results however it ends."""
    try:
        return await runnable.run(ctx)
    except PipelineTerminated as error:
        return error.results


def states(results: PipelineResults) -> dict[str, StageState]:
    """The state of every stage."""
    return {name: record.state for name, record in results.records.items()}


def causes(results: PipelineResults) -> dict[str, tuple[CauseKind, str | None]]:
    """What brought about the end of every stage that did not succeed: the kind, and the stage where it began."""
    found = {name: record.cause for name, record in results.records.items()}
    return {name: (cause.kind, cause.stage) for name, cause in found.items() if cause is not None}


def times(results: PipelineResults) -> dict[str, tuple[float | None, float | None]]:
    """When every stage started and ended, in seconds since the run began."""
    begun = results.trace.started
    return {
        name: tuple(None if moment is None else moment - begun for moment in (record.started, record.ended))  # type: ignore[misc]
        for name, record in results.records.items()
    }


def duration(results: PipelineResults) -> float:
    """How long the run took, in seconds."""
    ended = results.trace.ended
    assert ended is not None
    return ended - results.trace.started


def assert_whole(results: PipelineResults) -> None:
    """What holds of every run that has ended, in whatever way."""
    places: list[int] = []
    for name, record in results.records.items():
        assert record.name == name
        assert record.state.settled, record
        assert record.ended is not None
        assert (record.cause is None) == (record.state is OK), record
        assert (record.output is None) == (record.state is not OK), record
        # A stage that has succeeded has an error if a task that it left in the nursery of its branch failed later.
        assert (record.error is not None) == (record.state is FAILED) or (record.error and record.state is OK), record
        if record.state is SKIPPED:
            assert (record.attempts == 0) == (not is_own_skip(results, name)), record
        else:
            assert record.attempts == 1 or record.state is FAILED, record  # if its condition raised, it was not entered
        assert record.place is not None
        places.append(record.place)
    assert sorted(places) == list(range(len(places)))
    assert list(results) == [name for name in by_place(results) if results.records[name].state is OK]
    assert all(results[name] is results.records[name].output for name in results)


def is_own_skip(results: PipelineResults, name: str) -> bool:
    """Whether the stage was entered and returned a skip."""
    cause = results.records[name].cause
    return cause is not None and cause.kind is CauseKind.SKIP and cause.stage == name


def leaves(error: BaseException | None) -> list[BaseException]:
    """The exceptions in an exception group, however deep; of any other exception, itself."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for inner in group.exceptions for leaf in leaves(inner)]
    return [] if error is None else [error]


def by_place(results: PipelineResults) -> list[str]:
    """The names of the stages, in the order in which they settled."""
    return sorted(results.records, key=lambda name: results.records[name].place or 0)
