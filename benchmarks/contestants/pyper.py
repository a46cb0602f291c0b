"""Pyper, on asyncio: a line of tasks, with queues between them, of which one may have many workers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.bodies import Body, Cannot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    task: Any = importlib.import_module("pyper").task
    if shape.name == "chain":
        pipeline: Any = task(bodies[0])
        # One by one with `|` would copy the tasks so far every time.
        pipeline.tasks.extend(task(body).tasks[0] for body in bodies[1:])
    elif shape.name in {"fan", "diamond"}:
        pipeline = _fan(task, bodies)
    else:
        raise Cannot("its pipelines are lines, with nothing but one fork and one join after another")

    async def run() -> None:
        async for _ in pipeline():
            pass

    return run


def _fan(task: Any, bodies: Sequence[Body]) -> Any:
    last = len(bodies) - 1

    async def fork() -> AsyncIterator[int]:  # noqa: ASYNC900  # that is how it forks
        await bodies[0]()
        for number in range(1, last):
            yield number

    async def branch(number: int) -> None:
        await bodies[number]()

    async def join(items: AsyncIterator[None]) -> None:
        async for _ in items:
            pass
        await bodies[last]()

    return task(fork, branch=True) | task(branch, workers=last - 1) | task(join, join=True)
