"""stageflow-core, on asyncio. It imports as `stageflow` too, hence the environment of its own."""

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
    core: Any = importlib.import_module("stageflow.api")
    declare: Any = importlib.import_module("stageflow.pipeline").stage
    ok: Any = core.StageOutput.ok

    class Stage:
        kind = core.StageKind.TRANSFORM

        def __init__(self, name: str, body: Body) -> None:
            self.name = name
            self.body = body

        async def execute(self, ctx: Any) -> Any:
            await self.body(ctx)
            return ok()

    names = [f"stage_{number}" for number in range(len(shape))]
    # Its with_stage() copies all stages declared so far.
    specs = [
        declare(name=name, runner=Stage(name, body), dependencies=tuple(names[other] for other in before))
        for name, body, before in zip(names, bodies, shape.dependencies, strict=True)
    ]
    graph: Any = core.Pipeline.from_stages(*specs, name=shape.name).build()

    async def run() -> None:
        await graph.run(core.PipelineContext.create(topology=shape.name))

    return run
