"""stageflow, as one finds it: the default timeout is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stageflow import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape
    from stageflow.stages import Runner

LIBRARY = "trio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    names = [f"stage {number}" for number in range(len(shape))]
    pipeline = Pipeline(shape.name)
    for number, before in enumerate(shape.dependencies):
        pipeline = pipeline.with_stage(
            names[number], cast("Runner", bodies[number]), after=[names[other] for other in before]
        )
    return pipeline.build().run
