"""`Fault`: in what way a value is not what a contract declares."""

from __future__ import annotations

import attrs

__all__ = ["Fault"]


@attrs.frozen(kw_only=True)
class Fault:
    """One way in which a value is not what was declared.

    Attributes:
        path: Where in the value, as one would write it: ``doc.pages[3].title``.
        found: What is there, in words.
        wanted: What should be there, in words.
    """

    path: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.path}: wanted {self.wanted}, found {self.found}"
