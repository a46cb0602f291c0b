"""Having a run go, in Trio and beside a store, until it has ended, whatever ends it: what it knows then is there."""

from __future__ import annotations

import shlex
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, TypeAlias, final

import attrs
import trio

from stageflow.engine import PipelineResults
from stageflow.errors import StageflowError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stageflow.commands.stores import Place
    from stageflow.engine import Run
    from stageflow.journal.store import Store

__all__ = ["PIPELINE", "Opening", "Outcome", "conduct", "how_to_go_on"]

PIPELINE = "stageflow.pipeline"
"""Under this name a run that the command has started keeps in its metadata which pipeline it is of."""

Opening: TypeAlias = "Callable[[Store | None], AbstractAsyncContextManager[Run]]"
"""What opens a run, beside the store if there is one."""


@final
@attrs.frozen(kw_only=True)
class Outcome:
    """What has become of a run.

    Attributes:
        results: What it knows.
        error: What it raised, if it did.
        interrupted: Whether that was because of Ctrl-C.
    """

    results: PipelineResults
    error: StageflowError | None
    interrupted: bool


def conduct(
    opening: Opening, place: Place | None, *, as_json: bool, beside: Callable[[Run], Awaitable[None]] | None = None
) -> Outcome:
    """Has a run go until it has ended. If it is recorded, it says at the beginning which run it is, and where.

    Args:
        opening: What opens it.
        place: Where it is recorded, if it is.
        as_json: Whether standard output is for one JSON object, and nothing else.
        beside: What is done while it goes.

    Raises:
        StageflowError: It could not begin.
        KeyboardInterrupt: It was interrupted before it had begun.
    """
    runs: list[Run] = []

    async def go() -> None:
        async with AsyncExitStack() as stack:
            store = None if place is None else await stack.enter_async_context(place.open())
            async with opening(store) as run:
                runs.append(run)
                if place is not None:  # at once, also into a pipe, for whoever will have to go on with it
                    said = f"run {run.id}, recorded in {place.name}"
                    print(said, file=sys.stderr if as_json else sys.stdout, flush=True)
                if beside is not None:
                    await beside(run)

    error: StageflowError | None = None
    interrupted = False
    try:
        trio.run(go)
    except KeyboardInterrupt:
        interrupted = True
        if not runs:
            raise
    except StageflowError as raised:
        error = raised
        if not runs:
            raise
    return Outcome(results=runs[0].results, error=error, interrupted=interrupted)


def how_to_go_on(run_id: str, place: Place | None, tenant: str | None) -> str:
    """Says how to go on with a run that has not come to its end; nothing if it was not recorded."""
    if place is None:
        return ""
    whose = [] if tenant is None else ["--tenant", tenant]
    return f"to go on with it: {shlex.join(['stageflow', 'resume', run_id, '--store', place.name, *whose])}"
