"""Running: `StageGraph`, and `run_stage` to try one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast, final

import attrs

from stageflow.context import PipelineContext, StageContext
from stageflow.engine import PipelineResults, Run, open_run, run_to_end
from stageflow.errors import DefinitionError
from stageflow.graph import Graph
from stageflow.journal import StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import Runner, Settings, StageOptions, caller, declare, name_of

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from attrs import AttrsInstance
    from rich.console import RenderableType

__all__ = ["StageGraph", "run_stage"]


@final
class StageGraph(Graph):
    """A validated, frozen DAG of stages.

    It holds no state of any run, so any number of concurrent runs may share it. `Pipeline.build` makes it.
    """

    __slots__ = ()

    async def run(self, ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None) -> PipelineResults:
        """Runs the graph in the calling task, and waits until everything has ended.

        The stages of the trunk run in the calling task itself. What they set in context variables stays set there.

        Args:
            ctx: What the stages shall know: a `PipelineContext`; a mapping or an attrs instance, which is taken as its
                `data`; or nothing.

        Returns:
            The outputs of all stages that succeeded, and a record of every stage. The run's status is then `SUCCEEDED`,
            or `PARTIAL` if stages were skipped, cancelled with their branch, or failed and were tolerated.

        Raises:
            ContractViolation: The data is not what the pipeline's ``inputs=`` declares; nothing has started.
            StageExecutionError: A stage failed; a `StageTimeoutError` if its limit was the reason, or if the run has
                reached its deadline.
            UnifiedPipelineCancelled: A stage returned `StageOutput.cancel`.
            trio.Cancelled: A scope around the call was cancelled; all stages have been cancelled, and have ended. To
                see what had finished by then, use `open`.
        """
        return await run_to_end(self, _as_context(ctx))

    def open(
        self, ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None
    ) -> AbstractAsyncContextManager[Run]:
        """Runs the graph beside a block: ``async with graph.open(ctx) as run``.

        Leaving the block waits until the run has ended, and raises what `Run.wait` raises, unless `Run.wait` has raised
        it in the block already. The end of the run does not cancel the block, however it ends: await `Run.wait` in
        the block to notice. An exception that leaves the block cancels the run, and goes on when the run has ended.

        Args:
            ctx: As in `run`.

        Returns:
            A context manager, which gives the `Run`.
        """
        return open_run(self, _as_context(ctx))

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
