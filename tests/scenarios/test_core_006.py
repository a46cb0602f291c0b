"""CORE-006: identity across five nested levels: ids are unique, correlation and tenant inherited, data fresh."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow import ContextSnapshot, Pipeline, PipelineContext, StageContext

LEVELS = 5


def levels(seen: list[StageContext], *, hand_down: bool) -> Pipeline:
    """A pipeline that notes its context and runs another like it within, five levels in all."""

    def level(depth: int) -> Pipeline:
        async def note(ctx: StageContext) -> None:
            seen.append(ctx)
            if depth < LEVELS:
                given: dict[str, Any] = {}
                if hand_down:
                    data = {**ctx.data, "level": depth + 1}
                    given = {"data": data, "snapshot": ctx.snapshot, "metadata": ctx.metadata}
                await ctx.run_pipeline(level(depth + 1), **given)

        return Pipeline(f"level {depth}").with_stage("note", note)

    return level(1)


CONTEXT = PipelineContext(
    correlation_id="c-1",
    tenant="acme",
    data={"level": 1, "secret": [1]},
    snapshot=ContextSnapshot({"messages": ["hello"]}),
    metadata={"source": "test"},
)


async def test_run_ids_are_unique_and_who_it_is_for_is_inherited() -> None:
    seen: list[StageContext] = []
    results = await levels(seen, hand_down=False).run(CONTEXT)
    assert len(seen) == LEVELS
    assert len({ctx.run_id for ctx in seen}) == LEVELS
    assert [ctx.run_id for ctx in seen] == sorted(ctx.run_id for ctx in seen)
    assert {(ctx.correlation_id, ctx.tenant) for ctx in seen} == {("c-1", "acme")}
    for ctx in seen:
        assert results.run_id == ctx.run_id
        results = results.children["note"][0] if results.children else results


async def test_data_are_fresh_unless_they_are_handed_down() -> None:
    seen: list[StageContext] = []
    await levels(seen, hand_down=False).run(CONTEXT)
    outer, *inner = seen
    assert outer.data == {"level": 1, "secret": [1]}
    for ctx in inner:
        assert (ctx.data, ctx.snapshot, ctx.metadata, ctx.artifacts) == ({}, ContextSnapshot(), {}, ())


async def test_what_is_handed_down_arrives_at_every_level_and_cannot_be_changed_there() -> None:
    seen: list[StageContext] = []
    await levels(seen, hand_down=True).run(CONTEXT)
    assert [ctx.data for ctx in seen] == [{"level": level, "secret": [1]} for level in range(1, LEVELS + 1)]
    assert all(ctx.snapshot is CONTEXT.snapshot for ctx in seen)
    assert all(ctx.metadata == {"source": "test"} for ctx in seen)
    for ctx in seen:
        with pytest.raises(TypeError):
            ctx.data["secret"].append(2)
    assert CONTEXT.data == {"level": 1, "secret": [1]}


async def test_the_correlation_is_the_id_of_the_outermost_run_if_none_was_given() -> None:
    seen: list[StageContext] = []
    results = await levels(seen, hand_down=False).run()
    assert {ctx.correlation_id for ctx in seen} == {results.run_id}
    assert {ctx.tenant for ctx in seen} == {None}
