"""Shows results as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from benchmarks.bounds import bounds
from benchmarks.contestant import CONTESTANTS
from benchmarks.figures import Results, Spread, per_stage

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.cases import Case

__all__ = ["show"]


def show(results: Results, console: Console) -> None:
    """Print what was found: all figures, what could not be measured, and the bounds."""
    machine = results.machine
    console.print(
        f"{results.mode} run of {results.made}, {results.rounds} rounds; Python {machine.get('python')}, "
        f"trio {machine.get('trio')}, revision {machine.get('revision')}, {machine.get('cpu_count')} CPUs"
    )
    console.print(_figures(results))
    missing = _missing(results)
    if missing.row_count:
        console.print(missing)
    console.print(_bounds(results))


def _figures(results: Results) -> Table:
    """µs per stage, or whatever the case measures: a row for every case."""
    table = Table(title="Medians over the rounds, with the least and the greatest")
    table.add_column("case")
    table.add_column("contestant")
    for title in ("CPU", "", "wall", "build", "stageflow ÷ it"):
        table.add_column(title, justify="right")
    for case in results.cases:
        first = True
        for key in CONTESTANTS:
            row = _row(results, case, key)
            if row is not None:
                ratio = results.ratio(case.key, "stageflow", key, case.counts)
                style = "bold" if key == "stageflow" else ""
                against = "" if key == "stageflow" or ratio is None else f"{ratio.median:.2f}"
                table.add_row(case.key if first else "", CONTESTANTS[key].title, *row, against, style=style)
                first = False
        if not first:
            table.add_section()
    return table


def _row(results: Results, case: Case, key: str) -> tuple[str, str, str, str] | None:
    if case.measure == "memory":
        used = results.spread(case.key, key, "bytes")
        used = used and used.scaled(1 / case.size / 1000)
        return (f"{used.median:.2f} kB", _range(used), "", "") if used else None
    cpu, wall = results.spread(case.key, key), results.spread(case.key, key, "wall")
    if cpu is None or wall is None:
        return None
    build = results.spread(case.key, key, "build_cpu")
    if case.measure in {"cancel", "import", "reload"}:
        cpu, wall = cpu.scaled(1e3), wall.scaled(1e3)
        leaked = results.spread(case.key, key, "leaked")
        leaks = f"{leaked.greatest:.0f} leaked" if leaked and leaked.greatest else ""
        return f"{cpu.median:.1f} ms", _range(cpu), f"{wall.median:.1f} ms", leaks
    cpu, wall = cpu.scaled(per_stage(case)), wall.scaled(per_stage(case))
    built = f"{build.median * per_stage(case) * case.at_once:.1f} µs" if build else ""
    return f"{cpu.median:.2f} µs", _range(cpu if case.counts == "cpu" else wall), f"{wall.median:.2f} µs", built


def _range(found: Spread) -> str:
    return f"{found.least:.2f}–{found.greatest:.2f}"


def _missing(results: Results) -> Table:
    table = Table(title="Not measured")
    table.add_column("contestant")
    table.add_column("case")
    table.add_column("why")
    for key, reason in results.absent.items():
        table.add_row(CONTESTANTS[key].title, "all", reason)
    seen: set[tuple[str, str]] = set()
    for figure in results.figures:
        if figure.status != "ok" and (figure.case, figure.contestant) not in seen:
            seen.add((figure.case, figure.contestant))
            table.add_row(CONTESTANTS[figure.contestant].title, figure.case, f"{figure.status}: {figure.reason}")
    return table


def _bounds(results: Results) -> Table:
    table = Table(title="What it may cost (medians of the ratios: of CPU time, where nothing else is said)")
    table.add_column("what")
    table.add_column("against")
    table.add_column("found", justify="right")
    table.add_column("", justify="right")
    table.add_column("at most", justify="right")
    table.add_column("")
    table.add_column("note")
    for bound in bounds(results):
        found, limit = "", f"{bound.limit:g}{bound.unit}"
        verdict = Text("not measured", style="dim")
        if bound.found is not None:
            found = f"{bound.found.median:.2f}{bound.unit}"
            verdict = Text("ok", style="green") if bound.holds else Text("missed", style="bold red")
        spread = _range(bound.found) if bound.found else ""
        table.add_row(bound.what, bound.against, found, spread, limit, verdict, bound.note)
    return table
