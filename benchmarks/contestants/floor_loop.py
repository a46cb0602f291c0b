"""Floor (a): a plain loop that awaits one body after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "trio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    async def run() -> None:
        for body in bodies:
            await body()

    return run
