"""What a contestant is, and which there are."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from benchmarks.bodies import Cannot

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from benchmarks.bodies import Body
    from benchmarks.shapes import Shape

__all__ = [
    "COMMIT",
    "CONTESTANTS",
    "FLOORS",
    "OURS",
    "PEERS",
    "Contestant",
    "Durable",
    "Entry",
    "Runnable",
    "durable",
    "load",
]

Runnable: TypeAlias = Callable[[], Awaitable[object]]
"""Runs what was prepared, once."""


class Contestant(Protocol):
    """A module of `benchmarks.contestants`: one way to run a graph.

    Attributes:
        LIBRARY: "trio" or "asyncio", whose loop its runs need, or "threads", if its stages are plain functions.
    """

    LIBRARY: str

    def prepare(self, shape: Shape, bodies: Sequence[Body]) -> Runnable:
        """Do once what need not be done for every run: declare the stages, prove them, compile them.

        Raises:
            Cannot: The contestant cannot do such a graph, or such bodies.
        """
        ...


class Durable(Protocol):
    """A module of `benchmarks.contestants` whose runs can outlive their process.

    Attributes:
        LIBRARY: As for every contestant.
    """

    LIBRARY: str

    def durable(self, shape: Shape, bodies: Sequence[Body], place: Path) -> AbstractAsyncContextManager[Runnable]:
        """Do once what need not be done for every run, and give what runs the graph and writes it down in a directory.

        If there is a run that was written down there, and has not come to its end, that is gone on with.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A contestant in the list.

    Attributes:
        key: The name of its module.
        title: What it is called in tables and pictures.
        role: "floor", "ours", "peer" for what also looks after failures, or "scheduler" for what only schedules.
        requires: What to install for it, if it is not in our own environment.
    """

    key: str
    title: str
    role: str
    requires: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The distribution it is measured in."""
        return {"floor": "trio", "ours": "stageflow"}.get(self.role) or self.requires[0]


FLOORS = (
    Entry("floor_loop", "(a) loop", "floor"),
    Entry("floor_checkpoint", "(b) loop, checkpoint", "floor"),
    Entry("floor_task", "(c) task", "floor"),
    Entry("floor_scope", "(d) task, scope", "floor"),
    Entry("floor_branch", "(e) task, scope, nursery", "floor"),
)
"""What runs are compared with that are not written down."""
COMMIT = Entry("floor_commit", "(f) SQLite commit", "floor")
"""What those are compared with that are."""
OURS = Entry("stageflow", "stageflow", "ours")


def _peers() -> tuple[Entry, ...]:
    peers = tomllib.loads(Path(__file__).with_name("peers.toml").read_text())
    return tuple(
        Entry(key, cast("str", peer["title"]), cast("str", peer["role"]), tuple(peer["requires"]))
        for key, peer in peers.items()
    )


PEERS = _peers()
CONTESTANTS = {entry.key: entry for entry in (*FLOORS, COMMIT, OURS, *PEERS)}


def load(key: str) -> Contestant:
    """Import a contestant, and with it what it stands for."""
    return cast("Contestant", importlib.import_module(f"benchmarks.contestants.{key}"))


def durable(contestant: Contestant) -> Durable:
    """Give a contestant as one whose runs are written down.

    Raises:
        Cannot: They are not.
    """
    if not hasattr(contestant, "durable"):
        raise Cannot("it writes nothing down")
    return cast("Durable", contestant)
