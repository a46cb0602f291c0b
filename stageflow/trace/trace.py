"""`Trace`: the records of a run as something one looks at."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, final

import attrs

from stageflow.graph import Shape
from stageflow.journal import RunStatus, StageRecord
from stageflow.journal.undo import CompensationRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions
    from rich.text import Text


__all__ = ["Trace"]


@final
@attrs.frozen(kw_only=True, eq=False)
class Trace:
    """The records of a run as something one looks at: ``rich.print(results.trace)``.

    Taking one costs next to nothing; all the work is done when it is printed. The trace of a run that still goes shows
    how far it is at that moment.

    Attributes:
        shape: Names and branches of the graph.
        run_id: The run's id.
        status: How far it is, or how it ended.
        records: The record of every stage, in topological order.
        began_at: When it began, by the wall clock.
        started: When it began, on Trio's clock.
        ended: When it ended, on Trio's clock; `None` while it goes.
        compensation: What was undone, if anything was to be.
    """

    shape: Shape = attrs.field(repr=False)
    run_id: str
    status: RunStatus
    records: tuple[StageRecord, ...] = attrs.field(repr=False)
    began_at: datetime
    started: float
    ended: float | None
    compensation: CompensationRecord | None = attrs.field(default=None, repr=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from stageflow.trace.tree import draw  # noqa: PLC0415 - brings rich along, which only those need who look

        return draw(self, options)
