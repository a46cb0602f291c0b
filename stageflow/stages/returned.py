"""What a stage may return, and how that is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import attrs

from stageflow.errors import ContractViolation
from stageflow.output import NOTHING, StageOutput, StageStatus

if TYPE_CHECKING:
    from stageflow.context import StageContext
    from stageflow.stages.contract import Contract
    from stageflow.stages.runner import NativeBody

__all__ = ["as_output", "as_whole", "under_contract"]


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


def as_whole(body: NativeBody) -> NativeBody:
    """Has whatever a body returns made an output, also what may not be one without a contract, such as a list.

    What is around the body then finds an output, as always, and the contract decides at the end.
    """

    async def wrapped(ctx: StageContext) -> StageOutput:
        returned = await body(ctx)
        return returned if isinstance(returned, StageOutput) else StageOutput(StageStatus.OK, returned)

    return wrapped


def under_contract(body: NativeBody, contract: Contract) -> NativeBody:
    """Has what a body returns checked against a contract."""

    async def checked(ctx: StageContext) -> StageOutput:
        returned = await body(ctx)
        data = returned
        if isinstance(returned, StageOutput):
            if returned.status is not StageStatus.OK:
                return as_output(returned, ctx.stage)
            data = None if contract.declared is None and returned is NOTHING else returned.data
        return StageOutput(StageStatus.OK, contract.check(data, stage=ctx.stage, root=ctx.stage))

    return checked


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
