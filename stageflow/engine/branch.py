"""A branch while it runs: one task, one nursery, a strand of stages, and branches below it.

The task opens the branch's nursery, walks the strand inside it, and stays in the nursery until everything below has
settled: nested branches are tasks in it. The nursery's scope *is* the branch's cancel scope. When the nursery has
closed, `BranchRun._close` settles what is left, so that nothing leaves a branch without an end and a cause.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import trio
from trio.lowlevel import checkpoint_if_cancelled

from stageflow.engine.attempt import as_failure, is_cancellation
from stageflow.engine.strand import Strand
from stageflow.errors import in_words
from stageflow.journal import Cause, CauseKind, StageRecord, StageState
from stageflow.output import StageOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stageflow.context.stage_context import StagePart
    from stageflow.engine.execution import Execution
    from stageflow.graph import Branch

__all__ = ["CALLER", "BranchRun"]

CALLER = Cause(CauseKind.CALLER, None, "a cancel scope around the run was cancelled")


@final
class BranchRun(Strand):
    """One branch of one run.

    Attributes:
        parent: The branch that holds it; `None` for the trunk.
        cause: Why it is being ended on its own, once it is.
        nursery: Its nursery, once its task has begun.
        interrupted: Whether something in it was cut short by a scope around it, as far as its children can tell.
        closed: Whether everything in it has settled.
        successor: The branch with which its task goes on.
        early_children: Branches that were to start in it before it had begun itself: its own strand was skipped.
    """

    __slots__ = (
        "_lender",
        "cause",
        "closed",
        "early_children",
        "interrupted",
        "nursery",
        "parent",
        "successor",
    )

    def __init__(
        self, execution: Execution, parent: BranchRun | None, branch: Branch, at: int, present: tuple[str, ...] | None
    ) -> None:
        super().__init__(execution, branch, at, present)
        self.parent = parent
        self.cause: Cause | None = None
        self.nursery: trio.Nursery | None = None
        self.interrupted = False
        self.closed = False
        self.successor: BranchRun | None = None
        self.early_children: tuple[BranchRun, ...] = ()
        self._lender: StageRecord | None = None  # the stage that asked for the nursery last

    async def execute(self) -> None:  # noqa: ASYNC910  # leaving a nursery is a checkpoint
        """Runs the branch and everything below it. It raises nothing: what has happened is written down."""
        raised: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                if self.cause is not None or self._execution.ending is not None:  # it was ended before it began
                    nursery.cancel_scope.cancel(reason=str(self.why()))
                for child in self.early_children:
                    self._execution.start(child, nursery)
                await self.run_strand()
        except BaseException as error:  # noqa: ASYNC103  # _cut_short sees to it
            raised = error
        try:
            if raised is not None or self.interrupted or self.unheard or self._at < len(self.branch.strand):
                await self._cut_short(raised)
        finally:
            self._close()

    async def _cut_short(self, raised: BaseException | None) -> None:  # noqa: ASYNC910
        """Finds out what ended the branch, if it has not come to its end by itself.

        Neither the caller's cancellation nor a `KeyboardInterrupt` is passed on, so that a thousand branches do not
        hand a thousand of it up through groups; the execution raises it again, once, in the caller's own task. Each
        branch looks whether the cancellation is still there outside of its own nursery, and tells its parent; for a
        stage may have cancelled just that nursery.
        """
        execution = self._execution
        failure = None if raised is None else as_failure(raised)
        if raised is not None and failure is None and not is_cancellation(raised):
            execution.dies_of(raised, self._lender or self._current)
        from_outside = False
        if self.why() is None:
            from_outside = await _is_cancelled()
            was_cut = self.interrupted or self.unheard or self._at < len(self.branch.strand)
            if not from_outside and was_cut and failure is None and execution.drained is None:
                if self._lender is not None:
                    self.cause = Cause(CauseKind.NURSERY, self._lender.name, "its nursery was cancelled")
                    execution.some_branch_ended = True
                elif self._current is not None:
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
        if self.interrupted and not from_outside:
            execution.relabel(CALLER, self.why() or CALLER)
            self.interrupted = False

    def end(self, cause: Cause) -> None:
        """Cancels the branch and everything below it, unless that is happening already."""
        if self.closed or self.why() is not None:
            return
        self.cause = cause
        self._execution.some_branch_ended = True
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel(reason=str(cause))

    def _nursery_failed(self, error: Exception, *, late: bool) -> None:
        """Attributes an exception that came out of the nursery to a stage.

        That is the stage which had asked for the nursery, or, if none had, the one that left something behind for which
        Trio raised, such as a cancel scope that an async generator holds open. If it is `late`, the caller had
        cancelled the run before, so it is only written down.
        """
        execution, record = self._execution, self._lender or self._current or self._last
        if record is None:
            execution.dies_of(error, None)
            return
        number = execution.shape.index[record.name]
        what = "a task in its nursery raised " if record is self._lender else ""
        cause = Cause(CauseKind.FAILURE, record.name, what + in_words(error))
        if record is self._current:
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

    def _close(self) -> None:
        """Settles what is left when the nursery has closed: the stage that was running, and what never started."""
        self.closed = True
        if self._current or self._untold or self._at < len(self.branch.strand) or self.branch.children:
            self._settle_the_rest()
        # Nothing below looks up to it any more. Letting go of it here keeps a long run from holding the nurseries and
        # scopes of all the branches that have ended.
        self.nursery = None
        self._execution.branches[self.branch.index] = None

    def _settle_the_rest(self) -> None:
        execution, strand, record = self._execution, self.branch.strand, self._current
        slots, now = execution.collector.slots, trio.current_time()
        settled = [*self._untold]
        if record is not None:
            if not record.state.settled:
                state = StageState.CANCELLED if record.error is None else StageState.FAILED
                execution.collector.settle(record, state, self.why() or CALLER, now)
            settled.append(strand[self._at])
            self._current = None
            self._at += 1
        left = [number for number in strand[self._at :] if slots[number] is None]
        for child in self.branch.children:
            if slots[execution.shape.branches[child].strand[0]] is None:
                left += execution.unsettled_in(child)
        if left:
            execution.skip(left, self.why() or execution.drained or CALLER)
        for number in settled + left:  # only now, when nothing in here can be started by it any more
            settled_record = slots[number]
            assert settled_record is not None
            execution.propagate(number, settled_record.cause)

    def lineage(self) -> Iterator[BranchRun]:
        """This branch, the one that holds it, and so on, up to the trunk."""
        branch: BranchRun | None = self
        while branch is not None:
            yield branch
            branch = branch.parent

    def why(self) -> Cause | None:
        """Why the branch is being cancelled, as far as that is known: the nearest cause counts."""
        execution = self._execution
        if execution.some_branch_ended:
            for branch in self.lineage():
                if branch.cause is not None:
                    return branch.cause
        return execution.ending

    def leaving(self) -> BranchRun | None:
        """The branch itself, if it ends as soon as its strand does and that is done."""
        if self._at < len(self.branch.strand) or self.branch.children or self._lender is not None:
            return None
        return self

    # What the contexts of its stages ask (`StageHost`), as far as the branch knows it

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        if self._current is not stage or self.nursery is None:
            raise RuntimeError(f"stage {stage.name!r} has ended; ask for ctx.nursery while it runs")
        self._lender = self._current
        return self.nursery

    def ending(self, stage: StagePart) -> str | None:
        why = self.why()
        if why is not None:
            return why.reason
        try:
            if self._current is stage and self._scope.cancel_called:
                return self._time_is_up().reason
            return None if trio.current_effective_deadline() > -math.inf else CALLER.reason
        except RuntimeError:  # asked from another thread, where Trio has no answer, or too deep for Trio to tell
            return None


async def _is_cancelled() -> bool:
    """Whether the next checkpoint will be cancelled."""
    try:
        await checkpoint_if_cancelled()
    except trio.Cancelled:  # noqa: ASYNC103
        return True  # noqa: ASYNC104, ASYNC910  # it comes again
    return False  # noqa: ASYNC910
