"""CORE-010: a tenant that reaches for another's run, child, artifact or key is refused, in memory and in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from stageflow import (
    Artifact,
    Pipeline,
    PipelineContext,
    PipelineResults,
    StageContext,
    StageExecutionError,
    TenantMismatchError,
    open_store,
    run_stage,
)
from stageflow.interceptors import IdempotencyInterceptor
from tests.stages import gives

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAIRS = [("a", "b"), ("b", "a"), ("a", None), (None, "b")]
"""Whose it is, and who reaches for it; no tenant is one as well."""


async def run_of(owner: str | None) -> PipelineResults:
    """A run with a child and an artifact."""

    async def works(ctx: StageContext) -> dict[str, object]:
        ctx.add_artifact(Artifact(name="report", data=b"secret"))
        await ctx.run_pipeline(Pipeline("child").with_stage("s", gives(secret=1)))
        return {"secret": 2}

    return await Pipeline("p").with_stage("works", works).run(PipelineContext(tenant=owner))


async def reaching(tenant: str | None, reach: Callable[[StageContext], Any]) -> TenantMismatchError:
    """The error of a stage, in a run of the tenant, that reaches for what is not the tenant's."""

    async def stage(ctx: StageContext) -> None:
        found = reach(ctx)
        if hasattr(found, "__await__"):
            await found

    with pytest.raises(StageExecutionError) as caught:
        await run_stage(stage, PipelineContext(tenant=tenant))
    error = caught.value.original
    assert type(error) is TenantMismatchError
    return error


@pytest.mark.parametrize(("owner", "tenant"), PAIRS)
async def test_the_run_of_another_and_its_children_are_refused(owner: str | None, tenant: str | None) -> None:
    results = await run_of(owner)
    [child] = results.children["works"]
    for found in (results, child):
        assert found.visible_to(owner) is found
        error = await reaching(tenant, lambda ctx, found=found: found.visible_to(ctx.tenant))  # type: ignore[misc]
        assert (error.tenant, error.owner) == (tenant, owner)
        assert found.run_id in str(error)


@pytest.mark.parametrize(("owner", "tenant"), PAIRS)
async def test_a_child_on_behalf_of_another_is_refused(owner: str | None, tenant: str | None) -> None:
    context = PipelineContext(tenant=owner).fork()
    child = Pipeline("child").with_stage("s", gives())
    error = await reaching(tenant, lambda ctx: ctx.run_pipeline(child, context))
    assert (error.tenant, error.owner) == (tenant, owner)
    assert "pipeline 'child'" in str(error)
    error = await reaching(tenant, lambda ctx: ctx.fork(tenant=owner))
    assert (error.tenant, error.owner) == (owner, tenant)


@pytest.mark.parametrize(("owner", "tenant"), [pair for pair in PAIRS if pair[0] is not None])
async def test_the_artifact_of_another_is_refused(owner: str | None, tenant: str | None) -> None:
    [artifact] = (await run_of(owner)).artifacts
    reaches: list[Callable[[StageContext], Any]] = [
        lambda ctx: ctx.add_artifact(artifact),
        lambda ctx: ctx.fork(artifacts=[artifact]),
        lambda ctx: PipelineContext(tenant=ctx.tenant, artifacts=[artifact]),
    ]
    for reach in reaches:
        error = await reaching(tenant, reach)
        assert (error.tenant, error.owner) == (tenant, owner)
        assert "artifact 'report'" in str(error)


@pytest.mark.parametrize(("owner", "tenant"), PAIRS)
async def test_a_key_of_another_leads_to_nothing_of_theirs(owner: str | None, tenant: str | None) -> None:
    keys: list[str] = []

    async def charges(ctx: StageContext) -> dict[str, object]:
        keys.append(ctx.idempotency_key)
        return {"for": ctx.tenant}

    once = IdempotencyInterceptor(lambda ctx: "order-1")
    pipeline = Pipeline("p", interceptors=[once]).with_stage("s", charges)
    for who in (owner, tenant, owner, tenant):
        results = await pipeline.run(PipelineContext(tenant=who, run_id="same"))
        assert results["s"]["for"] == who
    assert len(keys) == len(set(keys)) == 2


@pytest.mark.parametrize("where", ["memory:", "sqlite:{}/runs.db"])
@pytest.mark.parametrize(("owner", "tenant"), PAIRS)
async def test_a_run_in_a_store_is_its_tenants_alone(
    owner: str | None, tenant: str | None, where: str, tmp_path: Path
) -> None:
    graph = Pipeline("p").with_stage("s", gives(secret=2)).build()
    async with open_store(where.format(tmp_path)) as store:
        await graph.run(PipelineContext(run_id="r", tenant=owner), store=store)
        for reach in (
            lambda: store.read("r", tenant=tenant),
            lambda: graph.resume("r", store=store, tenant=tenant),
            lambda: graph.plan_resume("r", store=store, tenant=tenant),
            lambda: graph.fork("r", from_stage="s", store=store, tenant=tenant),
        ):
            with pytest.raises(TenantMismatchError):
                await reach()
        assert list(await store.runs(tenant=tenant)) == []
        assert list(await store.prune(older_than=-1, tenant=tenant)) == []
        assert [info.run_id for info in await store.runs(tenant=owner)] == ["r"]
