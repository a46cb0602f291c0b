"""Floor (b): a plain loop that awaits one body after the other, with a checkpoint each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio.lowlevel import checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "trio"


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    async def run() -> None:
        for body in bodies:
            await checkpoint()
            await body()

    return run
