"""`TimeoutInterceptor`: one limit for many stages, chosen by name or by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs

from stageflow.errors import DefinitionError
from stageflow.interceptors.choice import read_kinds, read_names
from stageflow.stages import StageKind
from stageflow.stages.policy import check_timeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages import Proceed, StageSpec

__all__ = ["TimeoutInterceptor"]


def _seconds(value: float) -> float:
    found = check_timeout(value, "TimeoutInterceptor()")
    if found is None:
        raise DefinitionError(f"TimeoutInterceptor() takes seconds; {value!r} would limit nothing, so leave it out")
    return found


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    return read_names(value, "TimeoutInterceptor(names=...)")


def _kinds(value: StageKind | str | Iterable[StageKind | str]) -> tuple[StageKind, ...]:
    return read_kinds(value, "TimeoutInterceptor(kinds=...)")


@final
@attrs.frozen
class TimeoutInterceptor:
    """Sets a limit on each attempt of the stages chosen by name or by kind.

    If none are chosen, it is for all that a pipeline's default limit is for: async stages, but not plain functions, and
    not what runs others, which are nested pipelines and maps.

    The limit is the engine's own, as if the stage had declared it with ``timeout=``: it ends in a `StageTimeoutError`,
    whose `source` names this class; the stage sees it in ``ctx.timer``, and can extend it. Of all limits on a stage the
    nearest counts, so this one shortens and never lengthens. It covers the whole attempt, and with it all interceptors,
    wherever in their order this one stands.

    Attributes:
        seconds: The limit, in seconds; 0 expires at the first checkpoint.
        names: The names of the stages it is for: one, or several. A name that no stage has is ignored, so that
            pipelines may share an interceptor.
        kinds: The kinds of stages it is for: a `StageKind` or its lower-case name, or several. A stage is chosen if
            its name or its kind is.

    Raises:
        DefinitionError: An argument is wrong. `Pipeline.build` raises it if a stage is chosen that cannot be stopped,
            since it is a plain function in a thread.

    Example::

        Pipeline("answers", interceptors=[TimeoutInterceptor(20, kinds="agent")])
    """

    seconds: float = attrs.field(converter=_seconds)
    names: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_names)
    kinds: tuple[StageKind, ...] = attrs.field(default=(), kw_only=True, converter=_kinds)

    def limit_of(self, spec: StageSpec) -> float | None:
        """Gives the limit on a stage in seconds, or `None` if this sets none on it."""
        if not self.names and not self.kinds:
            return None if spec.unlimited else self.seconds
        return self.seconds if spec.name in self.names or spec.kind in self.kinds else None

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> StageOutput:  # noqa: ARG002
        """Proceeds, and does nothing else: the engine has set the limit, and ends the attempt when it is reached.

        Raises:
            Exception: What the stage raises.
            trio.Cancelled: The stage was cancelled, by its limit or by anything else. Nothing is done about it here.
        """
        return await proceed()
