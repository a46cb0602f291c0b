"""`Graph`: the stages of a pipeline, proven to be a DAG and compiled to what the engine reads while it runs."""

from __future__ import annotations

import warnings
from collections import deque
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from stageflow.errors import CycleError, DefinitionError, DefinitionWarning, UnknownStageError
from stageflow.graph.branches import TRUNK, find_branches
from stageflow.graph.plan import Plan, Shape, admission, compile_plan, with_edges
from stageflow.stages import Join, Settings, StageKind, StageSpec
from stageflow.stages.policy import TRUNK_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Graph"]


class Graph:
    """A validated, frozen DAG. It holds no state of any run, so any number of concurrent runs may share it.

    Args:
        name: The pipeline's name.
        stages: Its stages, in any order.
        settings: What holds for all of them, and for its runs.

    Raises:
        DefinitionError: There is no stage, or one uses a limit that is not there. `UnknownStageError`: a stage comes
            after one that is not there. `CycleError`: stages wait for each other.
    """

    __slots__ = ("__weakref__", "admits", "name", "plan", "settings", "shape", "stages")

    name: Final[str]
    settings: Final[Settings]
    admits: Final[Callable[[Any], Any] | None]
    stages: Final[Mapping[str, StageSpec]]
    shape: Final[Shape]
    plan: Final[Plan]

    def __init__(self, name: str, stages: Sequence[StageSpec], settings: Settings) -> None:
        if not stages:
            raise DefinitionError(f"pipeline {name!r} has no stages; add one with with_stage()")
        if any(spec.aka for spec in stages):
            from stageflow.graph.fingerprint import check_former_names  # noqa: PLC0415  # few graphs have any

            check_former_names(stages)
        ordered = _in_topological_order(with_edges(stages))
        index = {spec.name: number for number, spec in enumerate(ordered)}
        needed = tuple(tuple(index[edge.stage] for edge in spec.after) for spec in ordered)
        branches = find_branches(needed)
        branch_of = [TRUNK] * len(ordered)
        for branch in branches:
            for number in branch.strand:
                branch_of[number] = branch.index
        self.name = name
        self.stages = MappingProxyType({spec.name: spec for spec in ordered})
        self.settings = settings
        self.admits = admission(name, settings)
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
        if any(spec.pivot or spec.irrevocable for spec in ordered):
            _warn_of_what_is_not_undone(ordered)
        self.plan = compile_plan(ordered, self.shape, settings)

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


def _warn_of_what_is_not_undone(ordered: Sequence[StageSpec]) -> None:
    """Warns where a run may have to be undone, and something in it cannot be, or never will."""
    after: dict[str, set[str]] = {}  # what comes after each stage that is a pivot, or irrevocable
    for mark in (spec for spec in ordered if spec.pivot or spec.irrevocable):
        reached = after[mark.name] = {mark.name}
        for spec in ordered:
            if any(edge.stage in reached for edge in spec.after):
                reached.add(spec.name)
    for mark in (spec for spec in ordered if spec.name in after):
        later = [spec for spec in ordered if spec.name in after[mark.name] and spec is not mark]
        if mark.irrevocable and not mark.pivot and later:
            message = (
                f"{mark.where} cannot be undone, but {later[0].name!r} comes after it and may fail; say pivot=True, "
                f"so that the run can only go on from there, or let it come last"
            )
        elif mark.pivot and (undone := next((spec for spec in later if spec.compensate is not None), None)):
            message = (
                f"the undo of {undone.where} is never called: it comes after {mark.name!r}, the point of no return"
            )
        else:
            continue
        file, line = mark.declared_at or ("<unknown>", 0)
        warnings.warn_explicit(message, DefinitionWarning, file, line)


def _child_on_the_way(shape: Shape, number: int, above: int) -> int | None:
    """Gives the child of a branch in or below which a stage is."""
    index: int | None = shape.branch_of[number]
    while index is not None and shape.branches[index].parent != above:
        index = shape.branches[index].parent
    return index
