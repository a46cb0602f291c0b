"""Writes results as the tables of the documentation, so that no figure in it is typed by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.bounds import bounds
from benchmarks.contestant import COMMIT, CONTESTANTS, FLOORS, OURS, PEERS
from benchmarks.figures import keys_of, per_stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.contestant import Entry
    from benchmarks.figures import Results

__all__ = ["PARTS", "write"]

COLUMNS = (
    ("chain of 1,000", "time chain 1000 return"),
    ("… that checkpoint", "time chain 1000 checkpoint"),
    ("fan-out of 1,000", "time fan 1000 return"),
    ("… that checkpoint", "time fan 1000 checkpoint"),
    ("layered 100 × 100", "time layered 100 return"),
    ("diamond", "time diamond 3 return"),
    ("1,000 at once", "time diamond 3 return at once"),
    ("1,000 asleep", "time fan 1000 sleep"),
)
DURABLE = (("chain of 1,000", "durable chain 1000"), ("fan-out of 1,000", "durable fan 1000"))


def write(results: Results) -> dict[str, str]:
    """Give the parts of the page, in Markdown, by name."""
    return {name: "\n".join(part(results)) + "\n" for name, part in PARTS.items()}


def _made(results: Results) -> Iterator[str]:
    machine = results.machine
    yield (
        f"Made on {results.made[:10]} by a {results.mode} run of {results.rounds} rounds, with Python "
        f"{machine.get('python', '?')} and Trio {machine.get('trio', '?')}, on {machine.get('cpu_count', '?')} CPUs "
        f"({machine.get('cpu_model_name', 'of an unknown model')}), at revision `{machine.get('revision', '?')}`. "
        f"(A `+` after the revision: with changes not committed yet.)"
    )


def _bounds(results: Results) -> Iterator[str]:
    yield from _head(["", "against", "found", "from … to", "at most", "", ""])
    for bound in bounds(results):
        found = scope = ""
        verdict = "not measured"
        if bound.found is not None:
            found = f"{bound.found.median:.2f}{bound.unit}"
            scope = f"{bound.found.least:.2f} … {bound.found.greatest:.2f}"
            verdict = "ok" if bound.holds else "**missed**"
        yield _row([bound.what, bound.against, found, scope, f"{bound.limit:g}{bound.unit}", verdict, bound.note])


def _floors(results: Results) -> Iterator[str]:
    yield from _costs(results, [*FLOORS, OURS])


def _peers(results: Results) -> Iterator[str]:
    yield from _costs(results, [OURS, *PEERS])
    yield ""
    yield "Cancelling 1,000 branches that sleep, and what it left behind:"
    yield ""
    yield from _head(["", "CPU", "tasks left"])
    key = "cancel fan 1000"
    for entry in (CONTESTANTS["floor_branch"], OURS, *PEERS):
        cpu, leaked = results.spread(key, entry.key), results.spread(key, entry.key, "leaked")
        if cpu is not None and leaked is not None:
            yield _row([entry.title, f"{cpu.median * 1000:.1f} ms", f"{leaked.greatest:.0f}"])


def _costs(results: Results, entries: Sequence[Entry]) -> Iterator[str]:
    cases = keys_of(results.cases)
    columns = [(title, cases[key]) for title, key in COLUMNS if key in cases]
    yield from _head(["CPU µs per stage", *(title for title, _ in columns)])
    for entry in entries:
        if entry.key in results.absent:
            continue
        cells: list[str] = []
        for _, case in columns:
            found = results.spread(case.key, entry.key)
            cells.append("–" if found is None else _cost(found.median * per_stage(case)))
        yield _row([f"**{entry.title}**" if entry is OURS else entry.title, *cells])


def _missing(results: Results) -> Iterator[str]:
    for key, reason in results.absent.items():
        yield f"- {CONTESTANTS[key].title}: {reason}."
    reasons: dict[tuple[str, str], list[str]] = {}
    for figure in results.figures:
        cases = reasons.setdefault((figure.contestant, f"{figure.status}: {figure.reason}"), [])
        if figure.status != "ok" and figure.case not in cases:
            cases.append(figure.case)
    for (contestant, reason), cases in reasons.items():
        if cases:
            yield f"- {CONTESTANTS[contestant].title}, {', '.join(f'*{case}*' for case in cases)}: {_plain(reason)}."


def _durable(results: Results) -> Iterator[str]:
    """What it costs to write each stage down: wall time, since most of it is waiting, and CPU time beside that."""
    cases = keys_of(results.cases)
    columns = [(title, cases[key]) for title, key in DURABLE if key in cases]
    yield from _head(["µs per stage", *(head for title, _ in columns for head in (title, "… of CPU time"))])
    for entry in (COMMIT, OURS, *PEERS):
        found = [(case, results.spread(case.key, entry.key, what)) for _, case in columns for what in ("wall", "cpu")]
        if any(each for _, each in found):
            cells = ["–" if each is None else _cost(each.median * per_stage(case)) for case, each in found]
            yield _row([f"**{entry.title}**" if entry is OURS else entry.title, *cells])


def _collector(results: Results) -> Iterator[str]:
    cases = keys_of(results.cases)
    yield from _head(["CPU µs per stage", "fan-out of 100", "of 10,000", "growth"])
    for entry in (CONTESTANTS["floor_branch"], OURS):
        for ending, words in (("", ""), (" no gc", ", collector off")):
            costs: list[float] = []
            for size in (100, 10_000):
                case = cases.get(f"time fan {size} return{ending}")
                found = None if case is None else results.spread(case.key, entry.key)
                if case is not None and found is not None:
                    costs.append(found.median * per_stage(case))
            if len(costs) == 2:
                growth = f"{costs[1] / costs[0]:.2f}×"
                yield _row([entry.title + words, *(f"{cost:.1f}" for cost in costs), growth])


def _cost(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 10 else f"{microseconds:.2g}"


def _head(titles: Sequence[str]) -> Iterator[str]:
    yield _row(titles)
    yield _row(["---", *["--:"] * (len(titles) - 1)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) if '|' in cell else cell for cell in cells)} |"


def _plain(words: str) -> str:
    """Take the words of somebody else's error as words."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|" else character for character in words)


PARTS = {
    "made": _made,
    "bounds": _bounds,
    "floors": _floors,
    "peers": _peers,
    "missing": _missing,
    "durable": _durable,
    "collector": _collector,
}
