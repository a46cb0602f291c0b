"""The scribe: writes what happens in a run, in the order in which it happens.

There is one `Book` for a run with all that it runs within itself, and one `Scribe` for each of these runs. A scribe is
told of things the moment they happen, and nothing of that awaits; to wait until something is durable is the engine's
business, which does so before anybody can build on it:

- the start of a stage with effects is durable before it is entered;
- the end of a stage is durable before any stage after it starts.

What needs no waiting for (the start of a stage without effects, what was skipped) is kept back, and goes along with the
next thing that is written.

If something cannot be written, the book is closed: nothing that comes later is written either, for it must not be there
without what came before. The run is told, and starts nothing any more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import traceback
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio

from stageflow.errors import CheckpointError, UnstorableValueError
from stageflow.journal.codec import Encoded, Unstorable, decode, encode
from stageflow.journal.events import (
    ArtifactAdded,
    AttemptEnded,
    AttemptStarted,
    BranchEnded,
    CompensationEnded,
    CompensationStarted,
    ErrorNote,
    ItemNote,
    RunEnded,
    RunStarted,
    StageReopened,
    StageSettled,
    UndoEnded,
    UndoStarted,
    write_event,
    write_success,
)
from stageflow.journal.history import RunHistory, StageHistory, scope_within
from stageflow.journal.plan import resets
from stageflow.journal.record import Attempt, Cause, CauseKind, RunStatus, StageRecord, StageState
from stageflow.journal.resume import describe
from stageflow.journal.store import Entry, Receipt
from stageflow.journal.undo import CompensationStatus, UndoRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stageflow.context import PipelineContext
    from stageflow.engine.execution import Execution
    from stageflow.graph import Graph
    from stageflow.journal.book import Book
    from stageflow.output import Artifact, StageOutput

__all__ = ["Scribe", "error_note"]


@final
class Scribe:
    """Writes what happens in one run.

    Attributes:
        book: Where it writes.
        history: What was recorded of the run before, as far as it still counts.
        began_at: When the run began, by the wall clock.
        base: When that was on Trio's clock: times are kept relative to it.
        run_id: The run's id.
        number: Which of the runs within a stage it is.
        over: When the run was over, in seconds since it began, if it was before this process.
        values: The outputs that are reused and that a plan has read, by stage; others can wait. `None` without a plan.
    """

    def __init__(
        self,
        book: Book,
        scope: str,
        run_id: str,
        history: RunHistory | None = None,
        values: Mapping[str, Any] | None = None,
        artifacts: Scribe | None = None,
    ) -> None:
        self.run_id = run_id
        self.number: int = 0
        self._numbers: dict[tuple[str, int], set[int]] = {}
        self.over: float | None = None
        self.values = values
        self.book = book
        self.scope = scope
        self.history = history
        self.base: float = 0.0
        self.began_at: float = time.time()
        self._cut: set[str] = set()
        self._written: set[str] = set()
        if history is not None:
            self._written.update(name for name, stage in history.stages.items() if stage.settled is not None)
        self._artifacts = self if artifacts is None else artifacts  # whose artifacts those of its stages are
        self._loose: list[tuple[Scribe, Artifact]] = []  # what was added, and is kept with the end of its stage

    # Begin and end

    def begin(
        self, graph: Graph, context: PipelineContext, *, base: tuple[str, int, Sequence[str]] | None = None
    ) -> None:
        """Notes that a run begins.

        Args:
            graph: What is run.
            context: With what.
            base: What it is forked from: a run, how many events that has, and the stages that are taken over.

        Raises:
            UnstorableValueError: Its data, or something else of its context, cannot be kept.
        """
        digest, description = describe(graph)
        data = self._encode(context.data, None, "data")
        rest = self._encode(
            {
                "metadata": context.metadata,
                "timeouts": context.timeouts,
                "snapshot": dict(context.snapshot),
                "artifacts": context.artifacts,
            },
            None,
            "context",
        )
        started = RunStarted(
            run_id=self.run_id,
            pipeline=graph.name,
            began_at=self.began_at,
            graph=digest,
            correlation_id=context.correlation_id,
            context=rest.text,
            base=None if base is None else base[0],
            base_length=0 if base is None else base[1],
            keeps=() if base is None else tuple(base[2]),
        )
        self.book.keep({digest: description, **data.blobs, **rest.blobs})
        self.book.later(Entry(self.scope, None, *write_event(started), data.text))

    def within(
        self,
        stage: str,
        number: int,
        attempt: int,
        graph: Graph,
        context: PipelineContext,
        run_id: str,
        *,
        item: bool,
        shares: bool,
    ) -> Scribe:
        """Gives the scribe of a run within a stage, or of an item of a map, and notes that it begins.

        If the very same was begun before, and the process died or the stage failed, that is gone on with.

        Args:
            stage: The stage.
            number: Which of the runs within it, in this attempt: of those that are begun at once, by chance.
            attempt: Which attempt of the stage it is.
            graph: What is run.
            context: With what.
            run_id: Its id.
            item: Whether it is an item of a map, whose number is not by chance.
            shares: Whether its artifacts are those of this run.

        Raises:
            ResumeRefusedError: Its code has changed, and resuming does not say what that means.
        """
        book = self.book
        digest, description = describe(graph)
        value: Encoded | None = None
        try:
            value = encode(context.data)
            data = hashlib.sha256(value.text.encode("ascii")).hexdigest()[:16]
        except Unstorable as error:  # then nobody can tell whether it is the same again
            data = None
            if graph.plan.compensates:  # and an undo could not be given it
                raise UnstorableValueError(run_id=book.run_id, stage=stage, path=error.path, why=error.why) from None
        known = None if self.history is None or stage not in self.history.stages else self.history.stages[stage]
        if not item:
            number = self._number_of(stage, number, attempt, known, (graph.name, data))
        taken = None if known is None else known.take(number)
        place = str(number) if attempt == 1 else f"{number}.{attempt}"
        before: RunHistory | None = None
        if taken is not None:
            place, before = taken
        started = None if before is None else before.started
        same = started is not None and data is not None and (started.pipeline, started.data) == (graph.name, data)
        if before is not None and not same:
            place = str(number) if attempt == 1 else f"{number}.{attempt}"
            before.taken = False  # what it did may have to be undone
        if not same and known is not None:  # that an attempt was begun may be less than what is on record of it
            while place in known.within:
                attempt += 1
                place = f"{number}.{attempt}"
        scope = scope_within(self.scope, stage, place)
        artifacts = self._artifacts if shares else None
        reset: tuple[str, ...] = ()
        if same and before is not None and started is not None:
            run_id, values = started.run_id, dict[str, Any]()
            if before.compensation is None:
                try:
                    plan = book.policy.plan_within(before, graph, book.blobs, book.run_id)
                except BaseException:
                    before.taken = False  # likewise
                    raise
                reset, values = resets(plan, before), dict(plan.values)
            scribe = Scribe(book, scope, run_id, before, values, artifacts)
            scribe.began_at = started.began_at
        else:
            scribe = Scribe(book, scope, run_id, artifacts=artifacts)
        scribe.number = number
        event = RunStarted(
            run_id=run_id,
            pipeline=graph.name,
            began_at=scribe.began_at,
            graph=digest,
            data=data,
            continues=same,
            reset=reset,
        )
        book.keep({digest: description})
        kept = value is not None and graph.plan.compensates and not same
        book.later(Entry(scope, None, *write_event(event), value.text if kept and value is not None else None))
        if kept and value is not None:
            book.keep(value.blobs)
        if same and before is not None:
            before.apply(event, None, None)
            scribe._written.difference_update(reset)
        return scribe

    def _number_of(
        self, stage: str, number: int, attempt: int, known: StageHistory | None, same: tuple[str, str | None]
    ) -> int:
        """Gives the number of a run within a stage: the one that the very same had before, or one of its own."""
        used = self._numbers.setdefault((stage, attempt), set())
        recorded = {} if known is None else known.resumable
        numbers = [number, *recorded] if recorded.get(number) == same else list(recorded)
        found = next((each for each in numbers if recorded.get(each) == same and each not in used), None)
        if found is None:
            found = next(each for each in itertools.count(number) if each not in used and each not in recorded)
        used.add(found)
        return found

    async def end(self, records: Iterable[StageRecord], status: RunStatus, cause: Cause | None, now: float) -> None:
        """Notes that the run has ended, and waits until all of it is durable, if nothing is around it."""
        book = self.book
        for record in records:
            if record.name not in self._written:
                self.note(record)
        if not self.scope or status is not RunStatus.SUCCEEDED:
            ended = RunEnded(status=status, ended=now - self.base, cause=cause)
            book.later(Entry(self.scope, None, *write_event(ended)))
        if self.scope:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        await book.durable(book.send(status=status, recoveries=0))
        await book.close()

    # Undoing

    async def compensating(self, execution: Execution, cause: Cause) -> bool:
        """Has it on record that the run is undone from here on; tells whether it is.

        All that is known of its stages is written with that, for nothing else will happen to them.
        """
        if self.history is None or self.history.compensation is None:
            for record in execution.collector.slots:
                if record is not None and record.name not in self._written:
                    self.note(record)
            verdict, status = execution.verdict, execution.status_so_far
            event = CompensationStarted(
                cause=cause, stage=verdict.name if isinstance(verdict, StageRecord) else None, status=status
            )
            self.book.later(Entry(self.scope, None, *write_event(event)))
        state = None if self.scope else CompensationStatus.COMPENSATING
        await self.book.durable(self.book.send(compensation=state))
        return self.book.is_open

    async def undoing(self, stage: str, undo: UndoRecord) -> bool:
        """Has it on record that an undo is going to be called; tells whether it is."""
        self.book.later(Entry(self.scope, stage, *write_event(UndoStarted(attempt=undo.attempts))))
        await self.book.durable(self.book.send())
        return self.book.is_open

    async def undone(self, stage: str, undo: UndoRecord) -> None:
        """Has it on record what has become of the undoing of a stage."""
        self.not_undone(stage, undo)
        await self.book.durable(self.book.send())

    def not_undone(self, stage: str, undo: UndoRecord) -> None:
        """Notes the same of a stage whose undo is not called; it is written with the next thing that is."""
        event = UndoEnded(
            state=undo.state,
            attempts=undo.attempts,
            reason=undo.reason,
            error=None if undo.error is None else error_note(undo.error),
        )
        self.book.later(Entry(self.scope, stage, *write_event(event)))

    async def compensated(self, status: CompensationStatus) -> None:
        """Has it on record that everything was undone that could be."""
        self.book.later(Entry(self.scope, None, *write_event(CompensationEnded(status=status))))
        state = None if self.scope else status
        await self.book.durable(self.book.send(compensation=state))

    def note(self, record: StageRecord) -> None:
        """Notes that a stage has ended; it is written with the next thing that is."""
        try:
            self._settle(record)
        except UnstorableValueError as error:
            self.book.fail(error)

    # What happens to stages

    def entered(self, record: StageRecord, *, now: bool = False) -> Receipt | None:
        """Notes that a stage was entered; it is written with the next thing that is, or now."""
        began = record.details.began
        at = (record.started or 0.0) if began is None else began
        event = AttemptStarted(attempt=record.attempts, started=at - self.base)
        entry = Entry(self.scope, record.name, *write_event(event))
        self.book.add(entry, StageState.RUNNING, record.attempts)
        return self.book.send() if now else None

    def settled(self, record: StageRecord, *, tolerated: bool = False, partly: bool = False) -> Receipt | None:
        """Notes that a stage has ended. If its output cannot be kept, the run is told, and starts nothing any more."""
        if record.name in self._written:
            return None
        try:
            self._settle(record, tolerated=tolerated, partly=partly)
        except UnstorableValueError as error:
            self.book.fail(error)
            return None
        return self.book.send()

    def _settle(self, record: StageRecord, *, tolerated: bool = False, partly: bool = False) -> None:
        value = None if record.output is None else self._encode(record.output.data, record.name, "output")
        partial = self._encode(dict(record.partial), record.name, "partial") if record.partial else None
        self._written.add(record.name)
        if record.plain and not (tolerated or partly):
            assert record.started is not None
            assert record.ended is not None
            written = write_success(record.attempts, record.started - self.base, record.ended - self.base)
        else:
            text = None if partial is None else partial.text
            written = write_event(self._ending(record, text, tolerated=tolerated, partly=partly))
        entry = Entry(self.scope, record.name, *written, None if value is None else value.text)
        if self._artifacts._loose:
            self._keep_artifacts(record.name)
        self.book.add(entry, record.state, record.attempts)
        for encoded in (value, partial):
            if encoded is not None and encoded.blobs:
                self.book.keep(encoded.blobs)

    def _ending(self, record: StageRecord, partial: str | None, *, tolerated: bool, partly: bool) -> StageSettled:
        details, base = record.details, self.base
        return StageSettled(
            state=record.state,
            attempts=record.attempts,
            started=None if record.started is None else record.started - base,
            began=None if details.began is None else details.began - base,
            ended=None if record.ended is None else record.ended - base,
            partial=partial,
            error=None if record.error is None else error_note(record.error),
            recoverable=record.recoverable,
            cause=record.cause,
            after_cancel=record.after_cancel,
            waited=details.waited,
            limit=details.limit,
            source=details.source,
            overran=details.overran,
            items=tuple(_item_note(number, item) for number, item in details.items.items()),
            tolerated=tolerated,
            partly=partly,
        )

    async def commit(
        self,
        record: StageRecord,
        output: StageOutput,
        now: float,
        statements: Sequence[tuple[str, Any]],
        *,
        partly: bool = False,
    ) -> Exception | None:
        """Writes that a stage has succeeded, and what it says in SQL, as one; gives what was wrong with that."""
        ended = attrs.evolve(record, state=StageState.SUCCEEDED, output=output, ended=now, cause=None, error=None)
        if self.book.has_more:  # of others, which must be there also if the SQL is wrong
            self.book.send()
        loose = self._artifacts._loose
        try:
            self._settle(ended, partly=partly)
        except UnstorableValueError as error:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return error
        left = {id(artifact) for _, artifact in self._artifacts._loose}
        taken = [each for each in loose if id(each[1]) not in left]
        receipt = self.book.send(statements=statements)
        if receipt is None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return self.book.failure
        try:
            await receipt.wait()
        except CheckpointError as error:
            self.book.fail(error)
            return error  # noqa: ASYNC910
        except Exception as error:  # what the SQL did wrong
            self._written.discard(record.name)
            self._artifacts._loose = [*taken, *self._artifacts._loose]
            return error  # noqa: ASYNC910
        return None

    def tried(self, record: StageRecord, attempt: Attempt, feedback: str | None, *, together: bool = False) -> None:
        """Notes that an attempt has failed, and another one follows; `together` with what is noted next."""
        event = AttemptEnded(
            attempt=attempt.number,
            started=attempt.started - self.base,
            ended=(attempt.ended or attempt.started) - self.base,
            reason=attempt.reason,
            error=None if attempt.error is None else error_note(attempt.error),
            feedback=feedback,
        )
        self.book.add(Entry(self.scope, record.name, *write_event(event)), StageState.RUNNING, attempt.number)
        self._begin_anew(record.name)
        if not together:
            self.book.send()

    def reopened(self, names: Sequence[str], reason: str | None, now: float) -> None:
        """Notes that stages are tried again that had succeeded; the reason is for the first."""
        for name in names:
            self._written.discard(name)
            self._begin_anew(name)
            event = StageReopened(reason=reason, at=now - self.base)
            self.book.add(Entry(self.scope, name, *write_event(event)), StageState.RUNNING, 0)
            reason = None
        self.book.send()

    def _begin_anew(self, stage: str) -> None:
        """Notes that what a stage runs within itself in its next attempt goes on with nothing."""
        if self.history is not None and stage in self.history.stages:
            self.history.stages[stage].latest.clear()

    def branch_ended(self, branch: str, cause: Cause, *, undo: bool = False, together: bool = False) -> None:
        """Notes that a branch is ended on its own, or an item of a map; `together` with what is noted next."""
        if branch not in self._cut:
            self._cut.add(branch)
            self.book.later(Entry(self.scope, branch, *write_event(BranchEnded(cause=cause, undo=undo))))
            if not together:
                self.book.send()

    def added(self, artifact: Artifact) -> None:
        """Notes an artifact, which is kept with the end of its stage."""
        self._artifacts._loose.append((self, artifact))

    def _keep_artifacts(self, stage: str) -> None:
        owner, rest = self._artifacts, list[tuple[Scribe, "Artifact"]]()
        for giver, artifact in owner._loose:
            name = artifact.stage or ""
            if giver is not self or (name != stage and not name.startswith(f"{stage}[")):
                rest.append((giver, artifact))
                continue
            value = self._encode(artifact, stage, f"artifact {artifact.name!r}")
            self.book.keep(value.blobs)
            self.book.later(Entry(owner.scope, stage, *write_event(ArtifactAdded()), value.text))
        owner._loose = rest

    def _encode(self, value: Any, stage: str | None, root: str) -> Encoded:
        try:
            return encode(value, root=root)
        except Unstorable as error:
            raise UnstorableValueError(run_id=self.book.run_id, stage=stage, path=error.path, why=error.why) from None

    def undoable_on_record(self, history: RunHistory | None) -> dict[str, tuple[bool, tuple[str, ...]]]:
        """Gives the stages of a run that may have to be undone, as far as the journal knows, by their present names.

        Returns:
            Whether they said so themselves, and not just what was run within them; and what they came after.
        """
        found: dict[str, tuple[bool, tuple[str, ...]]] = {}
        if history is None:
            return found
        for digest in dict.fromkeys(history.graphs):
            if digest not in self.book.blobs:  # the graph of this process, which says it by itself
                continue
            description: Mapping[str, Any] = json.loads(self.book.blobs[digest])
            recorded, said = cast("list[str]", description["names"]), set(cast("list[str]", description["undone"]))
            names = [history.names.get(name, name) for name in recorded]
            undone = {history.names.get(name, name) for name in said}
            for name, before in zip(names, cast("list[list[int]]", description["dependencies"]), strict=True):
                stage = history.stages.get(name) or history.dropped.get(name)
                if stage is None:
                    continue
                itself = name in undone and stage.attempts > 0 and not _skipped_itself(stage)
                if itself or any(self.undoable_on_record(within) for within in stage.within.values()):
                    itself |= name in found and found[name][0]
                    found[name] = itself, tuple(names[other] for other in before)
        return found

    def decode(self, text: str) -> Any:
        """Reads a value that was kept."""
        return decode(text, self.book.blobs.__getitem__)


def error_note(error: BaseException) -> ErrorNote:
    """Gives what is kept of an exception."""
    cls = type(error)
    try:
        message = str(error)
    except Exception as broken:  # it is the user's
        message = f"(its message cannot be shown: {type(broken).__name__})"
    lines = traceback.format_exception(error) if error.__traceback__ is not None else ()
    return ErrorNote(kind=f"{cls.__module__}:{cls.__qualname__}", message=message, traceback="".join(lines))


def _skipped_itself(stage: StageHistory) -> bool:
    """Whether a stage has done nothing, by its own word."""
    cause = None if stage.settled is None else stage.settled.cause
    return cause is not None and cause.kind is CauseKind.SKIP and stage.attempts == 1


def _item_note(number: int, record: StageRecord) -> ItemNote:
    return ItemNote(
        number=number,
        state=record.state,
        attempts=record.attempts,
        cause=record.cause,
        error=None if record.error is None else error_note(record.error),
    )
