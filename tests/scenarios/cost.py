"""What a run costs, counted so that it is the same on every machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from stageflow import PipelineResults, StageGraph

__all__ = ["calls_of_a_run"]


async def calls_of_a_run(graph: StageGraph) -> tuple[int, PipelineResults]:
    """Runs a graph, and gives how many functions were called meanwhile, in Python and in C, and the results."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    await graph.run()  # whatever is done only once
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        results = await graph.run()
    finally:
        sys.setprofile(before)
    return calls, results
