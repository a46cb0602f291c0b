"""Runs with a store: how one is begun, resumed, forked, and what resuming it would do."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, cast

import attrs

from stageflow.context import ContextSnapshot, PipelineContext
from stageflow.context.ids import new_run_id
from stageflow.context.stage_context import key_of
from stageflow.engine.execution import Execution
from stageflow.errors import CompensationError, RunParkedError, StoreError, UnknownStageError, UnstorableValueError
from stageflow.journal import RunStatus, StageState
from stageflow.journal.book import Book
from stageflow.journal.codec import Undecodable, Unstorable, decode, encode
from stageflow.journal.events import RunEnded, RunResumed, StageSettled, write_event
from stageflow.journal.history import scope_within
from stageflow.journal.plan import Action, ResumePlan, refuse_if_blocked, resets
from stageflow.journal.resume import Policy, describe, load, plan_of
from stageflow.journal.scribe import Scribe
from stageflow.journal.store import Batch, Entry, Lease, NewRun, Store
from stageflow.journal.undo import CompensationStatus, UndoState
from stageflow.output import StageOutput, StageStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stageflow.engine.run import Begin
    from stageflow.graph import Graph
    from stageflow.journal.history import RunHistory, StageHistory
    from stageflow.journal.resume import Probe

__all__ = ["beginning", "forking", "plan_resume", "resuming"]

MAX_RECOVERIES = 5
"""How often a run whose process dies is resumed before somebody has to look at it."""


def beginning(store: Store) -> Begin:
    """Gives what begins a run that is recorded."""

    async def begin(graph: Graph, context: PipelineContext) -> Execution:
        if graph.admits is not None:  # what is kept is what the stages see
            context = attrs.evolve(context, data=graph.admits(context.data))
        run_id = context.run_id or new_run_id()
        return await _begin(
            graph, attrs.evolve(context, run_id=run_id), store, Scribe(Book(store, run_id, Policy()), "", run_id)
        )

    return begin


async def _begin(
    graph: Graph,
    context: PipelineContext,
    store: Store,
    scribe: Scribe,
    base: tuple[str, int, Sequence[str]] | None = None,
) -> Execution:
    assert context.run_id is not None
    book = scribe.book
    scribe.begin(graph, context, base=base)
    run = NewRun(
        run_id=context.run_id,
        pipeline=graph.name,
        tenant=context.tenant,
        began_at=scribe.began_at,
        base=None if base is None else base[0],
    )
    book.take(await store.create(run, book.batch()))
    return await _made(graph, context, scribe)


async def _made(graph: Graph, context: PipelineContext, scribe: Scribe) -> Execution:
    """Makes the run; if that cannot be done, the store is told that nobody has it in hand."""
    try:
        return Execution(graph, context, scribe=scribe)  # noqa: ASYNC910
    except BaseException:
        await scribe.book.close()  # noqa: ASYNC102  # shielded
        raise


async def plan_resume(
    graph: Graph, run_id: str, store: Store, *, tenant: str | None, on_change: str, in_doubt: str | Probe
) -> ResumePlan:
    """Says what resuming a run would do, and does nothing of it."""
    _, history, blobs = await load(store, run_id, tenant=tenant)
    return plan_of(history, graph, blobs, run_id, Policy(on_change=on_change, in_doubt=in_doubt))


def resuming(
    run_id: str,
    store: Store,
    *,
    tenant: str | None,
    on_change: str,
    in_doubt: str | Probe,
    unpark: bool,
) -> Begin:
    """Gives what goes on with a run that was recorded."""
    policy = Policy(on_change=on_change, in_doubt=in_doubt)

    async def begin(graph: Graph, _: PipelineContext) -> Execution:
        lease = await store.acquire(run_id, tenant=tenant)
        try:
            info, history, blobs = await load(store, run_id, tenant=tenant)
            recoveries = info.recoveries + (info.status is RunStatus.RUNNING)
            if recoveries > MAX_RECOVERIES and not unpark:
                raise RunParkedError(run_id, recoveries=info.recoveries)
            plan = plan_of(history, graph, blobs, run_id, policy)
            undone = history.compensation is not None
            if undone and history.compensated is CompensationStatus.COMPENSATED:
                if info.status is RunStatus.RUNNING:
                    await _end(store, lease, history)
                raise CompensationError(run_id)
            if not undone:
                refuse_if_blocked(plan)
            context = _context_of(history, blobs, run_id, tenant)
        except BaseException:
            await store.release(lease)  # noqa: ASYNC102  # shielded
            raise
        book = Book(store, run_id, policy, blobs)
        if plan.over:  # there is nothing to go on with, and nothing to be written
            await store.release(lease)
            scribe = _going_on(book, run_id, history, plan)
            scribe.over = None if history.ended is None else history.ended.ended
            return await _made(graph, context, scribe)
        book.take(lease)
        digest, description = describe(graph)
        resumed = RunResumed(
            holder=lease.holder,
            graph=digest,
            reset=() if undone else resets(plan, history),
            renamed=dict(plan.renamed),
            dropped=() if undone else tuple(name for name in plan.steps if name not in graph.stages),
            recoveries=recoveries,
        )
        history.apply(resumed, None, None)
        book.keep({digest: description})
        book.later(Entry("", None, *write_event(resumed)))
        try:
            if callable(in_doubt) and not undone:
                await _ask(in_doubt, book, history, blobs, tenant, context.run_id or "")
            await book.durable(book.send(status=RunStatus.RUNNING, recoveries=recoveries))
            if book.failure is not None:
                raise book.failure
        except BaseException:
            await book.close()  # noqa: ASYNC102
            raise
        return await _made(graph, context, _going_on(book, run_id, history, plan))

    return begin


async def _end(store: Store, lease: Lease, history: RunHistory) -> None:
    """Has it on record that a run has ended that was undone, if its process died before it could write that."""
    started = history.compensation
    assert started is not None
    last = max((undo.settled.ended or 0.0 for undo in history.stages.values() if undo.settled is not None), default=0.0)
    ended = RunEnded(status=started.status, ended=last, cause=started.cause)
    entries = [Entry("", None, *write_event(ended))]
    await store.append_nowait(lease, Batch(entries=entries, status=started.status, recoveries=0)).wait()


def _going_on(book: Book, run_id: str, history: RunHistory, plan: ResumePlan) -> Scribe:
    scribe = Scribe(book, "", run_id, history, plan.values)
    assert history.started is not None
    scribe.began_at = history.started.began_at
    return scribe


def forking(
    run_id: str,
    store: Store,
    *,
    from_stage: str,
    tenant: str | None,
    on_change: str,
    fork_id: str | None,
) -> Begin:
    """Gives what begins a run that goes on from a stage of another one."""
    policy = Policy(on_change=on_change)

    async def begin(graph: Graph, _: PipelineContext) -> Execution:
        if from_stage not in graph.stages:
            raise UnknownStageError(from_stage, graph.stages, where="fork(from_stage=...)")
        history, blobs = (await load(store, run_id, tenant=tenant))[1:]
        history.ended = None  # whether it was over does not matter to the fork
        # What was undone is not there any more, so nothing can be built on it.
        again = {from_stage, *(name for name, stage in history.stages.items() if _is_undone(name, stage, history))}
        for name, spec in graph.stages.items():  # in topological order
            if any(edge.stage in again for edge in spec.after):
                again.add(name)
        assert history.started is not None
        began_at = time.time()
        kept = history.select(
            (name for name in history.stages if name not in again), later=began_at - history.started.began_at
        )
        plan = plan_of(kept, graph, blobs, run_id, policy)
        refuse_if_blocked(plan)
        keeps = tuple(name for name in plan.of(Action.REUSE) if name in kept.stages)
        context = _context_of(history, blobs, run_id, tenant)
        context = attrs.evolve(context, run_id=fork_id or new_run_id(), correlation_id=context.correlation_id or run_id)
        assert context.run_id is not None
        book = Book(store, context.run_id, policy, blobs)
        scribe = Scribe(book, "", context.run_id, kept.select(keeps, later=0.0), plan.values)
        scribe.began_at = began_at
        return await _begin(graph, context, store, scribe, (run_id, history.length, keeps))

    return begin


def _is_undone(name: str, stage: StageHistory, history: RunHistory) -> bool:
    """Whether anything that a stage did was undone, or was to be."""
    undo = history.undos.get(name)
    if undo is not None and undo.state is not UndoState.NOT_NEEDED and undo.state is not UndoState.IRREVOCABLE:
        return True
    runs = stage.within.values()
    return any(_is_undone(inner, each, within) for within in runs for inner, each in within.stages.items())


def _context_of(history: RunHistory, blobs: Mapping[str, bytes], run_id: str, tenant: str | None) -> PipelineContext:
    """Makes the context of a run anew."""
    started = history.started
    if started is None or started.context is None or history.value is None:
        raise StoreError(f"the journal of run {run_id} is damaged: it does not begin with a beginning", run_id=run_id)
    try:
        data = decode(history.value, blobs.__getitem__)
        rest: Mapping[str, Any] = decode(started.context, blobs.__getitem__)
    except Undecodable as error:
        raise StoreError(
            f"what run {run_id} was given cannot be read any more: {error.path}: {error.why}", run_id=run_id
        ) from error
    return PipelineContext(
        run_id=run_id,
        correlation_id=started.correlation_id,
        tenant=tenant,
        data=data,
        snapshot=ContextSnapshot(rest["snapshot"]),
        artifacts=rest["artifacts"],
        metadata=rest["metadata"],
        timeouts=rest["timeouts"],
    )


async def _ask(  # noqa: ASYNC910  # as the probe does
    probe: Probe, book: Book, history: RunHistory, blobs: Mapping[str, bytes], tenant: str | None, run_id: str
) -> None:
    """Asks of every stage in doubt whether it took effect, also in runs within others; if so, it has succeeded."""
    for scope, key, pipeline, run, name, stage in _doubtful(history, blobs, "", run_id):
        output = await probe(name, key_of(tenant, pipeline, key, name))
        if output is None:
            continue
        if not isinstance(cast("object", output), StageOutput) or output.status is not StageStatus.OK:
            raise TypeError(f"the probe gave {output!r} for stage {name!r}; it gives StageOutput.ok(...), or None")
        try:
            value = encode(output.data, root="output")
        except Unstorable as error:
            raise UnstorableValueError(run_id=run_id, stage=name, path=error.path, why=error.why) from None
        event = StageSettled(
            state=StageState.SUCCEEDED, attempts=stage.attempts, started=stage.first, ended=stage.first
        )
        run.apply(event, name, value.text)
        entry = Entry(scope, name, *write_event(event), value.text)
        book.add(entry, StageState.SUCCEEDED, stage.attempts)
        book.keep(value.blobs)
        book.blobs = {**book.blobs, **value.blobs}


def _doubtful(
    history: RunHistory, blobs: Mapping[str, bytes], scope: str, key: str
) -> Sequence[tuple[str, str, str, RunHistory, str, StageHistory]]:
    found: list[tuple[str, str, str, RunHistory, str, StageHistory]] = []
    todo = [(history, scope, key)]
    for run, at, run_key in todo:  # grows on the way
        description: Mapping[str, Any] = json.loads(blobs[run.graph])
        effects = set(description["effects"])
        for name, stage in run.stages.items():
            if stage.settled is not None:
                continue
            if stage.running and name in effects:
                found.append((at, run_key, description["pipeline"], run, name, stage))
            for place, within in stage.within.items():
                # As `run_child` and `MapRun` make the key; a map is known by that its items are named after it.
                item = within.started is not None and within.started.run_id.endswith(f"/{name}[{place}]")
                inner = f"{run_key}/{name}[{place}]" if item else f"{run_key}/{name}/{place}"
                if within.started is not None:
                    todo.append((within, scope_within(at, name, place), inner))
    return found
