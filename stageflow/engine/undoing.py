"""What the context of an undo speaks to: as that of a stage, as far as there is anything to say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from stageflow.engine.collector import Inputs
from stageflow.engine.paths import missing_input

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    from stageflow.context import PipelineContext
    from stageflow.context.host import StagePart
    from stageflow.context.state import RunState
    from stageflow.context.transaction import Transaction
    from stageflow.engine.execution import Execution
    from stageflow.engine.results import PipelineResults
    from stageflow.graph import Graph
    from stageflow.journal import Cause, StageRecord
    from stageflow.journal.undo import UndoRecord
    from stageflow.output import Artifact, StageOutput

__all__ = ["Undoing"]


@final
@attrs.define(eq=False)
class Part:
    """What the context of an undo reads of its stage."""

    name: str
    branch: str
    attempts: int
    started: float | None
    ended: float | None
    partial: Mapping[str, Any]


@final
class Undoing:
    """What the context of an undo speaks to."""

    def __init__(
        self, execution: Execution, record: StageRecord, undo: UndoRecord, cause: Cause, deadline: float
    ) -> None:
        self.state: RunState = execution.state
        self._execution = execution
        self._cause = cause
        self.deadline: float = deadline
        self.scope: trio.CancelScope
        now = trio.current_time()
        # The stage itself has ended, so what the undo saves or makes would be lost, and the context says so.
        self.part: Part = Part(record.name, record.branch, undo.attempts, now, now, record.partial)

    def cause_of(self, stage: StagePart) -> Cause | None:
        return self._cause

    def started_of(self, stage: StagePart) -> float | None:
        return stage.started

    def deadline_of(self, stage: StagePart) -> float:
        return min(self.deadline, trio.current_effective_deadline())

    def extend_limit(self, stage: StagePart, seconds: float) -> None:
        self.deadline += seconds
        self.scope.deadline = self.deadline

    def beat(self, stage: StagePart) -> None:
        pass

    def feedback_of(self, stage: StagePart) -> str | None:
        return None

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        execution = self._execution
        number = execution.shape.index[stage.name]
        names = tuple(execution.shape.names[other] for other in execution.shape.dependencies[number])
        return Inputs(names, execution.collector, lambda name: missing_input(execution, stage.name, name))

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        raise self._not_here(stage, "ctx.nursery")

    def on_exit(self, stage: StagePart, name: str, callback: Callable[[], Awaitable[object] | object]) -> None:
        raise self._not_here(stage, "ctx.on_exit()")

    def add_artifact(self, stage: StagePart, artifact: Artifact) -> None:
        raise self._not_here(stage, "ctx.add_artifact()")

    def transaction(self, stage: StagePart) -> Transaction:
        raise self._not_here(stage, "ctx.transaction()")

    def cleanup(self, stage: StagePart) -> AbstractContextManager[trio.CancelScope]:
        deadline = trio.current_time() + self._execution.graph.settings.cleanup_timeout
        return trio.CancelScope(shield=True, deadline=deadline)

    async def run_child(self, stage: StagePart, graph: Graph, context: PipelineContext) -> PipelineResults:
        raise self._not_here(stage, "ctx.run_pipeline()")

    async def run_map(self, stage: StagePart, plan: Any, items: Any) -> StageOutput:
        raise self._not_here(stage, "a map")

    def ending(self, stage: StagePart) -> str | None:
        return "the undo has reached its limit" if self.scope.cancel_called else None

    def _not_here(self, stage: StagePart, what: str) -> RuntimeError:
        return RuntimeError(f"{what} is not there for the undo of stage {stage.name!r}: an undo ends when it returns")
