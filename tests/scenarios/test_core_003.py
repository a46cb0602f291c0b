"""CORE-003: fifty parallel forks write data of their own; the parent's is readable, not writable, and unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from stageflow import ContextSnapshot, Pipeline, PipelineContext, StageContext
from tests.stages import fan


async def test_fifty_forks_change_their_own_copies_and_nothing_else() -> None:
    original: dict[str, Any] = {"items": [1, 2, {"deep": [3]}], "name": "parent"}
    snapshot = ContextSnapshot({"messages": ["hello"]})
    described = PipelineContext(data=original, snapshot=snapshot)

    async def forks(ctx: StageContext) -> dict[str, object]:
        number = int(ctx.stage[1:])
        assert ctx.data["items"][2]["deep"] == [3]
        mine = dict(ctx.data)
        mine["name"] = ctx.stage
        mine["items"] = [*ctx.data["items"], number]
        following = ctx.snapshot.evolve(messages=[*ctx.snapshot["messages"], ctx.stage])
        await trio.lowlevel.checkpoint()
        with pytest.raises(TypeError, match="immutable"):
            ctx.data["name"] = ctx.stage
        with pytest.raises(TypeError, match="immutable"):
            ctx.data["items"][2]["deep"].append(number)
        with pytest.raises(TypeError):
            ctx.snapshot["messages"] = []  # type: ignore[index]  # pyright: ignore[reportIndexIssue]
        return {"mine": mine, "messages": following["messages"], "parent": following.parent is ctx.snapshot}

    results = await fan(50, forks).run(described)
    for number in range(50):
        output = results[f"b{number}"]
        assert output["mine"] == {"items": [1, 2, {"deep": [3]}, number], "name": f"b{number}"}
        assert output["messages"] == ["hello", f"b{number}"]
        assert output["parent"]
    assert original == {"items": [1, 2, {"deep": [3]}], "name": "parent"}
    assert described.data == original
    assert snapshot == {"messages": ["hello"]}
    assert snapshot.version == 0


async def test_fifty_forks_for_runs_within_change_nothing_of_the_parents() -> None:
    original: dict[str, Any] = {"items": [1, {"deep": [3]}], "name": "parent", "secret": 1}
    described = PipelineContext(data=original, snapshot=ContextSnapshot({"messages": ["hello"]}))

    async def writes(ctx: StageContext) -> dict[str, object]:
        assert "secret" not in ctx.data
        await trio.lowlevel.checkpoint()
        with pytest.raises(TypeError, match="immutable"):
            ctx.data["items"][1]["deep"].append(ctx.data["name"])
        return {"mine": {**ctx.data, "items": [*ctx.data["items"], ctx.data["name"]]}}

    async def forks(ctx: StageContext) -> dict[str, object]:
        fork = ctx.fork("items", data={"name": ctx.stage})
        assert fork.data["items"] is ctx.data["items"]
        results = await ctx.run_pipeline(Pipeline("child").with_stage("writes", writes), fork)
        assert ctx.data == original
        return {"mine": results["writes"]["mine"]}

    results = await fan(50, forks).run(described)
    for number in range(50):
        name = f"b{number}"
        assert results[name]["mine"] == {"items": [1, {"deep": [3]}, name], "name": name}
    assert described.data == original == {"items": [1, {"deep": [3]}], "name": "parent", "secret": 1}
    assert described.snapshot == {"messages": ["hello"]}
