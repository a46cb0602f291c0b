"""The front door: `Pipeline` to declare, `StageGraph` to run, `run_stage` to try one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast, final, overload

import attrs

from stageflow.context import PipelineContext, StageContext
from stageflow.engine import PipelineResults, Run, open_run, run_to_end
from stageflow.errors import DefinitionError, DuplicateStageError
from stageflow.graph import Graph
from stageflow.journal import StageState
from stageflow.output import StageOutput, StageStatus
from stageflow.stages import Dependency, OnFailure, Runner, StageOptions, StageSpec, caller, declare, name_of
from stageflow.stages.policy import check_member, check_name, check_timeout, dependencies, shown

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from rich.console import RenderableType

__all__ = ["Pipeline", "StageGraph", "run_stage"]

DEFAULT_TIMEOUT = 30.0
"""The limit in seconds on a stage of which neither it nor its pipeline says anything."""


@final
class Pipeline:
    """Declares the stages of a DAG. Immutable: every method that adds something returns a new pipeline.

    Pipelines share what they have in common, so that declaring n stages costs O(n). (Adding to one pipeline a second
    time, to make a variant, copies its index of names.)

    Args:
        name: What the pipeline is called.
        on_failure: What the failure of a stage means that does not say so itself: ``"fail_fast"``, ``"drain"`` or
            ``"isolate"``, see `OnFailure`.
        default_timeout: The limit in seconds on a stage that does not say so itself; `None` for none.

    Raises:
        DefinitionError: An argument is wrong.

    Example::

        async def fetch(ctx: StageContext) -> StageOutput:
            return StageOutput.ok(rows=[1, 2, 3])


        async def total(ctx: StageContext) -> StageOutput:
            return StageOutput.ok(total=sum(ctx.inputs["fetch"]["rows"]))


        pipeline = Pipeline("sums").with_stage("fetch", fetch).with_stage("total", total, after="fetch")
        results = trio.run(pipeline.run)
        assert results["total"]["total"] == 6
    """

    __slots__ = ("_graph", "_length", "_log", "default_timeout", "name", "on_failure")

    def __init__(
        self,
        name: str,
        *,
        on_failure: OnFailure | str = OnFailure.FAIL_FAST,
        default_timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        self.name = check_name(name, "a pipeline")
        if on_failure in {OnFailure.TOLERATE, OnFailure.TOLERATE.value}:
            raise DefinitionError('on_failure="tolerate" is for single stages: say it in with_stage()')
        self.on_failure = check_member(OnFailure, on_failure, "on_failure=", without=(OnFailure.TOLERATE,))
        self.default_timeout = check_timeout(default_timeout, "default_timeout")
        # Pipelines that grew out of each other share one log of declarations, of which each sees the first `_length`.
        self._log: dict[str, StageSpec] = {}
        self._length = 0
        self._graph: StageGraph | None = None

    @overload
    def with_stage(self, name: str, runner: Runner, /, **options: Unpack[StageOptions]) -> Pipeline: ...
    @overload
    def with_stage(self, runner: Runner, /, **options: Unpack[StageOptions]) -> Pipeline: ...
    def with_stage(
        self, name: str | Runner, runner: Runner | None = None, /, **options: Unpack[StageOptions]
    ) -> Pipeline:
        """Gives a pipeline with one more stage.

        Args:
            name: What the stage is called. May be left out if the runner has a name of its own, as what `stage`
                decorates and every `Stage` has.
            runner: What does the work: an async function of a `StageContext`, a `Stage`, or a class of stages, which is
                then instantiated once per run.
            **options: The options of `StageOptions`: ``kind``, ``after``, ``join``, ``when``, ``timeout``,
                ``on_failure``. They may name stages that are declared later.

        Raises:
            DefinitionError: The runner or an option is wrong; nothing has changed then.
            DuplicateStageError: There is a stage of that name.
        """
        frame = caller()
        if runner is None:
            if isinstance(name, str):
                raise DefinitionError(f"stage {name!r} has no runner; write with_stage({name!r}, runner)")
            if name_of(name) is None:
                raise DefinitionError(f"{shown(name)} has no name of its own; write with_stage('name', runner)")
            return self._with([declare(None, name, options, frame)])
        if not isinstance(name, str) and isinstance(cast("object", runner), str):
            raise DefinitionError(f"the name comes first: with_stage({runner!r}, {shown(name)})")
        return self._with([declare(name, runner, options, frame)])

    def compose(
        self, other: Pipeline, *, after: str | Dependency | Iterable[str | Dependency] = (), prefix: str = ""
    ) -> Pipeline:
        """Gives a pipeline with all stages of another one as well.

        The stages keep their options; what the other pipeline says for all of its stages (`on_failure`,
        `default_timeout`) does not come along.

        Args:
            other: The pipeline whose stages are added.
            after: The stages of this pipeline that the other one's first stages shall come after.
            prefix: Put, like ``"left."``, before the names of the stages that are added, also where they name each
                other, so that a pipeline can be composed several times.

        Raises:
            DuplicateStageError: A name is there already.
            DefinitionError: `after` is wrong.
        """
        if not isinstance(cast("object", other), Pipeline):
            raise DefinitionError(f"compose() takes a pipeline, not {shown(other)}")
        edges = dependencies(after, f"{prefix}*")
        own = {spec.name for spec in other._stages()}
        added: list[StageSpec] = []
        for spec in other._stages():
            inner = tuple(
                attrs.evolve(edge, stage=prefix + edge.stage) if edge.stage in own else edge for edge in spec.after
            )
            added.append(attrs.evolve(spec, name=prefix + spec.name, after=inner or edges))
        return self._with(added)

    def build(self) -> StageGraph:
        """Proves the declarations, and gives the graph, which can be run. A pipeline does that once, and keeps it.

        Raises:
            DefinitionError: There is no stage.
            UnknownStageError: A stage comes after one that is not there.
            CycleError: Stages wait for each other.

        Warns:
            DefinitionWarning: A stage needs all of several stages of which a route chooses one.
        """
        if self._graph is None:
            self._graph = StageGraph(
                self.name, self._stages(), on_failure=self.on_failure, default_timeout=self.default_timeout
            )
        return self._graph

    async def run(self, ctx: PipelineContext | Mapping[str, Any] | None = None) -> PipelineResults:
        """Builds the graph, unless that is done, and runs it: see `StageGraph.run`."""
        return await self.build().run(ctx)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Pipeline {self.name!r}, {self._length} stages>"

    def _stages(self) -> list[StageSpec]:
        return list(self._log.values())[: self._length]

    def _with(self, added: Sequence[StageSpec]) -> Pipeline:
        log = self._log
        if len(log) != self._length:  # another pipeline has grown out of this one before
            log = {spec.name: spec for spec in self._stages()}
        for spec in added:
            if spec.name in log:
                message = f"{spec.where} has the name of {log[spec.name].where}; names are unique within a pipeline"
                raise DuplicateStageError(message, stage=spec.name)
        names = [spec.name for spec in added]
        if len(set(names)) < len(names):
            raise DuplicateStageError("compose() would add two stages of one name", stage=names[0])
        for spec in added:
            log[spec.name] = spec
        following = Pipeline(self.name, on_failure=self.on_failure, default_timeout=self.default_timeout)
        following._log = log
        following._length = self._length + len(added)
        return following


@final
class StageGraph(Graph):
    """A validated, frozen DAG of stages.

    It holds no state of any run, so any number of concurrent runs may share it. `Pipeline.build` makes it.
    """

    __slots__ = ()

    async def run(self, ctx: PipelineContext | Mapping[str, Any] | None = None) -> PipelineResults:
        """Runs the graph in the calling task, and waits until everything has ended.

        The stages of the trunk run in the calling task itself. What they set in context variables stays set there.

        Args:
            ctx: What the stages shall know: a `PipelineContext`, a mapping, which is taken as its `data`, or nothing.

        Returns:
            The outputs of all stages that succeeded, and a record of every stage. The run's status is then `SUCCEEDED`,
            or `PARTIAL` if stages were skipped, cancelled with their branch, or failed and were tolerated.

        Raises:
            StageExecutionError: A stage failed; a `StageTimeoutError` if its limit was the reason.
            UnifiedPipelineCancelled: A stage returned `StageOutput.cancel`.
            trio.Cancelled: A scope around the call was cancelled; all stages have been cancelled, and have ended. To
                see what had finished by then, use `open`.
        """
        return await run_to_end(self, _as_context(ctx))

    def open(self, ctx: PipelineContext | Mapping[str, Any] | None = None) -> AbstractAsyncContextManager[Run]:
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

    def to_mermaid(self) -> str:
        """Gives the graph as a Mermaid flowchart, with its branches as subgraphs."""
        from stageflow.trace.diagram import mermaid

        return mermaid(self)

    def __rich__(self) -> RenderableType:
        from stageflow.trace.diagram import tree

        return tree(self)


async def run_stage(
    runner: Runner,
    ctx: PipelineContext | Mapping[str, Any] | None = None,
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
        on_failure=OnFailure.FAIL_FAST,
        default_timeout=DEFAULT_TIMEOUT,
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


def _giver(output: StageOutput | Mapping[str, Any]) -> Callable[[StageContext], Coroutine[Any, Any, Any]]:
    async def give(_: StageContext) -> StageOutput | Mapping[str, Any]:
        return output  # noqa: ASYNC910  # the engine has checkpoints enough

    return give


_NO_CONTEXT = PipelineContext()


def _as_context(ctx: PipelineContext | Mapping[str, Any] | None) -> PipelineContext:
    if isinstance(ctx, PipelineContext):
        return ctx
    if ctx is None:
        return _NO_CONTEXT
    if isinstance(cast("object", ctx), Mapping):
        return PipelineContext(data=ctx)
    raise TypeError(f"a run takes a PipelineContext, a mapping as its data, or nothing, not {ctx!r}")
