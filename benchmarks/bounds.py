"""What the engine may cost, and what it does cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.contestant import COMMIT, CONTESTANTS, OURS, PEERS
from benchmarks.figures import Results, Spread, keys_of, per_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bound", "bounds"]

US, BRANCH, SCOPE, CHECKPOINT = OURS.key, "floor_branch", "floor_scope", "floor_checkpoint"
LARGE = 10_000


@dataclass(frozen=True)
class Bound:
    """One row of what must be shown.

    Attributes:
        what: What is measured.
        against: What it is compared with, if it is.
        limit: The greatest figure that is well.
        found: The figure, if there is one.
        unit: What it is measured in.
        note: What else there is to say.
    """

    what: str
    against: str
    limit: float
    found: Spread | None
    unit: str = "×"
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the figure is within the limit, to the precision it is shown with."""
        return None if self.found is None else round(self.found.median, 2) <= self.limit and not self.broken

    @property
    def broken(self) -> bool:
        """Whether something is wrong, whatever the figure says."""
        return self.note.startswith("leaked")


def bounds(results: Results) -> list[Bound]:
    """Compare the results with everything that was promised."""
    return [*_shapes(results), *_growth(results), *_others(results), *_durable(results), *_peers(results)]


def _shapes(results: Results) -> Iterator[Bound]:
    for what, shape, size, at_once, against, limit in (
        ("chain of 1,000", "chain", 1000, False, CHECKPOINT, 1.0),
        ("fan-out of 1,000", "fan", 1000, False, BRANCH, 1.3),
        ("five-stage diamond, one after the other", "diamond", 3, False, BRANCH, 1.5),
        ("five-stage diamond, 1,000 at once", "diamond", 3, True, BRANCH, 1.5),
        ("layered 100 × 100", "layered", 100, False, SCOPE, 2.0),
    ):
        case = results.find("time", shape, size, at_once=at_once)
        yield Bound(what, CONTESTANTS[against].title, limit, results.ratio(case, US, against))


def _growth(results: Results) -> Iterator[Bound]:
    """How the cost per stage grows with the graph: ours, and beside it that of the floor, which grows too."""
    cases = keys_of(results.cases)
    for shape, small, large, against in (
        ("chain", 100, LARGE, CHECKPOINT),
        ("fan", 100, LARGE, BRANCH),
        ("layered", 10, 100, SCOPE),
    ):
        one, many = results.find("time", shape, small), results.find("time", shape, large)

        def growth(
            contestant: str, one: str = one, many: str = many
        ) -> Spread | None:  # a stage of the large graph against one of the small
            if one not in cases or many not in cases:
                return None
            change = per_stage(cases[many]) / per_stage(cases[one])
            found = results.compare(results.values(many, contestant, "cpu"), results.values(one, contestant, "cpu"))
            return found and found.scaled(change)

        floor = growth(against)
        note = f"floor {CONTESTANTS[against].title[:3]}: {floor.median:.2f}×" if floor else ""
        yield Bound(f"{shape}, a stage of 10,000", "a stage of 100", 1.3, growth(US), note=note)


def _others(results: Results) -> Iterator[Bound]:
    case = results.find("cancel", "fan", 1000)
    leaks = results.values(case, US, "leaked").values()
    note = "" if not leaks else f"leaked {max(leaks):.0f}" if any(leaks) else "nothing leaked"
    found = results.ratio(case, US, BRANCH)
    yield Bound("cancel, 1,000 branches asleep", CONTESTANTS[BRANCH].title, 1.3, found, note=note)
    case = results.find("time", "fan", 1000, body="sleep")
    yield Bound("1,000 stages asleep for 50 ms", CONTESTANTS[BRANCH].title, 1.3, results.ratio(case, US, BRANCH))
    found = results.ratio(results.find("memory", "fan", LARGE), US, BRANCH, "bytes")
    yield Bound("memory of 10,000 live stages", CONTESTANTS[BRANCH].title, 1.5, found)
    ours, trio = (results.values(results.find("import", module), US, "cpu") for module in ("stageflow", "trio"))
    beyond = results.compare(ours, trio, lambda one, other: (one - other) * 1000)
    yield Bound("import stageflow", "import trio", 30, beyond, unit=" ms more")


def _durable(results: Results) -> Iterator[Bound]:
    """What it costs to write a run down, which is waiting for the disk mostly; and to go on with one, which is not."""
    for what, shape, limit in (("durable chain of 1,000", "chain", 1.8), ("durable fan-out of 1,000", "fan", 0.3)):
        found = results.ratio(results.find("durable", shape, 1000), US, COMMIT.key, "wall")
        yield Bound(what, COMMIT.title, limit, found, note="wall time")
    found = results.spread(results.find("reload", "chain", LARGE), US)
    yield Bound("reload of 10,000 stages", "", 100, found and found.scaled(1e3), unit=" ms")


def _peers(results: Results) -> Iterator[Bound]:
    """The dearest we are against each peer, over every case that both can do."""
    for peer in PEERS:
        if peer.role != "peer":
            continue
        for shape, limit in (("chain", 0.1), ("", 1.0)) if peer.key == "stageflow_core" else (("", 1.0),):
            worst: tuple[float, Spread, str] | None = None
            done = 0
            for case in results.cases:
                if case.measure != "time" or not case.gc or not case.shape.startswith(shape):
                    continue
                found = results.ratio(case.key, US, peer.key)
                if found is not None:
                    done += 1
                    worst = max(worst or (0.0, found, ""), (found.median, found, case.key), key=lambda one: one[0])
            what = f"every {shape or 'case'} that both can do"
            note = results.absent.get(peer.key, "there is none")
            if worst is not None:
                note = f"dearest of {done}: {worst[2].removeprefix('time ')}"
            yield Bound(what, peer.title, limit, worst and worst[1], note=note)
