"""Prefect: a flow that submits tasks, which wait for each other's futures, to its pool of threads.

Its server, which writes everything down, is started by it as another process, whose CPU time is not counted here.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    library: Any = importlib.import_module("prefect")
    tasks: list[Any] = [library.task(_task(body), name=f"stage {number}") for number, body in enumerate(bodies)]

    def submit() -> None:
        futures: list[Any] = []
        for task, before in zip(tasks, shape.dependencies, strict=True):
            futures.append(task.submit(wait_for=[futures[other] for other in before]))
        for number in shape.ends:
            futures[number].wait()

    flow: Any = library.flow(submit, name=shape.name)

    async def run() -> None:
        await asyncio.to_thread(flow)

    return run


def _task(body: Body) -> Any:
    async def task() -> None:
        await body()

    return task
