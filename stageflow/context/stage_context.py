"""`StageContext`: what a stage gets, and what it asks of the branch it runs in."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Protocol, cast, final

import attrs

from stageflow.context.context import Context, PipelineContext
from stageflow.context.timer import Limit, PipelineTimer
from stageflow.frozen import FrozenDict
from stageflow.output import Artifact

if TYPE_CHECKING:
    from collections.abc import Mapping

    import trio

    from stageflow.context.snapshot import ContextSnapshot
    from stageflow.output import StageOutput

__all__ = ["RunState", "StageContext", "StageHost", "StagePart"]


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

    def deadline_of(self, stage: StagePart) -> float:
        """When the stage's current attempt will be cancelled, on Trio's clock."""
        ...

    def extend_limit(self, stage: StagePart, seconds: float) -> None:
        """Moves the limit on the stage's current attempt."""
        ...

    def inputs_of(self, stage: StagePart) -> Mapping[str, StageOutput]:
        """The outputs of the stages it comes after."""
        ...

    def lend_nursery(self, stage: StagePart) -> trio.Nursery:
        """The branch's nursery."""
        ...

    def ending(self, stage: StagePart) -> str | None:
        """Why the stage is being cancelled, or `None`."""
        ...


@final
@attrs.frozen
class _AttemptLimit(Limit):
    """The limit on a stage's current attempt, for its timer."""

    host: StageHost
    part: StagePart

    @property
    def deadline(self) -> float:
        return self.host.deadline_of(self.part)

    def extend(self, seconds: float) -> None:
        self.host.extend_limit(self.part, seconds)


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
            limit=_AttemptLimit(self._host, self._part),
        )

    @property
    def deadline(self) -> float:
        return self._host.deadline_of(self._part)

    @property
    def cancelled(self) -> bool:
        return self._host.ending(self._part) is not None

    @property
    def cancel_reason(self) -> str | None:
        return self._host.ending(self._part)

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self._part.name

    @property
    def branch(self) -> str:
        """The name of the branch it runs in, which is that of the branch's first stage, or ``"trunk"``."""
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
        """Which try this is, from 1; 0 while its condition is asked."""
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

        The branch stays open until they have ended, however long that takes: no limit of a stage is on them. They are
        cancelled with the branch. An exception in one of them is a failure of the stage that asked for the nursery
        last. What shall end with the stage belongs into a nursery that the stage opens.
        """
        return self._host.lend_nursery(self._part)

    def save_partial(self, /, **fields: Any) -> None:
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
        """Adds an artifact to the run; it stays, whatever becomes of the stage.

        Raises:
            TypeError: It is no `Artifact`.
            RuntimeError: The stage has ended.
        """
        if self._part.ended is not None:
            raise RuntimeError(f"stage {self._part.name!r} has ended; what it makes now would come too late")
        if not isinstance(cast("object", artifact), Artifact):
            raise TypeError(f"add_artifact() takes an Artifact, not {artifact!r}; write Artifact(name=..., data=...)")
        self._host.state.artifacts.append(attrs.evolve(artifact, stage=self._part.name))

    def __repr__(self) -> str:
        return f"<StageContext of {self.stage!r} in run {self.run_id}>"


_IDEMPOTENCY = uuid.uuid5(uuid.NAMESPACE_OID, "stageflow.idempotency_key")
