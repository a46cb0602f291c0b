"""CONTRACT-001: bounds, unions, malformed data and extra fields, enforced by the engine for every stage, in and out."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import attrs
import pytest
from attrs import validators

from stageflow import CauseKind, ContractViolation, Pipeline, StageContext, StageOutput
from tests.stages import FAILED, OK, SKIPPED, Witness, causes, gives, results_of, returns, states


def _finite(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{attribute.name!r} must be finite, not {value}")


@attrs.frozen
class Score:
    value: float = attrs.field(validator=[validators.ge(0), validators.le(1), _finite])
    of: Literal["title", "body"] | None = None


@attrs.frozen
class Found:
    kind: Literal["found"]
    scores: list[Score]


@attrs.frozen
class Lost:
    kind: Literal["lost"]
    why: str = attrs.field(validator=validators.min_len(1))


Answer = Found | Lost

GOOD: dict[str, tuple[Any, Any]] = {
    "the lower bound": ({"kind": "found", "scores": [{"value": 0}]}, Found("found", [Score(0.0)])),
    "the upper bound": ({"kind": "found", "scores": [{"value": 1.0}]}, Found("found", [Score(1.0)])),
    "nothing within": ({"kind": "found", "scores": []}, Found("found", [])),
    "the other member": ({"kind": "lost", "why": "x"}, Lost("lost", "x")),
    "an instance": (Lost("lost", "x"), Lost("lost", "x")),
    "an instance within a mapping": ({"kind": "found", "scores": [Score(0.5)]}, Found("found", [Score(0.5)])),
}
BAD: dict[str, Any] = {
    "below the bound": {"kind": "found", "scores": [{"value": -0.1}]},
    "above the bound": {"kind": "found", "scores": [{"value": 1.1}]},
    "not finite": {"kind": "found", "scores": [{"value": math.inf}]},
    "not a number": {"kind": "found", "scores": [{"value": math.nan}]},
    "too short": {"kind": "lost", "why": ""},
    "a bool for a number": {"kind": "found", "scores": [{"value": True}]},
    "a string for a number": {"kind": "found", "scores": [{"value": "0.5"}]},
    "no member": {"kind": "elsewhere"},
    "the fields of the other member": {"kind": "lost", "scores": []},
    "an extra field": {"kind": "lost", "why": "x", "scores": []},
    "an extra field within": {"kind": "found", "scores": [{"value": 0.5, "off": 1}]},
    "a list": [{"kind": "lost", "why": "x"}],
    "a string": "lost",
    "nothing": None,
    "no fields": {},
}


@pytest.mark.parametrize("case", GOOD)
async def test_what_fits_goes_in_and_out(case: str) -> None:
    value, made = GOOD[case]

    async def out(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(ctx.data)

    out_ = Pipeline("out").with_stage("a", returns(value), output=Answer).with_stage("b", gives(), after="a")
    results = await out_.run()
    assert states(results) == {"a": OK, "b": OK}
    assert results["a"].data == made
    results = await Pipeline("in", inputs=Answer).with_stage("a", out).run(value)
    assert results["a"].data == made


@pytest.mark.parametrize("case", BAD)
async def test_what_does_not_fit_neither_goes_in_nor_out(case: str) -> None:
    witness = Witness()
    pipeline = Pipeline("out").with_stage("a", returns(BAD[case]), output=Answer)
    results = await results_of(pipeline.with_stage("b", witness.of(gives()), after="a"))
    assert states(results) == {"a": FAILED, "b": SKIPPED}
    assert causes(results)["a"] == (CauseKind.CONTRACT, "a")
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    assert error.faults
    if isinstance(BAD[case], dict):
        with pytest.raises(ContractViolation):
            await Pipeline("in", inputs=Answer).with_stage("a", witness.of(gives())).run(BAD[case])
    assert witness.entered == []


async def test_a_bound_that_is_broken_is_named_with_its_place_and_what_the_validator_says() -> None:
    value = {"kind": "found", "scores": [{"value": 0.5}, {"value": 7}, {"value": "x", "of": "foot"}]}
    results = await results_of(Pipeline("p").with_stage("a", returns(value), output=Found))
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    assert [str(fault) for fault in error.faults] == [
        "a.scores[1]: wanted what its class accepts, found ValueError: 'value' must be <= 1: 7.0",
        "a.scores[2].value: wanted float, found 'x' (str)",
        "a.scores[2].of: wanted Literal['title', 'body'], found 'foot' (str)",
    ]


async def test_every_stage_of_a_graph_is_held_to_its_contract() -> None:
    pipeline = Pipeline("p", on_failure="isolate")
    for number in range(50):
        value = {"value": number / 25}
        pipeline = pipeline.with_stage(f"s{number}", returns(value), output=Annotated[Score, "of 1 at most"])
    results = await results_of(pipeline)
    assert [record.state for record in results.records.values()] == [OK] * 26 + [FAILED] * 24
