"""What type checkers make of the public names: the typing session reads this, and nothing runs it.

Every ``type: ignore`` is a claim that the line must not check. Were it to check, mypy would call the comment unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_type

import attrs
import trio

from stageflow import (
    Attempt,
    Breaks,
    Cause,
    Change,
    Compensation,
    CompensationRecord,
    CompensationStatus,
    ContextSnapshot,
    ContractViolation,
    Delta,
    Difference,
    Fault,
    FrozenDict,
    Interceptor,
    Join,
    Limit,
    OnFailure,
    Pipeline,
    PipelineContext,
    PipelineResults,
    ProcessContext,
    ResumePlan,
    Retry,
    Run,
    RunInfo,
    RunStatus,
    Stage,
    StageContext,
    StageGraph,
    StageKind,
    StageOutput,
    StageRecord,
    StageTimeoutError,
    Store,
    Transaction,
    UndoRecord,
    UndoState,
    compatibility,
    open_store,
    optional,
    register_journal_type,
    run_stage,
    stage,
)
from stageflow.interceptors import (
    IdempotencyInterceptor,
    LoggingInterceptor,
    Metrics,
    MetricsInterceptor,
    TimeoutInterceptor,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@attrs.frozen
class Page:
    title: str


class Fetch:
    name = "fetch"
    kind = StageKind.WORK

    async def execute(self, ctx: StageContext) -> Page:
        return Page("a title")


async def outputs(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(rows=[1, 2, 3])


async def mappings(ctx: StageContext) -> Mapping[str, object]:
    return {"rows": ctx.inputs["fetch"]["rows"]}


async def nothing(ctx: StageContext) -> None:
    assert_type(ctx.inputs, Mapping[str, StageOutput])
    assert_type(ctx.run_id, str)
    assert_type(ctx.deadline, float)
    ctx.save_partial(page=1)


def plain(ctx: StageContext) -> StageOutput:
    return StageOutput.skip("it runs in a thread")


@attrs.frozen
class Ranking:
    best: str


@stage
async def fetch(url: str) -> Page:
    return Page(url)


@stage(timeout=5, retry=Retry(attempts=2))
async def rank(fetch: Page, ctx: StageContext) -> Ranking:
    return Ranking(fetch.title)


@stage(after="fetch", timeout=5)
async def decorated(ctx: StageContext) -> StageOutput:
    return StageOutput.ok()


def factory() -> Callable[[StageContext], Awaitable[StageOutput]]:
    return outputs


def what_may_be_declared() -> StageGraph:
    as_stage: Stage = Fetch()
    pipeline = (
        Pipeline("p", on_failure="drain", default_timeout=None)
        .with_stage("fetch", Fetch)
        .with_stage("again", as_stage, after="fetch", kind=StageKind.WORK)
        .with_stage("made", factory(), after=["fetch", optional("again")], join=Join.n_of(1))
        .with_stage(decorated, timeout=None, on_failure=OnFailure.TOLERATE)
        .with_stage("mappings", mappings, after="fetch", when=lambda ctx: len(ctx.inputs))
    )
    assert_type(pipeline, Pipeline)
    return pipeline.build()


def what_may_not_be_declared() -> None:
    Pipeline("p").with_stage("a", 3)  # type: ignore[call-overload]
    Pipeline("p").with_stage("a", outputs, timeout="5")  # type: ignore[call-overload]
    Pipeline("p").with_stage("a", outputs, retries=3)  # type: ignore[call-overload]
    Pipeline("p", default_timeout="30")  # type: ignore[arg-type]
    optional(3)  # type: ignore[arg-type]
    Pipeline("p").with_stage("a", outputs, retry=3)  # type: ignore[call-overload]
    Pipeline("p").with_stage("a", outputs, uses=3)  # type: ignore[call-overload]
    Pipeline("p").with_stage("a", outputs, processes="yes")  # type: ignore[call-overload]
    Pipeline("p").with_map("m", outputs)  # type: ignore[call-arg]
    Pipeline("p").with_map("m", outputs, over=3)  # type: ignore[arg-type]
    Pipeline("p").with_branch(of="a")  # type: ignore[call-arg]
    Pipeline("p", limits={"gpu": "two"})  # type: ignore[dict-item]
    Pipeline("p", interceptors=[plain])  # type: ignore[list-item]
    Retry(attempts="3")  # type: ignore[arg-type]
    Limit("two")  # type: ignore[arg-type]


async def typed_stages_are_functions_still(ctx: StageContext) -> None:
    """What they take and give is checked where they are called; between stages of a pipeline, `build` does that."""
    page = await fetch("https://example.org")
    assert_type(page, Page)
    assert_type(await rank(page, ctx), Ranking)
    assert_type(await rank(fetch=page, ctx=ctx), Ranking)
    await rank(await rank(page, ctx), ctx)  # type: ignore[arg-type]
    await fetch(3)  # type: ignore[arg-type]
    await fetch(uri="https://example.org")  # type: ignore[call-arg]


def what_else_may_be_declared(limit: Limit, metrics: Metrics, interceptor: Interceptor) -> StageGraph:
    child = Pipeline("child", stages=[fetch, rank], inputs=Ranking, deadline=3, cleanup_timeout=1)
    assert_type(child, Pipeline)
    pipeline = (
        Pipeline("p", limits={"gpu": limit, "disk": 2}, max_running=8, interceptors=[interceptor])
        .with_stage("plain", plain, abandon_on_cancel=True, timeout=3, heartbeat=1)
        .with_stage("child", child, uses=["gpu", "disk"], priority=3, total_timeout=60)
        .with_stage("page", outputs, output=Page | None, retry=Retry(delay=1, on=(OSError,)))
        .with_map("map", fetch, over=lambda ctx: ctx.data, limit=3, tolerate=0.1, after="child")
        .with_map("other", child, over="map")
        .with_branch(of="map", deadline=5)
    )
    assert_type(pipeline, Pipeline)
    interceptors: list[Interceptor] = [
        TimeoutInterceptor(3, names="a"),
        LoggingInterceptor(),
        MetricsInterceptor(metrics),
        IdempotencyInterceptor(lambda ctx: ctx.run_id),
    ]
    return Pipeline("q", interceptors=interceptors).compose(pipeline).build()


async def what_a_context_gives(ctx: StageContext, child: Pipeline, process: ProcessContext) -> StageOutput:
    assert_type(ctx.feedback, str | None)
    assert_type(await ctx.run_pipeline(child, {"a": 1}), PipelineResults)
    assert_type(ctx.fork("a", data={"b": 2}), PipelineContext)
    assert_type(process.inputs, Mapping[str, StageOutput])
    ctx.heartbeat()
    ctx.on_exit(print, "done")
    with ctx.cleanup() as scope:
        assert_type(scope, trio.CancelScope)
        await trio.sleep(1)
    ctx.on_exit(3)  # type: ignore[arg-type]
    await ctx.run_pipeline(outputs)  # type: ignore[arg-type]
    return StageOutput.retry("again", stage="draft")


def what_is_left(record: StageRecord, results: PipelineResults, error: StageTimeoutError) -> None:
    assert_type(record.tries, tuple[Attempt, ...])
    assert_type(record.waited, float)
    assert_type(results.children, Mapping[str, tuple[PipelineResults, ...]])
    assert_type(results.visible_to("a"), PipelineResults)
    assert_type(error.source, str)


def what_contracts_tell(error: ContractViolation) -> None:
    assert_type(error.faults, tuple[Fault, ...])
    assert_type(compatibility(Page, Ranking), tuple[Difference, ...])
    assert_type(compatibility(Page, Ranking)[0].breaks, Breaks)


def what_snapshots_tell(snapshot: ContextSnapshot) -> None:
    delta = snapshot.evolve(a=1).diff(snapshot)
    assert_type(delta, Delta)
    assert_type(list(delta), list[Change])
    assert_type(snapshot.apply(delta), ContextSnapshot)


async def what_a_run_gives(graph: StageGraph) -> None:
    results = await graph.run({"url": "x"})
    assert_type(results, PipelineResults)
    assert_type(results["fetch"], StageOutput)
    assert_type(results.records["fetch"], StageRecord)
    assert_type(results.status, RunStatus)
    async with graph.open(PipelineContext(tenant="a")) as run:
        assert_type(run, Run)
        assert_type(await run.wait(), PipelineResults)
    assert_type(await run_stage(outputs, inputs={"fetch": {"rows": [1]}}), StageOutput)
    await graph.run(3)  # type: ignore[arg-type]
    graph.open("x")  # type: ignore[arg-type]


async def what_a_store_gives(graph: StageGraph, ctx: StageContext) -> None:
    async with open_store("sqlite:runs.db", lease=5) as store:
        assert_type(store, Store)
        assert_type(await graph.run(store=store), PipelineResults)
        assert_type(await graph.resume("r", store=store, on_change="rerun"), PipelineResults)
        assert_type(await graph.fork("r", from_stage="a", store=store), PipelineResults)
        plan = await graph.plan_resume("r", store=store)
        assert_type(plan, ResumePlan)
        assert_type(list(await store.runs()), list[RunInfo])
        await graph.resume("r")  # type: ignore[call-arg]
        await graph.run(store="runs.db")  # type: ignore[arg-type]
    assert_type(ctx.transaction(), Transaction)
    ctx.transaction().execute("INSERT INTO t VALUES (?)", (1,))
    register_journal_type(Page, lambda page: page.title, Page)
    open_store(3)  # type: ignore[arg-type]


async def undo(ctx: StageContext, output: StageOutput | None) -> None:
    assert_type(ctx.cause, Cause | None)


def undo_in_a_thread(ctx: StageContext, output: StageOutput | None) -> None: ...


def what_is_undone(results: PipelineResults, error: StageTimeoutError, run: Run) -> None:
    Pipeline("p", compensate_on={"fail"}).with_stage("a", outputs, compensate=undo, pivot=True)
    Pipeline("p").with_stage("a", outputs, compensate=Compensation(undo, timeout=5, best_effort=True))
    Pipeline("p").with_stage("a", outputs, compensate=undo_in_a_thread)  # type: ignore[arg-type]
    assert_type(results.compensation, CompensationRecord | None)
    assert_type(error.compensation, CompensationRecord | None)
    if results.compensation is not None:
        assert_type(results.compensation.status, CompensationStatus)
        assert_type(results.compensation.undos, Mapping[str, UndoRecord])
        assert_type(results.compensation.of(UndoState.FAILED), tuple[str, ...])
    run.cancel_branch("a", "no", compensate=True)
    StageOutput.cancel_branch("no", compensate=True)


def what_is_frozen(context: PipelineContext, ctx: StageContext, output: StageOutput) -> None:
    assert_type(FrozenDict({"a": 1})["a"], int)
    context.tenant = "b"  # type: ignore[misc]
    ctx.run_id = "b"  # type: ignore[misc]
    output.reason = "b"  # type: ignore[misc]


def what_is_no_name_of_ours() -> None:
    from stageflow import Pipelines  # type: ignore[attr-defined]  # noqa: F401, PLC0415
