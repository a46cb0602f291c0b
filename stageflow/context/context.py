"""The one interface around a stage's work: `Context`; and `PipelineContext`, which one passes to a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast, final

import attrs

from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.timer import PipelineTimer
from stageflow.errors import TenantMismatchError
from stageflow.frozen import FrozenDict, freeze
from stageflow.output import Artifact

__all__ = ["Context", "PipelineContext"]


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
        """When the work will be cancelled, on Trio's clock; the same as ``timer.deadline``.

        Of the scopes around the run it knows the deadline that they had when the run began.
        """

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether this work is being cancelled, for whatever reason.

        What nobody can see from inside a shielded scope, or from a thread that is abandoned when its stage is
        cancelled, is that a scope around the run was cancelled. In a scope of the stage's own that is cancelled, it
        reads as if it were one around the run.
        """

    @property
    @abstractmethod
    def cancel_reason(self) -> str | None:
        """Why, in words; `None` while it is not being cancelled."""


def _frozen_mapping(value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return FrozenDict(value or {})


def _as_tuple(artifacts: Iterable[Artifact]) -> tuple[Artifact, ...]:
    return tuple(artifacts)


_NO_DATA = object()


def _frozen_input(value: Any) -> Any:
    return freeze({} if value is _NO_DATA else value)


def _check_mappings(data: object, added: object) -> None:
    if not isinstance(data, Mapping):
        raise TypeError(
            f"items can be chosen of a mapping only, and the data is of type {type(data).__name__!r}; "
            f"hand down what the other run shall see with data="
        )
    if not isinstance(added, Mapping):
        raise TypeError(
            f"only a mapping can be added to the items that were chosen, not data= of type {type(added).__name__!r}; "
            f"make one of it, or choose no items"
        )


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
        artifacts: Artifacts that come with it; those that are nobody's yet become this tenant's.
        metadata: Whatever else is known; deeply frozen.
        timeouts: The limits in seconds on an attempt of single stages, by name, in place of those they declare; `None`
            is no limit.

    Raises:
        TenantMismatchError: An artifact is another tenant's.
        TypeError: Something else than an `Artifact` is among the artifacts, or an id or the tenant is no string.
    """

    # pyright wants properties overridden by properties only; a frozen attribute is as good.
    run_id: str | None = attrs.field(  # pyright: ignore[reportIncompatibleMethodOverride]
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(str))
    )
    correlation_id: str | None = attrs.field(  # pyright: ignore[reportIncompatibleMethodOverride]
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(str))
    )
    tenant: str | None = attrs.field(  # pyright: ignore[reportIncompatibleMethodOverride]
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(str))
    )
    data: Any = attrs.field(default=_NO_DATA, converter=_frozen_input)  # pyright: ignore[reportUnknownVariableType]
    snapshot: ContextSnapshot = attrs.field(factory=ContextSnapshot)  # pyright: ignore[reportIncompatibleMethodOverride]
    artifacts: tuple[Artifact, ...] = attrs.field(default=(), converter=_as_tuple)
    metadata: Mapping[str, Any] = attrs.field(default=None, converter=_frozen_mapping)
    timeouts: Mapping[str, float | None] = attrs.field(default=None, converter=_frozen_mapping)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # a mapping is always in it

    def __attrs_post_init__(self) -> None:
        for artifact in self.artifacts:
            if not isinstance(cast("object", artifact), Artifact):
                raise TypeError(f"artifacts= takes Artifacts, not {artifact!r}; write Artifact(name=..., data=...)")
            if artifact.tenant is not None and artifact.tenant != self.tenant:
                raise TenantMismatchError(f"artifact {artifact.name!r}", tenant=self.tenant, owner=artifact.tenant)
        if self.tenant is not None:  # from here on they are this tenant's, also in the results of a run
            owned = (
                artifact if artifact.tenant == self.tenant else attrs.evolve(artifact, tenant=self.tenant)
                for artifact in self.artifacts
            )
            object.__setattr__(self, "artifacts", tuple(owned))

    def fork(self, *keys: str, **changes: Any) -> PipelineContext:
        """Gives a context for another run that belongs to this one.

        Correlation and tenant are the same. The run draws an id of its own. Of the data it sees what is chosen here,
        and of snapshot, artifacts, metadata and timeouts nothing but what is handed down by name.

        Args:
            *keys: Which items of the data it shall see.
            **changes: Attributes of a `PipelineContext` that it shall have; ``data=`` adds to the chosen items.

        Raises:
            KeyError: The data has no such item.
            TenantMismatchError: It would be another tenant's.
            TypeError: There is no such attribute, or items are chosen, but the data or ``data=`` is no mapping.
        """
        tenant = changes.pop("tenant", self.tenant)
        if tenant != self.tenant:
            raise TenantMismatchError("this context", tenant=tenant, owner=self.tenant)
        data = changes.pop("data", {})
        if keys:
            _check_mappings(self.data, data)
            data = {**{key: self.data[key] for key in keys}, **data}
        return PipelineContext(
            data=data, tenant=self.tenant, correlation_id=changes.pop("correlation_id", self.correlation_id), **changes
        )

    @property
    def timer(self) -> PipelineTimer:
        """A timer that stands at zero, for a description is in no run."""
        return PipelineTimer()

    @property
    def deadline(self) -> float:
        """Always `math.inf`, for a description is in no run."""
        return math.inf

    @property
    def cancelled(self) -> bool:
        """Always `False`, for a description is in no run."""
        return False

    @property
    def cancel_reason(self) -> str | None:
        """Always `None`, for a description is in no run."""
        return None
