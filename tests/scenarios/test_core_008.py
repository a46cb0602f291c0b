"""CORE-008: fifty parallel writers mutate nested data. Every write raises; every reader sees the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import Artifact, ContextSnapshot, Pipeline, PipelineContext, StageContext, StageOutput
from tests.stages import OK, states

if TYPE_CHECKING:
    from collections.abc import Callable

ORIGINAL: dict[str, Any] = {
    "users": [{"name": "ada", "tags": ["x"]}, {"name": "bob", "tags": []}],
    "limits": {"cpu": {"max": 4}},
}

WRITES: list[Callable[[Any], Any]] = [
    lambda data: data.update(users=[]),
    lambda data: data["users"].append({}),
    lambda data: data["users"][0].__setitem__("name", "eve"),
    lambda data: data["users"][0]["tags"].append("y"),
    lambda data: data["limits"]["cpu"].pop("max"),
    lambda data: data["limits"].__delitem__("cpu"),
    lambda data: data["users"].sort(key=str),
    lambda data: data["users"].__setitem__(slice(None), []),
    lambda data: data["limits"].clear(),
    lambda data: data["limits"].setdefault("gpu", {}),
]


async def test_every_write_raises_and_every_reader_sees_the_original() -> None:
    refused: list[str] = []

    async def gives_nested(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(ORIGINAL)

    async def writes(ctx: StageContext) -> dict[str, object]:
        write = WRITES[int(ctx.stage[1:]) % len(WRITES)]
        for data in (ctx.data, ctx.inputs["root"].data, ctx.metadata):
            with pytest.raises(TypeError, match="immutable"):
                write(data)
            await trio.lowlevel.checkpoint()
            refused.append(ctx.stage)
        return {"read": ctx.data, "input": ctx.inputs["root"].data}

    pipeline = Pipeline("writers").with_stage("root", gives_nested)
    names = [f"w{number}" for number in range(50)]
    for name in names:
        pipeline = pipeline.with_stage(name, writes, after="root")

    async def reads(ctx: StageContext) -> dict[str, object]:
        return {"all": [output["read"] for output in ctx.inputs.values()]}

    results = await pipeline.with_stage("reader", reads, after=names).run(
        PipelineContext(data=ORIGINAL, metadata=ORIGINAL)
    )
    assert set(states(results).values()) == {OK}
    assert len(refused) == 150
    assert all(results[name]["read"] == results[name]["input"] == ORIGINAL for name in names)
    assert results["reader"]["all"] == [ORIGINAL] * 50
    with pytest.raises(TypeError, match="immutable"):
        results["w0"].data["read"]["users"].clear()


async def test_snapshots_artifacts_and_partial_outputs_cannot_be_written_into_either() -> None:
    refused: list[str] = []

    async def writes(ctx: StageContext) -> None:
        write = WRITES[int(ctx.stage[1:]) % len(WRITES)]
        [artifact] = ctx.artifacts
        for data in (ctx.snapshot["it"], artifact.data, artifact.metadata):
            with pytest.raises(TypeError, match="immutable"):
                write(data)
            await trio.lowlevel.checkpoint()
            refused.append(ctx.stage)
            assert ctx.snapshot == {"it": ORIGINAL}
            assert artifact.data == artifact.metadata == ORIGINAL
        ctx.save_partial(it=ORIGINAL)

    pipeline = Pipeline("writers")
    for number in range(50):
        pipeline = pipeline.with_stage(f"w{number}", writes)
    results = await pipeline.run(
        PipelineContext(
            snapshot=ContextSnapshot({"it": ORIGINAL}),
            artifacts=[Artifact(name="given", data=ORIGINAL, metadata=ORIGINAL)],
        )
    )
    assert set(states(results).values()) == {OK}
    assert len(refused) == 150
    for number, write in enumerate(WRITES):
        partial = results.records[f"w{number}"].partial["it"]
        with pytest.raises(TypeError, match="immutable"):
            write(partial)
        assert partial == ORIGINAL


async def test_what_a_stage_keeps_of_its_output_is_not_what_others_see() -> None:
    kept: list[dict[str, Any]] = []

    async def keeps(ctx: StageContext) -> dict[str, Any]:
        kept.append({"rows": [1, {"x": 1}]})
        return kept[0]

    async def changes(ctx: StageContext) -> dict[str, object]:
        kept[0]["rows"][1]["x"] = 2
        kept[0]["rows"].append(3)
        return {"saw": ctx.inputs["a"]["rows"]}

    results = await Pipeline("kept").with_stage("a", keeps).with_stage("b", changes, after="a").run()
    assert results["a"]["rows"] == results["b"]["saw"] == [1, {"x": 1}]
