"""pydantic-graph's builder, on asyncio: where a stage comes after several, a join comes before it."""

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
    library: Any = importlib.import_module("pydantic_graph")
    builder: Any = library.GraphBuilder(name=shape.name, auto_instrument=False)
    steps: list[Any] = [builder.step(_step(body), node_id=f"stage_{number}") for number, body in enumerate(bodies)]
    for number, before in enumerate(shape.dependencies):
        if len(before) <= 1:
            source = steps[before[0]] if before else builder.start_node
            builder.add(builder.edge_from(source).to(steps[number]))
        else:
            join = builder.join(library.reduce_null, initial=None, node_id=f"join_{number}")
            builder.add(builder.edge_from(*(steps[other] for other in before)).to(join))
            builder.add(builder.edge_from(join).to(steps[number]))
    if len(shape.ends) == 1:
        builder.add(builder.edge_from(steps[shape.ends[0]]).to(builder.end_node))
    else:
        join = builder.join(library.reduce_null, initial=None, node_id="join_end")
        builder.add(builder.edge_from(*(steps[other] for other in shape.ends)).to(join))
        builder.add(builder.edge_from(join).to(builder.end_node))
    graph: Any = builder.build()

    async def run() -> None:
        await graph.run()

    return run


def _step(body: Body) -> Any:
    async def step(ctx: Any) -> None:
        await body(ctx)

    return step
