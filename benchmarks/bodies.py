"""What the stages do: next to nothing, in each of the libraries that contestants are built on.

A body takes whatever a contestant hands to its stages, and does not look at it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

__all__ = ["Body", "Cannot", "Gate", "Gauge", "body", "recording"]

Body: TypeAlias = Callable[..., Awaitable[object]]
SHORT = 0.05  # seconds that "sleep" sleeps


class Cannot(Exception):
    """A contestant cannot do what it is asked for; the message says why."""


class Gauge:
    """Counts the stages that wait without end, and those of them that have been stopped.

    Attributes:
        expected: How many there will be.
        waiting: How many there are so far.
        stopped: How many of them have been stopped.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.waiting = 0
        self.stopped = 0


class Gate:
    """The last stage of a run, at which that stops, or does not; and the bodies of the others.

    Attributes:
        is_open: Whether the run comes to its end.
        passed: How many stages have run before it.
        reached: When the gate was reached: the clock, and the CPU time of the process.
    """

    def __init__(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self.passed = 0
        self.reached: tuple[float, float] | None = None

    async def before(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Do what the stages before the last one do."""
        self.passed += 1
        return await gives()

    async def last(self, *_: Any, **__: Any) -> None:
        """Do what the last stage does."""
        self.reached = time.perf_counter(), time.process_time()
        if not self.is_open:
            raise InterruptedError


async def returns(*_: Any, **__: Any) -> None:
    """Return at once."""


async def gives(*_: Any, **__: Any) -> dict[str, Any]:
    """Give something that is worth being kept."""
    return {"rows": [1, 2, 3]}


def body(kind: str, library: str, gauge: Gauge | None = None) -> Body:
    """Give a body of a kind: "return", "give", "checkpoint", "sleep", or "forever", which is counted by a gauge.

    Raises:
        Cannot: There is no such thing for that library.
    """
    if kind == "return" and library != "threads":
        return returns
    if library == "threads":
        return _in_threads(kind)
    if kind == "give":  # to what is durable, and none of those has threads
        return gives
    aio = importlib.import_module("trio" if library == "trio" else "asyncio")
    if kind == "checkpoint":
        return _checkpoints_in_trio() if library == "trio" else _checkpoints_in_asyncio()
    if kind == "sleep":
        sleep: Callable[[float], Awaitable[None]] = aio.sleep

        async def sleeps(*_: Any, **__: Any) -> None:
            await sleep(SHORT)

        return sleeps
    if kind == "forever" and gauge is not None:
        return _forever(aio, gauge)
    raise ValueError(kind)


def _forever(aio: Any, gauge: Gauge) -> Body:
    async def waits(*_: Any, **__: Any) -> None:
        gauge.waiting += 1
        try:
            await aio.sleep(3600)
        finally:
            gauge.stopped += 1

    return waits


def _checkpoints_in_trio() -> Body:
    checkpoint: Callable[[], Awaitable[None]] = importlib.import_module("trio.lowlevel").checkpoint

    async def checkpoints(*_: Any, **__: Any) -> None:
        await checkpoint()

    return checkpoints


def _checkpoints_in_asyncio() -> Body:
    sleep: Callable[[float], Awaitable[None]] = importlib.import_module("asyncio").sleep

    async def checkpoints(*_: Any, **__: Any) -> None:
        await sleep(0)

    return checkpoints


def _in_threads(kind: str) -> Body:
    if kind == "return":

        def returns_in_thread(*_: Any, **__: Any) -> Any:
            return None

        return returns_in_thread
    if kind == "sleep":

        def sleeps_in_thread(*_: Any, **__: Any) -> Any:
            time.sleep(SHORT)

        return sleeps_in_thread
    if kind == "checkpoint":
        raise Cannot("its stages are plain functions: they have no checkpoint")
    raise Cannot("its stages are plain functions in threads: nothing can stop one that waits")


def recording(library: str, number: int, log: list[int]) -> Body:
    """Give a body that writes its number down: what a run did, and in which order."""
    if library == "threads":

        def writes_in_thread(*_: Any, **__: Any) -> Any:
            log.append(number)

        return writes_in_thread

    async def writes(*_: Any, **__: Any) -> None:
        log.append(number)

    return writes
