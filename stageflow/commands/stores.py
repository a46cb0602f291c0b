"""Where the command finds its runs, and how it opens that."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, final

import attrs

from stageflow.commands.ending import UsageError
from stageflow.journal.store import open_store

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from stageflow.journal.store import Store

__all__ = ["STORE", "Place", "place_of", "seconds_in"]

STORE = "STAGEFLOW_STORE"
"""The variable of the environment that says where runs are if nothing else does."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@final
@attrs.frozen
class Place:
    """Where runs are kept.

    Attributes:
        name: As the user says it.
        url: As `open_store` takes it.
    """

    name: str
    url: str

    def open(self, *, read_only: bool = False) -> AbstractAsyncContextManager[Store]:
        """Opens the store; to look at, or to write.

        Raises:
            UsageError: It is to be looked at, and not there.
        """
        if read_only:
            self.check()
        return open_store(self.url, read_only=read_only)

    def check(self) -> None:
        """Sees that the store is there, so that a misspelt name does not make an empty one.

        Raises:
            UsageError: It is not.
        """
        scheme, _, path = self.url.partition(":")
        if scheme == "sqlite" and not Path(path).exists():
            raise UsageError(f"there is no store {self.name!r}")


def place_of(given: str | None, *, environment: bool = True) -> Place | None:
    """Gives the place that a user means, by a path or by a URL; `None` if nothing is said.

    Args:
        given: What the command was given.
        environment: Whether the environment may say it.
    """
    name = given or (os.environ.get(STORE) if environment else None)
    if not name:
        return None
    known = name.partition(":")[0] in {"sqlite", "memory"} or "://" in name
    return Place(name, name if known else f"sqlite:{name}")


def seconds_in(age: str) -> float:
    """Gives the seconds in what is written as ``"30d"``.

    Raises:
        UsageError: It is nothing of that sort.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if found is None:
        raise UsageError(f"{age!r} is no length of time; write a number and s, m, h, d or w, such as 30d")
    return float(found[1]) * _UNITS[found[2]]
