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
        self._outputs: dict[str, T] = {}

    def put(self, name: str, output: T) -> None:
        """Writes an output.

        Raises:
            OutputConflictError: There is one under that name; it stays as it is.
        """
        # Of two threads that get past the first check, the dict lets one win, and the second check tells the other.
        if name in self._outputs or self._outputs.setdefault(name, output) is not output:
            raise OutputConflictError(name)

    def __getitem__(self, name: str) -> T:
        return self._outputs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._outputs))

    def __len__(self) -> int:
        return len(self._outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _refill, (dict(self._outputs),)

    def __repr__(self) -> str:
        return f"OutputBag({self._outputs!r})"


def _refill(outputs: dict[str, T]) -> OutputBag[T]:
    bag: OutputBag[T] = OutputBag()
    for name, output in outputs.items():
        bag.put(name, output)
    return bag
