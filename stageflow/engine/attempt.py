"""One try of one stage: what it means that its body returned this, or raised that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import attrs
import trio

from stageflow.errors import ContractViolation
from stageflow.frozen import freeze
from stageflow.output import NOTHING, StageOutput, StageStatus

__all__ = ["as_failure", "as_output", "has_cancellation", "in_words", "is_cancellation"]


def as_output(returned: object, stage: str) -> StageOutput:
    """Reads what a body returned.

    Raises:
        ContractViolation: It is nothing that a stage may return.
    """
    if isinstance(returned, StageOutput):
        return returned
    if returned is None:
        return NOTHING
    if isinstance(returned, Mapping) or attrs.has(type(returned)):
        return StageOutput(StageStatus.OK, freeze(returned))
    raise ContractViolation(
        f"stage {stage!r} returned {_shown(returned)}; a stage returns a StageOutput, a mapping, an attrs instance or "
        f"None, so wrap it: StageOutput.ok(value=...)",
        stage=stage,
    )


def as_failure(raised: BaseException) -> Exception | None:
    """Gives the failure in what a body raised, or `None` if there is none: it was cancelled, or the program is to end.

    Trio's own nurseries may raise cancellation and errors in one group. The errors are the stage's failure; the
    cancellation is not, and it is not lost either, for the next checkpoint meets it again.
    """
    rest = _without_cancellation(raised)
    return rest if isinstance(rest, Exception) else None


def is_cancellation(raised: BaseException) -> bool:
    """Whether it is `trio.Cancelled` and nothing else: by itself, or in groups as Trio's nurseries make them."""
    return _without_cancellation(raised) is None


def has_cancellation(raised: BaseException) -> bool:
    """Whether it is, or holds, a `trio.Cancelled`."""
    return _without_cancellation(raised) is not raised


def _without_cancellation(raised: BaseException) -> BaseException | None:
    if isinstance(raised, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", raised)
        cancelled, rest = group.split(trio.Cancelled)
        return group if cancelled is None else rest
    return None if isinstance(raised, trio.Cancelled) else raised


def in_words(error: BaseException) -> str:
    """Gives an error in one line: its type and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
