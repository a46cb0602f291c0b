"""Where a DAG falls into branches: against dominators found by deleting stages, and the laws of the tree."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow import Pipeline, StageContext, StageGraph, optional
from stageflow.graph.branches import TRUNK, Branch, find_branches
from tests.model import regions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

Edges: TypeAlias = "tuple[tuple[int, ...], ...]"
"""For every stage those it comes after, which have smaller numbers."""
Tree: TypeAlias = "dict[int | None, tuple[list[int], int | None]]"
"""Branches, by their first stage (`None` for the trunk): each with its strand and the branch it is in."""


@st.composite
def dags(draw: st.DrawFn, *, largest: int = 12) -> Edges:
    """DAGs from sparse to dense: each stage comes after some of those before it."""
    size = draw(st.integers(1, largest))
    nearness = draw(st.sampled_from((2, 4, largest)))  # how far back its edges reach, for chains of diamonds
    edges: list[tuple[int, ...]] = []
    for stage in range(size):
        before = range(max(0, stage - nearness), stage)
        edges.append(tuple(sorted(draw(st.sets(st.sampled_from(before), max_size=4)))) if before else ())
    return tuple(edges)


def reached(edges: Edges, without: int | None) -> set[int]:
    """The stages that a walk from the virtual root finds when one is deleted."""
    todo = [stage for stage, needed in enumerate(edges) if not needed and stage != without]
    found = set(todo)
    while todo:
        here = todo.pop()
        fresh = {stage for stage, needed in enumerate(edges) if here in needed and stage != without} - found
        found |= fresh
        todo += fresh
    return found


def immediate_dominators(edges: Edges) -> list[int | None]:
    """By definition: a stage dominates those that cannot be reached without it; the nearest is the immediate one."""
    everything = range(len(edges))
    strictly = [
        {one for one in everything if one != other and other not in reached(edges, one)} for other in everything
    ]
    nearest: list[int | None] = []
    for stage in everything:
        # The nearest strict dominator is dominated by all the others.
        found = [one for one in strictly[stage] if strictly[stage] - {one} == strictly[one]]
        assert len(found) == bool(strictly[stage])
        nearest.append(found[0] if found else None)
    return nearest


def branches_by_rule(edges: Edges) -> Tree:
    """The rule, word for word.

    A stage opens a branch when its immediate dominator (or the virtual root) has two or
    more children in the dominator tree; otherwise it continues its dominator's branch.
    """
    above = immediate_dominators(edges)
    head: list[int | None] = []
    found: Tree = {None: ([], None)}
    for stage, dominator in enumerate(above):
        around = None if dominator is None else head[dominator]
        if above.count(dominator) > 1:
            found[stage] = ([], around)
            around = stage
        head.append(around)
        found[around][0].append(stage)
    return found


def as_rule(branches: Sequence[Branch]) -> Tree:
    """Branches in the form of `branches_by_rule`."""
    heads = [None if branch.index == TRUNK else branch.strand[0] for branch in branches]
    return {
        head: (list(branch.strand), None if branch.parent is None else heads[branch.parent])
        for head, branch in zip(heads, branches, strict=True)
    }


def by_name(graph: StageGraph) -> dict[str, tuple[list[str], str]]:
    """The branches of a graph, by their names: strand, and parent's name."""
    shape = graph.shape
    names = ["trunk" if branch.index == TRUNK else shape.names[branch.strand[0]] for branch in shape.branches]
    return {
        name: ([shape.names[stage] for stage in branch.strand], "" if branch.parent is None else names[branch.parent])
        for name, branch in zip(names, shape.branches, strict=True)
    }


async def nothing(ctx: StageContext) -> None:
    pass


# Against the definition


@settings(max_examples=250, deadline=None)
@given(dags())
def test_branches_are_those_of_the_dominator_tree(edges: Edges) -> None:
    assert as_rule(find_branches(edges)) == branches_by_rule(edges)


def test_branches_of_every_dag_of_up_to_five_stages_are_those_of_the_dominator_tree() -> None:
    for size in range(1, 6):
        subsets = [
            [chosen for count in range(stage + 1) for chosen in itertools.combinations(range(stage), count)]
            for stage in range(size)
        ]
        for edges in itertools.product(*subsets):
            assert as_rule(find_branches(edges)) == branches_by_rule(edges), edges


@settings(max_examples=100, deadline=None)
@given(dags(largest=8))
def test_the_regions_of_the_model_are_the_same(edges: Edges) -> None:
    found = regions(edges)
    expected = branches_by_rule(edges)
    assert found.above == tuple(immediate_dominators(edges))
    for stage, head in enumerate(found.head):
        strand = expected[head][0]
        assert stage in strand
        follower = strand[strand.index(stage) + 1 :][:1]
        assert found.onward[stage] == (follower[0] if follower else None)


# Laws


@settings(deadline=None)
@given(dags())
def test_every_stage_is_in_one_branch_and_parents_come_before_children(edges: Edges) -> None:
    branches = find_branches(edges)
    assert sorted(stage for branch in branches for stage in branch.strand) == list(range(len(edges)))
    assert [branch.index for branch in branches] == list(range(len(branches)))
    assert branches[TRUNK].parent is None
    for branch in branches[1:]:
        assert branch.parent is not None
        assert branch.parent < branch.index
        assert branch.index in branches[branch.parent].children
        assert branch.strand
    assert sum(len(branch.children) for branch in branches) == len(branches) - 1


@settings(deadline=None)
@given(dags())
def test_a_strand_is_a_path_and_forks_only_at_its_end(edges: Edges) -> None:
    for branch in find_branches(edges):
        for before, after in itertools.pairwise(branch.strand):
            assert edges[after] == (before,)
        assert len(branch.children) != 1
        assert branch.joins == (bool(branch.strand) and len(edges[branch.strand[0]]) > 1)


@settings(deadline=None)
@given(dags())
def test_what_a_stage_comes_after_is_above_it_or_below_a_sibling(edges: Edges) -> None:
    branches = find_branches(edges)
    branch_of = {stage: branch for branch in branches for stage in branch.strand}
    for stage, needed in enumerate(edges):
        around = branch_of[stage].parent
        for other in needed:
            if other in branch_of[stage].strand:
                continue
            # It is the last stage of the branch around, or somewhere in what that branch holds.
            lineage: list[int] = []
            at: int | None = branch_of[other].index
            while at is not None:
                lineage.append(at)
                at = branches[at].parent
            assert around in lineage


@settings(max_examples=60, deadline=None)
@given(dags(largest=9), st.randoms(use_true_random=False))
def test_branches_do_not_depend_on_the_order_of_declaration(edges: Edges, random: Random) -> None:
    def build(order: Sequence[int]) -> StageGraph:
        pipeline = Pipeline("shuffled")
        for stage in order:
            after = [f"s{other}" if other % 2 else optional(f"s{other}") for other in edges[stage]]
            pipeline = pipeline.with_stage(f"s{stage}", nothing, after=after)
        return pipeline.build()

    order = list(range(len(edges)))
    random.shuffle(order)
    first, second = build(range(len(edges))), build(order)
    assert by_name(first) == by_name(second)
    assert {name: (strand, parent) for name, (strand, parent) in by_name(first).items()} == {
        "trunk" if head is None else f"s{head}": (
            [f"s{stage}" for stage in strand],
            ("" if head is None else "trunk") if parent is None else f"s{parent}",
        )
        for head, (strand, parent) in branches_by_rule(edges).items()
    }


# Shapes

SHAPES: dict[str, tuple[Edges, Tree]] = {
    "one stage": (((),), {None: ([0], None)}),
    "a chain is the trunk": (((), (0,), (1,)), {None: ([0, 1, 2], None)}),
    "a join is a branch of the stage where its inputs forked": (
        ((), (0,), (0,), (1, 2)),
        {None: ([0], None), 1: ([1], None), 2: ([2], None), 3: ([3], None)},
    ),
    "a short cut makes a fork": (((), (0,), (0, 1)), {None: ([0], None), 1: ([1], None), 2: ([2], None)}),
    "two roots": (((), (), (0, 1)), {None: ([], None), 0: ([0], None), 1: ([1], None), 2: ([2], None)}),
    "branches nest": (
        ((), (0,), (0,), (1,), (1,), (3, 4), (5, 2), (6,)),
        {
            None: ([0], None),
            1: ([1], None),
            2: ([2], None),
            3: ([3], 1),
            4: ([4], 1),
            5: ([5], 1),
            6: ([6, 7], None),
        },
    ),
}


@pytest.mark.parametrize(("edges", "expected"), SHAPES.values(), ids=SHAPES)
def test_branches_of_known_shapes(edges: Edges, expected: Tree) -> None:
    assert as_rule(find_branches(edges)) == expected


def test_a_ladder_of_diamonds_builds_without_recursion() -> None:
    """Each diamond begins with the join of the one before, so that it is a branch in a branch, 2,000 deep."""
    edges: list[tuple[int, ...]] = [()]
    for _ in range(2_000):
        fork = len(edges) - 1
        edges += [(fork,), (fork,), (fork + 1, fork + 2)]
    branches = find_branches(edges)
    assert len(branches) == 1 + 3 * 2_000
    depth = [0] * len(branches)
    for branch in branches[1:]:
        assert branch.parent is not None
        depth[branch.index] = depth[branch.parent] + 1
    assert max(depth) == 2_000
    assert all(branch.strand == (stage,) for branch in branches for stage in branch.strand)


def test_diamonds_within_diamonds_build_without_recursion() -> None:
    """2,000 forks on the way in, 2,000 joins on the way out, each closing the fork that was opened last."""
    edges: list[tuple[int, ...]] = [()]
    forks = [0]
    sides: list[int] = []
    for _ in range(2_000):
        fork = forks[-1]
        forks.append(len(edges))
        edges.append((fork,))
        sides.append(len(edges))
        edges.append((fork,))
    inner = forks[-1]
    joins: dict[int, int] = {}
    for side, fork in zip(reversed(sides), reversed(forks[:-1]), strict=True):
        joins[len(edges)] = fork
        edges.append((inner, side))
        inner = len(edges) - 1
    branches = find_branches(edges)
    branch_of = {stage: branch for branch in branches for stage in branch.strand}
    for join, fork in joins.items():
        assert branch_of[join].joins
        assert branch_of[join].parent == branch_of[fork].index


def test_a_join_of_ten_thousand_builds_without_recursion() -> None:
    edges = [(), *((0,) for _ in range(10_000)), tuple(range(1, 10_001)), (10_001,)]
    branches = find_branches(edges)
    assert len(branches) == 10_002
    assert len(branches[TRUNK].children) == 10_001
    assert branches[-1].strand == (10_001, 10_002)
    assert branches[-1].joins


def test_a_chain_with_a_short_cut_from_its_start_to_every_stage_builds_without_recursion() -> None:
    edges = [(), (0,), *((0, stage - 1) for stage in range(2, 10_000))]
    branches = find_branches(edges)
    assert len(branches) == 10_000
    assert all(branch.parent == TRUNK for branch in branches[1:])
