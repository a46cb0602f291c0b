"""Who holds a lease: a process, by a name that tells whether it is still there."""

from __future__ import annotations

import functools
import itertools
import os
import socket
from pathlib import Path

__all__ = ["is_gone", "new_holder"]

_numbers = itertools.count(1)


@functools.cache
def _machine() -> str:
    """The machine, as far as process ids mean the same on it: a container has its own."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()[:8])
        parts.append(str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]"))
    except OSError:  # not Linux
        pass
    return "/".join(parts)


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; nothing where that cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def new_holder() -> str:
    """Gives a name for one store of this process."""
    pid = os.getpid()
    return f"{_machine()} pid {pid} {_started(pid)}#{next(_numbers)}"


def is_gone(holder: str) -> bool:
    """Whether the process of that name was on this machine, and is not there any more."""
    machine, _, rest = holder.partition(" pid ")
    pid, _, started = rest.partition("#")[0].partition(" ")
    if machine != _machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    # The process may be gone and another one have its number; and what was killed may still be there as a zombie.
    return started != _started(int(pid)) or _is_zombie(int(pid))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] in {"Z", "X"}
    except (OSError, IndexError):
        return False
