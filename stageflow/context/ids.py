"""Run ids: UUIDs of version 7, which sort by the time at which they were drawn."""

from __future__ import annotations

import os
import threading
import time

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
        milliseconds = time.time_ns() // 1_000_000
        bits = int.from_bytes(os.urandom(10)) >> 7  # one bit less than there is room for, to count on from
        if milliseconds <= _last[0]:
            milliseconds, bits = _last[0], _last[1] + 1 + (bits >> 41)
            if bits >> _RANDOM_BITS:
                milliseconds, bits = milliseconds + 1, bits & ((1 << (_RANDOM_BITS - 1)) - 1)
        _last[:] = milliseconds, bits
    high, low = bits >> 62, bits & ((1 << 62) - 1)
    digits = f"{milliseconds << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
