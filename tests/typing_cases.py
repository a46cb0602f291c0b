"""What type checkers make of the public names: the typing session reads this, and nothing runs it.

Every ``type: ignore`` is a claim that the line must not check. Were it to check, mypy would call the comment unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_type

import attrs

from stageflow import (
    FrozenDict,
    Join,
    OnFailure,
    Pipeline,
    PipelineContext,
    PipelineResults,
    Run,
    RunStatus,
    Stage,
    StageContext,
    StageGraph,
    StageKind,
    StageOutput,
    StageRecord,
    optional,
    run_stage,
    stage,
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
    return StageOutput.skip("it is not async")


async def of_something_else(number: int) -> None: ...


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
    Pipeline("p").with_stage("a", plain)  # type: ignore[arg-type]
    Pipeline("p").with_stage("a", of_something_else)  # type: ignore[arg-type]
    Pipeline("p").with_stage("a", outputs, timeout="5")  # type: ignore[call-overload]
    Pipeline("p").with_stage("a", outputs, retries=3)  # type: ignore[call-overload]
    Pipeline("p", default_timeout="30")  # type: ignore[arg-type]
    optional(3)  # type: ignore[arg-type]


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


def what_is_frozen(context: PipelineContext, ctx: StageContext, output: StageOutput) -> None:
    assert_type(FrozenDict({"a": 1})["a"], int)
    context.tenant = "b"  # type: ignore[misc]
    ctx.run_id = "b"  # type: ignore[misc]
    output.reason = "b"  # type: ignore[misc]
