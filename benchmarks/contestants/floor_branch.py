"""Floor (e): one task, with a nursery and a cancel scope that has a deadline, per branch.

A branch is here what it would be in a program written by hand: a line of stages, each the only one after the one
before. If there is one stage that everything comes after, its branch is the task that runs the graph.
"""

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
    strand_from = {strand[0]: strand for strand in shape.strands}

    async def run() -> None:
        left = list(waits)

        async def strand(head: int, trunk: trio.Nursery) -> None:
            numbers = strand_from[head]
            # Whether a strand can be cancelled is for its bodies to say.
            with trio.CancelScope(deadline=trio.current_time() + TIMEOUT):  # noqa: ASYNC912
                for number in numbers:
                    await bodies[number]()
            for follower in followers[numbers[-1]]:
                left[follower] -= 1
                if not left[follower]:
                    trunk.start_soon(branch, follower, trunk)

        async def branch(head: int, trunk: trio.Nursery) -> None:
            async with trio.open_nursery():
                await strand(head, trunk)

        async with trio.open_nursery() as trunk:
            if len(roots) == 1:
                await strand(roots[0], trunk)
            else:
                for root in roots:
                    trunk.start_soon(branch, root, trunk)

    return run
