"""`Transaction`: what a stage has written to the run's store together with its own end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Transaction"]


@final
class Transaction:
    """SQL that is written to the run's store in one commit with the end of an attempt; see `StageContext.transaction`.

    What the SQL cannot do is to end the transaction, or to touch the tables of stageflow, whose names begin with
    ``stageflow_``.

    Attributes:
        statements: What is to be written so far, with parameters.
    """

    __slots__ = ("_query", "statements")

    def __init__(self, query: Callable[[str, Any], Awaitable[list[tuple[Any, ...]]]]) -> None:
        self.statements: list[tuple[str, Any]] = []
        self._query = query

    def execute(self, sql: str, parameters: Any = ()) -> None:
        """Adds a statement. It is executed when the stage has succeeded, after those before it.

        Args:
            sql: One statement, with ``?`` or ``:name`` for parameters.
            parameters: Their values: a sequence, or a mapping.
        """
        self.statements.append((sql, parameters))

    async def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Reads rows as they are now, without what this transaction is going to write.

        Args:
            sql: A ``SELECT``.
            parameters: The values of its parameters: a sequence, or a mapping.

        Raises:
            StoreError: The store could not read it.
            trio.Cancelled: The stage was cancelled.
        """
        return await self._query(sql, parameters)
