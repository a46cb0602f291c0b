"""`Trace`: the records of a run as something one looks at."""

from __future__ import annotations

from datetime import datetime
from typing import final

import attrs

from stageflow.graph import Shape
from stageflow.journal import RunStatus, StageRecord

__all__ = ["Trace"]


@final
@attrs.frozen(kw_only=True, eq=False)
class Trace:
    """The records of a run as something one looks at.

    Attributes:
        shape: Names and branches of the graph.
        run_id: The run's id.
        status: How far it is, or how it ended.
        records: The record of every stage, in topological order.
        began_at: When it began, by the wall clock.
        started: When it began, on Trio's clock.
        ended: When it ended, on Trio's clock; `None` while it goes.
    """

    shape: Shape = attrs.field(repr=False)
    run_id: str
    status: RunStatus
    records: tuple[StageRecord, ...] = attrs.field(repr=False)
    began_at: datetime
    started: float
    ended: float | None
