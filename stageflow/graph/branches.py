"""Where a DAG falls into branches: a pure function from edges to regions.

A stage *dominates* another if every path from the start to that other leads through it. Its *immediate dominator* is
the nearest such stage; these make a tree, and the branches are cut from it. A stage opens a branch of its own when
its immediate dominator has two or more children in that tree; otherwise it continues its dominator's branch. So

- a branch is a straight strand of stages with nested branches below the last of them,
- where paths fork, each takes a branch of its own,
- where forked paths meet again, the join is a branch below the stage at which they had forked, beside them.

What ends a branch ends just what only it leads to, and whatever lies beyond is outside of it. That is what makes
branches the regions to cancel, and, since they nest, a tree of Trio nurseries.

The tree is built in topological order: the immediate dominator of a stage is the lowest common ancestor of its
dependencies in the tree so far (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001, which needs but
one pass over a DAG). Ancestors are found in logarithmic time by skew-binary jump pointers (Myers, "An Applicative
Random-Access Stack", 1983), so that neither a long chain nor a wide join is quadratic. Nothing here recurses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TRUNK", "Branch", "find_branches"]

TRUNK = 0
"""The index of the outermost branch."""


@final
@attrs.frozen(kw_only=True, eq=False, repr=False)
class Branch:
    """A region of a graph with its own cancel scope and nursery.

    Attributes:
        index: Its place among the branches; the parent's is smaller.
        parent: The index of the branch that holds it; `None` for the trunk.
        strand: The stages that run one after the other in it, as indices. Only the trunk's may be empty.
        children: The branches it holds, as indices; they come after the strand's last stage.
        joins: Whether it begins with a stage that comes after more than one.
    """

    index: int
    parent: int | None
    strand: tuple[int, ...]
    children: tuple[int, ...]
    joins: bool


def find_branches(dependencies: Sequence[Sequence[int]]) -> tuple[Branch, ...]:
    """Cuts a DAG into branches.

    Args:
        dependencies: For every stage, the stages it comes after. Stages are numbered in topological order, so each
            number is greater than those of its dependencies.

    Returns:
        The branches, the trunk first, parents before their children.
    """
    followers = _dominator_children(dependencies)
    strands: list[list[int]] = []
    parents: list[int | None] = []
    below: list[list[int]] = []
    root = len(dependencies)
    todo: list[tuple[int, int | None]] = [(root, None)]
    while todo:
        stage, parent = todo.pop()
        index = len(strands)
        if parent is not None:
            below[parent].append(index)
        strand = [] if stage == root else [stage]
        while len(followers[stage]) == 1:
            stage = followers[stage][0]
            strand.append(stage)
        strands.append(strand)
        parents.append(parent)
        below.append([])
        todo.extend((child, index) for child in reversed(followers[stage]))
    return tuple(
        Branch(
            index=index,
            parent=parents[index],
            strand=tuple(strand),
            children=tuple(below[index]),
            joins=bool(strand) and len(dependencies[strand[0]]) > 1,
        )
        for index, strand in enumerate(strands)
    )


def _dominator_children(dependencies: Sequence[Sequence[int]]) -> list[list[int]]:
    """Gives, for every stage and for the virtual root behind the last one, its children in the dominator tree."""
    root = len(dependencies)
    above = [root] * (root + 1)  # the immediate dominator
    jump = [root] * (root + 1)  # some ancestor further up, at a distance that makes every climb logarithmic
    depth = [0] * (root + 1)

    def common_ancestor(one: int, other: int) -> int:
        if depth[one] < depth[other]:
            one, other = other, one
        while depth[one] > depth[other]:
            one = jump[one] if depth[jump[one]] >= depth[other] else above[one]
        while one != other:
            if jump[one] != jump[other]:
                one, other = jump[one], jump[other]
            else:
                one, other = above[one], above[other]
        return one

    children: list[list[int]] = [[] for _ in range(root + 1)]
    for stage, needed in enumerate(dependencies):
        dominator = needed[0] if needed else root
        for other in needed[1:]:
            if dominator == root:
                break
            dominator = common_ancestor(dominator, other)
        above[stage] = dominator
        depth[stage] = depth[dominator] + 1
        far = jump[dominator]
        even = depth[dominator] - depth[far] == depth[far] - depth[jump[far]]
        jump[stage] = jump[far] if even else dominator
        children[dominator].append(stage)
    return children
