"""``stageflow run`` and ``stageflow resume``: pipelines that go, and that go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

import attrs
import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stageflow.commands import auditing
from stageflow.commands.conducting import PIPELINE, Outcome, conduct, how_to_go_on
from stageflow.commands.ending import Exit, UsageError, exit_of, ways_on
from stageflow.commands.finding import graph_at
from stageflow.commands.plain import plain_plan, plain_results
from stageflow.context import PipelineContext
from stageflow.demo import audit_pipeline
from stageflow.engine import Run, open_run
from stageflow.engine.durable import MAX_RECOVERIES, resuming
from stageflow.errors import PipelineTerminated, StoreError
from stageflow.journal import RunStatus
from stageflow.journal.codec import Undecodable, decode
from stageflow.journal.resume import load
from stageflow.journal.store import RunInfo

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from stageflow.commands.stores import Place
    from stageflow.journal.plan import ResumePlan
    from stageflow.journal.store import Store
    from stageflow.running import StageGraph

__all__ = ["Manner", "resume", "run"]


# run


def run(
    where: str, place: Place | None, *, given: str | None, run_id: str | None, tenant: str | None, as_json: bool
) -> Exit:
    """Runs a pipeline, and prints how it went."""
    graph = graph_at(where)
    data = {} if given is None else {"data": _parsed(given)}
    context = PipelineContext(run_id=run_id, tenant=tenant, metadata={PIPELINE: where}, **data)
    outcome = conduct(lambda store: graph.open(context, store=store), place, as_json=as_json)
    return _report(outcome, place, as_json=as_json)


def _parsed(given: str) -> Any:
    """Reads the data of a run: JSON, or where that is."""
    try:
        if given == "-":
            given = sys.stdin.read()
        elif given.startswith("@"):
            given = Path(given[1:]).read_text("utf-8")
        return json.loads(given, parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"--input cannot be read: {error.strerror}: {error.filename!r}") from error
    except ValueError as error:
        raise UsageError(f"--input is no JSON: {error}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is none")


def _report(outcome: Outcome, place: Place | None, *, as_json: bool) -> Exit:
    results, error = outcome.results, outcome.error
    if as_json:
        print(json.dumps(plain_results(results), indent=2))
    else:
        Console().print(results.trace)
    on = how_to_go_on(results.run_id, place, results.tenant)
    if outcome.interrupted:
        raise KeyboardInterrupt(on)
    if error is None:
        return Exit.WELL
    if not isinstance(error, PipelineTerminated):
        raise error
    if on:
        print(f"stageflow: {on}", file=sys.stderr)
    return exit_of(error)  # the trace says why


# resume


@final
@attrs.frozen(kw_only=True)
class Manner:
    """How to resume.

    Attributes:
        on_change: What it means that the code of a stage that has ended is not what it was.
        in_doubt: What becomes of a stage with effects that is not known to have ended.
        unpark: Whether to resume a run even if its process has died again and again.
        tenant: On whose behalf.
    """

    on_change: str = "refuse"
    in_doubt: str = "rerun"
    unpark: bool = False
    tenant: str | None = None


@final
@attrs.frozen
class _Recorded:
    """What is known of a run that is to be resumed: as it is listed, which pipeline it is of, and its data."""

    info: RunInfo
    where: str | None
    data: Any


def resume(run_id: str, where: str | None, place: Place, manner: Manner, *, plan_only: bool, as_json: bool) -> Exit:
    """Goes on with a run, and prints how it went; or says what that would mean, stage by stage."""
    place.check()
    recorded = trio.run(_recorded, run_id, place, manner.tenant)
    where = where or recorded.where
    if where is None:
        raise UsageError(
            f"run {run_id} was not started by this command, so say of what: resume {run_id} MODULE:PIPELINE"
        )
    audited = auditing.recorded_targets(recorded.data) if where == recorded.where == auditing.AUDIT else None
    graph = graph_at(where) if audited is None else audit_pipeline(audited).build()
    if plan_only:
        return _plan(graph, recorded.info, place, manner, as_json=as_json)

    def opening(store: Store | None) -> AbstractAsyncContextManager[Run]:
        assert store is not None
        begin = resuming(
            run_id,
            store,
            tenant=manner.tenant,
            on_change=manner.on_change,
            in_doubt=manner.in_doubt,
            unpark=manner.unpark,
        )
        return open_run(graph, PipelineContext(), begin)

    if audited is not None:
        return auditing.audit(opening, audited, place, as_json=as_json, trace=True)
    return _report(conduct(opening, place, as_json=as_json), place, as_json=as_json)


async def _recorded(run_id: str, place: Place, tenant: str | None) -> _Recorded:
    async with place.open(read_only=True) as store:
        info, history, blobs = await load(store, run_id, tenant=tenant)
    started = history.started
    if started is None or started.context is None:
        raise StoreError(f"the journal of run {run_id} is damaged: it does not begin with a beginning", run_id=run_id)
    try:
        context: Mapping[str, Any] = decode(started.context, blobs.__getitem__)
    except Undecodable:  # there is a class in it that this command has not put there
        return _Recorded(info, None, None)
    where = context["metadata"].get(PIPELINE)
    # The data of any other pipeline may be of a class that can be imported only when that was found.
    data = decode(history.value, blobs.__getitem__) if where == auditing.AUDIT and history.value else None
    return _Recorded(info, where, data)


def _plan(graph: StageGraph, info: RunInfo, place: Place, manner: Manner, *, as_json: bool) -> Exit:
    async def ask() -> ResumePlan:
        async with place.open(read_only=True) as store:
            return await graph.plan_resume(
                info.run_id,
                store=store,
                tenant=manner.tenant,
                on_change=manner.on_change,
                in_doubt=manner.in_doubt,
            )

    plan = trio.run(ask)
    hindrances = _hindrances(plan, info, manner)
    if as_json:
        print(json.dumps({**plain_plan(plan), "hindrances": hindrances}, indent=2))
    else:
        _print_plan(plan, hindrances)
    return Exit.REFUSED if hindrances else Exit.WELL


def _hindrances(plan: ResumePlan, info: RunInfo, manner: Manner) -> list[str]:
    """Says why a run cannot be resumed just now, and what to do about it."""
    found: list[str] = []
    if plan.undone:
        found.append("it was undone; start a new one with fork()")
    if info.held:
        found.append(f"it is in the hands of {info.holder}")
    deaths = info.recoveries + (info.status is RunStatus.RUNNING)
    if deaths > MAX_RECOVERIES and not manner.unpark and not info.held:
        found.append(f"it was resumed {info.recoveries} times, and each time its process died; say --unpark")
    if plan.blocked:
        found.append(f"it needs a word on what is marked with !; say {ways_on(plan)}")
    return found


def _print_plan(plan: ResumePlan, hindrances: list[str]) -> None:
    console = Console()
    console.print(Text(f"Resuming run {plan.run_id} of {plan.pipeline!r}:"))
    console.print()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", style="bold red")
    table.add_column("Stage", overflow="fold", max_width=32)
    table.add_column("Action", no_wrap=True)
    table.add_column("Why", overflow="fold")
    for name, step in plan.steps.items():
        row = ("!" if step.blocks else "", name, step.action.value, step.reason)
        table.add_row(*map(Text, row), style="red" if step.blocks else None)
    console.print(table)
    console.print()
    if plan.over:
        console.print(Text("The run is over: nothing is run again."))
    for hindrance in hindrances:
        console.print(Text.assemble(("Refused: ", "bold red"), f"{hindrance}."))
    if not plan.over and not hindrances:
        console.print(Text.assemble(("It can be resumed.", "bold green")))
