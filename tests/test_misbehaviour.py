"""Stages that do what no stage should: the run still tells what happened, and loses nothing."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest
import trio

from stageflow import (
    Artifact,
    CauseKind,
    ContractViolation,
    MissingOutputError,
    Pipeline,
    PipelineResults,
    PipelineTerminated,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
    UnifiedPipelineCancelled,
    run_stage,
)
from stageflow.engine.body import Suspended
from tests.stages import CANCELLED, FAILED, OK, SKIPPED, gives, sleeps, states

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from trio.testing import MockClock


async def ended(pipeline: Pipeline) -> tuple[PipelineResults, PipelineTerminated | None]:
    """Runs to the end, and gives the results and the error there was."""
    try:
        return await pipeline.run(), None
    except PipelineTerminated as error:
        return error.results, error


def beside(stage: Callable[[StageContext], Any], **options: Any) -> Pipeline:
    """The stage under test, one that sleeps beside it, and a join that takes what comes."""
    return (
        Pipeline("misbehaviour")
        .with_stage("root", gives())
        .with_stage("bad", stage, after="root", **options)
        .with_stage("good", sleeps(1), after="root")
        .with_stage("join", gives(), after=["bad", "good"], join="settled")
    )


# A stage cancels the nursery of its branch, and then says something


async def raises_then(ctx: StageContext) -> NoReturn:
    ctx.nursery.cancel_scope.cancel()
    raise ValueError("not lost")


async def cancels_then(ctx: StageContext) -> StageOutput:
    ctx.nursery.cancel_scope.cancel()
    return StageOutput.cancel("enough")


async def ends_its_branch_then(ctx: StageContext) -> StageOutput:
    ctx.nursery.cancel_scope.cancel()
    return StageOutput.cancel_branch("nothing here")


async def only_cancels(ctx: StageContext) -> None:
    ctx.nursery.cancel_scope.cancel()


async def test_a_failure_is_raised_though_the_stage_cancelled_its_nursery(autojump_clock: MockClock) -> None:
    results, error = await ended(beside(raises_then))
    assert isinstance(error, StageExecutionError)
    assert states(results) == {"root": OK, "bad": FAILED, "good": CANCELLED, "join": SKIPPED}
    assert {name: record.cause.stage for name, record in results.records.items() if record.cause} == {
        "bad": "bad",
        "good": "bad",
        "join": "bad",
    }


async def test_an_isolated_failure_reaches_the_join_though_the_stage_cancelled_its_nursery(
    autojump_clock: MockClock,
) -> None:
    results, error = await ended(beside(raises_then, on_failure="isolate"))
    assert isinstance(error, StageExecutionError)
    assert states(results) == {"root": OK, "bad": FAILED, "good": OK, "join": OK}


async def test_a_cancel_ends_the_run_though_the_stage_cancelled_its_nursery(autojump_clock: MockClock) -> None:
    results, error = await ended(beside(cancels_then))
    assert isinstance(error, UnifiedPipelineCancelled)
    assert error.stage == "bad"
    assert states(results) == {"root": OK, "bad": CANCELLED, "good": CANCELLED, "join": SKIPPED}


async def test_the_end_of_a_branch_reaches_the_join_though_the_stage_cancelled_its_nursery(
    autojump_clock: MockClock,
) -> None:
    results, error = await ended(beside(ends_its_branch_then))
    assert error is None
    assert states(results) == {"root": OK, "bad": CANCELLED, "good": OK, "join": OK}


async def test_what_a_cancelled_nursery_keeps_from_starting_names_it_as_the_cause(autojump_clock: MockClock) -> None:
    results, error = await ended(Pipeline("p").with_stage("a", only_cancels).with_stage("b", gives(), after="a"))
    assert error is None
    assert states(results) == {"a": OK, "b": SKIPPED}
    cause = results.records["b"].cause
    assert cause is not None
    assert (cause.kind, cause.stage) == (CauseKind.NURSERY, "a")


async def test_a_tolerated_failure_in_the_background_makes_the_run_partial(autojump_clock: MockClock) -> None:
    async def fails_later() -> None:
        await trio.sleep(1)
        raise ValueError("late")

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(fails_later)

    results, error = await ended(Pipeline("p").with_stage("a", asks, on_failure="tolerate"))
    assert error is None
    assert states(results) == {"a": OK}
    assert results.status is RunStatus.PARTIAL


# Cancellation that belongs to nobody, or to others


async def test_a_cancelled_of_its_own_making_is_a_failure(autojump_clock: MockClock) -> None:
    async def raises_an_old_one(ctx: StageContext) -> None:
        kept: BaseException | None = None
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                kept = error
                raise
        assert kept is not None
        raise kept

    results, error = await ended(beside(raises_an_old_one))
    assert isinstance(error, StageExecutionError)
    assert "of its own making" in error.reason
    assert states(results)["bad"] is FAILED


async def test_a_block_that_waits_in_a_nursery_is_interrupted_by_the_caller_and_not_by_itself(
    autojump_clock: MockClock,
) -> None:
    runs: list[Run] = []
    with trio.move_on_after(1) as scope:
        async with (
            Pipeline("p").with_stage("a", sleeps(9)).build().open() as run,
            trio.open_nursery() as nursery,
        ):
            runs.append(run)
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught
    assert runs[0].results.status is RunStatus.INTERRUPTED


async def test_a_body_is_not_entered_when_its_condition_cancels_the_run(autojump_clock: MockClock) -> None:
    entered = False

    async def body(ctx: StageContext) -> None:
        nonlocal entered
        entered = True

    runs: list[Run] = []

    def asks(ctx: StageContext) -> bool:
        runs[0].cancel("no more")
        return True

    with pytest.raises(UnifiedPipelineCancelled):
        async with Pipeline("p").with_stage("a", body, when=asks).build().open() as run:
            runs.append(run)
    assert not entered
    assert runs[0].results.records["a"].attempts == 0


# What it leaves behind, and what it returns


async def test_a_scope_left_open_by_an_async_generator_is_a_failure_of_the_stage() -> None:
    async def numbers() -> AsyncGenerator[int, None]:  # noqa: ASYNC900
        with trio.move_on_after(5):
            yield 1  # noqa: ASYNC101, ASYNC119  # that is the mistake

    kept: list[AsyncGenerator[int, None]] = []

    async def leaves(ctx: StageContext) -> None:
        kept.append(numbers())
        async for _ in kept[0]:
            return

    _, error = await ended(beside(leaves))
    assert isinstance(error, StageExecutionError)
    assert error.stage == "bad"
    assert "Cancel scope stack corrupted" in error.reason
    await kept[0].aclose()


@pytest.mark.parametrize(
    "output",
    [StageOutput("ok"), StageOutput("fail", error="x"), StageOutput("cancel_branch")],  # type: ignore[arg-type]
    ids=str,
)
async def test_an_output_made_by_hand_is_a_contract_violation_unless_it_is_whole(output: StageOutput) -> None:
    async def returns_it(ctx: StageContext) -> StageOutput:
        return output

    _, error = await ended(Pipeline("p").with_stage("a", returns_it))
    assert isinstance(error, StageExecutionError)
    assert isinstance(error.original, ContractViolation)
    assert "methods of StageOutput" in str(error)


async def test_what_cannot_be_shown_is_a_contract_violation_all_the_same() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    async def returns_it(ctx: StageContext) -> Odd:
        return Odd()

    _, error = await ended(Pipeline("p").with_stage("a", returns_it))
    assert isinstance(error, StageExecutionError)
    assert isinstance(error.original, ContractViolation)


async def test_a_condition_that_gives_an_awaitable_is_a_failure() -> None:
    async def later() -> bool:
        return True

    _, error = await ended(Pipeline("p").with_stage("a", gives(), when=lambda ctx: later()))
    assert isinstance(error, StageExecutionError)
    assert "plain function" in error.reason


async def test_a_reason_that_is_a_strange_string_ends_the_run_as_any_other() -> None:
    class Strange(str):
        __slots__ = ()

        def __format__(self, spec: str) -> str:
            raise ZeroDivisionError

        __str__ = __format__  # type: ignore[assignment]

    async def cancels(ctx: StageContext) -> StageOutput:
        return StageOutput.cancel(Strange("enough"))

    _, error = await ended(beside(cancels))
    assert isinstance(error, UnifiedPipelineCancelled)
    assert error.reason == "enough"


async def test_a_group_that_cannot_be_split_is_the_failure_as_it_is() -> None:
    class Stubborn(ExceptionGroup[Exception]):
        def derive(self, excs: Any, /) -> NoReturn:
            raise TypeError("no")

    group = Stubborn("a group", [ValueError("in it")])

    async def raises_it(ctx: StageContext) -> NoReturn:
        raise group

    _, error = await ended(beside(raises_it))
    assert isinstance(error, StageExecutionError)
    assert error.original is group


async def test_no_group_is_nested_too_deep() -> None:
    error: Exception = ValueError("at the bottom")
    for _ in range(2_000):
        error = cast("Exception", ExceptionGroup("one more", [error]))

    async def raises_it(ctx: StageContext) -> NoReturn:
        raise error

    _, raised = await ended(Pipeline("p").with_stage("a", raises_it))
    assert isinstance(raised, StageExecutionError)
    assert raised.original is error
    assert "at the bottom" in raised.reason


# What it keeps


async def test_a_join_gets_no_context_variable_of_a_branch_even_if_it_is_equal() -> None:
    variable: contextvars.ContextVar[list[int]] = contextvars.ContextVar("variable")
    ours: list[int] = []
    variable.set(ours)
    seen: list[list[int]] = []

    async def sets(ctx: StageContext) -> None:
        variable.set([])

    async def looks(ctx: StageContext) -> None:
        seen.append(variable.get())

    await (
        Pipeline("p")
        .with_stage("root", gives())
        .with_stage("a", sets, after="root")
        .with_stage("b", sets, after="root")
        .with_stage("join", looks, after=["a", "b"])
        .run()
    )
    assert len(seen) == 1
    assert seen[0] is ours


async def test_what_is_made_after_the_stage_has_ended_is_refused() -> None:
    contexts: list[StageContext] = []

    async def keeps(ctx: StageContext) -> None:
        contexts.append(ctx)

    results = await Pipeline("p").with_stage("a", keeps).run()
    with pytest.raises(RuntimeError, match="'a' has ended"):
        contexts[0].save_partial(x=1)
    with pytest.raises(RuntimeError, match="'a' has ended"):
        contexts[0].add_artifact(Artifact(name="late"))
    assert results.artifacts == ()


async def test_a_partial_may_have_any_names(autojump_clock: MockClock) -> None:
    async def saves(ctx: StageContext) -> NoReturn:
        ctx.save_partial(error="x", recoverable=1, self="me")
        raise ValueError("real")

    output = await run_stage(saves, on_failure="tolerate")
    assert isinstance(output.error, ValueError)
    assert dict(output) == {"error": "x", "recoverable": 1, "self": "me"}


async def test_a_record_asked_for_early_is_the_one_that_is_filled_in(autojump_clock: MockClock) -> None:
    async with Pipeline("p").with_stage("a", sleeps(1)).with_stage("b", gives(), after="a").build().open() as run:
        record = run.results.records["b"]
        assert record.state is StageState.PENDING
        results = await run.wait()
    assert record.state is OK
    assert record is results.records["b"]
    assert results is run.results
    with pytest.raises(MissingOutputError, match="no stage of this run"):
        run.results.records["bb"]


def test_the_rest_of_a_coroutine_goes_on_whether_it_is_sent_none_or_not() -> None:
    """Trio sends values, but whoever drives a detached coroutine by hand sends `None`."""

    class Trap:
        def __await__(self) -> Generator[Trap, None, None]:
            yield self

    async def body() -> str:
        for _ in range(3):
            await Trap()
        return "done"

    async def outer() -> Any:
        coroutine = body()
        return await cast("Any", Suspended(coroutine, coroutine.send(None)))

    driven = outer()
    traps = [driven.send(None) for _ in range(3)]
    assert len(set(map(id, traps))) == 3
    with pytest.raises(StopIteration) as stopped:
        driven.send(None)
    assert stopped.value.value == "done"
