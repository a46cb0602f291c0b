"""`LoggingInterceptor`: a record of the standard `logging` for the begin and the end of every attempt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio

from stageflow.errors import DefinitionError
from stageflow.interceptors.ending import CANCELLED, status_of
from stageflow.output import StageStatus

if TYPE_CHECKING:
    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages import Proceed

__all__ = ["LoggingInterceptor"]

_TROUBLE = frozenset({StageStatus.FAIL, StageStatus.RETRY})


def _logger(value: logging.Logger | None) -> logging.Logger:
    if value is None:
        return logging.getLogger("stageflow")
    if not isinstance(cast("object", value), logging.Logger):
        raise DefinitionError(
            f"LoggingInterceptor() takes a logging.Logger, not {value!r}; write logging.getLogger('name')"
        )
    return value


def _level(value: int) -> int:
    if not isinstance(cast("object", value), int) or isinstance(value, bool):
        raise DefinitionError(f"LoggingInterceptor(level=...) takes a number such as logging.INFO, not {value!r}")
    return value


def _flag(value: bool) -> bool:
    if not isinstance(cast("object", value), bool):
        raise DefinitionError(f"LoggingInterceptor(payloads=...) takes True or False, not {value!r}")
    return value


@final
@attrs.frozen
class LoggingInterceptor:
    """Logs each attempt of each stage: one record when it starts, and one when it ends.

    The first is of level DEBUG. The second is of `level`; of WARNING if the stage raised an error, which comes with it
    as `exc_info`, or returned a `StageOutput.fail` or a `StageOutput.retry`; and of DEBUG if it was cancelled. An
    attempt that has reached its limit is cancelled, too, as seen from here; the message says why.

    The attributes of a record, for those who format or filter: ``stageflow_pipeline``, ``stageflow_stage``,
    ``stageflow_run_id``, ``stageflow_correlation_id``, ``stageflow_tenant``, ``stageflow_attempt`` and
    ``stageflow_status``, which is ``"started"``, a value of `StageStatus`, ``"error"`` or ``"cancelled"``. At the end
    also ``stageflow_duration``, in seconds on Trio's clock; and ``stageflow_data``, what the output carries, if that
    was asked for. Otherwise no input and no output is in any record, unless a stage writes it into a reason or an
    exception.

    It costs next to nothing where the logger is not enabled for the level.

    Attributes:
        logger: Where it logs to; left out, the logger ``"stageflow"``.
        level: The level of an end that is no trouble.
        payloads: Whether what an output carries is added to the record of the end, as ``stageflow_data``.

    Raises:
        DefinitionError: An argument is wrong.

    Example::

        Pipeline("report", interceptors=[LoggingInterceptor(logging.getLogger("report"), level=logging.DEBUG)])
    """

    logger: logging.Logger = attrs.field(default=None, converter=_logger)
    level: int = attrs.field(default=logging.INFO, kw_only=True, converter=_level)
    payloads: bool = attrs.field(default=False, kw_only=True, converter=_flag)

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> StageOutput:
        """Logs, proceeds, and logs again.

        Raises:
            Exception: What the stage raises, when that is logged; or what a filter of the logger raises.
            trio.Cancelled: The stage was cancelled; that is logged without another checkpoint.
        """
        began = trio.current_time()
        if self.logger.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "started", _extra(ctx, "started"))
        try:
            output = await proceed()
        except BaseException as raised:
            self._raised(ctx, raised, began)
            raise
        self._returned(ctx, output, began)
        return output

    def _raised(self, ctx: StageContext, raised: BaseException, began: float) -> None:
        status = status_of(raised)
        level = logging.DEBUG if status == CANCELLED else logging.WARNING
        if self.logger.isEnabledFor(level):
            extra = _extra(ctx, status, began)
            if status == CANCELLED:
                self._log(level, _in_words(extra, ctx.cancel_reason), extra)
            else:
                self._log(level, _in_words(extra), extra, raised)

    def _returned(self, ctx: StageContext, output: StageOutput, began: float) -> None:
        level = logging.WARNING if output.status in _TROUBLE else self.level
        if self.logger.isEnabledFor(level):
            extra = _extra(ctx, output.status.value, began)
            if self.payloads:
                extra["stageflow_data"] = output.data
            self._log(level, _in_words(extra, output.reason), extra, output.error)

    def _log(self, level: int, what: str, extra: dict[str, Any], error: BaseException | None = None) -> None:
        who = (extra["stageflow_stage"], extra["stageflow_pipeline"], extra["stageflow_attempt"])
        self.logger.log(level, "stage %r of pipeline %r, attempt %d: %s", *who, what, exc_info=error, extra=extra)


def _extra(ctx: StageContext, status: str, began: float | None = None) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "stageflow_pipeline": ctx.pipeline,
        "stageflow_stage": ctx.stage,
        "stageflow_run_id": ctx.run_id,
        "stageflow_correlation_id": ctx.correlation_id,
        "stageflow_tenant": ctx.tenant,
        "stageflow_attempt": ctx.attempt,
        "stageflow_status": status,
    }
    if began is not None:
        extra["stageflow_duration"] = trio.current_time() - began
    return extra


def _in_words(extra: dict[str, Any], reason: str | None = None) -> str:
    because = "" if reason is None else f": {reason}"
    return f"{extra['stageflow_status']} after {extra['stageflow_duration']:.3f} s{because}"
