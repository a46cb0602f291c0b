"""What may be put around the stages of a pipeline, ready made: time limits, logs, metrics, and doing things once."""

from stageflow.interceptors.idempotency import IdempotencyInterceptor
from stageflow.interceptors.logging import LoggingInterceptor
from stageflow.interceptors.metrics import Metrics, MetricsInterceptor
from stageflow.interceptors.timeout import TimeoutInterceptor

__all__ = ["IdempotencyInterceptor", "LoggingInterceptor", "Metrics", "MetricsInterceptor", "TimeoutInterceptor"]
