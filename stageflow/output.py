"""What a stage returns: `StageOutput`, its `StageStatus`, and `Artifact`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast, final

import attrs

from stageflow.errors import in_words
from stageflow.frozen import FrozenDict, freeze

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Artifact", "StageOutput", "StageStatus", "said"]

_NOTHING: FrozenDict[str, Any] = FrozenDict()


@final
class StageStatus(enum.Enum):
    """What a stage says of itself by the output it returns."""

    OK = "ok"
    SKIP = "skip"
    FAIL = "fail"
    CANCEL = "cancel"
    CANCEL_BRANCH = "cancel_branch"
    RETRY = "retry"


@final
@attrs.frozen
class StageOutput:
    """What a stage returns. Made by the class methods, one for each thing that a stage may say.

    An output reads like the mapping it carries: ``output["rows"]``, ``"rows" in output``, ``dict(output)``.

    Attributes:
        status: What the stage says of itself.
        data: What it carries, deeply frozen: a mapping, or the object that the stage returned.
        reason: Why, where the status is not `StageStatus.OK`.
        error: The error of a `fail`.
        recoverable: Whether the stage calls that failure recoverable.
        of: The stage whose branch a `cancel_branch` ends, or which a `retry` sends back, if not the stage itself.
        compensate: Whether a `cancel_branch` has what was done in the branch undone.
    """

    status: StageStatus
    data: Any = attrs.field(default=_NOTHING, converter=freeze)  # pyright: ignore[reportUnknownVariableType]
    reason: str | None = None
    error: Exception | None = None
    recoverable: bool = False
    of: str | None = None
    compensate: bool = False

    @classmethod
    def ok(cls, data: Any = None, /, **fields: Any) -> StageOutput:
        """The stage did its work.

        Args:
            data: A mapping, or any object (an attrs instance, say) that the next stages shall see as `data`.
            **fields: Items of the mapping, in addition to those of `data` if that is a mapping.

        Raises:
            TypeError: There are fields, but `data` is no mapping that they could be added to.
        """
        if data is None:
            return cls(StageStatus.OK, FrozenDict(fields)) if fields else NOTHING
        if fields:
            if not isinstance(data, Mapping):
                raise TypeError(f"fields can be added to a mapping only, not to {type(data).__name__!r}")
            merged: dict[str, Any] = {**data, **fields}
            return cls(StageStatus.OK, FrozenDict(merged))
        return cls(StageStatus.OK, data)

    @classmethod
    def skip(cls, reason: str) -> StageOutput:
        """The stage has nothing to do. What needs it is skipped too; the run goes on and ends `PARTIAL`."""
        return cls(StageStatus.SKIP, reason=said(reason, "StageOutput.skip"))

    @classmethod
    def fail(cls, error: str | Exception, /, *, recoverable: bool = False, **fields: Any) -> StageOutput:
        """The stage failed. The same as raising, but without a traceback.

        Args:
            error: The error, or a sentence that becomes a `RuntimeError`.
            recoverable: Whether trying again may help.
            **fields: What the stage has to show nevertheless; kept as the record's `partial`.
        """
        reason = in_words(error) if isinstance(error, Exception) else said(error, "StageOutput.fail")
        original = error if isinstance(error, Exception) else RuntimeError(reason)
        data: FrozenDict[str, Any] = FrozenDict(fields) if fields else _NOTHING
        return cls(StageStatus.FAIL, data, reason=reason, error=original, recoverable=recoverable)

    @classmethod
    def cancel(cls, reason: str) -> StageOutput:
        """The whole run shall end. What has finished is kept; the run raises `UnifiedPipelineCancelled`."""
        return cls(StageStatus.CANCEL, reason=said(reason, "StageOutput.cancel"))

    @classmethod
    def cancel_branch(cls, reason: str, *, of: str | None = None, compensate: bool = False) -> StageOutput:
        """This branch shall end, and nothing else. Joins beyond it see its output as absent; the run ends `PARTIAL`.

        Args:
            reason: Why.
            of: A stage upstream on the same line, whose branch shall end instead. Everything that runs in it is
                cancelled, and its partial output kept.
            compensate: Whether what was done in the branch is undone, as its stages say with ``compensate=``; except
                for what a stage outside of it has used that has succeeded.
        """
        if of is not None and not isinstance(cast("object", of), str):
            raise TypeError(f"StageOutput.cancel_branch(of=...) takes the name of a stage, not {of!r}")
        reason = said(reason, "StageOutput.cancel_branch")
        return cls(StageStatus.CANCEL_BRANCH, reason=reason, of=of, compensate=compensate)

    @classmethod
    def retry(cls, reason: str, *, stage: str | None = None) -> StageOutput:
        """The stage shall be tried again, as its ``retry=`` allows; without one, or after the last attempt, it fails.

        Args:
            reason: Why. In the next attempt it is ``ctx.feedback``.
            stage: A stage upstream, whose output is found wanting: that one runs again, and then whatever is between
                the two, and this stage. Nobody else may have begun with that output.
        """
        if stage is not None and not isinstance(cast("object", stage), str):
            raise TypeError(f"StageOutput.retry(stage=...) takes the name of a stage, not {stage!r}")
        return cls(StageStatus.RETRY, reason=said(reason, "StageOutput.retry"), of=stage)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def keys(self) -> Any:
        """The keys of `data`, which makes ``dict(output)`` and ``**output`` work."""
        return self.data.keys()

    def get(self, key: str, default: Any = None) -> Any:
        """Gives ``output[key]``, or `default` if there is no such item."""
        return self.data.get(key, default)

    def __bool__(self) -> bool:
        # Without this an output that carries nothing would be false, like an empty mapping.
        return True


def said(reason: object, method: str) -> str:
    """Gives back a reason that says something.

    Raises:
        TypeError: It is no string, or an empty one.
    """
    if not isinstance(reason, str) or not reason.strip():
        also = " or an exception, as an instance," if method == "StageOutput.fail" else ""
        raise TypeError(f"{method}() needs a reason in words{also} not {reason!r}")
    return str.__str__(reason)  # of a subclass as well, whose methods might do anything


NOTHING = StageOutput(StageStatus.OK)
"""The output of a stage that returned `None`."""


@final
@attrs.frozen(kw_only=True)
class Artifact:
    """Something a stage made that is larger than an output: a file, an image, a report.

    Attributes:
        name: What it is called; need not be unique.
        media_type: What it is, as a MIME type.
        data: The thing itself, or `None` if it is elsewhere.
        uri: Where it is, if it is elsewhere.
        metadata: Whatever else is known of it, deeply frozen.
        stage: The stage that made it; filled in by `StageContext.add_artifact`.
        tenant: The tenant it belongs to; filled in likewise.
    """

    name: str
    media_type: str = "application/octet-stream"
    data: Any = attrs.field(default=None, converter=freeze)  # pyright: ignore[reportUnknownVariableType]
    uri: str | None = None
    metadata: Mapping[str, Any] = attrs.field(default=_NOTHING, converter=freeze)
    stage: str | None = None
    tenant: str | None = None
