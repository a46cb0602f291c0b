"""CONTRACT-006: classes nested to 20 levels, a mismatch at the fifth; and data that is nested without end."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from stageflow import ContractViolation, Fault, Pipeline
from tests.stages import FAILED, results_of, returns, states


def levels(depth: int) -> list[Any]:
    """Classes of which each holds the next, the outermost first."""
    made: list[Any] = [attrs.make_class(f"Level{depth}", {"value": attrs.field(type=int)})]
    for level in range(depth - 1, 0, -1):
        fields = {"value": attrs.field(type=int), "inner": attrs.field(type=made[0])}
        made.insert(0, attrs.make_class(f"Level{level}", fields))
    return made


def value(depth: int, wrong: int | None = None) -> dict[str, Any]:
    """What fits them, but for the value at one level."""
    inner: dict[str, Any] | None = None
    for level in range(depth, 0, -1):
        inner = {"value": str(level) if level == wrong else level} | ({} if inner is None else {"inner": inner})
    assert inner is not None
    return inner


@pytest.mark.parametrize("depth", [1, 5, 20])
async def test_what_fits_is_made_into_instances_all_the_way_down(depth: int) -> None:
    classes = levels(depth)
    results = await Pipeline("p").with_stage("a", returns(value(depth)), output=classes[0]).run()
    made: Any = results["a"].data
    for level, kind in enumerate(classes, 1):
        assert type(made) is kind
        assert made.value == level
        made = getattr(made, "inner", None)
    assert made is None


@pytest.mark.parametrize(("depth", "wrong"), [(5, 5), (20, 5), (20, 1), (20, 20)])
async def test_the_path_of_a_mismatch_leads_to_it(depth: int, wrong: int) -> None:
    results = await results_of(Pipeline("p").with_stage("a", returns(value(depth, wrong)), output=levels(depth)[0]))
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    path = "a" + ".inner" * (wrong - 1) + ".value"
    assert error.faults == (Fault(path=path, found=f"'{wrong}' (str)", wanted="int"),)
    assert str(error).endswith(f"\n  {path}: wanted int, found '{wrong}' (str)")


async def test_a_mismatch_on_every_level_is_one_fault_each() -> None:
    wrong: dict[str, Any] = {"value": "x"}
    for _ in range(19):
        wrong = {"value": "x", "inner": wrong}
    results = await results_of(Pipeline("p").with_stage("a", returns(wrong), output=levels(20)[0]))
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    assert [fault.path.count(".inner") for fault in error.faults] == list(range(20))


@attrs.frozen
class Tree:
    value: int
    children: list[Tree] = attrs.field(factory=list["Tree"])


@pytest.mark.parametrize("depth", [100, 10_000])
async def test_deep_data_ends_a_stage_and_not_the_program(depth: int) -> None:
    wrong: dict[str, Any] = {"value": "x"}
    for _ in range(depth):
        wrong = {"value": 1, "children": [wrong]}
    results = await results_of(Pipeline("p").with_stage("a", returns(wrong), output=Tree))
    assert states(results) == {"a": FAILED}
    error = results.records["a"].error
    assert isinstance(error, ContractViolation)
    (fault,) = error.faults
    if depth == 100:
        assert fault.path == "a" + ".children[0]" * depth + ".value"
    else:
        assert fault.found == "a dict that is nested too deep to be checked, or holds itself"
    assert results.records["a"].cause is not None


async def test_deep_instances_are_no_deeper_than_one_look() -> None:
    tree = Tree(0)
    for level in range(10_000):
        tree = Tree(level, [tree])
    results = await Pipeline("p").with_stage("a", returns(tree), output=Tree).run()
    assert results["a"].data is tree
    while tree.children:  # or the interpreter takes it apart by recursion
        tree = tree.children.pop()
