"""The record of a stage, and the words for how stages and runs end. Collector, journal and trace are readings of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from stageflow.frozen import FrozenDict
from stageflow.output import StageOutput, StageStatus

__all__ = ["Attempt", "Cause", "CauseKind", "Details", "RunStatus", "StageRecord", "StageState"]


@final
class StageState(enum.Enum):
    """How far a stage is. Every stage ends in exactly one of the last four."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def settled(self) -> bool:
        """Whether it has ended."""
        return self is not StageState.PENDING and self is not StageState.RUNNING


@final
class RunStatus(enum.Enum):
    """How far a run is, or how it ended."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    """Every stage succeeded."""
    PARTIAL = "partial"
    """It returned, and some stages were skipped, cancelled with their branch, or failed and were tolerated."""
    FAILED = "failed"
    """It raised `StageExecutionError`, or what no run may hold back, like `KeyboardInterrupt`."""
    CANCELLED = "cancelled"
    """It raised `UnifiedPipelineCancelled`."""
    INTERRUPTED = "interrupted"
    """A cancel scope around it was cancelled, and `trio.Cancelled` went through."""

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own, and was not just cut off."""
        return self is not RunStatus.RUNNING and self is not RunStatus.INTERRUPTED


@final
class CauseKind(enum.Enum):
    """What brought about the end of a stage that did not succeed."""

    FAILURE = "failure"
    """A stage raised, or returned `StageOutput.fail`."""
    TIMEOUT = "timeout"
    """A stage ran longer than its limit."""
    HEARTBEAT = "heartbeat"
    """A stage gave no sign of life for too long."""
    DEADLINE = "deadline"
    """The deadline of the run, or of a branch, was reached."""
    CONTRACT = "contract"
    """A stage returned what a stage may not return."""
    SKIP = "skip"
    """A stage returned `StageOutput.skip`."""
    CONDITION = "condition"
    """The ``when=`` of a stage said no."""
    CANCEL = "cancel"
    """A stage returned `StageOutput.cancel`, or `Run.cancel` was called."""
    CANCEL_BRANCH = "cancel_branch"
    """A stage returned `StageOutput.cancel_branch`, or `Run.cancel_branch` was called."""
    CALLER = "caller"
    """A cancel scope around the run was cancelled."""
    NURSERY = "nursery"
    """A branch's nursery, which a stage had asked for, was cancelled, or a task in it failed."""
    CHECKPOINT = "checkpoint"
    """What had happened could not be written to the store, or the run belongs to another process by now."""


@final
@attrs.frozen
class Cause:
    """Why a stage ended as it did.

    Attributes:
        kind: What sort of thing happened.
        stage: The stage to which it happened; `None` if it came from outside.
        reason: What happened, in words.
    """

    kind: CauseKind
    stage: str | None
    reason: str

    def __str__(self) -> str:
        by = "" if self.stage is None else f" of {self.stage!r}"
        return f"{self.kind.value}{by}: {self.reason}"


_NOTHING: FrozenDict[str, Any] = FrozenDict()


@final
@attrs.frozen(kw_only=True)
class Attempt:
    """One try of a stage.

    Attributes:
        number: Which one, from 1.
        started: When it started, on Trio's clock.
        ended: When it ended.
        reason: Why it was not the last, in words; `None` for one that was.
        error: What it raised, if it failed.
        output: What it returned, if it succeeded; a guard may have found that wanting.
    """

    number: int
    started: float
    ended: float | None
    reason: str | None = None
    error: BaseException | None = None
    output: StageOutput | None = None


@final
@attrs.define
class Details:
    """What only few stages have, kept apart from their records.

    Attributes:
        earlier: The attempts before the last one.
        began: When the last attempt began, on Trio's clock, if that is not when the stage did.
        waited: How long the stage has waited for limits, in seconds.
        children: The results of the runs that it has made within itself, in order; live while they go.
        items: For a map: the record of each item that has one, by its number.
        overran: What of its cleanup was cancelled because it took too long, by name.
        limit: The limit that it ran into, in seconds, if it failed by that.
        source: What had set that limit, and where.
    """

    earlier: tuple[Attempt, ...] = ()
    began: float | None = None
    waited: float = 0.0
    children: tuple[Any, ...] = ()  # PipelineResults, which this layer does not know
    items: Mapping[int, StageRecord] = attrs.field(factory=dict[int, "StageRecord"])
    overran: tuple[str, ...] = ()
    limit: float | None = None
    source: str = ""


_USUAL: Final = Details()


@final
@attrs.define(eq=False)  # not frozen: the engine fills it in as the stage goes, on the hot path
class StageRecord:
    """All that a run knows of a stage. It belongs to the run; read it, and leave it as it is.

    Attributes:
        name: The stage.
        branch: The branch it is in.
        state: How far it is.
        attempts: How often its body has been entered.
        started: When its first attempt started, on Trio's clock; `None` if it never did.
        ended: When it settled, on Trio's clock.
        output: What it returned, if it succeeded.
        partial: What it saved on the way, and the fields of a `StageOutput.fail`.
        error: What it raised, if it failed.
        recoverable: Whether it called its failure recoverable.
        cause: Why it did not succeed; the stage named there is the one where it began.
        after_cancel: Whether it ended by itself although it was being cancelled.
        place: Its place in the order in which the stages of the run settled, from 0.
        details: What only few stages have, if it does: the attempts before the last, the runs within it, and so on.
    """

    name: str
    branch: str
    state: StageState = StageState.PENDING
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    output: StageOutput | None = None
    partial: Mapping[str, Any] = _NOTHING
    error: BaseException | None = None
    recoverable: bool = False
    cause: Cause | None = None
    after_cancel: bool = False
    place: int | None = None
    details: Details = _USUAL
    _late: tuple[Callable[[str], Any], str] | None = attrs.field(init=False, repr=False)  # not set, for most

    def put_off(self, read: Callable[[str], Any], text: str) -> None:
        """Lets the output be read when somebody wants it, if anybody does; the engine's own."""
        del self.output
        self._late = read, text

    if not TYPE_CHECKING:  # which would believe any name

        def __getattr__(self, name: str) -> Any:
            # Asked for what is not set, and so at no cost to anything else. (attrs does so for cached properties.)
            if name == "_late":
                return None
            if name != "output" or self._late is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            read, text = self._late
            self.output = StageOutput(StageStatus.OK, read(text))
            self._late = None
            return self.output

    @property
    def plain(self) -> bool:
        """Whether it succeeded, and there is nothing else to say of it; as of almost all."""
        unsaid = self.error is None and self.cause is None and self.details is _USUAL
        said = self.partial or self.after_cancel or self.recoverable
        return unsaid and not said and self.state is StageState.SUCCEEDED

    @property
    def more(self) -> Details:
        """Its details, to write into; the engine's own."""
        if self.details is _USUAL:
            self.details = Details()
        return self.details

    @property
    def tries(self) -> tuple[Attempt, ...]:
        """Its attempts, in order."""
        if self.started is None or not self.attempts:
            return ()
        earlier = self.details.earlier
        if earlier and earlier[-1].number == self.attempts:  # the next one has not begun, and perhaps never will
            return earlier
        began = self.started if self.details.began is None else self.details.began
        last = Attempt(number=self.attempts, started=began, ended=self.ended, error=self.error, output=self.output)
        return (*earlier, last)

    @property
    def waited(self) -> float:
        """How long it has waited for limits, in seconds, between when it could have started and when it did."""
        return self.details.waited

    @property
    def limit(self) -> float | None:
        """The limit that it ran into, in seconds, if it failed by that."""
        return self.details.limit

    @property
    def duration(self) -> float | None:
        """How long it ran, in seconds; `None` if it has not ended or never started."""
        return None if self.started is None or self.ended is None else self.ended - self.started
