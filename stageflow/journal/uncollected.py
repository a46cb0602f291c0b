"""Reading much at once, without a search for garbage in it."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Generator[None]:
    """Keeps Python from looking for garbage in the block, which must not await anything.

    Who makes many objects that stay has Python look through all of them again and again. Where ten thousand stages are
    read from a journal, that took longer than reading them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
