"""What is measured: the list of cases, and which contestants take part in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.contestant import COMMIT, OURS, PEERS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Case", "cases"]

AT_ONCE = 1000
IN_TURN = 2000
SLEEPERS = 1000
LIVE = 10_000
FINISHED = 10_000
PEER_KEYS = frozenset(peer.key for peer in PEERS)
IMPORTS = ("nothing", "trio", "stageflow")
NO_PEERS = frozenset({"import", "durable", "reload"})
WRITERS = (COMMIT.key, OURS.key, "dbos")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        measure: "time", "durable" for the time of runs that are written down, "reload" for that to go on with one,
            "cancel", "memory" or "import".
        shape: The name of a shape; of what is imported, for "import".
        size: The size of the shape.
        body: What the stages do.
        at_once: How many runs go on at once.
        in_turn: How many runs, one after the other, are one sample, unless that would take some seconds.
        gc: Whether Python's cyclic garbage collector is on, as it is by default.
        contestants: Which of the floors and ours take part; everyone, if empty.
    """

    measure: str
    shape: str
    size: int = 0
    body: str = "return"
    at_once: int = 1
    in_turn: int = 1
    gc: bool = True
    contestants: tuple[str, ...] = ()

    def admits(self, key: str) -> bool:
        """Whether a contestant takes part: most peers do wherever there is something to compare them with."""
        if not self.contestants:
            return key != COMMIT.key
        return key in self.contestants or (key in PEER_KEYS and self.gc and self.measure not in NO_PEERS)

    @property
    def counts(self) -> str:
        """Which of the values that are found counts: CPU time, unless it is the waiting for a disk that is measured."""
        return {"memory": "bytes", "durable": "wall"}.get(self.measure, "cpu")

    @property
    def rounds(self) -> int:
        """In how many rounds at most: what is allocated is the same every time, and the collector's part is large."""
        return 1 if self.measure == "memory" or not self.gc else 1000

    @property
    def key(self) -> str:
        """A name for the case, for people too."""
        words = [self.measure, self.shape]
        if self.size:
            words.append(str(self.size))
        if self.measure == "time":
            words.append(self.body)
        if self.at_once > 1:
            words.append("at once")
        if not self.gc:
            words.append("no gc")
        return " ".join(words)


def cases(*, quick: bool) -> list[Case]:
    """Give the cases of a quick run, or of a full one."""
    return list(_quick() if quick else _full())


def _full() -> Iterator[Case]:
    for body in ("return", "checkpoint"):
        for size in (10, 100, 1000, 10_000):
            yield Case("time", "chain", size, body)
            yield Case("time", "fan", size, body)
        for size in (10, 30, 100):
            yield Case("time", "layered", size, body)
        yield Case("time", "diamond", 3, body, in_turn=IN_TURN)
        yield Case("time", "diamond", 3, body, at_once=AT_ONCE)
    yield Case("time", "fan", SLEEPERS, "sleep")
    yield Case("cancel", "fan", SLEEPERS, "forever")
    yield Case("memory", "fan", LIVE, "forever")
    yield from _durable()
    yield from _without_collector()
    yield from _imports()


def _durable() -> Iterator[Case]:
    for shape in ("chain", "fan"):
        yield Case("durable", shape, 1000, "give", contestants=WRITERS)
    yield Case("reload", "chain", FINISHED, "give", contestants=(OURS.key,))


def _without_collector() -> Iterator[Case]:
    for size in (100, 10_000):
        yield Case("time", "fan", size, gc=False, contestants=("floor_branch", OURS.key))


def _imports() -> Iterator[Case]:
    for module in IMPORTS:
        yield Case("import", module, contestants=(OURS.key,))


def _quick() -> Iterator[Case]:
    """What the bounds need, each against its floor."""
    ours, branch, scope, checkpoint = OURS.key, "floor_branch", "floor_scope", "floor_checkpoint"
    for size in (100, 1000, 10_000):
        yield Case("time", "chain", size, contestants=(checkpoint, ours))
        yield Case("time", "fan", size, contestants=(branch, ours))
    for size in (10, 100):
        yield Case("time", "layered", size, contestants=(scope, ours))
    yield Case("time", "diamond", 3, in_turn=IN_TURN, contestants=(branch, ours))
    yield Case("time", "diamond", 3, at_once=AT_ONCE, contestants=(branch, ours))
    yield Case("time", "fan", SLEEPERS, "sleep", contestants=(branch, ours))
    yield Case("cancel", "fan", SLEEPERS, "forever", contestants=(branch, ours))
    yield Case("memory", "fan", LIVE, "forever", contestants=(branch, ours))
    yield from _durable()
    yield from _imports()
