"""``stageflow show``, ``runs``, ``trace`` and ``prune``: what there is, how it went, and away with it."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stageflow.commands.conducting import how_to_go_on
from stageflow.commands.ending import Exit
from stageflow.commands.finding import graph_at
from stageflow.commands.plain import plain_info, plain_trace
from stageflow.journal import RunStatus, StageState
from stageflow.journal.resume import load
from stageflow.trace.recorded import trace_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stageflow.commands.stores import Place
    from stageflow.journal.store import RunInfo
    from stageflow.trace import Trace

__all__ = ["prune", "runs", "show", "trace"]

_WIDE = 160  # of the table of runs, in columns, if it goes into a pipe: there a run shall be one line
_STYLES = {
    "died": "bold red",
    RunStatus.RUNNING.value: "cyan",
    RunStatus.SUCCEEDED.value: "green",
    RunStatus.PARTIAL.value: "yellow",
    RunStatus.FAILED.value: "bold red",
    RunStatus.CANCELLED.value: "yellow",
    RunStatus.INTERRUPTED.value: "yellow",
}


def show(where: str, *, as_mermaid: bool) -> Exit:
    """Draws the graph of a pipeline."""
    graph = graph_at(where)
    if as_mermaid:
        print(graph.to_mermaid(), end="")
    else:
        Console().print(graph)
    return Exit.WELL


def runs(place: Place, *, unfinished: bool, limit: int | None, tenant: str | None, as_json: bool) -> Exit:
    """Lists the runs of a store."""

    async def read() -> Sequence[RunInfo]:
        async with place.open(read_only=True) as store:
            return await store.runs(tenant=tenant)

    infos = [info for info in trio.run(read) if not (unfinished and info.finished)][:limit]
    if as_json:
        print(json.dumps({"runs": [_plain(info) for info in infos]}, indent=2))
    elif infos:
        _print_runs(infos)
    else:
        print(f"There are no {'unfinished ' if unfinished else ''}runs in {place.name}.")
    return Exit.WELL


def trace(run_id: str, place: Place, *, tenant: str | None, as_json: bool) -> Exit:
    """Draws how a run went, or how far it is."""
    console = Console()

    async def look() -> tuple[RunInfo, Trace]:
        async with place.open(read_only=True) as store:
            info, history, blobs = await load(store, run_id, tenant=tenant)
        if not info.held or as_json:
            return info, trace_of(info, history, blobs)
        # It still goes, and what is drawn within Trio goes on until now.
        found = trace_of(info, history, blobs, started=trio.current_time() - (time.time() - info.began_at.timestamp()))
        console.print(found)
        return info, found

    info, found = trio.run(look)
    if as_json:
        print(json.dumps({**plain_trace(found), "held": info.held, "died": _died(info)}, indent=2))
    elif not info.held:
        console.print(found)
        if not info.finished:
            console.print()
            said = f"{'Its process has died; ' if _died(info) else ''}{how_to_go_on(run_id, place, tenant)}"
            console.print(Text(said[0].upper() + said[1:]), soft_wrap=True)
    return Exit.WELL


def prune(place: Place, *, older_than: float, dry_run: bool, tenant: str | None, as_json: bool) -> Exit:
    """Removes runs that came to an end long ago."""
    place.check()

    async def remove() -> Sequence[RunInfo]:
        async with place.open() as store:
            return await store.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)

    infos = trio.run(remove)
    if as_json:
        print(json.dumps({"dry_run": dry_run, "runs": [_plain(info) for info in infos]}, indent=2))
        return Exit.WELL
    if infos:
        _print_runs(infos)
        print()
    what = "would be removed" if dry_run else "removed"
    print(f"{len(infos):,} run{'s'[: len(infos) != 1]} {what}.")
    return Exit.WELL


def _died(info: RunInfo) -> bool:
    """Whether the process of a run has died."""
    return info.status is RunStatus.RUNNING and not info.held


def _plain(info: RunInfo) -> dict[str, object]:
    return {**plain_info(info), "died": _died(info)}


def _ended(stages: Mapping[str, int]) -> str:
    """Says how many stages have ended, and how many of them not well."""
    ended = sum(count for state, count in stages.items() if StageState(state).settled)
    notable = (StageState.FAILED.value, StageState.CANCELLED.value)
    of_these = ", ".join(f"{stages[state]:,} {state}" for state in notable if stages.get(state))
    return f"{ended:,} ({of_these})" if of_these else f"{ended:,}"


def _print_runs(infos: Sequence[RunInfo]) -> None:
    recovered = any(info.recoveries for info in infos)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("Run", no_wrap=True)
    table.add_column("Pipeline", overflow="fold")
    table.add_column("Status", no_wrap=True)
    table.add_column("Began (UTC)")
    table.add_column("Stages ended")
    if recovered:
        table.add_column("Recoveries", justify="right")
    for info in infos:
        status = "died" if _died(info) else info.status.value
        undone = () if info.compensation is None else (info.compensation.value,)
        row = [
            Text(info.run_id),
            Text(info.pipeline),
            Text(", ".join([status, *undone]), _STYLES.get(status, "")),
            Text(f"{info.began_at:%Y-%m-%d %H:%M:%S}"),
            Text(_ended(info.stages)),
        ]
        table.add_row(*row, *([Text(f"{info.recoveries:,}")] if recovered else []))
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=_WIDE if piped else None).print(table)
