"""A fork is a context for a run that belongs to this one, and sees of its data what was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from stageflow import (
    Artifact,
    ContextSnapshot,
    Pipeline,
    PipelineContext,
    StageContext,
    StageExecutionError,
    run_stage,
)
from tests.stages import gives

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = PipelineContext(
    run_id="r-1",
    correlation_id="c-1",
    tenant="acme",
    data={"a": [1], "b": {"x": 2}, "secret": 3},
    snapshot=ContextSnapshot({"messages": ["hello"]}),
    artifacts=[Artifact(name="map")],
    metadata={"m": 1},
    timeouts={"s": 5},
)


async def forked(*keys: Any, of: PipelineContext = FULL, **changes: Any) -> PipelineContext:
    """What `fork` gives, of a description and within a stage of a run of it; which is the same."""
    made: list[PipelineContext] = []

    async def forks(ctx: StageContext) -> None:
        made.append(ctx.fork(*keys, **changes))

    run = attrs.evolve(of, timeouts={})  # there is no stage "s"
    await run_stage(forks, run)
    described = of.fork(*keys, **changes)
    assert made == [described]
    return described


async def refused(kind: type[Exception], fork: Callable[[Any], Any], *, of: PipelineContext = FULL) -> Exception:
    """The error of a fork of a description, which is of the same kind within a stage."""
    with pytest.raises(kind) as caught:
        fork(of)

    async def forks(ctx: StageContext) -> None:
        fork(ctx)

    with pytest.raises(StageExecutionError) as ended:
        await run_stage(forks, attrs.evolve(of, timeouts={}))
    assert type(ended.value.original) is kind
    assert str(ended.value.original) == str(caught.value)
    return caught.value


# What it sees


async def test_a_fork_has_the_identity_and_nothing_else() -> None:
    assert await forked() == PipelineContext(correlation_id="c-1", tenant="acme")


async def test_a_fork_sees_the_data_that_was_chosen() -> None:
    fork = await forked("a", "b")
    assert fork == PipelineContext(correlation_id="c-1", tenant="acme", data={"a": [1], "b": {"x": 2}})
    assert fork.data["a"] is FULL.data["a"]
    assert "secret" not in fork.data


async def test_data_is_added_to_what_was_chosen_and_goes_before_it() -> None:
    assert (await forked("a", "b", data={"b": 9, "c": [1]})).data == {"a": [1], "b": 9, "c": [1]}


@pytest.mark.parametrize("data", [{"z": 1}, {}, [1, 2], "text", 5, None])
async def test_data_alone_is_all_there_is(data: Any) -> None:
    assert (await forked(data=data)).data == data


async def test_what_is_named_is_handed_down() -> None:
    changes: dict[str, Any] = {
        "snapshot": FULL.snapshot,
        "artifacts": FULL.artifacts,
        "metadata": {"m": 2},
        "timeouts": {"t": 1},
        "correlation_id": "c-2",
        "run_id": "r-2",
    }
    fork = await forked("a", **changes)
    assert fork == PipelineContext(data={"a": [1]}, tenant="acme", **changes)
    assert fork.snapshot is FULL.snapshot


async def test_a_fork_of_a_fork_sees_no_more_than_the_fork() -> None:
    fork = await forked("a")
    assert (await forked("a", of=fork)) == fork
    await refused(KeyError, lambda ctx: ctx.fork("secret"), of=fork)


async def test_what_a_fork_was_made_of_stays_as_it_was() -> None:
    before = attrs.evolve(FULL)
    fork = await forked("a", data={"more": 1})
    with pytest.raises(TypeError, match="immutable"):
        fork.data["a"].append(2)
    with pytest.raises(TypeError, match="immutable"):
        fork.data["b"] = 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        fork.data = {}  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert before == FULL


# Identity


async def test_runs_of_a_fork_have_ids_of_their_own_and_what_ties_them_together_in_common() -> None:
    seen: list[Any] = []

    async def notes(ctx: StageContext) -> None:
        seen.append((ctx.run_id, ctx.correlation_id, ctx.tenant, ctx.data))

    child = Pipeline("child").with_stage("notes", notes)

    async def nests(ctx: StageContext) -> None:
        fork = ctx.fork("a")
        assert fork.run_id is None
        for _ in range(2):
            await ctx.run_pipeline(child, fork)

    results = await Pipeline("parent").with_stage("nests", nests).run(attrs.evolve(FULL, timeouts={}))
    first, second = seen
    assert first[1:] == second[1:] == ("c-1", "acme", {"a": [1]})
    assert len({first[0], second[0], results.run_id}) == 3
    assert [child.run_id for child in results.children["nests"]] == [first[0], second[0]]


async def test_within_a_stage_the_correlation_is_the_runs_id_if_nothing_was_said() -> None:
    forks: list[PipelineContext] = []

    async def makes(ctx: StageContext) -> None:
        assert ctx.fork().correlation_id == ctx.run_id
        forks.append(ctx.fork(correlation_id=None))

        def makes_another(inner: StageContext) -> None:
            forks.append(inner.fork())

        await ctx.run_pipeline(Pipeline("child").with_stage("forks", makes_another))

    results = await Pipeline("p").with_stage("makes", makes).run()
    assert [fork.correlation_id for fork in forks] == [None, results.run_id]
    assert PipelineContext(run_id="r").fork().correlation_id is None


# What is refused


async def test_an_unknown_key_is_refused() -> None:
    error = await refused(KeyError, lambda ctx: ctx.fork("a", "secrt"))
    assert error.args == ("secrt",)


async def test_an_unknown_attribute_is_refused() -> None:
    error = await refused(TypeError, lambda ctx: ctx.fork("a", metdata={}))
    assert "metdata" in str(error)


@pytest.mark.parametrize("data", [[1, 2], 5, "text", Artifact(name="x")], ids=type)
@pytest.mark.parametrize("key", ["a", 0])
async def test_there_is_nothing_to_choose_from_what_is_no_mapping(data: Any, key: Any) -> None:
    error = await refused(TypeError, lambda ctx: ctx.fork(key), of=PipelineContext(data=data))
    kind = type(PipelineContext(data=data).data).__name__
    assert str(error) == (
        f"items can be chosen of a mapping only, and the data is of type {kind!r}; "
        f"hand down what the other run shall see with data="
    )


@pytest.mark.parametrize("data", [[1, 2], 5, "text", None], ids=type)
async def test_there_is_nothing_to_add_to_the_chosen_but_a_mapping(data: Any) -> None:
    error = await refused(TypeError, lambda ctx: ctx.fork("a", data=data))
    assert str(error) == (
        f"only a mapping can be added to the items that were chosen, not data= of type {type(data).__name__!r}; "
        f"make one of it, or choose no items"
    )


async def test_a_context_says_all_so_that_nothing_can_be_given_beside_it() -> None:
    extras: list[dict[str, Any]] = [{"snapshot": ContextSnapshot()}, {"metadata": {}}, {"timeouts": {}}]
    for extra in extras:

        async def nests(ctx: StageContext, extra: dict[str, Any] = extra) -> None:
            await ctx.run_pipeline(Pipeline("child").with_stage("s", gives()), ctx.fork(), **extra)

        with pytest.raises(StageExecutionError, match="a PipelineContext says all") as caught:
            await run_stage(nests)
        assert type(caught.value.original) is TypeError
