"""`Run`: a run that goes, as one holds it in one's hand."""

from __future__ import annotations

import copy
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias, final

import trio
from trio.lowlevel import checkpoint_if_cancelled

from stageflow.engine.body import has_cancellation, is_cancellation
from stageflow.engine.branch import CALLER
from stageflow.engine.execution import Execution
from stageflow.errors import (
    CheckpointError,
    PipelineTerminated,
    StageExecutionError,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    in_words,
    ungroup,
)
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord
from stageflow.output import said

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from stageflow.context import PipelineContext
    from stageflow.engine.results import PipelineResults
    from stageflow.graph import Graph

__all__ = ["Begin", "Run", "open_run", "run_to_end"]

Begin: TypeAlias = "Callable[[Graph, PipelineContext], Awaitable[Execution]]"


@final
class Run:
    """The handle of a run that was opened with `StageGraph.open`. It stays readable after the run has ended."""

    __slots__ = ("_ended", "_execution", "_opener")

    def __init__(self, execution: Execution, ended: trio.Event) -> None:
        self._execution = execution
        self._opener = trio.lowlevel.current_task()
        self._ended = ended

    @property
    def id(self) -> str:
        """The run's id."""
        return self._execution.collector.run_id

    @property
    def results(self) -> PipelineResults:
        """What is known of the run so far. It is live, and still there after the run has ended in whatever way."""
        return self._execution.results

    def cancel(self, reason: str) -> None:
        """Cancels the run. What has finished is kept; `wait` raises `UnifiedPipelineCancelled`.

        Returns at once: the stages that run are cancelled at their next checkpoint, and no other starts. Does nothing
        if the run has ended or is ending.

        Args:
            reason: Why, in words.
        """
        self._execution.cancel(said(reason, "Run.cancel"))

    def cancel_branch(self, stage: str, reason: str, *, compensate: bool = False) -> None:
        """Cancels one branch of the run, and nothing else. That does not make the run raise.

        Returns at once. What runs in the branch is cancelled at its next checkpoint and its partial output kept; what
        has not started in it is skipped; joins beyond it see their inputs from it as absent. If the branch has not
        started yet, it will be skipped when its turn comes; if it has ended, nothing happens.

        Args:
            stage: A stage of the branch.
            reason: Why, in words.
            compensate: Whether what was done in the branch is undone, as its stages say with ``compensate=``; except
                for what a stage outside of it has used that has succeeded. The run stays open until that is done.

        Raises:
            UnknownStageError: There is no such stage.
        """
        self._execution.cancel_branch(stage, said(reason, "Run.cancel_branch"), compensate=compensate)

    async def wait(self) -> PipelineResults:
        """Waits until the run has ended. Any number of tasks may do so.

        What it raises in the task of the block is not raised again when the block is left; other tasks just watch. (A
        stage that waits for its own run waits until its limit.)

        Returns:
            The results, if the run ended `SUCCEEDED` or `PARTIAL`.

        Raises:
            StageExecutionError: A stage failed.
            UnifiedPipelineCancelled: The run was cancelled, by a stage, by `cancel`, or by a scope around it.
            trio.Cancelled: The waiting was cancelled. The run is not touched by that.
        """
        await self._ended.wait()
        if trio.lowlevel.current_task() is self._opener:
            self._execution.reported = True
        return outcome_of(self._execution)

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self._execution.shape.pipeline!r}, {self.results.status.value}>"


async def run_to_end(graph: Graph, context: PipelineContext, begin: Begin | None = None) -> PipelineResults:
    """Runs a graph in the calling task.

    Args:
        graph: The graph.
        context: With what.
        begin: What makes a run of these that is recorded.
    """
    execution = Execution(graph, context) if begin is None else await begin(graph, context)
    await execution.execute()
    return outcome_of(execution)


@asynccontextmanager
async def open_run(graph: Graph, context: PipelineContext, begin: Begin | None = None) -> AsyncGenerator[Run, None]:
    """Runs a graph beside the block of an ``async with``; see `run_to_end`."""
    execution = Execution(graph, context) if begin is None else await begin(graph, context)
    ended = trio.Event()

    async def execute() -> None:
        try:
            await execution.execute()
        finally:
            ended.set()

    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(execute, name=f"run of {graph.name}")
            try:
                yield Run(execution, ended)
            except BaseException as error:  # noqa: ASYNC103
                # Kept out of the nursery, which would wrap it into a group, and raised again when the run has ended.
                if is_cancellation(error):
                    raise  # by a scope around the block, which is around the run as well
                raised = error
                if not has_cancellation(error):
                    execution.cancel(f"the block around the run raised {type(error).__name__}")
    except BaseException as error:  # noqa: ASYNC103  # raised again below, out of the group that the nursery made of it
        if execution.fatal is not None:
            raised = execution.fatal
        elif raised is None:
            raised = ungroup(error)
    if raised is not None:
        if is_cancellation(raised):
            await checkpoint_if_cancelled()  # raises a single one
        if isinstance(raised, Exception) and not execution.reported:
            _mention_failure(raised, execution)
        raise raised
    if not execution.reported:
        outcome_of(execution)


def _mention_failure(raised: Exception, execution: Execution) -> None:
    """Adds to what the block raised that the run had failed before, for that will not be raised any more."""
    try:
        outcome_of(execution)
    except (CheckpointError, StageExecutionError) as error:
        raised.add_note(f"before that, {error}")
    except UnifiedPipelineCancelled:
        pass  # that was because of `raised`


def outcome_of(execution: Execution) -> PipelineResults:
    """Gives the results of a run that has ended, or raises what ended it.

    Raises:
        StageExecutionError: A stage failed.
        UnifiedPipelineCancelled: The run was cancelled.
        CheckpointError: It could not be recorded; what else it would have raised is its cause.
    """
    if execution.lost is not None:
        raise _not_recorded(execution, execution.lost)
    collector, results, verdict = execution.collector, execution.results, execution.verdict
    if verdict is None:
        if collector.status is RunStatus.SUCCEEDED or collector.status is RunStatus.PARTIAL:
            return results
        # Whoever only waits for the run learns by this that it was interrupted, or killed by a KeyboardInterrupt.
        verdict = execution.ending or CALLER
    finished = f"{len(results)} of {len(collector.slots)} stages had succeeded; see .results"
    if isinstance(verdict, Cause) and verdict.kind is CauseKind.DEADLINE:
        raise _deadline_reached(execution, verdict, finished)
    if not isinstance(verdict, StageRecord) or verdict.error is None:
        cause = verdict.cause if isinstance(verdict, StageRecord) else verdict
        assert cause is not None
        by = "" if cause.stage is None else f" by stage {cause.stage!r}"
        how = "interrupted" if collector.status is RunStatus.INTERRUPTED else "cancelled"
        message = f"pipeline {execution.graph.name!r} was {how}{by}: {cause.reason}; {finished}"
        raise UnifiedPipelineCancelled(message, results=results, stage=cause.stage, reason=cause.reason)
    raise _failure(execution, verdict, results, finished) from verdict.error


def _not_recorded(execution: Execution, lost: CheckpointError) -> CheckpointError:
    """Gives the error of a run that could not be recorded, with what it would have raised otherwise as its cause."""
    error = copy.copy(lost)  # several tasks may raise it
    error.results, error.__cause__ = execution.results, lost.__cause__
    if execution.verdict is not None:
        execution.lost = None
        try:
            outcome_of(execution)
        except PipelineTerminated as own:
            error.__cause__ = own
        finally:
            execution.lost = lost
    return error


def _failure(execution: Execution, record: StageRecord, results: PipelineResults, finished: str) -> StageExecutionError:
    original, cause = record.error, record.cause
    assert isinstance(original, Exception)
    # A stage may have ended well, and a task that it left in the nursery failed afterwards.
    reason = in_words(original) if cause is None else cause.reason
    where = execution.graph.stages[record.name].where
    timed_out = record.limit is not None and cause is not None and cause.stage == record.name
    if timed_out:
        saved = f", having saved {', '.join(map(repr, record.partial))}" if record.partial else ""
        finished = f"the limit was set by {record.details.source}; it ran {_elapsed(record):g} s{saved}; {finished}"
    error = (StageTimeoutError if timed_out else StageExecutionError)(
        f"{where} failed: {reason}; {finished}",
        results=results,
        stage=record.name,
        reason=reason,
        original=original,
        recoverable=record.recoverable,
        failures=tuple(execution.collector.failures),
    )
    if isinstance(error, StageTimeoutError):
        error.limit = record.limit or 0.0
        error.elapsed = _elapsed(record)
        error.source = record.details.source
        error.partial = record.partial
    return error


def _elapsed(record: StageRecord) -> float:
    """How long that ran which was limited: the last attempt, or the stage as a whole."""
    details = record.details
    began = record.started if details.began is None or details.source.startswith("total_timeout=") else details.began
    return 0.0 if began is None or record.ended is None else record.ended - began


def _deadline_reached(execution: Execution, cause: Cause, finished: str) -> StageTimeoutError:
    """The error of a run that has reached its deadline; of the stages that were running, it names the first."""
    collector, graph = execution.collector, execution.graph
    caught = [record for record in collector.slots if record is not None and record.cause == cause and record.attempts]
    first = min(caught, key=lambda record: record.started or 0.0, default=None)
    error = StageTimeoutError(
        f"pipeline {graph.name!r}: {cause.reason}; {finished}",
        results=execution.results,
        stage=None if first is None else first.name,
        reason=cause.reason,
        original=TimeoutError(cause.reason),
        recoverable=False,
        failures=tuple(collector.failures),
    )
    error.limit = graph.settings.deadline or 0.0
    error.elapsed = (collector.ended or collector.started) - collector.started
    error.source = f"deadline= of pipeline {graph.name!r}"
    error.partial = {} if first is None else first.partial
    return error
