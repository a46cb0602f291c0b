"""Limits of time: what each bounds, which of several counts, what is said of it, and that all of it is exact."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    CauseKind,
    DefinitionError,
    Pipeline,
    PipelineContext,
    Retry,
    RunStatus,
    StageContext,
    StageOutput,
    StageTimeoutError,
    UnknownStageError,
    run_stage,
)
from stageflow.interceptors import TimeoutInterceptor
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    Witness,
    assert_whole,
    causes,
    duration,
    end,
    gives,
    results_of,
    sees,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio.testing import MockClock

    from stageflow import PipelineResults
    from stageflow.stages import Body

TRIED: list[dict[str, Any]] = [{}, {"retry": Retry(attempts=1)}, {"heartbeat": 2}, {"total_timeout": 2}]
HERE = r"test_limits_of_time\.py:\d+"


async def timeout_of(pipeline: Pipeline, ctx: PipelineContext | None = None) -> StageTimeoutError:
    """The error of a run that runs out of time."""
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run(ctx)
    return caught.value


def beats(times: int, every: float, by: str = "heartbeat") -> Body:
    """A stage that gives so many signs of life, and a sleep after each."""

    async def body(ctx: StageContext) -> StageOutput:
        for number in range(times):
            if by == "heartbeat":
                ctx.heartbeat()
            else:
                ctx.save_partial(number=number)
            await trio.sleep(every)
        return StageOutput.ok(by=ctx.stage)

    return body


# What is said of a timeout


async def test_a_timeout_says_stage_limit_source_elapsed_and_what_was_saved(autojump_clock: MockClock) -> None:
    error = await timeout_of(Pipeline("said").with_stage("a", gives()).with_stage("s", sleeps(9), after="a", timeout=2))
    assert (error.stage, error.limit, error.elapsed, error.partial) == ("s", 2, 2, {"begun": "s"})
    assert error.source.startswith("timeout= of stage 's' (")
    assert error.results.records["s"].details.source == error.source
    assert isinstance(error.original, TimeoutError)
    assert not isinstance(error.original, StageTimeoutError)
    assert error.__cause__ is error.original
    for words in (
        "'s'",
        "limit of 2 s",
        "timeout= of stage 's'",
        "it ran 2 s",
        "having saved 'begun'",
        "1 of 2 stages",
    ):
        assert words in str(error)
    assert causes(error.results) == {"s": (CauseKind.TIMEOUT, "s")}
    assert error.results.status is RunStatus.FAILED


@pytest.mark.parametrize(
    ("settings", "options", "ctx", "source"),
    [
        ({"default_timeout": 2}, {}, None, r"default_timeout= of the pipeline$"),
        ({}, {"timeout": 2}, None, rf"timeout= of stage 's' \(.*{HERE}\)$"),
        ({}, {"timeout": 7}, PipelineContext(timeouts={"s": 2}), r"timeouts= of the PipelineContext$"),
        ({"interceptors": [TimeoutInterceptor(2)]}, {"timeout": 7}, None, r"TimeoutInterceptor of the pipeline$"),
        ({}, {"total_timeout": 2}, None, rf"total_timeout= of stage 's' \(.*{HERE}\)$"),
        ({}, {"heartbeat": 2}, None, rf"heartbeat= of stage 's' \(.*{HERE}\)$"),
        ({"deadline": 2}, {}, None, r"deadline= of pipeline 'source'$"),
    ],
)
async def test_a_timeout_names_where_its_limit_was_set(
    autojump_clock: MockClock,
    settings: dict[str, Any],
    options: dict[str, Any],
    ctx: PipelineContext | None,
    source: str,
) -> None:

    error = await timeout_of(Pipeline("source", **settings).with_stage("s", sleeps(9), **options), ctx)
    assert re.search(source, error.source)
    assert (error.stage, error.limit, error.elapsed, error.partial) == ("s", 2, 2, {"begun": "s"})
    assert duration(error.results) == 2
    assert_whole(error.results)


async def test_elapsed_counts_the_cleanup_and_the_limit_does_not(autojump_clock: MockClock) -> None:
    async def tidies(ctx: StageContext) -> None:
        try:
            await trio.sleep(60)
        finally:
            with ctx.cleanup():
                await trio.sleep(3)  # noqa: ASYNC102  # ctx.cleanup() is one

    for option in ("timeout", "total_timeout", "heartbeat"):
        options: dict[str, Any] = {option: 2}
        error = await timeout_of(Pipeline("tidy").with_stage("s", tidies, **options))
        assert (error.limit, error.elapsed, duration(error.results)) == (2, 5, 5)
    error = await timeout_of(Pipeline("tidy", deadline=2).with_stage("s", tidies))
    assert (error.limit, error.elapsed, duration(error.results)) == (2, 5, 5)


# Which values are limits


@pytest.mark.parametrize("option", ["timeout", "total_timeout", "heartbeat"])
async def test_zero_expires_at_the_first_checkpoint_and_not_before(autojump_clock: MockClock, option: str) -> None:
    reached: list[str] = []

    async def checks(ctx: StageContext) -> None:
        reached.append("body")
        await trio.lowlevel.checkpoint()
        reached.append("beyond")

    options: dict[str, Any] = {option: 0}
    error = await timeout_of(Pipeline("zero").with_stage("s", checks, **options))
    assert reached == ["body"]
    assert (error.limit, error.elapsed) == (0, 0)
    results = await Pipeline("zero").with_stage("s", gives(), **options).run()
    assert states(results) == {"s": OK}


async def test_a_deadline_of_zero_expires_at_the_first_checkpoint(autojump_clock: MockClock) -> None:
    error = await timeout_of(
        Pipeline("zero", deadline=0).with_stage("a", gives()).with_stage("b", sleeps(0), after="a")
    )
    assert states(error.results) == {"a": OK, "b": CANCELLED}
    assert causes(error.results) == {"b": (CauseKind.DEADLINE, None)}
    assert (error.stage, error.limit, error.elapsed, error.partial) == ("b", 0, 0, {"begun": "b"})


@pytest.mark.parametrize("option", ["timeout", "total_timeout", "heartbeat"])
@pytest.mark.parametrize("value", [None, math.inf])
async def test_none_and_infinity_are_no_limit(autojump_clock: MockClock, option: str, value: float | None) -> None:
    options: dict[str, Any] = {"timeout": None, option: value}
    results = await Pipeline("none").with_stage("s", sleeps(10_000), **options).run()
    assert duration(results) == 10_000


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, "5", True, [1]])
@pytest.mark.parametrize("option", ["timeout", "total_timeout", "heartbeat", "default_timeout", "deadline", "branch"])
def test_what_is_no_limit_is_refused_where_it_is_declared(option: str, value: Any) -> None:
    def declare() -> Pipeline:
        if option == "branch":
            return Pipeline("wrong").with_branch(of="s", deadline=value)
        options: dict[str, Any] = {option: value}
        if option in {"default_timeout", "deadline"}:
            return Pipeline("wrong", **options)
        return Pipeline("wrong").with_stage("s", gives(), **options)

    with pytest.raises(DefinitionError, match=r"negative|takes seconds"):
        declare()


@pytest.mark.parametrize("value", [-1, math.nan, "5", True])
async def test_what_is_no_limit_is_refused_by_the_run_before_anything_starts(value: Any) -> None:
    witness = Witness()
    with pytest.raises(DefinitionError, match=r"timeouts=\.\.\.\) for 's'"):
        await Pipeline("wrong").with_stage("s", witness.of(gives())).run(PipelineContext(timeouts={"s": value}))
    assert witness.entered == []


async def test_a_run_that_limits_an_unknown_stage_is_refused() -> None:
    with pytest.raises(UnknownStageError, match="did you mean 'stage'"):
        await Pipeline("wrong").with_stage("stage", gives()).run(PipelineContext(timeouts={"stagr": 1}))


def test_a_branch_takes_one_deadline_and_of_a_stage_that_is_there() -> None:
    pipeline = Pipeline("wrong").with_stage("a", gives()).with_stage("b", gives(), after="a")
    with pytest.raises(DefinitionError, match="second deadline"):
        pipeline.with_branch(of="a", deadline=1).with_branch(of="b", deadline=1).build()
    with pytest.raises(UnknownStageError, match="'c'"):
        pipeline.with_branch(of="c", deadline=1).build()
    with pytest.raises(DefinitionError, match="without a deadline"):
        pipeline.with_branch(of="a", deadline=math.inf)


# A limit that the run sets


async def test_the_run_overrides_what_a_stage_declares_in_both_directions(autojump_clock: MockClock) -> None:
    graph = (
        Pipeline("override", default_timeout=3, on_failure="isolate")
        .with_stage("shorter", sleeps(4), timeout=5)
        .with_stage("longer", sleeps(4), timeout=2)
        .with_stage("none", sleeps(40), timeout=2)
        .with_stage("zero", sleeps(1))
        .with_stage("tried", sleeps(4), timeout=2, retry=Retry(attempts=1))
        .with_stage("untouched", sleeps(4))
        .build()
    )
    timeouts: Mapping[str, float | None] = {"shorter": 1, "longer": 5, "none": None, "zero": 0, "tried": 4.5}
    results = await results_of(graph, PipelineContext(timeouts=timeouts))
    assert {name: ended for name, (_, ended) in times(results).items()} == {
        "shorter": 1,
        "longer": 4,
        "none": 40,
        "zero": 0,
        "tried": 4,
        "untouched": 3,
    }
    assert_whole(results)
    again = await results_of(graph)
    assert times(again)["longer"] == (0, 2)
    assert times(again)["shorter"] == (0, 4)


async def test_the_limits_of_a_run_are_not_those_of_a_run_within_it(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("s", sleeps(3))
    pipeline = Pipeline("parent").with_stage("s", child)
    results = await results_of(pipeline, PipelineContext(timeouts={"s": 10}))
    assert duration(results) == 3

    async def runs(ctx: StageContext) -> None:
        await ctx.run_pipeline(child, timeouts={"s": 1})

    results = await results_of(Pipeline("parent").with_stage("s", runs))
    assert duration(results) == 1
    assert states(results) == {"s": FAILED}


# Heartbeat


@pytest.mark.parametrize("by", ["heartbeat", "save_partial"])
async def test_every_sign_of_life_begins_the_silence_anew(autojump_clock: MockClock, by: str) -> None:
    results = await Pipeline("alive").with_stage("s", beats(10, 1, by), heartbeat=2).run()
    assert duration(results) == 10
    error = await timeout_of(Pipeline("silent").with_stage("s", beats(2, 3, by), heartbeat=2.5))
    assert (error.limit, error.elapsed) == (2.5, 2.5)
    assert causes(error.results) == {"s": (CauseKind.HEARTBEAT, "s")}
    assert "no sign of life for 2.5 s" in str(error)
    assert_whole(error.results)


async def test_silence_counts_from_the_last_sign_of_life(autojump_clock: MockClock) -> None:
    async def falls_silent(ctx: StageContext) -> None:
        for _ in range(3):
            await trio.sleep(1)
            ctx.heartbeat()
        await trio.sleep(60)

    error = await timeout_of(Pipeline("silent").with_stage("s", falls_silent, heartbeat=2))
    assert (error.limit, error.elapsed, duration(error.results)) == (2, 5, 5)


async def test_a_sign_of_life_does_not_move_the_limit_on_the_attempt(autojump_clock: MockClock) -> None:
    error = await timeout_of(Pipeline("alive").with_stage("s", beats(60, 1), heartbeat=2, timeout=5.5))
    assert (error.limit, error.elapsed) == (5.5, 5.5)
    assert causes(error.results) == {"s": (CauseKind.TIMEOUT, "s")}


async def test_a_limit_on_the_attempt_wins_over_silence_on_a_tie(autojump_clock: MockClock) -> None:
    error = await timeout_of(Pipeline("tie").with_stage("s", sleeps(9), heartbeat=2, timeout=2))
    assert causes(error.results) == {"s": (CauseKind.TIMEOUT, "s")}
    assert error.source.startswith("timeout=")


async def test_what_is_saved_on_the_way_out_does_not_change_which_limit_it_was(autojump_clock: MockClock) -> None:
    async def saves_late(ctx: StageContext) -> None:
        try:
            await trio.sleep(60)
        finally:
            ctx.save_partial(late=True)
            ctx.heartbeat()

    error = await timeout_of(Pipeline("late").with_stage("s", saves_late, heartbeat=2, timeout=3))
    assert causes(error.results) == {"s": (CauseKind.HEARTBEAT, "s")}
    assert (error.limit, error.elapsed, error.partial) == (2, 2, {"late": True})
    assert error.source.startswith("heartbeat=")


async def test_each_attempt_has_its_own_silence(autojump_clock: MockClock) -> None:
    error = await timeout_of(
        Pipeline("silent").with_stage("s", sleeps(9), heartbeat=2, retry=Retry(attempts=3, delay=10, factor=1))
    )
    record = error.results.records["s"]
    assert [(attempt.started, attempt.ended) for attempt in record.tries] == [
        (error.results.trace.started + begun, error.results.trace.started + begun + 2) for begun in (0, 12, 24)
    ]


async def test_a_sign_of_life_without_such_a_limit_does_nothing(autojump_clock: MockClock) -> None:
    for options in TRIED[:2]:
        results = await Pipeline("free").with_stage("s", beats(3, 1), **options).run()
        assert duration(results) == 3


# Extending


@pytest.mark.parametrize("tried", [False, True])
async def test_extending_moves_the_limit_on_the_attempt(autojump_clock: MockClock, tried: bool) -> None:
    async def extends(ctx: StageContext) -> None:
        await trio.sleep(1)
        ctx.timer.extend(2)
        assert ctx.timer.remaining == 3
        ctx.timer.extend(0.5)
        assert ctx.deadline == trio.current_time() + 3.5
        await trio.sleep(10)

    options: dict[str, Any] = {"retry": Retry(attempts=1)} if tried else {}
    error = await timeout_of(Pipeline("more").with_stage("s", extends, timeout=2, **options))
    assert (error.limit, error.elapsed) == (4.5, 4.5)


async def test_extending_is_for_one_attempt(autojump_clock: MockClock) -> None:
    async def extends_once(ctx: StageContext) -> None:
        if ctx.attempt == 1:
            ctx.timer.extend(3)
        await trio.sleep(60)

    error = await timeout_of(
        Pipeline("more").with_stage("s", extends_once, timeout=2, retry=Retry(attempts=2, delay=1))
    )
    lengths = [attempt.ended - attempt.started for attempt in error.results.records["s"].tries if attempt.ended]
    assert lengths == [5, 2]
    assert (error.limit, duration(error.results)) == (2, 8)


async def test_extending_moves_neither_silence_nor_what_is_around(autojump_clock: MockClock) -> None:
    async def extends(ctx: StageContext) -> None:
        ctx.timer.extend(100)
        await trio.sleep(60)

    pipeline = Pipeline("outer")
    error = await timeout_of(pipeline.with_stage("s", extends, timeout=1, heartbeat=2))
    assert (causes(error.results)["s"][0], error.elapsed) == (CauseKind.HEARTBEAT, 2)
    error = await timeout_of(pipeline.with_stage("s", extends, timeout=1, total_timeout=3))
    assert (error.limit, error.elapsed) == (3, 3)
    assert error.source.startswith("total_timeout=")
    error = await timeout_of(Pipeline("outer", deadline=4).with_stage("s", extends, timeout=1))
    assert (error.limit, error.elapsed) == (4, 4)
    results = await pipeline.with_stage("s", extends, timeout=1).with_branch(of="s", deadline=5).run()
    assert (causes(results)["s"][0], duration(results)) == (CauseKind.DEADLINE, 5)
    ended = await end(pipeline.with_stage("s", extends, timeout=1), within=6)
    assert (causes(ended.results)["s"][0], duration(ended.results)) == (CauseKind.CALLER, 6)


@pytest.mark.parametrize("options", [{"timeout": 1}, {"timeout": 1, "retry": Retry(attempts=1)}, {"total_timeout": 1}])
async def test_it_is_too_late_to_extend_a_limit_that_was_reached(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    said: list[str] = []

    async def extends_late(ctx: StageContext) -> None:
        try:
            await trio.sleep(60)
        finally:
            with pytest.raises(RuntimeError, match="too late to extend") as caught:
                ctx.timer.extend(5)
            said.append(str(caught.value))

    await timeout_of(Pipeline("late").with_stage("s", extends_late, **options))
    assert len(said) == 1


# What the clock of a stage shows


async def test_the_timer_shows_the_nearest_limit(autojump_clock: MockClock) -> None:
    seen: dict[str, float] = {}

    async def looks(ctx: StageContext) -> None:
        assert ctx.deadline == ctx.timer.deadline
        seen[ctx.stage] = ctx.timer.remaining

    pipeline = (
        Pipeline("near", deadline=20, default_timeout=30)
        .with_stage("run", looks)
        .with_stage("own", looks, timeout=7, after="run")
        .with_stage("tried", looks, timeout=6, retry=Retry(), after="own")
        .with_stage("total", looks, timeout=6, total_timeout=5, after="tried")
        .with_stage("branch", looks, after="total")
        .with_stage("beside", looks, after="total")
        .with_branch(of="branch", deadline=4)
    )
    await pipeline.run()
    assert seen == {"run": 20, "own": 7, "tried": 6, "total": 5, "branch": 4, "beside": 20}


@pytest.mark.parametrize(
    "options", [{"timeout": 2}, {"timeout": 2, "retry": Retry(attempts=1)}, {"total_timeout": 2}, {"heartbeat": 2}]
)
async def test_a_stage_can_tell_in_its_cleanup_that_its_limit_ends_it(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    seen: list[str | None] = []

    async def asks(ctx: StageContext) -> None:
        seen.append(ctx.cancel_reason)
        try:
            await trio.sleep(60)
        finally:
            seen.append(ctx.cancel_reason)

    await timeout_of(Pipeline("why").with_stage("s", asks, **options))
    before, after = seen
    assert before is None
    assert after is not None
    assert "its limit" in after


# The deadline of a run


async def test_the_deadline_of_a_run_cancels_what_runs_and_names_it(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = (
        Pipeline("late", deadline=3)
        .with_stage("root", sleeps(1))
        .with_stage("a", witness.of(sleeps(9)), after="root")
        .with_stage("b", witness.of(sleeps(1)), after="root")
        .with_stage("c", witness.of(sleeps(9)), after="b")
        .with_stage("join", witness.of(gives()), after=["a", "c"], join="settled")
    )
    error = await timeout_of(pipeline)
    assert sorted(witness.entered) == ["a", "b", "c"]
    assert states(error.results) == {"root": OK, "a": CANCELLED, "b": OK, "c": CANCELLED, "join": SKIPPED}
    assert causes(error.results) == dict.fromkeys(["a", "c", "join"], (CauseKind.DEADLINE, None))
    assert times(error.results)["a"] == (1, 3)
    assert times(error.results)["c"] == (2, 3)
    assert (error.stage, error.limit, error.elapsed) == ("a", 3, 3)
    assert "deadline of 3 s while 'a', 'c' were running" in str(error)
    assert error.partial == {"begun": "a"}
    assert error.results.partial == {"a": {"begun": "a"}, "c": {"begun": "c"}}
    assert error.results.status is RunStatus.FAILED
    assert error.failures == ()
    assert_whole(error.results)


async def test_the_deadline_of_a_run_is_no_failure_that_a_policy_or_a_retry_could_put_aside(
    autojump_clock: MockClock,
) -> None:
    entered = Witness()
    pipeline = Pipeline("late", deadline=2, on_failure="isolate").with_stage(
        "s", entered.of(sleeps(9)), on_failure="tolerate", retry=Retry(attempts=5)
    )
    error = await timeout_of(pipeline)
    assert entered.entered == ["s"]
    assert (error.elapsed, states(error.results)) == (2, {"s": CANCELLED})


async def test_a_run_that_ends_in_time_knows_nothing_of_its_deadline(autojump_clock: MockClock) -> None:
    results = await Pipeline("quick", deadline=2).with_stage("s", sleeps(1.5)).run()
    assert results.status is RunStatus.SUCCEEDED
    await trio.sleep(5)
    assert results.status is RunStatus.SUCCEEDED


async def test_a_failure_before_the_deadline_is_what_the_run_raises(autojump_clock: MockClock) -> None:
    async def lingers(ctx: StageContext) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        await trio.lowlevel.checkpoint()

    pipeline = Pipeline("first", deadline=2).with_stage("slow", lingers).with_stage("bad", sleeps(1, ValueError("bad")))
    results = await results_of(pipeline)
    assert causes(results) == dict.fromkeys(["bad", "slow"], (CauseKind.FAILURE, "bad"))
    assert (duration(results), results.status) == (5, RunStatus.FAILED)


async def test_a_run_whose_stages_all_succeeded_ends_the_same_whether_or_not_one_looked_at_the_clock(
    autojump_clock: MockClock,
) -> None:
    async def shields(ctx: StageContext) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        if ctx.data.get("looks"):
            assert ctx.cancelled

    graph = Pipeline("late", deadline=1).with_stage("s", shields).build()
    unseen = await results_of(graph)
    seen = await results_of(graph, PipelineContext(data={"looks": True}))
    assert unseen.status is seen.status


async def test_a_run_that_is_cut_short_by_its_deadline_says_so_though_only_background_tasks_were_left(
    autojump_clock: MockClock,
) -> None:
    async def leaves_behind(ctx: StageContext) -> None:
        ctx.nursery.start_soon(trio.sleep, 60)

    error = await timeout_of(Pipeline("behind", deadline=5).with_stage("s", leaves_behind))
    assert (error.elapsed, states(error.results)) == (5, {"s": OK})


@pytest.mark.parametrize("inner", [2, 5])
async def test_the_nearest_of_two_deadlines_counts_and_on_a_tie_the_callers(
    autojump_clock: MockClock, inner: float
) -> None:
    ended = await end(Pipeline("tie", deadline=inner).with_stage("s", sleeps(9)), within=2)
    assert ended.caught
    assert ended.error is None
    assert causes(ended.results) == {"s": (CauseKind.CALLER, None)}
    assert ended.results.status is RunStatus.INTERRUPTED
    assert duration(ended.results) == 2


async def test_a_deadline_before_the_callers_is_the_runs(autojump_clock: MockClock) -> None:
    ended = await end(Pipeline("near", deadline=1.5).with_stage("s", sleeps(9)), within=2)
    assert not ended.caught
    assert isinstance(ended.error, StageTimeoutError)
    assert causes(ended.results) == {"s": (CauseKind.DEADLINE, None)}


async def test_on_a_tie_the_deadline_of_the_run_beats_the_limit_of_a_stage(autojump_clock: MockClock) -> None:
    for options in TRIED:
        error = await timeout_of(Pipeline("tie", deadline=2).with_stage("s", sleeps(9), timeout=2, **options))
        assert causes(error.results) == {"s": (CauseKind.DEADLINE, None)}
        assert states(error.results) == {"s": CANCELLED}


# The deadline of a branch


def forked(body: Body, **options: Any) -> Pipeline:
    """root → left → left2, right → join"""
    return (
        Pipeline("forked")
        .with_stage("root", sleeps(1))
        .with_stage("left", body, after="root", **options)
        .with_stage("left2", gives(), after="left")
        .with_stage("right", sleeps(4), after="root")
        .with_stage("join", sees(), after=["left2", "right"], join="any_settled")
        .with_stage("need", gives(), after=["left2", "right"])
    )


@pytest.mark.parametrize("of", ["left", "left2"])
async def test_the_deadline_of_a_branch_ends_that_branch_and_nothing_else(autojump_clock: MockClock, of: str) -> None:
    results = await forked(sleeps(9)).with_branch(of=of, deadline=2).run()
    assert states(results) == {
        "root": OK,
        "left": CANCELLED,
        "left2": SKIPPED,
        "right": OK,
        "join": OK,
        "need": SKIPPED,
    }
    assert causes(results) == dict.fromkeys(["left", "left2", "need"], (CauseKind.DEADLINE, None))
    assert times(results)["left"] == (1, 3)
    assert results["join"]["saw"] == ["right"]
    assert results.partial == {"left": {"begun": "left"}}
    assert (results.status, duration(results)) == (RunStatus.PARTIAL, 5)
    assert_whole(results)


async def test_a_branch_takes_its_time_from_when_its_first_stage_can_start(autojump_clock: MockClock) -> None:
    results = await forked(sleeps(1.5)).with_branch(of="left", deadline=2).run()
    assert results.status is RunStatus.SUCCEEDED
    assert times(results)["left"] == (1, 2.5)


async def test_the_deadline_of_a_branch_holds_for_all_stages_of_its_strand_together(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("strand")
        .with_stage("root", gives())
        .with_stage("other", gives(), after="root")
        .with_stage("a", sleeps(1), after="root")
        .with_stage("b", sleeps(1), after="a")
        .with_stage("c", sleeps(1), after="b")
        .with_branch(of="c", deadline=2.5)
    )
    results = await pipeline.run()
    assert states(results) == {"root": OK, "other": OK, "a": OK, "b": OK, "c": CANCELLED}
    assert times(results)["c"] == (2, 2.5)


async def test_the_deadline_of_a_branch_holds_for_the_branches_nested_in_it(autojump_clock: MockClock) -> None:
    """And it goes on to hold when its own strand is done."""
    pipeline = (
        Pipeline("nested")
        .with_stage("root", gives())
        .with_stage("other", sleeps(9), after="root")
        .with_stage("fork", sleeps(1), after="root")
        .with_stage("x", sleeps(9), after="fork")
        .with_stage("y", sleeps(0.5), after="fork")
        .with_stage("z", gives(), after=["x", "y"])
        .with_stage("rest", sees(), after=["other", "z"], join="settled")
        .with_branch(of="fork", deadline=3)
    )
    results = await pipeline.run()
    assert causes(results) == dict.fromkeys(["x", "z"], (CauseKind.DEADLINE, None))
    assert times(results)["x"] == (1, 3)
    assert times(results)["fork"] == (0, 1)
    assert results["rest"]["saw"] == ["other"]
    assert results.status is RunStatus.PARTIAL
    assert_whole(results)


async def test_of_nested_deadlines_the_nearest_counts_and_the_outer_on_a_tie(autojump_clock: MockClock) -> None:
    def nested(outer: float, inner: float) -> Pipeline:
        return (
            Pipeline("nested")
            .with_stage("root", gives())
            .with_stage("other", sleeps(9), after="root")
            .with_stage("fork", gives(), after="root")
            .with_stage("x", sleeps(9), after="fork")
            .with_stage("y", sleeps(8), after="fork")
            .with_branch(of="fork", deadline=outer)
            .with_branch(of="x", deadline=inner)
        )

    results = await nested(3, 2).run()
    assert [times(results)[name][1] for name in ("x", "y")] == [2, 3]
    results = await nested(2, 3).run()
    assert [times(results)[name][1] for name in ("x", "y")] == [2, 2]
    results = await nested(2.5, 2.5).run()
    reasons = {name: record.cause.reason for name, record in results.records.items() if record.cause}
    assert reasons == dict.fromkeys(["x", "y"], "the branch reached its deadline of 2.5 s")


async def test_on_a_tie_the_deadline_of_a_branch_beats_the_limit_of_a_stage(autojump_clock: MockClock) -> None:
    results = await forked(sleeps(9), timeout=2).with_branch(of="left", deadline=2).run()
    assert causes(results)["left"] == (CauseKind.DEADLINE, None)
    results = await results_of(forked(sleeps(9), timeout=1.5).with_branch(of="left", deadline=2))
    assert causes(results)["left"] == (CauseKind.TIMEOUT, "left")


async def test_on_a_tie_the_deadline_of_the_run_beats_that_of_a_branch(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("tie", deadline=2)
        .with_stage("root", gives())
        .with_stage("a", sleeps(9), after="root")
        .with_stage("b", sleeps(1), after="root")
        .with_branch(of="a", deadline=2)
    )
    error = await timeout_of(pipeline)
    assert "the run reached its deadline of 2 s while 'a' was running" in str(error)
    assert causes(error.results) == {"a": (CauseKind.DEADLINE, None)}


async def test_on_a_tie_the_caller_beats_the_deadline_of_a_branch(autojump_clock: MockClock) -> None:
    ended = await end(forked(sleeps(9)).with_branch(of="left", deadline=1), within=2)
    assert ended.caught
    assert causes(ended.results)["left"] == (CauseKind.CALLER, None)
    assert ended.results.status is RunStatus.INTERRUPTED


async def test_the_deadline_of_the_trunk_ends_the_run_without_an_error(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("trunk").with_stage("a", gives()).with_stage("b", sleeps(9), after="a")
    results = await pipeline.with_branch(of="b", deadline=2).run()
    assert causes(results) == {"b": (CauseKind.DEADLINE, None)}
    assert (results.status, duration(results)) == (RunStatus.PARTIAL, 2)


async def test_a_join_that_goes_on_under_the_scope_of_a_branch_does_not_inherit_its_deadline(
    autojump_clock: MockClock,
) -> None:
    """Of the branches below, the last to end hands its task on to the join."""
    pipeline = (
        Pipeline("reuse")
        .with_stage("root", gives())
        .with_stage("a", sleeps(1), after="root")
        .with_stage("b", sleeps(0.5), after="root")
        .with_stage("join", sleeps(9), after=["a", "b"])
    )
    results = await pipeline.with_branch(of="a", deadline=2).run()
    assert results.status is RunStatus.SUCCEEDED
    assert times(results)["join"] == (1, 10)
    results = await pipeline.with_branch(of="a", deadline=2).with_branch(of="join", deadline=3).run()
    assert times(results)["join"] == (1, 4)
    assert causes(results) == {"join": (CauseKind.DEADLINE, None)}
    results = await pipeline.with_branch(of="join", deadline=3).run()
    assert times(results)["join"] == (1, 4)


async def test_a_branch_that_returns_in_the_instant_of_its_deadline_has_succeeded(autojump_clock: MockClock) -> None:
    async def in_time(ctx: StageContext) -> None:
        await trio.lowlevel.checkpoint()
        autojump_clock.jump(2)

    results = await forked(in_time).with_branch(of="left", deadline=2).run()
    assert states(results)["left"] is OK
    assert times(results)["left"] == (1, 3)
    assert_whole(results)


# Runs within runs


async def test_a_nested_run_is_under_the_limit_of_its_stage_and_under_its_own_deadline(
    autojump_clock: MockClock,
) -> None:
    child = Pipeline("child", deadline=3).with_stage("a", sleeps(1)).with_stage("b", sleeps(9), after="a")
    error = await timeout_of(Pipeline("parent").with_stage("s", child, timeout=2))
    assert (error.stage, error.limit, error.elapsed) == ("s", 2, 2)
    (within,) = error.results.children["s"]
    assert causes(within) == {"b": (CauseKind.CALLER, None)}
    assert list(within) == ["a"]

    results = await results_of(Pipeline("parent").with_stage("s", child, timeout=4))
    original = results.records["s"].error
    assert isinstance(original, StageTimeoutError)
    assert original.source == "deadline= of pipeline 'child'"
    assert causes(results) == {"s": (CauseKind.FAILURE, "s")}
    assert duration(results) == 3


async def test_a_nested_run_ties_with_its_stage_and_the_stage_wins(autojump_clock: MockClock) -> None:
    child = Pipeline("child", deadline=2).with_stage("a", sleeps(9), timeout=2)
    error = await timeout_of(Pipeline("parent").with_stage("s", child, timeout=2))
    assert (error.stage, causes(error.results)) == ("s", {"s": (CauseKind.TIMEOUT, "s")})


@pytest.mark.parametrize("by", ["extend", "heartbeat", "scope"])
async def test_the_deadline_of_a_run_holds_though_a_nearer_limit_around_it_moves(
    autojump_clock: MockClock, by: str
) -> None:
    child = Pipeline("child", deadline=5).with_stage("a", sleeps(60), timeout=None)
    kept: list[PipelineResults] = []

    async def runs(ctx: StageContext) -> None:
        async def keeps_alive() -> None:
            while True:
                ctx.heartbeat()
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeps_alive)
            with trio.CancelScope(deadline=trio.current_time() + 3 if by == "scope" else math.inf) as scope:
                async with child.build().open() as run:
                    kept.append(run.results)
                    await trio.sleep(1)
                    scope.deadline = math.inf
                    if by == "extend":
                        ctx.timer.extend(100)
            nursery.cancel_scope.cancel()

    options: dict[str, Any] = {"timeout": 3} if by == "extend" else {"timeout": None}
    if by == "heartbeat":
        options["heartbeat"] = 2
    await results_of(Pipeline("parent").with_stage("s", runs, **options))
    assert duration(kept[0]) == 5
    assert causes(kept[0]) == {"a": (CauseKind.DEADLINE, None)}


# All together, and alone


async def test_a_thousand_stages_time_out_in_one_instant(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("many", on_failure="isolate").with_stage("root", gives())
    for number in range(1000):
        pipeline = pipeline.with_stage(f"s{number}", sleeps(60), after="root", timeout=2)
    results = await results_of(pipeline)
    assert {moments for name, moments in times(results).items() if name != "root"} == {(0, 2)}
    assert duration(results) == 2
    assert_whole(results)


@pytest.mark.parametrize("options", [{"timeout": 2}, {"total_timeout": 2}, {"heartbeat": 2}])
async def test_a_stage_alone_has_the_same_limits(autojump_clock: MockClock, options: dict[str, Any]) -> None:
    begun = trio.current_time()
    with pytest.raises(StageTimeoutError) as caught:
        await run_stage(sleeps(9), **options)
    assert trio.current_time() - begun == 2
    assert (caught.value.limit, caught.value.elapsed) == (2, 2)
