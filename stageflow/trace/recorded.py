"""The trace of a run that was recorded: the same records that its process has or had, made of its journal.

The values of the user are not read for that, for it would need the user's classes. What a trace says of an output is
that it is there, and of a partial one what is in it, by name.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from stageflow.errors import StoreError
from stageflow.frozen import FrozenDict
from stageflow.graph import Shape, find_branches
from stageflow.graph.branches import TRUNK
from stageflow.journal.records import compensation_of, record_of
from stageflow.stages.policy import TRUNK_NAME
from stageflow.trace.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stageflow.journal.history import RunHistory
    from stageflow.journal.store import RunInfo

__all__ = ["names_only", "shape_of", "trace_of"]


def trace_of(info: RunInfo, history: RunHistory, blobs: Mapping[str, bytes], *, started: float = 0.0) -> Trace:
    """Gives the trace of a run from what `stageflow.journal.resume.load` gives of it.

    Args:
        info: The run, as it is listed.
        history: What is known of it.
        blobs: The large values of its journal.
        started: When it began, on the clock that the times of the trace shall be of. For one that still goes, that is
            Trio's, so that the trace can show how long it has been going.

    Raises:
        StoreError: What is recorded of it is damaged.
    """
    shape = shape_of(history, blobs, info.run_id)
    return Trace(
        shape=shape,
        run_id=info.run_id,
        status=info.status,
        records=tuple(
            record_of(name, shape.branch_names[branch], history.stages.get(name), started, names_only)
            for name, branch in zip(shape.names, shape.branch_of, strict=True)
        ),
        began_at=info.began_at if history.started is None else datetime.fromtimestamp(history.started.began_at, UTC),
        started=started,
        ended=None if history.ended is None else started + history.ended.ended,
        compensation=compensation_of(history),
    )


def shape_of(history: RunHistory, blobs: Mapping[str, bytes], run_id: str) -> Shape:
    """Gives the shape of the graph that a run was of, as it was last.

    Raises:
        StoreError: It cannot be read.
    """
    try:
        described: Mapping[str, Any] = json.loads(blobs[history.graph])
        names: Sequence[str] = described["names"]
        dependencies = tuple(map(tuple, cast("Sequence[Sequence[int]]", described["dependencies"])))
        pipeline: str = described["pipeline"]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the journal of run {run_id} is damaged: its graph cannot be read", run_id=run_id) from error
    branches = find_branches(dependencies)
    branch_of = [TRUNK] * len(names)
    for branch in branches:
        for number in branch.strand:
            branch_of[number] = branch.index
    return Shape(
        pipeline=pipeline,
        names=tuple(names),
        index={name: number for number, name in enumerate(names)},
        dependencies=dependencies,
        branches=branches,
        branch_of=tuple(branch_of),
        branch_names=(TRUNK_NAME, *(names[branch.strand[0]] for branch in branches[1:])),
    )


def names_only(text: str) -> FrozenDict[str, Any]:
    """Gives the items of an encoded mapping, with an ellipsis for what they are; nothing of what is no plain one."""
    tree: object = json.loads(text)
    if not isinstance(tree, dict) or "$" in tree:
        return FrozenDict()
    return FrozenDict(dict.fromkeys(cast("dict[str, Any]", tree), ...))
