"""Attempts: when a stage is tried again, how long it waits before, what is kept of each try; and guards."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.abc import Instrument

from stageflow import (
    CauseKind,
    ContractViolation,
    DefinitionError,
    Limit,
    Pipeline,
    Retry,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageTimeoutError,
    StagnationError,
    UnifiedPipelineCancelled,
    UnknownStageError,
    optional,
    run_stage,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    Witness,
    assert_whole,
    causes,
    gives,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from stageflow import PipelineResults, StageRecord
    from stageflow.stages import Body

FLAKY = OSError("line down")


def in_turn(*ends: object, each: float = 0) -> Body:
    """A stage that sleeps, and ends like this at its first attempt, like that at its second; the last one stays."""
    left = list(ends)

    async def body(ctx: StageContext) -> object:
        then = left.pop(0) if len(left) > 1 else left[0]
        await trio.sleep(each)
        if isinstance(then, BaseException):
            raise then.with_traceback(None)
        return then

    return body


def spans(results: PipelineResults, name: str = "s") -> list[tuple[int, float, float]]:
    """The number of each attempt, and when it began and ended, in seconds since the run began."""
    begun = results.trace.started
    return [
        (attempt.number, attempt.started - begun, (math.nan if attempt.ended is None else attempt.ended) - begun)
        for attempt in results.records[name].tries
    ]


def reasons(record: StageRecord) -> list[str | None]:
    """Why each attempt was not the last."""
    return [attempt.reason for attempt in record.tries]


# `Retry` as a value


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attempts": 0}, "whole number"),
        ({"attempts": 2.0}, "whole number"),
        ({"attempts": True}, "whole number"),
        ({"delay": -1}, "negative"),
        ({"delay": None}, "takes seconds"),
        ({"delay": math.inf}, "takes seconds"),
        ({"delay": math.nan}, "takes seconds"),
        ({"delay": "1"}, "takes seconds"),
        ({"max_delay": -1}, "negative"),
        ({"max_delay": None}, "takes seconds"),
        ({"factor": 0.5}, "at least 1"),
        ({"factor": math.inf}, "at least 1"),
        ({"factor": math.nan}, "at least 1"),
        ({"factor": True}, "at least 1"),
        ({"factor": "2"}, "at least 1"),
        ({"jitter": -0.1}, "between 0 and 1"),
        ({"jitter": 1.1}, "between 0 and 1"),
        ({"jitter": math.nan}, "between 0 and 1"),
        ({"on": BaseException}, "subclasses of Exception"),
        ({"on": (OSError, trio.Cancelled)}, "subclasses of Exception"),
        ({"on": OSError("x")}, "subclasses of Exception"),
        ({"on": [OSError]}, "subclasses of Exception"),
        ({"on": "OSError"}, "subclasses of Exception"),
    ],
)
def test_a_retry_is_checked_where_it_is_made(options: dict[str, Any], match: str) -> None:
    with pytest.raises(DefinitionError, match=match) as caught:
        Retry(**options)
    assert f"{next(iter(options))}=" in str(caught.value)


@pytest.mark.parametrize("value", [3, {"attempts": 3}, Retry])
def test_only_a_retry_is_taken_for_one(value: Any) -> None:
    with pytest.raises(DefinitionError, match="takes a Retry"):
        Pipeline("wrong").with_stage("s", gives(), retry=value)


def test_delays_grow_by_the_factor_up_to_the_longest() -> None:
    retry = Retry(delay=0.5, factor=3, max_delay=10)
    assert [retry.delay_after(attempt) for attempt in range(1, 6)] == [0.5, 1.5, 4.5, 10, 10]
    assert [Retry(delay=2, factor=1).delay_after(attempt) for attempt in (1, 2, 50)] == [2, 2, 2]
    assert Retry(delay=5, max_delay=3).delay_after(1) == 3
    assert {Retry(jitter=1).delay_after(attempt) for attempt in range(1, 50)} == {0}


@pytest.mark.parametrize("factor", [1, 1.5, 2, 10, 1e300])
def test_no_attempt_is_too_late_for_a_delay(factor: float) -> None:
    retry = Retry(attempts=10**9, delay=1e-300, factor=factor, max_delay=7)
    delays = [retry.delay_after(attempt) for attempt in (1, 2, 1000, 10**6, 10**9)]
    assert delays == sorted(delays)
    assert all(0 < delay <= 7 for delay in delays)


def test_jitter_shortens_a_delay_by_up_to_its_part() -> None:
    delays = [Retry(delay=4, jitter=0.25, max_delay=8).delay_after(2) for _ in range(2000)]
    assert all(6 <= delay <= 8 for delay in delays)
    assert min(delays) < 6.1
    assert max(delays) > 7.9
    assert all(0 <= Retry(delay=1, jitter=1).delay_after(1) <= 1 for _ in range(100))


def test_a_retry_matches_what_it_says() -> None:
    assert Retry().matches(ValueError())
    assert not Retry().matches(None)
    assert Retry(on=OSError).matches(ConnectionError())
    assert not Retry(on=(OSError, KeyError)).matches(ValueError())
    assert not Retry(on=()).matches(ValueError())


# What is tried again


async def test_a_stage_is_tried_until_it_succeeds_with_the_delays_between(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("again").with_stage(
        "s", in_turn(FLAKY, FLAKY, {"at": "last"}, each=1), retry=Retry(attempts=5, delay=2, factor=3)
    )
    results = await pipeline.with_stage("next", gives(), after="s").run()
    assert results["s"]["at"] == "last"
    assert spans(results) == [(1, 0, 1), (2, 3, 4), (3, 10, 11)]
    assert times(results) == {"s": (0, 11), "next": (11, 11)}
    record = results.records["s"]
    assert record.attempts == 3
    assert [attempt.error for attempt in record.tries] == [FLAKY, FLAKY, None]
    assert reasons(record) == ["OSError: line down", "OSError: line down", None]
    assert record.tries[-1].output is results["s"]
    assert (record.error, record.cause, results.status) == (None, None, RunStatus.SUCCEEDED)


async def test_a_stage_that_fails_every_time_fails_with_its_last_error(autojump_clock: MockClock) -> None:
    errors = [OSError(str(number)) for number in range(3)]
    with pytest.raises(StageExecutionError, match="OSError: 2") as caught:
        await Pipeline("never").with_stage("s", in_turn(*errors), retry=Retry(attempts=3)).run()
    record = caught.value.results.records["s"]
    assert caught.value.original is record.error is errors[2]
    assert [attempt.error for attempt in record.tries] == errors
    assert [attempt.number for attempt in record.tries] == [1, 2, 3]
    assert caught.value.failures == (record,)
    assert_whole(caught.value.results)


@pytest.mark.parametrize(
    ("then", "attempts"),
    [
        (OSError("x"), 3),
        (ConnectionError("x"), 3),
        (ValueError("x"), 1),
        (ExceptionGroup("x", [OSError("x")]), 1),
        (StageOutput.fail("x", recoverable=True), 3),
        (StageOutput.fail(ValueError("x"), recoverable=True), 3),
        (StageOutput.fail("x"), 1),
        (StageOutput.retry("x"), 3),
        (StageOutput.skip("x"), 1),
        (StageOutput.cancel("x"), 1),
        (StageOutput.cancel_branch("x"), 1),
        (StageOutput.ok(), 1),
        (None, 1),
        (42, 1),  # a `ContractViolation`, which does not match
    ],
)
async def test_what_is_tried_again_and_what_is_not(then: object, attempts: int) -> None:
    witness = Witness()
    results = await results_of(
        Pipeline("kinds").with_stage("s", witness.of(in_turn(then)), retry=Retry(attempts=3, on=OSError))
    )
    assert witness.entered == ["s"] * attempts
    assert results.records["s"].attempts == attempts == len(results.records["s"].tries)


async def test_what_no_stage_may_return_is_tried_again_like_any_exception_that_matches() -> None:
    results = await Pipeline("contract").with_stage("s", in_turn(42, {"x": 1}), retry=Retry()).run()
    assert results["s"]["x"] == 1
    first, _ = results.records["s"].tries
    assert isinstance(first.error, ContractViolation)


async def test_what_is_to_end_the_program_is_not_tried_again() -> None:
    witness = Witness()
    with pytest.raises(KeyboardInterrupt):
        await Pipeline("ki").with_stage("s", witness.of(raises(KeyboardInterrupt())), retry=Retry()).run()
    assert witness.entered == ["s"]


async def test_asking_for_another_try_is_told_to_that_try_and_fails_after_the_last(autojump_clock: MockClock) -> None:
    told: list[tuple[int, str | None]] = []

    async def asks(ctx: StageContext) -> StageOutput:
        told.append((ctx.attempt, ctx.feedback))
        return StageOutput.retry(f"not yet, {ctx.attempt}")

    with pytest.raises(StageExecutionError, match="not yet, 3; given up after 3 attempts") as caught:
        await Pipeline("asks").with_stage("s", asks, retry=Retry(attempts=3, delay=1, factor=1)).run()
    assert told == [(1, None), (2, "not yet, 1"), (3, "not yet, 2")]
    assert spans(caught.value.results) == [(1, 0, 0), (2, 1, 1), (3, 2, 2)]
    assert states(caught.value.results) == {"s": FAILED}


@pytest.mark.parametrize("options", [{}, {"uses": "gpu"}, {"heartbeat": 5}, {"retry": Retry(attempts=1)}])
async def test_asking_for_another_try_without_being_allowed_one_is_a_failure(options: dict[str, Any]) -> None:
    pipeline = Pipeline("asks", limits={"gpu": 1}).with_stage("s", returns(StageOutput.retry("not yet")), **options)
    with pytest.raises(StageExecutionError, match="not yet") as caught:
        await pipeline.run()
    assert caught.value.results.records["s"].attempts == 1
    assert_whole(caught.value.results)


async def test_an_attempt_that_ran_out_of_time_is_followed_by_another_whatever_the_retry_is_for(
    autojump_clock: MockClock,
) -> None:
    async def slow_at_first(ctx: StageContext) -> None:
        await trio.sleep(9 if ctx.attempt < 3 else 1)

    retry = Retry(attempts=3, delay=1, factor=1, on=())
    results = await Pipeline("slow").with_stage("s", slow_at_first, timeout=2, retry=retry).run()
    assert spans(results) == [(1, 0, 2), (2, 3, 5), (3, 6, 7)]
    record = results.records["s"]
    assert all(isinstance(attempt.error, TimeoutError) for attempt in record.tries[:2])
    assert reasons(record) == ["ran longer than its limit of 2 s"] * 2 + [None]
    assert (record.limit, record.error) == (None, None)
    with pytest.raises(StageTimeoutError) as caught:
        await Pipeline("slow").with_stage("s", sleeps(9), timeout=2, retry=retry).run()
    assert (caught.value.limit, caught.value.elapsed) == (2, 2)


async def test_a_failure_after_an_attempt_that_ran_out_of_time_is_no_timeout(autojump_clock: MockClock) -> None:
    async def slow_then_broken(ctx: StageContext) -> None:
        await trio.sleep(9 if ctx.attempt == 1 else 0)
        raise FLAKY.with_traceback(None)

    with pytest.raises(StageExecutionError) as caught:
        await Pipeline("mixed").with_stage("s", slow_then_broken, timeout=2, retry=Retry(attempts=2)).run()
    assert type(caught.value) is StageExecutionError
    assert causes(caught.value.results) == {"s": (CauseKind.FAILURE, "s")}
    assert caught.value.results.records["s"].limit is None


async def test_the_limit_on_all_attempts_counts_delays_too(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("total").with_stage(
        "s", in_turn(FLAKY, each=1), retry=Retry(attempts=99, delay=2, factor=1), total_timeout=7.5
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    error = caught.value
    assert (error.limit, error.elapsed, error.source.partition(" ")[0]) == (7.5, 7.5, "total_timeout=")
    assert "ran longer than its total limit of 7.5 s" in str(error)
    assert spans(error.results)[:3] == [(1, 0, 1), (2, 3, 4), (3, 6, 7)]
    assert_whole(error.results)


@pytest.mark.parametrize("by", ["caller", "total", "look"])
async def test_each_attempt_is_recorded_once_also_when_the_stage_ends_in_a_delay(
    autojump_clock: MockClock, by: str
) -> None:
    options: dict[str, Any] = {"total_timeout": 3} if by == "total" else {}
    run: Run | None = None
    graph = Pipeline("delay").with_stage("s", in_turn(FLAKY, each=1), retry=Retry(delay=5), **options).build()
    with trio.move_on_after(3 if by == "caller" else math.inf):  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with graph.open() as run:
                await trio.sleep(2)
                if by == "look":
                    assert spans(run.results) == [(1, 0, 1)]
        except StageExecutionError:
            pass
    assert run is not None
    record = run.results.records["s"]
    assert [attempt.number for attempt in record.tries] == list(range(1, record.attempts + 1))
    assert record.tries[0].error is FLAKY


async def test_attempts_count_how_often_the_body_was_entered(autojump_clock: MockClock) -> None:
    """Also if the stage ends while it waits for a limit on its way to the second."""
    limit = Limit(1)

    async def flaky(ctx: StageContext) -> None:
        raise FLAKY.with_traceback(None)

    async def hogs(ctx: StageContext) -> None:
        await trio.sleep(0.5)
        await limit.take()
        await trio.sleep(9)
        limit.give_back()

    pipeline = (
        Pipeline("waits", limits={"gpu": limit}, on_failure="isolate")
        .with_stage("s", flaky, retry=Retry(delay=1), uses="gpu", total_timeout=3)
        .with_stage("hog", hogs)
    )
    results = await results_of(pipeline)
    assert results.records["s"].attempts == 1
    assert times(results)["s"] == (0, 3)


# What an attempt sees


async def test_each_attempt_knows_its_number_and_its_own_clock(autojump_clock: MockClock) -> None:
    seen: list[tuple[int, float, float, float]] = []

    async def looks(ctx: StageContext) -> None:
        timer = ctx.timer
        seen.append((ctx.attempt, timer.elapsed, timer.stage_elapsed, timer.remaining))
        await trio.sleep(2)
        assert ctx.timer.stage_elapsed == 2
        raise FLAKY.with_traceback(None)

    pipeline = (
        Pipeline("clock")
        .with_stage("a", sleeps(1))
        .with_stage("s", looks, after="a", timeout=5, retry=Retry(attempts=3, delay=1, factor=1))
    )
    await results_of(pipeline)
    assert seen == [(1, 1, 0, 5), (2, 4, 0, 5), (3, 7, 0, 5)]


async def test_every_attempt_has_the_same_idempotency_key_and_inputs() -> None:
    keys: list[str] = []

    async def keeps(ctx: StageContext) -> None:
        assert ctx.inputs["a"]["by"] == "a"
        keys.append(ctx.idempotency_key)
        raise FLAKY.with_traceback(None)

    await results_of(Pipeline("key").with_stage("a", gives()).with_stage("s", keeps, after="a", retry=Retry()))
    assert len(keys) == 3
    assert len(set(keys)) == 1


async def test_what_an_attempt_has_saved_is_kept_over_the_others() -> None:
    async def saves(ctx: StageContext) -> StageOutput:
        ctx.save_partial(**{f"try{ctx.attempt}": True, "last": ctx.attempt})
        return StageOutput.fail("not enough", recoverable=True, fields=ctx.attempt)

    results = await results_of(Pipeline("partial").with_stage("s", saves, retry=Retry(attempts=2)))
    assert results.partial == {"s": {"try1": True, "try2": True, "last": 2, "fields": 2}}


async def test_a_condition_is_asked_once_and_not_at_each_attempt() -> None:
    asked: list[int] = []

    def when(ctx: StageContext) -> bool:
        asked.append(ctx.attempt)
        return True

    results = await results_of(Pipeline("when").with_stage("s", raises(FLAKY), when=when, retry=Retry()))
    assert asked == [0]
    assert results.records["s"].attempts == 3


async def test_a_stage_alone_is_tried_again_as_in_a_graph(autojump_clock: MockClock) -> None:
    begun = trio.current_time()
    output = await run_stage(in_turn(FLAKY, {"x": 1}), retry=Retry(delay=3))
    assert (output["x"], trio.current_time() - begun) == (1, 3)


# What its failure means, after the last attempt


@pytest.mark.parametrize("policy", ["fail_fast", "drain", "isolate", "tolerate"])
async def test_a_failure_means_something_to_others_only_after_the_last_attempt(
    autojump_clock: MockClock, policy: str
) -> None:
    witness = Witness()
    pipeline = (
        Pipeline("policy")
        .with_stage("root", gives())
        .with_stage("s", in_turn(FLAKY, each=1), after="root", retry=Retry(delay=1, factor=1), on_failure=policy)
        .with_stage("slow", sleeps(5.5), after="root")
        .with_stage("later", witness.of(gives()), after="slow")
        .with_stage("join", sees(), after=["s", "later"], join="settled")
    )
    results = await results_of(pipeline)
    assert spans(results) == [(1, 0, 1), (2, 2, 3), (3, 4, 5)]
    assert states(results) == {
        "root": OK,
        "s": FAILED,
        "slow": CANCELLED if policy == "fail_fast" else OK,
        "later": OK if policy in {"isolate", "tolerate"} else SKIPPED,
        "join": OK if policy in {"isolate", "tolerate"} else SKIPPED,
    }
    assert results.status is (RunStatus.PARTIAL if policy == "tolerate" else RunStatus.FAILED)
    assert_whole(results)


# Cancellation


@attrs.define(eq=False)
class Canceller(Instrument):
    """Cancels a scope before the step so and so that any task takes in it."""

    scope: trio.CancelScope
    at: int
    steps: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.scope.cancel()


async def cancelled_at(pipeline: Pipeline, step: int) -> tuple[PipelineResults, bool]:
    """The results of a run that is cancelled by its caller at a step; and whether it had got that far."""
    run: Run | None = None
    with trio.CancelScope() as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
        canceller = Canceller(scope, step)
        trio.lowlevel.add_instrument(canceller)
        try:
            async with pipeline.build().open() as run:
                pass
        except StageExecutionError:
            pass
        finally:
            trio.lowlevel.remove_instrument(canceller)
    assert run is not None
    return run.results, scope.cancelled_caught


async def test_wherever_a_stage_that_is_tried_is_cancelled_it_ends_once_and_is_not_tried_again(
    autojump_clock: MockClock,
) -> None:
    """Before an attempt, in it, in the delay after it, in the wait for a limit, and in its cleanup."""
    entered: list[int] = []
    left: list[int] = []

    async def body(ctx: StageContext) -> None:
        entered.append(ctx.attempt)
        ctx.on_exit(left.append, ctx.attempt)
        ctx.on_exit(trio.lowlevel.checkpoint)
        await trio.sleep(1)
        raise FLAKY.with_traceback(None)

    ends: set[Any] = set()
    for step in itertools.count(1):
        entered.clear()
        left.clear()
        limit = Limit(1)
        await limit.take()

        async def frees(ctx: StageContext, limit: Limit = limit) -> None:
            await trio.sleep(0.5)
            limit.give_back()

        pipeline = (
            Pipeline("cancelled", limits={"gpu": limit})
            .with_stage("a", frees)
            .with_stage("s", body, retry=Retry(attempts=3, delay=1), uses="gpu", total_timeout=60)
        )
        results, caught = await cancelled_at(pipeline, step)
        record = results.records["s"]
        assert all(each.state.settled for each in results.records.values())
        assert left == entered == list(range(1, record.attempts + 1))
        assert limit.waiting == 0
        ends.add((record.state, record.attempts))
        if record.state is CANCELLED:
            assert record.cause is not None
            assert record.cause.kind is CauseKind.CALLER
        else:
            assert (record.state, record.attempts) in {(SKIPPED, 0), (FAILED, 3)}
        if record.state is FAILED and not caught:
            break
    assert ends == {(SKIPPED, 0), (CANCELLED, 1), (CANCELLED, 2), (CANCELLED, 3), (FAILED, 3)}


@pytest.mark.parametrize(("at", "attempts"), [(0.5, 1), (1.5, 1), (3, 2)])
@pytest.mark.parametrize("by", ["caller", "cancel", "cancel_branch", "failure", "deadline"])
async def test_whatever_cancels_a_stage_it_is_not_tried_again(
    autojump_clock: MockClock, by: str, at: float, attempts: int
) -> None:
    witness = Witness()

    async def strikes(ctx: StageContext) -> StageOutput:
        await trio.sleep(at)
        if by == "failure":
            raise ValueError("bad")
        return StageOutput.ok()

    pipeline = Pipeline("strike", deadline=at if by == "deadline" else None)
    pipeline = pipeline.with_stage("s", witness.of(in_turn(FLAKY, each=1)), retry=Retry(delay=1, factor=1))
    pipeline = pipeline.with_stage("other", strikes)
    kept: Run | None = None
    with trio.move_on_after(at if by == "caller" else math.inf):  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open() as kept:
                await trio.sleep(at)
                if by == "cancel":
                    kept.cancel("enough")
                elif by == "cancel_branch":
                    kept.cancel_branch("s", "enough")
        except (StageExecutionError, UnifiedPipelineCancelled):
            pass
    assert kept is not None
    assert witness.entered == ["s"] * attempts
    assert states(kept.results)["s"] is CANCELLED
    assert times(kept.results)["s"] == (0, at)
    assert kept.results.records["s"].attempts == attempts
    assert kept.results.records["s"].error is None


async def test_a_result_beats_the_limit_of_its_attempt_and_of_all(autojump_clock: MockClock) -> None:
    async def shields(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return {"in": "time"}

    for option in ("timeout", "total_timeout", "heartbeat"):
        options: dict[str, Any] = {option: 1}
        results = await Pipeline("shield").with_stage("s", shields, retry=Retry(), **options).run()
        assert results["s"]["in"] == "time"
        assert results.records["s"].attempts == 1
        assert results.records["s"].after_cancel


# Guards


def writer(*drafts: object, each: float = 0, told: list[str | None] | None = None) -> Body:
    """A stage that gives one draft after the other, and notes what it is told; the last draft stays."""
    left = list(drafts)

    async def write(ctx: StageContext) -> object:
        if told is not None:
            told.append(ctx.feedback)
        await trio.sleep(each)
        draft = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(draft, Exception):
            raise draft
        return draft if isinstance(draft, StageOutput) else StageOutput.ok(text=draft)

    return write


def critic(good: str, of: str = "draft", see: str | None = None) -> Body:
    """A guard that sends back whatever is not good."""

    async def judge(ctx: StageContext) -> StageOutput:
        text = ctx.inputs[see or of]["text"]
        return StageOutput.ok(text=text) if text == good else StageOutput.retry(f"{text!r} is bad", stage=of)

    return judge


def guarded(write: Body, judge: Body, *, attempts: int = 3, **options: Any) -> Pipeline:
    """draft → guard; both → publish"""
    return (
        Pipeline("guarded")
        .with_stage("draft", write)
        .with_stage("guard", judge, kind="guard", after="draft", retry=Retry(attempts=attempts), **options)
        .with_stage("publish", publishes, after=["draft", "guard"])
    )


async def publishes(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(published=ctx.inputs["draft"]["text"])


async def test_a_draft_is_sent_back_until_it_is_accepted_and_others_see_only_that_one(
    autojump_clock: MockClock,
) -> None:
    told: list[str | None] = []
    witness = Witness()
    pipeline = (
        Pipeline("guarded")
        .with_stage("draft", witness.of(writer("bad", "worse", "good", each=1, told=told)))
        .with_stage("guard", witness.of(critic("good")), kind="guard", after="draft", retry=Retry(attempts=3))
        .with_stage("publish", witness.of(publishes), after=["draft", "guard"])
    )
    results = await pipeline.run()
    assert witness.entered == ["draft", "guard"] * 3 + ["publish"]
    assert told == [None, "'bad' is bad", "'worse' is bad"]
    assert results["publish"]["published"] == results["draft"]["text"] == results["guard"]["text"] == "good"
    assert spans(results, "draft") == [(1, 0, 1), (2, 1, 2), (3, 2, 3)]
    assert spans(results, "guard") == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    drafts = results.records["draft"].tries
    assert [attempt.output and attempt.output["text"] for attempt in drafts] == ["bad", "worse", "good"]
    assert reasons(results.records["draft"]) == ["'bad' is bad", "'worse' is bad", None]
    assert reasons(results.records["guard"]) == ["'bad' is bad", "'worse' is bad", None]
    assert times(results) == {"draft": (0, 3), "guard": (1, 3), "publish": (3, 3)}
    assert results.status is RunStatus.SUCCEEDED


async def test_a_guard_on_the_strand_of_its_draft_sends_it_back(autojump_clock: MockClock) -> None:
    results = await (
        Pipeline("strand")
        .with_stage("before", gives())
        .with_stage("draft", writer("bad", "good", each=1), after="before")
        .with_stage("guard", critic("good"), after="draft", retry=Retry())
        .with_stage("after", gives(), after="guard")
        .run()
    )
    assert results["guard"]["text"] == "good"
    assert times(results)["after"] == (2, 2)
    assert results.records["before"].attempts == 1


async def test_what_is_between_draft_and_guard_runs_again_too(autojump_clock: MockClock) -> None:
    witness = Witness()

    async def shout(ctx: StageContext) -> StageOutput:
        assert ctx.feedback is None
        await trio.sleep(1)
        return StageOutput.ok(text=ctx.inputs["draft"]["text"].upper())

    results = await (
        Pipeline("between")
        .with_stage("draft", witness.of(writer("bad", "good", each=1)))
        .with_stage("shout", witness.of(shout), after="draft")
        .with_stage("guard", witness.of(critic("GOOD", see="shout")), after="shout", retry=Retry())
        .with_stage("publish", witness.of(sees()), after=["draft", "shout", "guard"])
        .run()
    )
    # `critic` sends back the stage whose text it sees only if that is the one it names
    assert witness.entered == ["draft", "shout", "guard", "draft", "shout", "guard", "publish"]
    assert results["shout"]["text"] == "GOOD"
    assert [record.attempts for record in results.records.values()] == [2, 2, 2, 1]
    assert times(results)["publish"] == (4, 4)


async def test_a_guard_may_send_back_just_the_last_of_a_line(autojump_clock: MockClock) -> None:
    witness = Witness()
    await (
        Pipeline("last")
        .with_stage("plan", witness.of(gives()))
        .with_stage("draft", witness.of(writer("bad", "good")), after="plan")
        .with_stage("guard", witness.of(critic("good")), after="draft", retry=Retry())
        .run()
    )
    assert witness.entered == ["plan", "draft", "guard", "draft", "guard"]


async def test_a_guard_that_always_rejects_gives_up_after_its_attempts(autojump_clock: MockClock) -> None:
    witness = Witness()
    drafts = map(str, itertools.count())

    async def write(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(text=next(drafts))

    with pytest.raises(StageExecutionError, match="'3' is bad; given up after 4 attempts") as caught:
        await guarded(witness.of(write), witness.of(critic("good")), attempts=4).run()
    assert witness.entered == ["draft", "guard"] * 4
    results = caught.value.results
    assert caught.value.stage == "guard"
    assert states(results) == {"draft": OK, "guard": FAILED, "publish": SKIPPED}
    assert results["draft"]["text"] == "3"
    assert [record.attempts for record in results.records.values()] == [4, 4, 0]


async def test_a_draft_that_does_not_change_is_stagnation(autojump_clock: MockClock) -> None:
    witness = Witness()
    with pytest.raises(StageExecutionError, match="did not change") as caught:
        await guarded(witness.of(writer("bad", "worse", "worse")), witness.of(critic("good")), attempts=9).run()
    original = caught.value.original
    assert isinstance(original, StagnationError)
    assert (original.stage, original.guard) == ("draft", "guard")
    assert witness.entered == ["draft", "guard", "draft", "guard", "draft"]
    assert states(caught.value.results) == {"draft": OK, "guard": FAILED, "publish": SKIPPED}


async def test_a_guard_without_a_retry_cannot_send_back() -> None:
    witness = Witness()
    pipeline = (
        Pipeline("no retry")
        .with_stage("draft", witness.of(writer("bad", "good")))
        .with_stage("guard", witness.of(critic("good")), after="draft")
    )
    with pytest.raises(StageExecutionError, match="no retry= that allows it"):
        await pipeline.run()
    assert witness.entered == ["draft", "guard"]


@pytest.mark.parametrize("bad", [ValueError("no ink"), StageOutput.fail("no ink"), StageOutput.retry("no ink")])
async def test_a_draft_that_fails_when_sent_back_fails_its_guard_with_it(
    autojump_clock: MockClock, bad: object
) -> None:
    with pytest.raises(StageExecutionError, match=r"stage 'draft' .*no ink") as caught:
        await guarded(writer("bad", bad, "good"), critic("good")).run()
    results = caught.value.results
    cause = results.records["guard"].cause
    assert cause is not None
    assert re.search(r"'draft', sent back by 'guard'.*no ink", cause.reason)
    assert states(results) == {"draft": FAILED, "guard": FAILED, "publish": SKIPPED}
    assert "draft" not in results
    assert [record.name for record in caught.value.failures] == ["draft", "guard"]
    assert results.records["draft"].error is caught.value.original


async def test_a_draft_that_runs_out_of_time_when_sent_back_is_a_timeout(autojump_clock: MockClock) -> None:
    async def slow_the_second_time(ctx: StageContext) -> StageOutput:
        await trio.sleep(0 if ctx.attempt == 1 else 60)
        return StageOutput.ok(text="bad")

    pipeline = (
        Pipeline("slow")
        .with_stage("draft", slow_the_second_time, timeout=2)
        .with_stage("guard", critic("good"), after="draft", retry=Retry())
    )
    results = await results_of(pipeline)
    assert causes(results)["draft"] == (CauseKind.TIMEOUT, "draft")
    assert results.records["draft"].limit == 2
    assert times(results)["draft"] == (0, 2)
    assert states(results) == {"draft": FAILED, "guard": FAILED}


async def test_a_draft_that_is_sent_back_is_tried_again_by_its_own_retry_with_the_feedback(
    autojump_clock: MockClock,
) -> None:
    told: list[str | None] = []
    pipeline = (
        Pipeline("both")
        .with_stage("draft", writer("bad", FLAKY, "good", told=told), retry=Retry(delay=1, attempts=2))
        .with_stage("guard", critic("good"), after="draft", retry=Retry())
    )
    results = await pipeline.run()
    assert told == [None, "'bad' is bad", "'bad' is bad"]
    assert spans(results, "draft") == [(1, 0, 0), (2, 0, 0), (3, 1, 1)]


@pytest.mark.parametrize("by", ["cancel", "cancel_branch"])
async def test_what_a_draft_says_of_the_run_when_sent_back_is_heard(autojump_clock: MockClock, by: str) -> None:
    says = StageOutput.cancel("give up") if by == "cancel" else StageOutput.cancel_branch("give up")
    results = await results_of(guarded(writer("bad", says), critic("good")).with_stage("other", sleeps(5)))
    assert states(results)["draft"] is CANCELLED
    assert states(results)["guard"] is CANCELLED
    assert states(results)["publish"] is SKIPPED
    assert states(results)["other"] is (CANCELLED if by == "cancel" else OK)
    assert results.status is (RunStatus.CANCELLED if by == "cancel" else RunStatus.PARTIAL)


@pytest.mark.parametrize("by", ["caller", "cancel", "deadline", "total"])
async def test_what_is_cancelled_while_it_is_sent_back_has_the_cause_of_that(
    autojump_clock: MockClock, by: str
) -> None:
    async def slow(ctx: StageContext) -> StageOutput:
        await trio.sleep(1 if ctx.attempt == 1 else 60)
        return StageOutput.ok(text="bad")

    pipeline = (
        Pipeline("cancelled", deadline=3 if by == "deadline" else None)
        .with_stage("draft", slow, timeout=None)
        .with_stage("guard", critic("good"), after="draft", retry=Retry(), total_timeout=2 if by == "total" else None)
        .with_stage("publish", gives(), after=["draft", "guard"])
    )
    run: Run | None = None
    with trio.move_on_after(3 if by == "caller" else math.inf) as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open() as run:
                await trio.sleep(3)
                if by == "cancel":
                    run.cancel("enough")
        except (StageExecutionError, UnifiedPipelineCancelled):
            pass
    assert run is not None
    assert scope.cancelled_caught == (by == "caller")
    results = run.results
    cause = {
        "caller": (CauseKind.CALLER, None),
        "cancel": (CauseKind.CANCEL, None),
        "deadline": (CauseKind.DEADLINE, None),
        "total": (CauseKind.TIMEOUT, "guard"),
    }[by]
    assert causes(results) == dict.fromkeys(["draft", "guard", "publish"], cause)
    assert states(results)["draft"] is CANCELLED
    assert states(results)["guard"] is (FAILED if by == "total" else CANCELLED)
    assert times(results)["draft"] == (0, 3)
    assert "draft" not in results
    first, second = results.records["draft"].tries
    assert (first.output and first.output["text"], second.output) == ("bad", None)


async def test_what_is_to_end_the_program_gets_through_from_a_draft_that_is_sent_back() -> None:
    async def interrupted(ctx: StageContext) -> StageOutput:
        if ctx.attempt > 1:
            raise KeyboardInterrupt
        return StageOutput.ok(text="bad")

    run: Run | None = None
    with pytest.raises(KeyboardInterrupt):
        async with guarded(interrupted, critic("good")).build().open() as run:
            pass
    assert run is not None
    assert states(run.results) == {"draft": FAILED, "guard": FAILED, "publish": SKIPPED}
    assert causes(run.results) == dict.fromkeys(["draft", "guard", "publish"], (CauseKind.FAILURE, "draft"))


async def test_the_places_of_the_stages_are_counted_from_zero_though_a_draft_was_sent_back() -> None:
    results = await guarded(writer("bad", "good"), critic("good")).run()
    assert [record.place for record in results.records.values()] == [0, 1, 2]


async def test_a_draft_cannot_be_sent_back_when_somebody_has_begun_with_it(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("begun")
        .with_stage("draft", writer("bad", "good", each=1))
        .with_stage("guard", critic("good"), after="draft", retry=Retry())
        .with_stage("eager", sleeps(5), after="draft")
    )
    with pytest.raises(StageExecutionError, match="cannot send back 'draft': 'eager' has begun") as caught:
        await pipeline.run()
    assert isinstance(caught.value.original, DefinitionError)
    assert "come after 'guard' as well" in str(caught.value)
    assert caught.value.results["draft"]["text"] == "bad"


async def test_who_begins_in_the_same_tick_as_the_guard_always_has_begun() -> None:
    """In which order Trio runs the two is left to chance."""

    async def slow(ctx: StageContext) -> StageOutput:
        await trio.lowlevel.checkpoint()
        return StageOutput.ok(text=str(ctx.attempt))

    async def reads(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(read=ctx.inputs["draft"]["text"])

    graph = (
        Pipeline("chance", on_failure="isolate")
        .with_stage("draft", slow)
        .with_stage("guard", critic("2"), after="draft", retry=Retry())
        .with_stage("eager", reads, after="draft")
        .build()
    )
    for _ in range(50):
        results = await results_of(graph)
        assert states(results) == {"draft": OK, "guard": FAILED, "eager": OK}
        assert results["eager"]["read"] == results["draft"]["text"] == "1"


@pytest.mark.parametrize(
    ("of", "error", "match"),
    [
        ("drafd", UnknownStageError, "did you mean 'draft'"),
        ("beside", DefinitionError, "does not come after that stage"),
        ("later", DefinitionError, "does not come after that stage"),
    ],
)
async def test_a_guard_can_send_back_only_what_it_comes_after(of: str, error: type[Exception], match: str) -> None:
    pipeline = (
        Pipeline("wrong")
        .with_stage("draft", writer("bad"))
        .with_stage("guard", returns(StageOutput.retry("bad", stage=of)), after="draft", retry=Retry())
        .with_stage("later", gives(), after="guard")
        .with_stage("beside", gives())
    )
    with pytest.raises(StageExecutionError, match=match) as caught:
        await pipeline.run()
    assert isinstance(caught.value.original, error)
    assert caught.value.stage == "guard"


async def test_a_guard_that_sends_back_itself_is_just_tried_again() -> None:
    results = await (
        Pipeline("self")
        .with_stage("s", in_turn(StageOutput.retry("again", stage="s"), {"x": 1}), retry=Retry(attempts=2))
        .run()
    )
    assert results.records["s"].attempts == 2


@pytest.mark.parametrize("join", ["all", "any_settled"])
async def test_who_needs_a_draft_is_skipped_if_that_fails_when_sent_back(autojump_clock: MockClock, join: str) -> None:
    witness = Witness()
    after: Sequence[Any] = ["draft", optional("guard") if join == "all" else "guard"]
    pipeline = (
        Pipeline("optional")
        .with_stage("draft", writer("bad", ValueError("no ink")))
        .with_stage("guard", critic("good"), after="draft", retry=Retry(), on_failure="tolerate")
        .with_stage("publish", witness.of(sees()), after=after, join=join)
    )
    results = await results_of(pipeline)
    assert witness.entered == []
    assert states(results)["publish"] is SKIPPED


async def test_a_draft_gets_its_cleanup_at_each_of_its_attempts(autojump_clock: MockClock) -> None:
    left: list[str] = []

    async def write(ctx: StageContext) -> StageOutput:
        ctx.on_exit(left.append, f"draft {ctx.attempt}")
        return StageOutput.ok(text=str(ctx.attempt))

    async def judge(ctx: StageContext) -> StageOutput:
        ctx.on_exit(left.append, f"guard {ctx.attempt}")
        text = ctx.inputs["draft"]["text"]
        return StageOutput.ok() if text == "3" else StageOutput.retry("bad", stage="draft")

    await guarded(write, judge).run()
    assert left == ["draft 1", "guard 1", "draft 2", "guard 2", "draft 3", "guard 3"]


async def test_what_is_between_a_guard_and_a_draft_runs_again_whatever_branch_it_is_in() -> None:
    styled: list[str] = []

    async def style(ctx: StageContext) -> dict[str, object]:
        styled.append(ctx.inputs["draft"]["text"])
        return {"text": ctx.inputs["draft"]["text"].upper()}

    async def check(ctx: StageContext) -> StageOutput:
        good = ctx.inputs["style"]["text"] == "GOOD"
        return StageOutput.ok(text=ctx.inputs["draft"]["text"]) if good else StageOutput.retry("bad", stage="draft")

    pipeline = (
        Pipeline("p")
        .with_stage("draft", writer("bad", "good"))
        .with_stage("style", style, after="draft")
        .with_stage("guard", check, after=["draft", "style"], retry=Retry(attempts=2))
    )
    results = await results_of(pipeline)
    assert styled == ["bad", "good"]
    assert results["guard"]["text"] == "good"
    assert [results.records[name].attempts for name in ("draft", "style", "guard")] == [2, 2, 2]


async def test_a_failure_that_a_stage_returns_is_tried_again_only_if_it_calls_it_recoverable() -> None:
    for recoverable, attempts in ((False, 1), (True, 3)):
        pipeline = Pipeline("p").with_stage(
            "s", returns(StageOutput.fail("no", recoverable=recoverable)), retry=Retry(attempts=3)
        )
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run()
        assert caught.value.results.records["s"].attempts == attempts
