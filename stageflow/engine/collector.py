"""The collector: where everything that happens to the stages of a run is written, the moment it happens.

It is made before the first nursery of a run is opened and outlives the last. Nothing in it awaits, so a stage's end
is in it before anybody else can run, and no nursery's way of ending can take it away again. Nothing else carries
values from one stage to the next or to the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, cast, final

import attrs

from stageflow.errors import MissingOutputError
from stageflow.frozen import FrozenDict
from stageflow.journal import Cause, RunStatus, StageRecord, StageState
from stageflow.output import StageOutput

if TYPE_CHECKING:
    from stageflow.graph import Shape
    from stageflow.journal.undo import CompensationRecord
    from stageflow.output import Artifact

__all__ = ["Collector", "Inputs", "Records"]

_SUCCEEDED, _RUNNING = StageState.SUCCEEDED, StageState.RUNNING


_STANDS = {
    StageState.PENDING: "the stage has not started",
    StageState.RUNNING: "the stage is still running",
    StageState.SUCCEEDED: "the stage succeeded too late for that",
    StageState.FAILED: "the stage failed",
    StageState.CANCELLED: "the stage was cancelled",
    StageState.SKIPPED: "the stage was skipped",
}


@final
class Collector:
    """Outputs and records of one run, in the numbering of its graph.

    Attributes:
        shape: Names and branches of the graph.
        run_id: The run's id.
        tenant: On whose behalf it goes.
        began_at: When the run began, by the wall clock, in seconds since the epoch.
        started: When it began, on Trio's clock.
        ended: When it ended, on Trio's clock.
        status: How far it is.
        artifacts: Every artifact so far.
        succeeded: The record of every stage that succeeded, by name, in the order of that.
        slots: The record of every stage that has one yet.
        failures: The records of the stages that failed, in the order in which they did.
        compensation: What was undone, if anything was to be.
    """

    __slots__ = (
        "_handed_out",
        "_places",
        "artifacts",
        "began_at",
        "compensation",
        "ended",
        "failures",
        "run_id",
        "shape",
        "slots",
        "started",
        "status",
        "succeeded",
        "tenant",
    )

    def __init__(
        self,
        shape: Shape,
        run_id: str,
        *,
        tenant: str | None,
        started: float,
        began_at: float,
        artifacts: list[Artifact],
    ) -> None:
        self.tenant: str | None = tenant
        self.shape: Shape = shape
        self.run_id: str = run_id
        self.began_at: float = began_at
        self.started: float = started
        self.ended: float | None = None
        self.status: RunStatus = RunStatus.RUNNING
        self.artifacts: list[Artifact] = artifacts
        self.succeeded: dict[str, StageRecord] = {}
        self.slots: list[StageRecord | None] = [None] * len(shape.names)
        self.failures: list[StageRecord] = []
        self.compensation: CompensationRecord | None = None
        self._places = itertools.count()
        self._handed_out: dict[int, StageRecord] = {}  # records of stages to which nothing has happened yet

    def begin(self, number: int, branch: str, now: float) -> StageRecord:
        """Writes that a stage has started."""
        record = self._handed_out.pop(number, None) if self._handed_out else None
        if record is None:
            record = StageRecord(self.shape.names[number], branch, _RUNNING, 1, now)
        else:
            record.state, record.attempts = _RUNNING, record.attempts + 1
            if record.started is None:  # otherwise an earlier process had begun with it
                record.started = now
        self.slots[number] = record
        return record

    def succeed(self, record: StageRecord, output: StageOutput, now: float) -> None:
        """Writes that a stage has succeeded."""
        record.output = output
        record.state = _SUCCEEDED
        record.ended = now
        record.place = next(self._places)
        self.succeeded[record.name] = record

    def settle(self, record: StageRecord, state: StageState, cause: Cause, now: float) -> None:
        """Writes that a stage has ended otherwise."""
        record.state = state
        record.cause = cause
        record.ended = now
        record.place = next(self._places)

    def fail(self, record: StageRecord, cause: Cause, output: StageOutput, now: float) -> None:
        """Writes that a stage has failed, in the words of a `StageOutput.fail`."""
        record.error = output.error
        record.recoverable = output.recoverable
        if output.data:
            record.partial = FrozenDict({**record.partial, **output.data})
        self.failures.append(record)
        self.settle(record, StageState.FAILED, cause, now)

    def exchange(self, first: StageRecord, then: StageRecord) -> None:
        """Lets two stages that failed in one tick have failed in the other order: what is raised comes first."""
        if first.state is then.state is StageState.FAILED:
            first.place, then.place = then.place, first.place
            one, other = (next(n for n, kept in enumerate(self.failures) if kept is it) for it in (first, then))
            self.failures[one], self.failures[other] = then, first

    def reopen(self, number: int, reason: str | None, now: float) -> StageRecord:
        """Writes that a stage which had succeeded is tried again; what it had given is kept as an attempt."""
        record = self.slots[number]
        assert record is not None
        last = attrs.evolve(record.tries[-1], reason=reason or "a stage before it was sent back")
        record.more.earlier = (*record.details.earlier, last)
        self.succeeded.pop(record.name, None)
        settled = [other for other in self.slots if other is not None and other.place is not None]
        for other in settled:  # those that settled after it move up
            assert other.place is not None
            assert record.place is not None
            other.place -= other.place > record.place
        self._places = itertools.count(len(settled) - 1)
        record.state, record.output, record.cause = _RUNNING, None, None
        record.error = record.ended = record.place = None
        record.details.began = now
        record.attempts += 1
        return record

    def adopt(self, number: int, record: StageRecord) -> None:
        """Takes over a stage from an earlier process: one that has settled, or one that is to be tried again."""
        if not record.state.settled:
            self._handed_out[number] = record
            return
        self.slots[number] = record
        record.place = next(self._places)
        if record.state is _SUCCEEDED:
            self.succeeded[record.name] = record
        if record.state is StageState.FAILED:
            self.failures.append(record)

    def skip(self, number: int, cause: Cause, now: float) -> StageRecord:
        """Writes that a stage will not start."""
        self.slots[number] = record = self.record(number)
        del self._handed_out[number]
        self.settle(record, StageState.SKIPPED, cause, now)
        return record

    def record(self, number: int) -> StageRecord:
        """Gives the record of a stage, which is PENDING if nothing has happened to it yet."""
        record = self.slots[number] or self._handed_out.get(number)
        if record is None:
            record = StageRecord(self.shape.names[number], self.shape.branch_names[self.shape.branch_of[number]])
            self._handed_out[number] = record
        return record

    def item(self, name: str) -> StageRecord | None:
        """Gives the record of an item of a map; `None` if there is no such item, or it has not ended."""
        stage, _, place = name.removesuffix("]").rpartition("[")
        number = self.shape.index.get(stage)
        if number is None or not name.endswith("]") or not place.isdecimal():
            return None
        record = self.record(number)
        kept = record.details.items.get(int(place))
        # A map that did not end well has in its partial output what its items gave.
        outputs = record.partial.get("outputs") if record.output is None else record.output.data
        if kept is None and isinstance(outputs, list):
            given = cast("list[object]", outputs)[int(place) : int(place) + 1]
            if given and given[0] is not None:
                kept = StageRecord(name, name, _SUCCEEDED, 1, output=StageOutput.ok(given[0]))
        return kept

    def output(self, name: str) -> StageOutput:
        """Gives the output of a stage.

        Raises:
            KeyError: It has not succeeded, or there is no such stage.
        """
        output = self.succeeded[name].output
        assert output is not None
        return output

    def missing(self, name: str) -> MissingOutputError:
        """Gives the error that says why there is no output under a name."""
        number = self.shape.index.get(name)
        if number is None:
            reason = "no stage of this run has that name"
            return MissingOutputError(name, state=None, reason=reason, known=self.shape.names)
        record = self.record(number)
        reason = _STANDS[record.state]
        if record.cause is not None:
            reason += f" ({record.cause})"
        return MissingOutputError(name, state=record.state, reason=reason)


@final
class Records(Mapping[str, StageRecord]):
    """The record of every stage, by name, in topological order; live while the run goes.

    The record of an item of a map, ``records["name[3]"]``, is not counted among them. Of one that succeeded there is
    just its output to tell.
    """

    __slots__ = ("_collector",)

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def __getitem__(self, name: str) -> StageRecord:
        number = self._collector.shape.index.get(name)
        if number is not None:
            return self._collector.record(number)
        item = self._collector.item(name)
        if item is None:
            raise self._collector.missing(name)
        return item

    def __iter__(self) -> Iterator[str]:
        return iter(self._collector.shape.names)

    def __len__(self) -> int:
        return len(self._collector.shape.names)

    def __repr__(self) -> str:
        return f"<records of {len(self)} stages>"


@final
class Inputs(Mapping[str, "StageOutput"]):
    """The outputs a stage may see, as a view of what was collected."""

    __slots__ = ("_collector", "_missing", "_names")

    def __init__(
        self,
        names: Collection[str],
        collector: Collector,
        missing: Callable[[str], MissingOutputError],
    ) -> None:
        self._names = dict.fromkeys(names)
        self._collector = collector
        self._missing = missing

    def __getitem__(self, name: str) -> StageOutput:
        if name in self:
            return self._collector.output(name)
        raise self._missing(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names and name in self._collector.succeeded

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self._collector.succeeded)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<inputs {', '.join(map(repr, self))}>"
