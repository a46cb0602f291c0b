"""What tests of compensation have in common: a world in which stages take effect, and in which that is undone."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
import trio

from stageflow import (
    CompensationRecord,
    CompensationStatus,
    Pipeline,
    PipelineContext,
    PipelineResults,
    PipelineTerminated,
    RunStatus,
    StageContext,
    StageGraph,
    StageOutput,
)
from stageflow.errors import CheckpointError
from stageflow.journal.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from stageflow import Store
    from stageflow.stages import Body
    from stageflow.stages.compensation import Undo

RUN = "run 1"
"""The id of every run here."""
DID, UNDOES, UNDONE, WRONG = "did", "undoes", "undone", "went wrong"


@attrs.frozen
class Event:
    """Something that happened in the world.

    Attributes:
        what: A stage took effect (`DID`); an undo was called (`UNDOES`), has ended (`UNDONE`), or has raised (`WRONG`).
        stage: Which one.
        key: Its key of idempotency.
        at: When, in seconds since the world began.
        given: The output that the undo was given, as a dict.
    """

    what: str
    stage: str
    key: str
    at: float
    given: dict[str, Any] | None = None


@attrs.define(eq=False)
class World:
    """What is outside of runs.

    Attributes:
        log: What has happened in it.
        contexts: The contexts of the undos that were called, by stage.
        broken: What is wrong with stages at the moment.
        mended: Whether no undo fails any more.
    """

    log: list[Event] = attrs.field(factory=list[Event])
    contexts: dict[str, StageContext] = attrs.field(factory=dict[str, StageContext])
    broken: dict[str, Exception | StageOutput | None] = attrs.field(factory=dict[str, "Exception | StageOutput | None"])
    mended: bool = False
    began: float | None = None

    def note(self, what: str, ctx: StageContext, given: StageOutput | None = None) -> None:
        now = trio.current_time()
        if self.began is None:
            self.began = now
        data: Any = {} if given is None else given.data
        said: dict[str, Any] = {"items": data} if isinstance(data, list) else dict(data)
        event = Event(what, ctx.stage, ctx.idempotency_key, now - self.began, None if given is None else said)
        self.log.append(event)

    def does(self, *takes: float, then: Exception | StageOutput | None = None) -> Body:
        """A stage that takes effect, takes so many seconds for each attempt, and then ends like this, or well."""

        async def body(ctx: StageContext) -> StageOutput:
            self.note(DID, ctx)
            ctx.save_partial(begun=ctx.stage)
            await trio.sleep(takes[min(ctx.attempt, len(takes)) - 1] if takes else 0)
            ending = self.broken.get(ctx.stage, then)
            if isinstance(ending, Exception):
                raise ending.with_traceback(None)
            return StageOutput.ok(by=ctx.stage) if ending is None else ending

        return body

    def undo(self, takes: float = 0, *, fails: float = 0) -> Undo:
        """An undo that takes so many seconds, and fails so many times before it succeeds."""
        left: dict[str, float] = {}

        async def undo(ctx: StageContext, output: StageOutput | None) -> None:
            self.note(UNDOES, ctx, output)
            self.contexts[ctx.stage] = ctx
            await trio.sleep(takes)
            remaining = left.setdefault(ctx.idempotency_key, fails)
            if remaining > 0 and not self.mended:
                left[ctx.idempotency_key] = remaining - 1
                self.note(WRONG, ctx)
                raise OSError(f"cannot undo {ctx.stage}")
            self.note(UNDONE, ctx)

        return undo

    def of(self, what: str) -> list[str]:
        """The stages to which this has happened, in that order."""
        return [event.stage for event in self.log if event.what == what]

    def times(self, what: str, stage: str) -> list[float]:
        """When this has happened to a stage."""
        return [event.at for event in self.log if (event.what, event.stage) == (what, stage)]

    def given(self, stage: str) -> dict[str, Any] | None:
        """What the undo of a stage was given, which was called once."""
        (event,) = (event for event in self.log if (event.what, event.stage) == (UNDOES, stage))
        return event.given

    def take(self) -> list[Event]:
        """What has happened since this was asked last."""
        log, self.log = self.log, []
        return log


@attrs.frozen
class Ended:
    """A run that has ended."""

    results: PipelineResults
    error: PipelineTerminated | None

    @property
    def compensation(self) -> CompensationRecord:
        """What has become of its undoing."""
        assert self.results.compensation is not None
        return self.results.compensation

    @property
    def undos(self) -> dict[str, str]:
        """What has become of the undoing of each stage, in words."""
        return {name: undo.state.value for name, undo in self.compensation.undos.items()}

    @property
    def status(self) -> CompensationStatus:
        """How far its undoing is."""
        return self.compensation.status


async def end(pipeline: Pipeline | StageGraph, store: Store | None = None, ctx: PipelineContext | None = None) -> Ended:
    """Runs something, and says how that ended."""
    try:
        return Ended(await pipeline.build().run(ctx or PipelineContext(run_id=RUN), store=store), None)
    except PipelineTerminated as error:
        return Ended(error.results, error)


async def interrupted(pipeline: Pipeline | StageGraph, after: float, store: Store | None = None) -> tuple[Ended, float]:
    """Runs something in a scope of so many seconds; says how that ended, and how many it took."""
    results: PipelineResults | None = None
    began = trio.current_time()
    with trio.move_on_after(after) as scope:
        async with pipeline.build().open(PipelineContext(run_id=RUN), store=store) as run:
            results = run.results
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert results is not None
    return Ended(results, None), trio.current_time() - began


async def resume(pipeline: Pipeline | StageGraph, store: Store, **options: Any) -> Ended:
    """Resumes it, and says how that ended."""
    try:
        return Ended(await pipeline.build().resume(RUN, store=store, **options), None)
    except PipelineTerminated as error:
        return Ended(error.results, error)


# Crashes


@attrs.frozen
class Moment:
    """A moment at which a process may die: right after something was written.

    Attributes:
        length: How many events there are by then.
        compensation: What the store says of the compensation.
        happened: How much had happened in the world by then.
        happens: How much will have happened before something is written again.
    """

    length: int
    compensation: CompensationStatus | None
    happened: int
    happens: int


class Watched:
    """A store in memory that notes after which events a crash may come: a crash leaves whole batches."""

    def __init__(self, world: World, shared: MemoryStore | None = None) -> None:
        self.memory = MemoryStore(shared=shared)
        self.world = world
        self._written: list[tuple[int, CompensationStatus | None, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    async def create(self, run: Any, batch: Any) -> Any:
        lease = await self.memory.create(run, batch)
        self._note(len(self.world.log))
        return lease

    def append_nowait(self, lease: Any, batch: Any) -> Any:
        happened = len(self.world.log)
        receipt = self.memory.append_nowait(lease, batch)
        self._note(happened)
        return receipt

    def _note(self, happened: int) -> None:
        kept = kept_of(self.memory)
        self._written.append((len(kept.entries), kept.compensation, happened))

    @property
    def store(self) -> Store:
        """Itself, for a type checker that does not see what `__getattr__` gives."""
        return cast("Store", self)

    @property
    def moments(self) -> Iterator[Moment]:
        """When the process may have died."""
        for number, (length, compensation, happened) in enumerate(self._written):
            later = self._written[number + 1 :]
            happens = later[0][2] if later else len(self.world.log)
            yield Moment(length, compensation, happened, happens)


def kept_of(memory: MemoryStore) -> Any:
    """What a store in memory keeps of the run."""
    return memory._kept[RUN]  # pyright: ignore[reportPrivateUsage]


def left_by_a_crash(memory: MemoryStore, moment: Moment) -> MemoryStore:
    """Another store, in which there is what a process leaves that dies at a moment."""
    left, kept = MemoryStore(), kept_of(memory)
    left._kept[RUN] = attrs.evolve(  # pyright: ignore[reportPrivateUsage]
        kept,
        entries=kept.entries[: moment.length],
        blobs=dict(kept.blobs),
        states=dict(kept.states),
        status=RunStatus.RUNNING,
        compensation=moment.compensation,
        until=0.0,
        recoveries=0,
    )
    return left


def die(memory: MemoryStore, kind: str, stage: str | None, number: int = 0) -> None:
    """Leaves in a store what a process leaves that dies right after an event."""
    kept = kept_of(memory)
    found = [place for place, entry in enumerate(kept.entries, 1) if (entry.kind, entry.stage) == (kind, stage)]
    del kept.entries[found[number] :]
    going_back = any(entry.kind == "compensation_started" and not entry.scope for entry in kept.entries)
    kept.status, kept.until, kept.recoveries = RunStatus.RUNNING, 0.0, 0
    kept.compensation = CompensationStatus.COMPENSATING if going_back else None


@contextmanager
def within(seconds: float) -> Generator[trio.CancelScope]:
    """A limit of a caller, which has to take effect when it is reached, and not later."""
    began = trio.current_time()
    with trio.move_on_after(seconds) as scope:
        yield scope
    if scope.cancelled_caught and not math.isclose(trio.current_time() - began, seconds):
        raise AssertionError(f"it took {trio.current_time() - began:g} s to leave after {seconds:g} s")


__all__ = [
    "DID",
    "RUN",
    "UNDOES",
    "UNDONE",
    "WRONG",
    "CheckpointError",
    "Ended",
    "Event",
    "Moment",
    "Watched",
    "World",
    "die",
    "end",
    "interrupted",
    "kept_of",
    "left_by_a_crash",
    "resume",
    "within",
]
