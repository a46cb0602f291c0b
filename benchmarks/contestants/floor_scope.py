"""Floor (d): one task per stage, as (c), with a cancel scope that has a deadline around each body."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "trio"
TIMEOUT = 30.0


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    followers, waits, roots = shape.followers, shape.waits, shape.roots

    async def run() -> None:
        left = list(waits)

        async def stage(number: int) -> None:
            with trio.CancelScope(deadline=trio.current_time() + TIMEOUT):
                await bodies[number]()
            for follower in followers[number]:
                left[follower] -= 1
                if not left[follower]:
                    nursery.start_soon(stage, follower)

        async with trio.open_nursery() as nursery:
            for root in roots:
                nursery.start_soon(stage, root)

    return run
