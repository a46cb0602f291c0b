"""The one interface around a stage's work: `Context`, as one passes it to a run and as a stage gets it."""

from __future__ import annotations

import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, final

import attrs

from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.timer import Limit, PipelineTimer
from stageflow.frozen import FrozenDict, freeze

if TYPE_CHECKING:
    import trio

    from stageflow.output import Artifact, StageOutput

__all__ = ["Context", "PipelineContext", "RunState", "StageContext", "StageHost", "StagePart"]


class Context(ABC):
    """What `PipelineContext` and `StageContext` both have. Annotate with it what shall work with either."""

    __slots__ = ()

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """The run's id; `None` only in a `PipelineContext` that leaves it to each run to draw one."""

    @property
    @abstractmethod
    def correlation_id(self) -> str | None:
        """What ties this run to others; in a run it is the run's own id unless something else was said."""

    @property
    @abstractmethod
    def tenant(self) -> str | None:
        """On whose behalf the run goes."""

    @property
    @abstractmethod
    def data(self) -> Any:
        """The run's input, deeply frozen."""

    @property
    @abstractmethod
    def snapshot(self) -> ContextSnapshot:
        """The state around the run, as it was when the run began."""

    @property
    @abstractmethod
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts that came with the run and those added so far, in that order."""

    @property
    @abstractmethod
    def metadata(self) -> Mapping[str, Any]:
        """What is known of the run besides its input, deeply frozen."""

    @property
    @abstractmethod
    def timer(self) -> PipelineTimer:
        """The run's clock."""

    @property
    @abstractmethod
    def deadline(self) -> float:
        """``timer.deadline``: when the work will be cancelled, on Trio's clock."""

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether this work is being cancelled, for whatever reason."""

    @property
    @abstractmethod
    def cancel_reason(self) -> str | None:
        """Why, in words; `None` while it is not being cancelled."""


def _frozen_mapping(value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    frozen = freeze(dict(value or {}))
    assert isinstance(frozen, FrozenDict)
    return frozen


def _frozen_input(value: Any) -> Any:
    return freeze({} if value is None else value)


@final
@attrs.frozen(kw_only=True, slots=True)
class PipelineContext(Context):
    """What one passes to a run: a frozen description, which may be passed to any number of runs.

    Attributes:
        run_id: The run's id. Left out, every run draws its own, a UUIDv7.
        correlation_id: What ties this run to others. Left out, it is the run's own id.
        tenant: On whose behalf the run goes.
        data: The run's input: a mapping, or any object. Builtin containers are deeply frozen.
        snapshot: The state around the run.
        artifacts: Artifacts that come with it.
        metadata: Whatever else is known; deeply frozen.
    """

    run_id: str | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.instance_of(str)))
    correlation_id: str | None = None
    tenant: str | None = None
    data: Any = attrs.field(default=None, converter=_frozen_input)
    snapshot: ContextSnapshot = attrs.field(factory=ContextSnapshot)
    artifacts: tuple[Artifact, ...] = attrs.field(default=(), converter=tuple)
    metadata: Mapping[str, Any] = attrs.field(default=None, converter=_frozen_mapping)

    @property
    def timer(self) -> PipelineTimer:
        """A timer that stands at zero: a description is in no run."""
        return PipelineTimer()

    @property
    def deadline(self) -> float:
        """`math.inf`: a description is in no run."""
        return math.inf

    @property
    def cancelled(self) -> bool:
        """`False`: a description is in no run."""
        return False

    @property
    def cancel_reason(self) -> str | None:
        """`None`: a description is in no run."""
        return None


@attrs.define(eq=False, kw_only=True)
class RunState:
    """What the contexts of all stages of one run share.

    Attributes:
        pipeline: The pipeline's name.
        run_id: The run's id.
        origin: The description the run was started with.
        started: When it began, on Trio's clock.
        deadline: When the scopes that stood around the run at that moment will cancel it, on Trio's clock.
        artifacts: Every artifact so far.
    """

    pipeline: str
    run_id: str
    origin: PipelineContext
    started: float
    deadline: float
    artifacts: list[Artifact]


class StagePart(Protocol):
    """The part of a stage's record that its context reads, and the one thing it writes: `partial`."""

    name: str
    branch: str
    attempts: int
    started: float | None
    ended: float | None
    partial: Mapping[str, Any]


class StageHost(Protocol):
    """What the branch in which a stage runs does for the stage's context."""

    state: RunState

    def limit_of(self, stage: StagePart) -> Limit:
        """The limit on the stage's current attempt."""
        ...

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        """The outputs of the stages it comes after."""
        ...

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        """The branch's nursery."""
        ...

    def ending(self) -> str | None:
        """Why the branch is being cancelled, or `None`."""
        ...


@final
class StageContext(Context):
    """What a stage gets: the run around it, its inputs, and the means to say how far it is."""

    __slots__ = ("_host", "_inputs", "_part")

    def __init__(self, host: StageHost, part: StagePart) -> None:
        self._host = host
        self._part = part
        self._inputs: Mapping[str, StageOutput] | None = None

    @property
    def run_id(self) -> str:
        return self._host.state.run_id

    @property
    def correlation_id(self) -> str:
        state = self._host.state
        return state.origin.correlation_id or state.run_id

    @property
    def tenant(self) -> str | None:
        return self._host.state.origin.tenant

    @property
    def data(self) -> Any:
        return self._host.state.origin.data

    @property
    def snapshot(self) -> ContextSnapshot:
        return self._host.state.origin.snapshot

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return tuple(self._host.state.artifacts)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._host.state.origin.metadata

    @property
    def timer(self) -> PipelineTimer:
        return PipelineTimer(
            run_started=self._host.state.started,
            stage_started=self._part.started,
            limit=self._host.limit_of(self._part),
        )

    @property
    def deadline(self) -> float:
        return self._host.limit_of(self._part).deadline

    @property
    def cancelled(self) -> bool:
        return self._host.ending() is not None

    @property
    def cancel_reason(self) -> str | None:
        return self._host.ending()

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self._part.name

    @property
    def branch(self) -> str:
        """The name of the branch it runs in: that of the branch's first stage, or ``"trunk"``."""
        return self._part.branch

    @property
    def inputs(self) -> Mapping[str, StageOutput]:
        """The outputs of the stages this one comes after, by name, fixed at the moment it started.

        One that did not succeed is absent: ``"name" in ctx.inputs`` tells, and asking for it raises a
        `MissingOutputError` that says why.
        """
        if self._inputs is None:
            self._inputs = self._host.inputs_of(self._part)
        return self._inputs

    @property
    def attempt(self) -> int:
        """Which try this is, from 1."""
        return self._part.attempts

    @property
    def idempotency_key(self) -> str:
        """A key for calls to other services that is the same on every try of this stage in this run, and nowhere else.

        It is a UUIDv5 over tenant, pipeline, run and stage.
        """
        state = self._host.state
        scope = [state.origin.tenant, state.pipeline, state.run_id, self._part.name]
        return str(uuid.uuid5(_IDEMPOTENCY, repr(scope)))

    @property
    def nursery(self) -> trio.Nursery:
        """The branch's own nursery, for tasks that may outlive the stage, though not its branch.

        The branch stays open until they have ended, and they are cancelled with it. An exception in one of them is a
        failure of the stage that started it. What shall end with the stage belongs into a nursery that the stage opens.
        """
        return self._host.lend_nursery(self._part)

    def save_partial(self, **fields: Any) -> None:
        """Keeps something that is to survive if this stage does not end well.

        The fields are added to those of earlier calls, at once and deeply frozen; they are found in the record's
        `partial`, whatever becomes of the stage.

        Raises:
            RuntimeError: The stage has ended, so that nobody would see them.
        """
        if self._part.ended is not None:
            raise RuntimeError(f"stage {self._part.name!r} has ended; what it saves now would be lost")
        self._part.partial = FrozenDict({**self._part.partial, **fields})

    def add_artifact(self, artifact: Artifact) -> None:
        """Adds an artifact to the run; it stays, whatever becomes of the stage."""
        self._host.state.artifacts.append(attrs.evolve(artifact, stage=self._part.name))

    def __repr__(self) -> str:
        return f"<StageContext of {self.stage!r} in run {self.run_id}>"


_IDEMPOTENCY = uuid.uuid5(uuid.NAMESPACE_OID, "stageflow.idempotency_key")
