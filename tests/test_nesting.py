"""Pipelines within stages: what the run around has of them on every ending, and what they have of it."""

from __future__ import annotations

import math
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from stageflow import (
    Artifact,
    CauseKind,
    ContextSnapshot,
    DefinitionError,
    MaxDepthError,
    Pipeline,
    PipelineContext,
    PipelineResults,
    Retry,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    UnknownStageError,
    run_stage,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    RUNNING,
    SKIPPED,
    assert_whole,
    causes,
    duration,
    end,
    gives,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stageflow.stages import Body

ERROR = ValueError("no such page")


def child_of(body: Body) -> Pipeline:
    """first → second → third, of which the second does this."""
    return (
        Pipeline("child")
        .with_stage("first", gives(x=1))
        .with_stage("second", body, after="first")
        .with_stage("third", gives(), after="second")
    )


def runs(child: Pipeline, *args: Any, **kwargs: Any) -> Body:
    """A stage that runs a pipeline, and gives what its stages gave."""

    async def body(ctx: StageContext) -> dict[str, Any]:
        results = await ctx.run_pipeline(child, *args, **kwargs)
        return {name: output.data for name, output in results.items()}

    return body


def as_a_stage(child: Pipeline, **options: Any) -> Pipeline:
    return Pipeline("parent").with_stage("nest", child, **options)


def by_hand(child: Pipeline, **options: Any) -> Pipeline:
    return Pipeline("parent").with_stage("nest", runs(child), **options)


BOTH_WAYS = pytest.mark.parametrize("nest", [as_a_stage, by_hand])


def child_results(results: PipelineResults, name: str = "nest") -> PipelineResults:
    """The results of the one child of a stage, wherever they are to be found."""
    (found,) = results.children[name]
    assert [id(each) for each in results.records[name].details.children] == [id(found)]
    return found


# Endings


@BOTH_WAYS
async def test_the_results_of_a_child_that_ended_well_hang_on_its_stage(nest: Any) -> None:
    results = await nest(child_of(gives(y=2))).run()
    assert results["nest"].data == {"first": {"x": 1}, "second": {"y": 2}, "third": {"by": "third"}}
    found = child_results(results)
    assert found.status is RunStatus.SUCCEEDED
    assert found["second"]["y"] == 2
    assert found.trace.run_id == found.run_id != results.run_id
    assert results.status is RunStatus.SUCCEEDED


@BOTH_WAYS
async def test_a_child_that_fails_fails_its_stage_and_leaves_what_it_had(autojump_clock: MockClock, nest: Any) -> None:
    pipeline = nest(child_of(sleeps(1, ERROR))).with_stage("after", gives(), after="nest")
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    error = caught.value
    assert error.stage == "nest"
    inner = error.original
    assert isinstance(inner, StageExecutionError)
    assert (inner.stage, inner.original) == ("second", ERROR)
    found = child_results(error.results)
    assert inner.results is found or dict(inner.results) == dict(found)
    assert found["first"]["x"] == 1
    assert found.partial == {"second": {"begun": "second"}}
    assert states(found) == {"first": OK, "second": FAILED, "third": SKIPPED}
    assert states(error.results) == {"nest": FAILED, "after": SKIPPED}
    assert "no such page" in str(error)
    assert_whole(found)


@BOTH_WAYS
async def test_a_child_that_is_cancelled_by_one_of_its_stages_leaves_what_it_had(nest: Any) -> None:
    results = await results_of(nest(child_of(returns(StageOutput.cancel("enough")))))
    found = child_results(results)
    assert found.status is RunStatus.CANCELLED
    assert states(found) == {"first": OK, "second": CANCELLED, "third": SKIPPED}
    assert isinstance(results.records["nest"].error, UnifiedPipelineCancelled)
    assert results.records["nest"].state is FAILED


@BOTH_WAYS
async def test_a_child_of_a_minute_ends_with_its_stages_limit_of_five_seconds(
    autojump_clock: MockClock, nest: Any
) -> None:
    with pytest.raises(StageTimeoutError) as caught:
        await nest(child_of(sleeps(60)), timeout=5).run()
    error = caught.value
    assert (error.stage, error.limit, error.elapsed) == ("nest", 5, 5)
    found = child_results(error.results)
    assert found["first"]["x"] == 1
    assert found.status is RunStatus.INTERRUPTED
    assert found.partial == {"second": {"begun": "second"}}
    assert duration(found) == duration(error.results) == 5
    assert causes(found)["second"] == (CauseKind.CALLER, None)
    assert_whole(found)


@BOTH_WAYS
@pytest.mark.parametrize("way", ["scope", "run.cancel", "cancel_branch", "other stage", "deadline", "branch deadline"])
async def test_a_child_that_is_ended_from_outside_leaves_what_it_had(
    autojump_clock: MockClock, nest: Any, way: str
) -> None:
    def act(scope: trio.CancelScope, run: Run) -> None:
        if way == "scope":
            scope.cancel()
        elif way == "run.cancel":
            run.cancel("enough")
        elif way == "cancel_branch":
            run.cancel_branch("nest", "enough")

    pipeline = Pipeline("parent", deadline=1 if way == "deadline" else None).with_stage("root", gives())
    child = child_of(sleeps(60))
    pipeline = pipeline.with_stage("nest", child if nest is as_a_stage else runs(child), after="root", timeout=None)
    pipeline = pipeline.with_stage("other", sleeps(1, ERROR) if way == "other stage" else gives(), after="root")
    if way == "branch deadline":
        pipeline = pipeline.with_branch(of="nest", deadline=1)
    results = (await end(pipeline, act)).results
    assert duration(results) == 1
    assert results.records["nest"].state is CANCELLED
    found = child_results(results)
    assert found.status is RunStatus.INTERRUPTED
    assert dict(found) == {"first": StageOutput.ok(x=1)}
    assert found.partial == {"second": {"begun": "second"}}
    assert duration(found) == 1
    assert_whole(found)


async def test_the_results_of_a_child_are_there_while_it_goes(autojump_clock: MockClock) -> None:
    async with as_a_stage(child_of(sleeps(5))).build().open() as run:
        await trio.sleep(1)
        found = child_results(run.results)
        before = found.status
        assert dict(found) == {"first": StageOutput.ok(x=1)}
        assert states(found)["second"] is RUNNING
        assert found.partial == {"second": {"begun": "second"}}
    assert [before, found.status] == [RunStatus.RUNNING, RunStatus.SUCCEEDED]
    assert child_results(run.results) is found


async def test_what_a_child_gave_in_spite_of_its_cancellation_counts(autojump_clock: MockClock) -> None:
    async def shields(ctx: StageContext) -> StageOutput:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
        return StageOutput.ok(y=2)

    results = await results_of(as_a_stage(child_of(shields), timeout=5))
    found = child_results(results)
    assert found["second"]["y"] == 2
    assert found.records["second"].after_cancel
    assert states(found)["third"] is SKIPPED
    assert duration(results) == 10


async def test_a_stage_may_go_on_after_its_child_has_failed(autojump_clock: MockClock) -> None:
    async def catches(ctx: StageContext) -> dict[str, Any]:
        try:
            await ctx.run_pipeline(child_of(sleeps(1, ERROR)))
        except StageExecutionError as error:
            return {"kept": dict(error.results)["first"].data}
        raise AssertionError

    results = await Pipeline("parent").with_stage("nest", catches).run()
    assert results["nest"]["kept"] == {"x": 1}
    assert child_results(results).status is RunStatus.FAILED
    assert results.status is RunStatus.SUCCEEDED


async def test_a_stage_may_end_its_child_by_a_scope_of_its_own(autojump_clock: MockClock) -> None:
    async def bounds(ctx: StageContext) -> dict[str, Any]:
        with trio.move_on_after(3) as scope:
            await ctx.run_pipeline(child_of(sleeps(60)))
        return {"caught": scope.cancelled_caught}

    results = await Pipeline("parent").with_stage("nest", bounds).run()
    assert results["nest"]["caught"]
    assert duration(results) == 3
    assert child_results(results).status is RunStatus.INTERRUPTED


@BOTH_WAYS
async def test_a_keyboard_interrupt_in_a_child_goes_all_the_way_through(autojump_clock: MockClock, nest: Any) -> None:
    async def interrupts(ctx: StageContext) -> None:
        await trio.sleep(1)
        raise KeyboardInterrupt

    seen: list[PipelineResults] = []
    with pytest.raises(KeyboardInterrupt):
        async with nest(nest(child_of(interrupts))).build().open() as run:
            seen.append(run.results)
    middle = child_results(seen[0])
    found = child_results(middle)
    assert [results.status for results in (seen[0], middle, found)] == [RunStatus.FAILED] * 3
    assert dict(found) == {"first": StageOutput.ok(x=1)}
    for results in (seen[0], middle, found):
        assert_whole(results)


async def test_a_failed_child_can_be_tolerated() -> None:
    pipeline = as_a_stage(child_of(raises(ERROR)), on_failure="tolerate").with_stage(
        "handler", sees(), after="nest", join="settled"
    )
    results = await pipeline.run()
    assert states(results) == {"nest": FAILED, "handler": OK}
    assert child_results(results)["first"]["x"] == 1


async def test_the_failure_of_a_child_three_deep_is_reached_step_by_step_from_the_error() -> None:
    pipeline = as_a_stage(as_a_stage(as_a_stage(child_of(raises(ERROR)))))
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run()
    error: Any = caught.value
    results = error.results
    for _ in range(3):
        error, results = error.original, child_results(results)
        assert dict(error.results) == dict(results)
    assert error.original is ERROR
    assert results["first"]["x"] == 1


# Several children, and several attempts


async def test_the_children_of_a_stage_are_kept_in_order(autojump_clock: MockClock) -> None:
    async def runs_three(ctx: StageContext) -> dict[str, Any]:
        for number in range(3):
            await ctx.run_pipeline(Pipeline(f"child {number}").with_stage("a", gives(n=number)))
        return {}

    results = await Pipeline("parent").with_stage("nest", runs_three).run()
    assert [child["a"]["n"] for child in results.children["nest"]] == [0, 1, 2]
    assert len({child.run_id for child in results.children["nest"]}) == 3


async def test_children_run_beside_each_other_if_the_stage_has_a_nursery(autojump_clock: MockClock) -> None:
    async def runs_three(ctx: StageContext) -> dict[str, Any]:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ctx.run_pipeline, child_of(sleeps(1 + number)))
        return {}

    results = await Pipeline("parent").with_stage("nest", runs_three).run()
    assert duration(results) == 3
    assert sorted(duration(child) for child in results.children["nest"]) == [1, 2, 3]


async def test_a_stage_that_is_tried_again_keeps_the_children_of_every_attempt(autojump_clock: MockClock) -> None:
    tries: list[int] = []

    async def fails_at_first(ctx: StageContext) -> StageOutput:
        tries.append(1)
        await trio.sleep(1)
        return StageOutput.fail("not yet") if len(tries) == 1 else StageOutput.ok(y=2)

    results = await as_a_stage(child_of(fails_at_first), retry=Retry(attempts=3, delay=1)).run()
    assert [child.status for child in results.children["nest"]] == [RunStatus.FAILED, RunStatus.SUCCEEDED]
    assert results["nest"]["second"] == {"y": 2}
    assert duration(results) == 3


async def test_a_limit_on_the_attempt_ends_each_child_and_all_are_kept(autojump_clock: MockClock) -> None:
    with pytest.raises(StageTimeoutError) as caught:
        await as_a_stage(child_of(sleeps(60)), timeout=5, retry=Retry(attempts=3)).run()
    children = caught.value.results.children["nest"]
    assert [child.status for child in children] == [RunStatus.INTERRUPTED] * 3
    assert [child["first"]["x"] for child in children] == [1, 1, 1]
    assert [duration(child) for child in children] == [5, 5, 5]


async def test_a_graph_is_as_good_a_child_as_its_pipeline() -> None:
    graph = child_of(gives(y=2)).build()

    async def nests(ctx: StageContext) -> dict[str, Any]:
        return {"y": (await ctx.run_pipeline(graph))["second"]["y"]}

    results = await Pipeline("parent").with_stage("nest", nests).run()
    assert results["nest"]["y"] == 2


async def test_one_pipeline_may_be_several_stages() -> None:
    child = Pipeline("child").with_stage("a", gives(x=1))
    results = await Pipeline("parent").with_stage("one", child).with_stage("two", child, after="one").run()
    assert {name: output.data for name, output in results.items()} == {"one": {"a": {"x": 1}}, "two": {"a": {"x": 1}}}


async def test_a_pipeline_as_a_stage_finds_the_inputs_of_the_stage_in_its_data() -> None:
    async def adds(ctx: StageContext) -> dict[str, Any]:
        return {"sum": ctx.data["a"]["x"] + ctx.data["b"]["x"]}

    pipeline = (
        Pipeline("parent")
        .with_stage("a", gives(x=1))
        .with_stage("b", gives(x=2))
        .with_stage("nest", Pipeline("child").with_stage("add", adds), after=["a", "b"])
    )
    assert (await pipeline.run())["nest"]["add"] == {"sum": 3}


async def test_a_graph_is_as_good_a_stage_as_its_pipeline() -> None:
    results = await Pipeline("parent").with_stage("nest", child_of(gives(y=2)).build()).run()
    assert results["nest"]["second"] == {"y": 2}


def test_a_pipeline_as_a_stage_is_proven_where_it_is_declared() -> None:
    broken = Pipeline("broken").with_stage("a", gives(), after="nowhere")
    with pytest.raises(UnknownStageError):
        as_a_stage(broken)
    with pytest.raises(UnknownStageError):
        Pipeline("parent").with_map("nest", broken, over="x")
    with pytest.raises(DefinitionError):
        as_a_stage(Pipeline("empty"))


async def test_results_pickle_with_those_of_children() -> None:
    results = await results_of(as_a_stage(as_a_stage(child_of(raises(ERROR)))))
    copy = pickle.loads(pickle.dumps(results))
    assert dict(child_results(child_results(copy))) == {"first": StageOutput.ok(x=1)}


async def test_a_child_that_cannot_be_built_fails_its_stage() -> None:
    broken = Pipeline("broken").with_stage("a", gives(), after="nowhere")
    with pytest.raises(StageExecutionError) as caught:
        await by_hand(broken).run()
    assert isinstance(caught.value.original, UnknownStageError)
    assert caught.value.results.children == {}


def test_a_pipeline_without_a_name_for_its_stage_is_refused() -> None:
    with pytest.raises(DefinitionError):
        Pipeline("parent").with_stage(cast("Any", child_of(gives())))


# Identity and contexts


def looks(seen: list[Any]) -> Body:
    async def body(ctx: StageContext) -> None:
        seen.append(ctx)

    return body


async def test_a_child_inherits_who_it_is_for_and_nothing_else() -> None:
    seen: list[StageContext] = []
    child = Pipeline("child").with_stage("a", looks(seen))
    pipeline = Pipeline("parent").with_stage("a", looks(seen)).with_stage("nest", runs(child), after="a")
    context = PipelineContext(
        run_id="r-1",
        correlation_id="c-1",
        tenant="acme",
        data={"x": 1},
        snapshot=ContextSnapshot({"y": 2}),
        metadata={"z": 3},
        artifacts=[Artifact(name="given")],
    )
    await pipeline.run(context)
    outer, inner = seen
    assert outer.run_id == "r-1" != inner.run_id
    assert (inner.correlation_id, inner.tenant) == ("c-1", "acme")
    assert (inner.data, inner.snapshot, inner.metadata, inner.artifacts) == ({}, ContextSnapshot(), {}, ())
    assert inner.idempotency_key != outer.idempotency_key


async def test_the_correlation_of_a_child_is_the_run_id_of_the_outermost_run_if_nothing_was_said() -> None:
    seen: list[StageContext] = []
    results = await as_a_stage(as_a_stage(Pipeline("child").with_stage("a", looks(seen)))).run()
    assert seen[0].correlation_id == results.run_id


async def test_a_child_has_what_was_handed_down_to_it() -> None:
    seen: list[StageContext] = []
    snapshot = ContextSnapshot({"y": 2})
    child = Pipeline("child").with_stage("a", looks(seen))
    await Pipeline("parent").with_stage("nest", runs(child, [1], snapshot=snapshot, metadata={"z": 3})).run()
    assert (seen[0].data, seen[0].metadata) == ([1], {"z": 3})
    assert seen[0].snapshot is snapshot


async def test_a_child_may_be_given_limits_on_its_stages(autojump_clock: MockClock) -> None:
    results = await results_of(
        Pipeline("parent").with_stage("nest", runs(child_of(sleeps(60)), timeouts={"second": 2}), timeout=None)
    )
    error = results.records["nest"].error
    assert isinstance(error, StageTimeoutError)
    assert (error.stage, error.limit) == ("second", 2)
    assert "timeouts=" in error.source
    assert duration(results) == 2


async def test_limits_on_stages_that_the_child_has_not_fail_the_stage_with_a_hint() -> None:
    results = await results_of(Pipeline("parent").with_stage("nest", runs(child_of(gives()), timeouts={"secnd": 2})))
    error = results.records["nest"].error
    assert isinstance(error, UnknownStageError)
    assert error.suggestions == ("second",)


async def test_the_limits_a_run_sets_on_its_stages_are_not_for_its_children(autojump_clock: MockClock) -> None:
    results = await as_a_stage(Pipeline("child").with_stage("nest", sleeps(9))).run(
        PipelineContext(timeouts={"nest": 10})
    )
    assert results["nest"]["nest"] == {"by": "nest"}


ALIKE = (
    "artifacts",
    "attempt",
    "branch",
    "cancel_reason",
    "cancelled",
    "data",
    "feedback",
    "inputs",
    "metadata",
    "snapshot",
    "stage",
    "tenant",
)


async def test_contexts_are_alike_at_every_depth(autojump_clock: MockClock) -> None:
    seen: list[dict[str, Any]] = []

    async def notes(ctx: StageContext) -> None:
        await trio.sleep(1)
        seen.append({name: getattr(ctx, name) for name in ALIKE})
        seen[-1] |= {name: getattr(ctx.timer, name) for name in ("stage_elapsed", "elapsed", "remaining")}
        assert isinstance(ctx.nursery, trio.Nursery)

    leaf = Pipeline("leaf").with_stage("notes", notes, timeout=4)
    context = PipelineContext(tenant="acme")
    await run_stage(notes, context, timeout=4)
    await leaf.run(context)
    await as_a_stage(leaf).run(context)
    await as_a_stage(as_a_stage(leaf)).run(context)
    assert len(seen) == 4
    assert seen[1:] == seen[:1] * 3
    assert seen[0]["stage_elapsed"] == seen[0]["elapsed"] == 1
    assert seen[0]["remaining"] == 3


async def test_the_deadline_of_a_child_is_the_nearest_of_all_around_it(autojump_clock: MockClock) -> None:
    seen: list[float] = []

    async def notes(ctx: StageContext) -> None:
        seen.append(ctx.deadline - trio.current_time())

    leaf = Pipeline("leaf", default_timeout=None).with_stage("notes", notes)
    await leaf.run()
    await as_a_stage(leaf).run()
    await as_a_stage(leaf, timeout=5).run()
    await as_a_stage(as_a_stage(leaf, timeout=9), timeout=5).run()
    await as_a_stage(as_a_stage(leaf, timeout=5), timeout=9).run()
    assert seen == [math.inf, math.inf, 5, 5, 5]


async def test_a_pipeline_as_a_stage_has_no_limit_but_what_is_declared(autojump_clock: MockClock) -> None:
    slow = Pipeline("slow", default_timeout=None).with_stage("a", sleeps(1000))
    pipeline = Pipeline("parent", default_timeout=2)
    assert duration(await pipeline.with_stage("nest", slow).run()) == 1000
    assert duration(await results_of(pipeline.with_stage("nest", slow, timeout=3))) == 3
    # Of a function nobody can tell that it will run a pipeline.
    assert duration(await results_of(pipeline.with_stage("nest", runs(slow)))) == 2


async def test_a_child_reached_by_its_own_deadline_fails_its_stage(autojump_clock: MockClock) -> None:
    child = Pipeline("child", deadline=3).with_stage("a", gives(x=1)).with_stage("b", sleeps(9), after="a")
    results = await results_of(as_a_stage(child))
    error = results.records["nest"].error
    assert isinstance(error, StageTimeoutError)
    assert (error.stage, error.limit) == ("b", 3)
    assert results.records["nest"].state is FAILED
    assert child_results(results)["a"]["x"] == 1


async def test_the_deadline_of_a_child_holds_although_the_nearer_limit_around_it_is_extended(
    autojump_clock: MockClock,
) -> None:
    child = Pipeline("child", deadline=10, default_timeout=None).with_stage("a", sleeps(60))

    async def extends(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.run_pipeline, child)
            await trio.sleep(1)
            ctx.timer.extend(20)

    results = await results_of(Pipeline("parent").with_stage("nest", extends, timeout=5))
    assert duration(results) == 10


# Depth


def nested(depth: int, leaf: Pipeline) -> Pipeline:
    for _ in range(depth):
        leaf = as_a_stage(leaf)
    return leaf


async def test_runs_may_be_nested_sixteen_deep_and_no_deeper() -> None:
    seen: list[StageContext] = []
    await nested(16, Pipeline("leaf").with_stage("a", looks(seen))).run()
    assert len(seen) == 1
    with pytest.raises(StageExecutionError) as caught:
        await nested(17, Pipeline("leaf").with_stage("a", looks(seen))).run()
    assert len(seen) == 1
    error: Any = caught.value
    while isinstance(error, StageExecutionError):
        error = error.original
    assert isinstance(error, MaxDepthError)
    assert error.depth == 17
    assert "nested 16 deep" in str(error)


async def test_a_pipeline_that_runs_itself_ends_with_that_error() -> None:
    async def again(ctx: StageContext) -> None:
        await ctx.run_pipeline(pipeline)

    pipeline = Pipeline("ouroboros").with_stage("a", again)
    with pytest.raises(StageExecutionError, match="MaxDepthError"):
        await pipeline.run()


async def test_the_items_of_a_map_count_as_a_depth_too() -> None:
    async def again(ctx: StageContext) -> None:
        await ctx.run_pipeline(pipeline)

    pipeline = Pipeline("ouroboros").with_map("m", again, over=lambda _: [1])
    with pytest.raises(StageExecutionError, match="MaxDepthError"):
        await pipeline.run()


async def test_siblings_do_not_add_to_the_depth() -> None:
    async def runs_forty(ctx: StageContext) -> None:
        for _ in range(40):
            await ctx.run_pipeline(Pipeline("leaf").with_stage("a", gives()))

    results = await Pipeline("parent").with_stage("nest", runs_forty).run()
    assert len(results.children["nest"]) == 40


# At every step


async def test_a_cancellation_at_any_step_loses_nothing_that_a_child_had_finished(autojump_clock: MockClock) -> None:
    graph = as_a_stage(child_of(sleeps(1))).with_stage("end", gives(), after="nest").build()
    ends: list[RunStatus] = []
    for step in range(1, 40):
        taken = 0

        class Cancels(trio.abc.Instrument):
            def __init__(self, scope: trio.CancelScope, step: int) -> None:
                self.scope, self.step = scope, step

            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                nonlocal taken
                taken += 1
                if taken == self.step:
                    self.scope.cancel()

        run: Run | None = None
        with trio.CancelScope() as scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
            instrument = Cancels(scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with graph.open() as run:
                    pass
            finally:
                trio.lowlevel.remove_instrument(instrument)
        assert run is not None
        assert_whole(run.results)
        for child in run.results.children.get("nest", ()):
            assert_whole(child)
            assert child.status is not RunStatus.RUNNING
            if "third" in child:
                assert set(child) == {"first", "second", "third"}
            if "nest" in run.results:
                assert child.status is RunStatus.SUCCEEDED
        ends.append(run.results.status)
    assert ends[0] is RunStatus.INTERRUPTED
    assert ends[-1] is RunStatus.SUCCEEDED


async def test_a_child_that_succeeded_in_part_makes_its_parent_so_too(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", returns(StageOutput.skip("nothing to do")))
    results = await Pipeline("parent").with_stage("n", child).run()
    assert (results.records["n"].state, results.status) == (OK, RunStatus.PARTIAL)


async def test_a_retry_looks_at_what_ended_the_child(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", raises(ValueError("no")))
    for on, attempts in ((ValueError, 3), (OSError, 1)):
        with pytest.raises(StageExecutionError) as caught:
            await Pipeline("parent").with_stage("n", child, retry=Retry(attempts=3, on=on)).run()
        assert caught.value.results.records["n"].attempts == attempts


async def test_what_is_done_again_within_a_stage_has_the_same_keys_of_idempotency(autojump_clock: MockClock) -> None:
    keys: list[str] = []

    async def charge(ctx: StageContext) -> None:
        keys.append(ctx.idempotency_key)
        if len(keys) <= 2:
            raise OSError("no answer")

    child = Pipeline("child").with_stage("charge", charge)

    async def twice(ctx: StageContext) -> None:
        for _ in range(2):
            with suppress(StageExecutionError):
                await ctx.run_pipeline(child)
        if len(keys) <= 2:
            raise OSError("no answer")

    await Pipeline("parent").with_stage("n", twice, retry=Retry(attempts=2)).run()
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]
