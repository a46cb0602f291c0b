"""`PipelineTimer`: how long it has taken, and how long it may still take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import trio

if TYPE_CHECKING:
    from stageflow.context.host import Limit

__all__ = ["PipelineTimer"]


@final
class PipelineTimer:
    """The clock of a run, as one stage sees it.

    All times are seconds on Trio's clock, so `trio.testing.MockClock` rules them.
    The timer of a `PipelineContext`, which is in no run, stands at zero and knows no limit.
    """

    __slots__ = ("_limit", "_run_started", "_stage_started")

    def __init__(
        self,
        *,
        run_started: float | None = None,
        stage_started: float | None = None,
        limit: Limit | None = None,
    ) -> None:
        self._run_started = run_started
        self._stage_started = stage_started
        self._limit = limit

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return 0.0 if self._run_started is None else _now() - self._run_started

    @property
    def stage_elapsed(self) -> float:
        """Seconds since this attempt of the stage began."""
        return 0.0 if self._stage_started is None else _now() - self._stage_started

    @property
    def deadline(self) -> float:
        """The moment at which this attempt will be cancelled, on Trio's clock; `math.inf` if there is no limit.

        The nearest one counts: the stage's own limit, or a cancel scope that stood around the run when it began.
        """
        return math.inf if self._limit is None else self._limit.deadline

    @property
    def remaining(self) -> float:
        """Seconds until `deadline`; never negative, `math.inf` if there is no limit."""
        deadline = self.deadline
        return deadline if deadline == math.inf else max(0.0, deadline - _now())

    def extend(self, seconds: float) -> None:
        """Gives this attempt more time. The limits around the run stay where they are.

        Args:
            seconds: How much later the stage's own limit shall be.

        Raises:
            ValueError: `seconds` is negative or no number.
            RuntimeError: The stage has ended, has reached its limit, or is in no run.
        """
        if not seconds >= 0:
            raise ValueError(f"a limit can only be extended by seconds of zero or more, not {seconds!r}")
        if self._limit is None:
            raise RuntimeError("this timer belongs to no running stage, so there is no limit to extend")
        self._limit.extend(seconds)

    def __repr__(self) -> str:
        if self._run_started is None:
            return "<PipelineTimer, not started>"
        return f"<PipelineTimer elapsed={self.elapsed:.3f} remaining={self.remaining:.3f}>"


def _now() -> float:
    """The time on Trio's clock, also from the worker thread of a stage."""
    try:
        return trio.current_time()
    except RuntimeError:
        return trio.from_thread.run_sync(trio.current_time)
