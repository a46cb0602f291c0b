"""`Compensation`: how what a stage has done is undone."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

import attrs

from stageflow.errors import DefinitionError
from stageflow.stages.policy import DEFAULT, Default, check_timeout, shown
from stageflow.stages.retry import Retry
from stageflow.stages.runner import check_arguments

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stageflow.context import StageContext
    from stageflow.output import StageOutput

__all__ = ["Compensation", "Undo", "check_compensation"]

Undo: TypeAlias = "Callable[[StageContext, StageOutput | None], Awaitable[object]]"
"""What undoes a stage: an async function of its context and its output."""


@final
@attrs.frozen
class Compensation:
    """How what a stage has done is undone (a *compensating transaction*; "Sagas", Garcia-Molina and Salem, 1987).

    Attributes:
        undo: An async function of the stage's context and its output. The output is `None` if it is not known whether
            the stage took effect: it failed, was cancelled, or its process died. It may be called more than once, so
            it must not matter how often; the context has the `idempotency_key` that the stage had. It has failed if it
            raises, or returns a `StageOutput` that says so.
        timeout: The limit on one attempt in seconds, `None` for none; left out, it is that of the pipeline.
        retry: How it is tried again; left out, three attempts, a second apart at first.
        best_effort: Whether the run counts as compensated even if this does not succeed.

    Raises:
        DefinitionError: One of them cannot be right.

    Example::

        Pipeline("trip").with_stage("hotel", book_hotel, compensate=Compensation(cancel_hotel, timeout=10))
    """

    undo: Undo
    timeout: float | Default | None = attrs.field(default=DEFAULT, kw_only=True)
    retry: Retry = attrs.field(default=Retry(attempts=3, delay=1.0), kw_only=True)
    best_effort: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        undo: Any = self.undo
        if (
            isinstance(undo, type)
            or not callable(undo)
            or not (
                inspect.iscoroutinefunction(undo) or inspect.iscoroutinefunction(getattr(undo, "__call__", None))  # noqa: B004
            )
        ):
            raise DefinitionError(
                f"compensate= takes an async function of the context and the output, not {shown(undo)}"
            )
        if not isinstance(self.timeout, Default):
            check_timeout(self.timeout, "Compensation(timeout=...)")
        if not isinstance(cast("object", self.retry), Retry):
            raise DefinitionError(f"Compensation(retry=...) takes a Retry, not {self.retry!r}")


def check_compensation(value: object, stage: str) -> Compensation:
    """Gives what ``compensate=`` says.

    Raises:
        DefinitionError: It is neither a `Compensation` nor an async function of two arguments.
    """
    found = value if isinstance(value, Compensation) else Compensation(cast("Undo", value))
    check_arguments(found.undo, (None, None), stage, "called with the context and the output")
    return found
