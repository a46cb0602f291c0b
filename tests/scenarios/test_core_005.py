"""CORE-005: fifty versions of a snapshot. Each knows the one before; rolling back restores it; they share structure."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest

from stageflow import ContextSnapshot, Pipeline, PipelineContext, StageContext

VERSIONS = 50


def values_of(version: int) -> dict[str, Any]:
    """What the version holds, in plain data."""
    return {
        "messages": [{"role": "user", "content": f"message {n}", "meta": {"n": [n]}} for n in range(100 + version)],
        "profile": {"name": "ada", "visits": version, "address": {"city": "London"}},
        "documents": [{"text": "x" * 1_000}],
    }


def versions() -> list[ContextSnapshot]:
    """Fifty versions: in each, a message more and a nested field changed."""
    made = [ContextSnapshot(values_of(0))]
    for version in range(1, VERSIONS):
        last, new = made[-1], values_of(version)
        made.append(
            last.evolve(
                messages=[*last["messages"], new["messages"][-1]], profile={**last["profile"], "visits": version}
            )
        )
    return made


def test_every_version_has_its_number_and_the_one_before_as_parent() -> None:
    made = versions()
    assert [snapshot.version for snapshot in made] == list(range(VERSIONS))
    assert made[0].parent is None
    for before, after in itertools.pairwise(made):
        assert after.parent is before


def test_rolling_back_restores_every_version() -> None:
    made = versions()
    for version, snapshot in enumerate(made):
        assert made[-1].rollback(version) is snapshot
        assert snapshot == values_of(version)
    with pytest.raises(ValueError, match="no version 50"):
        made[-1].rollback(VERSIONS)


def test_rolling_back_by_deltas_restores_every_version() -> None:
    made = versions()
    forwards = [after.diff(before) for before, after in itertools.pairwise(made)]
    backwards = [before.diff(after) for before, after in itertools.pairwise(made)]
    assert {len(delta) for delta in forwards + backwards} == {2}
    snapshot = made[0].forget()
    for version, delta in enumerate(forwards, 1):
        snapshot = snapshot.apply(delta)
        assert snapshot == values_of(version)
        assert snapshot.version == version
    for version, delta in reversed(list(enumerate(backwards))):
        snapshot = snapshot.apply(delta)
        assert snapshot == values_of(version)
    assert not snapshot.diff(made[0])


def test_versions_share_what_did_not_change() -> None:
    made = versions()
    for snapshot in made:
        assert snapshot["documents"] is made[0]["documents"]
        assert snapshot["profile"]["address"] is made[0]["profile"]["address"]
        for mine, first in zip(snapshot["messages"], made[0]["messages"], strict=False):
            assert mine is first
    # Fifty versions hold 149 messages, and not 6,225.
    assert len({id(message) for snapshot in made for message in snapshot["messages"]}) == 149
    stored = pickle.dumps(made[-1])
    assert stored.count(b"message 42") == stored.count(b"London") == stored.count(b"x" * 1_000) == 1


def test_what_is_forgotten_goes() -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    snapshot = ContextSnapshot({"thing": thing}).evolve(thing="another")
    del thing
    gc.collect()
    assert gone() is not None
    snapshot = snapshot.forget()
    gc.collect()
    assert gone() is None
    assert (snapshot.version, snapshot.parent, snapshot["thing"]) == (1, None, "another")


async def test_stages_of_one_run_evolve_the_snapshot_each_in_its_own_way() -> None:
    first = versions()[-1]

    async def evolves(ctx: StageContext) -> dict[str, object]:
        mine = ctx.snapshot.evolve(by=ctx.stage)
        return {"mine": mine, "back": mine.rollback(0), "delta": mine.diff(ctx.snapshot)}

    pipeline = Pipeline("p")
    for number in range(20):
        pipeline = pipeline.with_stage(f"s{number}", evolves)
    results = await pipeline.run(PipelineContext(snapshot=first))
    for name, output in results.items():
        assert (output["mine"]["by"], output["mine"].version, output["mine"].parent) == (name, VERSIONS, first)
        assert output["back"] == values_of(0)
        assert first.apply(output["delta"]) == output["mine"]
    assert "by" not in first
