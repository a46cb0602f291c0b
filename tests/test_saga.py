"""Sagas: what is undone of a run that has failed or was cancelled, in which order, and what is said of it."""

from __future__ import annotations

import copy
import functools
import math
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from stageflow import (
    Artifact,
    CauseKind,
    Compensation,
    CompensationRecord,
    CompensationStatus,
    ContextSnapshot,
    DefinitionError,
    DefinitionWarning,
    Pipeline,
    PipelineCancelled,
    PipelineContext,
    PipelineResults,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
    StageTimeoutError,
    UndoState,
    stage,
)
from stageflow.journal.memory import MemoryStore
from tests.saga import DID, RUN, UNDOES, UNDONE, WRONG, Event, World, end, interrupted, resume, within
from tests.stages import raises, states
from tests.test_cost import count

if TYPE_CHECKING:
    from collections.abc import Callable

    from stageflow import StageRecord

NO = ValueError("no")
ONCE = Retry(attempts=1)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def chain(world: World, *names: str, **options: Any) -> Pipeline:
    """Stages one after the other, with undos that take a second each, and one that fails at the end."""
    pipeline, before = Pipeline("chain", **options), list[str]()
    for name in names:
        pipeline = pipeline.with_stage(name, world.does(), after=before, compensate=world.undo(1))
        before = [name]
    return pipeline.with_stage("bad", raises(NO), after=before)


def diamond(world: World, *, then: Exception | StageOutput | None = NO, **undos: Any) -> Pipeline:
    """a → b, c → d, of which the last fails."""
    undo = {name: undos.get(name, world.undo(1)) for name in "abcd"}
    return (
        Pipeline("diamond")
        .with_stage("a", world.does(), compensate=undo["a"])
        .with_stage("b", world.does(), after="a", compensate=undo["b"])
        .with_stage("c", world.does(), after="a", compensate=undo["c"])
        .with_stage("d", world.does(then=then), after=["b", "c"], compensate=undo["d"])
    )


# What can be declared


async def undoes(ctx: StageContext, output: StageOutput | None) -> None:
    pass


def undoes_at_once(ctx: StageContext, output: StageOutput | None) -> None:
    pass


async def takes_too_little(ctx: StageContext) -> None:
    pass


async def takes_too_much(ctx: StageContext, output: StageOutput | None, why: str) -> None:
    pass


class Undoer:
    async def __call__(self, ctx: StageContext, output: StageOutput | None) -> None:
        pass

    async def undo(self, ctx: StageContext, output: StageOutput | None) -> None:
        pass


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"compensate": undoes_at_once}, "compensate= takes an async function of the context and the output, not "),
    ({"compensate": 5}, "compensate= takes an async function"),
    ({"compensate": Undoer}, "compensate= takes an async function"),
    ({"compensate": takes_too_little}, "cannot be called with the context and the output"),
    ({"compensate": takes_too_much}, "cannot be called with the context and the output"),
    ({"compensate": Compensation(cast("Any", takes_too_much))}, "cannot be called with the context and the output"),
    ({"compensate": undoes, "irrevocable": True}, "says compensate=, and irrevocable=True"),
    ({"compensate": undoes, "compensate_when": "later"}, 'takes "attempted" or "succeeded", not \'later\''),
    ({"compensate": undoes, "compensate_when": None}, 'takes "attempted" or "succeeded", not None'),
    ({"compensates": undoes}, "did you mean 'compensate'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_an_undo_that_cannot_be_right_is_refused_when_it_is_declared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p").with_stage("a", undoes_nothing, **options)
    assert message in str(caught.value)
    assert caught.value.stage == "a"
    with pytest.raises(DefinitionError) as caught:
        stage(name="a", **options)(undoes_nothing)
    assert message in str(caught.value)


async def undoes_nothing(ctx: StageContext) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compensation(undoes_at_once), "takes an async function"),  # type: ignore[arg-type]
        (lambda: Compensation(undoes, timeout=-1), "Compensation(timeout=...)"),
        (lambda: Compensation(undoes, timeout=math.nan), "Compensation(timeout=...)"),
        (lambda: Compensation(undoes, timeout="1"), "Compensation(timeout=...)"),  # type: ignore[arg-type]
        (lambda: Compensation(undoes, retry=3), "Compensation(retry=...) takes a Retry, not 3"),  # type: ignore[arg-type]
        (lambda: Pipeline("p", compensate_on="fail"), "compensate_on= takes several of"),
        (lambda: Pipeline("p", compensate_on={"success"}), "compensate_on= takes 'fail', 'cancel', 'interrupt'"),
        (lambda: Pipeline("p", compensate_on=3), "compensate_on= takes several of"),  # type: ignore[arg-type]
        (lambda: Pipeline("p", undo_limit=0), "undo_limit="),
        (lambda: Pipeline("p", undo_limit=True), "undo_limit="),
        (lambda: Pipeline("p", undo_limit=1.5), "undo_limit="),  # type: ignore[arg-type]
        (lambda: Pipeline("p", compensation_budget=-1), "compensation_budget="),
        (lambda: Pipeline("p", compensation_budget=None), "compensation_budget= takes seconds"),  # type: ignore[arg-type]
        (lambda: Pipeline("p", compensation_budget=math.nan), "compensation_budget="),
    ],
)
def test_what_is_said_of_undoing_is_checked_when_it_is_said(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "undo", [undoes, Undoer(), Undoer().undo, functools.partial(undoes), Compensation(undoes, timeout=None, retry=ONCE)]
)
async def test_an_undo_is_anything_async_that_takes_the_context_and_the_output(undo: Any) -> None:
    ended = await end(Pipeline("p").with_stage("a", raises(NO), compensate=undo))
    assert ended.undos == {"a": "undone"}


async def test_a_decorated_function_carries_its_undo_and_where_it_is_declared_counts(world: World) -> None:
    @stage(compensate=world.undo(), compensate_when="succeeded")
    async def book(ctx: StageContext) -> None:
        world.note(DID, ctx)

    def of(**options: Any) -> Pipeline:
        return Pipeline("p").with_stage(book, **options).with_stage("bad", raises(NO), after="book")

    assert (await end(of())).undos == {"book": "undone"}
    assert (await end(of(compensate=None))).results.compensation is None
    assert world.of(UNDONE) == ["book"]


# What an undo is given


@pytest.mark.parametrize(
    ("then", "state", "given"),
    [
        (None, StageState.SUCCEEDED, {"by": "s"}),
        (NO, StageState.FAILED, None),
        (StageOutput.fail("no", half=1), StageState.FAILED, None),
        (StageOutput.cancel("no"), StageState.CANCELLED, None),
    ],
)
async def test_an_undo_is_given_the_output_if_its_stage_succeeded_and_none_otherwise(
    world: World, then: Any, state: StageState, given: object
) -> None:
    pipeline = Pipeline("p").with_stage("s", world.does(then=then), compensate=world.undo())
    ended = await end(pipeline.with_stage("bad", raises(NO), after="s"))
    assert ended.results.records["s"].state is state
    assert world.of(UNDOES) == ["s"]
    assert world.given("s") == given
    assert ended.status is CompensationStatus.COMPENSATED


@pytest.mark.parametrize("limit", ["timeout", "total_timeout", "heartbeat"])
async def test_a_stage_that_ran_into_a_limit_is_undone_without_an_output(
    world: World, limit: str, autojump_clock: MockClock
) -> None:
    options: Any = {limit: 1}
    ended = await end(Pipeline("p").with_stage("s", world.does(5), compensate=world.undo(), **options))
    assert isinstance(ended.error, StageTimeoutError)
    assert world.given("s") is None
    assert world.contexts["s"].cause == ended.results.records["s"].cause
    assert world.times(UNDOES, "s") == [1]


async def test_a_stage_that_was_cancelled_since_another_failed_is_undone_without_an_output(
    world: World, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p").with_stage("s", world.does(5), compensate=world.undo()).with_stage("bad", world.does(1, then=NO))
    )
    ended = await end(pipeline)
    assert ended.results.records["s"].state is StageState.CANCELLED
    assert world.given("s") is None
    assert world.times(UNDOES, "s") == [1]


async def test_a_stage_that_returned_although_it_was_cancelled_is_undone_with_its_output(
    world: World, autojump_clock: MockClock
) -> None:
    async def stubborn(ctx: StageContext) -> StageOutput:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        return StageOutput.ok(n=1)

    pipeline = (
        Pipeline("p").with_stage("s", stubborn, compensate=world.undo()).with_stage("bad", world.does(1, then=NO))
    )
    ended = await end(pipeline)
    assert ended.results.records["s"].after_cancel
    assert world.given("s") == {"n": 1}


async def test_an_undo_that_is_for_what_has_succeeded_is_not_called_for_what_was_attempted(world: World) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo(), compensate_when="succeeded")
        .with_stage("b", world.does(then=NO), after="a", compensate=world.undo(), compensate_when="succeeded")
    )
    ended = await end(pipeline)
    assert world.of(UNDOES) == ["a"]
    assert ended.undos == {"b": "not needed", "a": "undone"}
    assert ended.compensation.undos["b"].reason == "it has failed"
    assert ended.status is CompensationStatus.COMPENSATED


async def test_an_undo_sees_what_its_stage_saw(world: World, store: MemoryStore) -> None:
    def look(ctx: StageContext) -> tuple[object, ...]:
        where = (ctx.run_id, ctx.correlation_id, ctx.tenant, ctx.pipeline, ctx.stage, ctx.branch, ctx.idempotency_key)
        return (*where, ctx.data, dict(ctx.snapshot), ctx.metadata, ctx.artifacts, dict(ctx.inputs), ctx.attempt)

    seen: list[tuple[object, ...]] = []

    async def see(ctx: StageContext) -> None:
        seen.append((*look(ctx), ctx.cause))
        await trio.lowlevel.checkpoint()

    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        seen.append((*look(ctx), ctx.cause))

    context = PipelineContext(
        run_id=RUN,
        correlation_id="c",
        tenant="t",
        data={"n": 1},
        snapshot=ContextSnapshot({"s": 2}),
        metadata={"m": 3},
        artifacts=[Artifact(name="x", data=b"1")],
    )
    pipeline = (
        Pipeline("p")
        .with_stage("first", world.does())
        .with_stage("s", see, after="first", compensate=undo)
        .with_stage("bad", raises(NO), after="s")
    )
    ended = await end(pipeline, ctx=context)
    assert seen[0][:-1] == seen[1][:-1]
    assert seen[0][-1] is None
    assert seen[1][-1] == ended.results.records["bad"].cause
    seen.clear()
    await end(pipeline, store, context)
    assert seen[0][:-1] == seen[1][:-1]


async def test_an_undo_has_a_clock_and_a_limit_of_its_own(world: World, autojump_clock: MockClock) -> None:
    seen: list[object] = []

    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        await trio.sleep(1)
        seen.extend(
            [ctx.timer.elapsed, ctx.timer.stage_elapsed, ctx.timer.remaining, ctx.deadline - trio.current_time()]
        )
        ctx.timer.extend(2)
        ctx.heartbeat()
        await trio.sleep(4)
        seen.extend([ctx.timer.remaining, ctx.cancelled, ctx.cancel_reason, ctx.feedback])
        try:
            await trio.sleep(5)
        finally:
            seen.extend([ctx.cancelled, ctx.cancel_reason])
            with ctx.cleanup():
                await trio.sleep(1)  # noqa: ASYNC102  # that is a shielded scope with a deadline
                seen.append("cleaned up")

    compensation = Compensation(undo, timeout=5, retry=ONCE)
    ended = await end(Pipeline("p").with_stage("s", world.does(2, then=NO), timeout=9, compensate=compensation))
    assert seen == [3, 1, 4, 4, 2, False, None, None, True, "the undo has reached its limit", "cleaned up"]
    assert (ended.undos, ended.status) == ({"s": "failed"}, CompensationStatus.FAILED)
    undo_record = ended.compensation.undos["s"]
    assert isinstance(undo_record.error, TimeoutError)
    assert undo_record.started is not None
    assert undo_record.ended is not None
    assert undo_record.ended - undo_record.started == 8


def no_nursery(ctx: StageContext) -> object:
    return ctx.nursery


USES: list[Callable[[StageContext], object]] = [
    no_nursery,
    lambda ctx: ctx.on_exit(print),
    lambda ctx: ctx.add_artifact(Artifact(name="x", data=b"1")),
    lambda ctx: ctx.transaction(),
    lambda ctx: ctx.save_partial(x=1),
    lambda ctx: ctx.run_pipeline(Pipeline("child").with_stage("x", undoes_nothing)).send(None),
]


@pytest.mark.parametrize("use", USES)
async def test_what_an_undo_cannot_have_raises_and_is_not_lost_in_silence(
    world: World, use: Callable[[StageContext], object]
) -> None:
    raised: list[RuntimeError] = []

    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        with pytest.raises(RuntimeError) as caught:
            use(ctx)
        raised.append(caught.value)

    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=undo))
    assert ended.undos == {"s": "undone"}
    assert "'s'" in str(raised[0])


# In which order


async def test_what_used_something_is_undone_before_it_and_independent_undos_go_at_once(
    world: World, autojump_clock: MockClock
) -> None:
    undos = {"a": world.undo(1), "b": world.undo(2), "c": world.undo(3), "d": world.undo(4)}
    ended = await end(diamond(world, **cast("dict[str, Any]", undos)))
    assert {name: world.times(UNDOES, name) for name in "abcd"} == {"a": [7], "b": [4], "c": [4], "d": [0]}
    assert ended.undos == dict.fromkeys("abcd", "undone")
    assert (ended.status, ended.results.status) == (CompensationStatus.COMPENSATED, RunStatus.FAILED)
    assert isinstance(ended.error, StageExecutionError)
    assert ended.error.original is NO


async def test_stages_that_need_no_undo_are_passed(world: World, autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo(1))
        .with_stage("pure", world.does(), after="a")
        .with_stage("b", world.does(), after="pure", compensate=world.undo(1))
        .with_stage("bad", raises(NO), after="b")
    )
    ended = await end(pipeline)
    assert (world.times(UNDOES, "b"), world.times(UNDOES, "a")) == ([0], [1])
    assert list(ended.undos) == ["b", "a"]


async def test_at_most_so_many_undos_are_called_at_once(world: World, autojump_clock: MockClock) -> None:
    pipeline = Pipeline("p", undo_limit=2)
    for name in "abcde":
        pipeline = pipeline.with_stage(name, world.does(), compensate=world.undo(1))
    ended = await end(pipeline.with_stage("bad", raises(NO), after=list("abcde")))
    assert sorted(at for name in "abcde" for at in world.times(UNDOES, name)) == [0, 0, 1, 1, 2]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_a_long_chain_is_undone_without_a_deep_stack(world: World) -> None:
    names = [f"s{number}" for number in range(3000)]
    pipeline, before = Pipeline("p"), list[str]()
    for name in names:
        pipeline = pipeline.with_stage(name, undoes_nothing, after=before, compensate=undoes)
        before = [name]
    ended = await end(pipeline.with_stage("bad", raises(NO), after=before))
    assert list(ended.undos) == names[::-1]


# When an undo fails


async def test_an_undo_is_tried_three_times_a_second_apart_at_first(world: World, autojump_clock: MockClock) -> None:
    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=world.undo(fails=math.inf)))
    assert world.times(UNDOES, "s") == [0, 1, 3]
    assert ended.compensation.undos["s"].attempts == 3
    assert world.contexts["s"].attempt == 3


async def test_an_undo_is_tried_again_as_it_says(world: World, autojump_clock: MockClock) -> None:
    retry = Retry(attempts=5, delay=2, factor=3, max_delay=10)
    compensation = Compensation(world.undo(1, fails=4), retry=retry)
    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=compensation))
    assert world.times(UNDOES, "s") == [0, 3, 10, 21, 32]
    assert ended.undos == {"s": "undone"}
    undo = ended.compensation.undos["s"]
    assert (undo.attempts, undo.error, undo.reason) == (5, None, "")


async def test_an_undo_is_not_tried_again_after_what_is_not_worth_it(world: World) -> None:
    compensation = Compensation(world.undo(fails=9), retry=Retry(attempts=3, on=ValueError))
    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=compensation))
    assert world.of(UNDOES) == ["s"]
    assert ended.compensation.undos["s"].reason == "OSError: cannot undo s"


async def test_the_limit_of_an_undo_is_on_each_attempt_and_reaching_it_is_worth_another(
    world: World, autojump_clock: MockClock
) -> None:
    # As with the retry of a stage, whatever exceptions it is for.
    compensation = Compensation(world.undo(9), timeout=2, retry=Retry(attempts=2, delay=1, on=ValueError))
    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=compensation))
    assert world.times(UNDOES, "s") == [0, 3]
    undo = ended.compensation.undos["s"]
    assert (undo.state, undo.reason) == (UndoState.FAILED, "TimeoutError: ran longer than its limit of 2 s")


async def test_the_default_limit_of_the_pipeline_is_that_of_an_undo_and_not_that_of_its_stage(
    world: World, autojump_clock: MockClock
) -> None:
    def of(**options: Any) -> Pipeline:
        pipeline = Pipeline("p", default_timeout=options.pop("default_timeout", 4))
        undo = Compensation(world.undo(9), retry=ONCE, **options)
        return pipeline.with_stage("s", world.does(then=NO), timeout=1, compensate=undo)

    began = trio.current_time()
    assert (await end(of())).undos == {"s": "failed"}
    assert trio.current_time() - began == 4
    assert (await end(of(timeout=None))).undos == {"s": "undone"}
    assert (await end(of(default_timeout=None))).undos == {"s": "undone"}
    assert (await end(of(timeout=0))).undos == {"s": "failed"}


async def test_an_undo_that_has_done_its_work_counts_although_its_limit_was_reached(
    world: World, autojump_clock: MockClock
) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)

    ended = await end(
        Pipeline("p").with_stage("s", world.does(then=NO), compensate=Compensation(undo, timeout=1, retry=ONCE))
    )
    assert ended.undos == {"s": "undone"}


async def test_what_a_failed_undo_stands_on_is_held_and_nothing_else(world: World, autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("a2", world.does(), after="a", compensate=world.undo())
        .with_stage("pure", world.does(), after="a2")
        .with_stage("b", world.does(), after="pure", compensate=Compensation(world.undo(fails=9), retry=ONCE))
        .with_stage("c", world.does(), after="a2", compensate=world.undo())
        .with_stage("after b", world.does(), after="b", compensate=world.undo())
        .with_stage("other", world.does(), compensate=world.undo())
        .with_stage("bad", world.does(5, then=NO))
    )
    ended = await end(pipeline)
    assert ended.undos == {"after b": "undone", "b": "failed", "c": "undone", "other": "undone"} | {
        "a": "held",
        "a2": "held",
    }
    assert sorted(world.of(UNDOES)) == ["after b", "b", "c", "other"]
    assert ended.status is CompensationStatus.FAILED
    assert ended.compensation.undos["a2"].reason == "'pure', which used it, is still there"
    assert ended.compensation.of(UndoState.FAILED) == ("b",)
    assert isinstance(ended.error, StageExecutionError)
    assert (ended.error.stage, ended.error.original, ended.error.compensation) == ("bad", NO, ended.compensation)
    assert set(ended.results) == {"a", "a2", "pure", "b", "c", "after b", "other"}


async def test_an_undo_of_which_only_the_best_is_hoped_holds_nothing(world: World) -> None:
    compensation = Compensation(world.undo(fails=9), retry=ONCE, best_effort=True)
    ended = await end(diamond(world, b=compensation, a=world.undo(), c=world.undo(), d=world.undo()))
    assert ended.undos == {"a": "undone", "b": "failed", "c": "undone", "d": "undone"}
    assert ended.compensation.undos["b"].best_effort
    assert ended.status is CompensationStatus.COMPENSATED


async def test_an_undo_that_returns_a_failure_has_not_undone_anything(world: World) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> StageOutput:
        return StageOutput.fail("it is shipped")

    ended = await end(Pipeline("p").with_stage("s", world.does(then=NO), compensate=Compensation(undo, retry=ONCE)))
    assert ended.undos == {"s": "failed"}
    assert ended.status is CompensationStatus.FAILED


async def test_a_keyboard_interrupt_in_an_undo_ends_the_run_and_nothing_is_called_compensated(world: World) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        raise KeyboardInterrupt

    graph = Pipeline("p").with_stage("s", world.does(then=NO), compensate=undo).build()
    with pytest.raises(KeyboardInterrupt):
        await graph.run()
    results: PipelineResults | None = None
    with pytest.raises(KeyboardInterrupt):
        async with graph.open() as run:
            results = run.results
    assert results is not None
    assert results.compensation is not None
    assert results.compensation.status is CompensationStatus.COMPENSATING
    assert results.compensation.undos["s"].missing


# What is not undone


async def test_a_stage_that_skipped_itself_has_nothing_to_undo(world: World) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("skips", world.does(then=StageOutput.skip("nothing to do")), compensate=world.undo())
        .with_stage("not met", world.does(), when=lambda ctx: False, compensate=world.undo())
        .with_stage("after", world.does(), after="skips", compensate=world.undo())
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("bad", raises(NO), after="a")
        .with_stage("never", world.does(), after="bad", compensate=world.undo())
    )
    ended = await end(pipeline)
    assert world.of(UNDOES) == ["a"]
    assert ended.undos == {"a": "undone", "skips": "not needed"}
    assert ended.compensation.undos["skips"].reason == "it skipped itself"


async def test_a_stage_that_skips_itself_after_an_attempt_that_failed_is_in_doubt(world: World) -> None:
    async def book(ctx: StageContext) -> StageOutput:
        world.note(DID, ctx)
        if ctx.attempt == 1:
            raise OSError("no answer")
        return StageOutput.skip("that is booked already")

    pipeline = Pipeline("p").with_stage("book", book, retry=Retry(attempts=2), compensate=world.undo())
    ended = await end(pipeline.with_stage("bad", raises(NO), after="book", join="settled"))
    assert world.of(UNDOES) == ["book"]
    assert world.given("book") is None
    assert ended.undos == {"book": "undone"}


async def test_what_has_succeeded_once_is_undone_although_it_failed_when_it_was_sent_back(world: World) -> None:
    async def draft(ctx: StageContext) -> None:
        world.note(DID, ctx)
        if ctx.feedback is not None:
            raise NO

    async def guard(ctx: StageContext) -> StageOutput:
        return StageOutput.retry("not good enough", stage="draft")

    pipeline = (
        Pipeline("p")
        .with_stage("draft", draft, compensate=world.undo(), compensate_when="succeeded")
        .with_stage("guard", guard, after="draft", retry=Retry(attempts=2))
    )
    ended = await end(pipeline)
    assert world.of(DID) == ["draft", "draft"]
    assert world.of(UNDOES) == ["draft"]
    assert ended.undos == {"draft": "undone"}


async def test_a_failure_that_is_tolerated_undoes_nothing(world: World) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("b", world.does(then=NO), after="a", on_failure="tolerate", compensate=world.undo())
    )
    ended = await end(pipeline)
    assert (ended.error, ended.results.status, ended.results.compensation) == (None, RunStatus.PARTIAL, None)
    assert world.of(UNDOES) == []


@pytest.mark.parametrize("policy", ["drain", "isolate"])
async def test_a_failure_that_lets_others_go_on_is_undone_when_they_have_ended(
    world: World, policy: str, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p", on_failure=policy)
        .with_stage("bad", world.does(1, then=NO), compensate=world.undo())
        .with_stage("slow", world.does(3), compensate=world.undo())
    )
    ended = await end(pipeline)
    assert (world.times(UNDOES, "bad"), world.times(UNDOES, "slow")) == ([3], [3])
    assert world.given("slow") == {"by": "slow"}
    assert ended.status is CompensationStatus.COMPENSATED
    assert world.contexts["slow"].cause == ended.results.records["bad"].cause


async def test_an_undo_is_told_of_a_task_that_failed_after_its_stage(world: World, autojump_clock: MockClock) -> None:
    async def fails_later() -> None:
        await trio.sleep(1)
        raise NO.with_traceback(None)

    async def lends(ctx: StageContext) -> None:
        ctx.nursery.start_soon(fails_later)

    pipeline = (
        Pipeline("p", on_failure="isolate")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("lends", lends, after="a")
    )
    ended = await end(pipeline)
    assert isinstance(ended.error, StageExecutionError)
    assert str(world.contexts["a"].cause) == "failure of 'lends': ValueError: no"


async def test_a_run_that_succeeds_undoes_nothing(world: World) -> None:
    ended = await end(diamond(world, then=None))
    assert (ended.results.status, ended.results.compensation) == (RunStatus.SUCCEEDED, None)


async def test_a_run_without_an_undo_says_nothing_of_undoing() -> None:
    ended = await end(Pipeline("p").with_stage("a", raises(NO)))
    assert ended.error is not None
    assert ended.error.compensation is None


# What makes a run be undone


@pytest.mark.parametrize("on", [{"fail", "cancel"}, {"fail"}, {"cancel"}, (), {"interrupt"}])
@pytest.mark.parametrize("ending", ["fail", "cancel", "deadline", "timeout"])
async def test_a_run_is_undone_when_it_comes_to_what_it_says(
    world: World, on: Any, ending: str, autojump_clock: MockClock
) -> None:
    thens: dict[str, Exception | StageOutput] = {"fail": NO, "cancel": StageOutput.cancel("enough")}
    then = thens.get(ending)
    pipeline = (
        Pipeline("p", compensate_on=on, deadline=2 if ending == "deadline" else None)
        .with_stage("a", world.does(), compensate=world.undo(3))
        .with_stage("b", world.does(5 if then is None else 1, then=then), timeout=2 if ending == "timeout" else None)
    )
    ended = await end(pipeline)
    as_asked = ("cancel" if ending == "cancel" else "fail") in on
    assert world.of(UNDONE) == (["a"] if as_asked else [])  # also after the deadline: that is not on undos
    assert (ended.results.compensation is not None) is as_asked
    assert isinstance(ended.error, PipelineCancelled if ending == "cancel" else StageExecutionError)
    if as_asked:
        kind = {"fail": CauseKind.FAILURE, "cancel": CauseKind.CANCEL}.get(
            ending, CauseKind(ending if then is None else "failure")
        )
        assert world.contexts["a"].cause is not None
        assert world.contexts["a"].cause.kind is kind
        assert ended.compensation.cause == world.contexts["a"].cause


@pytest.mark.parametrize("on", [{"cancel"}, {"fail"}])
async def test_a_run_that_is_cancelled_from_outside_is_undone(
    world: World, on: set[str], autojump_clock: MockClock
) -> None:
    pipeline = Pipeline("p", compensate_on=on).with_stage("a", world.does(5), compensate=world.undo(2))
    results: PipelineResults | None = None
    with pytest.raises(PipelineCancelled, match="enough"):  # noqa: PT012
        async with pipeline.build().open() as run:
            results = run.results
            await trio.sleep(1)
            run.cancel("enough")
            await trio.sleep(1)
            run.cancel("really")  # while it is undone, that changes nothing
    assert world.of(UNDONE) == (["a"] if "cancel" in on else [])
    assert results is not None
    if "cancel" in on:
        assert results.compensation is not None
        assert results.compensation.status is CompensationStatus.COMPENSATED
        assert world.contexts["a"].cause is not None
        assert str(world.contexts["a"].cause) == "cancel: enough"


async def test_the_callers_own_cancellation_undoes_nothing_unless_that_is_asked_for(
    world: World, store: MemoryStore, autojump_clock: MockClock
) -> None:
    pipeline = Pipeline("p").with_stage("a", world.does(5, 1), compensate=world.undo())
    with within(1) as scope:
        await end(pipeline, store)
    assert scope.cancelled_caught
    assert world.of(UNDOES) == []
    (info,) = await store.runs()
    assert (info.status, info.compensation) == (RunStatus.INTERRUPTED, None)
    ended = await resume(pipeline, store)
    assert ended.results.status is RunStatus.SUCCEEDED


async def test_a_run_that_asks_for_that_is_undone_when_its_caller_cancels_it(
    world: World, store: MemoryStore, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p", compensate_on={"interrupt"}, compensation_budget=3)
        .with_stage("a", world.does(), compensate=world.undo(1))
        .with_stage("b", world.does(9), after="a", compensate=world.undo(1))
    )
    ended, seconds = await interrupted(pipeline, 1, store)
    assert seconds == 3
    assert ended.results.status is RunStatus.INTERRUPTED
    assert ended.status is CompensationStatus.COMPENSATED
    assert world.of(UNDONE) == ["b", "a"]
    assert world.given("b") is None
    assert world.contexts["b"].cause is not None
    assert world.contexts["b"].cause.kind is CauseKind.CALLER
    (info,) = await store.runs()
    assert (info.status, info.compensation) == (RunStatus.INTERRUPTED, CompensationStatus.COMPENSATED)


@pytest.mark.parametrize("width", [1, 3])
async def test_the_budget_bounds_what_a_caller_waits_for_and_a_resume_does_the_rest(
    world: World, store: MemoryStore, width: int, autojump_clock: MockClock
) -> None:
    pipeline = Pipeline("p", compensate_on={"interrupt"}, compensation_budget=2.5)
    names = [f"a{number}" for number in range(width)]
    for name in names:
        pipeline = pipeline.with_stage(name, world.does(), compensate=world.undo(2))
    pipeline = pipeline.with_stage("b", world.does(9), after=names, compensate=world.undo(1))
    ended, seconds = await interrupted(pipeline, 1, store)
    assert seconds == 3.5
    assert ended.results.status is RunStatus.INTERRUPTED
    assert ended.status is CompensationStatus.COMPENSATING
    assert ended.compensation.undos["b"].state is UndoState.UNDONE
    (info,) = await store.runs()
    assert (info.status, info.compensation) == (RunStatus.INTERRUPTED, CompensationStatus.COMPENSATING)
    world.take()
    ended = await resume(pipeline, store)
    assert sorted(world.of(UNDONE)) == names
    assert world.of(DID) == []
    assert ended.undos == {"b": "undone"} | dict.fromkeys(names, "undone")
    assert ended.status is CompensationStatus.COMPENSATED


# A caller that does not wait for the undos


@pytest.mark.parametrize("width", [1, 2])
async def test_a_caller_with_a_timeout_gets_out_of_slow_undos_when_it_is_reached(
    world: World, store: MemoryStore, width: int, autojump_clock: MockClock
) -> None:
    names = [f"a{number}" for number in range(width)]
    pipeline = Pipeline("p")
    for name in names:
        pipeline = pipeline.with_stage(name, world.does(), compensate=world.undo(5))
    pipeline = pipeline.with_stage("b", world.does(), after=names, compensate=world.undo(0.25))
    pipeline = pipeline.with_stage("bad", raises(NO), after="b")
    ended, seconds = await interrupted(pipeline, 1, store)
    assert seconds == 1
    assert ended.results.status is RunStatus.INTERRUPTED
    assert ended.status is CompensationStatus.COMPENSATING
    assert ended.compensation.of(UndoState.PENDING) == tuple(ended.compensation.undos)[1:]
    (info,) = await store.runs()
    assert (info.status, info.compensation) == (RunStatus.INTERRUPTED, CompensationStatus.COMPENSATING)
    assert not info.held
    assert world.of(UNDONE) == ["b"]
    world.take()
    ended = await resume(pipeline, store)
    assert world.of(DID) == []
    assert sorted(world.of(UNDOES)) == names
    assert ended.status is CompensationStatus.COMPENSATED
    assert isinstance(ended.error, StageExecutionError)
    assert (ended.error.stage, ended.error.reason) == ("bad", "ValueError: no")
    assert {name: undo.attempts for name, undo in ended.compensation.undos.items()} == {"b": 1} | dict.fromkeys(
        names, 2
    )


async def test_a_caller_gets_out_of_undos_also_without_a_store(world: World, autojump_clock: MockClock) -> None:
    ended, seconds = await interrupted(chain(world, "a", "b"), 1)
    assert seconds == 1
    assert ended.results.status is RunStatus.INTERRUPTED
    assert dict(ended.results) == {name: StageOutput.ok(by=name) for name in "ab"}


async def test_a_delay_between_two_attempts_of_an_undo_ends_with_the_callers_patience(
    world: World, store: MemoryStore, autojump_clock: MockClock
) -> None:
    compensation = Compensation(world.undo(fails=1), retry=Retry(attempts=2, delay=60))
    pipeline = Pipeline("p").with_stage("s", world.does(then=NO), compensate=compensation)
    with within(1):
        await end(pipeline, store)
    ended = await resume(pipeline, store)
    assert ended.undos == {"s": "undone"}
    assert world.of(UNDOES) == ["s", "s"]


# The point of no return, and what is beyond undoing


async def test_past_the_point_of_no_return_nothing_is_undone(world: World, store: MemoryStore) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("pay", world.does(), after="a", pivot=True)
        .with_stage("ship", world.does(then=NO), after="pay")
    )
    for kept in (None, store):
        ended = await end(pipeline, kept)
        assert world.of(UNDOES) == []
        assert ended.undos == {"a": "not needed"}
        assert ended.status is CompensationStatus.NOT_NEEDED
        assert ended.compensation.undos["a"].reason == "'pay', the point of no return, has succeeded; resume the run"
    world.broken["ship"] = None
    world.take()
    ended = await resume(pipeline, store)
    assert world.of(DID) == ["ship"]
    assert ended.results.status is RunStatus.SUCCEEDED


@pytest.mark.parametrize("then", [NO, StageOutput.skip("no"), None])
async def test_before_the_point_of_no_return_everything_is_undone(world: World, then: Any) -> None:
    pipeline = Pipeline("p").with_stage("a", world.does(), compensate=world.undo())
    if then is None:  # it is not reached
        pipeline = pipeline.with_stage("bad", raises(NO), after="a").with_stage(
            "pay", world.does(), after="bad", pivot=True
        )
    else:
        pipeline = pipeline.with_stage("pay", world.does(then=then), after="a", pivot=True, compensate=world.undo())
        pipeline = pipeline.with_stage("bad", raises(NO), after="pay", join="settled")
    ended = await end(pipeline)
    assert ended.undos["a"] == "undone"
    assert ended.status is CompensationStatus.COMPENSATED
    assert ("pay" in world.of(UNDONE)) == (then is NO)


async def test_what_is_irrevocable_is_reported_and_holds_nothing(world: World) -> None:
    with pytest.warns(DefinitionWarning, match="'mail'"):
        graph = (
            Pipeline("p")
            .with_stage("a", world.does(), compensate=world.undo())
            .with_stage("mail", world.does(), after="a", irrevocable=True)
            .with_stage("skips", world.does(then=StageOutput.skip("no")), after="a", irrevocable=True)
            .with_stage("bad", raises(NO), after="mail")
            .with_stage("never", world.does(), after="bad", irrevocable=True)
            .build()
        )
    ended = await end(graph)
    assert ended.undos == {"a": "undone", "mail": "irrevocable", "skips": "not needed"}
    assert ended.compensation.of(UndoState.IRREVOCABLE) == ("mail",)
    assert ended.status is CompensationStatus.COMPENSATED


# One branch alone


def branches(world: World, then: StageOutput | None = None, **options: Any) -> Pipeline:
    """A fork into a left branch of three stages, of which the last may end it, and a right one."""
    return (
        Pipeline("p", **options)
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo(1))
        .with_stage("left 2", world.does(), after="left", compensate=world.undo(1))
        .with_stage("left 3", world.does(1, then=then), after="left 2", compensate=world.undo(1))
        .with_stage("right", world.does(2), after="root", compensate=world.undo())
        .with_stage("join", world.does(), after=["left 3", "right"], join="settled", compensate=world.undo())
    )


@pytest.mark.parametrize("of", [None, "left"])
async def test_a_stage_can_have_its_own_branch_undone(world: World, of: str | None, autojump_clock: MockClock) -> None:
    then = StageOutput.cancel_branch("no use", of=of, compensate=True)
    ended = await end(branches(world, then))
    assert world.of(UNDONE) == ["left 3", "left 2", "left"]
    assert [world.times(UNDOES, name) for name in ("left 3", "left 2", "left")] == [[1], [2], [3]]
    assert world.given("left 3") is None
    assert world.contexts["left"].cause == ended.results.records["left 3"].cause
    assert ended.undos == {"left 3": "undone", "left 2": "undone", "left": "undone"}
    assert (ended.results.status, ended.status) == (RunStatus.PARTIAL, CompensationStatus.COMPENSATED)
    assert "join" in ended.results


async def test_a_branch_that_is_just_ended_is_not_undone(world: World, autojump_clock: MockClock) -> None:
    ended = await end(branches(world, StageOutput.cancel_branch("no use")))
    assert world.of(UNDOES) == []
    assert ended.results.compensation is None


async def test_a_branch_can_be_undone_from_outside_and_the_run_stays_open_until_it_is(
    world: World, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo(7))
        .with_stage("left 2", world.does(9), after="left", compensate=world.undo())
        .with_stage("right", world.does(2), after="root", compensate=world.undo())
    )
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        began = trio.current_time()
        run.cancel_branch("left 2", "no use", compensate=True)
        results = await run.wait()
        assert trio.current_time() - began == 7
    assert world.of(UNDONE) == ["left 2", "left"]
    assert world.given("left 2") is None
    assert str(world.contexts["left"].cause) == "cancel_branch: no use"
    assert results.status is RunStatus.PARTIAL
    assert results.compensation is not None
    assert results.compensation.status is CompensationStatus.COMPENSATED


async def test_a_branch_that_has_not_started_or_has_ended_is_not_undone(
    world: World, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("root", world.does(2), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo())
        .with_stage("right", world.does(2), after="root", compensate=world.undo())
        .with_stage("last", world.does(2), after=["left", "right"], compensate=world.undo())
    )
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        run.cancel_branch("right", "no use", compensate=True)  # to come
        await trio.sleep(2)
        run.cancel_branch("left", "no use", compensate=True)  # over
        results = await run.wait()
    assert world.of(UNDOES) == []
    assert states(results)["right"] is StageState.SKIPPED
    assert results.status is RunStatus.PARTIAL


async def test_the_trunk_can_be_undone_without_an_error(world: World, store: MemoryStore) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    pipeline = (
        Pipeline("p", compensate_on=())
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("b", world.does(then=then), after="a", compensate=world.undo())
    )
    for kept in (None, store):
        world.take()
        ended = await end(pipeline, kept)
        assert world.of(UNDONE) == ["b", "a"]
        assert (ended.error, ended.results.status) == (None, RunStatus.PARTIAL)
        assert ended.status is CompensationStatus.COMPENSATED


def with_consumer(world: World) -> Pipeline:
    """The output of `left` is used by a stage outside of its branch, which has finished when the branch is ended."""
    return (
        Pipeline("p")
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo())
        .with_stage("left 2", world.does(), after="left", compensate=world.undo())
        .with_stage("left 3", world.does(9), after="left 2", compensate=world.undo())
        .with_stage("right", world.does(), after="root", compensate=world.undo())
        .with_stage("reads", world.does(), after=["left 2", "right"], compensate=world.undo())
        .with_stage("last", world.does(5), after="reads")
    )


async def test_what_a_finished_stage_outside_of_the_branch_has_used_stays_and_that_is_reported(
    world: World, autojump_clock: MockClock
) -> None:
    async with with_consumer(world).build().open() as run:
        await trio.sleep(1)
        run.cancel_branch("left", "no use", compensate=True)
        results = await run.wait()
    assert world.of(UNDONE) == ["left 3"]
    assert results.compensation is not None
    assert {name: undo.state for name, undo in results.compensation.undos.items()} == {
        "left 3": UndoState.UNDONE,
        "left 2": UndoState.NOT_NEEDED,
        "left": UndoState.NOT_NEEDED,
    }
    assert "outside of the branch" in results.compensation.undos["left 2"].reason
    # What one asked for was done: that is no failure.
    assert results.compensation.status is CompensationStatus.COMPENSATED


async def test_what_was_left_of_a_branch_is_undone_with_the_run(world: World, autojump_clock: MockClock) -> None:
    world.broken["last"] = NO
    results: PipelineResults | None = None
    with suppress(StageExecutionError):
        async with with_consumer(world).build().open() as run:
            results = run.results
            await trio.sleep(1)
            run.cancel_branch("left", "no use", compensate=True)
    assert world.of(UNDONE)[:2] == ["left 3", "reads"]
    assert sorted(world.of(UNDONE)[2:]) == ["left", "left 2", "right", "root"]
    assert world.of(UNDONE)[-1] == "root"
    assert results is not None
    assert results.compensation is not None
    assert results.compensation.status is CompensationStatus.COMPENSATED


async def test_branches_that_are_undone_at_once_do_not_speak_for_each_other(
    world: World, autojump_clock: MockClock
) -> None:
    pipeline = Pipeline("p").with_stage("root", world.does())
    for name, seconds in (("left", 2), ("right", 5)):
        then = StageOutput.cancel_branch("no use", compensate=True)
        pipeline = pipeline.with_stage(name, world.does(then=then), after="root", compensate=world.undo(seconds))
    seen: list[tuple[CompensationStatus, UndoState]] = []

    def look(results: PipelineResults) -> None:
        assert results.compensation is not None
        seen.append((results.compensation.status, results.compensation.undos["left"].state))

    async with pipeline.build().open() as run:
        results = run.results
        await trio.sleep(3)
        look(results)
        await run.wait()
        look(results)
    assert seen == [
        (CompensationStatus.COMPENSATING, UndoState.UNDONE),
        (CompensationStatus.COMPENSATED, UndoState.UNDONE),
    ]


async def test_the_undo_of_a_branch_goes_on_when_the_run_fails(world: World, autojump_clock: MockClock) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    pipeline = (
        Pipeline("p")
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo(1))
        .with_stage("left 2", world.does(then=then), after="left", compensate=world.undo(4))
        .with_stage("right", world.does(2, then=NO), after="root", compensate=world.undo())
    )
    ended = await end(pipeline)
    assert isinstance(ended.error, StageExecutionError)
    assert ended.undos == dict.fromkeys(["left", "left 2", "right", "root"], "undone")
    assert ended.status is CompensationStatus.COMPENSATED
    assert world.of(UNDONE)[-1] == "root"
    assert world.times(UNDONE, "left 2") == [6]  # it was called anew: nobody knows how far it was


async def test_the_undo_of_a_branch_is_finished_also_if_nothing_else_of_the_run_is_undone(
    world: World, autojump_clock: MockClock
) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    pipeline = (
        Pipeline("p", compensate_on={"cancel"})
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(), after="root", compensate=world.undo(1))
        .with_stage("left 2", world.does(then=then), after="left", compensate=world.undo(4))
        .with_stage("right", world.does(2, then=NO), after="root", compensate=world.undo())
    )
    ended = await end(pipeline)
    assert ended.undos == {"left 2": "undone", "left": "undone"}
    assert ended.status is CompensationStatus.COMPENSATED
    assert world.contexts["left"].cause == ended.results.records["left 2"].cause
    assert isinstance(ended.error, StageExecutionError)


async def test_the_undo_of_a_branch_of_a_run_past_the_point_of_no_return_is_not_called(
    world: World, autojump_clock: MockClock
) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    pipeline = (
        Pipeline("p")
        .with_stage("root", world.does(), compensate=world.undo())
        .with_stage("left", world.does(1, then=then), after="root", compensate=world.undo())
        .with_stage("pay", world.does(), after="root", pivot=True)
    )
    ended = await end(pipeline)
    assert world.of(UNDOES) == []
    assert ended.undos == {"left": "not needed"}


# Runs within runs


def child_of(world: World, then: Exception | StageOutput | None = None, **options: Any) -> Pipeline:
    return (
        Pipeline("child", **options)
        .with_stage("x", world.does(), compensate=world.undo(1))
        .with_stage("y", world.does(then=then), after="x", compensate=world.undo(1))
    )


def calls(*children: Pipeline, then: Exception | StageOutput | None = None) -> Any:
    """A stage that runs pipelines one after the other, and then ends like this."""

    async def body(ctx: StageContext) -> StageOutput:
        for child in children:
            await ctx.run_pipeline(child)
        if isinstance(then, Exception):
            raise then
        return StageOutput.ok() if then is None else then

    return body


@pytest.mark.parametrize("declared", [True, False])
async def test_a_run_within_a_stage_is_undone_before_the_stage_itself(
    world: World, declared: bool, autojump_clock: MockClock
) -> None:
    inner: Any = child_of(world) if declared else calls(child_of(world))
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo(1))
        .with_stage("inner", inner, after="a", compensate=world.undo(1))
        .with_stage("bad", raises(NO), after="inner")
    )
    ended = await end(pipeline)
    assert world.of(UNDONE) == ["y", "x", "inner", "a"]
    assert [event.at for event in world.log if event.what == UNDOES] == [0, 1, 2, 3]
    assert ended.undos == dict.fromkeys(["inner/0/y", "inner/0/x", "inner", "a"], "undone")
    assert ended.status is CompensationStatus.COMPENSATED
    for name in "xy":
        did, undid = (
            {event.key for event in world.log if (event.what, event.stage) == (what, name)} for what in (DID, UNDOES)
        )
        assert did == undid


async def test_runs_within_a_stage_are_undone_the_last_one_first(world: World) -> None:
    children = [Pipeline(name).with_stage(name, world.does(), compensate=world.undo()) for name in ("one", "two")]
    ended = await end(Pipeline("p").with_stage("s", calls(*children, then=NO)))
    assert world.of(UNDONE) == ["two", "one"]
    assert list(ended.undos) == ["s/1/two", "s/0/one"]


async def test_a_stage_is_held_if_what_was_run_within_it_is_still_there(world: World) -> None:
    child = Pipeline("child").with_stage("x", world.does(), compensate=Compensation(world.undo(fails=9), retry=ONCE))
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("inner", child, after="a", compensate=world.undo())
        .with_stage("bad", raises(NO), after="inner")
    )
    ended = await end(pipeline)
    assert ended.undos == {"inner/0/x": "failed", "inner": "held", "a": "held"}
    assert ended.compensation.undos["inner"].reason == "what was run within it is still there"
    assert ended.status is CompensationStatus.FAILED


async def test_a_run_within_that_fails_by_itself_is_undone_by_itself_and_not_again(
    world: World, autojump_clock: MockClock
) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo(1))
        .with_stage("inner", child_of(world, NO), after="a", compensate=world.undo(1))
    )
    ended = await end(pipeline)
    assert world.of(UNDONE) == ["y", "x", "inner", "a"]
    (child,) = ended.results.children["inner"]
    assert child.compensation is not None
    assert child.compensation.status is CompensationStatus.COMPENSATED
    assert isinstance(ended.error, StageExecutionError)
    assert ended.status is CompensationStatus.COMPENSATED


async def test_a_run_within_that_fails_and_is_tolerated_has_undone_itself_and_nothing_around_it(world: World) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo())
        .with_stage("inner", child_of(world, NO), after="a", on_failure="tolerate", compensate=world.undo())
    )
    ended = await end(pipeline)
    assert world.of(UNDONE) == ["y", "x"]
    assert (ended.results.status, ended.results.compensation) == (RunStatus.PARTIAL, None)


async def test_a_run_within_that_is_tried_again_is_undone_in_all_its_attempts(world: World) -> None:
    async def flaky(ctx: StageContext) -> None:
        world.note(DID, ctx)
        if world.of(DID).count("y") == 1:
            raise NO
        await trio.lowlevel.checkpoint()

    child = (
        Pipeline("child")
        .with_stage("x", world.does(), compensate=world.undo())
        .with_stage("y", flaky, after="x", compensate=world.undo())
    )
    pipeline = (
        Pipeline("p")
        .with_stage("inner", child, retry=Retry(attempts=2), compensate=world.undo())
        .with_stage("bad", raises(NO), after="inner")
    )
    ended = await end(pipeline)
    assert world.of(UNDONE) == ["y", "x", "y", "x", "inner"]
    assert ended.undos["inner"] == "undone"
    assert ended.status is CompensationStatus.COMPENSATED


async def test_what_a_run_within_could_not_undo_by_itself_is_tried_again_with_the_run_around(world: World) -> None:
    child = (
        Pipeline("child")
        .with_stage("x", world.does(), compensate=world.undo())
        .with_stage("y", world.does(then=NO), after="x", compensate=Compensation(world.undo(fails=1), retry=ONCE))
    )
    ended = await end(Pipeline("p").with_stage("inner", child))
    assert [(event.what, event.stage) for event in world.log if event.what != DID] == [
        (UNDOES, "y"),
        (WRONG, "y"),
        (UNDOES, "y"),
        (UNDONE, "y"),
        (UNDOES, "x"),
        (UNDONE, "x"),
    ]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_what_is_run_three_levels_deep_is_undone_from_within(world: World) -> None:
    pipeline = child_of(world)
    for depth in range(3):
        pipeline = (
            Pipeline(f"p{depth}")
            .with_stage(f"before {depth}", world.does(), compensate=world.undo())
            .with_stage(f"in {depth}", pipeline, after=f"before {depth}", compensate=world.undo())
        )
    ended = await end(pipeline.with_stage("bad", raises(NO), after="in 2"))
    names = ["y", "x", "in 0", "before 0", "in 1", "before 1", "in 2", "before 2"]
    assert world.of(UNDONE) == names
    within_1, within_0 = "in 2/0/", "in 2/0/in 1/0/"
    assert list(ended.undos) == [
        f"{within_0}in 0/0/y",
        f"{within_0}in 0/0/x",
        f"{within_0}in 0",
        f"{within_0}before 0",
        f"{within_1}in 1",
        f"{within_1}before 1",
        "in 2",
        "before 2",
    ]


# Maps


def booked(world: World, undo: Any = None, **options: Any) -> Any:
    @stage(name="book", compensate=world.undo(1) if undo is None else undo, **options)
    async def book(ctx: StageContext) -> StageOutput:
        world.note(DID, ctx)
        await trio.lowlevel.checkpoint()
        if isinstance(world.broken.get(f"item {ctx.data}"), Exception):
            raise NO
        return StageOutput.ok(item=ctx.data)

    return book


def mapped(world: World, runner: Any, **options: Any) -> Pipeline:
    return (
        Pipeline("p")
        .with_stage("a", world.does(), compensate=world.undo(1))
        .with_map("items", runner, over=lambda ctx: [0, 1, 2], after="a", **options)
        .with_stage("bad", raises(NO), after="items")
    )


async def test_the_items_of_a_map_are_undone_at_once_and_before_what_they_come_after(
    world: World, autojump_clock: MockClock
) -> None:
    ended = await end(mapped(world, booked(world), compensate=world.undo(1)))
    assert world.of(UNDONE)[-1] == "a"
    assert {event.key for event in world.log if event.what == DID} < {
        event.key for event in world.log if event.what == UNDOES
    }
    assert sorted(event.at for event in world.log if event.what == UNDOES) == [0, 0, 0, 1, 2]
    assert sorted(ended.undos) == ["a", "items", "items[0]", "items[1]", "items[2]"]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_the_undos_of_items_are_under_the_limit_as_well(world: World, autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p", undo_limit=2)
        .with_map("items", booked(world), over=lambda ctx: range(5))
        .with_stage("bad", raises(NO), after="items")
    )
    ended = await end(pipeline)
    assert sorted(event.at for event in world.log if event.what == UNDOES) == [0, 0, 1, 1, 2]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_an_item_whose_undo_fails_holds_the_map_and_not_the_other_items(world: World) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        world.note(UNDOES, ctx, output)
        if ctx.data == 1:
            raise OSError("no")

    ended = await end(mapped(world, booked(world, Compensation(undo, retry=ONCE)), compensate=world.undo()))
    assert ended.undos == {"items[0]": "undone", "items[1]": "failed", "items[2]": "undone"} | {
        "items": "held",
        "a": "held",
    }
    assert ended.status is CompensationStatus.FAILED


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_every_stage_of_every_item_that_is_a_pipeline_is_accounted_for(world: World, first: int) -> None:
    def undo(name: str) -> Compensation:
        async def call(ctx: StageContext, output: StageOutput | None) -> None:
            world.note(UNDOES, ctx, output)
            if (ctx.data, name) == (first, "y"):
                raise OSError("no")

        return Compensation(call, retry=ONCE)

    child = (
        Pipeline("child")
        .with_stage("x", world.does(), compensate=undo("x"))
        .with_stage("y", world.does(), after="x", compensate=undo("y"))
        .with_stage("z", world.does(), after="y", compensate=undo("z"))
    )
    ended = await end(mapped(world, child))
    expected = {f"items[{number}]/{name}": "undone" for number in range(3) for name in "xyz"}
    expected |= {f"items[{first}]/y": "failed", f"items[{first}]/x": "held", "a": "held"}
    assert ended.undos == expected
    assert ended.status is CompensationStatus.FAILED


async def test_what_all_attempts_of_a_map_have_done_is_accounted_for(world: World) -> None:
    attempts = 0

    def over(ctx: StageContext) -> list[int]:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            world.broken.clear()
        return [0, 1]

    called: list[int] = []

    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        world.note(UNDOES, ctx, output)
        called.append(ctx.data)
        if len(called) == 2:  # of the first that is undone with the run
            raise OSError("no")

    world.broken["item 1"] = NO
    pipeline = (
        Pipeline("p")
        .with_map("items", booked(world, Compensation(undo, retry=ONCE)), over=over, limit=1, retry=Retry(attempts=2))
        .with_stage("bad", raises(NO), after="items")
    )
    ended = await end(pipeline)
    assert called[0] == 1  # by itself
    assert sorted(called) == [0, 0, 1, 1]
    assert len(ended.undos) == 4
    assert sorted(ended.undos.values()) == ["failed", "undone", "undone", "undone"]
    assert ended.status is CompensationStatus.FAILED


async def test_what_items_run_within_themselves_is_accounted_for_by_item(world: World) -> None:
    child = Pipeline("child").with_stage("x", world.does(), compensate=world.undo())
    ended = await end(mapped(world, calls(child)))
    assert sorted(ended.undos) == ["a", "items[0]/0/x", "items[1]/0/x", "items[2]/0/x"]
    assert world.of(UNDONE) == ["x", "x", "x", "a"]


async def test_a_map_within_a_map_within_a_pipeline_is_undone(world: World) -> None:
    child = Pipeline("child").with_map("inner", booked(world), over=lambda ctx: [ctx.data * 10, ctx.data * 10 + 1])
    outer = Pipeline("outer").with_map("items", child, over=lambda ctx: [1, 2])
    pipeline = Pipeline("p").with_stage("s", outer).with_stage("bad", raises(NO), after="s")
    ended = await end(pipeline)
    assert sorted(ended.undos) == [f"s/0/items[{i}]/inner[{j}]" for i in (0, 1) for j in (0, 1)]
    assert len({event.key for event in world.log if event.what == UNDOES}) == 4
    assert ended.status is CompensationStatus.COMPENSATED


# Results outlive compensation


def facts(results: PipelineResults) -> dict[str, object]:
    """Everything that a run knows but for its compensation, with times since its beginning."""
    begun = results.trace.started

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - begun, 6)

    def of(record: StageRecord) -> dict[str, object]:
        found = attrs.asdict(record, recurse=False)
        found |= {"started": since(record.started), "ended": since(record.ended), "error": repr(record.error)}
        found["place"] = record.place if record.output is not None else None  # what ends at once, ends in any order
        found |= {"details": repr(record.details.items.keys()), "children": len(record.details.children)}
        return found

    return {
        "outputs": dict(results),
        "order": list(results),
        "partial": dict(results.partial),
        "status": results.status,
        "artifacts": results.artifacts,
        "records": {name: of(record) for name, record in results.records.items()},
        "children": {name: [facts(child) for child in each] for name, each in results.children.items()},
    }


async def test_results_and_partials_are_the_same_with_and_without_compensation(
    world: World, autojump_clock: MockClock
) -> None:
    def of(*, undone: bool) -> Pipeline:
        options: Any = {"compensate": world.undo(1)} if undone else {}
        child = Pipeline("child").with_stage("x", world.does(), **options)
        return (
            Pipeline("p")
            .with_stage("a", world.does(1), **options)
            .with_stage("b", world.does(2), after="a", **options)
            .with_stage("inner", child, after="a")
            .with_stage("slow", world.does(9), after="a", **options)
            .with_stage("bad", world.does(0.5, then=StageOutput.fail("no", half=1)), after="b", **options)
            .with_stage("never", world.does(), after="bad", **options)
        )

    without, undone = await end(of(undone=False)), await end(of(undone=True))
    assert without.results.compensation is None
    assert facts(without.results) == facts(undone.results)
    assert isinstance(without.error, StageExecutionError)
    assert isinstance(undone.error, StageExecutionError)
    assert str(without.error) == str(undone.error)
    assert without.error.args == undone.error.args
    assert undone.results.partial["slow"] == {"begun": "slow"}


async def test_results_with_a_compensation_pickle_and_so_does_the_error(
    world: World, autojump_clock: MockClock
) -> None:
    ended = await end(diamond(world, b=Compensation(world.undo(fails=9), retry=ONCE)))
    assert ended.error is not None
    for twin in (pickle.loads(pickle.dumps(ended.error)), copy.copy(ended.error)):
        record = twin.compensation
        assert isinstance(record, CompensationRecord)
        assert record.status is CompensationStatus.FAILED
        assert record.cause == ended.compensation.cause
        assert {name: undo.state.value for name, undo in record.undos.items()} == ended.undos
        assert str(record.undos["b"].error) == "cannot undo b"


# What it costs


def test_a_run_without_an_undo_does_not_even_load_what_undoes() -> None:
    code = (
        "import sys, trio\n"
        "from stageflow import *\n"
        "async def bad(ctx): raise ValueError\n"
        "async def good(ctx): pass\n"
        "async def undo(ctx, output): pass\n"
        "async def main():\n"
        "    try: await Pipeline('p').with_stage('a', good).with_stage('b', bad, after='a').run()\n"
        "    except StageExecutionError: pass\n"
        "trio.run(main)\n"
        "print([name for name in sys.modules if name in ('stageflow.engine.saga', 'stageflow.engine.undoing')])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "[]"


def test_a_run_that_needs_no_undo_takes_no_call_more() -> None:
    def of(**options: Any) -> Any:
        pipeline, before = Pipeline("counted"), list[str]()
        for number in range(200):
            pipeline = pipeline.with_stage(str(number), undoes_nothing, after=before, **options)
            before = [str(number)]
        return pipeline.build()

    without = count(of())
    assert count(of(compensate=undoes)).own <= without.own + 10  # once per run: whether there is anything to undo
    assert count(of(compensate=undoes)).tasks == without.tasks


# Any graph


@attrs.frozen
class Node:
    """A stage of a random graph.

    Attributes:
        after: Those it comes after, by number.
        does: How it ends.
        takes: How long that takes.
        undo: How long its undo takes; `None` if it has none.
        fails: How often that fails before it succeeds.
        attempts: How often it may be tried.
        best_effort: Whether that does not matter.
        when: When it is undone.
    """

    after: tuple[int, ...]
    does: str
    takes: int
    undo: int | None
    fails: int
    attempts: int
    best_effort: bool
    when: str


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Node], int, str]:
    endings = ["ok"] * 5 + ["fail", "cancel", "skip", "tolerate", "isolate", "pivot", "irrevocable"]
    nodes = [
        Node(
            after=tuple(sorted(draw(st.sets(st.sampled_from(range(number)), max_size=3)))) if number else (),
            does=draw(st.sampled_from(endings)),
            takes=draw(st.integers(0, 3)),
            undo=draw(st.none() | st.integers(0, 3)),
            fails=draw(st.sampled_from([0, 0, 0, 1, 2])),
            attempts=draw(st.integers(1, 2)),
            best_effort=draw(st.sampled_from([False, False, True])),
            when=draw(st.sampled_from(["attempted", "attempted", "succeeded"])),
        )
        for number in range(draw(st.integers(2, 7)))
    ]
    return nodes, draw(st.integers(1, 3)), draw(st.sampled_from(["settled", "all"]))


def built(world: World, nodes: list[Node], limit: int, join: str, *, undone: bool) -> Pipeline:
    pipeline = Pipeline("p", undo_limit=limit)
    for number, node in enumerate(nodes):
        then: Any = {"cancel": StageOutput.cancel("enough"), "skip": StageOutput.skip("no")}.get(node.does)
        options: Any = {"on_failure": node.does} if node.does in ("tolerate", "isolate") else {}
        if node.does == "irrevocable":
            options["irrevocable"] = undone
        elif undone and node.undo is not None:
            retry = Retry(attempts=node.attempts, delay=0.25)
            undo = world.undo(node.undo, fails=node.fails)
            options["compensate"] = Compensation(undo, retry=retry, best_effort=node.best_effort)
            options["compensate_when"] = node.when
        pipeline = pipeline.with_stage(
            f"s{number}",
            # No two stages end at the same time, so that there is only one way in which the run can go.
            world.does(
                node.takes + 2.0 ** -(number + 2), then=NO if node.does in ("fail", "tolerate", "isolate") else then
            ),
            after=[f"s{other}" for other in node.after],
            join=join if node.after else "all",
            pivot=undone and node.does == "pivot",
            **options,
        )
    return pipeline


def judge(nodes: list[Node], limit: int, results: PipelineResults, log: list[Event]) -> None:
    """Compares a run with what has to hold of it."""
    records = [results.records[f"s{number}"] for number in range(len(nodes))]
    entered = [record.attempts > 0 for record in records]
    ok = [record.state is StageState.SUCCEEDED for record in records]
    to_undo = results.status in (RunStatus.FAILED, RunStatus.CANCELLED)
    pivots = any(node.does == "pivot" and ok[number] for number, node in enumerate(nodes))
    has_undo = [node.undo is not None and node.does != "irrevocable" for node in nodes]
    of_interest = [entered[n] and (has_undo[n] or nodes[n].does == "irrevocable") for n in range(len(nodes))]
    if not to_undo or not any(of_interest) or pivots:
        assert not any(event.what == UNDOES for event in log)
        found = results.compensation
        if to_undo and pivots and any(entered[n] and has_undo[n] for n in range(len(nodes))):
            assert found is not None
            assert found.status is CompensationStatus.NOT_NEEDED
            assert {undo.state for undo in found.undos.values()} == {UndoState.NOT_NEEDED}
        else:
            assert found is None
        return
    expected: dict[str, UndoState] = {}
    stuck: set[int] = set()
    for number in reversed(range(len(nodes))):
        node = nodes[number]
        if not entered[number]:
            continue
        users = [other for other, each in enumerate(nodes) if number in each.after and entered[other]]
        skipped = records[number].state is StageState.SKIPPED
        if stuck.intersection(users):
            stuck.add(number)
            state = UndoState.HELD
        elif skipped or (has_undo[number] and node.when == "succeeded" and not ok[number]):
            state = UndoState.NOT_NEEDED
        elif node.does == "irrevocable":
            state = UndoState.IRREVOCABLE
        elif has_undo[number] and node.fails >= node.attempts:
            state = UndoState.FAILED
            if not node.best_effort:
                stuck.add(number)
        else:
            state = UndoState.UNDONE
        if of_interest[number]:
            expected[f"s{number}"] = state
    assert results.compensation is not None
    assert {name: undo.state for name, undo in results.compensation.undos.items()} == expected
    status = CompensationStatus.FAILED if stuck else CompensationStatus.COMPENSATED
    assert results.compensation.status is status

    begun: dict[str, list[float]] = {}
    over: dict[str, float] = {}
    running = most = 0
    for event in log:
        if event.what == UNDOES:
            number = int(event.stage[1:])
            begun.setdefault(event.stage, []).append(event.at)
            assert event.given == ({"by": event.stage} if ok[number] else None)
            assert len(begun[event.stage]) <= nodes[number].attempts
            # The law of order: whatever used its output, however far away, has been undone before.
            todo = [number]
            for at in todo:
                for other, node in enumerate(nodes):
                    if at in node.after and entered[other]:
                        todo.append(other)
                        assert expected.get(f"s{other}") not in (UndoState.FAILED, UndoState.HELD) or node.best_effort
                        if expected.get(f"s{other}") is UndoState.UNDONE:
                            assert f"s{other}" in over
            running += 1
            most = max(most, running)
        elif event.what in (UNDONE, WRONG):
            running -= 1
            over[event.stage] = event.at
    assert most <= limit
    called = {name for name, state in expected.items() if state in (UndoState.UNDONE, UndoState.FAILED)}
    assert set(begun) == called
    for name in called:
        node = nodes[int(name[1:])]
        assert len(begun[name]) == min(node.fails + 1, node.attempts)


@settings(deadline=None, max_examples=int(os.environ.get("STAGEFLOW_EXAMPLES", "250")))
@given(graphs())
def test_undos_keep_the_laws_of_order_and_of_holding_on_any_graph(drawn: tuple[list[Node], int, str]) -> None:
    nodes, limit, join = drawn

    async def main() -> None:
        world = World()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DefinitionWarning)
            undone = built(world, nodes, limit, join, undone=True).build()
            without = built(World(), nodes, limit, join, undone=False).build()
        found = (await end(undone)).results
        judge(nodes, limit, found, world.log)
        assert facts((await end(without)).results) == facts(found)

    trio.run(main, clock=MockClock(autojump_threshold=0))


# What is said of runs within, and of branches that are just cancelled


@pytest.mark.parametrize("what", ["item", "nested"])
async def test_an_undo_that_fails_within_a_run_that_is_tolerated_is_told_by_the_run_around(what: str) -> None:
    world = World()

    async def bad(ctx: StageContext) -> None:
        raise NO

    book = stage(name="book", compensate=Compensation(world.undo(fails=9), retry=Retry(attempts=1)))(bad)
    if what == "item":
        pipeline = Pipeline("p").with_map("items", book, over=lambda ctx: [1], tolerate=1)
    else:
        pipeline = Pipeline("p").with_stage("inner", Pipeline("child").with_stage(book), on_failure="tolerate")
    results = await pipeline.run()
    assert results.status is RunStatus.PARTIAL
    assert results.compensation is not None
    assert results.compensation.status is CompensationStatus.FAILED
    path = "items[0]" if what == "item" else "inner/0/book"
    assert results.compensation.of(UndoState.FAILED) == (path,)


@pytest.mark.parametrize("compensate", [False, True])
async def test_an_item_that_is_cancelled_is_undone_only_if_that_is_said(
    compensate: bool, autojump_clock: trio.testing.MockClock
) -> None:
    world = World()

    async def slow(ctx: StageContext) -> None:
        await trio.sleep(5)

    book = stage(name="book", compensate=world.undo())(slow)
    pipeline = Pipeline("p").with_map("items", book, over=lambda ctx: [1, 2])
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        run.cancel_branch("items[1]", "no", compensate=compensate)
    assert [event.what for event in world.log] == ([UNDOES, UNDONE] if compensate else [])
