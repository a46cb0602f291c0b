"""LangGraph, on asyncio, without a checkpointer: supersteps over a shared state."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"


class State(TypedDict):
    nothing: int


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    library: Any = importlib.import_module("langgraph.graph")
    builder: Any = library.StateGraph(State)
    names = [f"stage_{number}" for number in range(len(shape))]
    for name, body, before in zip(names, bodies, shape.dependencies, strict=True):
        builder.add_node(name, _node(body))
        if len(before) > 1:
            builder.add_edge([names[other] for other in before], name)
        else:
            builder.add_edge(names[before[0]] if before else library.START, name)
    for number in shape.ends:
        builder.add_edge(names[number], library.END)
    graph: Any = builder.compile()
    limit = {"recursion_limit": len(shape.layers) + 5}

    async def run() -> None:
        await graph.ainvoke({"nothing": 0}, limit)

    return run


def _node(body: Body) -> Any:
    async def node(state: State) -> None:
        await body(state)

    return node
