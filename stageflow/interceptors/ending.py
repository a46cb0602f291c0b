"""The word for how an attempt ended that returned nothing: the other words are those of `StageStatus`."""

from __future__ import annotations

from typing import Final, cast

import trio

__all__ = ["CANCELLED", "ERROR", "status_of"]

CANCELLED: Final = "cancelled"
ERROR: Final = "error"


def status_of(raised: BaseException) -> str:
    """Gives ``"cancelled"`` if it is `trio.Cancelled` and nothing else, also in groups as nurseries make them.

    Anything else is ``"error"``. So is a group of both, for the errors in it are the failure of the stage.
    """
    if isinstance(raised, BaseExceptionGroup):
        _, rest = cast("BaseExceptionGroup[BaseException]", raised).split(trio.Cancelled)
        return CANCELLED if rest is None else ERROR
    return CANCELLED if isinstance(raised, trio.Cancelled) else ERROR
