"""Cleanup: what is called when an attempt has ended, in whatever way; once, the last one first, in bounded time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    CauseKind,
    DefinitionError,
    Pipeline,
    PipelineTerminated,
    Retry,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    run_stage,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    assert_whole,
    causes,
    duration,
    gives,
    results_of,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

    from stageflow import PipelineResults
    from stageflow.stages import Body

ERROR = ValueError("bad")
EITHER_WAY: list[dict[str, Any]] = [{}, {"retry": Retry()}]
"""As a plain stage, and as one that is tried."""
ENDINGS: dict[str, object] = {
    "ok": StageOutput.ok(),
    "nothing": None,
    "fail": StageOutput.fail("bad"),
    "raise": ERROR,
    "contract": 42,
    "skip": StageOutput.skip("not today"),
    "cancel": StageOutput.cancel("enough"),
    "cancel_branch": StageOutput.cancel_branch("hopeless"),
    "retry": StageOutput.retry("again"),
    "interrupt": KeyboardInterrupt(),
}


def leaves(log: list[object], *names: str, then: object = None, within: float = 0) -> Body:
    """A stage that leaves something to be called, plain and async in turn, sleeps, and ends like this."""

    async def note(name: str) -> None:
        await trio.sleep(0.25)
        log.append(name)

    async def body(ctx: StageContext) -> object:
        for number, name in enumerate(names):
            if number % 2:
                ctx.on_exit(note, name)
            else:
                ctx.on_exit(log.append, name)
        await trio.sleep(within)
        if isinstance(then, BaseException):
            raise then.with_traceback(None)
        return then

    return body


async def run_it(pipeline: Pipeline, *, within: float = math.inf, act: Callable[[Run], None] | None = None) -> Run:
    """Runs it in a scope of so many seconds, and acts on it after one second."""
    run: Run | None = None
    with trio.move_on_after(within):  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open() as run:
                if act is not None:
                    await trio.sleep(1)
                    act(run)
        except (PipelineTerminated, KeyboardInterrupt):
            pass
    assert run is not None
    return run


# On every ending, once, the last one first


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=1)}, {"total_timeout": 60}, {"when": bool}])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_what_was_left_is_called_once_and_the_last_first_however_the_stage_ends_itself(
    autojump_clock: MockClock, ending: str, options: dict[str, Any]
) -> None:
    log: list[object] = []
    pipeline = Pipeline("ends").with_stage(
        "s", leaves(log, "a", "b", "c", "d", then=ENDINGS[ending], within=1), **options
    )
    run = await run_it(pipeline)
    assert log == ["d", "c", "b", "a"]
    assert times(run.results)["s"] == (0, 1.5)
    assert run.results.records["s"].details.overran == ()


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize(
    "by",
    [
        "timeout",
        "total_timeout",
        "heartbeat",
        "deadline",
        "branch deadline",
        "caller",
        "run.cancel",
        "run.cancel_branch",
        "a failure beside",
        "a cancel beside",
    ],
)
async def test_what_was_left_is_called_shielded_whatever_cancels_the_stage(
    autojump_clock: MockClock, by: str, tried: bool
) -> None:
    log: list[object] = []
    options: dict[str, Any] = {"retry": Retry(attempts=1)} if tried else {}
    if by in {"timeout", "total_timeout", "heartbeat"}:
        options[by] = 1
    beside = {
        "a failure beside": sleeps(1, ERROR),
        "a cancel beside": sleeps(1, StageOutput.cancel("enough")),
    }.get(by, gives())
    pipeline = (
        Pipeline("cancelled", deadline=1 if by == "deadline" else None)
        .with_stage("s", leaves(log, "a", "b", "c", within=60), **options)
        .with_stage("beside", beside)
        .with_stage("next", gives(), after="s")
    )
    if by == "branch deadline":
        pipeline = pipeline.with_branch(of="s", deadline=1)

    def act(run: Run) -> None:
        if by == "run.cancel":
            run.cancel("enough")
        elif by == "run.cancel_branch":
            run.cancel_branch("s", "enough")

    run = await run_it(pipeline, within=1 if by == "caller" else math.inf, act=act)
    assert log == ["c", "b", "a"]
    assert times(run.results)["s"] == (0, 1.25)
    assert states(run.results)["s"] is (FAILED if options.get(by) else CANCELLED)
    assert_whole(run.results)


async def test_each_attempt_cleans_up_before_the_delay_and_what_it_left_itself(autojump_clock: MockClock) -> None:
    log: list[tuple[str, int, float]] = []

    async def body(ctx: StageContext) -> StageOutput:
        attempt = ctx.attempt

        async def note(name: str) -> None:
            log.append((name, attempt, ctx.timer.elapsed))
            await trio.sleep(0.5)

        ctx.on_exit(note, "first")
        if attempt == 2:
            ctx.on_exit(note, "second")
        await trio.sleep(1 if attempt < 3 else 60)
        raise ERROR.with_traceback(None)

    pipeline = Pipeline("attempts").with_stage("s", body, timeout=5, retry=Retry(delay=2, factor=1))
    results = await results_of(pipeline)
    assert log == [("first", 1, 1), ("second", 2, 4.5), ("first", 2, 5), ("first", 3, 12.5)]
    assert times(results)["s"] == (0, 13)
    assert causes(results)["s"] == (CauseKind.TIMEOUT, "s")


async def test_nobody_hears_of_the_end_before_the_cleanup_is_done(autojump_clock: MockClock) -> None:
    log: list[object] = []
    pipeline = (
        Pipeline("order")
        .with_stage("s", leaves(log, "a", "b"))
        .with_stage("same_strand", leaves(log, "next"), after="s")
        .with_stage("other", gives())
        .with_stage("join", gives(), after=["same_strand", "other"])
    )
    results = await pipeline.run()
    assert log == ["b", "a", "next"]
    assert times(results)["s"] == (0, 0.25)
    assert times(results)["same_strand"] == (0.25, 0.25)


async def test_what_a_condition_has_left_is_called_though_the_stage_is_skipped() -> None:
    log: list[object] = []

    def when(ctx: StageContext) -> bool:
        ctx.on_exit(log.append, ctx.stage)
        return False

    pipeline = Pipeline("when").with_stage("a", gives(), when=when).with_stage("b", gives(), after="a", join="settled")
    await pipeline.run()
    assert log == ["a"]


async def test_what_is_left_while_cleaning_up_is_called_in_this_cleanup_too() -> None:
    log: list[str] = []

    async def body(ctx: StageContext) -> None:
        def first() -> None:
            log.append(f"{ctx.stage} first")
            ctx.on_exit(log.append, f"{ctx.stage} second")

        ctx.on_exit(log.append, f"{ctx.stage} last")
        ctx.on_exit(first)

    for options in EITHER_WAY:
        log.clear()
        await Pipeline("more").with_stage("a", body, **options).with_stage("b", body, after="a", **options).run()
        assert log == [f"{stage} {name}" for stage in "ab" for name in ("first", "second", "last")]


async def test_a_stage_alone_cleans_up_too() -> None:
    log: list[object] = []
    await run_stage(leaves(log, "a", "b"))
    assert log == ["b", "a"]


# What is refused


async def test_a_stage_that_has_ended_leaves_nothing_more(autojump_clock: MockClock) -> None:
    kept: list[StageContext] = []

    async def keeps(ctx: StageContext) -> None:
        kept.append(ctx)

    async def looks(ctx: StageContext) -> None:
        with pytest.raises(RuntimeError, match="'a' has ended"):
            kept[0].on_exit(print)

    await Pipeline("late").with_stage("a", keeps).with_stage("b", looks, after="a").run()
    with pytest.raises(RuntimeError, match="'a' has ended"):
        kept[0].on_exit(print)


@pytest.mark.parametrize("value", [None, -1, math.inf, math.nan, "5", True])
def test_cleanup_has_a_limit_that_is_checked_where_it_is_declared(value: Any) -> None:
    with pytest.raises(DefinitionError, match=r"cleanup_timeout="):
        Pipeline("wrong", cleanup_timeout=value)


# What raises


def raising(error: Exception, log: list[str]) -> Body:
    """A stage whose cleanup raises this, between two that are called in any case."""

    async def fails() -> None:
        await trio.sleep(0.5)
        raise error.with_traceback(None)

    async def body(ctx: StageContext) -> StageOutput:
        ctx.on_exit(log.append, "last")
        ctx.on_exit(fails)
        ctx.on_exit(log.append, "first")
        await trio.sleep(ctx.data.get("sleeps", 0))
        if "raises" in ctx.data:
            raise ctx.data["raises"]
        return StageOutput.ok(x=1)

    return body


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=1)}])
async def test_what_cleanup_raises_is_the_failure_of_a_stage_that_had_succeeded(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    log: list[str] = []
    error = OSError("cannot close")
    with pytest.raises(StageExecutionError, match="cannot close") as caught:
        await Pipeline("raises").with_stage("s", raising(error, log), **options).run()
    assert caught.value.original is error
    assert log == ["first", "last"]
    assert states(caught.value.results) == {"s": FAILED}
    assert_whole(caught.value.results)


async def test_what_cleanup_raises_is_worth_another_try(autojump_clock: MockClock) -> None:
    log: list[str] = []
    results = await results_of(
        Pipeline("raises").with_stage("s", raising(OSError("x"), log), retry=Retry(attempts=3, on=OSError))
    )
    assert results.records["s"].attempts == 3
    assert log == ["first", "last"] * 3


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=1)}])
async def test_what_cleanup_raises_after_a_failure_is_a_note_on_that(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    log: list[str] = []
    error = ValueError("bad")
    pipeline = Pipeline("raises").with_stage("s", raising(OSError("cannot close"), log), **options)
    with pytest.raises(StageExecutionError, match="ValueError: bad") as caught:
        await pipeline.run({"raises": error})
    assert caught.value.original is error
    assert error.__notes__ == ["after that, its cleanup raised OSError: cannot close"]
    assert log == ["first", "last"]


async def test_the_first_of_several_errors_in_cleanup_counts() -> None:
    def fails(number: int) -> None:
        raise ValueError(f"error {number}")

    async def body(ctx: StageContext) -> None:
        ctx.on_exit(fails, 2)
        ctx.on_exit(fails, 1)

    results = await results_of(Pipeline("several").with_stage("s", body))
    assert str(results.records["s"].error) == "error 1"


async def test_a_limit_reached_while_cleaning_up_after_success_does_not_undo_that(autojump_clock: MockClock) -> None:
    log: list[object] = []
    for options in EITHER_WAY:
        log.clear()
        pipeline = (
            Pipeline("late")
            .with_stage("s", leaves(log, "z", "a", "y", "b", within=0.9, then={"x": 1}), timeout=1, **options)
            .with_stage("next", sleeps(0.5), after="s", timeout=1)
        )
        results = await pipeline.run()
        assert log == ["b", "y", "a", "z"]
        assert times(results)["s"][1] == pytest.approx(1.4)
        assert states(results) == {"s": OK, "next": OK}
        assert results.records["s"].attempts == 1


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("by", ["timeout", "caller", "cancel"])
async def test_what_cleanup_raises_after_a_cancellation_is_the_failure_as_if_a_finally_had_raised_it(
    autojump_clock: MockClock, by: str, tried: bool
) -> None:
    log: list[str] = []
    error = OSError("cannot close")
    options: dict[str, Any] = {"timeout": 1} if by == "timeout" else {}
    if tried:
        options["heartbeat"] = 60
    terminated: PipelineTerminated | None = None
    pipeline = Pipeline("raises").with_stage("s", raising(error, log), **options)
    run: Run | None = None
    with trio.move_on_after(1 if by == "caller" else math.inf) as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open({"sleeps": 60}) as run:
                if by == "cancel":
                    await trio.sleep(1)
                    run.cancel("enough")
        except PipelineTerminated as raised:
            terminated = raised
    assert run is not None
    assert scope.cancelled_caught == (by == "caller")
    assert isinstance(terminated, StageExecutionError) == (by == "timeout")
    assert log == ["first", "last"]
    record = run.results.records["s"]
    assert (record.state, record.error, record.after_cancel) == (FAILED, error, True)
    assert causes(run.results) == {"s": (CauseKind.FAILURE, "s")}
    assert_whole(run.results)


# What takes too long


async def test_what_overruns_is_cancelled_at_the_limit_and_named(autojump_clock: MockClock) -> None:
    log: list[object] = []

    async def hangs() -> None:
        try:
            await trio.sleep(60)
        finally:
            log.append("hangs")

    async def body(ctx: StageContext) -> StageOutput:
        ctx.on_exit(log.append, "plain")
        ctx.on_exit(trio.sleep, 1)
        ctx.on_exit(hangs)
        ctx.on_exit(trio.sleep, 1)
        return StageOutput.ok(x=1)

    for options in EITHER_WAY:
        log.clear()
        results = await Pipeline("hangs", cleanup_timeout=3).with_stage("s", body, **options).run()
        assert duration(results) == 3
        assert log == ["hangs", "plain"]
        overran = results.records["s"].details.overran
        assert [name.rpartition(".")[2] for name in overran] == ["hangs", "sleep"]
        assert results["s"]["x"] == 1  # too slow a cleanup is reported, and is no failure
        assert results.status is RunStatus.SUCCEEDED


@pytest.mark.parametrize("ending", ["timeout", "raise", "caller"])
async def test_cleanup_takes_no_longer_however_the_stage_ended(autojump_clock: MockClock, ending: str) -> None:
    async def body(ctx: StageContext) -> None:
        ctx.on_exit(trio.sleep_forever)
        await trio.sleep(1 if ending == "raise" else 60)
        raise ERROR.with_traceback(None)

    pipeline = Pipeline("hangs", cleanup_timeout=2).with_stage("s", body, timeout=1 if ending == "timeout" else None)
    run = await run_it(pipeline, within=1 if ending == "caller" else math.inf)
    assert times(run.results)["s"] == (0, 3)
    assert run.results.records["s"].details.overran == ("sleep_forever",)


async def test_the_default_is_five_seconds(autojump_clock: MockClock) -> None:
    async def body(ctx: StageContext) -> None:
        ctx.on_exit(trio.sleep_forever)

    assert duration(await Pipeline("default").with_stage("s", body).run()) == 5


async def test_no_time_at_all_still_calls_what_does_not_wait(autojump_clock: MockClock) -> None:
    log: list[object] = []
    results = await Pipeline("none", cleanup_timeout=0).with_stage("s", leaves(log, "a", "b", "c")).run()
    assert log == ["c", "a"]
    assert len(results.records["s"].details.overran) == 1
    assert duration(results) == 0


async def test_each_attempt_has_the_whole_time_and_all_that_overran_is_named(autojump_clock: MockClock) -> None:
    async def body(ctx: StageContext) -> None:
        ctx.on_exit(trio.sleep_forever)
        raise ERROR.with_traceback(None)

    results = await results_of(Pipeline("each", cleanup_timeout=2).with_stage("s", body, retry=Retry(attempts=3)))
    assert duration(results) == 6
    assert results.records["s"].details.overran == ("sleep_forever",) * 3


# `ctx.cleanup()`


def tidies(seconds: float, log: list[str]) -> Body:
    """A stage that cleans up for so many seconds in its `finally`."""

    async def body(ctx: StageContext) -> StageOutput:
        try:
            await trio.sleep(ctx.data.get("sleeps", 0))
        finally:
            with ctx.cleanup():
                await trio.sleep(seconds)  # noqa: ASYNC102  # ctx.cleanup() is one
                log.append("done")
            log.append("after")
        return StageOutput.ok(x=1)

    return body


async def results_within(pipeline: Pipeline, seconds: float) -> PipelineResults:
    run: Run | None = None
    with trio.move_on_after(seconds):  # noqa: ASYNC912  # leaving a run is a checkpoint
        try:
            async with pipeline.build().open({"sleeps": 60}) as run:
                pass
        except StageExecutionError:
            pass
    assert run is not None
    return run.results


@pytest.mark.parametrize("by", ["timeout", "caller", "deadline"])
async def test_a_cleanup_scope_is_shielded_and_bounded(autojump_clock: MockClock, by: str) -> None:
    for seconds, ended, said in ((1, 2, ["done", "after"]), (60, 4, ["after"])):
        log: list[str] = []
        pipeline = Pipeline("scope", cleanup_timeout=3, deadline=1 if by == "deadline" else None).with_stage(
            "s", tidies(seconds, log), timeout=1 if by == "timeout" else None
        )
        results = await results_within(pipeline, 1 if by == "caller" else math.inf)
        assert log == said
        assert times(results)["s"] == (0, ended)
        assert results.records["s"].details.overran == (() if seconds == 1 else ("ctx.cleanup()",))
        assert states(results)["s"] is (FAILED if by == "timeout" else CANCELLED)


async def test_a_cleanup_scope_that_overruns_after_success_leaves_it_a_success(autojump_clock: MockClock) -> None:
    log: list[str] = []
    results = await Pipeline("scope", cleanup_timeout=3).with_stage("s", tidies(60, log)).run()
    assert log == ["after"]
    assert (states(results), duration(results)) == ({"s": OK}, 3)
    assert results.records["s"].details.overran == ("ctx.cleanup()",)


async def test_a_cleanup_scope_lets_an_exception_through(autojump_clock: MockClock) -> None:
    async def body(ctx: StageContext) -> None:
        with ctx.cleanup() as scope:
            assert scope.shield
            assert scope.deadline == trio.current_time() + 5
            raise ERROR.with_traceback(None)

    results = await results_of(Pipeline("scope").with_stage("s", body))
    assert results.records["s"].error is ERROR
    assert results.records["s"].details.overran == ()


async def test_a_cleanup_within_what_is_called_at_the_end_is_under_both_limits(autojump_clock: MockClock) -> None:
    async def body(ctx: StageContext) -> None:
        async def closes() -> None:
            await trio.sleep(1)
            with ctx.cleanup():
                await trio.sleep(60)

        ctx.on_exit(closes)

    results = await Pipeline("both", cleanup_timeout=2).with_stage("s", body).run()
    # The inner scope is shielded from the outer one as well, so it is its own limit that ends it.
    assert duration(results) == 3
    assert results.records["s"].details.overran[0] == "ctx.cleanup()"
