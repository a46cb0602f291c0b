"""What happens when an attempt has ended: callbacks and shielded scopes, in bounded time."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from stageflow.engine.body import is_cancellation
from stageflow.errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from stageflow.journal import StageRecord

__all__ = ["cleanup", "run_exits"]


@contextmanager
def cleanup(record: StageRecord, timeout: float) -> Generator[trio.CancelScope]:
    """A shielded scope that lasts for so many seconds; if it overruns, the record says so."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + timeout) as scope:
        yield scope
    if scope.cancelled_caught:
        _overran(record, "ctx.cleanup()")


async def run_exits(  # noqa: ASYNC910  # what is called may have no checkpoint
    take: Callable[[], tuple[str, Callable[[], object]] | None],
    record: StageRecord,
    seconds: float,
    raised: BaseException | None,
) -> None:
    """Calls what an attempt has left to be called, the last one first, shielded for so many seconds.

    Args:
        take: Gives the next callback, with its name, and `None` at last. A callback may leave more to be called.
        record: The record of the stage.
        seconds: The seconds that they may take together.
        raised: What the attempt itself has raised.

    Raises:
        Exception: One of them raised it, and the attempt itself had raised nothing, or been cancelled.
    """
    failure: Exception | None = None
    deadline = trio.current_time() + seconds
    while (taken := take()) is not None:
        name, callback = taken
        # Each has a scope of its own: the next one is called even if there is no time left for it to wait.
        with trio.CancelScope(shield=True, deadline=deadline) as scope:  # noqa: ASYNC912  # as the callback has it
            try:
                called = callback()
                if inspect.isawaitable(called):
                    await called
            except Exception as error:  # the others are to be called as well
                failure = failure or error
        if scope.cancelled_caught:
            _overran(record, name)
    if failure is not None:
        if raised is None or is_cancellation(raised):
            raise failure
        raised.add_note(f"after that, its cleanup raised {in_words(failure)}")


def _overran(record: StageRecord, name: str) -> None:
    record.more.overran = (*record.details.overran, name)
