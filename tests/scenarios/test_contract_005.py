"""CONTRACT-005: required fields that are missing, optional ones, and defaults."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import attrs
import pytest

from stageflow import ContractViolation, Fault, Pipeline
from tests.stages import FAILED, OK, Witness, gives, results_of, returns, states


@attrs.frozen
class Nested:
    needed: int
    spare: int | None
    defaulted: int = 7
    made: list[int] = attrs.field(factory=list[int])


@attrs.frozen
class Job:
    needed: str
    nested: Nested
    maybe: Nested | None = None


class Row(TypedDict):
    needed: int
    maybe: NotRequired[int]


WHOLE: dict[str, Any] = {"needed": "x", "nested": {"needed": 1, "spare": None}}


async def test_what_has_a_default_may_be_missing_and_gets_it() -> None:
    results = await Pipeline("p").with_stage("a", returns(WHOLE), output=Job).run()
    assert results["a"].data == Job("x", Nested(1, None, 7, []), None)


async def test_defaults_that_are_made_are_made_anew() -> None:
    pipeline = Pipeline("p").with_stage("a", returns(WHOLE), output=Job)
    first, second = (await pipeline.run())["a"].data, (await pipeline.run())["a"].data
    assert first.nested.made == second.nested.made == []
    assert first.nested.made is not second.nested.made


MISSING: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({}, [("needed", "str"), ("nested", "Nested")]),
    ({"nested": {"needed": 1, "spare": 2}}, [("needed", "str")]),
    ({"needed": "x"}, [("nested", "Nested")]),
    ({"needed": "x", "nested": {}}, [("nested.needed", "int"), ("nested.spare", "int | None")]),
    # That it may be None does not mean that it may be missing.
    ({"needed": "x", "nested": {"needed": 1}}, [("nested.spare", "int | None")]),
    ({**WHOLE, "maybe": {"spare": 1}}, [("maybe.needed", "int")]),
]


@pytest.mark.parametrize(("value", "missing"), MISSING, ids=str)
async def test_what_is_required_and_missing_is_a_violation_for_each(
    value: dict[str, Any], missing: list[tuple[str, str]]
) -> None:
    results = await results_of(Pipeline("p").with_stage("a", returns(value), output=Job))
    assert states(results) == {"a": FAILED}
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    assert error.faults == tuple(Fault(path=f"a.{path}", found="nothing", wanted=wanted) for path, wanted in missing)

    witness = Witness()
    with pytest.raises(ContractViolation) as caught:
        await Pipeline("p", inputs=Job).with_stage("a", witness.of(gives())).run(value)
    assert [fault.path for fault in caught.value.faults] == [f"data.{path}" for path, _ in missing]
    assert witness.entered == []


@pytest.mark.parametrize("value", [None, 0, "", []])
async def test_none_and_what_is_empty_do_not_stand_for_what_is_missing(value: object) -> None:
    results = await results_of(Pipeline("p").with_stage("a", returns({**WHOLE, "nested": value}), output=Job))
    assert states(results) == {"a": FAILED}


async def test_an_item_of_a_typeddict_that_is_not_required_may_be_missing() -> None:
    for value, state in (({"needed": 1}, OK), ({"needed": 1, "maybe": 2}, OK), ({"maybe": 2}, FAILED), ({}, FAILED)):
        results = await results_of(Pipeline("p").with_stage("a", returns(value), output=Row))
        assert states(results) == {"a": state}
        if state is OK:
            assert results["a"].data == value  # and nothing is added
