"""``stageflow demo``: audits what is installed, shows how far it is, and prints what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from stageflow.commands.conducting import PIPELINE, Opening, conduct, how_to_go_on
from stageflow.commands.ending import Exit, UsageError
from stageflow.commands.finding import hint
from stageflow.context import PipelineContext
from stageflow.demo import Audit, Target, audit_of, audit_pipeline, find_targets, normalised, settled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow.commands.stores import Place
    from stageflow.engine import Run

__all__ = ["AUDIT", "audit", "demo", "recorded_targets"]

AUDIT = "stageflow.demo"
"""What a recorded run of the audit says that it is of; its pipeline depends on what is installed."""

_ROWS = 40  # of the table of findings
_REFRESH = 0.05  # seconds between two pictures of the progress


def demo(only: Sequence[str], place: Place | None, *, as_json: bool, trace: bool) -> Exit:
    """Audits what is installed."""
    targets = _chosen(find_targets(), only)
    graph = audit_pipeline(targets).build()
    context = PipelineContext(
        metadata={PIPELINE: AUDIT},
        data={"environment": sys.prefix, "distributions": [target.name for target in targets]},
    )
    return audit(lambda store: graph.open(context, store=store), targets, place, as_json=as_json, trace=trace)


def recorded_targets(data: object) -> list[Target]:
    """Finds the distributions again that an audit was begun with, as far as they are still there.

    Args:
        data: The data of its run.

    Raises:
        UsageError: They are those of another environment.
    """
    begun = cast("Mapping[str, Any]", data if isinstance(data, Mapping) else {})
    if begun.get("environment") != sys.prefix:
        raise UsageError(f"this audit is of {begun.get('environment')!r}; go on with it there, not in {sys.prefix!r}")
    names = set(begun.get("distributions", ()))
    return [target for target in find_targets() if target.name in names]


def audit(opening: Opening, targets: Sequence[Target], place: Place | None, *, as_json: bool, trace: bool) -> Exit:
    """Has an audit go until it has ended, and prints what it has found by then.

    Args:
        opening: What opens its run.
        targets: What is audited.
        place: Where it is recorded, if it is.
        as_json: Whether to print one JSON object, and nothing else.
        trace: Whether to draw how it went.
    """
    console = Console()

    async def beside(run: Run) -> None:
        await _show_progress(console, run, targets)

    watched = console.is_interactive and not as_json
    outcome = conduct(opening, place, as_json=as_json, beside=beside if watched else None)
    results = outcome.results
    found = audit_of(results, targets)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _print_audit(console, found)
        if trace:
            console.print()
            console.print(results.trace)
    if outcome.interrupted:
        raise KeyboardInterrupt(how_to_go_on(results.run_id, place, results.tenant))
    if outcome.error is not None:
        raise outcome.error
    return Exit.WELL if found.clean else Exit.FAILED


def _chosen(targets: Sequence[Target], only: Sequence[str]) -> list[Target]:
    chosen: dict[str, Target] = {}
    for name in only:
        found = [target for target in targets if target.name.partition(" ")[0] == normalised(name)]
        if not found:
            known = {target.name.partition(" ")[0] for target in targets}
            raise UsageError(f"no distribution {name!r} is installed{hint(normalised(name), known)}")
        chosen.update((target.name, target) for target in found)
    return list(chosen.values()) if only else list(targets)


async def _show_progress(console: Console, run: Run, targets: Sequence[Target]) -> None:
    """Draws a bar until the run has ended. The drawing is done in this task, and nothing else is redirected to it."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("distributions"), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        bar = progress.add_task("audit", total=len(targets))
        while True:
            progress.update(bar, completed=settled(run.results, targets), refresh=True)
            with trio.move_on_after(_REFRESH):
                await run.wait()
                return


def _print_audit(console: Console, audit: Audit) -> None:
    if audit.findings:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("Distribution", overflow="fold", max_width=24)
        table.add_column("File", overflow="fold", min_width=20)
        table.add_column("Problem", style="red", overflow="fold", max_width=32)
        for finding in audit.findings[:_ROWS]:
            problem = f"{finding.problem}: {finding.detail}" if finding.detail else finding.problem
            table.add_row(*map(Text, (finding.distribution, finding.path, problem)))
        console.print(table)
        if len(audit.findings) > _ROWS:
            console.print(Text(f"and {len(audit.findings) - _ROWS:,} more; --json gives them all", "italic"))
        console.print()
    told = {finding.distribution for finding in audit.findings if finding.problem == "unreadable"}
    _print_reasons(console, {name: reason for name, reason in audit.failed.items() if name not in told})
    _print_reasons(console, audit.skipped)
    console.print(_summary(audit))


def _print_reasons(console: Console, reasons: Mapping[str, str]) -> None:
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    for reason, names in together.items():
        console.print(Text.assemble(("Not audited: ", "yellow"), f"{', '.join(names)} ({reason})"))
    if together:
        console.print()


def _summary(audit: Audit) -> Text:
    problems = [f"{len(audit.findings):,} finding{'s'[: len(audit.findings) != 1]}"] if audit.findings else []
    problems += [f"{len(audit.failed):,} could not be read"] if audit.failed else []
    verified = f"{audit.verified:,} of {audit.distributions:,} distributions verified"
    if audit.interrupted:
        found = ", ".join(problems) or "no findings"
        return Text.assemble(("Interrupted. ", "bold yellow"), f"{verified} so far, {found}.")
    verified = f"{verified}: {audit.files:,} files, {decimal(audit.bytes)}, {audit.seconds:.2f} s."
    if problems:
        return Text.assemble((f"{', '.join(problems)}. ", "bold red"), verified)
    return Text.assemble(("Clean. ", "bold green") if audit.verified else ("Nothing to compare. ", "yellow"), verified)
