"""Who starts when: the joins of one run, decided by counting.

Every stage that settles tells those after it, and each of them knows by two numbers whether its join now lets it start,
or never will. So the cost of a stage is that of its own edges, however large the graph is. (The stage that continues a
strand is not told: the walker of the branch goes on with it.)
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, final

import trio

from stageflow.engine.branch import BranchRun
from stageflow.engine.strand import Walker
from stageflow.graph import Edge
from stageflow.graph.branches import TRUNK
from stageflow.journal import StageState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stageflow.engine.execution import Execution
    from stageflow.graph import Branch
    from stageflow.journal import Cause

__all__ = ["Scheduler"]

_COUNTED, _REQUIRED = Edge.COUNTED, Edge.REQUIRED


@final
class Scheduler:
    """Starts the branches of one run, or skips them.

    Attributes:
        cut_ahead: Branches that were cancelled before they started, and why.
        task_context: The context variables with which every branch starts: those the run was started with, and not
            those of whichever stage happened to be the last it waited for.
    """

    __slots__ = (
        "_branches",
        "_execution",
        "_left",
        "_plan",
        "_shape",
        "_slots",
        "_succeeded",
        "cut_ahead",
        "task_context",
    )

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._plan = execution.plan
        self._shape = execution.shape
        self._branches = execution.branches
        self._slots = execution.collector.slots
        self._left = list(self._plan.waits)  # how many of its dependencies have not settled yet, by stage
        self._succeeded: dict[int, int] = {}  # how many of them have succeeded, where that makes a difference
        self.cut_ahead: dict[int, Cause] = {}
        self.task_context: contextvars.Context = contextvars.copy_context()

    def launch_roots(self) -> None:
        """Starts the stages that come after none, if there are several."""
        for child in self._shape.branches[TRUNK].children:
            head = self._shape.branches[child].strand[0]
            if not self._plan.waits[head]:
                for number, cause in self._decide(child, None, None):
                    self.propagate(number, cause)

    def restore(self, cut: Mapping[int, Cause]) -> None:
        """Goes on from where an earlier process was: some stages have settled, and some branches were ended.

        Branches in which something is left to do are started with the branch that holds them, and their walkers pass
        what has settled. What has settled is told to those after it, as if it had happened now.
        """
        self.cut_ahead.update(cut)
        shape, slots = self._shape, self._slots
        settled = [number for number, record in enumerate(slots) if record is not None]
        unfinished = [False] * len(shape.branches)
        for branch in reversed(shape.branches):  # children before their parents
            unfinished[branch.index] = any(slots[number] is None for number in branch.strand) or any(
                unfinished[child] for child in branch.children
            )
        skipped: list[tuple[int, Cause | None]] = []
        for branch in shape.branches[1:]:
            begun = slots[branch.strand[0]] is not None and unfinished[branch.index]
            if begun and branch.index in cut:
                skipped += self.skip(self.unsettled_in(branch.index), cut[branch.index])
            elif begun and self._branches[branch.parent or TRUNK] is not None:
                self._launch(branch.index, branch, 0, None)
        for number in settled:
            record = slots[number]
            assert record is not None
            if self._plan.followers[number]:
                self.propagate(number, None if record.state is StageState.SUCCEEDED else record.cause)
        for number, cause in skipped:
            self.propagate(number, cause)

    def propagate(self, number: int, cause: Cause | None, leaving: BranchRun | None = None) -> None:
        """Tells the stages after one that it has settled: well, or for the given cause not.

        Args:
            number: The stage that has settled.
            cause: Why it gave no output, if it gave none.
            leaving: The branch it is in, if that is about to end with it: its task can go on with another branch.
        """
        left_of, followers = self._left, self._plan.followers
        news: list[tuple[int, Cause | None]] = [(number, cause)]
        for settled, why in news:  # grows by what is kept from starting
            for follower, branch, edge in followers[settled]:
                left_of[follower] = left = left_of[follower] - 1
                if edge is _COUNTED:
                    news += self._count(follower, branch, left, why, leaving)
                elif why is not None and edge is _REQUIRED:
                    news += self._decide(branch, why, leaving)
                elif not left:
                    news += self._decide(branch, None, leaving)

    def retract(self, number: int) -> None:
        """Takes back that a stage has succeeded, for it is tried again; those after it must not have started."""
        for follower, _, edge in self._plan.followers[number]:
            self._left[follower] += 1
            if edge is _COUNTED:
                self._succeeded[follower] -= 1

    def _count(
        self, follower: int, branch: int, left: int, why: Cause | None, leaving: BranchRun | None
    ) -> Sequence[tuple[int, Cause | None]]:
        """Decides a join that waits for a number of successes, if that is possible by now."""
        succeeded = self._succeeded.get(follower, 0) + (why is None)
        self._succeeded[follower] = succeeded
        if left and not self._plan.early[follower]:
            return ()
        missing = self._plan.needs[follower] - succeeded
        if missing <= 0:
            return self._decide(branch, None, leaving)
        return self._decide(branch, why, leaving) if missing > left else ()

    def _decide(
        self, branch: int, absent: Cause | None, leaving: BranchRun | None
    ) -> Sequence[tuple[int, Cause | None]]:
        """Starts a branch, or skips what cannot do without the output that is `absent`; gives what was skipped."""
        plan = self._shape.branches[branch]
        if self._branches[branch] is not None or self._slots[plan.strand[0]] is not None:
            return ()  # that was decided before
        if branch in self.cut_ahead:
            return self.skip(self.unsettled_in(branch), self.cut_ahead[branch])
        execution = self._execution
        if execution.ending is not None or execution.drained is not None:
            return ()  # whoever closes around it will settle it
        if absent is None:
            self._launch(branch, plan, 0, leaving)
            return ()
        strand = plan.strand
        if not self._plan.revives[branch]:
            return self.skip(strand, absent)
        # Something in it can do without the output of its first stage. If that is not on the strand, but below, the
        # branch is started nevertheless, for its nursery.
        at = next((at for at, number in enumerate(strand) if self._plan.starts_bare[number]), len(strand))
        self._launch(branch, plan, at, leaving)
        return self.skip(strand[:at], absent)

    def _launch(self, branch: int, plan: Branch, at: int, leaving: BranchRun | None) -> None:
        parent = self._branches[plan.parent or TRUNK]
        assert parent is not None
        self._branches[branch] = run = BranchRun(self._execution, parent, plan, at)
        if plan.joins and at == 0 and self._plan.early[plan.strand[0]]:
            names = (self._shape.names[other] for other in self._shape.dependencies[plan.strand[0]])
            run.present = tuple(name for name in names if name in self._execution.collector.succeeded)
        nursery = parent.nursery
        if nursery is None:
            parent.early_children += (run,)
        elif leaving is not None and leaving.parent is parent and leaving.successor is None:
            leaving.successor = run
        else:
            self.start(run, nursery)

    def start(self, run: BranchRun, nursery: trio.Nursery) -> None:
        """Starts the task of a branch in its parent's nursery."""
        start_soon: Any = nursery.start_soon  # mypy cannot see its signature through Context.run
        self.task_context.run(start_soon, Walker(run).run, name=run.name)

    def skip(self, numbers: Sequence[int], cause: Cause) -> list[tuple[int, Cause | None]]:
        """Skips stages, and gives what is to be told to those after them."""
        collector, now = self._execution.collector, trio.current_time()
        scribe = self._execution.scribe
        for number in numbers:
            record = collector.skip(number, cause, now)
            if scribe is not None:
                scribe.note(record)
        return [(number, cause) for number in numbers]

    def unsettled_in(self, branch: int) -> list[int]:
        """The stages of a branch that never started, and of all below it."""
        found: list[int] = []
        todo = [branch]
        for index in todo:  # grows on the way
            found += [number for number in self._shape.branches[index].strand if self._slots[number] is None]
            todo += self._shape.branches[index].children
        return found
