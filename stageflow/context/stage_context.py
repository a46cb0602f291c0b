"""`StageContext`: what a stage gets, and what it asks of the branch it runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

import attrs

from stageflow.context.context import Context, PipelineContext
from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.timer import PipelineTimer
from stageflow.errors import TenantMismatchError
from stageflow.frozen import FrozenDict
from stageflow.output import Artifact

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager

    import trio

    from stageflow.context.host import StageHost, StagePart
    from stageflow.context.transaction import Transaction
    from stageflow.engine import PipelineResults
    from stageflow.journal import Cause
    from stageflow.output import StageOutput
    from stageflow.pipeline import Pipeline
    from stageflow.running import StageGraph

__all__ = ["StageContext", "host_of", "key_of"]


@final
class _AttemptLimit:
    """The limit on a stage's current attempt, for its timer."""

    __slots__ = ("_host", "_part")

    def __init__(self, host: StageHost, part: StagePart) -> None:
        self._host = host
        self._part = part

    @property
    def deadline(self) -> float:
        return self._host.deadline_of(self._part)

    def extend(self, seconds: float) -> None:
        self._host.extend_limit(self._part, seconds)


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
            stage_started=self._host.started_of(self._part),
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
    def pipeline(self) -> str:
        """The pipeline's name."""
        return self._host.state.pipeline

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
    def feedback(self) -> str | None:
        """The reason for which it is tried again, if a `StageOutput.retry` asked for that; otherwise `None`."""
        return self._host.feedback_of(self._part)

    @property
    def cause(self) -> Cause | None:
        """Why the stage is being undone, in the context of its ``compensate=``; `None` while it runs."""
        return self._host.cause_of(self._part)

    @property
    def idempotency_key(self) -> str:
        """A key for calls to other services that is the same on every try of this stage in this run, and nowhere else.

        It is a UUIDv5 over tenant, pipeline, run and stage. In a run within a stage, that stage stands for the run, so
        that what is done again with it has the same keys.
        """
        state = self._host.state
        return key_of(state.origin.tenant, state.pipeline, state.key or state.run_id, self._part.name)

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

        The fields are added to those of earlier calls and attempts, at once and deeply frozen; they are found in the
        record's `partial`, whatever becomes of the stage. It is a sign of life, like `heartbeat`.

        Raises:
            RuntimeError: The stage has ended, so that nobody would see them.
        """
        if self._part.ended is not None:
            raise RuntimeError(f"stage {self._part.name!r} has ended; what it saves now would be lost")
        self._part.partial = FrozenDict({**self._part.partial, **fields})
        self._host.beat(self._part)

    def heartbeat(self) -> None:
        """Gives a sign of life, so that the stage's ``heartbeat=`` begins anew. Without such a limit, does nothing."""
        self._host.beat(self._part)

    def on_exit(self, callback: Callable[..., Awaitable[object] | object], /, *args: Any) -> None:
        """Has something called when this attempt has ended, in whatever way.

        Callbacks are called once, the last one first, before anybody hears of the stage's end. They are shielded from
        cancellation, all together for at most the pipeline's `cleanup_timeout`; what is not done by then is cancelled,
        and named in the record's ``details.overran``. What one raises is the stage's failure, also after a
        cancellation or a limit, unless the stage has raised one itself; and it does not keep the others from being
        called.

        Args:
            callback: An async function, or a plain one.
            *args: Its arguments.

        Raises:
            RuntimeError: The stage has ended.
        """
        name = getattr(callback, "__qualname__", None) or repr(callback)
        self._host.on_exit(self._part, name, lambda: callback(*args))

    def cleanup(self) -> AbstractContextManager[trio.CancelScope]:
        """A shielded scope for a ``finally``, which lasts for at most the pipeline's `cleanup_timeout`.

        What takes longer is cancelled; then the block is left as if it had ended, and the record's ``details.overran``
        says so.

        Example::

            try:
                await work(connection)
            finally:
                with ctx.cleanup():
                    await connection.aclose()
        """
        return self._host.cleanup(self._part)

    async def run_pipeline(
        self,
        child: Pipeline | StageGraph,
        data: Any = None,
        *,
        snapshot: ContextSnapshot | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeouts: Mapping[str, float | None] | None = None,
    ) -> PipelineResults:
        """Runs another pipeline within this stage, and waits until it has ended.

        The run is in the branch of this stage, and under its limits. It has an id of its own; correlation and tenant
        are those of this run; everything else is fresh unless it is handed down. Its results are found in `children` of
        this run's results, from its begin and whatever becomes of it.

        Args:
            child: The pipeline, or its graph.
            data: The run's input; or a `PipelineContext`, as `fork` makes it, which says all.
            snapshot: The state around the run.
            metadata: Whatever else is known.
            timeouts: The limits in seconds of single stages, in place of those they declare.

        Returns:
            The results, if the run ended `SUCCEEDED` or `PARTIAL`.

        Raises:
            StageExecutionError: A stage of it failed.
            UnifiedPipelineCancelled: A stage of it returned `StageOutput.cancel`.
            MaxDepthError: It would be nested too deep.
            TenantMismatchError: The context that was given is another tenant's.
            TypeError: A context was given, and beside it what a context says.
            trio.Cancelled: This stage was cancelled, and so was the run.
        """
        state = self._host.state
        if isinstance(data, PipelineContext) and not snapshot is metadata is timeouts is None:
            raise TypeError(
                "a PipelineContext says all of a run, so snapshot=, metadata= and timeouts= cannot be given beside it; "
                "give them to the context, as in ctx.fork(snapshot=...)"
            )
        if isinstance(data, PipelineContext) and data.tenant != state.origin.tenant:
            what = f"the context for pipeline {child.name!r}"
            raise TenantMismatchError(what, tenant=state.origin.tenant, owner=data.tenant)
        context = (
            data
            if isinstance(data, PipelineContext)
            else PipelineContext(
                correlation_id=self.correlation_id,
                tenant=state.origin.tenant,
                data={} if data is None else data,
                metadata=metadata,  # pyright: ignore[reportArgumentType]  # its converter takes None
                timeouts=timeouts,  # pyright: ignore[reportArgumentType]
                snapshot=ContextSnapshot() if snapshot is None else snapshot,
            )
        )
        return await self._host.run_child(self._part, child.build(), context)

    def fork(self, *keys: str, **changes: Any) -> PipelineContext:
        """Gives a context for a run within this one, see `PipelineContext.fork`."""
        return attrs.evolve(self._host.state.origin, correlation_id=self.correlation_id).fork(*keys, **changes)

    def add_artifact(self, artifact: Artifact) -> None:
        """Adds an artifact to the run; it stays, whatever becomes of the stage.

        Raises:
            TypeError: It is no `Artifact`.
            TenantMismatchError: It belongs to another tenant.
            RuntimeError: The stage has ended.
        """
        if self._part.ended is not None:
            raise RuntimeError(f"stage {self._part.name!r} has ended; what it makes now would come too late")
        if not isinstance(cast("object", artifact), Artifact):
            raise TypeError(f"add_artifact() takes an Artifact, not {artifact!r}; write Artifact(name=..., data=...)")
        tenant = self.tenant
        if artifact.tenant is not None and artifact.tenant != tenant:
            raise TenantMismatchError(f"artifact {artifact.name!r}", tenant=tenant, owner=artifact.tenant)
        self._host.add_artifact(self._part, attrs.evolve(artifact, stage=self._part.name, tenant=tenant))

    def transaction(self) -> Transaction:
        """Gives what takes SQL that is written to the run's store in one commit with the end of this attempt.

        So either both are there, or neither: nothing is done twice, and nothing is lost, whatever happens to the
        process. It is written if the stage succeeds, before anybody hears of that; an error in it is the stage's
        failure. An attempt has one transaction, however often it asks.

        Raises:
            RuntimeError: The stage has ended; or the run has no store that has SQL.

        Example::

            async def book(ctx: StageContext) -> None:
                ctx.transaction().execute("INSERT INTO bookings VALUES (?, ?)", (ctx.run_id, ctx.data["seat"]))
        """
        return self._host.transaction(self._part)

    def __repr__(self) -> str:
        return f"<StageContext of {self.stage!r} in run {self.run_id}>"


def key_of(tenant: str | None, pipeline: str, run: str, stage: str) -> str:
    """Gives the key of idempotency of a stage."""
    from uuid import NAMESPACE_OID, uuid5  # noqa: PLC0415  # only those need it who ask for a key

    return str(uuid5(uuid5(NAMESPACE_OID, "stageflow.idempotency_key"), repr([tenant, pipeline, run, stage])))


def host_of(ctx: StageContext) -> tuple[StageHost, StagePart]:
    """Gives what a context speaks to, and of which stage; for what stageflow itself builds on contexts."""
    return ctx._host, ctx._part  # pyright: ignore[reportPrivateUsage]
