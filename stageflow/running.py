"""Running: `StageGraph`, and `run_stage` to try one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast, final

import attrs

from stageflow.context import PipelineContext, StageContext
from stageflow.engine import Begin, PipelineResults, Run, open_run, run_to_end
from stageflow.errors import DefinitionError
from stageflow.graph import Graph
from stageflow.journal import StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import Runner, Settings, StageOptions, caller, declare, name_of

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from attrs import AttrsInstance
    from rich.console import RenderableType

    from stageflow.journal.plan import ResumePlan
    from stageflow.journal.resume import Probe
    from stageflow.journal.store import Store

__all__ = ["StageGraph", "run_stage"]


@final
class StageGraph(Graph):
    """A validated, frozen DAG of stages.

    It holds no state of any run, so any number of concurrent runs may share it. `Pipeline.build` makes it.
    """

    __slots__ = ()

    async def run(
        self,
        ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None,
        *,
        store: Store | None = None,
    ) -> PipelineResults:
        """Runs the graph in the calling task, and waits until everything has ended.

        The stages of the trunk run in the calling task itself. What they set in context variables stays set there.

        Args:
            ctx: What the stages shall know: a `PipelineContext`; a mapping or an attrs instance, which is taken as its
                `data`; or nothing.
            store: Where the run is recorded, so that it survives its process; see `open_store` and `resume`.

        Returns:
            The outputs of all stages that succeeded, and a record of every stage. The run's status is then `SUCCEEDED`,
            or `PARTIAL` if stages were skipped, cancelled with their branch, or failed and were tolerated.

        Raises:
            ContractViolation: The data is not what the pipeline's ``inputs=`` declares; nothing has started.
            StageExecutionError: A stage failed; a `StageTimeoutError` if its limit was the reason, or if the run has
                reached its deadline.
            UnifiedPipelineCancelled: A stage returned `StageOutput.cancel`.
            CheckpointError: The run could not be recorded. `UnstorableValueError`: a value would not be the same again;
                `StoreError`: the store failed; `LeaseLostError`: another process has the run; `RunExistsError`: there
                is a run of that id, and nothing has started. What else the run would have raised is its cause, and
                what had finished is in its `results`.
            trio.Cancelled: A scope around the call was cancelled; all stages have been cancelled, and have ended. To
                see what had finished by then, use `open`.
        """
        return await run_to_end(self, _as_context(ctx), None if store is None else _beginning(store))

    async def resume(
        self,
        run_id: str,
        *,
        store: Store,
        tenant: str | None = None,
        on_change: str = "refuse",
        in_doubt: str | Probe = "rerun",
        unpark: bool = False,
    ) -> PipelineResults:
        """Goes on with a run from where it failed, was cancelled, was interrupted, or its process died.

        What succeeded is not run again, nor what a stage or the caller had skipped or cancelled with its branch. What
        failed, was cancelled or was cut short runs again, and what never ran runs, in the form that it has now. Limits
        and deadlines begin anew.

        Args:
            run_id: The run.
            store: Where it is recorded.
            tenant: On whose behalf.
            on_change: What it means that the code of a stage that has ended is not what it was: ``"refuse"`` to
                resume, ``"reuse"`` what it gave, or ``"rerun"`` it and what comes after. The last two also accept that
                stages of which something is recorded are no longer there.
            in_doubt: What becomes of a stage with effects (`StageKind.WORK`) that was entered, and is not known to have
                ended: ``"rerun"`` it, ``"hold"`` and do not resume, or an async function of its name and its
                `idempotency_key` that finds out: it returns what the stage gave, as `StageOutput.ok`, or `None` if it
                took no effect, and it is run again then.
            unpark: Whether to resume it even if its process has died again and again.

        Returns:
            As `run` does. A run that is over already is not run again: its results are returned.

        Raises:
            ResumeRefusedError: Something has changed, or is in doubt; `plan` says what, and nothing has been done.
            LeaseLostError: Another process has the run in hand.
            RunParkedError: Its process has died too often.
            UnknownRunError: There is no such run.
            TenantMismatchError: It is another tenant's.
            StageflowError: What `run` raises, for the same reasons.
            trio.Cancelled: As in `run`.
        """
        from stageflow.engine.durable import resuming

        begin = resuming(run_id, store, tenant=tenant, on_change=on_change, in_doubt=in_doubt, unpark=unpark)
        return await run_to_end(self, _NO_CONTEXT, begin)

    async def plan_resume(
        self,
        run_id: str,
        *,
        store: Store,
        tenant: str | None = None,
        on_change: str = "refuse",
        in_doubt: str | Probe = "rerun",
    ) -> ResumePlan:
        """Says what `resume` would do with every stage, and why. It does nothing, and takes nothing in hand.

        Raises:
            UnknownRunError: There is no such run.
            TenantMismatchError: It is another tenant's.
            StoreError: What is recorded of it is damaged.
        """
        from stageflow.engine.durable import plan_resume

        return await plan_resume(self, run_id, store, tenant=tenant, on_change=on_change, in_doubt=in_doubt)

    async def fork(
        self,
        run_id: str,
        *,
        from_stage: str,
        store: Store,
        tenant: str | None = None,
        on_change: str = "refuse",
        fork_id: str | None = None,
    ) -> PipelineResults:
        """Runs a stage of another run, and all that comes after it, in a new run; the rest is taken from the other one.

        The other run stays as it is.

        Args:
            run_id: The other run.
            from_stage: The stage from which on things are to be done again.
            store: Where the other run is recorded, and this one will be.
            tenant: On whose behalf.
            on_change: As in `resume`, for the stages that are taken over.
            fork_id: The new run's id; if left out, it draws one.

        Returns:
            As `run` does.

        Raises:
            UnknownStageError: There is no stage of that name.
            ResumeRefusedError: Something has changed of what would be taken over.
            UnknownRunError: There is no such run.
            TenantMismatchError: It is another tenant's.
            StageflowError: What `run` raises, for the same reasons.
            trio.Cancelled: As in `run`.
        """
        from stageflow.engine.durable import forking

        begin = forking(run_id, store, from_stage=from_stage, tenant=tenant, on_change=on_change, fork_id=fork_id)
        return await run_to_end(self, _NO_CONTEXT, begin)

    def open(
        self,
        ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None,
        *,
        store: Store | None = None,
    ) -> AbstractAsyncContextManager[Run]:
        """Runs the graph beside a block: ``async with graph.open(ctx) as run``.

        Leaving the block waits until the run has ended, and raises what `Run.wait` raises, unless `Run.wait` has raised
        it in the block already. The end of the run does not cancel the block, however it ends: await `Run.wait` in
        the block to notice. An exception that leaves the block cancels the run, and goes on when the run has ended.

        Args:
            ctx: As in `run`.
            store: As in `run`.

        Returns:
            A context manager, which gives the `Run`.
        """
        return open_run(self, _as_context(ctx), None if store is None else _beginning(store))

    def build(self) -> StageGraph:
        """Gives the graph itself, so that it can stand wherever a pipeline can."""
        return self

    def to_mermaid(self) -> str:
        """Gives the graph as a Mermaid flowchart, with its branches as subgraphs."""
        from stageflow.trace.diagram import mermaid

        return mermaid(self)

    def __rich__(self) -> RenderableType:
        from stageflow.trace.diagram import tree

        return tree(self)


async def run_stage(
    runner: Runner,
    ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None,
    *,
    inputs: Mapping[str, StageOutput | Mapping[str, Any]] | None = None,
    **options: Unpack[StageOptions],
) -> StageOutput:
    """Runs one stage alone, under the very same context and clock that it has in a graph.

    Args:
        runner: What does the work; see `Pipeline.with_stage`.
        ctx: What the stage shall know; see `StageGraph.run`.
        inputs: The outputs of the stages it comes after, by name.
        **options: The options of `StageOptions`, except for ``after``, which follows from `inputs`.

    Returns:
        What the stage returned, as a `StageOutput`; one of status SKIP if its ``when=`` said no.

    Raises:
        DefinitionError: The runner or an option is wrong.
        StageExecutionError: The stage failed.
        UnifiedPipelineCancelled: The stage returned `StageOutput.cancel`.
    """
    if "after" in options:
        raise DefinitionError("run_stage() takes inputs= instead of after=: a mapping from names to outputs")
    name: str = name_of(runner) or str(getattr(runner, "__name__", type(runner).__name__))
    before = inputs or {}
    if not isinstance(cast("object", before), Mapping):
        raise DefinitionError(f"inputs= takes a mapping from names to outputs, not {before!r}")
    if name in before:
        raise DefinitionError(f"stage {name!r} cannot come after itself: rename that one of inputs=")
    graph = StageGraph(
        f"{name} alone",
        [declare(given, _giver(output), {"on_failure": "tolerate"}, None) for given, output in before.items()]
        + [declare(name, runner, {**options, "after": tuple(before)}, caller())],
        Settings(limits=dict.fromkeys(_as_names(options.get("uses", ())), 1)),
    )
    results = await graph.run(ctx)
    record = results.records[name]
    if record.output is not None:
        return record.output
    reason = "" if record.cause is None else record.cause.reason
    if record.state is StageState.SKIPPED:
        return StageOutput.skip(reason)
    if isinstance(record.error, Exception):
        return StageOutput(
            StageStatus.FAIL, record.partial, reason=reason, error=record.error, recoverable=record.recoverable
        )
    return StageOutput.cancel_branch(reason)


def _as_names(uses: object) -> tuple[str, ...]:
    return (uses,) if isinstance(uses, str) else tuple(cast("Iterable[str]", uses))


def _giver(output: StageOutput | Mapping[str, Any]) -> Callable[[StageContext], Coroutine[Any, Any, Any]]:
    async def give(_: StageContext) -> StageOutput | Mapping[str, Any]:
        return output  # noqa: ASYNC910  # the engine has checkpoints enough

    return give


_NO_CONTEXT = PipelineContext()


def _beginning(store: Store) -> Begin:
    from stageflow.engine.durable import beginning

    return beginning(store)


def _as_context(ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None) -> PipelineContext:
    if isinstance(ctx, PipelineContext):
        return ctx
    if ctx is None:
        return _NO_CONTEXT
    if isinstance(cast("object", ctx), Mapping) or attrs.has(type(ctx)):
        return PipelineContext(data=ctx)
    raise TypeError(
        f"a run takes a PipelineContext, a mapping or an attrs instance as its data, or nothing, not {ctx!r}; "
        f"anything else goes into PipelineContext(data=...)"
    )
