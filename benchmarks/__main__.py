"""The command: ``python -m benchmarks`` measures, ``python -m benchmarks report FILE`` shows what was measured."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.cases import cases
from benchmarks.figures import Results
from benchmarks.page import write
from benchmarks.picture import draw
from benchmarks.report import show
from benchmarks.run import Conductor, Plan, pythons


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what the bounds need, in less than two minutes")
    parser.add_argument("--rounds", type=int, help="how often everything is measured: 3 (quick), 5")
    parser.add_argument("--peers", metavar="DIRECTORY", type=Path, help="where the peers' environments are")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that one process may take: 60")
    # Not where temporary files go: that is often memory, where a commit costs next to nothing.
    disk = Path("build", "tmp")
    parser.add_argument("--disk", metavar="DIRECTORY", type=Path, default=disk, help=f"where to write runs: {disk}")
    parser.add_argument("--only", metavar="WORDS", help="only cases with this in their name, as in --only 'time fan'")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to write the results")
    commands = parser.add_subparsers(dest="command")
    report = commands.add_parser("report", help="show results; make the picture and the tables of the documentation")
    report.add_argument("results", type=Path, help="a file that was written by --json")
    report.add_argument("--page", metavar="DIRECTORY", type=Path, help="where to write the page's picture and tables")
    asked = parser.parse_args()

    # Nothing is folded or cut where the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if asked.command == "report":
        results = Results.read(asked.results)
        if asked.page is not None:
            (asked.page / "picture.svg").write_text(draw(results), encoding="utf-8")
            for name, text in write(results).items():
                (asked.page / f"{name}.txt").write_text(text, encoding="utf-8")
    else:
        results = run(asked)
        if asked.json is not None:
            results.write(asked.json)
    show(results, console)


def run(asked: argparse.Namespace) -> Results:
    """Measure what is asked for."""
    from benchmarks.machine import machine  # noqa: PLC0415  # it needs pyperf; showing results does not

    taking_part, absent = pythons(asked.peers)
    chosen = [case for case in cases(quick=asked.quick) if (asked.only or "") in case.key]
    results = Results(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        mode="quick" if asked.quick else "full",
        rounds=asked.rounds or (3 if asked.quick else 5),
        machine=machine(),
        absent=absent,
        cases=chosen,
    )
    plan = Plan(chosen, results.rounds, taking_part, asked.patience, asked.disk)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    # Who loses patience keeps what has been found.
    with suppress(KeyboardInterrupt), errors.status("measuring") as status:
        # Where nothing can be shown in place, every step is a line of its own.
        Conductor(plan, results, status.update if errors.is_terminal else errors.print).conduct()
    return results


if __name__ == "__main__":
    main()
