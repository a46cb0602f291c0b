"""The record of a compensation: what has been undone of a run, and what has not."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import final

import attrs

from stageflow.journal.record import Cause

__all__ = ["CompensationRecord", "CompensationStatus", "UndoRecord", "UndoState"]


@final
class UndoState(enum.Enum):
    """What has become of what a stage did."""

    PENDING = "pending"
    """It is not undone yet."""
    UNDONE = "undone"
    FAILED = "failed"
    """Undoing it failed, after all attempts."""
    HELD = "held"
    """It was not undone, since something that used it could not be undone."""
    NOT_NEEDED = "not needed"
    """There was nothing to undo, or nothing that should be."""
    IRREVOCABLE = "irrevocable"
    """It was declared to be beyond undoing, and may have taken effect."""

    @property
    def open(self) -> bool:
        """Whether it is still to be undone."""
        return self is UndoState.PENDING or self is UndoState.HELD


@final
class CompensationStatus(enum.Enum):
    """How far the compensation of a run is."""

    COMPENSATING = "compensating"
    """It has begun, and not ended; it goes on, or was cut short."""
    COMPENSATED = "compensated"
    """Everything that was to be undone has been undone."""
    NOT_NEEDED = "not needed"
    """Nothing was undone, since the run is past its point of no return."""
    FAILED = "compensation failed"
    """Something could not be undone. What did not depend on it has been."""


@final
@attrs.define(eq=False)
class UndoRecord:
    """All that a run knows of the undoing of one stage. It belongs to the run; read it, and leave it as it is.

    Attributes:
        stage: The stage; one of a run within another stage as ``"outer/0/inner"``, an item of a map as ``"items[3]"``.
        state: What has become of it.
        reason: Why, in words, where that is not plain.
        attempts: How often its undo was called.
        started: When it was called first, on Trio's clock.
        ended: When that was over.
        error: What it raised last, if it failed.
        best_effort: Whether it does not matter if it fails.
    """

    stage: str
    state: UndoState = UndoState.PENDING
    reason: str = ""
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    error: Exception | None = None
    best_effort: bool = False

    @property
    def missing(self) -> bool:
        """Whether it should have been undone, and was not."""
        failed = self.state is UndoState.FAILED and not self.best_effort
        return failed or self.state.open


@final
@attrs.define(eq=False)
class CompensationRecord:
    """What has been undone of a run.

    Attributes:
        cause: Why the run is undone.
        status: How far that is.
        undos: What has become of every stage that was entered and says how it is undone, or that it cannot be; in the
            order in which they were looked at.
    """

    cause: Cause | None
    status: CompensationStatus = CompensationStatus.COMPENSATING
    undos: Mapping[str, UndoRecord] = attrs.field(factory=dict[str, UndoRecord])
    _left: frozenset[int] = attrs.field(default=frozenset(), init=False, repr=False)  # stages still to be looked at

    def of(self, *states: UndoState) -> tuple[str, ...]:
        """The stages with which it has come to one of these."""
        return tuple(name for name, undo in self.undos.items() if undo.state in states)

    @property
    def left(self) -> frozenset[int]:
        """The stages, by number, of which the undoing has begun, and not ended; the engine's own."""
        return self._left

    def adopt(self, undos: Mapping[str, UndoRecord]) -> None:
        """Takes over what has become of the undoing of a run within a stage, by itself."""
        self.undos = {**self.undos, **undos}
        self.conclude(frozenset())

    def begin(self, stages: frozenset[int]) -> None:
        """Says that these are going to be undone: all of the run, or those of a branch."""
        self._left |= stages
        self.status = CompensationStatus.COMPENSATING

    def conclude(self, stages: frozenset[int] | None = None) -> None:
        """Says how it has ended; never that everything is undone while something is missing, or is not begun yet."""
        self._left = frozenset() if stages is None else self._left - stages
        if self._left or any(undo.state is UndoState.PENDING for undo in self.undos.values()):
            self.status = CompensationStatus.COMPENSATING  # another branch is undone, or this was cut short
            return
        missing = any(undo.missing for undo in self.undos.values())
        self.status = CompensationStatus.FAILED if missing else CompensationStatus.COMPENSATED
