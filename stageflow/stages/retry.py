"""`Retry`: how often a stage is tried again, after which failures, and how long to wait before."""

from __future__ import annotations

import math
import random
from typing import final

import attrs

from stageflow.errors import DefinitionError
from stageflow.stages.policy import check_count, check_timeout

__all__ = ["Retry"]


@final
@attrs.frozen(kw_only=True)
class Retry:
    """How a stage is tried again.

    It is tried again after an exception that matches, a `StageOutput.fail` that is `recoverable`, a
    `StageOutput.retry`, and after a limit on the attempt was reached. Never after a cancellation.

    The delay before attempt n + 1 is ``delay * factor ** (n - 1)``, at most `max_delay`, and shortened by a random part
    of up to `jitter` of it ("Exponential Backoff And Jitter", M. Brooker, 2015). It passes on Trio's clock.

    Attributes:
        attempts: How often the stage is tried at most, the first time included.
        delay: Seconds before the second attempt.
        factor: How much longer each delay is than the one before.
        max_delay: Seconds that no delay exceeds.
        jitter: The part of each delay that is left to chance, from 0 to 1.
        on: The exceptions that are worth another try; a type, or a tuple of types.

    Raises:
        DefinitionError: One of them is out of its range.

    Example::

        Pipeline("patient").with_stage("fetch", fetch, retry=Retry(attempts=5, delay=0.1, on=(OSError,)))
    """

    attempts: int = 3
    delay: float = 0.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.0
    on: type[Exception] | tuple[type[Exception], ...] = (Exception,)

    def __attrs_post_init__(self) -> None:
        check_count(self.attempts, "Retry(attempts=...)")
        for option in ("delay", "max_delay"):
            if check_timeout(getattr(self, option), f"Retry({option}=...)") is None:
                raise DefinitionError(f"Retry({option}=...) takes seconds, not {getattr(self, option)!r}")
        if not _is_number(self.factor) or not 1 <= self.factor < math.inf:
            raise DefinitionError(f"Retry(factor=...) takes a number of at least 1, not {self.factor!r}")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise DefinitionError(f"Retry(jitter=...) takes a part between 0 and 1, not {self.jitter!r}")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(f"Retry(on=...) takes subclasses of Exception, not {kind!r}")

    def matches(self, error: Exception | None) -> bool:
        """Whether an exception is worth another try; of a run within the stage, what ended that run counts as well."""
        return isinstance(error, self.on) or isinstance(getattr(error, "original", None), self.on)

    def delay_after(self, attempt: int) -> float:
        """Gives the seconds to wait after an attempt, counted from 1; by chance, if there is jitter."""
        if self.delay == 0:
            return 0.0
        # Where the power is beyond a float, so is the delay beyond its maximum.
        exponent = min(attempt - 1, 1000 / max(math.log2(self.factor), 1.0))
        longest: float = min(self.delay * self.factor**exponent, self.max_delay)
        return longest * (1 - self.jitter * random.random())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
