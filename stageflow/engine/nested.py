"""Runs within a stage: a pipeline as a whole, or one for each item of a map.

A child is an `Execution` like any other, in the task of the stage that runs it, so it is under that stage's limits, and
in its branch. Its results hang on the record of the stage from the moment it begins; whatever ends either of them, what
the child had finished is there.

The items of a map are children of one stage each, or of a pipeline. Each is a task with a scope of its own, and at most
`limit` of them are there at a time: an item is asked for only when there is room for it. What is kept of an item that
succeeded is its output; of any other, its record.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio

from stageflow.context import PipelineContext
from stageflow.engine.execution import Execution
from stageflow.engine.run import outcome_of
from stageflow.errors import MaxDepthError, PipelineTerminated, StageExecutionError
from stageflow.graph import Graph
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import Limit

if TYPE_CHECKING:
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.results import PipelineResults

__all__ = ["MAX_DEPTH", "Around", "MapPlan", "MapRun", "run_child", "run_map"]

_END = object()
MAX_DEPTH = 16
"""How deep runs may be nested."""


@final
@attrs.frozen(kw_only=True)
class Around:
    """What a run within a stage has from the run around it.

    Attributes:
        run_id: The id of that run.
        depth: How deep the run within is nested.
        lent: The limits of which the stages around hold a token, with what is lent instead.
        limits: The limits that both have in common, by name.
        branch: What the trunk of the run within is called, if it is an item of a map.
    """

    run_id: str
    depth: int
    lent: Mapping[Limit, Limit]
    limits: Mapping[str, Limit] = attrs.field(factory=dict[str, Limit])
    branch: str | None = None


def _around(host: BranchRun) -> Around:
    """Gives what a run within the stage that runs in a branch has from around.

    Of every token that the stage holds, its children may use that one, one at a time, instead of waiting for another,
    which might never come.
    """
    execution = host.execution
    tries = None if host.walker is None else host.walker.tries
    held = () if tries is None else tries.held
    lent = {**execution.state.lent, **{limit: Limit(1) for limit in held}}
    # Whoever holds what was lent holds, for those within, the limit itself.
    for limit, instead in execution.state.lent.items():
        if instead in held:
            lent[limit] = lent[instead]
    return Around(run_id=execution.state.run_id, depth=execution.state.depth + 1, lent=lent)


async def run_child(host: BranchRun, name: str, graph: Graph, context: PipelineContext) -> PipelineResults:
    """Runs a graph within a stage.

    Raises:
        StageExecutionError: A stage of it failed.
        UnifiedPipelineCancelled: It was cancelled by one of its stages.
        MaxDepthError: It would be nested too deep.
        trio.Cancelled: The stage around it was cancelled.
    """
    around = _around(host)
    if around.depth > MAX_DEPTH:
        raise MaxDepthError(graph.name, depth=around.depth)
    record = host.execution.collector.record(host.execution.shape.index[name])
    child = Execution(graph, context, around)
    record.more.children = (*record.details.children, child.results)
    await child.execute()
    return outcome_of(child)


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
        "_allowed",
        "_around",
        "_failures",
        "_flying",
        "_host",
        "_name",
        "_nursery",
        "_outputs",
        "_plan",
        "_record",
        "_room",
        "_verdict",
    )

    def __init__(self, host: BranchRun, name: str, plan: MapPlan) -> None:
        self._host = host
        self._name = name
        self._plan = plan
        self._record = host.execution.collector.record(host.execution.shape.index[name])
        self._record.more.items = {}  # of this attempt
        around = _around(host)
        if around.depth > MAX_DEPTH:
            raise MaxDepthError(plan.graph.name, depth=around.depth)
        self._around = around if plan.stage is None else attrs.evolve(around, limits=host.execution.limits)
        self._flying: dict[int, Execution] = {}
        self._outputs: list[Any] = []
        self._failures: list[StageRecord] = []
        self._allowed = math.inf
        self._verdict: StageOutput | None = None  # how the stage ends, if that is decided before all items have
        self._room = trio.Semaphore(plan.limit)
        self._nursery: trio.Nursery

    async def run(self, items: Iterable[Any] | AsyncIterable[Any]) -> StageOutput:
        """Runs it."""
        execution, tolerate = self._host.execution, self._plan.tolerate
        if isinstance(tolerate, int):
            self._allowed = tolerate
        elif hasattr(items, "__len__"):
            self._allowed = math.floor(tolerate * len(cast("list[Any]", items)))
        execution.maps[self._name] = self
        try:
            async with trio.open_nursery() as self._nursery:
                await self._feed(items)
        finally:
            del execution.maps[self._name]
        if self._verdict is None and len(self._failures) > tolerate * (
            1 if isinstance(tolerate, int) else len(self._outputs)
        ):
            self._verdict = self._too_many()
        if self._verdict is not None:
            return self._verdict
        if self._record.details.items:
            execution.partial = True
        return StageOutput.ok(self._outputs)

    async def _feed(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:  # noqa: ASYNC910  # Semaphore.acquire
        """Starts an item whenever there is room for it."""
        iterator = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        try:
            for number in itertools.count():
                await self._room.acquire()
                item = next(iterator, _END) if isinstance(iterator, Iterator) else await anext(iterator, _END)
                if item is _END:
                    return
                self._outputs.append(None)
                reason = self._host.execution.items_cut.pop((self._name, number), None)
                if reason is None:
                    self._nursery.start_soon(self._one, number, item, name=f"{self._name}[{number}]")
                else:
                    self._note(number, StageState.SKIPPED, Cause(CauseKind.CANCEL_BRANCH, None, reason))
                    self._room.release()
        finally:
            close = getattr(iterator, "aclose", None)  # an async generator cleans up here, and not in its own time
            if close is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + self._cleanup_timeout):
                    await close()

    @property
    def _cleanup_timeout(self) -> float:
        return self._host.execution.graph.settings.cleanup_timeout

    async def _one(self, number: int, item: Any) -> None:  # noqa: ASYNC910  # as the item does
        """Runs one item, and writes how it ended."""
        origin = self._host.state.origin
        title = f"{self._name}[{number}]"
        context = PipelineContext(
            run_id=f"{self._around.run_id}/{title}",
            correlation_id=origin.correlation_id or self._around.run_id,
            tenant=origin.tenant,
            data=item,
            snapshot=origin.snapshot,
            metadata=origin.metadata,
        )
        around = attrs.evolve(self._around, branch=title)
        self._flying[number] = child = Execution(self._plan.graph, context, around)
        try:
            await child.execute()
        finally:
            del self._flying[number]
            self._room.release()
            self._settle(number, child)

    def _settle(self, number: int, child: Execution) -> None:
        results, stage = child.results, self._plan.stage
        if stage is not None and stage in results:
            self._outputs[number] = results[stage].data
            return
        if stage is None and child.collector.status in (RunStatus.SUCCEEDED, RunStatus.PARTIAL):
            self._outputs[number] = {name: output.data for name, output in results.items()}
            self._host.execution.partial |= child.collector.status is RunStatus.PARTIAL
            return
        inner = None if stage is None else child.collector.record(child.shape.index[stage])
        try:
            outcome_of(child)
            error: PipelineTerminated | None = None
        except PipelineTerminated as raised:
            error = raised
        cause: Cause | None
        if isinstance(error, StageExecutionError):
            cause = Cause(CauseKind.FAILURE, None if inner else error.stage, error.reason)
            state = StageState.FAILED
        else:
            verdict = child.verdict
            cause = verdict.cause if isinstance(verdict, StageRecord) else verdict
            if cause is not None and cause.stage is None and cause.kind is CauseKind.CANCEL:
                cause = attrs.evolve(cause, kind=CauseKind.CANCEL_BRANCH)  # for that is what it is to the run around
            if cause is None:
                cause = self._host.why() if inner is None else inner.cause
            state = StageState.CANCELLED if inner is None else inner.state
        record = self._note(number, state, cause, inner, results)
        if state is StageState.FAILED:
            record.error = error.original if isinstance(error, StageExecutionError) else error
            self._failures.append(record)
            if len(self._failures) > self._allowed and self._verdict is None:
                self._verdict = self._too_many()
                self._nursery.cancel_scope.cancel(reason=self._verdict.reason)
        elif cause is not None and cause.kind is CauseKind.CANCEL and cause.stage is not None and self._verdict is None:
            # An item is a branch of this run, and what it says of the run is said.
            self._verdict = StageOutput.cancel(f"{record.name}: {cause.reason}")
            self._nursery.cancel_scope.cancel(reason=cause.reason)

    def _note(
        self,
        number: int,
        state: StageState,
        cause: Cause | None,
        inner: StageRecord | None = None,
        results: PipelineResults | None = None,
    ) -> StageRecord:
        """Keeps the record of an item that has no output."""
        title = f"{self._name}[{number}]"
        record = StageRecord(title, title, state, cause=cause, ended=trio.current_time())
        if inner is not None:
            record.attempts, record.started, record.ended = inner.attempts, inner.started, inner.ended
            record.partial, record.details = inner.partial, inner.details
        elif results is not None:
            record.more.children = (results,)
        cast("dict[int, StageRecord]", self._record.more.items)[number] = record
        return record

    def _too_many(self) -> StageOutput:
        """How the stage ends if more items have failed than it tolerates."""
        first, failed = self._failures[0], len(self._failures)
        tolerate = self._plan.tolerate
        allowed = f"{tolerate:.0%}" if isinstance(tolerate, float) else str(tolerate)
        others = "" if failed == 1 else f" and {failed - 1} more"
        assert isinstance(first.error, Exception)
        cause = "" if first.cause is None else f": {first.cause.reason}"
        reason = f"{first.name}{others} failed, and {allowed} may{cause}"
        return StageOutput(StageStatus.FAIL, {"outputs": list(self._outputs)}, reason=reason, error=first.error)

    def cancel(self, number: int, reason: str) -> None:
        """Cancels one item: if it is in flight, at once; if it is still to come, when its turn comes."""
        child = self._flying.get(number)
        if child is not None:
            child.cancel(reason)
        elif number >= len(self._outputs):
            self._host.execution.items_cut.setdefault((self._name, number), reason)
