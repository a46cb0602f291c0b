"""The events of a run, as they are written: what has happened, in the order in which it did, never changed again.

An event is kept as JSON. cattrs makes that of the classes here, and reads it back strictly: a key too many, or a value
of another type, means that the journal is damaged. The values of the user (outputs, the data of a run) are kept beside,
as `stageflow.journal.codec` writes them.
"""

from __future__ import annotations

import functools
import json
from typing import Any, TypeAlias, final

import attrs
import cattrs

from stageflow.errors import StoreError
from stageflow.journal.record import Cause, CauseKind, RunStatus, StageState
from stageflow.journal.undo import CompensationStatus, UndoState

__all__ = [
    "ArtifactAdded",
    "AttemptEnded",
    "AttemptStarted",
    "BranchEnded",
    "CompensationEnded",
    "CompensationStarted",
    "ErrorNote",
    "Event",
    "ItemNote",
    "RunEnded",
    "RunResumed",
    "RunStarted",
    "StageReopened",
    "StageSettled",
    "UndoEnded",
    "UndoStarted",
    "read_event",
    "write_event",
    "write_success",
]


@final
@attrs.frozen(kw_only=True)
class ErrorNote:
    """What is kept of an exception.

    Attributes:
        kind: Its class, as ``module:qualname``.
        message: What it says.
        traceback: Where it was raised, as text.
    """

    kind: str
    message: str
    traceback: str = ""


@final
@attrs.frozen(kw_only=True)
class RunStarted:
    """A run began, or a run within a stage, or an item of a map. The value is its data.

    Attributes:
        run_id: Its id.
        pipeline: The pipeline's name.
        began_at: When, by the wall clock, in seconds since the epoch.
        correlation_id: What ties it to others.
        context: The rest of its context, encoded: metadata, snapshot, limits of its own.
        data: A digest of its data, to tell whether a run within a stage is the same again; `None` if it has none.
        graph: The digest of the blob that describes its graph.
        continues: Whether it goes on with what was recorded of it before, and does not begin anew.
        reset: If so: the stages that are run again.
        base: The run that it was forked from.
        base_length: How many events that one had by then.
        keeps: The stages whose ends were taken over from it.
    """

    run_id: str
    pipeline: str
    began_at: float
    graph: str
    correlation_id: str | None = None
    context: str | None = None
    data: str | None = None
    continues: bool = False
    reset: tuple[str, ...] = ()
    base: str | None = None
    base_length: int = 0
    keeps: tuple[str, ...] = ()


@final
@attrs.frozen(kw_only=True)
class RunResumed:
    """A process went on with a run.

    Attributes:
        holder: Which process.
        graph: The digest of the blob that describes the graph as it is now.
        reset: The stages that are run again.
        renamed: The stages that have another name now: the new ones, by the old ones.
        dropped: The stages that are no longer there.
        recoveries: How often the run was resumed after its process had died, since it last came to an end.
    """

    holder: str
    graph: str
    reset: tuple[str, ...] = ()
    renamed: dict[str, str] = attrs.field(factory=dict[str, str])
    dropped: tuple[str, ...] = ()
    recoveries: int = 0


@final
@attrs.frozen(kw_only=True)
class AttemptStarted:
    """A stage was entered. Of a stage without effects that is noted, but not waited for.

    Attributes:
        attempt: Which attempt, from 1.
        started: When, in seconds since the run began.
    """

    attempt: int
    started: float


@final
@attrs.frozen(kw_only=True)
class AttemptEnded:
    """An attempt failed, and another one follows.

    Attributes:
        attempt: Which attempt, from 1.
        started: When it began, in seconds since the run began.
        ended: When it ended.
        reason: Why it was not the last.
        error: What it raised, if it raised something.
        feedback: What the next one shall see as ``ctx.feedback``.
    """

    attempt: int
    started: float
    ended: float
    reason: str | None = None
    error: ErrorNote | None = None
    feedback: str | None = None


@final
@attrs.frozen(kw_only=True)
class ItemNote:
    """What is kept of an item of a map that did not end well.

    Attributes:
        number: Which item.
        state: How it ended.
        attempts: How often it was entered.
        cause: Why.
        error: What it raised.
    """

    number: int
    state: StageState
    attempts: int = 0
    cause: Cause | None = None
    error: ErrorNote | None = None


@final
@attrs.define(kw_only=True)  # not frozen: there are as many of them as stages, and that takes a third of the time
class StageSettled:
    """A stage ended. The value is its output, if it succeeded.

    Attributes:
        state: How.
        attempts: How often it was entered.
        started: When its first attempt began, in seconds since the run began.
        began: When its last attempt began, if that is not when the stage did.
        ended: When it settled.
        partial: What it had saved, encoded.
        error: What it raised.
        recoverable: Whether it called its failure recoverable.
        cause: Why it did not succeed.
        after_cancel: Whether it ended by itself although it was being cancelled.
        waited: How long it waited for limits, in seconds.
        limit: The limit that it ran into, in seconds.
        source: What had set that limit.
        overran: What of its cleanup took too long.
        items: For a map: the items that did not end well.
        tolerated: Whether it failed and was tolerated.
        partly: Whether it succeeded although something within it did not.
    """

    state: StageState
    attempts: int = 0
    started: float | None = None
    began: float | None = None
    ended: float | None = None
    partial: str | None = None
    error: ErrorNote | None = None
    recoverable: bool = False
    cause: Cause | None = None
    after_cancel: bool = False
    waited: float = 0.0
    limit: float | None = None
    source: str = ""
    overran: tuple[str, ...] = ()
    items: tuple[ItemNote, ...] = ()
    tolerated: bool = False
    partly: bool = False

    @property
    def plain(self) -> bool:
        """Whether the stage succeeded, and there is nothing else to say of it; as of almost all."""
        flags = self.after_cancel or self.recoverable or self.tolerated or self.partly
        said = self.error or self.cause or self.items or self.overran or self.source or self.waited or flags
        unsaid = self.partial is None and self.began is None and self.limit is None
        return (
            unsaid
            and not said
            and self.state is StageState.SUCCEEDED
            and self.started is not None
            and self.ended is not None
        )


@final
@attrs.frozen(kw_only=True)
class StageReopened:
    """A stage that had succeeded was sent back by a guard, and is tried again.

    Attributes:
        reason: Why.
        at: When, in seconds since the run began.
    """

    reason: str | None
    at: float


@final
@attrs.frozen(kw_only=True)
class BranchEnded:
    """A branch was ended on its own. What it is about is the first stage of the branch.

    Attributes:
        cause: Why.
        undo: Whether what was done in it is undone.
    """

    cause: Cause
    undo: bool = False


@final
@attrs.frozen(kw_only=True)
class CompensationStarted:
    """A run is undone from here on, and never gone on with. It has ended, and all of its stages are on record.

    Attributes:
        cause: Why.
        stage: The stage whose failure the run is going to raise; `None` if it raises something else.
        status: What the run has come to.
    """

    cause: Cause
    stage: str | None
    status: RunStatus


@final
@attrs.frozen(kw_only=True)
class UndoStarted:
    """The undo of a stage is about to be called.

    Attributes:
        attempt: Which attempt, from 1.
    """

    attempt: int


@final
@attrs.frozen(kw_only=True)
class UndoEnded:
    """What has become of the undoing of a stage.

    Attributes:
        state: That.
        attempts: How often the undo was called.
        reason: Why, in words.
        error: What it raised.
    """

    state: UndoState
    attempts: int = 0
    reason: str = ""
    error: ErrorNote | None = None


@final
@attrs.frozen(kw_only=True)
class CompensationEnded:
    """Everything was undone that could be.

    Attributes:
        status: Whether that is everything.
    """

    status: CompensationStatus


@final
@attrs.frozen(kw_only=True)
class ArtifactAdded:
    """A stage added an artifact, which is the value."""


@final
@attrs.frozen(kw_only=True)
class RunEnded:
    """A run ended.

    Attributes:
        status: How.
        ended: When, in seconds since it began.
        cause: Why it did not end well.
    """

    status: RunStatus
    ended: float
    cause: Cause | None = None


Event: TypeAlias = (
    RunStarted
    | RunResumed
    | AttemptStarted
    | AttemptEnded
    | StageSettled
    | StageReopened
    | BranchEnded
    | ArtifactAdded
    | CompensationStarted
    | UndoStarted
    | UndoEnded
    | CompensationEnded
    | RunEnded
)

_KINDS: dict[str, type[Any]] = {
    "run_started": RunStarted,
    "run_resumed": RunResumed,
    "attempt_started": AttemptStarted,
    "attempt_ended": AttemptEnded,
    "stage_settled": StageSettled,
    "stage_reopened": StageReopened,
    "branch_ended": BranchEnded,
    "artifact_added": ArtifactAdded,
    "compensation_started": CompensationStarted,
    "undo_started": UndoStarted,
    "undo_ended": UndoEnded,
    "compensation_ended": CompensationEnded,
    "run_ended": RunEnded,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}
_DUMPS = json.JSONEncoder(separators=(",", ":")).encode
_PLAIN = {"state", "attempts", "started", "ended"}


def _exactly(value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"wanted {kind.__name__}, found {value!r}")
    return value


def _number(value: Any, _: Any) -> float:
    return float(value) if type(value) is int else _exactly(value, float)


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(omit_if_default=True, forbid_extra_keys=True, detailed_validation=False)

    for kind in (str, int, bool):
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook(float, _number)
    for enumeration in (StageState, RunStatus, CauseKind, UndoState, CompensationStatus):
        converter.register_unstructure_hook(enumeration, lambda member: member.value)
    return converter


def write_event(event: Event) -> tuple[str, str]:
    """Gives the kind of an event and its body, as they are kept."""
    return _NAMES[type(event)], _DUMPS(_converter().unstructure(event))


def write_success(attempts: int, started: float, ended: float) -> tuple[str, str]:
    """Gives the same as `write_event`, for less, of the `StageSettled` of which there is one for almost every stage."""
    return "stage_settled", f'{{"state":"succeeded","attempts":{attempts},"started":{started!r},"ended":{ended!r}}}'


def read_event(kind: str, body: Any) -> Event:
    """Reads what `write_event` gave, parsed.

    Raises:
        StoreError: It is nothing of that sort.
    """
    plain: dict[str, Any] = body
    if kind == "stage_settled" and isinstance(body, dict) and plain.keys() == _PLAIN:
        # Most events are of this form, and whoever resumes a large run waits for them.
        attempts, started, ended = plain["attempts"], plain["started"], plain["ended"]
        if plain["state"] == "succeeded" and type(attempts) is int and type(started) is type(ended) is float:
            return StageSettled(state=StageState.SUCCEEDED, attempts=attempts, started=started, ended=ended)
    try:
        event: Event = _converter().structure(body, _KINDS[kind])
    except Exception as error:
        raise StoreError(f"the journal is damaged: an event {kind!r} cannot be read: {error}") from error
    return event
