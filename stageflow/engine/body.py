"""A body on its way: how its first step is taken, and what it means that it raised this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast, final

import trio

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["Suspended", "as_failure", "has_cancellation", "is_cancellation"]


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
        self.send: Any = coroutine.send
        self.throw: Any = coroutine.throw
        self.close: Any = coroutine.close

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
