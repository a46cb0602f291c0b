"""`ContextSnapshot`: what was known when a run began, as immutable versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast, final

import attrs

from stageflow.frozen import FrozenDict

if TYPE_CHECKING:
    from stageflow.context.delta import Delta

__all__ = ["ContextSnapshot"]


def _freeze_values(values: Mapping[str, Any]) -> FrozenDict[str, Any]:
    return values if isinstance(values, FrozenDict) else FrozenDict(values)


@final
@attrs.frozen(eq=False)
class ContextSnapshot(Mapping[str, Any]):
    """A version of the state around a run (messages, documents, a profile): an immutable mapping that knows its past.

    Two snapshots are equal if their values are.

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

    def evolve(self, /, **changes: Any) -> ContextSnapshot:
        """Gives the next version, with these values set. What is not changed is shared, not copied."""
        return self._following({**self._values, **changes})

    def diff(self, earlier: ContextSnapshot) -> Delta:
        """Gives what has changed from an earlier version to this one, however deep; as large as the change."""
        from stageflow.context.delta import difference  # noqa: PLC0415  # only some compare versions

        return difference(earlier._values, self._values)

    def apply(self, delta: Delta) -> ContextSnapshot:
        """Gives the next version, with these changes made: ``old.apply(new.diff(old)) == new``.

        Raises:
            ValueError: A change does not fit this version.
        """
        values = delta.apply(self._values)
        if not isinstance(values, FrozenDict):
            raise ValueError(f"a snapshot is a mapping, and these changes would make it {type(values).__name__!r}")
        return self._following(cast("FrozenDict[str, Any]", values))

    def rollback(self, version: int) -> ContextSnapshot:
        """Gives an earlier version.

        Raises:
            ValueError: There is none of that number among this one and those before it.
        """
        found: ContextSnapshot | None = self
        while found is not None and found.version != version:
            found = found.parent
        if found is None:
            raise ValueError(f"there is no version {version!r} before this one, which is version {self.version}")
        return found

    def forget(self) -> ContextSnapshot:
        """Gives the same version without those before it, which can go then if nobody else holds them."""
        alone = ContextSnapshot(self._values)
        object.__setattr__(alone, "version", self.version)
        return alone

    def _following(self, values: Mapping[str, Any]) -> ContextSnapshot:
        following = ContextSnapshot(values)
        object.__setattr__(following, "version", self.version + 1)
        object.__setattr__(following, "parent", self)
        return following

    def __reduce__(self) -> tuple[Any, ...]:
        # One after the other, for within each other a few hundred versions are too deep for pickle.
        versions: list[tuple[int, FrozenDict[str, Any]]] = []
        earlier: ContextSnapshot | None = self
        while earlier is not None:
            versions.append((earlier.version, earlier._values))
            earlier = earlier.parent
        return _restored, (versions[::-1],)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    __hash__ = None  # type: ignore[assignment]  # like every mapping whose values may have no hash


def _restored(versions: list[tuple[int, FrozenDict[str, Any]]]) -> ContextSnapshot:
    parent: ContextSnapshot | None = None
    for version, values in versions:
        snapshot = ContextSnapshot(values)
        object.__setattr__(snapshot, "version", version)
        object.__setattr__(snapshot, "parent", parent)
        parent = snapshot
    assert parent is not None
    return parent
