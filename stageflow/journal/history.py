"""What is known of a run from its journal: the fold of its events, which is pure.

A crash leaves a journal that ends somewhere. Since events are appended in the order in which things happen, whatever it
ends with is a state in which the run was once; so going on from it is going on with that run.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, TypeVar, final

import attrs

from stageflow.errors import StoreError
from stageflow.journal.events import (
    ArtifactAdded,
    AttemptEnded,
    AttemptStarted,
    BranchEnded,
    CompensationEnded,
    CompensationStarted,
    RunEnded,
    RunResumed,
    RunStarted,
    StageReopened,
    StageSettled,
    UndoEnded,
    UndoStarted,
    read_event,
)
from stageflow.journal.record import StageState
from stageflow.journal.uncollected import uncollected
from stageflow.journal.undo import CompensationStatus, UndoState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stageflow.journal.events import Event
    from stageflow.journal.record import Cause
    from stageflow.journal.store import Entry

__all__ = ["RunHistory", "StageHistory", "fold"]


T = TypeVar("T")
_NONE: dict[str, Any] = {}  # of most stages; nothing is ever put into it


@final
class StageHistory:
    """What is known of a stage.

    Attributes:
        settled: How it ended, if it has.
        value: Its output, encoded, if it succeeded.
        place: Where in the order of endings that was.
        attempts: How often it was entered.
        spent: How many of these count for what its ``retry=`` allows.
        running: Whether it was entered, and is not known to have ended.
        earlier: The attempts before the last.
        first: When its first attempt began, in seconds since the run did.
        feedback: What its next attempt is to see as ``ctx.feedback``.
        succeeded: Whether it has ever succeeded, also if that does not count any more.
        inherited: How many of its attempts are those of the run that this one was forked from.
        within: The runs within it, and the items of a map, by their places.
        latest: The places of those with which the stage can go on, by which of the runs within it they are.
    """

    # No slots: there are many of these, of which most stay as they are here, and what is not set costs nothing.
    settled: StageSettled | None = None
    value: str | None = None
    place: int = 0
    attempts: int = 0
    spent: int = 0
    running: bool = False
    earlier: tuple[AttemptEnded, ...] = ()
    first: float | None = None
    feedback: str | None = None
    succeeded: bool = False
    inherited: int = 0
    within: dict[str, RunHistory] = _NONE
    latest: dict[str, str] = _NONE

    def inner(self, place: str) -> RunHistory:
        """Gives what is known of a run within it."""
        found = self.within.get(place)
        if found is None:
            if self.within is _NONE:
                self.within, self.latest = {}, {}
            found = self.within[place] = RunHistory()
            self.latest[place.partition(".")[0]] = place
        return found

    def take(self, number: int) -> tuple[str, RunHistory] | None:
        """Gives the run within it with which it can go on, once."""
        place = self.latest.pop(str(number), None)
        if place is None:
            return None
        self.within[place].taken = True
        return place, self.within[place]

    @property
    def resumable(self) -> dict[int, tuple[str, str | None]]:
        """The runs within it with which it can go on, by number: of which pipeline, and with which data."""
        runs = {number: self.within[place].started for number, place in self.latest.items()}
        return {int(number): (run.pipeline, run.data) for number, run in runs.items() if run is not None}

    @property
    def recorded(self) -> bool:
        """Whether anything has happened to it."""
        return self.settled is not None or self.attempts > 0

    def enter(self, event: AttemptStarted) -> None:
        """It was entered."""
        self.attempts, self.running = event.attempt, True
        if self.first is None:
            self.first = event.started

    def try_again(self, event: AttemptEnded) -> None:
        """An attempt of it failed, and it is tried again."""
        self.attempts, self.running = event.attempt, False
        self.spent += 1
        self.earlier += (event,)
        if event.feedback is not None:  # otherwise what a guard has said still holds
            self.feedback = event.feedback
        if self.first is None:
            self.first = event.started
        self.latest.clear()  # the next attempt begins anew

    def settle(self, event: StageSettled, value: str | None, place: int) -> None:
        """It ended."""
        self.settled, self.value, self.place = event, value, place
        self.succeeded |= event.state is StageState.SUCCEEDED
        self.attempts, self.running = event.attempts, False
        if self.first is None:
            self.first = event.started

    def reopen(self, event: StageReopened) -> None:
        """It was sent back."""
        last = self.settled
        if last is not None:
            began = last.started if last.began is None else last.began
            self.earlier += (
                AttemptEnded(
                    attempt=self.attempts,
                    started=began or 0.0,
                    ended=last.ended or 0.0,
                    reason=event.reason or "a stage before it was sent back",
                ),
            )
        self.settled = self.value = None
        self.spent = 0  # its tries begin anew
        self.feedback = event.reason
        self.latest.clear()

    def moved(self, later: float) -> StageHistory:
        """Gives the same, with times relative to a beginning that was so many seconds later."""
        twin = copy.copy(self)
        if later:
            twin.first = None if self.first is None else self.first - later
            twin.earlier = tuple(
                attrs.evolve(each, started=each.started - later, ended=each.ended - later) for each in self.earlier
            )
            if self.settled is not None:
                started, began, ended = (
                    None if time is None else time - later
                    for time in (self.settled.started, self.settled.began, self.settled.ended)
                )
                twin.settled = attrs.evolve(self.settled, started=started, began=began, ended=ended)
        return twin

    def reset(self) -> None:
        """It is to be run again."""
        last = self.settled
        if last is not None and self.attempts > len(self.earlier):
            began = last.started if last.began is None else last.began
            reason = str(last.cause) if last.cause is not None else "run again"
            self.earlier += (
                AttemptEnded(
                    attempt=self.attempts,
                    started=began or 0.0,
                    ended=last.ended or 0.0,
                    reason=reason,
                    error=last.error,
                ),
            )
        if last is not None:
            self.spent = 0
            # What has failed by itself, and was undone, is begun anew.
            undone = [number for number, place in self.latest.items() if self.within[place].compensation is not None]
            for number in undone:
                del self.latest[number]
        self.settled = self.value = None


@final
class RunHistory:
    """What is known of a run, or of a run within a stage.

    Attributes:
        started: How it began.
        value: Its data, encoded.
        stages: Its stages, by name: those that anything has happened to.
        cut: The branches that were ended on their own, by their first stages, and why.
        artifacts: What was added to it, encoded.
        ended: How it ended, if it has.
        resumed: How it was resumed last, if it was.
        graph: The digest of the description of its graph.
        graphs: Those of all that it had so far.
        names: What its stages are called now, by the names that they had before.
        dropped: What is known of stages that are no longer there, which whoever resumed it has left out.
        length: How many events were read of it, if it is no run within another.
        taken: Whether it was gone on with.
        compensation: Why it was undone, if that has begun.
        compensated: How that has ended, if it has.
        undos: What has become of the undoing of its stages.
        to_undo: The branches that were ended with ``compensate=True``.
    """

    __slots__ = (
        "_settled",
        "artifacts",
        "compensated",
        "compensation",
        "cut",
        "dropped",
        "ended",
        "graph",
        "graphs",
        "length",
        "names",
        "resumed",
        "stages",
        "started",
        "taken",
        "to_undo",
        "undos",
        "value",
    )

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.value: str | None = None
        self.stages: dict[str, StageHistory] = {}
        self.cut: dict[str, Cause] = {}
        self.artifacts: list[tuple[str, str]] = []
        self.ended: RunEnded | None = None
        self.resumed: RunResumed | None = None
        self.graph: str = ""
        self.graphs: tuple[str, ...] = ()
        self.names: dict[str, str] = {}
        self.dropped: dict[str, StageHistory] = {}
        self.length: int = 0
        self.taken: bool = False
        self.compensation: CompensationStarted | None = None
        self.compensated: CompensationStatus | None = None
        self.undos: dict[str, UndoEnded] = {}
        self.to_undo: set[str] = set()
        self._settled = 0

    def stage(self, name: str) -> StageHistory:
        """Gives what is known of a stage."""
        found = self.stages.get(name)
        if found is None:
            found = self.stages[name] = StageHistory()
        return found

    def apply(self, event: Event, stage: str | None, value: str | None) -> None:
        """Takes an event into account."""
        if isinstance(event, StageSettled):
            self.stage(_named(stage)).settle(event, value, self._settled)
            self._settled += 1
        elif isinstance(event, AttemptStarted):
            self.stage(_named(stage)).enter(event)
        elif isinstance(event, AttemptEnded):
            self.stage(_named(stage)).try_again(event)
        elif isinstance(event, StageReopened):
            self.stage(_named(stage)).reopen(event)
        elif isinstance(event, BranchEnded):
            self.cut[_named(stage)] = event.cause
            if event.undo:
                self.to_undo.add(_named(stage))
        elif isinstance(event, CompensationStarted):
            self.compensation, self.compensated = event, None
        elif isinstance(event, CompensationEnded):
            self.compensated = event.status
        elif isinstance(event, UndoStarted):
            self.undos[_named(stage)] = UndoEnded(state=UndoState.PENDING, attempts=event.attempt)
        elif isinstance(event, UndoEnded):
            self.undos[_named(stage)] = event
        elif isinstance(event, ArtifactAdded):
            self.artifacts.append((_named(stage), value or "null"))
        elif isinstance(event, RunStarted):
            self._start(event, value)
        elif isinstance(event, RunResumed):
            self._resume(event)
        else:
            self.ended = event

    def _start(self, event: RunStarted, value: str | None) -> None:
        if not event.continues:
            self.value = value if event.base is None or value is not None else self.value
        for name in event.reset:
            self.stage(name).reset()
        self.started, self.graph = event, event.graph
        self.graphs += (event.graph,)
        self.ended = None

    def _resume(self, event: RunResumed) -> None:
        self.resumed, self.graph, self.ended = event, event.graph, None
        self.graphs += (event.graph,)
        self.names = {old: event.renamed.get(new, new) for old, new in self.names.items()} | event.renamed
        for old, new in event.renamed.items():
            _rename(self.stages, old, new)
            _rename(self.cut, old, new)
            _rename(self.undos, old, new)
            if old in self.to_undo:
                self.to_undo = (self.to_undo - {old}) | {new}
            if old in self.undos:
                self.undos[new] = self.undos.pop(old)
        for name in event.dropped:
            if name in self.stages:
                self.dropped[name] = self.stages.pop(name)
        for name in event.reset:
            self.stage(name).reset()

    def select(self, names: Iterable[str], *, later: float) -> RunHistory:
        """Gives what a fork takes over: the stages of these names, as they are.

        Args:
            names: The names.
            later: How much later the fork began, in seconds; its times are relative to that.
        """
        forked = RunHistory()
        forked.started, forked.value, forked.graph = self.started, self.value, self.graph
        forked._settled = self._settled
        forked.graphs, forked.names = self.graphs, dict(self.names)
        forked.stages = {name: self.stages[name].moved(later) for name in names if name in self.stages}
        for stage in forked.stages.values():
            stage.inherited = stage.attempts
        forked.artifacts = [(stage, value) for stage, value in self.artifacts if stage in forked.stages]
        forked.cut = {name: cause for name, cause in self.cut.items() if name in forked.stages}
        return forked


def _rename(kept: dict[str, T], old: str, new: str) -> None:
    if old in kept:
        kept[new] = kept.pop(old)


def _named(stage: str | None) -> str:
    if stage is None:
        raise StoreError("the journal is damaged: an event of a stage does not say of which")
    return stage


def fold(entries: Iterable[Entry], base: RunHistory | None = None) -> RunHistory:
    """Gives what is known from the events of a run.

    Args:
        entries: The events, in order.
        base: What the run took over from the one that it was forked from.

    Raises:
        StoreError: They are damaged.
    """
    root = RunHistory() if base is None else base
    entries = tuple(entries)
    with uncollected():
        try:
            bodies: list[Any] = json.loads(f"[{','.join([entry.body for entry in entries])}]")  # once is faster
        except ValueError as error:
            raise StoreError(f"the journal is damaged: an event cannot be read: {error}") from error
        for entry, body in zip(entries, bodies, strict=True):
            run = root
            if entry.scope:
                for name, place in _steps(entry.scope):
                    run = run.stage(name).inner(place)
            run.apply(read_event(entry.kind, body), entry.stage, entry.value)
    return root


def _steps(scope: str) -> Iterator[tuple[str, str]]:
    """Gives the stages and places that lead to a run within a run."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in scope.split("/")[1:]]
    return zip(parts[::2], parts[1::2], strict=True)


def scope_within(scope: str, stage: str, place: str) -> str:
    """Gives the scope of a run within a stage, as a JSON pointer (RFC 6901)."""
    escaped = stage.replace("~", "~0").replace("/", "~1")
    return f"{scope}/{escaped}/{place}"
