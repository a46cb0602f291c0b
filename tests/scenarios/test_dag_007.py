"""DAG-007: stages are added while a run is going, by nested runs and maps; the graph itself stays frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from stageflow import Pipeline, RunStatus, StageContext, StageOutput
from tests.stages import OK, duration, gives, sees, states

if TYPE_CHECKING:
    from trio.testing import MockClock


async def find(ctx: StageContext) -> StageOutput:
    """What there is to do shows only now."""
    await trio.sleep(1)
    return StageOutput.ok(list(range(ctx.data["pages"])))


async def load(ctx: StageContext) -> StageOutput:
    await trio.sleep(1)
    return StageOutput.ok(page=ctx.data)


async def test_a_map_adds_as_many_stages_as_there_turn_out_to_be_items(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("crawl")
        .with_stage("find", find)
        .with_map("load", load, over="find", limit=100)
        .with_stage("join", sees(), after="load")
    )
    graph = pipeline.build()
    before = (list(graph.stages), graph.to_mermaid())
    for pages in (0, 1, 7, 100):
        results = await graph.run({"pages": pages})
        assert [item["page"] for item in results["load"].data] == list(range(pages))
        assert results["join"]["saw"] == ["load"]
        assert duration(results) == (2 if pages else 1)
    assert (list(graph.stages), graph.to_mermaid()) == before


async def test_a_stage_builds_and_runs_a_pipeline_that_nobody_knew_before(autojump_clock: MockClock) -> None:
    async def plans(ctx: StageContext) -> dict[str, Any]:
        plan = Pipeline("plan").with_stage("s0", gives(n=0))
        for number in range(1, len(ctx.inputs["find"])):
            plan = plan.with_stage(f"s{number}", gives(n=number), after=f"s{number - 1}")
        results = await ctx.run_pipeline(plan)
        return {"ran": list(results)}

    graph = Pipeline("p").with_stage("find", find).with_stage("plan", plans, after="find").build()
    results = await graph.run({"pages": 5})
    assert results["plan"]["ran"] == ["s0", "s1", "s2", "s3", "s4"]
    (child,) = results.children["plan"]
    assert states(child) == {f"s{number}": OK for number in range(5)}
    assert list(graph.stages) == ["find", "plan"]
    assert results.status is RunStatus.SUCCEEDED


async def test_work_that_finds_more_work_goes_on_until_there_is_none(autojump_clock: MockClock) -> None:
    """A tree of pages, each of which is found by the one above it: items come in while others are in flight."""
    tree = {"/": ["/a", "/b"], "/a": ["/a/x"], "/b": [], "/a/x": []}

    async def crawl(ctx: StageContext) -> dict[str, Any]:
        send, receive = trio.open_memory_channel[str](100)
        send.send_nowait("/")
        left = 1

        async def visit(ctx: StageContext) -> StageOutput:
            nonlocal left
            await trio.sleep(1)
            left += len(tree[ctx.data]) - 1
            for page in tree[ctx.data]:
                send.send_nowait(page)
            if not left:
                send.close()
            return StageOutput.ok(page=ctx.data)

        pages = Pipeline("pages").with_map("visit", visit, over=lambda _: receive)
        return {"pages": [item["page"] for item in (await ctx.run_pipeline(pages))["visit"].data]}

    results = await Pipeline("p").with_stage("crawl", crawl).run()
    assert results["crawl"]["pages"][0] == "/"
    assert sorted(results["crawl"]["pages"]) == sorted(tree)
    assert duration(results) == 3
