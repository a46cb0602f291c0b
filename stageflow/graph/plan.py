"""What is known of a graph before it runs, by number: its `Shape`, and the `Plan` that the engine reads."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, final

import attrs

from stageflow.errors import DefinitionError, UnknownStageError, nearest
from stageflow.frozen import FrozenDict
from stageflow.graph.branches import Branch
from stageflow.stages import Default, Dependency, Join, OnFailure, Settings, StageSpec
from stageflow.stages.interceptor import intercepted
from stageflow.stages.policy import spelled
from stageflow.stages.returned import as_whole, under_contract
from stageflow.stages.runner import NativeBody
from stageflow.stages.stage import Condition

if TYPE_CHECKING:
    from stageflow.stages.retry import Retry  # noqa: TC004  # nobody structures a plan
    from stageflow.stages.typed import Typed

__all__ = ["Edge", "Plan", "Shape", "Special", "admission", "armed", "compile_plan", "limit_on", "with_edges"]


@final
@attrs.frozen(kw_only=True, eq=False, repr=False)
class Shape:
    """Names and branches: what a record of a run needs to know of the graph, without the code of its stages.

    Stages and branches are numbered; stages in topological order.

    Attributes:
        pipeline: The pipeline's name.
        names: The stages' names.
        index: The numbers of the names.
        dependencies: For every stage, those it comes after.
        branches: The branches, the trunk first.
        branch_of: For every stage, its branch.
        branch_names: The names of the branches: that of the first stage, or ``"trunk"``.
    """

    pipeline: str
    names: tuple[str, ...]
    index: Mapping[str, int]
    dependencies: tuple[tuple[int, ...], ...]
    branches: tuple[Branch, ...]
    branch_of: tuple[int, ...]
    branch_names: tuple[str, ...]


@final
class Edge(enum.Enum):
    """What it means for the stage at the end of an edge that the one at its beginning has settled."""

    REQUIRED = "required"
    """It is skipped if the other did not succeed, and starts when all others have settled as well."""
    OPTIONAL = "optional"
    """It starts when all others have settled as well."""
    COUNTED = "counted"
    """Its join goes by how many have succeeded."""


@final
@attrs.frozen(kw_only=True, eq=False, repr=False)
class Special:
    """What is special about how a stage is run. Where nothing is, the engine has nothing to look at.

    Attributes:
        condition: What ``when=`` asks, or `None`.
        tried: Whether any of the others says something, so that its attempts are made one by one.
        retry: How it is tried again; `None` if it is not.
        total_timeout: The limit on all attempts, in seconds.
        heartbeat: For how long an attempt may give no sign of life, in seconds.
        uses: The limits it takes a token of.
        priority: Who goes first among those that wait for one.
        effects: Whether it must be on record that it was entered before it is, if the run is recorded.
    """

    condition: Condition | None = None
    tried: bool = True
    retry: Retry | None = None
    total_timeout: float = math.inf
    heartbeat: float = math.inf
    uses: tuple[str, ...] = ()
    priority: int = 0
    effects: bool = False


@final
@attrs.frozen(kw_only=True, eq=False, repr=False)
class Plan:
    """What the engine reads of every stage while it runs, by the stage's number: no names to look up, nothing to scan.

    Attributes:
        bodies: What does the work, interceptors included.
        specials: What is special about how it is run; `None` for most.
        timeouts: The limits on an attempt in seconds, `math.inf` for none.
        armed: The same, but none for stages whose attempts are made one by one, for those see to their own limits.
        on_failure: What a failure means.
        followers: The stages after it that begin a branch, each with that branch and what the edge means. (The stage
            that continues the strand is not among them: its branch knows it.)
        waits: How many stages it comes after.
        needs: How many of them must succeed for it to start.
        early: Whether it starts (or is skipped) as soon as that is decided, before all have settled.
        starts_bare: Whether it can start without any input.
        revives: For every branch: whether a stage after its first can start although the first was skipped.
        deadlines: The seconds that a branch may take, for those that have such a limit.
        effects: The stages that take effect outside of a run.
        compensates: Whether a stage of it, or of what is declared to run within one, says how it is undone.
    """

    bodies: tuple[NativeBody, ...]
    specials: tuple[Special | None, ...]
    timeouts: tuple[float, ...]
    armed: tuple[float, ...]
    on_failure: tuple[OnFailure, ...]
    followers: tuple[tuple[tuple[int, int, Edge], ...], ...]
    waits: tuple[int, ...]
    needs: tuple[int, ...]
    early: tuple[bool, ...]
    starts_bare: tuple[bool, ...]
    revives: tuple[bool, ...]
    deadlines: Mapping[int, float]
    effects: tuple[int, ...]
    compensates: bool


def compile_plan(ordered: Sequence[StageSpec], shape: Shape, settings: Settings) -> Plan:
    """Works out what the engine will read of every stage.

    Raises:
        DefinitionError: A stage uses a limit that is not there, or a branch has two deadlines.
    """
    heads = {branch.strand[0] for branch in shape.branches if branch.strand}
    followers: list[list[tuple[int, int, Edge]]] = [[] for _ in ordered]
    for number, spec in enumerate(ordered):
        if number in heads:
            for edge in spec.after:
                kind = Edge.COUNTED if spec.join != Join.ALL else Edge.REQUIRED if edge.required else Edge.OPTIONAL
                followers[shape.index[edge.stage]].append((number, shape.branch_of[number], kind))
    specials = [_special(spec, settings) for spec in ordered]
    timeouts = [limit_on(spec, settings)[0] for spec in ordered]
    starts_bare = [_starts_bare(spec) for spec in ordered]
    revives = [False] * len(shape.branches)
    for branch in reversed(shape.branches):  # children before their parents
        revives[branch.index] |= any(starts_bare[number] for number in branch.strand[1:])
        for child in branch.children:
            revives[branch.index] |= revives[child] or starts_bare[shape.branches[child].strand[0]]
    return Plan(
        bodies=tuple(_body(spec, ordered, shape, settings) for spec in ordered),
        specials=tuple(specials),
        timeouts=tuple(timeouts),
        armed=armed(specials, timeouts),
        on_failure=tuple(
            settings.on_failure if isinstance(spec.on_failure, Default) else spec.on_failure for spec in ordered
        ),
        deadlines=_deadlines(shape, settings),
        effects=tuple(number for number, spec in enumerate(ordered) if spec.has_effects),
        compensates=any(_compensates(spec) for spec in ordered),
        followers=tuple(map(tuple, followers)),
        waits=tuple(len(spec.after) for spec in ordered),
        needs=tuple(_needs(spec) for spec in ordered),
        early=tuple(spec.join.mode in ("any", "quorum", "n_of") for spec in ordered),
        starts_bare=tuple(starts_bare),
        revives=tuple(revives),
    )


def _compensates(spec: StageSpec) -> bool:
    if spec.compensate is not None or spec.irrevocable:
        return True
    within = getattr(spec.runner, "child", None) or getattr(getattr(spec.runner, "plan", None), "graph", None)
    return within is not None and getattr(getattr(within, "plan", None), "compensates", False)


def _body(spec: StageSpec, ordered: Sequence[StageSpec], shape: Shape, settings: Settings) -> NativeBody:
    """Makes the body of a stage: with what it takes bound to its names, interceptors around it, and its contract.

    Raises:
        DefinitionError: It takes something else than what another stage gives.
    """
    body = spec.body
    if spec.bind is not None:
        _check_inputs(spec, shape.names, settings)
        proven = frozenset(
            name for name, stage in spec.sources.items() if _proves(ordered[shape.index[stage]], spec, name)
        )
        body = spec.bind(spec.sources, proven)
    if isinstance(spec.output, Default):
        return intercepted(body, settings.interceptors)
    if settings.interceptors:
        body = intercepted(as_whole(body), settings.interceptors)
    from stageflow.stages.contract import Contract  # noqa: PLC0415  # with it comes cattrs, which takes its time

    return under_contract(body, Contract(spec.output, f"output= of {spec.where}"))


def _proves(producer: StageSpec, consumer: StageSpec, name: str) -> bool:
    """Whether what a stage gives is known to be what a parameter of another wants.

    Raises:
        DefinitionError: It is known not to be.
    """
    if consumer.typed is None or isinstance(producer.output, Default):
        return False
    from stageflow.stages.compatibility import differences  # noqa: PLC0415

    parameter = consumer.typed.parameters[name]
    found = list(differences(producer.output, parameter.wanted, name))
    if not found:
        return True
    lines = "".join(f"\n  {path}: {what}" for path, what in found)
    gives = (
        str(producer.typed) if producer.typed is not None else f"{producer.where}, output={spelled(producer.output)}"
    )
    raise DefinitionError(
        f"{consumer.where} cannot take what stage {producer.name!r} gives; change either:{lines}"
        f"\n  given by  {gives}\n  taken by  {consumer.typed}",
        stage=consumer.name,
    )


def admission(pipeline: str, settings: Settings) -> Callable[[Any], Any] | None:
    """Gives what checks the data of a run, if a type was declared for it.

    It raises `ContractViolation` for data that is not of that type.
    """
    if isinstance(settings.inputs, Default):
        return None
    from stageflow.stages.contract import Contract  # noqa: PLC0415

    contract = Contract(settings.inputs, f"inputs= of pipeline {pipeline!r}")
    return lambda data: contract.check(data, stage=None, root="data", giver="what the run was given as data")


def _check_inputs(spec: StageSpec, names: Sequence[str], settings: Settings) -> None:
    """Sees whether the data of a run has what a typed stage takes from it.

    Raises:
        DefinitionError: It has not.
    """
    if spec.typed is None or isinstance(settings.inputs, Default):
        return
    from stageflow.stages.compatibility import differences  # noqa: PLC0415
    from stageflow.stages.fields import fields_of  # noqa: PLC0415

    fields = fields_of(settings.inputs)
    if fields is None:
        return
    for name, parameter in spec.typed.parameters.items():
        if parameter.context or name in spec.sources:
            continue
        if name not in fields:
            if parameter.optional:
                continue
            near = nearest(name, [*fields, *names])
            hint = f"; did you mean {near[0]!r}?" if near else f"; add it there, or say {name}: ... | None"
            raise DefinitionError(
                f"{spec.where} takes {str(parameter)!r}, but no stage has that name, and neither has a field of "
                f"{spelled(settings.inputs)}, the inputs= of the pipeline{hint}",
                stage=spec.name,
            )
        found = list(differences(fields[name].declared, parameter.wanted, name))
        if found:
            lines = "".join(f"\n  {path}: {what}" for path, what in found)
            raise DefinitionError(
                f"{spec.where} cannot take {name!r} from {spelled(settings.inputs)}; change either:{lines}"
                f"\n  taken by  {spec.typed}",
                stage=spec.name,
            )


def with_edges(specs: Sequence[StageSpec]) -> list[StageSpec]:
    """Gives the stages with the edges that follow from the parameters of typed ones."""
    names = {spec.name for spec in specs}
    return [spec if spec.typed is None else _with_edges(spec, spec.typed, names) for spec in specs]


def _with_edges(spec: StageSpec, typed: Typed, names: AbstractSet[str]) -> StageSpec:
    edges = {edge.stage: edge for edge in spec.after}
    sources = dict(spec.sources)
    for parameter in typed.parameters.values():
        if parameter.context or (parameter.name not in sources and parameter.name == spec.name):
            continue
        stage = sources.get(parameter.name, parameter.name)
        if stage in names:
            sources[parameter.name] = stage
            edges.setdefault(stage, Dependency(stage, required=not parameter.optional))
    return attrs.evolve(spec, after=tuple(edges.values()), sources=FrozenDict(sources))


def armed(specials: Sequence[Special | None], timeouts: Sequence[float]) -> tuple[float, ...]:
    """Gives the limits that the walker of a branch sees to."""
    return tuple(
        math.inf if special is not None and special.tried else limit
        for special, limit in zip(specials, timeouts, strict=True)
    )


def limit_on(spec: StageSpec, settings: Settings, given: float | Default | None = Default.DEFAULT) -> tuple[float, str]:
    """Gives the limit on an attempt of a stage, in seconds, and what has set it.

    Args:
        spec: The stage.
        settings: What its pipeline says.
        given: What a run says in place of the stage; `None` for no limit.

    Raises:
        DefinitionError: An interceptor sets one on a stage that cannot be stopped.
    """
    if not isinstance(given, Default):
        limit, source = given, "timeouts= of the PipelineContext"
    elif not isinstance(spec.timeout, Default):
        limit, source = spec.timeout, f"timeout= of {spec.where}"
    elif spec.unlimited:
        limit, source = None, "nothing"
    else:
        limit, source = settings.default_timeout, "default_timeout= of the pipeline"
    nearest = math.inf if limit is None else limit
    for interceptor in settings.interceptors:
        limit_of: Callable[[StageSpec], float | None] | None = getattr(interceptor, "limit_of", None)
        other = None if limit_of is None else limit_of(spec)
        if other is not None and other < nearest:
            if not spec.stoppable:
                raise DefinitionError(
                    f"{type(interceptor).__name__} sets a limit on {spec.where}, which runs in a thread that nothing "
                    f"can stop; leave it out there, or declare it with abandon_on_cancel=True or processes=True",
                    stage=spec.name,
                )
            nearest, source = other, f"{type(interceptor).__name__} of the pipeline"
    return nearest, source


def _special(spec: StageSpec, settings: Settings) -> Special | None:
    for name in spec.uses:
        if name not in settings.limits:
            near = nearest(name, settings.limits)
            hint = f"did you mean {near[0]!r}?" if near else f"say Pipeline(limits={{{name!r}: 1}})"
            raise DefinitionError(
                f"{spec.where} uses {name!r}, which is no limit of the pipeline; {hint}", stage=spec.name, option="uses"
            )
    tried = any(
        (
            spec.retry is not None,
            spec.total_timeout is not None,
            spec.heartbeat is not None,
            spec.uses,
            settings.max_running is not None,
        )
    )
    if spec.when is None and not tried:
        return None
    return Special(
        condition=spec.when,
        tried=tried,
        retry=spec.retry,
        total_timeout=math.inf if spec.total_timeout is None else spec.total_timeout,
        heartbeat=math.inf if spec.heartbeat is None else spec.heartbeat,
        uses=spec.uses,
        priority=spec.priority,
    )


def _deadlines(shape: Shape, settings: Settings) -> dict[int, float]:
    found: dict[int, float] = {}
    for stage, seconds in settings.branch_deadlines.items():
        if stage not in shape.index:
            raise UnknownStageError(stage, shape.names, where="with_branch(of=...)")
        branch = shape.branch_of[shape.index[stage]]
        if branch in found:
            raise DefinitionError(
                f"with_branch(of={stage!r}, deadline=...) sets a second deadline on branch "
                f"{shape.branch_names[branch]!r}; one is enough"
            )
        found[branch] = seconds
    return found


def _needs(spec: StageSpec) -> int:
    match spec.join.mode:
        case "any" | "any_settled":
            return 1
        case "quorum":
            return len(spec.after) // 2 + 1
        case _:
            return spec.join.count


def _starts_bare(spec: StageSpec) -> bool:
    if spec.join == Join.ALL:
        return not any(edge.required for edge in spec.after)
    return spec.join == Join.SETTLED
