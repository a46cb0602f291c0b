"""async-dag, on asyncio: starts what is ready."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    manager: Any = importlib.import_module("async_dag").TaskManager()
    nodes: list[Any] = []
    for body, before in zip(bodies, shape.dependencies, strict=True):
        nodes.append(manager.add_node(body, *(nodes[other] for other in before)))
    manager.sort()

    async def run() -> None:
        await manager.invoke(None)

    return run
