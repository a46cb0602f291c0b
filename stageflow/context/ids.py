"""Run ids: UUIDs of version 7, which sort by the time at which they were drawn."""

from __future__ import annotations

import secrets
import threading
import time
import uuid

__all__ = ["new_run_id"]

_RANDOM_BITS = 74
_lock = threading.Lock()
_last = [0, 0]  # milliseconds since the epoch, and the random bits drawn for them


def new_run_id() -> str:
    """Draws a run id. Ids drawn one after the other in one process sort in that order.

    The layout is that of RFC 9562, section 5.7; within a millisecond the random bits grow by a random step (its section
    6.2, method 2), so that ids are ordered, and still hard to guess.
    """
    with _lock:
        milliseconds, bits = time.time_ns() // 1_000_000, secrets.randbits(_RANDOM_BITS - 1)
        if milliseconds <= _last[0]:
            milliseconds, bits = _last[0], _last[1] + 1 + secrets.randbits(32)
            if bits >> _RANDOM_BITS:
                milliseconds, bits = milliseconds + 1, secrets.randbits(_RANDOM_BITS - 1)
        _last[:] = milliseconds, bits
    high, low = bits >> 62, bits & ((1 << 62) - 1)
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))
