"""stageflow, as one finds it: the default timeout is on."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

from stageflow import Pipeline

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape
    from stageflow import StageGraph
    from stageflow.stages import Runner

LIBRARY = "trio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    return _graph(shape, bodies).run


@asynccontextmanager
async def durable(shape: Shape, bodies: Sequence[Body], place: Path) -> AsyncGenerator[Runnable]:
    from stageflow import open_store  # noqa: PLC0415  # not for those that write nothing down
    from stageflow.journal.resume import describe  # noqa: PLC0415

    graph = _graph(shape, bodies)
    describe(graph)  # done by the first run, and kept with the graph: the price of a graph, and not of a run
    async with open_store(f"sqlite:{place / 'runs.db'}") as store:
        begun = [run.run_id for run in await store.runs() if not run.finished]
        yield partial(graph.resume, begun[0], store=store) if begun else partial(graph.run, store=store)


def _graph(shape: Shape, bodies: Sequence[Body]) -> StageGraph:
    names = [f"stage {number}" for number in range(len(shape))]
    pipeline = Pipeline(shape.name)
    for number, before in enumerate(shape.dependencies):
        pipeline = pipeline.with_stage(
            names[number], cast("Runner", bodies[number]), after=[names[other] for other in before]
        )
    return pipeline.build()
