"""`OutputBag`: outputs by name, each written once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, final

from stageflow.errors import OutputConflictError

__all__ = ["OutputBag"]

T = TypeVar("T")


@final
class OutputBag(Mapping[str, T]):
    """A mapping that many may write and nobody may overwrite.

    Every single operation is atomic, between Trio tasks and between threads: a write is there wholly or not at all, and
    iterating goes over the names that were there when it began. Names come in the order in which they were written.
    """

    __slots__ = ("_outputs",)

    def __init__(self) -> None:
        self._outputs: dict[str, tuple[T]] = {}

    def put(self, name: str, output: T) -> None:
        """Writes an output.

        Raises:
            OutputConflictError: There is one under that name; it stays as it is.
        """
        # Of two threads, the dict lets one win. A tuple made here tells which, even if both write the very same object.
        entry = (output,)
        if self._outputs.setdefault(name, entry) is not entry:
            raise OutputConflictError(name)

    def __getitem__(self, name: str) -> T:
        return self._outputs[name][0]

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._outputs))

    def __len__(self) -> int:
        return len(self._outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _refill, (dict(self),)

    def __repr__(self) -> str:
        return f"OutputBag({dict(self)!r})"


def _refill(outputs: dict[str, T]) -> OutputBag[T]:
    bag: OutputBag[T] = OutputBag()
    for name, output in outputs.items():
        bag.put(name, output)
    return bag
