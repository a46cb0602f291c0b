"""What is meant by the names that stages and users give while a run goes, seen from where they give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.errors import DefinitionError, MissingOutputError, UnknownStageError

if TYPE_CHECKING:
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.execution import Execution

__all__ = ["branch_upstream", "item_of", "missing_input", "path_from"]


def item_of(execution: Execution, name: str) -> tuple[str, int] | None:
    """Gives the map and the number that are meant by the name of an item; `None` if it is no such name."""
    stage, bracket, number = name.removesuffix("]").rpartition("[")
    if not bracket or not name.endswith("]") or not number.isdecimal() or stage not in execution.shape.index:
        return None
    if getattr(execution.graph.stages[stage].runner, "over", None) is None:  # only a map goes over something
        return None
    return stage, int(number)


def path_from(execution: Execution, of: str, number: int) -> list[int]:
    """Gives the stages that have to run again if a guard sends one back: that one, and what is between the two.

    Raises:
        UnknownStageError: There is no stage of that name.
        DefinitionError: The guard does not come after that stage, or somebody else has begun with its output.
    """
    names, dependencies, slots = execution.shape.names, execution.shape.dependencies, execution.collector.slots
    guard, first = names[number], execution.shape.index.get(of)
    if first is None:
        raise UnknownStageError(of, names, where=f"retry(stage=...) of stage {guard!r}")
    before, todo = {number}, [number]
    for place in todo:  # grows on the way
        fresh = [other for other in dependencies[place] if other >= first and other not in before]
        before.update(fresh)
        todo += fresh
    if first not in before or first == number:
        raise DefinitionError(f"stage {guard!r} cannot send back {of!r}: it does not come after that stage")
    between = {first}
    for place in sorted(before):  # in topological order
        if not between.isdisjoint(dependencies[place]):
            between.add(place)
    path = [place for place in sorted(between) if place != number and names[place] in execution.collector.succeeded]
    for place in path:
        for follower, _, _ in execution.plan.followers[place]:
            if follower not in between and slots[follower] is not None:
                raise DefinitionError(
                    f"stage {guard!r} cannot send back {of!r}: {names[follower]!r} has begun with what "
                    f"{names[place]!r} gave; let it come after {guard!r} as well"
                )
    return path


def branch_upstream(execution: Execution, of: str | None, number: int) -> BranchRun:
    """Gives the branch that a stage means by ``cancel_branch(of=...)``.

    Raises:
        UnknownStageError: There is no stage of that name.
        DefinitionError: That stage is not upstream on the same line.
    """
    own = execution.branches[execution.shape.branch_of[number]]
    assert own is not None
    if of is None:
        return own
    other = execution.shape.index.get(of)
    if other is None:
        where = f"cancel_branch(of=...) of stage {execution.shape.names[number]!r}"
        raise UnknownStageError(of, execution.shape.names, where=where)
    for run in own.lineage():
        if other in run.strand and (run is not own or other <= number):
            return run
    raise DefinitionError(
        f"stage {execution.shape.names[number]!r} cannot end the branch of {of!r}: that stage is not upstream on its "
        f"line; use Run.cancel_branch() to end another branch"
    )


def missing_input(execution: Execution, stage: str, name: str) -> MissingOutputError:
    """Gives the error that says why a stage has no input of a name."""
    number = execution.shape.index.get(name)
    if number is not None and number not in execution.shape.dependencies[execution.shape.index[stage]]:
        reason = f"{stage!r} does not come after it; add it to after= of {stage!r}"
        return MissingOutputError(name, state=execution.collector.record(number).state, reason=reason)
    return execution.collector.missing(name)
