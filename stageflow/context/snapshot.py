"""`ContextSnapshot`: what was known when a run began, as immutable versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import attrs

from stageflow.frozen import FrozenDict

__all__ = ["ContextSnapshot"]


def _freeze_values(values: Mapping[str, Any]) -> FrozenDict[str, Any]:
    return FrozenDict(values)


@final
@attrs.frozen(eq=False)
class ContextSnapshot(Mapping[str, Any]):
    """A version of the state around a run (messages, documents, a profile): an immutable mapping that knows its past.

    Two snapshots are equal if their values are. Going back to an earlier version is using `parent`.

    Attributes:
        version: How many changes lie behind it; a new snapshot is version 0.
        parent: The version before, or `None`.

    Example::

        first = ContextSnapshot({"messages": ["hello"]})
        second = first.evolve(messages=[*first["messages"], "goodbye"])
        assert second.version == 1
        assert second.parent is first
    """

    _values: FrozenDict[str, Any] = attrs.field(factory=FrozenDict[str, Any], converter=_freeze_values)
    version: int = attrs.field(default=0, init=False)
    parent: ContextSnapshot | None = attrs.field(default=None, init=False, repr=False)

    def evolve(self, **changes: Any) -> ContextSnapshot:
        """Gives the next version, with these values set. What is not changed is shared, not copied."""
        following = ContextSnapshot({**self._values, **changes})
        object.__setattr__(following, "version", self.version + 1)
        object.__setattr__(following, "parent", self)
        return following

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    __hash__ = None  # type: ignore[assignment]  # like every mapping whose values may have no hash
