"""CONTRACT-007: validators and converters of attrs, of one's own and composed: they just work."""

from __future__ import annotations

import re
from typing import Any, cast

import attrs
import pytest
from attrs import validators

from stageflow import CauseKind, ContractViolation, Pipeline
from tests.stages import FAILED, OK, causes, results_of, returns, states


def even(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value % 2:
        raise ValueError(f"{attribute.name!r} must be even, not {value}")


def upper(value: str) -> str:
    return value.upper()


def unlucky(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value == 14:
        raise KeyError("14 is 13 by another name")


LEVEL: Any = validators.or_(cast("Any", validators.instance_of(str)), validators.ge(0))


class Rejected(Exception):
    """An error that is nobody's but the user's."""


@attrs.frozen
class Order:
    count: int = attrs.field(validator=validators.and_(validators.gt(0), validators.lt(100), even, unlucky))
    code: str = attrs.field(validator=validators.matches_re(r"[A-Z]{2}\d+"), converter=upper)
    tags: list[str] = attrs.field(
        factory=list[str], validator=validators.deep_iterable(validators.max_len(3), validators.max_len(2))
    )
    note: str | None = attrs.field(default=None, validator=validators.optional(validators.min_len(2)))
    level: int | str = attrs.field(default=0, validator=LEVEL)

    def __attrs_post_init__(self) -> None:
        if self.count == 50 and self.note is None:
            raise Rejected("half a hundred needs a note")


GOOD: dict[str, Any] = {"count": 2, "code": "ab1"}


async def test_a_converter_runs_after_its_value_was_checked() -> None:
    results = await Pipeline("p").with_stage("a", returns(GOOD), output=Order).run()
    assert results["a"].data == Order(2, "AB1")
    results = await results_of(Pipeline("p").with_stage("a", returns({**GOOD, "code": b"ab1"}), output=Order))
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    assert [str(fault) for fault in error.faults] == ["a.code: wanted str, found b'ab1' (bytes)"]


@pytest.mark.parametrize(
    "change",
    [
        {"count": 98},
        {"code": "zz99"},
        {"tags": ["a", "bb"]},
        {"note": "ab"},
        {"level": "high"},
        {"count": 50, "note": "ok"},
    ],
    ids=str,
)
async def test_what_the_validators_accept_is_accepted(change: dict[str, Any]) -> None:
    results = await Pipeline("p").with_stage("a", returns({**GOOD, **change}), output=Order).run()
    assert states(results) == {"a": OK}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "ValueError: 'count' must be > 0: 0"),
        ({"count": 100}, "ValueError: 'count' must be < 100: 100"),
        ({"count": 3}, "ValueError: 'count' must be even, not 3"),
        ({"count": 14}, "KeyError: '14 is 13 by another name'"),
        ({"count": 50}, "Rejected: half a hundred needs a note"),
        ({"code": "1a"}, "ValueError: 'code' must match regex '[A-Z]{2}\\\\d+' ('1A' doesn't)"),
        ({"tags": ["a", "b", "c"]}, "ValueError: Length of 'tags' must be <= 2: 3"),
        ({"tags": ["abcd"]}, "ValueError: Length of 'tags' must be <= 3: 4"),
        ({"note": ""}, "ValueError: Length of 'note' must be >= 2: 0"),
        ({"level": -1}, "ValueError: None of"),
    ],
    ids=str,
)
async def test_what_a_validator_refuses_is_a_violation_that_says_what_it_said(
    change: dict[str, Any], said: str
) -> None:
    for value, place in (({**GOOD, **change}, "a"), ([GOOD, {**GOOD, **change}], "a[1]")):
        declared = Order if place == "a" else list[Order]
        results = await results_of(Pipeline("p").with_stage("a", returns(value), output=declared))
        assert causes(results) == {"a": (CauseKind.CONTRACT, "a")}
        error = results.records["a"].error
        assert isinstance(error, ContractViolation)
        (fault,) = error.faults
        assert fault.path == place
        assert fault.found.startswith(said)
        assert fault.wanted == "what its class accepts"
        assert re.search(r"Attribute\(|cattrs|0x[0-9a-f]+", str(error)) is None or said == "ValueError: None of"


async def test_a_validator_that_does_not_come_to_its_end_is_a_failure_and_not_the_end_of_the_program() -> None:
    def endless(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
        endless(instance, attribute, value)

    @attrs.frozen
    class Endless:
        value: int = attrs.field(validator=endless)

    results = await results_of(Pipeline("p").with_stage("a", returns({"value": 1}), output=Endless))
    assert states(results) == {"a": FAILED}


async def test_an_error_that_is_none_of_the_value_is_not_taken_for_one() -> None:
    def interrupts(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
        raise KeyboardInterrupt

    @attrs.frozen
    class Interrupted:
        value: int = attrs.field(validator=interrupts)

    with pytest.raises(BaseException) as caught:  # noqa: PT011  # it may come alone, or in a group
        await Pipeline("p").with_stage("a", returns({"value": 1}), output=Interrupted).run()
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    assert isinstance(error, KeyboardInterrupt)
