"""DAG-008: a router chooses between high, low and default by a score; the stages not chosen never start."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow import CauseKind, Pipeline, RunStatus, StageContext
from tests.stages import OK, SKIPPED, Witness, causes, gives, sees, states

ROUTES = ("high", "low", "default")


async def route(ctx: StageContext) -> dict[str, object]:
    score = ctx.data["score"]
    if not isinstance(score, int) or score < 0:
        return {"chosen": "default"}
    return {"chosen": "high" if score > 50 else "low"}


def is_chosen(ctx: StageContext) -> bool:
    return bool(ctx.inputs["route"]["chosen"] == ctx.stage)


def pipeline(witness: Witness) -> Pipeline:
    built = Pipeline("routes").with_stage("route", witness.of(route), kind="route")
    for name in ROUTES:
        built = built.with_stage(name, witness.of(gives()), after="route", when=is_chosen)
        built = built.with_stage(f"{name} more", witness.of(gives()), after=name)
    return built.with_stage(
        "aggregate", witness.of(sees()), after=[f"{name} more" for name in ROUTES], join="any_settled"
    )


@pytest.mark.parametrize(
    ("score", "chosen"),
    [
        (75, "high"),
        (25, "low"),
        (0, "low"),
        (50, "low"),
        (51, "high"),
        (100, "high"),
        ("", "default"),
        ("text", "default"),
        (-1, "default"),
    ],
)
async def test_the_stages_not_chosen_never_start(score: Any, chosen: str) -> None:
    witness = Witness()
    results = await pipeline(witness).run({"score": score})
    assert witness.entered == ["route", chosen, f"{chosen} more", "aggregate"]
    alive = set(witness.entered)
    assert states(results) == {name: OK if name in alive else SKIPPED for name in results.records}
    assert all(results.records[name].started is None for name in results.records if name not in alive)
    others = [name for name in ROUTES if name != chosen]
    expected = {part: (CauseKind.CONDITION, name) for name in others for part in (name, f"{name} more")}
    assert causes(results) == expected
    assert results["aggregate"]["saw"] == [f"{chosen} more"]
    assert results.status is RunStatus.PARTIAL
