"""Haystack's pipeline, run asynchronously: components with sockets. As many may run at once as there are."""

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
    library: Any = importlib.import_module("haystack")
    component: Any = library.component

    class Stage:
        def __init__(self, body: Body, inputs: Sequence[str]) -> None:
            self.body = body
            component.set_input_types(self, **dict.fromkeys(inputs, int))
            component.set_output_types(self, out=int)

        def run(self, **inputs: int) -> dict[str, int]:
            raise NotImplementedError

        async def run_async(self, **inputs: int) -> dict[str, int]:
            await self.body()
            return {"out": 0}

    stage: Any = component(Stage)
    pipeline: Any = library.Pipeline()
    names = [f"stage_{number}" for number in range(len(shape))]
    for name, body, before in zip(names, bodies, shape.dependencies, strict=True):
        pipeline.add_component(name, stage(body, [names[other] for other in before] or ["given"]))
        for other in before:
            pipeline.connect(f"{names[other]}.out", f"{name}.{names[other]}")
    given: dict[str, dict[str, int]] = {names[root]: {"given": 0} for root in shape.roots}

    async def run() -> None:
        await pipeline.run_async(given, concurrency_limit=len(shape))

    return run
