"""What a stage's context asks of the engine. Only type checkers ask for it, so a program never loads this module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager

    import trio

    from stageflow.context.context import PipelineContext
    from stageflow.context.state import RunState
    from stageflow.context.transaction import Transaction
    from stageflow.engine import PipelineResults
    from stageflow.graph import Graph
    from stageflow.journal import Cause
    from stageflow.output import Artifact, StageOutput

__all__ = ["Limit", "StageHost", "StagePart"]


class Limit(Protocol):
    """What the engine tells a timer of the limit on an attempt."""

    @property
    def deadline(self) -> float:
        """When the limit is reached, on Trio's clock; `math.inf` for never."""
        ...

    def extend(self, seconds: float) -> None:
        """Moves that moment."""
        ...


class StagePart(Protocol):
    """The part of a stage's record that its context reads, and the one thing it writes: `partial`."""

    name: str
    branch: str
    attempts: int
    started: float | None
    ended: float | None
    partial: Mapping[str, Any]


class StageHost(Protocol):
    """What the branch in which a stage runs does for the stage's context."""

    state: RunState

    def started_of(self, stage: StagePart) -> float | None:
        """When the stage's current attempt began, on Trio's clock."""
        ...

    def deadline_of(self, stage: StagePart) -> float:
        """When the stage's current attempt will be cancelled, on Trio's clock."""
        ...

    def extend_limit(self, stage: StagePart, seconds: float) -> None:
        """Moves the limit on the stage's current attempt."""
        ...

    def beat(self, stage: StagePart) -> None:
        """Notes a sign of life."""
        ...

    def feedback_of(self, stage: StagePart) -> str | None:
        """Why the stage is tried again."""
        ...

    def cause_of(self, stage: StagePart) -> Cause | None:
        """Why the stage is being undone."""
        ...

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        """The outputs of the stages it comes after."""
        ...

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        """The branch's nursery."""
        ...

    def on_exit(self, stage: StagePart, name: str, callback: Callable[[], Awaitable[object] | object]) -> None:
        """Has something called when the current attempt has ended."""
        ...

    def add_artifact(self, stage: StagePart, artifact: Artifact) -> None:
        """Adds an artifact to the run."""
        ...

    def transaction(self, stage: StagePart) -> Transaction:
        """What the current attempt wants to have written together with its end."""
        ...

    def cleanup(self, stage: StagePart) -> AbstractContextManager[trio.CancelScope]:
        """A shielded scope with the deadline of cleanup."""
        ...

    async def run_child(self, stage: StagePart, graph: Graph, context: PipelineContext) -> PipelineResults:
        """Runs a graph within the stage."""
        ...

    async def run_map(self, stage: StagePart, plan: Any, items: Any) -> StageOutput:
        """Runs a graph for each of some items within the stage."""
        ...

    def ending(self, stage: StagePart) -> str | None:
        """Why the stage is being cancelled, or `None`."""
        ...
