"""`Graph`: the stages of a pipeline, proven to be a DAG and compiled to what the engine reads while it runs."""

from __future__ import annotations

import enum
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, final

import attrs

from stageflow.errors import CycleError, DefinitionError, DefinitionWarning, UnknownStageError
from stageflow.graph.branches import TRUNK, Branch, find_branches
from stageflow.stages import Default, Join, OnFailure, StageKind, StageSpec
from stageflow.stages.policy import TRUNK_NAME
from stageflow.stages.runner import NativeBody
from stageflow.stages.stage import Condition

__all__ = ["Edge", "Graph", "Plan", "Shape"]


@final
@attrs.frozen(kw_only=True, eq=False)
class Shape:
    """Names and branches: what a record of a run needs to know of the graph, without the code of its stages.

    Stages and branches are numbered; stages in topological order.

    Attributes:
        pipeline: The pipeline's name.
        names: The stages' names.
        index: The numbers of the names.
        dependencies: For every stage, those it comes after.
        branches: The branches, the trunk first.
        branch_of: For every stage, its branch.
        branch_names: The names of the branches: that of the first stage, or ``"trunk"``.
    """

    pipeline: str
    names: tuple[str, ...]
    index: Mapping[str, int]
    dependencies: tuple[tuple[int, ...], ...]
    branches: tuple[Branch, ...]
    branch_of: tuple[int, ...]
    branch_names: tuple[str, ...]


@final
class Edge(enum.Enum):
    """What it means for the stage at the end of an edge that the one at its beginning has settled."""

    REQUIRED = "required"
    """It is skipped if the other did not succeed, and starts when all others have settled as well."""
    OPTIONAL = "optional"
    """It starts when all others have settled as well."""
    COUNTED = "counted"
    """Its join goes by how many have succeeded."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """What the engine reads of every stage while it runs, by the stage's number: no names to look up, nothing to scan.

    Attributes:
        bodies: What does the work.
        conditions: What ``when=`` asks.
        timeouts: The limits in seconds, `math.inf` for none.
        on_failure: What a failure means.
        followers: The stages after it that begin a branch, each with that branch and what the edge means. (The stage
            that continues the strand is not among them: its branch knows it.)
        waits: How many stages it comes after.
        needs: How many of them must succeed for it to start.
        early: Whether it starts (or is skipped) as soon as that is decided, before all have settled.
        starts_bare: Whether it can start without any input.
        revives: For every branch: whether a stage after its first can start although the first was skipped.
    """

    bodies: tuple[NativeBody, ...]
    conditions: tuple[Condition | None, ...]
    timeouts: tuple[float, ...]
    on_failure: tuple[OnFailure, ...]
    followers: tuple[tuple[tuple[int, int, Edge], ...], ...]
    waits: tuple[int, ...]
    needs: tuple[int, ...]
    early: tuple[bool, ...]
    starts_bare: tuple[bool, ...]
    revives: tuple[bool, ...]


class Graph:
    """A validated, frozen DAG. It holds no state of any run, so any number of concurrent runs may share it.

    Args:
        name: The pipeline's name.
        stages: Its stages, in any order.
        on_failure: What the failure of a stage means that does not say so itself.
        default_timeout: The limit in seconds of a stage that does not say so itself; `None` for none.

    Raises:
        DefinitionError: There is no stage. `UnknownStageError`: a stage comes after one that is not there.
            `CycleError`: stages wait for each other.
    """

    __slots__ = ("__weakref__", "default_timeout", "name", "on_failure", "plan", "shape", "stages")

    name: Final[str]
    stages: Final[Mapping[str, StageSpec]]
    shape: Final[Shape]
    plan: Final[Plan]

    def __init__(
        self, name: str, stages: Sequence[StageSpec], *, on_failure: OnFailure, default_timeout: float | None
    ) -> None:
        if not stages:
            raise DefinitionError(f"pipeline {name!r} has no stages; add one with with_stage()")
        ordered = _in_topological_order(stages)
        index = {spec.name: number for number, spec in enumerate(ordered)}
        needed = tuple(tuple(index[edge.stage] for edge in spec.after) for spec in ordered)
        branches = find_branches(needed)
        branch_of = [TRUNK] * len(ordered)
        for branch in branches:
            for number in branch.strand:
                branch_of[number] = branch.index
        self.name = name
        self.stages = MappingProxyType({spec.name: spec for spec in ordered})
        self.on_failure = on_failure
        self.default_timeout = default_timeout
        self.shape = Shape(
            pipeline=name,
            names=tuple(index),
            index=index,
            dependencies=needed,
            branches=branches,
            branch_of=tuple(branch_of),
            branch_names=(TRUNK_NAME, *(ordered[branch.strand[0]].name for branch in branches[1:])),
        )
        _warn_of_exclusive_joins(ordered, self.shape)
        self.plan = _compile(ordered, self.shape, on_failure, default_timeout)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "plan"):  # which is set last
            raise AttributeError(f"a graph is frozen, so its {name!r} cannot be set; build another one")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.stages)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {len(self)} stages in {len(self.shape.branches)} branches>"


def _in_topological_order(stages: Sequence[StageSpec]) -> list[StageSpec]:
    """Sorts stages so that each comes after those it needs; among equals, in the order of declaration (Kahn, 1962)."""
    by_name = {spec.name: spec for spec in stages}
    followers: dict[str, list[str]] = {name: [] for name in by_name}
    missing: dict[str, int] = {}
    for spec in stages:
        missing[spec.name] = len(spec.after)
        for edge in spec.after:
            if edge.stage not in by_name:
                raise UnknownStageError(edge.stage, by_name, where=f"after= of {spec.where}")
            followers[edge.stage].append(spec.name)
    ready = deque(name for name, count in missing.items() if count == 0)
    ordered: list[StageSpec] = []
    while ready:
        name = ready.popleft()
        ordered.append(by_name[name])
        for follower in followers[name]:
            missing[follower] -= 1
            if missing[follower] == 0:
                ready.append(follower)
    if len(ordered) < len(stages):
        raise CycleError(_find_cycle(by_name, {name for name, count in missing.items() if count}))
    return ordered


def _find_cycle(by_name: Mapping[str, StageSpec], stuck: set[str]) -> list[str]:
    """Finds a circle among stages of which each waits for another of them."""
    name = next(name for name in by_name if name in stuck)
    seen: dict[str, int] = {}
    path: list[str] = []
    while name not in seen:
        seen[name] = len(path)
        path.append(name)
        name = next(edge.stage for edge in by_name[name].after if edge.stage in stuck)
    circle = path[seen[name] :]
    circle.reverse()  # from "waits for" to "leads to"
    members = set(circle)
    first = circle.index(next(name for name in by_name if name in members))  # begin with what was declared first
    return [*circle[first:], *circle[: first + 1]]


def _compile(ordered: Sequence[StageSpec], shape: Shape, on_failure: OnFailure, default_timeout: float | None) -> Plan:
    heads = {branch.strand[0] for branch in shape.branches if branch.strand}
    followers: list[list[tuple[int, int, Edge]]] = [[] for _ in ordered]
    for number, spec in enumerate(ordered):
        if number in heads:
            for edge in spec.after:
                kind = Edge.COUNTED if spec.join != Join.ALL else Edge.REQUIRED if edge.required else Edge.OPTIONAL
                followers[shape.index[edge.stage]].append((number, shape.branch_of[number], kind))
    starts_bare = [_starts_bare(spec) for spec in ordered]
    revives = [False] * len(shape.branches)
    for branch in reversed(shape.branches):  # children before their parents
        revives[branch.index] |= any(starts_bare[number] for number in branch.strand[1:])
        for child in branch.children:
            revives[branch.index] |= revives[child] or starts_bare[shape.branches[child].strand[0]]
    return Plan(
        bodies=tuple(spec.body for spec in ordered),
        conditions=tuple(spec.when for spec in ordered),
        timeouts=tuple(_limit(spec, default_timeout) for spec in ordered),
        on_failure=tuple(on_failure if isinstance(spec.on_failure, Default) else spec.on_failure for spec in ordered),
        followers=tuple(map(tuple, followers)),
        waits=tuple(len(spec.after) for spec in ordered),
        needs=tuple(_needs(spec) for spec in ordered),
        early=tuple(spec.join.mode in ("any", "quorum", "n_of") for spec in ordered),
        starts_bare=tuple(starts_bare),
        revives=tuple(revives),
    )


def _limit(spec: StageSpec, default: float | None) -> float:
    limit = default if isinstance(spec.timeout, Default) else spec.timeout
    return math.inf if limit is None else limit


def _needs(spec: StageSpec) -> int:
    match spec.join.mode:
        case "any" | "any_settled":
            return 1
        case "quorum":
            return len(spec.after) // 2 + 1
        case _:
            return spec.join.count


def _starts_bare(spec: StageSpec) -> bool:
    if spec.join == Join.ALL:
        return not any(edge.required for edge in spec.after)
    return spec.join == Join.SETTLED


def _warn_of_exclusive_joins(ordered: Sequence[StageSpec], shape: Shape) -> None:
    """Warns where a stage needs the outputs of several stages of which a route chooses one."""
    for branch in shape.branches:
        if not branch.strand or ordered[branch.strand[-1]].kind is not StageKind.ROUTE:
            continue
        ways = [shape.branches[child] for child in branch.children]
        chosen = {way.index for way in ways if any(ordered[number].when for number in way.strand)}
        for join in ways:
            spec = ordered[join.strand[0]]
            if spec.join != Join.ALL:
                continue
            required = [shape.index[edge.stage] for edge in spec.after if edge.required]
            of_ways = {_child_on_the_way(shape, number, branch.index): number for number in required}
            exclusive = [shape.names[number] for way, number in of_ways.items() if way in chosen]
            if len(exclusive) > 1:
                route = shape.names[branch.strand[-1]]
                message = (
                    f"{spec.where} needs all of {', '.join(map(repr, exclusive))}, but {route!r} is a route that "
                    f"chooses between them, so it would be skipped whenever not all of them are chosen; "
                    f'say join="any_settled"'
                )
                file, line = spec.declared_at or ("<unknown>", 0)
                warnings.warn_explicit(message, DefinitionWarning, file, line)


def _child_on_the_way(shape: Shape, number: int, above: int) -> int | None:
    """Gives the child of a branch in or below which a stage is."""
    index: int | None = shape.branch_of[number]
    while index is not None and shape.branches[index].parent != above:
        index = shape.branches[index].parent
    return index
