"""What a stage's context asks of the engine: `StageHost`, and the `RunState` that the contexts of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from stageflow.context.context import PipelineContext
from stageflow.output import Artifact

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    import trio

    from stageflow.engine import PipelineResults
    from stageflow.graph import Graph
    from stageflow.output import StageOutput

__all__ = ["RunState", "StageHost", "StagePart"]


@attrs.define(eq=False, repr=False, kw_only=True)
class RunState:
    """What the contexts of all stages of one run share.

    Attributes:
        pipeline: The pipeline's name.
        run_id: The run's id.
        origin: The description the run was started with.
        started: When it began, on Trio's clock.
        deadline: When the scopes that stood around the run at that moment will cancel it, or its own deadline.
        artifacts: Every artifact so far.
        key: What stands for the run in keys of idempotency, if that is not its id.
        depth: How many runs it is nested in.
        parent: The id of the run it is nested in, or `None`.
        lent: Instead of a `Limit`, the one that stages of this run take from: a stage around it holds a token of the
            former, and lends that.
    """

    pipeline: str
    run_id: str
    origin: PipelineContext
    started: float
    deadline: float
    artifacts: list[Artifact]
    key: str | None = None
    depth: int = 0
    parent: str | None = None
    lent: Mapping[Any, Any] = attrs.field(factory=dict[Any, Any])  # this layer does not know limits


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

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        """The outputs of the stages it comes after."""
        ...

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        """The branch's nursery."""
        ...

    def on_exit(self, stage: StagePart, name: str, callback: Callable[[], Awaitable[object] | object]) -> None:
        """Has something called when the current attempt has ended."""
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
