"""What resuming a run would do, as values: a plan of steps, and what is read from it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import attrs

from stageflow.errors import ResumeRefusedError

if TYPE_CHECKING:
    from stageflow.journal.history import RunHistory

__all__ = ["Action", "ResumePlan", "Step", "refuse_if_blocked", "resets"]


@final
class Action(enum.Enum):
    """What resuming does with a stage."""

    REUSE = "reuse"
    """It has ended, and stays as it is."""
    RERUN = "rerun"
    """It is run again."""
    RUN = "run"
    """It never ran, and runs."""
    IN_DOUBT = "in doubt"
    """It was entered, and it is not known whether it took effect."""
    ORPHANED = "orphaned"
    """Something is recorded of it, and it is no longer there."""
    CONFLICT = "conflict"
    """It has ended, but under other code than is there now."""
    UNDO = "undo"
    """What it did is undone, for the run is."""


@final
@attrs.define(kw_only=True)  # not frozen: there are as many of them as stages
class Step:
    """What resuming does with one stage.

    Attributes:
        stage: The stage.
        action: What is done with it.
        reason: Why, in words.
        changed: What of its code has changed since: ``"code"``, ``"version"``, ``"contract"``, ``"edges"`` and
            ``"policy"``.
        blocks: Whether the run cannot be resumed because of it, without a word on what to do.
    """

    stage: str
    action: Action
    reason: str
    changed: tuple[str, ...] = ()
    blocks: bool = False

    def __str__(self) -> str:
        return f"{self.stage}: {self.action.value} ({self.reason})"


@final
@attrs.frozen(kw_only=True)
class ResumePlan:
    """What resuming a run would do, stage by stage. Print it.

    Attributes:
        run_id: The run.
        pipeline: The pipeline's name.
        steps: What is done with each stage, in topological order, those that are no longer there at the end.
        renamed: The stages that have another name now: the new ones, by the old ones.
        over: Whether the run has come to its end, so that nothing of it is run again.
        undone: Whether the run was undone, so that it cannot be resumed.
    """

    run_id: str
    pipeline: str
    steps: Mapping[str, Step]
    renamed: Mapping[str, str] = attrs.field(factory=dict[str, str])
    over: bool = False
    undone: bool = False
    values: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False, eq=False)  # what is reused, by stage

    @property
    def blocked(self) -> tuple[Step, ...]:
        """Because of what the run cannot be resumed without a word on what to do."""
        return tuple(step for step in self.steps.values() if step.blocks)

    def of(self, *actions: Action) -> tuple[str, ...]:
        """The stages with which one of these is done."""
        return tuple(name for name, step in self.steps.items() if step.action in actions)

    def __str__(self) -> str:
        width = max((len(name) for name in self.steps), default=0)
        lines = [
            f"  {'!' if step.blocks else ' '} {name:{width}}  {step.action.value:8}  {step.reason}"
            for name, step in self.steps.items()
        ]
        head = f"resuming run {self.run_id} of {self.pipeline!r}"
        if self.blocked:
            head += ", which needs a word on what is marked with !"
        return "\n".join([f"{head}:", *lines])


def refuse_if_blocked(plan: ResumePlan) -> None:
    """Raises what says why a run cannot be resumed, if it cannot."""
    if plan.blocked:
        changed = any(step.action is not Action.IN_DOUBT for step in plan.blocked)
        doubtful = any(step.action is Action.IN_DOUBT for step in plan.blocked)
        ways = ['on_change="reuse" or "rerun"'] * changed + ['in_doubt="rerun" or a probe'] * doubtful
        names = "; ".join(map(str, plan.blocked[:5])) + ("; …" if len(plan.blocked) > 5 else "")
        raise ResumeRefusedError(
            f"run {plan.run_id} of {plan.pipeline!r} was not resumed: {names}; say {' and '.join(ways)}",
            run_id=plan.run_id,
            plan=plan,
        )


def resets(plan: ResumePlan, history: RunHistory) -> tuple[str, ...]:
    """Gives the stages of which something is recorded that does not count any more."""
    now_named = {new: old for old, new in plan.renamed.items()}
    again = [name for name, step in plan.steps.items() if step.action is Action.RERUN or step.action is Action.RUN]
    known = {name: history.stages.get(now_named.get(name, name)) for name in again}
    return tuple(name for name, stage in known.items() if stage is not None and stage.settled is not None)
