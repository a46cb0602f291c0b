"""What happens when an attempt has ended: callbacks and shielded scopes, in bounded time."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from stageflow.errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

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
    exits: Sequence[tuple[str, Callable[[], object]]],
    record: StageRecord,
    seconds: float,
    raised: BaseException | None,
) -> None:
    """Calls what an attempt has left to be called, the last one first, shielded for so many seconds.

    Args:
        exits: The callbacks, with names.
        record: The record of the stage.
        seconds: The seconds that they may take together.
        raised: What the attempt itself has raised.

    Raises:
        Exception: One of them raised it, and the attempt itself had raised nothing.
    """
    failure: Exception | None = None
    deadline = trio.current_time() + seconds
    for name, callback in reversed(exits):
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
    if failure is not None and raised is None:
        raise failure
    if failure is not None and raised is not None:
        raised.add_note(f"after that, its cleanup raised {in_words(failure)}")


def _overran(record: StageRecord, name: str) -> None:
    record.more.overran = (*record.details.overran, name)
