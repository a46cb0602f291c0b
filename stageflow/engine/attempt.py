"""One try of one stage: what it means that its body returned this, or raised that."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Self, cast, final

import attrs
import trio

from stageflow.errors import ContractViolation
from stageflow.output import NOTHING, StageOutput, StageStatus

__all__ = ["Suspended", "as_failure", "as_output", "has_cancellation", "is_cancellation"]


_GIVEN = object()


@final
class Suspended:
    """The rest of a coroutine whose first step was taken by hand, to be awaited.

    A body that returns at once needs no preparation for waiting, so the engine takes the first step itself and prepares
    only if there is a second (the idea of `asyncio.eager_task_factory`). The generator protocol goes straight to the
    coroutine, and so do those who look down a task's stack for the frame that waits.
    """

    __slots__ = ("_coroutine", "_trap", "close", "send", "throw")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], trap: Any) -> None:
        self._coroutine: Any = coroutine
        self._trap = trap
        self.send = coroutine.send
        self.throw = coroutine.throw
        self.close = coroutine.close

    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._trap is _GIVEN:
            return self._coroutine.send(None)
        trap, self._trap = self._trap, _GIVEN
        return trap

    @property
    def cr_frame(self) -> Any:
        """The coroutine's frame."""
        return self._coroutine.cr_frame

    @property
    def cr_await(self) -> Any:
        """What the coroutine waits for."""
        return self._coroutine.cr_await


def as_output(returned: object, stage: str) -> StageOutput:
    """Reads what a body returned.

    Raises:
        ContractViolation: It is nothing that a stage may return.
    """
    if type(returned) is StageOutput:
        if returned.status is StageStatus.OK or _is_whole(returned):
            return returned
        raise ContractViolation(
            f"stage {stage!r} returned {_shown(returned)}, which says nothing clear; make outputs with the methods of "
            f"StageOutput: ok, skip, fail, cancel, cancel_branch",
            stage=stage,
        )
    if returned is None:
        return NOTHING
    if isinstance(returned, Mapping) or attrs.has(type(returned)):
        return StageOutput(StageStatus.OK, returned)
    raise ContractViolation(
        f"stage {stage!r} returned {_shown(returned)}; a stage returns a StageOutput, a mapping, an attrs instance or "
        f"None, so wrap it: StageOutput.ok(value=...)",
        stage=stage,
    )


def _is_whole(output: StageOutput) -> bool:
    """Whether an output that is not ok could come from one of the methods that make such outputs."""
    if output.status is StageStatus.FAIL and not isinstance(output.error, Exception):
        return False
    return isinstance(cast("object", output.status), StageStatus) and bool(output.reason)


def as_failure(raised: BaseException) -> Exception | None:
    """Gives the failure in what a body raised, or `None` if there is none: it was cancelled, or the program is to end.

    Trio's own nurseries may raise cancellation and errors in one group. The errors are the stage's failure; the
    cancellation is not, and it is not lost either, for the next checkpoint meets it again.
    """
    rest = _without_cancellation(raised)
    return rest if isinstance(rest, Exception) else None


def is_cancellation(raised: BaseException) -> bool:
    """Whether it is `trio.Cancelled` and nothing else: by itself, or in groups as Trio's nurseries make them."""
    return _without_cancellation(raised) is None


def has_cancellation(raised: BaseException) -> bool:
    """Whether it is `trio.Cancelled`, or a group in which there is one."""
    return _without_cancellation(raised) is not raised


def _without_cancellation(raised: BaseException) -> BaseException | None:
    if isinstance(raised, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", raised)
        try:
            cancelled, rest = group.split(trio.Cancelled)
        except Exception:  # a group that cannot be split, or is nested too deep, is taken as it is
            return group
        return group if cancelled is None else rest
    return None if isinstance(raised, trio.Cancelled) else raised


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # it is the user's
        text = "an object that cannot be shown"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
