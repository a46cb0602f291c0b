"""`MetricsInterceptor`: counts and times attempts; and `Metrics`, the two methods it needs of whatever keeps them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Protocol, cast, final, runtime_checkable

import attrs
import trio

from stageflow.errors import DefinitionError
from stageflow.interceptors.ending import status_of
from stageflow.stages.policy import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages import Proceed

__all__ = ["Metrics", "MetricsInterceptor"]


@runtime_checkable
class Metrics(Protocol):
    """Where numbers go: what one writes to bind stageflow to Prometheus, OpenTelemetry or anything else.

    Neither method may block, nor raise: what it raises is the failure of the stage. One name comes always with the same
    keys of labels.
    """

    def count(self, name: str, value: int, labels: Mapping[str, str]) -> None:
        """Adds to a number.

        Args:
            name: What is counted, in letters and underscores.
            value: How many are added; negative only for what goes up and down.
            labels: Of what kind they are.
        """
        ...

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Adds a measurement to a distribution.

        Args:
            name: What is measured, with its unit, in letters and underscores.
            value: The measurement.
            labels: Of what kind it is.
        """
        ...


def _metrics(value: Metrics) -> Metrics:
    if isinstance(value, type) or not isinstance(cast("object", value), Metrics):
        raise DefinitionError(
            f"MetricsInterceptor() takes an object with the methods count(name, value, labels) and "
            f"record(name, value, labels), not {shown(value)}"
        )
    for method in (value.count, value.record):
        if not callable(method) or inspect.iscoroutinefunction(method):
            raise DefinitionError(
                f"MetricsInterceptor() calls count() and record() as plain functions, which {shown(method)} is not"
            )
    return value


@final
@attrs.frozen
class MetricsInterceptor:
    """Counts the attempts of stages, and measures how long they take.

    ================================== ========== =============================
    name                               method     labels
    ================================== ========== =============================
    ``stageflow_attempts_started``     ``count``  pipeline, stage
    ``stageflow_attempts_running``     ``count``  pipeline, stage; up and down
    ``stageflow_attempts_ended``       ``count``  pipeline, stage, status
    ``stageflow_attempt_seconds``      ``record`` pipeline, stage, status
    ================================== ========== =============================

    The status is a value of `StageStatus`, ``"error"`` if the stage raised one, or ``"cancelled"``, which is also what
    becomes of an attempt at its limit, as seen from here. Times are seconds on Trio's clock. There is nothing in the
    labels that has no bounds: no run's id, no tenant.

    Attributes:
        metrics: Where the numbers go.

    Raises:
        DefinitionError: `metrics` is no `Metrics`.

    Example::

        Pipeline("report", interceptors=[MetricsInterceptor(PrometheusMetrics())])
    """

    metrics: Metrics = attrs.field(converter=_metrics)

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> StageOutput:
        """Counts, proceeds, counts and measures.

        Raises:
            Exception: What the stage raises, when that is counted; or what `metrics` raises.
            trio.Cancelled: The stage was cancelled; that is counted without another checkpoint.
        """
        labels = {"pipeline": ctx.pipeline, "stage": ctx.stage}
        began = trio.current_time()
        self.metrics.count("stageflow_attempts_started", 1, labels)
        self.metrics.count("stageflow_attempts_running", 1, labels)
        try:
            output = await proceed()
        except BaseException as raised:
            self._ended(labels, status_of(raised), began)
            raise
        self._ended(labels, output.status.value, began)
        return output

    def _ended(self, labels: Mapping[str, str], status: str, began: float) -> None:
        self.metrics.count("stageflow_attempts_running", -1, labels)
        with_status = {**labels, "status": status}
        self.metrics.count("stageflow_attempts_ended", 1, with_status)
        self.metrics.record("stageflow_attempt_seconds", trio.current_time() - began, with_status)
