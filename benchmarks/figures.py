"""What was measured: a file of figures, and the arithmetic on them.

A figure is what one process found for one contestant in one case. Two contestants are compared round by round, since
what else the machine did in a round, it did to both; what is shown is the median of those ratios, and how far they
spread.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case
from benchmarks.shapes import shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["SCHEMA", "Figure", "Results", "Spread", "spread"]

SCHEMA = 1


@dataclass(frozen=True)
class Figure:
    """What one process found.

    Attributes:
        case: The key of the case.
        contestant: The key of the contestant.
        round: In which round.
        status: "ok", "cannot", "failed", "wrong" or "timeout".
        reason: Why it is not "ok".
        values: What was found: seconds for "cpu" and "wall", of one run; and so on.
    """

    case: str
    contestant: str
    round: int
    status: str = "ok"
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Spread:
    """A median, with the least and the greatest of what it is the median of."""

    median: float
    least: float
    greatest: float

    def scaled(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.least * factor, self.greatest * factor)


def spread(values: Iterable[float]) -> Spread | None:
    """Give the spread of some values, if there are any."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found)) if found else None


@dataclass
class Results:
    """All that a run of the benchmarks found.

    Attributes:
        made: When, in UTC.
        mode: "quick" or "full".
        rounds: How many rounds there were.
        machine: What it ran on.
        versions: The version of each contestant's distribution.
        absent: Contestants that were not measured, and why.
        cases: What was measured.
        figures: What was found.
    """

    made: str
    mode: str
    rounds: int
    machine: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict[str, str])
    absent: dict[str, str] = field(default_factory=dict[str, str])
    cases: list[Case] = field(default_factory=list[Case])
    figures: list[Figure] = field(default_factory=list[Figure])

    def write(self, path: Path) -> None:
        """Write them to a file, in an order that makes for small differences."""
        content: dict[str, Any] = {"schema": SCHEMA, **asdict(self)}
        figures = [json.dumps(figure) for figure in content.pop("figures")]
        cases = [json.dumps(case) for case in content.pop("cases")]
        head = json.dumps(content, indent=1)[:-2]
        lines = ',\n "cases": [\n  {}\n ],\n "figures": [\n  {}\n ]\n}}\n'
        path.write_text(head + lines.format(",\n  ".join(cases), ",\n  ".join(figures)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read them from a file.

        Raises:
            ValueError: The file is of another schema.
        """
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not of schema {SCHEMA}: measure anew")
        for case in content["cases"]:
            case["contestants"] = tuple(case["contestants"])
        content["cases"] = [Case(**case) for case in content["cases"]]
        content["figures"] = [Figure(**figure) for figure in content["figures"]]
        return cls(**content)

    def values(self, case: str, contestant: str, what: str) -> dict[int, float]:
        """Give one sort of value by round."""
        return {
            figure.round: figure.values[what]
            for figure in self.figures
            if figure.case == case and figure.contestant == contestant and what in figure.values
        }

    def spread(self, case: str, contestant: str, what: str = "cpu") -> Spread | None:
        """Give the median and spread over the rounds."""
        return spread(self.values(case, contestant, what).values())

    def ratio(self, case: str, contestant: str, against: str, what: str = "cpu") -> Spread | None:
        """Compare two contestants in one case, round by round."""
        return self.compare(self.values(case, contestant, what), self.values(case, against, what))

    @staticmethod
    def compare(
        values: dict[int, float],
        others: dict[int, float],
        by: Callable[[float, float], float] = lambda one, other: one / other,
    ) -> Spread | None:
        """Compare values of the same rounds."""
        return spread(by(values[number], others[number]) for number in sorted(values.keys() & others.keys()))

    def find(
        self, measure: str, shape: str, size: int = 0, *, body: str = "return", at_once: bool = False, gc: bool = True
    ) -> str:
        """Give the key of a case, whether or not it was measured."""
        return Case(measure, shape, size, body, at_once=2 if at_once else 1, gc=gc).key

    def reason(self, case: str, contestant: str) -> str:
        """Say why there is no figure."""
        for figure in self.figures:
            if figure.case == case and figure.contestant == contestant and figure.status != "ok":
                return f"{figure.status}: {figure.reason}"
        return self.absent.get(contestant, "not part of this run")


def stages(case: Case) -> int:
    """How many stages are run in one run of a case."""
    return len(shape(case.shape, case.size)) * case.at_once


def per_stage(case: Case) -> float:
    """What turns seconds per run into µs per stage."""
    return 1e6 / stages(case)


def keys_of(cases: Sequence[Case]) -> dict[str, Case]:
    """Give cases by their keys."""
    return {case.key: case for case in cases}
