"""One run of a graph: what it consists of, and what has ended it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, final

import trio
from trio.lowlevel import Abort, checkpoint_if_cancelled, wait_task_rescheduled

from stageflow.context.ids import new_run_id
from stageflow.context.stage_context import RunState
from stageflow.engine.branch import BranchRun
from stageflow.engine.collector import Collector
from stageflow.engine.results import PipelineResults
from stageflow.engine.scheduler import Scheduler
from stageflow.engine.strand import Walker
from stageflow.errors import DefinitionError, MissingOutputError, UnknownStageError, in_words, ungroup
from stageflow.graph.branches import TRUNK
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord
from stageflow.stages import OnFailure

if TYPE_CHECKING:
    from collections.abc import Callable

    from stageflow.context import PipelineContext
    from stageflow.graph import Graph

__all__ = ["Execution"]


@final
class Execution:
    """The state of one run.

    Attributes:
        collector: What has happened to its stages.
        state: What the contexts of its stages share.
        results: What the run shows of the collector.
        scheduler: Who starts when.
        trunk: The outermost branch.
        branches: The branches that have started and not ended, by number.
        fatal: What a stage raised that nobody may hold back, like `KeyboardInterrupt`.
        ending: Why everything is being cancelled, once it is.
        drained: Why nothing is started any more, once it is not.
        reported: Whether the task of the block around the run has been given the results, or the error.
        verdict: What the run will raise: the first stage whose ending counts, or a cancellation from outside.
        some_branch_ended: Whether any branch was ended on its own.
    """

    __slots__ = (
        "_to_drain",
        "_to_end",
        "branches",
        "collector",
        "drained",
        "ending",
        "fatal",
        "graph",
        "plan",
        "reported",
        "results",
        "scheduler",
        "shape",
        "some_branch_ended",
        "state",
        "trunk",
        "verdict",
    )

    def __init__(self, graph: Graph, context: PipelineContext) -> None:
        self.graph = graph
        self.plan = graph.plan
        self.shape = graph.shape
        now = trio.current_time()
        run_id = context.run_id or new_run_id()
        artifacts = list(context.artifacts)
        self.collector = Collector(graph.shape, run_id, started=now, began_at=datetime.now(UTC), artifacts=artifacts)
        self.state = RunState(
            pipeline=graph.name,
            run_id=run_id,
            origin=context,
            started=now,
            deadline=_deadline_around(),
            artifacts=artifacts,
        )
        self.trunk = BranchRun(self, None, self.shape.branches[TRUNK], 0)
        self.branches: list[BranchRun | None] = [None] * len(self.shape.branches)
        self.branches[TRUNK] = self.trunk
        self.results = PipelineResults(self.collector)
        self.fatal: BaseException | None = None
        self.ending: Cause | None = None
        self.drained: Cause | None = None
        self.reported = False
        self.verdict: StageRecord | Cause | None = None
        self.some_branch_ended = False
        self._to_end: Cause | None = None  # what `ending` will be at the end of this tick
        self._to_drain: Cause | None = None  # what `drained` will be
        self.scheduler = Scheduler(self)

    async def execute(self) -> None:
        """Runs the graph. Afterwards every stage has settled, whatever has happened.

        Raises:
            trio.Cancelled: A scope around the run was cancelled, and nothing had gone wrong before.
            BaseException: A stage raised it, and it is neither that nor an `Exception`.
        """
        try:
            await Walker(self.trunk).run()
        finally:
            self.collector.ended = trio.current_time()
            self.collector.status = self._status()
        if self.fatal is not None:
            raise self.fatal
        if self.collector.status is RunStatus.INTERRUPTED:
            await checkpoint_if_cancelled()

    def _status(self) -> RunStatus:
        if isinstance(self.verdict, StageRecord) and self.verdict.error is not None:
            return RunStatus.FAILED
        if self.verdict is not None:
            return RunStatus.CANCELLED
        if self.ending is not None:  # it dies of what is no `Exception`
            return RunStatus.FAILED
        if self.trunk.interrupted:
            return RunStatus.INTERRUPTED
        complete = len(self.collector.outputs) == len(self.collector.slots) and not self.collector.failures
        return RunStatus.SUCCEEDED if complete else RunStatus.PARTIAL

    def relabel(self, wrong: Cause, cause: Cause) -> None:
        """Corrects the cause of what was cut short, and of what that led to, where a branch could not tell it yet."""
        for record in self.collector.slots:
            if record is not None and record.cause is wrong:
                record.cause = cause

    # Ending

    async def at_end_of_tick(self, action: Callable[[], None]) -> None:
        """Does something after all tasks that are ready now have had their turn, and before any of them has another.

        Trio runs its ready tasks in batches, in random order, and looks at deadlines between two batches. So a task
        that waits under a deadline that has come is woken exactly between them, and what its abort function does
        there comes after everything of this batch and before everything of the next. Shielded, for no time at all.
        """
        acted = False

        def wake(_: object) -> Abort:
            nonlocal acted
            if not acted:
                acted = True
                action()  # must not raise: Trio would break down
            return Abort.SUCCEEDED

        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time()
            await wait_task_rescheduled(wake)

    def note(self, record: StageRecord, cause: Cause, policy: OnFailure) -> None:
        """Notes that the ending of a stage means something for the run. Of several in one tick the first counts."""
        if self.verdict is None and policy is not OnFailure.TOLERATE:
            self.verdict = record
        if policy is OnFailure.FAIL_FAST:
            self._to_end = self._to_end or cause
        elif policy is OnFailure.DRAIN:
            self._to_drain = self._to_drain or cause

    def act(self) -> None:
        """Does to the run what was noted."""
        if self._to_end is not None:
            self.end(self._to_end)
        self.drained = self._to_drain

    def end(self, cause: Cause) -> None:
        """Cancels everything, unless that is happening already."""
        if self.ending is not None:
            return
        self.ending = cause
        if self.trunk.nursery is not None:
            self.trunk.nursery.cancel_scope.cancel(reason=str(cause))

    def cancel(self, reason: str) -> None:
        """Cancels everything, from outside."""
        if self.collector.ended is not None or self.ending is not None:
            return
        cause = Cause(CauseKind.CANCEL, None, reason)
        if self.verdict is None:
            self.verdict = cause
        self.end(cause)

    def cancel_branch(self, stage: str, reason: str) -> None:
        """Cancels the branch of a stage, from outside.

        Raises:
            UnknownStageError: There is no such stage.
        """
        if stage not in self.shape.index:
            raise UnknownStageError(stage, self.shape.names, where="cancel_branch()")
        cause = Cause(CauseKind.CANCEL_BRANCH, None, reason)
        branch = self.shape.branch_of[self.shape.index[stage]]
        run = self.branches[branch]
        if run is None:
            self.scheduler.cut_ahead.setdefault(branch, cause)
        else:
            run.end(cause)

    def dies_of(self, raised: BaseException, record: StageRecord | None) -> None:
        """Notes that a stage raised what must not be caught, like `KeyboardInterrupt`, which ends the run anyway."""
        raised = ungroup(raised)
        if self.fatal is None:
            self.fatal = raised
        if record is not None and record.error is None:
            record.error = raised
        self.end(Cause(CauseKind.FAILURE, None if record is None else record.name, in_words(raised)))

    # Looking around

    def branch_upstream(self, of: str | None, number: int) -> BranchRun:
        """Gives the branch that a stage means by ``cancel_branch(of=...)``.

        Raises:
            UnknownStageError: There is no stage of that name.
            DefinitionError: That stage is not upstream on the same line.
        """
        own = self.branches[self.shape.branch_of[number]]
        assert own is not None
        if of is None:
            return own
        other = self.shape.index.get(of)
        if other is None:
            raise UnknownStageError(
                of, self.shape.names, where=f"cancel_branch(of=...) of stage {self.shape.names[number]!r}"
            )
        for run in own.lineage():
            if other in run.strand and (run is not own or other <= number):
                return run
        raise DefinitionError(
            f"stage {self.shape.names[number]!r} cannot end the branch of {of!r}: that stage is not upstream on its "
            f"line; use Run.cancel_branch() to end another branch"
        )

    def missing_input(self, stage: str, name: str) -> MissingOutputError:
        """Gives the error that says why a stage has no input of a name."""
        number = self.shape.index.get(name)
        if number is not None and number not in self.shape.dependencies[self.shape.index[stage]]:
            reason = f"{stage!r} does not come after it; add it to after= of {stage!r}"
            return MissingOutputError(name, state=self.collector.record(number).state, reason=reason)
        return self.collector.missing(name)


def _deadline_around() -> float:
    try:
        return trio.current_effective_deadline()
    except RecursionError:  # Trio asks one scope after the other, and there may be thousands
        return math.inf
