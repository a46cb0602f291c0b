"""What a stage may return, and how that is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import attrs

from stageflow.errors import ContractViolation
from stageflow.output import NOTHING, StageOutput, StageStatus

__all__ = ["as_output"]


def as_output(returned: object, stage: str) -> StageOutput:
    """Reads what a body returned.

    Raises:
        ContractViolation: It is nothing that a stage may return.
    """
    if type(returned) is StageOutput:
        if returned.status is StageStatus.OK or _is_whole(returned):
            return returned
        raise ContractViolation(
            f"stage {stage!r} returned {_shown(returned)}, which says nothing clear; make outputs with the methods of "
            f"StageOutput: ok, skip, fail, cancel, cancel_branch, retry",
            stage=stage,
        )
    if returned is None:
        return NOTHING
    if isinstance(returned, Mapping) or attrs.has(type(returned)):
        return StageOutput(StageStatus.OK, returned)
    raise ContractViolation(
        f"stage {stage!r} returned {_shown(returned)}; a stage returns a StageOutput, a mapping, an attrs instance or "
        f"None, so wrap it: StageOutput.ok(value=...)",
        stage=stage,
    )


def _is_whole(output: StageOutput) -> bool:
    """Whether an output that is not ok could come from one of the methods that make such outputs."""
    if output.status is StageStatus.FAIL and not isinstance(output.error, Exception):
        return False
    return isinstance(cast("object", output.status), StageStatus) and bool(output.reason)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # it is the user's
        text = "an object that cannot be shown"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
