"""What belongs to one tenant is refused to every other, and "no tenant" is one of them."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from stageflow import (
    Artifact,
    Pipeline,
    PipelineContext,
    StageContext,
    TenantMismatchError,
    run_stage,
)
from stageflow.interceptors import IdempotencyInterceptor
from tests.stages import gives, results_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

TENANTS = ["acme", "other", "", None]
CROSSINGS = [(tenant, owner) for tenant in TENANTS for owner in TENANTS if tenant != owner]
OWNED = [(tenant, owner) for tenant, owner in CROSSINGS if owner is not None]
"""Crossings with artifacts: one whose tenant is `None` is nobody's yet."""


def assert_crossing(error: BaseException | None, *, tenant: str | None, owner: str | None) -> None:
    assert type(error) is TenantMismatchError
    assert (error.tenant, error.owner) == (tenant, owner)
    assert f"on behalf of {'no tenant' if tenant is None else f'tenant {tenant!r}'}" in str(error)
    assert f"belongs to {'no tenant' if owner is None else f'tenant {owner!r}'}" in str(error)


async def failing(body: Callable[[StageContext], Awaitable[object]], context: PipelineContext) -> BaseException | None:
    """The error of a stage in a run with this context."""

    async def stage(ctx: StageContext) -> None:
        await body(ctx)

    results = await results_of(Pipeline("parent").with_stage("stage", stage), context)
    return results.records["stage"].error


def whose(seen: list[Any]) -> Pipeline:
    """A pipeline that notes on whose behalf it runs."""

    async def notes(ctx: StageContext) -> None:
        seen.append(ctx.tenant)

    return Pipeline("child").with_stage("notes", notes)


# The context


@pytest.mark.parametrize("tenant", TENANTS)
async def test_a_run_goes_on_behalf_of_its_contexts_tenant(tenant: str | None) -> None:
    seen: list[Any] = []
    results = await whose(seen).run(PipelineContext(tenant=tenant))
    assert seen == [tenant]
    assert results.tenant == tenant


@pytest.mark.parametrize("wrong", [5, b"acme", ["acme"], True])
def test_a_tenant_is_a_string(wrong: Any) -> None:
    with pytest.raises(TypeError, match="'tenant' must be"):
        PipelineContext(tenant=wrong)


# Children


@pytest.mark.parametrize("tenant", TENANTS)
async def test_children_are_their_parents_tenants_at_every_depth(tenant: str | None) -> None:
    seen: list[Any] = []

    async def nests(ctx: StageContext) -> None:
        await ctx.run_pipeline(whose(seen))
        await ctx.run_pipeline(whose(seen), {"a": 1})
        await ctx.run_pipeline(whose(seen), ctx.fork())
        await ctx.run_pipeline(whose(seen), ctx.fork(tenant=ctx.tenant))

    async def nests_deeper(ctx: StageContext) -> None:
        await ctx.run_pipeline(Pipeline("middle").with_stage("nests", nests))

    results = await Pipeline("outer").with_stage("nests", nests_deeper).run(PipelineContext(tenant=tenant))
    assert seen == [tenant] * 4
    [middle] = results.children["nests"]
    assert {results.tenant, middle.tenant, *(child.tenant for child in middle.children["nests"])} == {tenant}


@pytest.mark.parametrize("tenant", TENANTS)
async def test_the_items_of_a_map_are_their_runs_tenants(tenant: str | None) -> None:
    seen: list[Any] = []
    pipeline = Pipeline("outer").with_map("each", whose(seen), over=lambda ctx: [1, 2])
    await pipeline.run(PipelineContext(tenant=tenant))
    assert seen == [tenant] * 2


@pytest.mark.parametrize(("tenant", "owner"), CROSSINGS)
async def test_a_child_with_the_context_of_another_tenant_is_refused_before_it_begins(
    tenant: str | None, owner: str | None
) -> None:
    seen: list[Any] = []

    async def nests(ctx: StageContext) -> None:
        await ctx.run_pipeline(whose(seen), PipelineContext(tenant=owner))

    results = await results_of(Pipeline("parent").with_stage("nests", nests), PipelineContext(tenant=tenant))
    assert_crossing(results.records["nests"].error, tenant=tenant, owner=owner)
    assert seen == []
    assert not results.children


@pytest.mark.parametrize(("tenant", "owner"), CROSSINGS)
async def test_a_fork_for_another_tenant_is_refused(tenant: str | None, owner: str | None) -> None:
    context = PipelineContext(tenant=owner)
    with pytest.raises(TenantMismatchError) as caught:
        context.fork(tenant=tenant)
    assert_crossing(caught.value, tenant=tenant, owner=owner)

    async def forks(ctx: StageContext) -> None:
        ctx.fork(tenant=tenant)

    assert_crossing(await failing(forks, context), tenant=tenant, owner=owner)


# Artifacts


@pytest.mark.parametrize(("tenant", "owner"), OWNED)
async def test_an_artifact_of_another_tenant_is_refused(tenant: str | None, owner: str | None) -> None:
    artifact = Artifact(name="map", tenant=owner)
    with pytest.raises(TenantMismatchError, match="artifact 'map'") as caught:
        PipelineContext(tenant=tenant, artifacts=[artifact])
    assert_crossing(caught.value, tenant=tenant, owner=owner)
    with pytest.raises(TenantMismatchError, match="artifact 'map'") as caught:
        PipelineContext(tenant=tenant).fork(artifacts=[artifact])
    assert_crossing(caught.value, tenant=tenant, owner=owner)
    with pytest.raises(TenantMismatchError, match="artifact 'map'") as caught:
        attrs.evolve(PipelineContext(tenant=owner, artifacts=[artifact]), tenant=tenant)
    assert_crossing(caught.value, tenant=tenant, owner=owner)
    added: list[Any] = []

    async def adds(ctx: StageContext) -> None:
        try:
            ctx.add_artifact(artifact)
        finally:
            added.append(ctx.artifacts)

    assert_crossing(await failing(adds, PipelineContext(tenant=tenant)), tenant=tenant, owner=owner)
    assert added == [()]


@pytest.mark.parametrize("tenant", TENANTS)
async def test_an_artifact_that_is_nobodys_becomes_the_tenants(tenant: str | None) -> None:
    async def adds(ctx: StageContext) -> None:
        ctx.add_artifact(Artifact(name="made"))
        ctx.add_artifact(Artifact(name="own", tenant=ctx.tenant))
        assert {artifact.tenant for artifact in ctx.artifacts} == {tenant}

    context = PipelineContext(tenant=tenant, artifacts=[Artifact(name="given"), Artifact(name="own", tenant=tenant)])
    results = await Pipeline("p").with_stage("adds", adds).run(context)
    assert [(artifact.name, artifact.tenant) for artifact in results.artifacts] == [
        ("given", tenant),
        ("own", tenant),
        ("made", tenant),
        ("own", tenant),
    ]


async def test_what_went_through_a_run_of_one_tenant_is_not_let_into_that_of_another() -> None:
    given = PipelineContext(tenant="acme", artifacts=[Artifact(name="given")])
    results = await Pipeline("p").with_stage("s", gives()).run(given)
    with pytest.raises(TenantMismatchError) as caught:
        PipelineContext(tenant="other", artifacts=results.artifacts)
    assert_crossing(caught.value, tenant="other", owner="acme")
    assert PipelineContext(tenant="acme", artifacts=results.artifacts).artifacts == results.artifacts


async def test_artifacts_of_the_items_of_a_map_are_their_runs_tenants() -> None:
    async def adds(ctx: StageContext) -> None:
        ctx.add_artifact(Artifact(name="made"))

    for each in (adds, Pipeline("each").with_stage("adds", adds)):
        pipeline = Pipeline("outer").with_map("each", each, over=lambda ctx: [1, 2])
        results = await pipeline.run(PipelineContext(tenant="acme"))
        assert [artifact.tenant for artifact in results.artifacts] == ["acme"] * 2


def test_what_is_no_artifact_is_refused() -> None:
    wrong: Any = ["map"]
    with pytest.raises(TypeError, match=r"artifacts= takes Artifacts, not 'map'; write Artifact\(name=...") as caught:
        PipelineContext(artifacts=wrong)
    assert caught.value.__cause__ is None


# Results


@pytest.mark.parametrize("owner", TENANTS)
@pytest.mark.parametrize("tenant", TENANTS)
async def test_results_are_visible_to_the_runs_tenant_only(tenant: str | None, owner: str | None) -> None:
    async def nests(ctx: StageContext) -> None:
        await ctx.run_pipeline(Pipeline("child").with_stage("s", gives()))

    results = await Pipeline("p").with_stage("nests", nests).run(PipelineContext(tenant=owner, run_id="r-1"))
    for found in (results, *results.children["nests"], pickle.loads(pickle.dumps(results))):
        if tenant == owner:
            assert found.visible_to(tenant) is found
            continue
        with pytest.raises(TenantMismatchError, match=f"run {found.run_id} belongs to") as caught:
            found.visible_to(tenant)
        assert_crossing(caught.value, tenant=tenant, owner=owner)


async def test_results_are_hidden_while_the_run_goes_and_when_it_has_failed() -> None:
    async def fails(ctx: StageContext) -> None:
        with pytest.raises(TenantMismatchError):
            run.results.visible_to("other")
        raise ValueError("no")

    graph = Pipeline("p").with_stage("fails", fails, on_failure="tolerate").build()
    async with graph.open(PipelineContext(tenant="acme")) as run:
        assert run.results.visible_to("acme") is run.results
    with pytest.raises(TenantMismatchError):
        run.results.visible_to(None)
    assert isinstance(run.results.records["fails"].error, ValueError)


# Idempotency keys


async def test_the_keys_of_one_stage_in_runs_of_one_id_differ_from_tenant_to_tenant() -> None:
    keys: list[str] = []

    async def notes(ctx: StageContext) -> None:
        keys.append(ctx.idempotency_key)

    for tenant in [*TENANTS, "null", "None", *TENANTS]:
        await run_stage(notes, PipelineContext(tenant=tenant, run_id="r"))
    assert len(set(keys)) == len(TENANTS) + 2
    assert keys[: len(TENANTS)] == keys[-len(TENANTS) :]


async def test_what_was_done_under_a_key_for_one_tenant_is_not_given_to_another() -> None:
    once = IdempotencyInterceptor(lambda ctx: "key", parameters=lambda ctx: None)

    async def secret(ctx: StageContext) -> dict[str, object]:
        return {"of": ctx.tenant, "run": ctx.run_id}

    pipeline = Pipeline("p", interceptors=[once]).with_stage("s", secret)
    first = {tenant: (await pipeline.run(PipelineContext(tenant=tenant)))["s"] for tenant in TENANTS}
    assert {tenant: output["of"] for tenant, output in first.items()} == {tenant: tenant for tenant in TENANTS}
    for tenant in TENANTS:
        assert (await pipeline.run(PipelineContext(tenant=tenant)))["s"] is first[tenant]


# The error


def test_the_error_pickles_and_copies_with_its_attributes() -> None:
    error = TenantMismatchError("run r", tenant=None, owner="acme")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (twin.tenant, twin.owner, str(twin)) == (None, "acme", str(error))
    assert str(error) == (
        "run r belongs to tenant 'acme', and cannot be used on behalf of no tenant; "
        "use it in a run of its own tenant, or hand over a copy of what may be shared"
    )
