"""A run within a stage.

A child is an `Execution` like any other, in the task of the stage that runs it, so it is under that stage's limits, and
in its branch. Its results hang on the record of the stage from the moment it begins; whatever ends either of them, what
the child had finished is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import attrs

from stageflow.context.ids import new_run_id
from stageflow.engine.execution import Execution
from stageflow.engine.run import outcome_of
from stageflow.errors import MaxDepthError
from stageflow.journal import RunStatus, StageRecord
from stageflow.stages import Limit

if TYPE_CHECKING:
    from stageflow.context import PipelineContext, StageContext
    from stageflow.engine.branch import BranchRun
    from stageflow.engine.results import PipelineResults
    from stageflow.graph import Graph

__all__ = ["MAX_DEPTH", "Around", "Within", "around_of", "keep_for_undo", "place_of", "run_child"]

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
        key: What stands for the run within, in keys of idempotency, instead of its id.
    """

    run_id: str
    depth: int
    lent: Mapping[Limit, Limit]
    limits: Mapping[str, Limit] = attrs.field(factory=dict[str, Limit])
    branch: str | None = None
    key: str | None = None


def around_of(host: BranchRun, record: StageRecord) -> Around:
    """Gives what a run within a stage of a branch has from around.

    Of every token that the stage holds, its children may use that one, one at a time, instead of waiting for another,
    which might never come. All of its children take turns at it, also those that run beside each other.
    """
    execution = host.execution
    tries = None if host.walker is None else host.walker.tries
    held = () if tries is None or tries.record is not record else tries.held
    loans = execution.loans.setdefault(record.name, {}) if held else {}
    for limit in held:
        if limit not in loans:
            loans[limit] = limit.loan()
    lent = {**execution.state.lent, **{limit: loans[limit] for limit in held}}
    # Whoever holds what was lent holds, for those within, the limit itself.
    for limit, instead in execution.state.lent.items():
        if instead in held:
            lent[limit] = lent[instead]
    state = execution.state
    return Around(run_id=state.run_id, depth=state.depth + 1, lent=lent, key=state.key or state.run_id)


def place_of(number: int, attempt: int) -> str:
    """Names a run within a stage, of all that the stage makes: in each attempt there is a first one, and so on."""
    return str(number) if attempt == 1 else f"{number}.{attempt}"


def keep_for_undo(around: Execution, name: str, title: str, child: Execution, *, alone: bool = False) -> None:
    """Keeps a run within a stage, which may have to be undone with the stage.

    If it has undone itself, since it failed by itself, and something of that is missing, the run around says so too,
    whatever becomes of that.

    Args:
        around: The run around it.
        name: The stage.
        title: What it is called.
        child: The run.
        alone: Whether that is the name of its only stage, since it is an item of a map.
    """
    around.undoable.setdefault(name, []).append((title, child))
    own = child.collector.compensation
    if own is None or not any(undo.missing for undo in own.undos.values()):
        return
    record = around.collector.compensation
    if record is None:
        record = around.collector.compensation = attrs.evolve(own, undos={})
    record.adopt({title if alone else f"{title}/{path}": undo for path, undo in own.undos.items()})


async def run_child(host: BranchRun, name: str, graph: Graph, context: PipelineContext) -> PipelineResults:
    """Runs a graph within a stage.

    Raises:
        StageExecutionError: A stage of it failed.
        UnifiedPipelineCancelled: It was cancelled by one of its stages.
        MaxDepthError: It would be nested too deep.
        trio.Cancelled: The stage around it was cancelled.
    """
    record = host.execution.collector.record(host.execution.shape.index[name])
    around = around_of(host, record)
    if around.depth > MAX_DEPTH:
        raise MaxDepthError(graph.name, depth=around.depth)
    # Of the children of one attempt each has a key of its own, and the same one in the next attempt.
    attempt, made = host.execution.children.get(name, (0, 0))
    place = made if attempt == record.attempts else 0
    host.execution.children[name] = record.attempts, place + 1
    if place == 0:
        host.execution.in_part.discard(name)
    scribe = host.execution.scribe
    if scribe is not None:
        run_id = context.run_id or new_run_id()
        scribe = scribe.within(name, place, record.attempts, graph, context, run_id, item=False, shares=False)
        place = scribe.number
        context = attrs.evolve(context, run_id=scribe.run_id)
    child = Execution(graph, context, attrs.evolve(around, key=f"{around.key}/{name}/{place}"), scribe)
    record.more.children = (*record.details.children, child.results)
    try:
        await child.execute()
    finally:
        if graph.plan.compensates or child.undoable:
            keep_for_undo(host.execution, name, f"{name}/{place_of(place, record.attempts)}", child)
    results = outcome_of(child)
    if results.status is RunStatus.PARTIAL:
        host.execution.in_part.add(name)
    return results


@final
@attrs.frozen
class Within:
    """The stage that runs a pipeline as a whole: its inputs are the data of that run, and its outputs are the outputs.

    Attributes:
        child: The graph.
    """

    child: Any  # a StageGraph, which this layer does not know

    async def __call__(self, ctx: StageContext) -> dict[str, Any]:
        """Runs it."""
        results = await ctx.run_pipeline(self.child, {name: output.data for name, output in ctx.inputs.items()})
        return {name: output.data for name, output in results.items()}
