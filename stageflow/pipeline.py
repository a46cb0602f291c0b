"""The front door: `Pipeline`, to declare the stages of a DAG."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Unpack, cast, final, overload

import attrs

from stageflow.errors import DefinitionError, DuplicateStageError
from stageflow.frozen import FrozenDict
from stageflow.graph import with_edges
from stageflow.running import StageGraph
from stageflow.stages import (
    DEFAULT,
    Dependency,
    Interceptor,
    Limit,
    OnFailure,
    Runner,
    Settings,
    StageFunction,
    StageOptions,
    StageSpec,
    caller,
    declare,
    name_of,
)
from stageflow.stages.policy import check_count, check_name, check_timeout, dependencies, shown
from stageflow.stages.runner import check_arguments
from stageflow.stages.settings import CLEANUP_TIMEOUT, DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from attrs import AttrsInstance

    from stageflow.context import PipelineContext, StageContext
    from stageflow.engine import PipelineResults
    from stageflow.journal.store import Store

__all__ = ["Pipeline"]


@final
class Pipeline:
    """Declares the stages of a DAG. Immutable: every method that adds something returns a new pipeline.

    Pipelines share what they have in common, so that declaring n stages costs O(n). (Adding to one pipeline a second
    time, to make a variant, copies its index of names.)

    Args:
        name: What the pipeline is called.
        stages: Stages to begin with, under their own names: what `stage` decorates, every `Stage`, and functions. The
            same as adding each with `with_stage`.
        inputs: The type that the data of a run must have, checked before anything starts; a mapping is made into the
            class it describes. Left out, it may be anything.
        on_failure: What the failure of a stage means that does not say so itself: ``"fail_fast"``, ``"drain"`` or
            ``"isolate"``, see `OnFailure`.
        default_timeout: The limit in seconds on an attempt of an async stage that does not say so itself; `None` for
            none.
        deadline: The seconds that a run may take as a whole; `None` for no such limit.
        cleanup_timeout: The seconds that the cleanup of one attempt may take, where it is shielded:
            `StageContext.on_exit` and `StageContext.cleanup`.
        interceptors: What is put around every attempt of every stage, outermost first.
        limits: How many stages may use a thing at once, by its name: a number for each run, or a `Limit` that several
            share. Stages say ``uses="name"``.
        max_running: How many stages of a run may run at once; `None` for all that can.
        compensate_on: What a run has to come to for those of its stages to be undone that say ``compensate=``:
            ``"fail"``, ``"cancel"``, or also ``"interrupt"``, which is when the caller cancels it.
        undo_limit: How many undos are called at once.
        compensation_budget: The seconds for which undoing is shielded after the caller has cancelled the run.

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

    __slots__ = ("_graph", "_length", "_log", "name", "settings")

    def __init__(
        self,
        name: str,
        *,
        stages: Iterable[Runner] = (),
        inputs: Any = DEFAULT,
        on_failure: OnFailure | str = OnFailure.FAIL_FAST,
        default_timeout: float | None = DEFAULT_TIMEOUT,
        deadline: float | None = None,
        cleanup_timeout: float = CLEANUP_TIMEOUT,
        interceptors: Iterable[Interceptor] = (),
        limits: Mapping[str, int | Limit] | None = None,
        max_running: int | None = None,
        compensate_on: Iterable[str] = ("fail", "cancel"),
        undo_limit: int = 16,
        compensation_budget: float = 5.0,
    ) -> None:
        self.name: str = check_name(name, "a pipeline")
        self.settings: Settings = Settings(
            on_failure=on_failure,
            default_timeout=default_timeout,
            deadline=deadline,
            cleanup_timeout=cleanup_timeout,
            interceptors=interceptors,
            limits={} if limits is None else limits,
            max_running=max_running,
            inputs=inputs,
            compensate_on=compensate_on,
            undo_limit=undo_limit,
            compensation_budget=compensation_budget,
        )
        # Pipelines that grew out of each other share one log of declarations, of which each sees the first `_length`.
        self._log: dict[str, StageSpec] = {}
        self._length = 0
        self._graph: StageGraph | None = None
        frame = caller() if stages else None
        for runner in stages:
            if name_of(runner) is None and not hasattr(runner, "__name__"):
                raise DefinitionError(f"stages= of pipeline {self.name!r} holds {shown(runner)}, which has no name")
            self._add([declare(name_of(runner) or getattr(runner, "__name__", None), runner, {}, frame)])

    @overload
    def with_stage(
        self, name: str, runner: Runner | Pipeline | StageGraph, /, **options: Unpack[StageOptions]
    ) -> Pipeline: ...
    @overload
    def with_stage(self, runner: Runner, /, **options: Unpack[StageOptions]) -> Pipeline: ...
    def with_stage(
        self,
        name: str | Runner,
        runner: Runner | Pipeline | StageGraph | None = None,
        /,
        **options: Unpack[StageOptions],
    ) -> Pipeline:
        """Gives a pipeline with one more stage.

        A stage may be a pipeline, which is then run as a whole within the stage: its stages find the inputs of the
        stage in ``ctx.data``, by name, and its outputs, by name, are the output of the stage. See
        `StageContext.run_pipeline`, which can do more. It has no limit but what is declared.

        Args:
            name: What the stage is called. May be left out if the runner has a name of its own, as what `stage`
                decorates and every `Stage` has.
            runner: What does the work: an async function of a `StageContext`, a `Stage`, a class of stages, which is
                then instantiated once per run; a plain function, which is run in a thread; or a pipeline, or its graph,
                which is proven here and now.
            **options: The options of `StageOptions`. They may name stages that are declared later.

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
        if isinstance(runner, (Pipeline, StageGraph)):
            from stageflow.engine.nested import Within  # noqa: PLC0415  # as with maps, only some pipelines need it

            return self._with([declare(name, Within(runner.build()), options, frame, unlimited=True)])
        return self._with([declare(name, runner, options, frame)])

    def with_map(
        self,
        name: str,
        runner: Runner | Pipeline | StageGraph,
        /,
        *,
        over: str | Callable[[StageContext], Iterable[Any] | AsyncIterable[Any]],
        limit: int = 16,
        tolerate: float = 0,
        **options: Unpack[StageOptions],
    ) -> Pipeline:
        """Gives a pipeline with a stage that runs something once per item, several items at a time.

        Every item is a branch of its own, ``"name[3]"``, that is cancelled, fails and is recorded alone; it finds its
        item in ``ctx.data``. The output is the list of outputs, in the order of the items; `None` stands for an item
        that has none. An item is asked for only when there is room for it, so that the items may be endless in number
        and come from an async iterable.

        Args:
            name: What the stage is called.
            runner: What is run for each item: whatever can be a stage, with the options that `stage` gave it, or a
                pipeline, whose outputs by name are the output of the item.
            over: The items: the name of a stage whose output is a list, and which this one then comes after; or a
                function of the context that gives an iterable, or an async one.
            limit: How many items may be in flight.
            tolerate: How many items may fail before the stage does: a count, or, as a float from 0 to 1, a part of all.
            **options: The options of `StageOptions`, for the stage as a whole. It has no limit but what is declared.

        Raises:
            DefinitionError: An argument is wrong.
            DuplicateStageError: There is a stage of that name.
        """
        from stageflow.engine.maps import MapPlan, OverItems  # noqa: PLC0415  # here, so that no run has to load them

        frame = caller()
        title = check_name(name, "a map")
        if isinstance(over, str):
            after = dependencies(options.get("after", ()), title)
            if over not in {edge.stage for edge in after}:
                options["after"] = (*after, *dependencies(over, title))
        elif not callable(over) or inspect.iscoroutinefunction(over):
            raise DefinitionError(
                f"over= of map {title!r} takes a stage's name, or a plain function of the context that gives "
                f"an iterable, also an async one, not {shown(over)}"
            )
        else:
            check_arguments(over, (None,), title, "called with the context")
        if isinstance(tolerate, bool) or not isinstance(cast("object", tolerate), (int, float)) or not tolerate >= 0:
            raise DefinitionError(
                f"tolerate= of map {title!r} takes a count, or a part from 0.0 to 1.0, not {tolerate!r}"
            )
        if isinstance(tolerate, float) and tolerate > 1:
            raise DefinitionError(
                f"tolerate= of map {title!r} is a part of all if it is a float, so at most 1.0: {tolerate!r}"
            )
        if isinstance(runner, (Pipeline, StageGraph)):
            graph, stage = runner.build(), None
        else:
            settings = attrs.evolve(
                self.settings,
                on_failure="fail_fast",
                deadline=None,
                max_running=None,
                branch_deadlines={},
                inputs=DEFAULT,
            )
            carried = runner.options if isinstance(runner, StageFunction) else {}
            for option in ("after", "join", "when", "on_failure", "aka"):
                if option in carried:
                    raise DefinitionError(
                        f"{option}= of {shown(cast('object', runner))} means nothing for an item of map {title!r}"
                    )
            graph, stage = StageGraph(self.name, [declare(title, runner, {}, frame)], settings), title
        plan = MapPlan(
            graph=graph, stage=stage, limit=check_count(limit, f"limit= of map {title!r}"), tolerate=tolerate
        )
        return self._with([declare(title, OverItems(plan, over), options, frame, unlimited=True)])

    def with_branch(self, *, of: str, deadline: float) -> Pipeline:
        """Gives a pipeline in which a branch has a deadline of its own.

        When it is reached, the branch is ended as by `StageOutput.cancel_branch`: what runs in it is cancelled, and
        joins beyond see it as absent.

        Args:
            of: A stage of the branch.
            deadline: The seconds that the branch may take, from when its first stage can start.

        Raises:
            DefinitionError: An argument is wrong.
        """
        seconds = check_timeout(deadline, "with_branch(deadline=...)")
        if seconds is None:
            raise DefinitionError("with_branch(deadline=...) takes seconds; without a deadline there is nothing to say")
        if check_name(of, "with_branch(of=...)") in self.settings.branch_deadlines:
            raise DefinitionError(f"with_branch(of={of!r}, deadline=...) sets a second deadline; one is enough")
        deadlines = {**self.settings.branch_deadlines, of: seconds}
        following = self._with([])
        following.settings = attrs.evolve(self.settings, branch_deadlines=deadlines)
        return following

    def compose(
        self, other: Pipeline, *, after: str | Dependency | Iterable[str | Dependency] = (), prefix: str = ""
    ) -> Pipeline:
        """Gives a pipeline with all stages of another one as well.

        The stages keep their options; what the other pipeline says for all of its stages and for its runs does not come
        along: neither `on_failure` and `default_timeout`, nor its limits, interceptors, inputs and deadlines.

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
        specs = with_edges(other._stages())
        own = {spec.name for spec in specs}
        added: list[StageSpec] = []
        for spec in specs:
            inner = tuple(
                attrs.evolve(edge, stage=prefix + edge.stage) if edge.stage in own else edge for edge in spec.after
            )
            sources = {name: prefix + stage if stage in own else stage for name, stage in spec.sources.items()}
            renamed = attrs.evolve(
                spec,
                name=prefix + spec.name,
                aka=tuple(prefix + name for name in spec.aka),
                after=inner or edges,
                sources=FrozenDict(sources),
            )
            # What has no limit for another reason than that it is a plain function runs others, and may be a map.
            added.append(_over_renamed(renamed, prefix, own) if spec.unlimited and not spec.plain else renamed)
        return self._with(added)

    def build(self) -> StageGraph:
        """Proves the declarations, and gives the graph, which can be run. A pipeline does that once, and keeps it.

        Raises:
            DefinitionError: There is no stage.
            UnknownStageError: A stage comes after one that is not there.
            CycleError: Stages wait for each other.

        Warns:
            DefinitionWarning: A stage needs all of several stages of which a route chooses one. Or a stage that is
                irrevocable comes before one that may fail, or one that says ``compensate=`` after a pivot.
        """
        if self._graph is None:
            self._graph = StageGraph(self.name, self._stages(), self.settings)
        return self._graph

    async def run(
        self,
        ctx: PipelineContext | Mapping[str, Any] | AttrsInstance | None = None,
        *,
        store: Store | None = None,
    ) -> PipelineResults:
        """Builds the graph, unless that is done, and runs it: see `StageGraph.run`."""
        return await self.build().run(ctx, store=store)

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
        following = Pipeline(self.name)
        following.settings = self.settings
        following._log = log
        following._length = self._length
        following._add(added)
        return following

    def _add(self, added: Sequence[StageSpec]) -> None:
        log = self._log
        for spec in added:
            if spec.name in log:
                message = f"{spec.where} has the name of {log[spec.name].where}; names are unique within a pipeline"
                raise DuplicateStageError(message, stage=spec.name)
        names = [spec.name for spec in added]
        if len(set(names)) < len(names):
            raise DuplicateStageError("compose() would add two stages of one name", stage=names[0])
        for spec in added:
            log[spec.name] = spec
        self._length += len(added)


def _over_renamed(spec: StageSpec, prefix: str, own: AbstractSet[str]) -> StageSpec:
    """Gives a stage that goes over the output of another, if it is a map that does so, under the new name of that."""
    from stageflow.engine.maps import OverItems  # noqa: PLC0415

    if not isinstance(spec.runner, OverItems) or spec.runner.over not in own:
        return spec
    runner = attrs.evolve(spec.runner, over=f"{prefix}{spec.runner.over}")
    return attrs.evolve(spec, runner=runner, body=runner.__call__)
