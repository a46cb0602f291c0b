"""What a stage sees and can do: identity, data, inputs, time, partial output, artifacts, the branch's nursery."""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stageflow import (
    Artifact,
    CauseKind,
    Context,
    ContextSnapshot,
    FrozenDict,
    FrozenList,
    MissingOutputError,
    Pipeline,
    PipelineContext,
    PipelineResults,
    PipelineTimer,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
    StageStatus,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    run_stage,
)
from stageflow.context.ids import new_run_id
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    assert_whole,
    causes,
    chain,
    duration,
    end,
    gives,
    leaves,
    results_of,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

    from stageflow.stages import Body

ERROR = ValueError("no such page")
INTERFACE = sorted(name for name in dir(Context) if not name.startswith("_"))


async def inside(
    look: Callable[[StageContext], Any], ctx: PipelineContext | None = None, **options: Any
) -> list[tuple[Any, StageOutput]]:
    """What a stage sees, alone and in a graph: what `look` gave, and the output."""
    seen: list[Any] = []

    async def body(ctx: StageContext) -> dict[str, object]:
        seen.append(look(ctx))
        return {"done": True}

    alone = await run_stage(body, ctx, **options)
    pipeline = Pipeline("graph").with_stage("a", gives()).with_stage("body", body, after="a", **options)
    results = await pipeline.with_stage("beside", gives(), after="a").run(ctx)
    assert len(seen) == 2
    return [(seen[0], alone), (seen[1], results["body"])]


# One interface


def test_the_interface_is_what_it_says() -> None:
    assert INTERFACE == [
        "artifacts",
        "cancel_reason",
        "cancelled",
        "correlation_id",
        "data",
        "deadline",
        "metadata",
        "run_id",
        "snapshot",
        "tenant",
        "timer",
    ]


async def test_description_and_stage_context_both_have_all_of_the_interface() -> None:
    described = PipelineContext(
        run_id="r1",
        correlation_id="c1",
        tenant="t1",
        data={"a": [1]},
        snapshot=ContextSnapshot({"messages": ["hello"]}),
        artifacts=(Artifact(name="map"),),
        metadata={"m": {1, 2}},
    )

    def look(ctx: Context) -> dict[str, Any]:
        assert isinstance(ctx, Context)
        return {name: getattr(ctx, name) for name in INTERFACE}

    for seen, _ in await inside(look, described):
        expected = look(described)
        assert isinstance(seen.pop("timer"), PipelineTimer)
        assert isinstance(expected.pop("timer"), PipelineTimer)
        assert seen.pop("deadline") < expected.pop("deadline") == math.inf
        assert seen == expected


async def test_a_stage_sees_the_same_alone_and_in_a_graph(autojump_clock: MockClock) -> None:
    def look(ctx: StageContext) -> dict[str, Any]:
        public = [name for name in dir(ctx) if not name.startswith("_")]
        timer = ctx.timer
        return {
            "public": public,
            "types": [type(getattr(ctx, name)) for name in public],
            "stage": ctx.stage,
            "attempt": ctx.attempt,
            "times": (timer.elapsed, timer.stage_elapsed, timer.remaining, ctx.deadline - trio.current_time()),
            "cancelled": (ctx.cancelled, ctx.cancel_reason),
            "data": ctx.data,
        }

    alone, graph = await inside(look, PipelineContext(data={"a": 1}), timeout=2.5)
    assert alone == graph
    assert alone[0]["times"] == (0, 0, 2.5, 2.5)


async def test_a_stage_alone_gets_its_inputs_and_gives_what_it_returned() -> None:
    async def total(ctx: StageContext) -> dict[str, object]:
        assert ctx.inputs["empty"].data == {}
        return {"total": sum(ctx.inputs["fetch"]["rows"])}

    inputs: dict[str, StageOutput | dict[str, Any]] = {"fetch": {"rows": [1, 2]}, "empty": StageOutput.ok()}
    assert await run_stage(total, inputs=inputs) == StageOutput.ok(total=3)


@pytest.mark.parametrize(
    "output", [StageOutput.skip("nothing new"), StageOutput.cancel_branch("hopeless"), StageOutput.ok(1)]
)
async def test_a_stage_alone_gives_what_it_said(output: StageOutput) -> None:
    async def says(ctx: StageContext) -> StageOutput:
        return output

    assert await run_stage(says) == output


async def test_a_stage_alone_ends_like_a_run() -> None:
    with pytest.raises(StageExecutionError, match="no such page"):
        await run_stage(sleeps(0, ERROR))
    with pytest.raises(UnifiedPipelineCancelled, match="enough"):
        await run_stage(sleeps(0, StageOutput.cancel("enough")))
    tolerated = await run_stage(sleeps(0, ERROR), on_failure="tolerate")
    assert (tolerated.status, tolerated.error) == (StageStatus.FAIL, ERROR)
    skipped = await run_stage(gives(), when=lambda ctx: False)
    assert skipped.status is StageStatus.SKIP


# Identity


def test_a_hundred_thousand_run_ids_are_unique_and_sort_as_they_were_drawn() -> None:
    ids = [new_run_id() for _ in range(100_000)]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == ids
    for drawn in ids[::1000]:
        parsed = uuid.UUID(drawn)
        assert str(parsed) == drawn
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


async def test_a_description_serves_many_runs_each_with_an_id_of_its_own() -> None:
    described = PipelineContext(data={"a": 1})
    graph = chain(1).build()
    ids = [(await graph.run(described)).run_id for _ in range(5)]
    assert sorted(set(ids)) == ids
    assert described.run_id is None
    named = PipelineContext(run_id="mine")
    assert (await graph.run(named)).run_id == "mine"


async def test_the_correlation_id_is_the_runs_id_unless_something_else_was_said() -> None:
    for (correlation, run), _ in await inside(lambda ctx: (ctx.correlation_id, ctx.run_id)):
        assert correlation == run
    described = PipelineContext(correlation_id="c1")
    for (correlation, run), _ in await inside(lambda ctx: (ctx.correlation_id, ctx.run_id), described):
        assert correlation == "c1" != run


async def test_an_idempotency_key_is_of_tenant_pipeline_run_and_stage() -> None:
    async def keys(pipeline: str, **description: Any) -> dict[str, str]:
        async def key(ctx: StageContext) -> dict[str, object]:
            assert ctx.idempotency_key == ctx.idempotency_key
            return {"key": ctx.idempotency_key}

        graph = Pipeline(pipeline).with_stage("a", key).with_stage("b", key, after="a").build()
        results = await graph.run(PipelineContext(**description))
        return {name: output["key"] for name, output in results.items()}

    first = await keys("p", run_id="r", tenant="t")
    assert await keys("p", run_id="r", tenant="t") == first
    others = [
        first,
        await keys("q", run_id="r", tenant="t"),
        await keys("p", run_id="s", tenant="t"),
        await keys("p", run_id="r", tenant="u"),
        await keys("p", run_id="r"),
    ]
    assert len({key for found in others for key in found.values()}) == 10
    assert all(uuid.UUID(key).version == 5 for key in first.values())


# Data


async def test_data_is_deeply_immutable_and_the_original_stays_the_callers() -> None:
    original: dict[str, Any] = {"rows": [{"x": 1}], "names": {"a", "b"}, "pair": ([1], 2)}

    def look(ctx: StageContext) -> Any:
        data = ctx.data
        assert data == original
        inside = [data, data["rows"], data["rows"][0], data["names"], data["pair"][0]]
        assert list(map(type, inside)) == [FrozenDict, FrozenList, FrozenDict, frozenset, FrozenList]
        with pytest.raises(TypeError, match="immutable"):
            data["rows"][0]["x"] = 2
        with pytest.raises(TypeError, match="immutable"):
            data["rows"].append(2)
        return data

    described = PipelineContext(data=original, metadata=original)
    original["rows"].append("later")
    original["rows"].pop()
    assert [seen for seen, _ in await inside(look, described)] == [original, original]
    original["rows"].append("the caller's own")
    assert described.data != original
    assert described.metadata == described.data


async def test_data_may_be_a_mapping_an_object_or_nothing() -> None:
    async def data(ctx: StageContext) -> dict[str, object]:
        return {"data": ctx.data}

    graph = Pipeline("data").with_stage("a", data).build()
    thing = object()
    assert (await graph.run({"x": 1}))["a"]["data"] == {"x": 1}
    assert (await graph.run())["a"]["data"] == {}
    assert (await graph.run(PipelineContext(data=thing)))["a"]["data"] is thing
    with pytest.raises(TypeError, match="a PipelineContext, a mapping"):
        await graph.run(42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_description_is_frozen() -> None:
    described = PipelineContext(data={"a": 1})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        described.tenant = "t"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="run_id"):
        PipelineContext(run_id=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert attrs.evolve(described, tenant="t") == PipelineContext(data={"a": 1}, tenant="t")


def test_a_snapshot_knows_its_past() -> None:
    first = ContextSnapshot({"messages": ["hello"], "user": {"name": "ada"}})
    second = first.evolve(messages=[*first["messages"], "goodbye"])
    third = second.evolve(mood="glad")
    assert [snapshot.version for snapshot in (first, second, third)] == [0, 1, 2]
    assert third.parent is second
    assert second.parent is first
    assert first.parent is None
    assert first == ContextSnapshot({"messages": ["hello"], "user": {"name": "ada"}})
    assert third == {"messages": ["hello", "goodbye"], "user": {"name": "ada"}, "mood": "glad"}
    assert third["user"] is first["user"]
    assert second != first
    with pytest.raises(TypeError, match="immutable"):
        first["messages"].append("no")


# Inputs


async def test_an_input_that_is_not_there_says_why() -> None:
    messages: dict[str, str] = {}

    async def asks(ctx: StageContext) -> None:
        for name in ("skipped", "beside", "nobody"):
            with pytest.raises(MissingOutputError) as caught:
                ctx.inputs[name]
            messages[name] = str(caught.value)
            assert caught.value.stage == name
            assert name not in ctx.inputs
            assert ctx.inputs.get(name) is None

    pipeline = (
        Pipeline("missing")
        .with_stage("skipped", sleeps(0, StageOutput.skip("nothing new")))
        .with_stage("fine", gives(x=1))
        .with_stage("beside", gives())
        .with_stage("asks", asks, after=["skipped", "fine"], join="settled")
    )
    results = await pipeline.run()
    assert (
        messages["skipped"] == "there is no output of 'skipped': the stage was skipped (skip of 'skipped': nothing new)"
    )
    assert messages["beside"] == (
        "there is no output of 'beside': 'asks' does not come after it; add it to after= of 'asks'"
    )
    assert messages["nobody"] == "there is no output of 'nobody': no stage of this run has that name"
    with pytest.raises(MissingOutputError) as caught:
        results["skipped"]
    assert str(caught.value) == messages["skipped"]
    assert caught.value.state is StageState.SKIPPED
    with pytest.raises(KeyError):
        results.require("nobody")
    assert results.require("fine") is results["fine"]


async def test_the_output_of_a_stage_still_running_is_missing_for_that_reason(autojump_clock: MockClock) -> None:
    async with chain(2, sleeps(2)).build().open() as run:
        await trio.sleep(1)
        with pytest.raises(MissingOutputError, match="'s0': the stage is still running"):
            run.results["s0"]
        with pytest.raises(MissingOutputError, match="'s1': the stage has not started"):
            run.results["s1"]


# Time


async def test_the_timer_is_exact(autojump_clock: MockClock) -> None:
    seen: list[tuple[float, float, float, float]] = []

    async def look(ctx: StageContext) -> None:
        for _ in range(2):
            timer = ctx.timer
            seen.append((timer.elapsed, timer.stage_elapsed, timer.remaining, timer.deadline))
            assert timer.deadline == ctx.deadline
            await trio.sleep(1)

    begun = trio.current_time()
    pipeline = (
        Pipeline("timed", default_timeout=10)
        .with_stage("a", look)
        .with_stage("b", look, after="a", timeout=5)
        .with_stage("c", look, after="b", timeout=None)
    )
    await pipeline.run()
    assert seen == [
        (0, 0, 10, begun + 10),
        (1, 1, 9, begun + 10),
        (2, 0, 5, begun + 7),
        (3, 1, 4, begun + 7),
        (4, 0, math.inf, math.inf),
        (5, 1, math.inf, math.inf),
    ]


async def test_the_nearest_limit_counts_whether_a_stages_own_or_the_callers(autojump_clock: MockClock) -> None:
    async def remaining(ctx: StageContext) -> dict[str, object]:
        return {"remaining": ctx.timer.remaining}

    graph = Pipeline("near").with_stage("a", remaining, timeout=5).with_stage("b", remaining, timeout=1).build()
    with trio.fail_after(3):
        results = await graph.run()
    assert {name: output["remaining"] for name, output in results.items()} == {"a": 3, "b": 1}


@pytest.mark.parametrize("before", [5, None, 0.25])
async def test_a_limit_of_zero_leaves_no_time(autojump_clock: MockClock, before: float | None) -> None:
    async def remaining(ctx: StageContext) -> dict[str, object]:
        return {"remaining": ctx.timer.remaining}

    pipeline = Pipeline("none").with_stage("a", gives(), timeout=before)
    results = await pipeline.with_stage("b", remaining, after="a", timeout=0).run()
    assert results["b"]["remaining"] == 0


async def test_the_default_timeout_is_thirty_seconds_and_ends_with_the_stage(autojump_clock: MockClock) -> None:
    results = await results_of(chain(3, sleeps(29)))
    assert results.status is RunStatus.SUCCEEDED
    results = await results_of(chain(1, sleeps(31)))
    assert duration(results) == 30
    assert causes(results)["s0"][0] is CauseKind.TIMEOUT


async def test_extending_moves_the_limit_of_this_attempt_and_no_other(autojump_clock: MockClock) -> None:
    async def takes_longer(ctx: StageContext) -> None:
        await trio.sleep(1)
        ctx.timer.extend(2)
        assert ctx.timer.remaining == 3
        ctx.timer.extend(0.5)
        assert ctx.deadline == trio.current_time() + 3.5
        await trio.sleep(10)

    async def fits(ctx: StageContext) -> None:
        ctx.timer.extend(9)
        await trio.sleep(10)

    pipeline = (
        Pipeline("extended", default_timeout=2)
        .with_stage("a", fits)
        .with_stage("b", takes_longer, after="a")
        .with_stage("c", gives(), after="b")
    )
    with pytest.raises(StageTimeoutError) as caught:
        await pipeline.run()
    assert caught.value.stage == "b"
    assert caught.value.limit == 4.5
    assert caught.value.elapsed == 4.5
    assert times(caught.value.results)["b"] == (10, 14.5)


async def test_extending_does_not_move_the_limits_around_the_run(autojump_clock: MockClock) -> None:
    async def extends(ctx: StageContext) -> None:
        ctx.timer.extend(100)
        assert ctx.timer.remaining == 3
        await trio.sleep(50)

    ended = await end(Pipeline("outer").with_stage("a", extends, timeout=1), within=3)
    assert ended.caught
    assert times(ended.results)["a"] == (0, 3)


async def test_extending_what_has_no_limit_changes_nothing(autojump_clock: MockClock) -> None:
    async def extends(ctx: StageContext) -> None:
        ctx.timer.extend(1)
        assert ctx.timer.remaining == math.inf

    await Pipeline("free").with_stage("a", extends, timeout=None).run()


async def test_only_a_running_stage_can_be_given_more_time() -> None:
    kept: list[StageContext] = []

    async def keeps(ctx: StageContext) -> None:
        for wrong in (-1, math.nan):
            with pytest.raises(ValueError, match="zero or more"):
                ctx.timer.extend(wrong)
        kept.append(ctx)

    await chain(2, keeps).run()
    for ctx in kept:
        with pytest.raises(RuntimeError, match=f"'{ctx.stage}' has ended"):
            ctx.timer.extend(1)
    timer = PipelineContext().timer
    with pytest.raises(RuntimeError, match="no running stage"):
        timer.extend(1)
    assert (timer.elapsed, timer.stage_elapsed, timer.remaining, timer.deadline) == (0, 0, math.inf, math.inf)


# Partial output and artifacts


@pytest.mark.parametrize(
    ("then", "state"),
    [
        (None, OK),
        (ERROR, FAILED),
        (StageOutput.skip("nothing new"), SKIPPED),
        (StageOutput.cancel("enough"), CANCELLED),
        (StageOutput.cancel_branch("hopeless"), CANCELLED),
    ],
)
async def test_partial_output_is_kept_whatever_becomes_of_the_stage(
    then: StageOutput | Exception | None, state: StageState
) -> None:
    async def saves(ctx: StageContext) -> StageOutput:
        ctx.save_partial(page=1, rows=[1])
        ctx.save_partial(page=2)
        if isinstance(then, Exception):
            raise then
        return then or StageOutput.ok()

    results = await results_of(Pipeline("partial").with_stage("a", saves))
    record = results.records["a"]
    assert record.state is state
    assert record.partial == {"page": 2, "rows": [1]}
    assert isinstance(record.partial["rows"], FrozenList)
    assert results.partial == ({} if state is OK else {"a": record.partial})


async def test_the_fields_of_a_fail_are_partial_output() -> None:
    async def fails(ctx: StageContext) -> StageOutput:
        ctx.save_partial(page=1, rows=[1])
        return StageOutput.fail("broken", recoverable=True, page=2, last="x")

    results = await results_of(Pipeline("partial").with_stage("a", fails))
    assert results.partial == {"a": {"page": 2, "rows": [1], "last": "x"}}
    assert results.records["a"].recoverable


async def test_a_stage_that_has_ended_saves_nothing_and_lends_nothing() -> None:
    kept: list[StageContext] = []

    async def keeps(ctx: StageContext) -> None:
        kept.append(ctx)

    await Pipeline("kept").with_stage("a", keeps).run()
    with pytest.raises(RuntimeError, match="'a' has ended"):
        kept[0].save_partial(x=1)
    with pytest.raises(RuntimeError, match="'a' has ended"):
        kept[0].nursery  # noqa: B018


async def test_artifacts_are_seen_by_those_who_come_later() -> None:
    async def adds(ctx: StageContext) -> dict[str, object]:
        before = [artifact.name for artifact in ctx.artifacts]
        ctx.add_artifact(Artifact(name=f"of {ctx.stage}", data={"rows": [1]}))
        assert ctx.artifacts[-1].stage == ctx.stage
        assert isinstance(ctx.artifacts[-1].data["rows"], FrozenList)
        return {"before": before}

    described = PipelineContext(artifacts=(Artifact(name="given", media_type="text/plain", uri="file:///x"),))
    results = await chain(2, adds).run(described)
    assert results["s0"]["before"] == ["given"]
    assert results["s1"]["before"] == ["given", "of s0"]
    assert [artifact.name for artifact in described.artifacts] == ["given"]


# The branch's nursery


def around(asks: Body, **options: Any) -> Pipeline:
    """root → (a → a2 → a3 | b) → end; `a` is the stage that asks for the nursery, `a2` goes on for two seconds."""
    return (
        Pipeline("nursery")
        .with_stage("root", gives())
        .with_stage("a", asks, after="root", **options)
        .with_stage("a2", sleeps(2), after="a")
        .with_stage("a3", gives(), after="a2")
        .with_stage("b", sleeps(1), after="root")
        .with_stage("end", gives(), after=["a3", "b"], join="settled")
    )


async def test_a_background_task_outlives_its_stage_but_not_its_branch(autojump_clock: MockClock) -> None:
    lived: list[float] = []

    async def background() -> None:
        await trio.sleep(5)
        lived.append(trio.current_time() - begun)

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(background)

    begun = trio.current_time()
    results = await around(asks).run()
    assert lived == [5]
    assert results.status is RunStatus.SUCCEEDED
    assert times(results)["a3"] == (2, 2)
    assert duration(results) == 5


INTERVENTIONS: dict[str, Callable[[trio.CancelScope, Run], None]] = {
    "scope": lambda scope, run: scope.cancel(),
    "cancel": lambda scope, run: run.cancel("enough"),
    "cancel_branch": lambda scope, run: run.cancel_branch("a", "enough"),
}


@pytest.mark.parametrize("by", [*INTERVENTIONS, "failure"])
async def test_a_background_task_is_cancelled_with_its_branch(autojump_clock: MockClock, by: str) -> None:
    ended: list[float] = []

    async def background() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time() - begun)

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(background)

    begun = trio.current_time()
    pipeline = around(asks)
    if by == "failure":
        pipeline = pipeline.with_stage("f", sleeps(1, ERROR), after="root")
    run = await end(pipeline, INTERVENTIONS.get(by))
    assert ended == [1]
    assert states(run.results)["a"] is OK
    assert states(run.results)["a2"] is CANCELLED
    cause = {
        "cancel_branch": (CauseKind.CANCEL_BRANCH, None),
        "cancel": (CauseKind.CANCEL, None),
        "scope": (CauseKind.CALLER, None),
        "failure": (CauseKind.FAILURE, "f"),
    }
    assert causes(run.results)["a2"] == causes(run.results)["a3"] == cause[by]
    assert run.caught == (by == "scope")


async def test_the_callers_cancellation_comes_through_a_stage_that_asked_for_the_nursery(
    autojump_clock: MockClock,
) -> None:
    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(trio.sleep_forever)
        await trio.sleep_forever()

    ended = await end(Pipeline("asks").with_stage("a", asks).with_stage("b", gives(), after="a"), within=1)
    assert ended.caught
    assert ended.results.status is RunStatus.INTERRUPTED
    assert states(ended.results) == {"a": CANCELLED, "b": SKIPPED}
    assert set(causes(ended.results).values()) == {(CauseKind.CALLER, None)}


FAILURE_POLICIES = {
    "fail_fast": RunStatus.FAILED,
    "isolate": RunStatus.FAILED,
    "drain": RunStatus.FAILED,
    "tolerate": RunStatus.PARTIAL,
}


@pytest.mark.parametrize("policy", FAILURE_POLICIES)
async def test_an_exception_in_the_background_fails_the_stage_that_asked_while_it_runs(
    autojump_clock: MockClock, policy: str
) -> None:
    async def background() -> None:
        await trio.sleep(0.5)
        raise ERROR

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(background)
        await trio.sleep(2)

    results = await results_of(around(asks, on_failure=policy))
    record = results.records["a"]
    assert record.state is FAILED
    assert leaves(record.error) == [ERROR]
    assert causes(results)["a"] == (CauseKind.FAILURE, "a")
    assert {states(results)["a2"], states(results)["a3"]} == {SKIPPED}
    assert causes(results)["a2"] == causes(results)["a3"] == (CauseKind.FAILURE, "a")
    assert states(results)["b"] is (CANCELLED if policy == "fail_fast" else OK)
    assert states(results)["end"] is (OK if policy in ("isolate", "tolerate") else SKIPPED)
    assert results.status is FAILURE_POLICIES[policy]
    assert times(results)["a"] == (0, 0.5)
    assert_whole(results)


@pytest.mark.parametrize("policy", FAILURE_POLICIES)
async def test_an_exception_in_the_background_is_a_failure_of_the_stage_that_asked_after_it_ended(
    autojump_clock: MockClock, policy: str
) -> None:
    """The stage stays as it ended; what runs in the branch is cancelled; the run is told."""

    async def background() -> None:
        await trio.sleep(0.5)
        raise ERROR

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(background)

    raised: StageExecutionError | None = None
    try:
        results: PipelineResults = await around(asks, on_failure=policy).run()
    except StageExecutionError as error:
        raised, results = error, error.results
    assert states(results)["a"] is OK
    assert "a" in results
    assert leaves(results.records["a"].error) == [ERROR]
    assert states(results)["a2"] is CANCELLED
    assert states(results)["a3"] is SKIPPED
    assert results.records["a2"].error is None
    assert causes(results)["a2"][1] == causes(results)["a3"][1] == "a"
    assert results.records["a2"].partial == {"begun": "a2"}
    assert states(results)["b"] is (CANCELLED if policy == "fail_fast" else OK)
    assert states(results)["end"] is (OK if policy in ("isolate", "tolerate") else SKIPPED)
    assert results.status is FAILURE_POLICIES[policy]
    if policy == "tolerate":
        assert raised is None
    else:
        assert raised is not None
        assert raised.stage == "a"
        assert leaves(raised.original) == [ERROR]


async def test_an_exception_in_the_background_after_the_callers_cancellation_is_only_recorded(
    autojump_clock: MockClock,
) -> None:
    async def fails_in_cleanup() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ERROR

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(fails_in_cleanup)

    ended = await end(around(asks), within=1)
    assert ended.caught
    assert ended.error is None
    assert ended.results.status is RunStatus.INTERRUPTED
    assert leaves(ended.results.records["a"].error) == [ERROR]
    assert causes(ended.results)["a2"] == (CauseKind.CALLER, None)


async def test_cancelling_the_branchs_nursery_ends_the_branch_and_nothing_else(autojump_clock: MockClock) -> None:
    async def cancels(nursery: trio.Nursery) -> None:
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(cancels, ctx.nursery)

    results = await around(asks).run()
    assert states(results) == {"root": OK, "a": OK, "a2": CANCELLED, "a3": SKIPPED, "b": OK, "end": OK}
    assert set(causes(results).values()) == {(CauseKind.NURSERY, "a")}
    assert results.status is RunStatus.PARTIAL
    assert_whole(results)


async def test_a_timeout_of_the_stage_that_asked_leaves_the_background_task_alone(autojump_clock: MockClock) -> None:
    """The limit is on the stage; under `tolerate` its branch goes on, and with it the task."""
    lived: list[float] = []

    async def background() -> None:
        await trio.sleep(3)
        lived.append(trio.current_time() - begun)

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(background)
        await trio.sleep(9)

    begun = trio.current_time()
    results = await around(asks, timeout=1, on_failure="tolerate").run()
    assert states(results)["a"] is FAILED
    assert lived == [3]


# Being cancelled


WHY_CANCELLED = {
    "timeout": "ran longer than its limit of 1 s",
    "failure": "ValueError: no such page",
    "cancel": "enough",
    "cancel_branch": "enough",
    "stage cancel": "wrong account",
    "scope": "a cancel scope around the run was cancelled",
}


@pytest.mark.parametrize(
    ("by", "shielded"),
    # What was cancelled beyond a shield nobody behind it can see.
    [(by, shielded) for by in WHY_CANCELLED for shielded in (False, True) if not (by == "scope" and shielded)],
)
async def test_a_stage_knows_in_its_cleanup_why_it_is_cancelled(
    autojump_clock: MockClock, by: str, shielded: bool
) -> None:
    seen: list[tuple[bool, str | None]] = []

    async def looks(ctx: StageContext) -> None:
        assert (ctx.cancelled, ctx.cancel_reason) == (False, None)
        try:
            await trio.sleep(9)
        finally:
            with trio.CancelScope(shield=shielded):  # noqa: ASYNC100  # what counts is what one sees in there
                seen.append((ctx.cancelled, ctx.cancel_reason))

    endings: dict[str, StageOutput | Exception] = {
        "failure": ERROR,
        "stage cancel": StageOutput.cancel("wrong account"),
    }
    pipeline = (
        Pipeline("knows")
        .with_stage("root", gives())
        .with_stage("a", looks, after="root", timeout=1 if by == "timeout" else None)
        .with_stage("b", sleeps(1, endings.get(by)), after="root")
    )
    await end(pipeline, INTERVENTIONS.get(by))
    assert seen == [(True, WHY_CANCELLED[by])]
