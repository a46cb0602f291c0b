"""DBOS on SQLite: a durable workflow whose steps are written down; layer by layer, the steps of one layer at once."""

from __future__ import annotations

import asyncio
import functools
import importlib
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "asyncio"

PREPARED: list[tuple[Shape, Sequence[Body]]] = []


def prepare(shape: Shape, bodies: Sequence[Body]) -> Runnable:
    workflow = _launched()
    PREPARED.append((shape, bodies))
    number = len(PREPARED) - 1

    async def run() -> None:
        await workflow(number)

    return run


def durable(shape: Shape, bodies: Sequence[Body], place: Path) -> AbstractAsyncContextManager[Runnable]:
    return nullcontext(prepare(shape, bodies))  # in a place of its own, since it is launched only once


@functools.cache
def _launched() -> Any:
    """Start DBOS, once: its workflows are declared before that, hence one for whatever is prepared."""
    dbos: Any = importlib.import_module("dbos").DBOS
    url = f"sqlite:///{Path(mkdtemp(dir='.')).resolve()}/dbos.sqlite"
    dbos(config={"name": "benchmarks", "system_database_url": url, "run_admin_server": False, "log_level": "ERROR"})

    @dbos.step()  # type: ignore[untyped-decorator]
    async def step(prepared: int, stage: int) -> object:
        return await PREPARED[prepared][1][stage]()

    @dbos.workflow()  # type: ignore[untyped-decorator]
    async def workflow(prepared: int) -> None:
        for layer in PREPARED[prepared][0].layers:
            if len(layer) == 1:
                await step(prepared, layer[0])
            else:
                await asyncio.gather(*(step(prepared, stage) for stage in layer))

    dbos.launch()
    return workflow
