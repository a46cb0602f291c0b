"""Keeping a clock that jumps still while something outside of Trio is at work.

`trio.testing.MockClock` jumps to the next deadline when all tasks wait, and a task that waits for a thread is one that
waits. So while a store writes, its clock must not jump: the time that passes there is none.
"""

from __future__ import annotations

import math
from typing import Any, final

import trio

__all__ = ["Stillness", "stillness"]


@final
class Stillness:
    """How many in this run of Trio keep its clock still.

    Attributes:
        jumps: Whether it is a clock that jumps.
    """

    __slots__ = ("_before", "_clock", "_holders", "jumps")

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.jumps: bool = hasattr(clock, "autojump_threshold")
        self._holders = 0
        self._before = math.inf

    def begin(self) -> None:
        """Keeps the clock still from here on."""
        if self._holders == 0 and self.jumps:
            self._before, self._clock.autojump_threshold = self._clock.autojump_threshold, math.inf
        self._holders += 1

    def end(self) -> None:
        """Lets it go again, if nobody else keeps it still."""
        self._holders -= 1
        if self._holders == 0 and self.jumps:
            self._clock.autojump_threshold = self._before


_OF_RUN: trio.lowlevel.RunVar[Stillness] = trio.lowlevel.RunVar("stageflow stillness")


def stillness() -> Stillness:
    """Gives the one of this run of Trio."""
    try:
        return _OF_RUN.get()
    except LookupError:
        found = Stillness(trio.lowlevel.current_clock())
        _OF_RUN.set(found)
        return found
