"""The handle of a run, and everything that may happen around it and inside it."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    CauseKind,
    Pipeline,
    PipelineResults,
    PipelineTerminated,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageGraph,
    StageOutput,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    UnknownStageError,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    PENDING,
    RUNNING,
    SKIPPED,
    Witness,
    assert_whole,
    causes,
    chain,
    duration,
    end,
    fan,
    gives,
    leaves,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

ERROR = ValueError("no such page")


def diamond(**bodies: Any) -> Pipeline:
    """a → (b, c) → d"""
    return (
        Pipeline("diamond")
        .with_stage("a", bodies.get("a", gives()))
        .with_stage("b", bodies.get("b", gives()), after="a")
        .with_stage("c", bodies.get("c", gives()), after="a")
        .with_stage("d", bodies.get("d", gives()), after=["b", "c"])
    )


# The handle


async def test_leaving_the_block_waits_for_the_run(autojump_clock: MockClock) -> None:
    async with diamond(b=sleeps(3)).build().open() as run:
        before = run.results.status, run.results.trace.ended
    assert before == (RunStatus.RUNNING, None)
    assert run.results.status is RunStatus.SUCCEEDED
    assert duration(run.results) == 3
    assert run.id == run.results.run_id == run.results.trace.run_id
    assert repr(run) == f"<Run {run.id} of 'diamond', succeeded>"


async def test_results_are_live_while_the_run_goes(autojump_clock: MockClock) -> None:
    async with chain(3, sleeps(2)).build().open() as run:
        results = run.results
        assert set(states(results).values()) == {PENDING}
        for number in range(3):
            await trio.sleep(1)
            expected = [OK] * number + [RUNNING] + [PENDING] * (2 - number)
            assert list(states(results).values()) == expected
            assert list(results) == [f"s{done}" for done in range(number)]
            assert results.partial == {f"s{number}": {"begun": f"s{number}"}}
            assert results.status is RunStatus.RUNNING
            await trio.sleep(1)
    assert results is run.results
    assert list(results) == ["s0", "s1", "s2"]
    assert_whole(results)


async def test_wait_gives_the_results_to_many_tasks(autojump_clock: MockClock) -> None:
    given: list[PipelineResults] = []

    async def wait() -> None:
        given.append(await run.wait())

    async with diamond(b=sleeps(1)).build().open() as run, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(wait)
    assert [dict(results) for results in given] == [dict(run.results)] * 10
    assert dict(await run.wait()) == dict(run.results)


async def test_wait_raises_the_error_to_every_task_and_leaving_does_not_again(autojump_clock: MockClock) -> None:
    """Again in the block's own task, that is: the other tasks just watch."""
    told: list[PipelineTerminated] = []

    async def wait() -> None:
        with pytest.raises(StageExecutionError) as caught:
            await run.wait()
        told.append(caught.value)

    async with diamond(b=sleeps(1, ERROR)).build().open() as run, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(wait)
        await wait()
    assert [error.stage for error in told] == ["b"] * 6
    assert run.results.status is RunStatus.FAILED


async def test_leaving_the_block_raises_the_error_whatever_other_tasks_were_told(autojump_clock: MockClock) -> None:
    told: list[PipelineTerminated] = []

    async def watch(run: Run) -> None:
        with pytest.raises(StageExecutionError) as seen:
            await run.wait()
        told.append(seen.value)

    async def leaves() -> None:
        async with diamond(b=sleeps(1, ERROR)).build().open() as run, trio.open_nursery() as nursery:
            nursery.start_soon(watch, run)
            await trio.sleep(5)

    with pytest.raises(StageExecutionError) as caught:
        await leaves()
    assert [error.stage for error in told] == ["b"]
    assert caught.value is not told[0]
    assert caught.value.results is told[0].results


@pytest.mark.parametrize(
    ("pipeline", "status", "notes"),
    [
        (diamond(b=sleeps(1, ERROR)), RunStatus.FAILED, ["before that, stage 'b'"]),
        (diamond(b=sleeps(9)), RunStatus.CANCELLED, []),
    ],
    ids=["after a failure", "while the run goes"],
)
async def test_what_the_block_raises_mentions_a_failure_before_it(
    autojump_clock: MockClock, pipeline: Pipeline, status: RunStatus, notes: list[str]
) -> None:
    runs: list[Run] = []

    async def raises_itself() -> None:
        async with pipeline.build().open() as run:
            runs.append(run)
            await trio.sleep(5)
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        await raises_itself()
    assert runs[0].results.status is status
    assert [note.partition(" (")[0] for note in getattr(caught.value, "__notes__", [])] == notes


async def test_leaving_the_block_raises_the_error_that_nobody_was_told(autojump_clock: MockClock) -> None:
    opened: list[Run] = []
    with pytest.raises(StageExecutionError) as caught:  # noqa: PT012
        async with diamond(b=sleeps(1, ERROR)).build().open() as run:
            opened.append(run)
            await trio.sleep(5)
    assert caught.value.original is ERROR
    assert dict(caught.value.results) == dict(opened[0].results)
    with pytest.raises(StageExecutionError):
        await opened[0].wait()


async def test_cancelling_a_wait_does_not_touch_the_run(autojump_clock: MockClock) -> None:
    async with diamond(b=sleeps(3)).build().open() as run:
        with trio.move_on_after(1) as scope:
            await run.wait()
        before = run.results.status
    assert scope.cancelled_caught
    assert before is RunStatus.RUNNING
    assert run.results.status is RunStatus.SUCCEEDED


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), ExceptionGroup("mine", [KeyError("mine")])])
async def test_an_exception_in_the_block_goes_on_unwrapped_and_cancels_the_run(
    autojump_clock: MockClock, error: BaseException
) -> None:
    opened: list[Run] = []
    with pytest.raises(type(error)) as caught:  # noqa: PT012
        async with diamond(b=sleeps(5)).build().open() as run:
            opened.append(run)
            await trio.sleep(1)
            raise error
    assert caught.value is error
    results = opened[0].results
    assert results.status is RunStatus.CANCELLED
    assert states(results) == {"a": OK, "b": CANCELLED, "c": OK, "d": SKIPPED}
    assert causes(results)["b"] == (CauseKind.CANCEL, None)
    assert results.partial == {"b": {"begun": "b"}}
    assert duration(results) == 1
    assert_whole(results)


async def test_an_exception_in_the_block_after_the_run_has_ended_changes_nothing(autojump_clock: MockClock) -> None:
    opened: list[Run] = []
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012
        async with diamond().build().open() as run:
            opened.append(run)
            await run.wait()
            raise KeyError("mine")
    assert opened[0].results.status is RunStatus.SUCCEEDED


async def test_leaving_the_block_early_by_a_cancel_scope_around_it_interrupts_the_run(
    autojump_clock: MockClock,
) -> None:
    opened: list[Run] = []
    with trio.move_on_after(0.1) as scope:
        async with diamond(b=sleeps(5)).build().open() as run:
            opened.append(run)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    results = opened[0].results
    assert results.status is RunStatus.INTERRUPTED
    assert states(results) == {"a": OK, "b": CANCELLED, "c": OK, "d": SKIPPED}
    assert results.partial == {"b": {"begun": "b"}}
    assert set(causes(results).values()) == {(CauseKind.CALLER, None)}
    with pytest.raises(UnifiedPipelineCancelled) as caught:
        await opened[0].wait()
    assert caught.value.stage is None


async def test_a_cancel_scope_inside_the_block_is_the_blocks_own_business(autojump_clock: MockClock) -> None:
    async with diamond(b=sleeps(5)).build().open() as run:
        with trio.move_on_after(1):
            await trio.sleep_forever()
        before = run.results.status
    assert before is RunStatus.RUNNING
    assert run.results.status is RunStatus.SUCCEEDED


# The caller's cancellation, before and after a failure


async def open_and_leave(graph: StageGraph) -> None:
    async with graph.open():
        pass


@pytest.mark.parametrize("how", [StageGraph.run, open_and_leave])
async def test_a_failure_before_the_callers_cancellation_is_raised(
    autojump_clock: MockClock, how: Callable[[StageGraph], Awaitable[object]]
) -> None:
    graph = (
        Pipeline("isolated", on_failure="isolate").with_stage("b", sleeps(1, ERROR)).with_stage("c", sleeps(5)).build()
    )
    with trio.move_on_after(2) as scope, pytest.raises(StageExecutionError) as caught:
        await how(graph)
    assert not scope.cancelled_caught
    assert caught.value.stage == "b"
    assert caught.value.results.status is RunStatus.FAILED
    assert causes(caught.value.results)["c"] == (CauseKind.CALLER, None)


async def test_a_failure_after_the_callers_cancellation_is_only_recorded(autojump_clock: MockClock) -> None:
    async def fails_in_cleanup(ctx: StageContext) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ERROR

    ended = await end(diamond(b=fails_in_cleanup, c=sleeps(5)), within=2)
    assert ended.caught
    assert ended.error is None
    assert ended.results.status is RunStatus.INTERRUPTED
    assert states(ended.results) == {"a": OK, "b": FAILED, "c": CANCELLED, "d": SKIPPED}
    assert ended.results.records["b"].error is ERROR
    assert causes(ended.results)["c"] == (CauseKind.CALLER, None)


async def test_a_failure_while_a_failure_ends_the_run_is_only_recorded(autojump_clock: MockClock) -> None:
    async def fails_in_cleanup(ctx: StageContext) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("cleanup")

    with pytest.raises(StageExecutionError) as caught:
        await diamond(b=sleeps(1, ERROR), c=fails_in_cleanup).run()
    assert caught.value.original is ERROR
    assert [record.name for record in caught.value.failures] == ["b", "c"]


# cancel and cancel_branch from outside, at odd moments


async def test_cancel_before_the_first_tick_starts_nothing() -> None:
    witness = Witness()
    with pytest.raises(UnifiedPipelineCancelled) as caught:
        async with diamond(a=witness.of(gives())).build().open() as run:
            run.cancel("changed my mind")
    results = caught.value.results
    assert witness.entered == []
    assert set(states(results).values()) == {SKIPPED}
    assert set(causes(results).values()) == {(CauseKind.CANCEL, None)}
    assert results.status is RunStatus.CANCELLED
    assert caught.value.reason == "changed my mind"
    assert_whole(results)


async def test_cancel_after_the_end_and_a_second_cancel_do_nothing(autojump_clock: MockClock) -> None:
    async with diamond().build().open() as run:
        await run.wait()
        run.cancel("too late")
    assert run.results.status is RunStatus.SUCCEEDED

    def cancel_twice(scope: trio.CancelScope, run: Run) -> None:
        run.cancel("the first")
        run.cancel("the second")

    ended = await end(diamond(b=sleeps(5)), cancel_twice)
    assert isinstance(ended.error, UnifiedPipelineCancelled)
    assert ended.error.reason == "the first"


async def test_cancel_after_a_failure_ends_the_run_and_the_failure_is_raised(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("isolated", on_failure="isolate").with_stage("b", sleeps(0.5, ERROR)).with_stage("c", sleeps(9))
    ended = await end(pipeline, lambda scope, run: run.cancel("enough"))
    assert isinstance(ended.error, StageExecutionError)
    assert ended.error.original is ERROR
    assert duration(ended.results) == 1
    assert causes(ended.results)["c"] == (CauseKind.CANCEL, None)


@pytest.mark.parametrize("named", ["a", "only", "root1", "root2", "nested"])
async def test_cancel_branch_before_the_first_tick_skips_it(named: str) -> None:
    """On the trunk as in the branches that start with the run."""
    shapes = {
        "a": Pipeline("trunk").with_stage("a", gives()).with_stage("b", gives(), after="a"),
        "only": Pipeline("one").with_stage("only", gives()),
    }
    roots = (
        Pipeline("roots")
        .with_stage("root1", gives())
        .with_stage("root2", gives())
        .with_stage("nested", gives(), after="root2")
        .with_stage("end", sees(), after=["root1", "nested"], join="settled")
    )
    async with shapes.get(named, roots).build().open() as run:
        run.cancel_branch(named, "not today")
    cut = {"a": {"a", "b"}, "only": {"only"}, "root1": {"root1"}, "root2": {"root2", "nested"}}
    cut["nested"] = cut["root2"]
    assert {name for name, state in states(run.results).items() if state is SKIPPED} == cut[named]
    assert set(causes(run.results).values()) == {(CauseKind.CANCEL_BRANCH, None)}
    assert run.results.status is RunStatus.PARTIAL
    assert_whole(run.results)
    if named not in shapes:
        assert len(run.results["end"]["saw"]) == 1


async def test_cancel_branch_of_a_branch_to_come_skips_it_when_its_turn_comes(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = (
        Pipeline("ahead")
        .with_stage("a", sleeps(2))
        .with_stage("b", witness.of(gives()), after="a")
        .with_stage("b2", witness.of(gives()), after="b", join="settled")
        .with_stage("c", gives(), after="a")
        .with_stage("d", sees(), after=["b2", "c"], join="settled")
    )
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        run.cancel_branch("b2", "not today")
        assert states(run.results)["b"] is PENDING
    assert states(run.results) == {"a": OK, "b": SKIPPED, "b2": SKIPPED, "c": OK, "d": OK}
    assert run.results["d"]["saw"] == ["c"]
    assert times(run.results)["b2"] == (None, 2)
    assert witness.entered == []
    assert set(causes(run.results).values()) == {(CauseKind.CANCEL_BRANCH, None)}


async def test_cancel_branch_after_the_branch_has_ended_does_nothing(autojump_clock: MockClock) -> None:
    async with diamond(c=sleeps(5)).build().open() as run:
        await trio.sleep(1)
        run.cancel_branch("b", "too late")
        run.cancel_branch("b", "too late")
        await run.wait()
        run.cancel_branch("a", "much too late")
    assert run.results.status is RunStatus.SUCCEEDED


async def test_cancel_branch_of_an_unknown_stage_is_refused(autojump_clock: MockClock) -> None:
    async with diamond(b=sleeps(1)).build().open() as run:
        with pytest.raises(UnknownStageError, match=r"cancel_branch\(\) names 'bb'.*did you mean 'b'\?"):
            run.cancel_branch("bb", "typo")
    assert run.results.status is RunStatus.SUCCEEDED


# What stages may raise


async def test_an_exception_group_of_a_stage_is_its_original_whole() -> None:
    async def opens_a_nursery(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, KeyError("one"))
            nursery.start_soon(fails, ERROR)

    async def fails(error: Exception) -> None:
        raise error

    with pytest.raises(StageExecutionError) as caught:
        await diamond(b=opens_a_nursery).run()
    original = caught.value.original
    assert type(original) is ExceptionGroup
    assert {type(error) for error in leaves(original)} == {KeyError, ValueError}
    assert caught.value.results.records["b"].error is original


async def test_the_errors_in_a_group_with_cancellation_are_the_stages_failure(autojump_clock: MockClock) -> None:
    """While the cancellation itself is not lost."""

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ERROR

    async def opens_a_nursery(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fails_when_cancelled)

    ended = await end(diamond(b=opens_a_nursery), within=1)
    assert ended.caught
    error = ended.results.records["b"].error
    assert type(error) is ExceptionGroup
    assert leaves(error) == [ERROR]
    assert ended.results.status is RunStatus.INTERRUPTED


async def test_a_group_of_nothing_but_cancellation_is_no_failure(autojump_clock: MockClock) -> None:
    async def opens_nurseries(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.sleep_forever)

    ended = await end(diamond(b=opens_nurseries), within=1)
    assert ended.caught
    assert states(ended.results)["b"] is CANCELLED


@pytest.mark.parametrize("error", [KeyboardInterrupt("enough"), SystemExit(3)])
@pytest.mark.parametrize("policy", ["fail_fast", "isolate"])
@pytest.mark.parametrize("who", ["a", "b"])
async def test_what_is_to_end_the_program_gets_through_and_everything_has_settled(
    autojump_clock: MockClock, error: BaseException, policy: str, who: str
) -> None:
    async def ends_the_program(ctx: StageContext) -> None:
        await trio.sleep(1)
        raise error

    pipeline = (
        Pipeline("dying", on_failure=policy)
        .with_stage("a", ends_the_program if who == "a" else gives())
        .with_stage("b", ends_the_program, after="a")
        .with_stage("c", sleeps(5), after="a")
        .with_stage("d", gives(), after=["b", "c"])
    )
    opened: list[Run] = []
    with pytest.raises(BaseException) as caught:  # noqa: PT011, PT012
        async with pipeline.build().open() as run:
            opened.append(run)
            await trio.sleep_forever()
    assert leaves(caught.value) == [error]
    results = opened[0].results
    assert_whole(results)
    assert states(results)[who] is FAILED
    assert results.records[who].error is error
    assert set(results) == ({"a"} if who == "b" else set())
    assert results.status is RunStatus.FAILED
    assert duration(results) == 1


# Context variables

VARIABLE = contextvars.ContextVar("VARIABLE", default="nobody")


@pytest.mark.parametrize("how", ["run", "open"])
async def test_every_branch_starts_with_the_context_variables_of_the_runs_opener(how: str) -> None:
    async def reads_and_sets(ctx: StageContext) -> dict[str, object]:
        seen = VARIABLE.get()
        VARIABLE.set(ctx.stage)
        return {"seen": seen}

    pipeline = (
        Pipeline("variables")
        .with_stage("a", reads_and_sets)
        .with_stage("a2", reads_and_sets, after="a")
        .with_stage("b", reads_and_sets, after="a2")
        .with_stage("b2", reads_and_sets, after="b")
        .with_stage("c", reads_and_sets, after="a2")
        .with_stage("d", reads_and_sets, after=["b2", "c"])
    )
    VARIABLE.set("opener")
    graph = pipeline.build()
    if how == "run":
        results = await graph.run()
    else:
        async with graph.open() as run:
            VARIABLE.set("the block")
        results = run.results
    seen = {name: output["seen"] for name, output in results.items()}
    # A strand is one task, so what a stage sets is seen by the next one of its strand, and by nobody else.
    assert seen == {"a": "opener", "a2": "a", "b": "opener", "b2": "b", "c": "opener", "d": "opener"}


# Completion beats cancellation

INTERVENTIONS: dict[str, Callable[[trio.CancelScope, Run], None]] = {
    "scope": lambda scope, run: scope.cancel(),
    "cancel": lambda scope, run: run.cancel("enough"),
    "cancel_branch": lambda scope, run: run.cancel_branch("b", "enough"),
}


@pytest.mark.parametrize("by", [*INTERVENTIONS, "failure"])
async def test_what_has_returned_counts_though_it_was_cancelled(autojump_clock: MockClock, by: str) -> None:
    async def stubborn(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return {"kept": True}

    witness = Witness()
    pipeline = (
        Pipeline("stubborn")
        .with_stage("a", gives())
        .with_stage("b", stubborn, after="a")
        .with_stage("b2", witness.of(gives()), after="b")
        .with_stage("c", sleeps(1, ERROR) if by == "failure" else sleeps(9), after="a")
    )
    results = (await end(pipeline, INTERVENTIONS.get(by))).results
    record = results.records["b"]
    assert record.state is OK
    assert record.after_cancel
    assert results["b"]["kept"]
    assert times(results)["b"] == (0, 3)
    assert states(results)["b2"] is SKIPPED
    assert witness.entered == []
    assert not results.records["a"].after_cancel


async def test_a_result_beats_the_limit_of_its_stage_too_and_the_strand_goes_on(autojump_clock: MockClock) -> None:
    async def stubborn(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return {"kept": True}

    pipeline = Pipeline("limits").with_stage("a", stubborn, timeout=1).with_stage("b", sleeps(4), after="a", timeout=5)
    results = await pipeline.run()
    assert states(results) == {"a": OK, "b": OK}
    assert times(results) == {"a": (0, 3), "b": (3, 7)}
    assert results.records["a"].after_cancel
    assert not results.records["b"].after_cancel


async def test_a_failure_though_cancelled_by_its_own_limit_is_that_failure(autojump_clock: MockClock) -> None:
    async def cleans_up_badly(ctx: StageContext) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ERROR

    with pytest.raises(StageExecutionError) as caught:
        await Pipeline("limits").with_stage("a", cleans_up_badly, timeout=1).run()
    assert caught.value.original is ERROR
    assert not isinstance(caught.value, StageTimeoutError)


# Turns


class Turns:
    """Counts the turns that a task beside a run gets."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


async def turns_beside(body: Callable[[], Awaitable[Any]]) -> int:
    """Runs something, and gives the number of turns that another task gets meanwhile."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.take)
        await body()
        nursery.cancel_scope.cancel()
    return turns.count


async def test_a_task_beside_a_long_chain_gets_turns_once_per_millisecond(mock_clock: MockClock) -> None:
    async def works(ctx: StageContext) -> None:
        mock_clock.jump(0.0001)  # as if it had computed for that long

    graph = chain(3000, works).build()
    turns = await turns_beside(graph.run)
    assert 3000 // 11 <= turns <= 3000 // 9


async def test_a_task_beside_a_long_chain_gets_turns_by_the_real_clock() -> None:
    assert await turns_beside(chain(3000).build().run) >= 3


async def test_a_chain_without_a_checkpoint_of_its_own_is_cancelled_between_two_stages(mock_clock: MockClock) -> None:
    async def works(ctx: StageContext) -> None:
        mock_clock.jump(0.0001)

    ended = await end(chain(5000, works), within=0.1)
    assert ended.caught
    assert ended.results.status is RunStatus.INTERRUPTED
    assert 990 <= len(ended.results) <= 1020
    assert set(states(ended.results).values()) == {OK, SKIPPED}


async def test_a_chain_is_cancelled_by_its_own_stage_before_the_next_one_starts() -> None:
    async def cancels(ctx: StageContext) -> None:
        handle[0].cancel("from within")

    handle: list[Run] = []
    witness = Witness()
    pipeline = Pipeline("own").with_stage("a", cancels).with_stage("b", witness.of(gives()), after="a")
    with pytest.raises(UnifiedPipelineCancelled) as caught:
        async with pipeline.build().open() as run:
            handle.append(run)
    assert witness.entered == []
    assert states(caught.value.results) == {"a": OK, "b": SKIPPED}
    assert caught.value.results.records["a"].after_cancel


async def test_a_run_whose_scope_is_cancelled_already_starts_nothing() -> None:
    witness = Witness()
    ended = await end(diamond(a=witness.of(gives())), within=0)
    assert ended.caught
    assert witness.entered == []
    assert set(states(ended.results).values()) == {SKIPPED}
    with trio.CancelScope() as scope:
        scope.cancel()
        await diamond(a=witness.of(gives())).run()
    assert scope.cancelled_caught
    assert witness.entered == []


async def test_graph_run_is_the_same_as_opening_and_waiting(autojump_clock: MockClock) -> None:
    for body in (sleeps(1), sleeps(1, ERROR), returns(StageOutput.cancel("enough")), raises(ERROR)):
        graph = diamond(b=body).build()
        one, other = await results_of(graph), (await end(graph)).results
        assert states(one) == states(other)
        assert causes(one) == causes(other)
        assert dict(one) == dict(other)
        assert one.run_id != other.run_id


async def test_a_wide_run_holds_as_many_branches_at_once(autojump_clock: MockClock) -> None:
    results = await fan(100, sleeps(1)).run()
    assert duration(results) == 1
