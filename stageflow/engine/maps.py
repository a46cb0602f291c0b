"""Maps: a run within a stage for each of some items, several at a time.

The items are children of one stage each, or of a pipeline. Each is a task with a scope of its own, and at most `limit`
of them are there at a time: an item is asked for only when there is room for it. What is kept of an item that succeeded
is its output; of any other, its record. If the map does not end well, the outputs are in its partial output.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio

from stageflow.context import PipelineContext, StageContext
from stageflow.context.stage_context import host_of
from stageflow.engine.execution import Execution
from stageflow.engine.nested import MAX_DEPTH, around_of, keep_for_undo
from stageflow.engine.run import outcome_of
from stageflow.errors import CheckpointError, ContractViolation, MaxDepthError, StageExecutionError, in_words
from stageflow.frozen import FrozenDict
from stageflow.graph import Graph
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus

if TYPE_CHECKING:
    from stageflow.engine.branch import BranchRun

__all__ = ["MapPlan", "MapRun", "OverItems", "run_map"]

_END = object()


@final
@attrs.frozen(kw_only=True)
class MapPlan:
    """How a map is to be run.

    Attributes:
        graph: What is run for each item.
        stage: The stage of it whose output is the item's; `None` for a pipeline, of which it is all outputs.
        limit: How many items may be in flight.
        tolerate: How many may fail, as a count, or as a part of all.
    """

    graph: Graph
    stage: str | None
    limit: int
    tolerate: float


async def run_map(host: BranchRun, name: str, plan: MapPlan, items: Any) -> StageOutput:
    """Runs a graph for each of some items.

    Returns:
        The output of the stage: a list with an entry for each item, `None` where there is no output.

    Raises:
        TypeError: The items cannot be iterated over.
        trio.Cancelled: The stage was cancelled, and so was every item in flight.
    """
    if isinstance(items, StageOutput):
        items = items.data
    given: object = items
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, (Iterable, AsyncIterable)):
        raise TypeError(
            f"map {name!r} goes over a list or another iterable, also an async one, not {type(items).__name__!r}; "
            f"say which with over=lambda ctx: ..."
        )
    return await MapRun(host, name, plan).run(items)


@final
class MapRun:
    """A map that is running."""

    __slots__ = (
        "_around",
        "_ended_by",
        "_failures",
        "_flying",
        "_host",
        "_in_part",
        "_items",
        "_most",
        "_name",
        "_nursery",
        "_outputs",
        "_plan",
        "_raised",
        "_record",
        "_room",
        "_verdict",
    )

    def __init__(self, host: BranchRun, name: str, plan: MapPlan) -> None:
        self._host = host
        self._name = name
        self._plan = plan
        self._record = host.execution.collector.record(host.execution.shape.index[name])
        self._items: dict[int, StageRecord] = {}  # of this attempt
        self._record.more.items = self._items
        around = around_of(host, self._record)
        if around.depth > MAX_DEPTH:
            raise MaxDepthError(plan.graph.name, depth=around.depth)
        self._around = around if plan.stage is None else attrs.evolve(around, limits=host.execution.limits)
        self._flying: dict[int, Execution] = {}
        self._outputs: list[Any] = []
        self._failures: list[StageRecord] = []
        self._most = math.inf  # how many may fail, as far as that is known
        self._in_part = False  # whether an item succeeded in part only
        self._verdict: StageOutput | None = None  # how the stage ends, if that is decided before all items have
        self._ended_by: Cause | None = None  # why items in flight are being cancelled, if it is the map that does it
        self._raised: Exception | None = None  # by what gives the items
        self._room = trio.Semaphore(plan.limit)
        self._nursery: trio.Nursery

    async def run(self, items: Iterable[Any] | AsyncIterable[Any]) -> StageOutput:
        """Runs it."""
        execution = self._host.execution
        if isinstance(self._plan.tolerate, int):
            self._most = self._plan.tolerate
        elif hasattr(items, "__len__"):
            self._most = self._allowed_of(len(cast("list[Any]", items)))
        execution.maps[self._name] = self
        execution.in_part.discard(self._name)
        succeeded = False
        try:
            async with trio.open_nursery() as self._nursery:
                await self._feed(items)
            output = self._output()
            succeeded = output.status is StageStatus.OK
            return output
        finally:
            del execution.maps[self._name]
            if not succeeded:
                self._record.partial = FrozenDict({**self._record.partial, "outputs": self._outputs})

    def _title(self, number: int) -> str:
        """What an item is called, as a stage and as a branch."""
        return f"{self._name}[{number}]"

    def _allowed_of(self, items: int) -> float:
        """How many of so many items may fail."""
        tolerate = self._plan.tolerate
        # 0.29 * 100 is a little less than 29.
        return tolerate if isinstance(tolerate, int) else math.floor(tolerate * items + 1e-9)

    def _output(self) -> StageOutput:
        """How the stage ends, now that all items have."""
        if self._verdict is None and self._raised is not None:
            raise self._raised
        if self._verdict is None and len(self._failures) > self._allowed_of(len(self._outputs)):
            self._verdict = self._too_many()
        if self._verdict is not None:
            return self._verdict
        if self._items or self._in_part:
            self._host.execution.in_part.add(self._name)
        return StageOutput.ok(self._outputs)

    async def _feed(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:  # noqa: ASYNC910
        """Starts all items. What the source of them raises is kept, for the nursery would wrap it into a group."""
        try:
            await self._draw(items)
        except Exception as error:
            self._raised = error
            self._stop(Cause(CauseKind.FAILURE, self._name, in_words(error)))

    async def _draw(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:  # noqa: ASYNC910  # Semaphore.acquire
        """Starts an item whenever there is room for it."""
        iterator: Any = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        is_async = isinstance(items, AsyncIterable)
        try:
            for number in itertools.count():
                await self._room.acquire()
                if self._ended_by is not None:  # in this very tick
                    return
                item = await anext(iterator, _END) if is_async else next(iterator, _END)
                if item is _END:
                    return
                self._outputs.append(None)
                reason = self._host.execution.items_cut.get((self._name, number))
                if reason is None:
                    # Made here, so that it can be cancelled from now on.
                    try:
                        self._flying[number] = child = self._child(number, item)
                    except ContractViolation as error:  # the item is not what `inputs=` wants, so it fails alone
                        self._room.release()
                        self._refused(number, error)
                        continue
                    self._nursery.start_soon(self._one, number, child, name=self._title(number))
                else:
                    self._note(number, StageState.SKIPPED, Cause(CauseKind.CANCEL_BRANCH, None, reason))
                    self._room.release()
        finally:
            # A generator cleans up here, and not in its own time.
            close = getattr(iterator, "aclose", None)
            if inspect.isgenerator(iterator):
                iterator.close()
            elif close is not None:
                deadline = trio.current_time() + self._host.execution.graph.settings.cleanup_timeout
                with trio.CancelScope(shield=True, deadline=deadline) as scope:
                    await close()
                if scope.cancelled_caught:
                    self._record.more.overran = (*self._record.details.overran, "aclose() of the items")

    def _child(self, number: int, item: Any) -> Execution:
        """Makes the run of one item."""
        host, around, title = self._host, self._around, self._title(number)
        origin = host.state.origin
        context = PipelineContext(
            run_id=f"{around.run_id}/{title}",
            correlation_id=origin.correlation_id or around.run_id,
            tenant=origin.tenant,
            data=item,
            snapshot=origin.snapshot,
            metadata=origin.metadata,
        )
        scribe = host.execution.scribe
        if scribe is not None:
            shares = self._plan.stage is not None
            run_id = f"{around.run_id}/{title}"
            attempt = self._record.attempts
            scribe = scribe.within(
                self._name, number, attempt, self._plan.graph, context, run_id, item=True, shares=shares
            )
        around = attrs.evolve(around, branch=title, key=f"{around.key}/{title}")
        child = Execution(self._plan.graph, context, around, scribe)
        if self._plan.stage is not None:  # a branch of this run, whose artifacts are those of this run
            child.state.artifacts = child.collector.artifacts = host.state.artifacts
        return child

    async def _one(self, number: int, child: Execution) -> None:  # noqa: ASYNC910  # as the item does
        """Runs one item, and writes how it ended."""
        try:
            await child.execute()
        finally:
            del self._flying[number]
            self._room.release()
            if self._plan.graph.plan.compensates or child.undoable:
                attempt = self._record.attempts
                title = self._title(number) if attempt == 1 else f"{self._title(number)}.{attempt}"
                alone = self._plan.stage is not None
                keep_for_undo(self._host.execution, self._name, title, child, alone=alone)
            self._settle(number, child)

    def _settle(self, number: int, child: Execution) -> None:
        """Writes how an item ended, and does what that means for the map."""
        results, stage = child.results, self._plan.stage
        self._host.beat(self._record)
        failed = child.collector.status is RunStatus.FAILED
        if stage is None:
            # An item that succeeds leaves its outputs only, so what else it made goes up to the run around.
            for artifact in results.artifacts:
                self._host.add_artifact(self._record, attrs.evolve(artifact, stage=self._title(number)))
            if child.collector.status in (RunStatus.SUCCEEDED, RunStatus.PARTIAL):
                self._outputs[number] = {name: output.data for name, output in results.items()}
                self._in_part |= child.collector.status is RunStatus.PARTIAL
                return
        elif stage in results:
            self._outputs[number] = results[stage].data
            if not failed:  # by a task that the stage left in its nursery
                return
        if failed:
            self._failed(number, child)
        else:
            self._was_cut_short(number, child)

    def _failed(self, number: int, child: Execution) -> None:
        title, inner = self._title(number), self._inner(child)
        if child.fatal is not None:  # the map dies of it too
            cause = Cause(CauseKind.FAILURE, title, in_words(child.fatal))
            self._note(number, StageState.FAILED, cause, child).error = child.fatal
            return
        try:
            outcome_of(child)
        except StageExecutionError as error:
            verdict = child.cause
            kind = CauseKind.FAILURE if verdict is None else verdict.kind
            within = "" if inner is not None or error.stage is None else f"stage {error.stage!r}: "
            record = self._note(number, StageState.FAILED, Cause(kind, title, within + error.reason), child)
            record.error, record.recoverable = error.original, error.recoverable
            self._count(record)
        except CheckpointError as error:
            record = self._note(number, StageState.FAILED, Cause(CauseKind.CHECKPOINT, title, in_words(error)), child)
            record.error = error
            self._count(record)

    def _refused(self, number: int, error: ContractViolation) -> None:
        """Writes that an item is nothing that could be run."""
        cause = Cause(CauseKind.CONTRACT, self._title(number), in_words(error))
        record = self._note(number, StageState.FAILED, cause)
        record.error = error
        self._count(record)

    def _count(self, failed: StageRecord) -> None:
        """Counts an item that failed, and stops the others if it is one too many."""
        self._failures.append(failed)
        if len(self._failures) > self._most and self._verdict is None:
            self._verdict = self._too_many()
            self._stop(self._failures[0].cause)

    def _was_cut_short(self, number: int, child: Execution) -> None:
        title, inner = self._title(number), self._inner(child)
        cause = child.cause
        if cause is None and inner is not None:
            cause = inner.cause
        if cause is None or cause.kind is CauseKind.CALLER:
            cause = self._why()
        elif cause.stage is not None:
            cause = attrs.evolve(cause, stage=title)
        elif cause.kind is CauseKind.CANCEL:
            cause = attrs.evolve(cause, kind=CauseKind.CANCEL_BRANCH)  # for that is what it is to the run around
        self._note(number, StageState.CANCELLED if inner is None else inner.state, cause, child)
        if cause.kind is CauseKind.CANCEL and cause.stage == title and self._verdict is None:
            # An item is a branch of this run, and what it says of the run is said.
            self._verdict = StageOutput.cancel(f"{title}: {cause.reason}")
            self._stop(cause)

    def _why(self) -> Cause:
        """Why the items in flight are being cancelled."""
        why = self._ended_by or self._host.why()
        walker = self._host.walker
        if why is None and walker is not None and walker.too_late:
            return Cause(CauseKind.TIMEOUT, self._name, walker.limit_in_words())
        return why or self._host.blame()

    def _stop(self, cause: Cause | None) -> None:
        """Cancels the items in flight, and starts no other."""
        if self._ended_by is None:
            self._ended_by = cause
        self._nursery.cancel_scope.cancel(reason=str(cause))

    def _inner(self, child: Execution) -> StageRecord | None:
        """The record of the stage that an item is, if it is one."""
        stage = self._plan.stage
        return None if stage is None else child.collector.record(child.shape.index[stage])

    def _note(self, number: int, state: StageState, cause: Cause, child: Execution | None = None) -> StageRecord:
        """Keeps the record of an item that did not end well."""
        title = self._title(number)
        record = StageRecord(title, title, state, cause=cause, ended=trio.current_time())
        inner = None if child is None else self._inner(child)
        if inner is not None:
            record.attempts, record.started, record.ended = inner.attempts, inner.started, inner.ended
            record.partial, record.details, record.after_cancel = inner.partial, inner.details, inner.after_cancel
        elif child is not None:
            record.attempts, record.started = 1, child.collector.started
            record.more.children = (child.results,)
        self._items[number] = record
        return record

    def _too_many(self) -> StageOutput:
        """How the stage ends if more items have failed than it tolerates."""
        tries = None if self._host.walker is None else self._host.walker.tries
        if tries is not None:
            tries.raised = True  # by an item, but a `Retry` of the map is meant for that
        # Of those that failed in one instant, none was first but by chance.
        at_once = [record for record in self._failures if record.ended == self._failures[0].ended]
        first, failed = min(at_once, key=lambda record: int(record.name[len(self._name) + 1 : -1])), len(self._failures)
        tolerate = self._plan.tolerate
        allowed = f"{tolerate:.0%}" if isinstance(tolerate, float) else str(tolerate)
        others = "" if failed == 1 else f" and {failed - 1} more"
        assert isinstance(first.error, Exception)
        cause = "" if first.cause is None else f": {first.cause.reason}"
        reason = f"{first.name}{others} failed, and {allowed} may{cause}"
        return StageOutput(
            StageStatus.FAIL,
            {"outputs": list(self._outputs)},
            reason=reason,
            error=first.error,
            recoverable=first.recoverable,
        )

    def cancel(self, number: int, reason: str, *, undo: bool) -> None:
        """Cancels one item: if it is in flight, at once; if it is still to come, when its turn comes.

        It is not run either if the map is tried again.
        """
        child = self._flying.get(number)
        if child is not None or number >= len(self._outputs):
            self._host.execution.items_cut.setdefault((self._name, number), reason)
        if child is not None:
            child.cancel(reason, undo=undo)


@final
@attrs.frozen
class OverItems:
    """The stage that is a map: it runs something for each item of what a stage gave, or a function gives.

    Attributes:
        plan: How it is to be run.
        over: The stage, or the function of the context.
    """

    plan: MapPlan
    over: str | Callable[[StageContext], Iterable[Any] | AsyncIterable[Any]]

    async def __call__(self, ctx: StageContext) -> StageOutput:
        """Runs it."""
        host, part = host_of(ctx)
        items = ctx.inputs[self.over].data if isinstance(self.over, str) else self.over(ctx)
        return await host.run_map(part, self.plan, items)
