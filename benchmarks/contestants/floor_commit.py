"""Floor (f): a plain loop that awaits one body after the other, and commits a row to SQLite after each.

The file is in WAL mode with ``synchronous=FULL``, so a row is on the disk before the next body is awaited. The row is
as large as what stageflow keeps of the end of a stage, but always the same, and nothing is handed to another thread.
"""

from __future__ import annotations

import itertools
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from benchmarks.bodies import Body
    from benchmarks.contestant import Runnable
    from benchmarks.shapes import Shape

LIBRARY = "trio"
ENDED = '{"state":"succeeded","attempts":1,"started":0.1234567890123456,"ended":0.1234567890123456}'
GIVEN = '{"rows":[1,2,3]}'


@asynccontextmanager
async def durable(shape: Shape, bodies: Sequence[Body], place: Path) -> AsyncGenerator[Runnable]:
    with closing(sqlite3.connect(place / "floor.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(
            "CREATE TABLE events (run INTEGER, seq INTEGER, stage TEXT, ended TEXT, given TEXT, "
            "PRIMARY KEY (run, seq)) WITHOUT ROWID"
        )
        runs = itertools.count()

        async def run() -> None:
            number = next(runs)
            for seq, body in enumerate(bodies):
                await body()
                # Outside of a transaction, it is one of its own.
                connection.execute(
                    "INSERT INTO events VALUES (?, ?, ?, ?, ?)", (number, seq, f"stage {seq}", ENDED, GIVEN)
                )

        yield run
