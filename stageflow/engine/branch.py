"""A branch while it runs: why it ends, what becomes of what is left in it, and what its stages ask of it.

The `Walker` is its task and opens its nursery, whose scope *is* the branch's cancel scope. When that has closed,
`BranchRun.close` settles what is left, so that nothing leaves a branch without an end and a cause.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import attrs
import trio
from trio.lowlevel import checkpoint_if_cancelled

from stageflow.engine.body import as_failure, is_cancellation
from stageflow.engine.cleanup import cleanup
from stageflow.engine.collector import Inputs
from stageflow.engine.paths import missing_input
from stageflow.errors import in_words
from stageflow.journal import Cause, CauseKind, StageState
from stageflow.output import StageOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from stageflow.context import PipelineContext
    from stageflow.context.host import StagePart
    from stageflow.context.state import RunState
    from stageflow.context.transaction import Transaction
    from stageflow.engine.execution import Execution
    from stageflow.engine.maps import MapPlan
    from stageflow.engine.results import PipelineResults
    from stageflow.engine.strand import Walker
    from stageflow.graph import Branch, Graph
    from stageflow.output import Artifact

__all__ = ["CALLER", "BranchRun", "is_cancelled"]

CALLER = Cause(CauseKind.CALLER, None, "a cancel scope around the run was cancelled")


@final
class BranchRun:
    """One branch of one run.

    Attributes:
        execution: The run.
        plan: Which branch it is.
        name: Its name.
        strand: Its stages, which `plan` has too.
        parent: The branch that holds it; `None` for the trunk.
        state: What the contexts of the run share.
        at: Where on the strand it begins.
        present: What the first stage may see, if it does not wait for all of its inputs.
        walker: Its task, while that is in it.
        nursery: Its nursery, as long as it is open.
        cause: Why it is being ended on its own, once it is.
        expires: When its deadline is reached, on Trio's clock.
        interrupted: Whether something in it was cut short by a scope around it, as far as its children can tell.
        closed: Whether everything in it has settled.
        successor: The branch with which its task goes on.
        early_children: Branches that were to start in it before it had begun itself: its own strand was skipped.
        unknown: What stands for what cancelled the branch, as long as that is not known.
        unexplained: The same of branches in it, and of those in them, which will be explained with this one.
        undone: Whether what was done in it is undone, since it was ended with ``compensate=True``.
        early_undos: The branches in it that are still to be undone, from an earlier process.
        unheard: What endings mean for the run, unless it turns out that the caller had cancelled it before.
    """

    # No slots: most of these stay as they are here in most branches, and what is not set costs nothing.
    walker: Walker | None = None
    nursery: trio.Nursery | None = None
    cause: Cause | None = None
    expires: float = math.inf
    present: tuple[str, ...] | None = None
    interrupted: bool = False
    closed: bool = False
    successor: BranchRun | None = None
    early_children: tuple[BranchRun, ...] = ()
    undone: bool = False
    early_undos: tuple[tuple[int, Cause], ...] = ()
    unheard: tuple[Callable[[], None], ...] = ()
    unknown: Cause | None = None
    unexplained: tuple[Any, ...] = ()

    def __init__(self, execution: Execution, parent: BranchRun | None, plan: Branch, at: int) -> None:
        self.execution = execution
        self.parent = parent
        self.plan = plan
        self.name: str = execution.shape.branch_names[plan.index]
        self.strand: tuple[int, ...] = plan.strand
        self.state: RunState = execution.state
        self.at = at

    def open(self, nursery: trio.Nursery) -> None:
        """Begins, in a nursery that was opened for it."""
        self.nursery = nursery
        if self.cause is not None or self.execution.ending is not None:  # it was ended before it began
            nursery.cancel_scope.cancel(reason=str(self.why()))
        if self.execution.has_deadlines:
            self.expires = nursery.cancel_scope.deadline = self.execution.deadline_of(self)
        for child in self.early_children:
            self.execution.scheduler.start(child, nursery)
        for branch, cause in self.early_undos:
            self._undo(branch, cause, nursery)

    def _undo(self, branch: int, cause: Cause, nursery: trio.Nursery) -> None:
        """Has a branch undone, beside what else there is in this one."""
        from stageflow.engine.saga import undo_branch  # noqa: PLC0415  # few branches come to that

        name = f"undo {self.execution.shape.branch_names[branch]}"
        nursery.start_soon(undo_branch, self.execution, branch, cause, name=name)

    # Ending

    def why(self) -> Cause | None:
        """Why the branch is being cancelled, as far as that is known: the nearest cause counts."""
        execution = self.execution
        if execution.some_branch_ended:
            for branch in self.lineage():
                if branch.cause is not None:
                    return branch.cause
        return execution.ending

    def blame(self) -> Cause:
        """Why the branch is being cancelled; if that is not known yet, something that will say so when it is.

        Until then, and for good if nothing else is found out, it says that it was a scope around the run.
        """
        why = self.why()
        if why is not None:
            return why
        if self.unknown is None:
            self.unknown = Cause(CALLER.kind, CALLER.stage, CALLER.reason)
        return self.unknown

    def explain(self, cause: Cause) -> None:
        """Says what it was that cancelled the branch, to all who had to put down that they did not know."""
        todo: list[Any] = [self.unknown, self.unexplained]
        for unknown in todo:  # grows on the way
            if isinstance(unknown, tuple):
                todo += unknown
            elif unknown is not None:
                # It is the same cause in all that it brought about, wherever that is, and so it is told there.
                for field in attrs.fields(Cause):
                    object.__setattr__(unknown, field.name, getattr(cause, field.name))
        self.unknown, self.unexplained = None, ()

    def lineage(self) -> Iterator[BranchRun]:
        """This branch, the one that holds it, and so on, up to the trunk."""
        branch: BranchRun | None = self
        while branch is not None:
            yield branch
            branch = branch.parent

    def end(self, cause: Cause, *, undo: bool = False) -> None:
        """Cancels the branch and everything below it, unless that is happening already; and has it undone then."""
        if self.closed or self.why() is not None:
            return
        self.cause, self.undone = cause, undo
        self.execution.some_branch_ended = True
        if self.execution.scribe is not None and cause.kind is CauseKind.CANCEL_BRANCH:
            self.execution.scribe.branch_ended(self.name, cause, undo=undo)
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel(reason=str(cause))

    async def cut_short(self, raised: BaseException | None) -> None:  # noqa: ASYNC910
        """Finds out what ended the branch, if it has not come to its end by itself.

        Neither the caller's cancellation nor a `KeyboardInterrupt` is passed on, so that a thousand branches do not
        hand a thousand of it up through groups; the execution raises it again, once, in the caller's own task. Each
        branch looks whether the cancellation is still there outside of its own nursery, and tells its parent; for a
        stage may have cancelled just that nursery.
        """
        execution, walker = self.execution, self._walker
        failure = None if raised is None else as_failure(raised)
        if raised is not None and failure is None and not is_cancellation(raised):
            execution.dies_of(raised, walker.lender or walker.current)
        from_outside = False
        if self.why() is None:
            from_outside = await is_cancelled()
            if not from_outside and self.has_expired:
                execution.reach_deadline(self)
            was_cut = self.interrupted or self.unheard or walker.at < len(self.strand)
            if self.why() is None and not from_outside and was_cut and failure is None and execution.drained is None:
                if walker.lender is not None:
                    self.cause = Cause(CauseKind.NURSERY, walker.lender.name, "its nursery was cancelled")
                    execution.some_branch_ended = True
                elif walker.current is not None:
                    failure = RuntimeError("it raised a trio.Cancelled of its own making: nothing had been cancelled")
        if from_outside:
            self.interrupted = True
            if self.parent is not None:
                self.parent.interrupted = True
                self.parent.unheard += self.unheard
        else:
            for act in self.unheard:
                act()
        if failure is not None:
            self._nursery_failed(failure, late=from_outside)
        if not from_outside:
            self.explain(self.why() or CALLER)
            self.interrupted = False

    def _nursery_failed(self, error: Exception, *, late: bool) -> None:
        """Attributes an exception that came out of the nursery to a stage.

        That is the stage which had asked for the nursery, or, if none had, the one that left something behind for which
        Trio raised, such as a cancel scope that an async generator holds open. If it is `late`, the caller had
        cancelled the run before, so it is only written down.
        """
        execution, walker = self.execution, self._walker
        record = walker.lender or walker.current or walker.last
        if record is None:
            execution.dies_of(error, None)
            return
        number = execution.shape.index[record.name]
        what = "a task in its nursery raised " if record is walker.lender else ""
        cause = Cause(CauseKind.FAILURE, record.name, what + in_words(error))
        if record is walker.current:
            execution.collector.fail(record, cause, StageOutput.fail(error), trio.current_time())
        else:
            record.error = error  # the stage itself has ended, and stays as it ended
            execution.collector.failures.append(record)
        if late:
            return
        if self.cause is None:
            self.cause = cause
            execution.some_branch_ended = True
        policy = execution.plan.on_failure[number]
        execution.note(record, cause, policy)
        execution.act()

    def close(self) -> None:
        """Settles what is left when everything in it has ended: the stage that was running, and what never started."""
        if self.closed:
            return
        self.closed = True
        if self.undone and self.cause is not None:
            if self.parent is None or self.parent.nursery is None:
                self.execution.trunk_undone = True
            else:
                self.parent._undo(self.plan.index, self.cause, self.parent.nursery)
        walker, plan = self.walker, self.plan
        assert walker is not None
        if walker.at < len(plan.strand) or plan.children or walker.untold:
            self._settle_the_rest(walker)
        if self.interrupted and self.parent is not None:
            self.parent.unexplained += ((self.unknown, self.unexplained),)
        # Nothing below looks up to it any more. Letting go of it here keeps a long run from holding the nurseries and
        # scopes of all the branches that have ended.
        self.nursery = self.walker = None
        self.execution.branches[plan.index] = None

    def _settle_the_rest(self, walker: Walker) -> None:
        execution, strand, record = self.execution, self.strand, walker.current
        slots, now = execution.collector.slots, trio.current_time()
        settled = [*walker.untold]
        if record is not None:
            if not record.state.settled:
                state = StageState.CANCELLED if record.error is None else StageState.FAILED
                cause = self.why()
                if record.started is None:  # it was still waiting for its turn
                    state, cause = StageState.SKIPPED, cause or execution.drained
                elif execution.lost is not None:  # it was to be tried again
                    cause = cause or execution.drained
                execution.collector.settle(record, state, cause or self.blame(), now)
            settled.append(strand[walker.at])
            walker.current = None
            walker.at += 1
        left = [number for number in strand[walker.at :] if slots[number] is None]
        for child in self.plan.children:
            if slots[execution.shape.branches[child].strand[0]] is None:
                left += execution.scheduler.unsettled_in(child)
        if left:
            execution.scheduler.skip(left, self.why() or execution.drained or self.blame())
        for number in settled + left:  # only now, when nothing in here can be started by it any more
            settled_record = slots[number]
            assert settled_record is not None
            execution.scheduler.propagate(number, settled_record.cause)

    @property
    def _walker(self) -> Walker:
        assert self.walker is not None
        return self.walker

    @property
    def has_expired(self) -> bool:
        """Whether its deadline has been reached while there was something in it."""
        nursery = self.nursery
        return self.expires < math.inf and nursery is not None and nursery.cancel_scope.cancel_called

    def _runs(self, stage: StagePart) -> bool:
        """Whether it is this stage that runs here."""
        return self.walker is not None and self.walker.current is stage

    # What the contexts of its stages ask (`StageHost`)

    def started_of(self, stage: StagePart) -> float | None:
        if self.walker is None or self.walker.tries is None or not self._runs(stage):
            return stage.started
        return self.walker.tries.record.details.began

    def deadline_of(self, stage: StagePart) -> float:
        around = self.state.deadline
        if self.execution.has_deadlines:
            around = min(around, *(branch.expires for branch in self.lineage()))
        return min(self._walker.due, around) if self._runs(stage) else around

    def extend_limit(self, stage: StagePart, seconds: float) -> None:
        if not self._runs(stage):
            raise RuntimeError(f"stage {stage.name!r} has ended, so there is no limit to extend")
        if self._walker.too_late:
            raise RuntimeError(f"stage {stage.name!r} has reached its limit, so it is too late to extend it")
        self._walker.extend(seconds)

    def beat(self, stage: StagePart) -> None:
        if self.walker is not None and self.walker.tries is not None and self._runs(stage):
            self.walker.tries.beat()

    def cause_of(self, stage: StagePart) -> Cause | None:  # noqa: ARG002
        return None

    def feedback_of(self, stage: StagePart) -> str | None:
        tries = None if self.walker is None else self.walker.tries
        return tries.feedback if tries is not None and self._runs(stage) else None

    def on_exit(self, stage: StagePart, name: str, callback: Callable[[], object]) -> None:
        if not self._runs(stage):
            raise RuntimeError(f"stage {stage.name!r} has ended, so nothing can be called when it does")
        self._walker.exits += ((name, callback),)

    def cleanup(self, stage: StagePart) -> AbstractContextManager[trio.CancelScope]:
        execution = self.execution
        record = execution.collector.record(execution.shape.index[stage.name])
        return cleanup(record, execution.graph.settings.cleanup_timeout)

    def add_artifact(self, stage: StagePart, artifact: Artifact) -> None:  # noqa: ARG002  # the artifact says it too
        self.state.artifacts.append(artifact)
        if self.execution.scribe is not None:
            self.execution.scribe.added(artifact)

    def transaction(self, stage: StagePart) -> Transaction:
        if not self._runs(stage):
            raise RuntimeError(f"stage {stage.name!r} has ended; its transaction has been written, or given up")
        scribe = self.execution.scribe
        if scribe is None or not scribe.book.store.has_sql:
            raise RuntimeError(
                f"ctx.transaction() of stage {stage.name!r} needs a run with a store that has SQL: "
                f'graph.run(store=...) with open_store("sqlite:PATH")'
            )
        if self._walker.transaction is None:
            from stageflow.context.transaction import Transaction  # noqa: PLC0415  # only where one is asked for

            self._walker.transaction = Transaction(scribe.book.store.query)
        return self._walker.transaction

    async def run_child(self, stage: StagePart, graph: Graph, context: PipelineContext) -> PipelineResults:
        from stageflow.engine.nested import run_child  # noqa: PLC0415  # it builds on this module

        return await run_child(self, stage.name, graph, context)

    async def run_map(self, stage: StagePart, plan: MapPlan, items: object) -> StageOutput:
        """Runs something for each of some items, within the stage."""
        from stageflow.engine.maps import run_map  # noqa: PLC0415

        return await run_map(self, stage.name, plan, items)

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        execution = self.execution
        names: tuple[str, ...] | None = None
        if self.present is not None and stage.name == execution.shape.names[self.strand[0]]:
            names = self.present
        if names is None:
            number = execution.shape.index[stage.name]
            names = tuple(execution.shape.names[other] for other in execution.shape.dependencies[number])
        return Inputs(names, execution.collector, lambda name: missing_input(execution, stage.name, name))

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        if not self._runs(stage) or self.nursery is None:
            raise RuntimeError(f"stage {stage.name!r} has ended; ask for ctx.nursery while it runs")
        self._walker.lender = self._walker.current
        return self.nursery

    def ending(self, stage: StagePart) -> str | None:
        why = self.why()
        if why is not None:
            return why.reason
        try:
            if self._runs(stage) and self._walker.too_late:
                return self._walker.limit_in_words()
            if trio.current_effective_deadline() > -math.inf:
                return None
            expired = next((branch for branch in self.lineage() if branch.has_expired), None)
            return CALLER.reason if expired is None else self.execution.reached(expired)
        except RuntimeError:  # asked from another thread, where Trio has no answer, or too deep for Trio to tell
            return None


async def is_cancelled() -> bool:
    """Whether the next checkpoint will be cancelled."""
    try:
        await checkpoint_if_cancelled()
    except trio.Cancelled:  # noqa: ASYNC103
        return True  # noqa: ASYNC104, ASYNC910  # it comes again
    return False  # noqa: ASYNC910
