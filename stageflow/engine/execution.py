"""One run of a graph: what it consists of, and what has ended it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, final

import attrs
import trio
from trio.lowlevel import Abort, checkpoint_if_cancelled, wait_task_rescheduled

from stageflow.context.ids import new_run_id
from stageflow.context.state import RunState
from stageflow.engine.branch import BranchRun, is_cancelled
from stageflow.engine.collector import Collector
from stageflow.engine.paths import item_of
from stageflow.engine.results import PipelineResults
from stageflow.engine.scheduler import Scheduler
from stageflow.engine.strand import Walker
from stageflow.errors import CheckpointError, DefinitionError, LeaseLostError, UnknownStageError, in_words, ungroup
from stageflow.graph import armed, limit_on
from stageflow.graph.branches import TRUNK
from stageflow.journal import Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.stages import DEFAULT, Limit, OnFailure
from stageflow.stages.policy import check_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stageflow.context import PipelineContext
    from stageflow.engine.maps import MapRun
    from stageflow.engine.nested import Around
    from stageflow.graph import Graph, Plan, Shape, Special
    from stageflow.journal.history import StageHistory
    from stageflow.journal.scribe import Scribe
    from stageflow.journal.undo import UndoRecord

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
        timeouts: The limits on the attempts of the stages, in seconds.
        armed: Those of them that the walkers see to.
        limits: Of what the stages take tokens, by name.
        turns: What each stage takes a token of, if the run bounds how many may run.
        has_deadlines: Whether the run, or any branch, has a deadline.
        waiting: The scopes of stages that wait for their turn and have not been entered yet.
        maps: The maps that are running, by their stages.
        items_cut: Items of maps that were cancelled from outside, and why.
        children: By stage, its last attempt with runs within it, and how many these are.
        loans: What stages lend to the runs within them instead of the limits of which they hold a token, by stage.
        in_part: The maps that succeeded although something within them did not.
        scribe: Who writes what happens, if the run is recorded.
        specials: What is special about how a stage is run; `None` for most.
        prior: What earlier processes have left of a stage that is to be tried again, by its number.
        lost: Why the run could not be recorded any more.
        title: What it is called as an item of a map; `None` for what is none.
        undoable: What stages have run within themselves that may have to be undone, with titles.
        undos: What has become of the undoing of stages.
        spared: Whether it is not undone although it was cancelled, for it is just a branch of the run around it.
        going_back: Whether the run is undone, so that it is never gone on with.
        trunk_undone: Whether what the trunk has done is to be undone, since that was ended with ``compensate=True``.
    """

    __slots__ = (
        "_fresh",
        "_noted",
        "_to_drain",
        "_to_end",
        "armed",
        "branches",
        "children",
        "collector",
        "drained",
        "ending",
        "fatal",
        "going_back",
        "graph",
        "has_deadlines",
        "in_part",
        "items_cut",
        "limits",
        "loans",
        "lost",
        "maps",
        "plan",
        "prior",
        "reported",
        "results",
        "scheduler",
        "scribe",
        "shape",
        "some_branch_ended",
        "spared",
        "specials",
        "state",
        "timeouts",
        "title",
        "trunk",
        "trunk_undone",
        "turns",
        "undoable",
        "undos",
        "verdict",
        "waiting",
    )

    def __init__(
        self,
        graph: Graph,
        context: PipelineContext,
        around: Around | None = None,
        scribe: Scribe | None = None,
    ) -> None:
        if graph.admits is not None:
            context = attrs.evolve(context, data=graph.admits(context.data))
        self.graph: Graph = graph
        self.plan: Plan = graph.plan
        self.shape: Shape = graph.shape
        settings = graph.settings
        now = trio.current_time()
        run_id = context.run_id or new_run_id()
        artifacts = list(context.artifacts)
        self.collector: Collector = Collector(
            graph.shape,
            run_id,
            tenant=context.tenant,
            started=now,
            began_at=time.time(),
            artifacts=artifacts,
        )
        self.state: RunState = RunState(
            pipeline=graph.name,
            run_id=run_id,
            origin=context,
            started=now,
            deadline=_deadline_around(),
            artifacts=artifacts,
        )
        self.timeouts: Sequence[float] = self.plan.timeouts
        self.armed: Sequence[float] = self.plan.armed
        if context.timeouts:
            self.timeouts = self._overridden(context.timeouts)
            self.armed = armed(self.plan.specials, self.timeouts)
        self.limits: dict[str, Limit] = {
            name: limit if isinstance(limit, Limit) else Limit(limit) for name, limit in settings.limits.items()
        }
        self.turns: Limit | None = None if settings.max_running is None else Limit(settings.max_running)
        self.has_deadlines: bool = bool(self.plan.deadlines) or settings.deadline is not None
        self.maps: dict[str, MapRun] = {}
        self.items_cut: dict[tuple[str, int], str] = {}
        self.children: dict[str, tuple[int, int]] = {}
        self.loans: dict[str, dict[Limit, Limit]] = {}
        self.in_part: set[str] = set()
        self.trunk: BranchRun = BranchRun(self, None, self.shape.branches[TRUNK], 0)
        if around is not None:
            self.state.depth, self.state.parent, self.state.lent = around.depth, around.run_id, around.lent
            self.state.key = around.key
            self.limits |= around.limits
            self.trunk.name = around.branch or self.trunk.name
        self.branches: list[BranchRun | None] = [None] * len(self.shape.branches)
        self.branches[TRUNK] = self.trunk
        self.results: PipelineResults = PipelineResults(self.collector)
        self.fatal: BaseException | None = None
        self.ending: Cause | None = None
        self.drained: Cause | None = None
        self.reported: bool = False
        self.verdict: StageRecord | Cause | None = None
        self.some_branch_ended: bool = False
        self._to_end: Cause | None = None  # what `ending` will be at the end of this tick
        self._to_drain: Cause | None = None  # what `drained` will be
        self._noted: int | None = None  # the first stage in this tick whose ending does something to the run
        self._fresh: bool = False  # whether the verdict is of this tick
        self.waiting: set[trio.CancelScope] = set()
        self.scheduler: Scheduler = Scheduler(self)
        self.scribe: Scribe | None = scribe
        self.specials: Sequence[Special | None] = self.plan.specials
        self.prior: dict[int, StageHistory] = {}
        self.lost: CheckpointError | None = None
        self.title: str | None = None if around is None else around.branch
        self.undoable: dict[str, list[tuple[str, Execution]]] = {}
        self.undos: dict[str, UndoRecord] = {}
        self.spared: bool = False
        self.going_back: bool = False
        self.trunk_undone: bool = False
        if scribe is not None:
            from stageflow.engine.recorded import record  # noqa: PLC0415  # only where there is a store

            record(self, scribe)

    def _overridden(self, timeouts: Mapping[str, float | None]) -> list[float]:
        """Gives the limits on attempts, where a run has some of its own.

        Raises:
            UnknownStageError: There is no stage of a name.
            DefinitionError: A limit is no number or negative, or on a thread that cannot be stopped.
        """
        found = list(self.plan.timeouts)
        for name, given in timeouts.items():
            if name not in self.shape.index:
                raise UnknownStageError(name, self.shape.names, where="PipelineContext(timeouts=...)")
            limit = check_timeout(given, f"PipelineContext(timeouts=...) for {name!r}")
            if limit is not None and not self.graph.stages[name].stoppable:
                raise DefinitionError(
                    f"PipelineContext(timeouts=...) sets a limit on {self.graph.stages[name].where}, which runs in a "
                    f"thread that nothing can stop; declare it with abandon_on_cancel=True or processes=True"
                )
            found[self.shape.index[name]], _ = limit_on(self.graph.stages[name], self.graph.settings, limit)
        return found

    def source_of(self, stage: str) -> str:
        """Says what has set the limit on the attempts of a stage."""
        given = self.state.origin.timeouts.get(stage, DEFAULT)
        return limit_on(self.graph.stages[stage], self.graph.settings, given)[1]

    async def execute(self) -> None:  # noqa: ASYNC910  # mostly there is nothing to undo
        """Runs the graph. Afterwards every stage has settled, whatever has happened.

        Raises:
            trio.Cancelled: A scope around the run was cancelled, and nothing had gone wrong before.
            BaseException: A stage raised it, and it is neither that nor an `Exception`.
        """
        try:
            if not self.going_back:
                await Walker(self.trunk).run()
            if isinstance(self.verdict, Cause) and self.verdict.kind is CauseKind.CANCEL and await is_cancelled():
                self.verdict, self.ending, self.trunk.interrupted = None, None, True  # and that is what the caller sees
            resumed = self.scribe is not None and self.scribe.history is not None
            if self.plan.compensates or self.undoable or resumed:
                await self._compensate()
        finally:
            self.collector.ended = trio.current_time()
            self.collector.status = self.status_so_far
            if self.scribe is not None:
                from stageflow.engine.recorded import close  # noqa: PLC0415

                await close(self, self.scribe)  # noqa: ASYNC102, ASYNC120  # shielded, while the store has patience
            # They refer to the run, which whoever holds the results may hold; without them nothing is left for the
            # garbage collector to find.
            del self.trunk, self.scheduler
        if self.fatal is not None:
            raise self.fatal
        if self.collector.status is RunStatus.INTERRUPTED:
            await checkpoint_if_cancelled()

    async def _compensate(self) -> None:
        """Undoes what was done, if the run has come to that.

        Raises:
            trio.Cancelled: The caller has cancelled that. Then the run is interrupted, whatever it was before.
        """
        from stageflow.engine.saga import compensate  # noqa: PLC0415  # few runs come to that

        try:
            await compensate(self, self.status_so_far)
        except trio.Cancelled:
            self.verdict, self.ending, self.trunk.interrupted = None, None, True
            raise

    @property
    def status_so_far(self) -> RunStatus:
        """What the run has come to, when all stages have settled."""
        if self.lost is not None and not self.trunk.interrupted:
            return RunStatus.FAILED
        if isinstance(self.verdict, StageRecord) and self.verdict.error is not None:
            return RunStatus.FAILED
        if self.verdict is not None:
            reached = isinstance(self.verdict, Cause) and self.verdict.kind is CauseKind.DEADLINE
            return RunStatus.FAILED if reached else RunStatus.CANCELLED
        if self.ending is not None:  # it dies of what is no `Exception`
            return RunStatus.FAILED
        if self.trunk.interrupted:
            return RunStatus.INTERRUPTED
        complete = len(self.collector.succeeded) == len(self.collector.slots) and not self.collector.failures
        return RunStatus.SUCCEEDED if complete and not self.in_part else RunStatus.PARTIAL

    @property
    def cause(self) -> Cause | None:
        """Why the run will raise, if it will."""
        return self.verdict.cause if isinstance(self.verdict, StageRecord) else self.verdict

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
        """Notes that the ending of a stage means something for the run.

        The first counts; of several in one tick, in which nobody was first but by chance, that of the first stage.
        """
        if policy is OnFailure.TOLERATE:
            return
        number = self.shape.index[record.name]
        before = self._noted is not None and number < self._noted  # another one of this tick
        if self.verdict is None or (before and self._fresh and policy is not OnFailure.ISOLATE):
            if isinstance(self.verdict, StageRecord):
                self.collector.exchange(self.verdict, record)
            self.verdict = record
            self._fresh = policy is not OnFailure.ISOLATE
        if policy is OnFailure.ISOLATE:
            return
        if policy is OnFailure.FAIL_FAST and (self._to_end is None or before):
            self._to_end = cause
        elif policy is OnFailure.DRAIN and (self._to_drain is None or before):
            self._to_drain = cause
        if self._noted is None or before:
            self._noted = number

    def act(self) -> None:
        """Does to the run what was noted."""
        self._noted, self._fresh = None, False
        if self._to_end is not None:
            self.end(self._to_end)
        self.drained = self._to_drain
        if self.drained is not None:
            for waiting in tuple(self.waiting):  # for their turn: they will have none
                waiting.cancel(reason=str(self.drained))

    def end(self, cause: Cause) -> None:
        """Cancels everything, unless that is happening already."""
        if self.ending is not None:
            return
        self.ending = cause
        if self.trunk.nursery is not None:
            self.trunk.nursery.cancel_scope.cancel(reason=str(cause))

    def lose(self, error: CheckpointError) -> None:
        """Starts nothing any more, since what happens cannot be recorded; if the run is another's, ends it at once."""
        if self.lost is not None or self.collector.ended is not None:
            return
        self.lost = error
        cause = Cause(CauseKind.CHECKPOINT, None, in_words(error))
        if isinstance(error, LeaseLostError):
            self.end(cause)
        elif self._to_drain is None:
            self._to_drain = cause
            self.act()

    def cancel(self, reason: str, *, undo: bool = True) -> None:
        """Cancels everything, from outside; it is undone, unless it is said that it is not."""
        if self.collector.ended is not None or self.ending is not None or self.trunk.closed:
            return
        self.spared = not undo
        cause = Cause(CauseKind.CANCEL, None, reason)
        if self.verdict is None:
            self.verdict = cause
        self.end(cause)

    def cancel_branch(self, stage: str, reason: str, *, compensate: bool = False) -> None:
        """Cancels the branch of a stage, from outside, and has it undone.

        Raises:
            UnknownStageError: There is no such stage.
        """
        if stage not in self.shape.index:
            item = item_of(self, stage)
            if item is None:
                raise UnknownStageError(stage, self.shape.names, where="cancel_branch()")
            if item[0] in self.maps:
                self.maps[item[0]].cancel(item[1], reason, undo=compensate)
            else:
                self.items_cut.setdefault(item, reason)
            if self.scribe is not None:
                self.scribe.branch_ended(stage, Cause(CauseKind.CANCEL_BRANCH, None, reason))
            return
        if self.collector.ended is not None:
            return
        cause = Cause(CauseKind.CANCEL_BRANCH, None, reason)
        branch = self.shape.branch_of[self.shape.index[stage]]
        run = self.branches[branch]
        if run is None:
            self.scheduler.cut_ahead.setdefault(branch, cause)
            if self.scribe is not None:
                self.scribe.branch_ended(self.shape.branch_names[branch], cause)
        else:
            run.end(cause, undo=compensate)

    def dies_of(self, raised: BaseException, record: StageRecord | None) -> None:
        """Notes that a stage raised what must not be caught, like `KeyboardInterrupt`, which ends the run anyway."""
        raised = ungroup(raised)
        if self.fatal is None:
            self.fatal = raised
        if record is not None and record.error is None:
            record.error = raised
        self.end(Cause(CauseKind.FAILURE, None if record is None else record.name, in_words(raised)))

    # Deadlines

    def deadline_of(self, branch: BranchRun) -> float:
        """When the deadline of a branch that begins now will be reached, on Trio's clock."""
        expires = trio.current_time() + self.plan.deadlines.get(branch.plan.index, math.inf)
        limit = self.graph.settings.deadline
        return expires if limit is None or branch is not self.trunk else min(expires, self.state.started + limit)

    def _is_of_the_run(self, branch: BranchRun) -> bool:
        """Whether the deadline of a branch is that of the run."""
        limit = self.graph.settings.deadline
        return limit is not None and branch is self.trunk and branch.expires == self.state.started + limit

    def reached(self, branch: BranchRun) -> str:
        """Says of a branch that it has reached its deadline."""
        if self._is_of_the_run(branch):
            return f"the run reached its deadline of {self.graph.settings.deadline:g} s"
        return f"the branch reached its deadline of {self.plan.deadlines[branch.plan.index]:g} s"

    def reach_deadline(self, branch: BranchRun) -> None:
        """Notes that a branch was ended by its deadline. If that was the run's, the run raises."""
        walker = branch.walker
        if len(self.collector.succeeded) == len(self.collector.slots) and (walker is None or walker.lender is None):
            return  # there was nothing left to be cut short
        reason = self.reached(branch)
        if not self._is_of_the_run(branch):
            branch.cause = Cause(CauseKind.DEADLINE, None, reason)
            self.some_branch_ended = True
            return
        cut = [record.name for record in self.collector.slots if record and record.attempts and _is_cut(record)]
        names = ", ".join(map(repr, cut[:5])) + (f" and {len(cut) - 5} more" if len(cut) > 5 else "")
        what = f" while {names} {'was' if len(cut) == 1 else 'were'} running" if cut else ""
        self.ending = Cause(CauseKind.DEADLINE, None, reason + what)
        self.verdict = self.verdict or self.ending


def _is_cut(record: StageRecord) -> bool:
    """Whether a stage was cut short, by what is not known yet."""
    unknown = record.cause is not None and record.cause.kind is CauseKind.CALLER
    return unknown or record.state is StageState.RUNNING


def _deadline_around() -> float:
    try:
        return trio.current_effective_deadline()
    except RecursionError:  # Trio asks one scope after the other, and there may be thousands
        return math.inf
