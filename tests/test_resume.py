"""Resuming: what is kept, what is run again, and what one has to say before it is."""

from __future__ import annotations

import itertools
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stageflow import (
    Artifact,
    ContextSnapshot,
    Pipeline,
    PipelineCancelled,
    PipelineContext,
    PipelineResults,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageGraph,
    StageOutput,
    StageState,
)
from stageflow.errors import (
    CheckpointError,
    RecordedError,
    ResumeRefusedError,
    RunExistsError,
    RunParkedError,
    TenantMismatchError,
    UnknownRunError,
    UnknownStageError,
    UnstorableValueError,
)
from stageflow.journal.history import fold
from stageflow.journal.memory import MemoryStore
from stageflow.journal.plan import Action
from stageflow.journal.scribe import Scribe
from tests.stages import returns, states

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stageflow.journal.store import Batch, Store

RUN = "run 1"


class World:
    """What is outside of runs: which stages have been entered, and what is to go wrong next."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.broken: dict[str, Exception | StageOutput | None] = {}
        self.hangs: set[str] = set()

    def stage(self, value: object = None) -> Callable[[StageContext], Awaitable[object]]:
        async def body(ctx: StageContext) -> object:
            self.entered.append(f"{ctx.stage}#{ctx.attempt}")
            await trio.lowlevel.checkpoint()
            if ctx.stage in self.hangs:
                await trio.sleep_forever()
            wrong = self.broken.get(ctx.stage)
            if isinstance(wrong, Exception):
                raise wrong
            if wrong is not None:
                return wrong
            return {"by": ctx.stage} if value is None else value

        return body

    def take(self) -> list[str]:
        entered, self.entered = self.entered, []
        return entered


async def run(graph: Pipeline | StageGraph, store: Store, ctx: PipelineContext | None = None) -> Any:
    """Runs something under the id that all runs here have; gives the results, or the error."""
    try:
        return await graph.build().run(ctx or PipelineContext(run_id=RUN), store=store)
    except (StageExecutionError, PipelineCancelled, CheckpointError) as error:
        return error


async def killed(
    graph: Pipeline | StageGraph, store: MemoryStore, after: int, ctx: PipelineContext | None = None
) -> None:
    """Leaves in a store what a process leaves that is killed after so many events."""
    await run(graph, store, ctx)
    await cut(store, after)


async def cut(store: MemoryStore, after: int) -> None:
    log = await store.read(RUN, tenant=None)
    kept = store._kept[RUN]  # pyright: ignore[reportPrivateUsage]
    kept.entries[:] = log.entries[:after]
    kept.status, kept.until = RunStatus.RUNNING, 0.0


def kinds(log: Any) -> list[str]:
    return [f"{entry.kind}:{entry.stage or ''}" for entry in log.entries]


async def place_of(store: Store, kind: str, stage: str, number: int = 0) -> int:
    """How many events there are up to one, with that."""
    log = await store.read(RUN, tenant=None)
    found = [place for place, entry in enumerate(log.entries, 1) if (entry.kind, entry.stage) == (kind, stage)]
    return found[number]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def diamond(world: World, **options: Any) -> Pipeline:
    return (
        Pipeline("diamond", **options)
        .with_stage("a", world.stage())
        .with_stage("b", world.stage(), after="a")
        .with_stage("c", world.stage(), after="a")
        .with_stage("d", world.stage(), after=["b", "c"])
    )


# What is kept


async def test_what_succeeded_is_not_run_again(world: World, store: MemoryStore) -> None:
    world.broken["c"] = ValueError("no")
    error = await run(diamond(world, on_failure="drain"), store)
    assert isinstance(error, StageExecutionError)
    assert sorted(world.take()) == ["a#1", "b#1", "c#1"]
    world.broken.clear()
    results = await diamond(world, on_failure="drain").build().resume(RUN, store=store)
    assert world.take() == ["c#2", "d#1"]
    assert results.status is RunStatus.SUCCEEDED
    assert {name: output["by"] for name, output in results.items()} == {name: name for name in "abcd"}


async def test_the_failed_attempt_stays_on_record(world: World, store: MemoryStore) -> None:
    world.broken["c"] = ValueError("no")
    await run(diamond(world), store)
    world.broken.clear()
    results = await diamond(world).build().resume(RUN, store=store)
    first, second = results.records["c"].tries
    assert (first.number, second.number) == (1, 2)
    assert isinstance(first.error, RecordedError)
    assert (first.error.kind, str(first.error)) == ("builtins:ValueError", "ValueError: no")
    assert "raise wrong" in first.error.traceback
    assert second.output == results["c"]


async def test_a_run_that_a_stage_cancelled_can_be_resumed(world: World, store: MemoryStore) -> None:
    world.broken["b"] = StageOutput.cancel("not today")
    assert isinstance(await run(diamond(world), store), PipelineCancelled)
    world.broken.clear()
    world.take()
    results = await diamond(world).build().resume(RUN, store=store)
    assert set(world.take()) >= {"b#2", "d#1"}
    assert results.status is RunStatus.SUCCEEDED


async def test_a_run_that_the_caller_cancelled_is_interrupted_and_can_be_resumed(
    world: World, store: MemoryStore, autojump_clock: trio.testing.MockClock
) -> None:
    world.hangs = {"b"}
    with trio.move_on_after(1) as scope:
        await diamond(world).build().run(PipelineContext(run_id=RUN), store=store)
    assert scope.cancelled_caught
    (info,) = await store.runs()
    assert (info.status, info.held) == (RunStatus.INTERRUPTED, False)
    world.hangs = set()
    world.take()
    results = await diamond(world).build().resume(RUN, store=store)
    assert world.take() == ["b#2", "d#1"]
    assert results.status is RunStatus.SUCCEEDED


async def test_results_of_a_run_that_is_over_are_given_again_and_nothing_is_written(
    world: World, store: MemoryStore
) -> None:
    before = await run(diamond(world), store)
    world.take()
    log = await store.read(RUN, tenant=None)
    again = await diamond(world).build().resume(RUN, store=store)
    assert world.take() == []
    assert dict(again) == dict(before)
    assert again.status is RunStatus.SUCCEEDED
    assert [record.state for record in again.records.values()] == [StageState.SUCCEEDED] * 4
    assert (await store.read(RUN, tenant=None)).entries == log.entries


async def test_outputs_that_are_kept_are_read_when_somebody_wants_them(
    world: World, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await run(diamond(world), store)
    decode, read = Scribe.decode, list[str]()

    def reading(self: Scribe, text: str) -> Any:
        read.append(text)
        return decode(self, text)

    monkeypatch.setattr(Scribe, "decode", reading)
    again = await diamond(world).build().resume(RUN, store=store)
    assert list(again) == list(before)
    assert not read
    record = again.records["a"]
    assert again["a"] == again["a"] == record.output == before["a"]
    assert read == ['{"by":"a"}']
    with pytest.raises(AttributeError, match="'StageRecord' object has no attribute 'outputs'"):
        getattr(record, "outputs")  # noqa: B009
    twin = pickle.loads(pickle.dumps(again))
    assert dict(twin) == dict(before)
    assert repr(twin.records["b"]) == repr(again.records["b"])
    assert len(read) == 4


async def test_a_partial_run_is_over_as_well(world: World, store: MemoryStore) -> None:
    world.broken["c"] = StageOutput.skip("nothing to do")
    before = await run(diamond(world), store)
    world.take()
    again = await diamond(world).build().resume(RUN, store=store)
    assert world.take() == []
    assert again.status is before.status is RunStatus.PARTIAL
    assert states(again) == states(before)


async def test_skips_of_the_user_are_kept_and_what_follows_is_decided_again(world: World, store: MemoryStore) -> None:
    world.broken |= {"b": StageOutput.skip("nothing to do"), "c": ValueError("no")}
    await run(diamond(world, on_failure="drain"), store)
    world.broken.clear()
    world.take()
    results = await diamond(world, on_failure="drain").build().resume(RUN, store=store)
    assert world.take() == ["c#2"]
    assert states(results) == {"a": StageState.SUCCEEDED, "b": StageState.SKIPPED, "c": StageState.SUCCEEDED} | {
        "d": StageState.SKIPPED
    }
    assert results.records["d"].cause == results.records["b"].cause


async def test_a_branch_that_was_cancelled_stays_cancelled(world: World, store: MemoryStore) -> None:
    pipeline = (
        Pipeline("p", on_failure="drain")
        .with_stage("a", world.stage())
        .with_stage("b", world.stage(), after="a")
        .with_stage("b2", world.stage(), after="b")
        .with_stage("slow", world.stage(), after="a")
        .with_stage("c", world.stage(), after="slow")
        .with_stage("end", world.stage(), after=["b2", "c"], join="settled")
    )
    world.broken |= {"b": StageOutput.cancel_branch("no use"), "c": ValueError("no")}
    await run(pipeline, store)
    # As if the process had died before the stage was skipped that the branch still had.
    await cut(store, await place_of(store, "stage_settled", "c"))
    world.broken.clear()
    world.take()
    results = await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["c#2", "end#1"]
    assert states(results)["b"] is StageState.CANCELLED
    assert states(results)["b2"] is StageState.SKIPPED
    assert str(results.records["b2"].cause) == "cancel_branch of 'b': no use"


@pytest.mark.parametrize("ended", ["b", "b2", "items[1]"])
async def test_what_was_cancelled_from_outside_stays_cancelled(
    world: World, store: MemoryStore, ended: str, autojump_clock: trio.testing.MockClock
) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.stage())
        .with_stage("b", world.stage(), after="a")
        .with_stage("b2", world.stage(), after="b")
        .with_stage("c", world.stage(), after="a")
        .with_map("items", world.stage(), over=lambda ctx: [1, 2, 3], after="a")
    )
    world.hangs = {"b", "c", "items"}
    with trio.move_on_after(1):
        async with pipeline.build().open(PipelineContext(run_id=RUN), store=store) as going:
            await trio.sleep(0.5)
            going.cancel_branch(ended, "no use")
    world.hangs = set()
    world.take()
    results = await pipeline.build().resume(RUN, store=store)
    entered = {name.partition("#")[0] for name in world.take()}
    if ended == "items[1]":
        assert results["items"].data == [{"by": "items"}, None, {"by": "items"}]
        assert "b" in entered
    else:
        assert not {"b", "b2"} & entered
        assert results.records["b2"].state is StageState.SKIPPED
    assert results.status is RunStatus.PARTIAL


async def test_a_failure_that_was_tolerated_and_handled_is_not_made_again(world: World, store: MemoryStore) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("risky", world.stage(), on_failure="tolerate")
        .with_stage("handler", world.stage(), after="risky", join="settled")
        .with_stage("last", world.stage(), after="handler")
    )
    world.broken |= {"risky": ValueError("no"), "last": ValueError("no")}
    await run(pipeline, store)
    world.broken.clear()
    world.take()
    results = await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["last#2"]
    assert results.records["risky"].state is StageState.FAILED
    assert str(results.records["risky"].error) == "ValueError: no"
    assert results.status is RunStatus.PARTIAL


async def test_what_came_with_the_run_is_there_again(store: MemoryStore) -> None:
    seen: list[tuple[object, ...]] = []

    async def look(ctx: StageContext) -> None:
        seen.append((ctx.data, dict(ctx.snapshot), ctx.metadata, ctx.artifacts, ctx.correlation_id, ctx.run_id))
        seen[-1] += (ctx.idempotency_key,)
        if len(seen) == 1:
            raise ValueError("no")

    ctx = PipelineContext(
        run_id=RUN,
        correlation_id="c1",
        data={"n": 1, "when": (1, 2)},
        snapshot=ContextSnapshot({"messages": ["hello"]}),
        metadata={"by": "me"},
        artifacts=[Artifact(name="x", data=b"1")],
    )
    pipeline = Pipeline("p").with_stage("look", look)
    await run(pipeline, store, ctx)
    await pipeline.build().resume(RUN, store=store)
    assert seen[0] == seen[1]


async def test_artifacts_of_what_is_kept_are_kept(store: MemoryStore, world: World) -> None:
    async def make(ctx: StageContext) -> None:
        ctx.add_artifact(Artifact(name="report", data=[1, 2]))

    pipeline = Pipeline("p").with_stage("make", make).with_stage("bad", world.stage(), after="make")
    world.broken["bad"] = ValueError("no")
    await run(pipeline, store)
    world.broken.clear()
    results = await pipeline.build().resume(RUN, store=store)
    assert [(artifact.name, artifact.stage, artifact.data) for artifact in results.artifacts] == [
        ("report", "make", [1, 2])
    ]


# Attempts


async def test_the_attempts_of_a_killed_process_count(store: MemoryStore, world: World) -> None:
    pipeline = Pipeline("p").with_stage("a", world.stage(), retry=Retry(attempts=3))
    world.broken["a"] = ValueError("no")
    await run(pipeline, store)
    assert world.take() == ["a#1", "a#2", "a#3"]
    await cut(store, await place_of(store, "attempt_ended", "a", 1))
    with pytest.raises(StageExecutionError):
        await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["a#3"]


async def test_a_run_that_is_resumed_after_a_failure_has_all_its_attempts_again(
    store: MemoryStore, world: World
) -> None:
    pipeline = Pipeline("p").with_stage("a", world.stage(), retry=Retry(attempts=2))
    world.broken["a"] = ValueError("no")
    await run(pipeline, store)
    assert world.take() == ["a#1", "a#2"]
    with pytest.raises(StageExecutionError):
        await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["a#3", "a#4"]


async def test_a_guard_goes_on_with_its_loop(store: MemoryStore) -> None:
    feedback: list[str | None] = []

    async def draft(ctx: StageContext) -> StageOutput:
        feedback.append(ctx.feedback)
        return StageOutput.ok(number=1 if ctx.feedback is None else int(ctx.feedback.split()[0]) + 1)

    async def polish(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(number=ctx.inputs["draft"]["number"])

    async def guard(ctx: StageContext) -> StageOutput:
        number = ctx.inputs["polish"]["number"]
        return StageOutput.ok(number=number) if number == 3 else StageOutput.retry(f"{number} is not 3", stage="draft")

    pipeline = (
        Pipeline("p")
        .with_stage("draft", draft)
        .with_stage("polish", polish, after="draft")
        .with_stage("guard", guard, after="polish", retry=Retry(attempts=3))
    )
    expected = await run(pipeline, store)
    assert expected["guard"]["number"] == 3
    assert feedback == [None, "1 is not 3", "2 is not 3"]
    log = await store.read(RUN, tenant=None)
    # What is written together is there together: that the guard was not content, and what is tried again.
    together = {
        place for place, entry in enumerate(log.entries, 1) if (entry.kind, entry.stage) == ("attempt_ended", "guard")
    }
    together |= {place + 1 for place in together}
    for after in sorted(set(range(1, len(log.entries) + 1)) - together):
        again = MemoryStore(shared=store)
        kept = again._kept[RUN]  # pyright: ignore[reportPrivateUsage]
        kept.entries[:], kept.status, kept.until = log.entries[:after], RunStatus.RUNNING, 0.0
        kept.recoveries = 0
        feedback.clear()
        results = await pipeline.build().resume(RUN, store=again)
        assert dict(results) == dict(expected), after
        assert feedback == sorted(feedback, key=lambda said: said or ""), after  # it never begins again


# Runs within runs


def nested(world: World) -> Pipeline:
    child = (
        Pipeline("child")
        .with_stage("x", world.stage())
        .with_stage("y", world.stage(), after="x")
        .with_stage("z", world.stage(), after="y")
    )
    return Pipeline("parent").with_stage("a", world.stage()).with_stage("inner", child, after="a")


async def test_a_nested_run_goes_on_from_where_it_failed(world: World, store: MemoryStore) -> None:
    world.broken["y"] = ValueError("no")
    await run(nested(world), store)
    assert world.take() == ["a#1", "x#1", "y#1"]
    world.broken.clear()
    results = await nested(world).build().resume(RUN, store=store)
    assert world.take() == ["y#2", "z#1"]
    assert dict(results["inner"].data) == {name: {"by": name} for name in "xyz"}
    (child,) = results.children["inner"]
    assert child.records["x"].state is StageState.SUCCEEDED


async def test_a_nested_run_begins_anew_if_it_is_given_something_else(world: World, store: MemoryStore) -> None:
    given = itertools.count()
    child = Pipeline("child").with_stage("x", world.stage()).with_stage("y", world.stage(), after="x")

    async def parent(ctx: StageContext) -> None:
        await ctx.run_pipeline(child, {"n": next(given)})

    pipeline = Pipeline("parent").with_stage("inner", parent)
    world.broken["y"] = ValueError("no")
    await run(pipeline, store)
    world.broken.clear()
    world.take()
    await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["x#1", "y#1"]


async def test_the_items_of_a_map_that_are_done_are_not_done_again(world: World, store: MemoryStore) -> None:
    done: list[int] = []
    broken = {2}

    async def item(ctx: StageContext) -> int:
        await trio.lowlevel.checkpoint()
        if ctx.data in broken:
            raise ValueError("no")
        done.append(ctx.data)
        return StageOutput.ok(ctx.data * 10)  # type: ignore[return-value]

    pipeline = (
        Pipeline("p")
        .with_map("items", item, over=lambda ctx: [0, 1, 2, 3], tolerate=1)
        .with_stage("after", world.stage(), after="items")
    )
    world.broken["after"] = ValueError("no")
    await run(pipeline, store)
    assert sorted(done) == [0, 1, 3]
    await cut(store, await place_of(store, "stage_settled", "items", 0))
    done.clear()
    world.broken.clear()
    broken.clear()
    results = await pipeline.build().resume(RUN, store=store)
    assert results["items"].data == [0, 10, 20, 30]
    assert len(done) + 1 <= 4


# What has changed


async def original(ctx: StageContext) -> dict[str, object]:
    return {"by": "original"}


async def edited(ctx: StageContext) -> dict[str, object]:
    return {"by": "edited"}


async def bad(ctx: StageContext) -> None:
    raise ValueError("no")


async def good(ctx: StageContext) -> dict[str, object]:
    return {"by": "good"}


@attrs.frozen
class Doc:
    by: str


@attrs.frozen
class Other:
    number: int


def base(**s: Any) -> Pipeline:
    """The stage `s` is what is changed; after it comes one that uses it, and one that fails at first."""
    options: Any = {"kind": "work", **s.pop("options", {})}
    return (
        Pipeline("p", on_failure="drain")
        .with_stage("root", original)
        .with_stage("s", s.pop("runner", original), after="root", **options)
    )


CHANGES: dict[str, Callable[[], Pipeline]] = {
    "added": lambda: base().with_stage("extra", good, after="root"),
    "removed": lambda: Pipeline("p", on_failure="drain").with_stage("root", original),
    "renamed": lambda: (
        Pipeline("p", on_failure="drain")
        .with_stage("root", original)
        .with_stage("renamed", original, after="root", kind="work", aka="s")
    ),
    "edited": lambda: base(runner=edited),
    "contract": lambda: base(options={"output": Doc}),
    "edge": lambda: (
        Pipeline("p", on_failure="drain").with_stage("root", original).with_stage("s", original, kind="work")
    ),
    "policy": lambda: base(options={"timeout": 7}),
}


async def recorded(state: str, store: MemoryStore) -> None:
    """Records a run in which the stage `s` is in a state."""
    first = base(runner=bad) if state == "failed" else base()
    await run(first.with_stage("end", bad, after="root"), store)
    if state == "pending":
        await cut(store, await place_of(store, "stage_settled", "root"))
    elif state == "in doubt":
        await cut(store, await place_of(store, "attempt_started", "s"))


@pytest.mark.parametrize("on_change", ["refuse", "reuse", "rerun"])
@pytest.mark.parametrize("state", ["pending", "done", "failed", "in doubt"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_between_two_runs(change: str, state: str, on_change: str, store: MemoryStore) -> None:
    await recorded(state, store)
    graph = CHANGES[change]().with_stage("end", good, after="root").build()
    plan = await graph.plan_resume(RUN, store=store, on_change=on_change)
    name = "renamed" if change == "renamed" else "s"
    orphaned = change == "removed" and state != "pending"
    conflicts = state == "done" and change in {"edited", "contract", "edge", "policy"}
    # `end` is edited as well, but had failed, and what failed just runs in its new form.
    assert bool(plan.blocked) is (on_change == "refuse" and (orphaned or conflicts))
    if orphaned:
        assert plan.steps["s"].action is Action.ORPHANED
    elif change != "removed":
        action = {"pending": Action.RUN, "failed": Action.RERUN, "in doubt": Action.IN_DOUBT, "done": Action.REUSE}[
            state
        ]
        if conflicts and on_change == "refuse":
            action = Action.CONFLICT
        elif conflicts and on_change == "rerun":
            action = Action.RERUN
        assert plan.steps[name].action is action
    if conflicts:
        assert {"edited": "code", "contract": "contract", "edge": "edges", "policy": "policy"}[change] in plan.steps[
            "s"
        ].changed
    before = await store.read(RUN, tenant=None)
    if plan.blocked:
        with pytest.raises(ResumeRefusedError) as caught:
            await graph.resume(RUN, store=store, on_change=on_change)
        assert caught.value.plan is not None
        assert "'s'" in str(caught.value) or "s:" in str(caught.value)
        assert (await store.read(RUN, tenant=None)).entries == before.entries
        assert not (await store.runs())[0].held
        return
    results = await graph.resume(RUN, store=store, on_change=on_change)
    assert results.status is RunStatus.SUCCEEDED
    if change == "edited":
        kept = state == "done" and on_change == "reuse"
        assert results["s"]["by"] == ("original" if kept else "edited")
    if change == "contract":
        assert results["s"].data == Doc("original")
    if orphaned:
        after = fold((await store.read(RUN, tenant=None)).entries)
        assert "s" not in after.stages  # and so it was acknowledged, on record


async def test_what_comes_after_a_stage_that_runs_again_runs_again(world: World, store: MemoryStore) -> None:
    def of(first: Any) -> Pipeline:
        return (
            Pipeline("p")
            .with_stage("a", first)
            .with_stage("b", world.stage(), after="a")
            .with_stage("other", world.stage())
            .with_stage("end", world.stage(), after=["b", "other"])
        )

    world.broken["end"] = ValueError("no")
    await run(of(original), store)
    world.broken.clear()
    world.take()
    results = await of(edited).build().resume(RUN, store=store, on_change="rerun")
    assert results["a"]["by"] == "edited"
    assert world.take() == ["b#2", "end#2"]


async def test_an_output_that_does_not_fit_the_new_contract_is_not_reused(world: World, store: MemoryStore) -> None:
    def of(**options: Any) -> Pipeline:
        return Pipeline("p").with_stage("a", original, **options).with_stage("end", world.stage(), after="a")

    world.broken["end"] = ValueError("no")
    await run(of(), store)
    with pytest.raises(ResumeRefusedError, match=r"output\.number: wanted int, found nothing"):
        await of(output=Other).build().resume(RUN, store=store, on_change="reuse")


async def test_a_version_stands_for_the_code(world: World, store: MemoryStore) -> None:
    def of(runner: Any, version: str) -> Pipeline:
        return Pipeline("p").with_stage("a", runner, version=version).with_stage("end", world.stage(), after="a")

    world.broken["end"] = ValueError("no")
    await run(of(original, "1"), store)
    plan = await of(edited, "1").build().plan_resume(RUN, store=store)
    assert plan.steps["a"].action is Action.REUSE
    plan = await of(original, "2").build().plan_resume(RUN, store=store)
    assert plan.steps["a"].changed == ("version",)
    assert plan.steps["a"].blocks


async def test_a_plan_can_be_printed(world: World, store: MemoryStore) -> None:
    world.broken["c"] = ValueError("no")
    await run(diamond(world, on_failure="drain"), store)
    assert str(await diamond(world, on_failure="drain").build().plan_resume(RUN, store=store)) == (
        "resuming run run 1 of 'diamond':\n"
        "    a  reuse     succeeded\n"
        "    b  reuse     succeeded\n"
        "    c  rerun     failed: failure of 'c': ValueError: no\n"
        "    d  run       skipped: failure of 'c': ValueError: no"
    )


# In doubt


async def doubtful(store: MemoryStore, entered: list[int]) -> StageGraph:
    """Records a run whose process died within a stage that has effects."""

    async def pay(ctx: StageContext) -> StageOutput:
        entered.append(ctx.attempt)
        return StageOutput.ok(paid=True)

    graph = Pipeline("p").with_stage("pay", pay, kind="work").with_stage("end", returns(None), after="pay").build()
    await killed(graph, store, 2)
    assert kinds(await store.read(RUN, tenant=None)) == ["run_started:", "attempt_started:pay"]
    entered.clear()
    return graph


async def test_a_stage_in_doubt_is_run_again_unless_something_else_is_said(store: MemoryStore) -> None:
    entered: list[int] = []
    graph = await doubtful(store, entered)
    assert (await graph.plan_resume(RUN, store=store)).of(Action.IN_DOUBT) == ("pay",)
    await graph.resume(RUN, store=store)
    assert entered == [2]


async def test_a_stage_in_doubt_can_hold_the_run(store: MemoryStore) -> None:
    entered: list[int] = []
    graph = await doubtful(store, entered)
    with pytest.raises(ResumeRefusedError, match="attempt 1 was entered, and is not known to have ended"):
        await graph.resume(RUN, store=store, in_doubt="hold")
    assert entered == []


@pytest.mark.parametrize("found", [None, StageOutput.ok(paid="yes")])
async def test_a_probe_finds_out_what_became_of_a_stage_in_doubt(store: MemoryStore, found: StageOutput | None) -> None:
    entered: list[int] = []
    graph = await doubtful(store, entered)
    asked: list[str] = []

    async def probe(stage: str, key: str) -> StageOutput | None:
        asked.append(stage)
        assert len(key) == 36
        return found

    results = await graph.resume(RUN, store=store, in_doubt=probe)
    assert asked == ["pay"]
    assert entered == ([2] if found is None else [])
    assert results["pay"]["paid"] == (True if found is None else "yes")


# Forks


async def test_a_fork_takes_over_what_comes_before_a_stage(world: World, store: MemoryStore) -> None:
    before = await run(diamond(world), store)
    world.take()
    results = await diamond(world).build().fork(RUN, from_stage="b", store=store, fork_id="run 2")
    assert world.take() == ["b#1", "d#1"]
    assert results.run_id == "run 2"
    assert dict(results) == dict(before)
    infos = {info.run_id: info for info in await store.runs()}
    assert infos["run 2"].base == RUN
    again = await diamond(world).build().resume("run 2", store=store)
    assert dict(again) == dict(before)
    assert world.take() == []


async def test_a_fork_of_a_fork_reads_through_both(world: World, store: MemoryStore) -> None:
    await run(diamond(world), store)
    graph = diamond(world).build()
    await graph.fork(RUN, from_stage="c", store=store, fork_id="run 2")
    world.broken["d"] = ValueError("no")
    with pytest.raises(StageExecutionError):
        await graph.fork("run 2", from_stage="d", store=store, fork_id="run 3")
    world.broken.clear()
    world.take()
    results = await graph.resume("run 3", store=store)
    assert world.take() == ["d#2"]
    assert set(results) == set("abcd")


async def test_a_fork_from_nowhere_is_refused(world: World, store: MemoryStore) -> None:
    await run(diamond(world), store)
    with pytest.raises(UnknownStageError):
        await diamond(world).build().fork(RUN, from_stage="e", store=store)


# Whose run it is, and what cannot be


async def test_a_run_of_another_tenant_can_neither_be_resumed_nor_forked_nor_planned(
    world: World, store: MemoryStore
) -> None:
    graph = diamond(world).build()
    await run(graph, store, PipelineContext(run_id=RUN, tenant="b"))
    for tenant in ("a", None):
        for attempt in (
            lambda tenant=tenant: graph.resume(RUN, store=store, tenant=tenant),
            lambda tenant=tenant: graph.plan_resume(RUN, store=store, tenant=tenant),
            lambda tenant=tenant: graph.fork(RUN, from_stage="a", store=store, tenant=tenant),
        ):
            with pytest.raises(TenantMismatchError):
                await attempt()
    assert (await graph.resume(RUN, store=store, tenant="b")).tenant == "b"


async def test_an_unknown_run_is_said_to_be_unknown(world: World, store: MemoryStore) -> None:
    with pytest.raises(UnknownRunError, match="there is no run nope in this store"):
        await diamond(world).build().resume("nope", store=store)


async def test_a_run_id_is_used_once(world: World, store: MemoryStore) -> None:
    await run(diamond(world), store)
    world.take()
    assert isinstance(await run(diamond(world), store), RunExistsError)
    assert world.take() == []


async def test_a_run_whose_process_dies_again_and_again_is_parked(world: World, store: MemoryStore) -> None:
    await killed(diamond(world), store, 2)
    kept = store._kept[RUN]  # pyright: ignore[reportPrivateUsage]
    kept.recoveries = 5
    with pytest.raises(RunParkedError) as caught:
        await diamond(world).build().resume(RUN, store=store)
    assert caught.value.recoveries == 5
    results = await diamond(world).build().resume(RUN, store=store, unpark=True)
    assert results.status is RunStatus.SUCCEEDED
    assert (await store.runs())[0].recoveries == 0


# What cannot be kept


async def test_a_value_that_cannot_be_kept_ends_the_run_and_stays_in_its_results(
    world: World, store: MemoryStore
) -> None:
    pipeline = (
        Pipeline("p").with_stage("a", returns({"pages": [1, object()]})).with_stage("b", world.stage(), after="a")
    )
    error = await run(pipeline, store)
    assert isinstance(error, UnstorableValueError)
    assert (error.stage, error.path) == ("a", "output['pages'][1]") or error.path == "output.pages[1]"
    assert isinstance(error.results, PipelineResults)
    assert "a" in error.results
    assert world.take() == []


async def test_data_that_cannot_be_kept_is_refused_before_anything_starts(world: World, store: MemoryStore) -> None:
    error = await run(diamond(world), store, PipelineContext(run_id=RUN, data={"f": lambda: None}))
    assert isinstance(error, UnstorableValueError)
    assert error.stage is None
    assert world.take() == []
    assert await store.runs() == []


class Failing:
    """A store that fails from some append on."""

    def __init__(self, store: MemoryStore, after: int) -> None:
        self._store, self._left = store, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append_nowait(self, lease: Any, batch: Batch) -> Any:
        self._left -= 1
        if self._left < 0:
            lease = attrs.evolve(lease, epoch=-1)
        return self._store.append_nowait(lease, batch)


async def test_a_store_that_fails_never_masks_what_the_stage_raised(world: World, store: MemoryStore) -> None:
    raised = ValueError("the stage's own")
    world.broken["b"] = raised
    for after in range(8):
        failing: Any = Failing(MemoryStore(), after)
        error = await run(diamond(world), failing)
        if not isinstance(error, CheckpointError):
            assert error.original is raised
            break
        own = error.__cause__
        assert own is None or isinstance(own, (StageExecutionError, CheckpointError))
        assert error.results is not None
        if error.results.records["b"].state is StageState.FAILED:
            assert isinstance(own, StageExecutionError)
            assert own.original is raised
    else:
        raise AssertionError("the store never got through")


async def test_the_run_is_given_out_of_hand_whatever_ends_it(world: World, store: MemoryStore) -> None:
    for wrong in (None, ValueError("no"), StageOutput.cancel("no"), StageOutput.skip("no")):
        world.broken["b"] = wrong
        fresh = MemoryStore()
        with suppress(Exception):
            await run(diamond(world), fresh)
        assert not (await fresh.runs())[0].held


# What was found by those who read it


async def test_a_nested_run_whose_code_has_changed_is_refused_before_anything_is_done(store: MemoryStore) -> None:
    def of(x: Any, y: Any) -> StageGraph:
        child = Pipeline("child").with_stage("x", x).with_stage("y", y, after="x")
        return Pipeline("parent").with_stage("inner", child).build()

    await run(of(original, bad), store)
    before = (await store.read(RUN, tenant=None)).entries
    plan = await of(edited, good).plan_resume(RUN, store=store)
    assert str(plan.steps["inner"]).endswith("run 0 within it: x: conflict (succeeded, but its code changed since))")
    with pytest.raises(ResumeRefusedError):
        await of(edited, good).resume(RUN, store=store)
    assert (await store.read(RUN, tenant=None)).entries == before
    results = await of(edited, good).resume(RUN, store=store, on_change="rerun")
    assert results["inner"]["x"]["by"] == "edited"


async def test_a_fork_does_not_build_on_what_was_undone(world: World, store: MemoryStore) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        world.entered.append(f"undo {ctx.stage}")

    pipeline = (
        Pipeline("trip")
        .with_stage("ask", world.stage())
        .with_stage("flight", world.stage(), after="ask", compensate=undo)
        .with_stage("pay", world.stage(), after="flight")
    )
    world.broken["pay"] = ValueError("no")
    await run(pipeline, store)
    assert world.take() == ["ask#1", "flight#1", "pay#1", "undo flight"]
    world.broken.clear()
    results = await pipeline.build().fork(RUN, from_stage="pay", store=store)
    assert world.take() == ["flight#1", "pay#1"]
    assert results.status is RunStatus.SUCCEEDED


async def test_a_value_that_cannot_be_kept_leaves_a_run_that_is_known_to_have_failed(
    world: World, store: MemoryStore
) -> None:
    pipeline = Pipeline("p").with_stage("a", world.stage()).with_stage("b", returns({"f": object()}), after="a")
    await run(pipeline, store)
    (info,) = await store.runs()
    assert (info.status, info.held) == (RunStatus.FAILED, False)
    plan = await pipeline.build().plan_resume(RUN, store=store)
    assert (plan.steps["a"].action, plan.steps["b"].action) == (Action.REUSE, Action.RUN)


async def test_a_store_that_raises_at_once_fails_like_one_that_fails_later(world: World) -> None:
    class Full(Failing):
        def append_nowait(self, lease: Any, batch: Batch) -> Any:
            raise OSError("no space")

    full: Any = Full(MemoryStore(), 0)
    error = await run(diamond(world), full)
    assert isinstance(error, CheckpointError)
    assert isinstance(error.__cause__, OSError)
    assert error.results is not None


async def test_runs_that_a_stage_has_begun_at_once_are_known_by_what_they_were_given(
    world: World, store: MemoryStore
) -> None:
    keys: dict[int, set[str]] = {}
    entered: list[int] = []

    async def one(ctx: StageContext) -> StageOutput:
        keys.setdefault(ctx.data["n"], set()).add(ctx.idempotency_key)
        entered.append(ctx.data["n"])
        if ctx.data["n"] == 3 and world.broken:
            await trio.sleep(0.01)
            raise ValueError("no")
        return StageOutput.ok(n=ctx.data["n"])

    child = Pipeline("child").with_stage("one", one)

    async def outer(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(4):
                nursery.start_soon(ctx.run_pipeline, child, {"n": n})

    pipeline = Pipeline("p").with_stage("outer", outer)
    world.broken["one"] = None
    await run(pipeline, store)
    assert sorted(entered) == [0, 1, 2, 3]
    world.broken.clear()
    entered.clear()
    await pipeline.build().resume(RUN, store=store)
    assert entered == [3]
    assert [len(used) for used in keys.values()] == [1] * 4


async def test_a_failure_that_was_tolerated_is_not_made_again_if_something_has_ended_since_by_way_of_others(
    world: World, store: MemoryStore
) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("risky", world.stage(), on_failure="tolerate")
        .with_stage("next", world.stage(), after="risky")
        .with_stage("handler", world.stage(), after="next", join="settled")
        .with_stage("last", world.stage(), after="handler")
    )
    world.broken |= {"risky": ValueError("no"), "last": ValueError("no")}
    await run(pipeline, store)
    world.broken.clear()
    world.take()
    await pipeline.build().resume(RUN, store=store)
    assert world.take() == ["last#2"]
