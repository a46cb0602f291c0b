"""dask's threaded scheduler: plain functions, on as many threads as there are CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "threads"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    get: Any = importlib.import_module("dask.threaded").get
    names = [f"stage_{number}" for number in range(len(shape))]
    graph = {
        name: (body, *(names[other] for other in before))
        for name, body, before in zip(names, bodies, shape.dependencies, strict=True)
    }
    wanted = [names[number] for number in shape.ends]

    async def run() -> None:
        get(graph, wanted)

    return run
