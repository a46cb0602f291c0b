"""Compensation across crashes: a process may die right after anything it writes, also while it undoes what another did.

Random small graphs are run once, with a store that notes where a crash may come. For every such place there is then
what the process would have left: the journal up to there, and a world in which as much has happened as can have by
then. That is resumed, by what counts as another process; and that one may die as well, once more.

The judge knows nothing of how runs are undone. It looks at the world: what took effect there, and what was undone.
"""

from __future__ import annotations

import json
import math
import os
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from stageflow import (
    CheckpointError,
    Compensation,
    CompensationError,
    CompensationStatus,
    ContextSnapshot,
    DefinitionWarning,
    Pipeline,
    PipelineContext,
    PipelineTerminated,
    ResumeRefusedError,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageGraph,
    StageOutput,
    StageState,
    UndoState,
    stage,
)
from stageflow.context.stage_context import key_of
from stageflow.journal.events import CompensationStarted, StageSettled, UndoEnded, read_event
from stageflow.journal.memory import MemoryStore
from tests.saga import (
    DID,
    RUN,
    UNDOES,
    UNDONE,
    WRONG,
    Ended,
    Event,
    Moment,
    Watched,
    World,
    die,
    end,
    kept_of,
    left_by_a_crash,
    resume,
)
from tests.stages import raises

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stageflow.journal.store import Entry
    from stageflow.stages import Body

NO = ValueError("no")
ONCE = Retry(attempts=1)
SEEDS = 600 if os.environ.get("STAGEFLOW_FULL") == "1" else 8
CASES = 1000
"""How many there are at least."""


# Random graphs


@attrs.frozen(kw_only=True)
class Node:
    """A stage.

    Attributes:
        name: Its name.
        after: Those it comes after.
        what: ``"stage"``, ``"child"`` (a pipeline), or ``"map"``.
        does: ``"ok"``, ``"fail"``, ``"cancel"`` or ``"skip"``; of a child, what its last stage does, and of a map, what
            its last item does.
        fails: How often the undo fails: of the stage; of the first stage of the child; of each item.
        undone: Whether there is one.
        best_effort: Whether it does not matter if that fails.
        pivot: Whether it is the point of no return.
        tries: How often a child, or a map, may be tried.
    """

    name: str
    after: tuple[str, ...] = ()
    what: str = "stage"
    does: str = "ok"
    fails: float = 0
    undone: bool = True
    best_effort: bool = False
    pivot: bool = False
    tries: int = 1

    @property
    def effects(self) -> tuple[tuple[str, str], ...]:
        """The keys of what takes effect in it, with names."""
        if self.what == "stage":
            return ((self.name, key_of(None, "p", RUN, self.name)),)
        if self.what == "map":
            keys = (key_of(None, "p", f"{RUN}/{self.name}[{item}]", self.name) for item in (0, 1))
            return tuple((self.name, key) for key in keys)
        run = f"{RUN}/{self.name}/0"
        return tuple((f"{x} of {self.name}", key_of(None, "child", run, f"{x} of {self.name}")) for x in "xy")


def drawn(draw: random.Random) -> list[Node]:
    """Draws a graph. Its last stage comes after all others, and fails, or cancels the run."""
    nodes: list[Node] = []
    for number in range(draw.choice([1, 2, 2, 3])):
        what = draw.choice(["stage", "stage", "child", "map"])
        names = [node.name for node in nodes]
        nodes.append(
            Node(
                name=f"s{number}",
                after=tuple(sorted(draw.sample(names, min(draw.choice([0, 1, 1, 2]), len(names))))),
                what=what,
                does=draw.choice(["ok"] * 6 + (["fail"] if what != "stage" else ["skip"])),
                fails=draw.choice([0, 0, 0, 1, math.inf, math.inf]),
                undone=draw.random() < 0.85,
                best_effort=draw.random() < 0.1,
                pivot=draw.random() < 0.04,
                tries=draw.choice([1, 2]) if what != "stage" else 1,
            )
        )
    everything = tuple(node.name for node in nodes)
    return [*nodes, Node(name="last", after=everything, does=draw.choice(["fail", "fail", "cancel"]))]


def chosen() -> Iterator[list[Node]]:
    """Gives graphs in which an undo that fails has something to hold, and one of which nothing is undone."""
    for what in ("stage", "child", "map"):
        yield [
            Node(name="s0"),
            Node(name="s1", after=("s0",), what=what, fails=math.inf),
            Node(name="s2", after=("s1",)),
            Node(name="other", what="child" if what == "map" else "stage"),
            Node(name="last", after=("s2", "other"), does="fail"),
        ]
    yield [
        Node(name="s0"),
        Node(name="s1", after=("s0",), pivot=True),
        Node(name="last", after=("s1",), does="fail"),
    ]


def built(world: World, nodes: Sequence[Node]) -> StageGraph:
    """Makes it. What takes effect, and what is undone, goes by the world, so that the graph can be run again."""
    pipeline = Pipeline("p")
    for node in nodes:
        options: Any = {
            "version": "1",
            "after": node.after,
            "pivot": node.pivot,
            "join": "settled" if node.after else "all",
        }
        compensation = Compensation(
            undo(world, node.fails), retry=Retry(attempts=2), best_effort=node.best_effort, timeout=None
        )
        own: Any = {"compensate": compensation if node.undone else None}
        if node.what == "stage":
            pipeline = pipeline.with_stage(node.name, effect(world, node.does), **options, **own)
            continue
        options["retry"] = Retry(attempts=node.tries)
        if node.what == "map":
            item = stage(name=node.name, version="1", **own)(effect(world, node.does))
            pipeline = pipeline.with_map(node.name, item, over=items, **options)
            continue
        x, y = (f"{x} of {node.name}" for x in "xy")
        child = (
            Pipeline("child")
            .with_stage(x, effect(world, "ok"), version="1", **own)
            .with_stage(y, effect(world, node.does), after=x, version="1", compensate=undo(world, 0))
        )
        pipeline = pipeline.with_stage(node.name, child, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DefinitionWarning)
        return pipeline.build()


def items(ctx: StageContext) -> list[int]:
    return [0, 1]


def effect(world: World, does: str) -> Body:
    async def body(ctx: StageContext) -> StageOutput:
        if does == "skip":
            return StageOutput.skip("nothing to do")
        world.note(DID, ctx)
        await trio.lowlevel.checkpoint()
        if ctx.data == 0 or ctx.stage in world.broken:  # just the last item of a map
            return StageOutput.ok(by=ctx.stage)
        if does == "fail":
            raise NO.with_traceback(None)
        return StageOutput.cancel("enough") if does == "cancel" else StageOutput.ok(by=ctx.stage)

    return body


def undo(world: World, fails: float) -> Any:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        before = sum(event.what == WRONG and event.key == ctx.idempotency_key for event in world.log)
        world.note(UNDOES, ctx, output)
        await trio.lowlevel.checkpoint()
        if before < fails and not world.mended:
            world.note(WRONG, ctx)
            raise OSError("cannot undo")
        world.note(UNDONE, ctx)

    return undo


# The judge


@attrs.frozen
class Facts:
    """What a journal says, as far as the judge wants to know.

    Attributes:
        gone_back: Whether the run has gone through the door.
        undone: Of what is undone by the journal, the keys, as often as it says so.
        effects: Of what may have taken effect by the journal, the same.
        begun: Of the undos that may have been called by the journal, the same.
        pivot: Whether a pivot has succeeded.
    """

    gone_back: bool
    undone: list[str]
    effects: list[str]
    begun: list[str]
    pivot: bool


def facts(nodes: Sequence[Node], entries: Sequence[Entry]) -> Facts:
    keys = {node.name: dict(node.effects) for node in nodes if node.what != "map"}
    on_items = {node.name: node.effects for node in nodes if node.what == "map"}
    undone, effects, begun, gone_back, pivot = list[str](), list[str](), list[str](), False, False
    for entry in entries:
        event = read_event(entry.kind, json.loads(entry.body))
        _, name, place = ("", entry.stage or "", "") if not entry.scope else entry.scope.split("/")
        key = None
        if entry.scope and name in on_items:
            key = on_items[name][int(place.partition(".")[0])][1]
        elif entry.stage is not None:
            key = keys.get(name, {}).get(entry.stage)
        if isinstance(event, CompensationStarted) and not entry.scope:
            gone_back = True
        if key is not None and isinstance(event, UndoEnded) and event.state is UndoState.UNDONE:
            undone.append(key)
        if key is not None and entry.kind == "undo_started":
            begun.append(key)
        if key is not None and entry.kind == "attempt_started":
            effects.append(f"{entry.scope} {key}")
        if isinstance(event, StageSettled) and event.state is StageState.SUCCEEDED and not entry.scope:
            pivot |= any(node.pivot and node.name == entry.stage for node in nodes)
    return Facts(gone_back, undone, [each.rpartition(" ")[2] for each in dict.fromkeys(effects)], begun, pivot)


@attrs.frozen
class Judge:
    """Says what is wrong with how a run was undone.

    Attributes:
        nodes: The graph.
        log: All that has happened in the world.
        before: How much of that had happened when the last process began.
        crashes: How many processes had died.
        known: What the journal said then.
        ended: How the last process has ended the run; `None` if it has died.
    """

    nodes: Sequence[Node]
    log: Sequence[Event]
    before: int
    crashes: int
    known: Facts
    ended: Ended | None

    def __call__(self) -> Iterator[str]:
        yield from self.what_happened()
        yield from self.in_which_order()
        if self.ended is not None:
            yield from self.what_is_said(self.ended)

    @property
    def by_key(self) -> dict[str, tuple[Node, str]]:
        return {key: (node, name) for node in self.nodes for name, key in node.effects}

    def needs(self, key: str) -> bool:
        """Whether what took effect under a key is to be undone."""
        node, name = self.by_key[key]
        return node.undone or name.startswith("y of")

    def outstanding(self, log: Sequence[Event]) -> set[str]:
        """The keys under which something took effect that has not been undone since."""
        found: dict[str, bool] = {}
        for event in log:
            if event.what in (DID, UNDONE):
                found[event.key] = event.what == DID
        return {key for key, there in found.items() if there}

    def what_happened(self) -> Iterator[str]:
        now = self.log[self.before :]
        for event in self.log:
            if event.key not in self.by_key:
                yield f"{event.what} of {event.stage!r} has a key of its own"
        if self.known.gone_back:
            yield from (
                f"{event.stage!r} was entered, and the run was being undone" for event in now if event.what == DID
            )
        for number, event in enumerate(now):
            again = any(other.what == DID and other.key == event.key for other in now[:number])
            done = self.known.undone.count(event.key)
            if event.what == UNDOES and done and done >= self.known.effects.count(event.key) and not again:
                yield f"{event.stage!r} was undone again, and that it was undone is on record"
        for key, (node, name) in self.by_key.items():
            called = sum(event.what == UNDOES and event.key == key for event in self.log[: self.before])
            if called > self.known.begun.count(key):
                yield f"the undo of {name!r} was called before that was on record"
            times = sum(event.what == UNDONE and event.key == key for event in self.log)
            if node.tries == 1 and times > 1 + self.crashes:
                yield f"{name!r} was undone {times} times, with {self.crashes} crashes"

    def in_which_order(self) -> Iterator[str]:
        """An undo is called when whatever has used the output is not there any more."""
        after: dict[str, set[str]] = {}  # which nodes come after each, however far away
        for node in reversed(self.nodes):
            direct = {other.name for other in self.nodes if node.name in other.after}
            after[node.name] = direct.union(*(after[name] for name in direct))
        for number, event in enumerate(self.log):
            if event.what != UNDOES or event.key not in self.by_key:
                continue
            node, name = self.by_key[event.key]
            for key in self.outstanding(self.log[:number]):
                other, other_name = self.by_key[key]
                if not self.needs(key) or (other.best_effort and not other_name.startswith("y of")):
                    continue
                within = other is node and name.startswith("x of") and other_name.startswith("y of")
                if other.name in after[node.name] or within:
                    yield f"{name!r} was undone under {other_name!r}"

    def what_is_said(self, ended: Ended) -> Iterator[str]:
        record = ended.results.compensation
        left = {key for key in self.outstanding(self.log) if self.needs(key)}
        if record is None:
            # Only if nothing of it was to be undone.
            if left and ended.error is not None and ended.results.status is not RunStatus.INTERRUPTED:
                yield f"nothing is said of undoing, and {sorted(self.by_key[key][1] for key in left)} is still there"
            return
        hoped = {key for key in left if self.by_key[key][0].best_effort and not self.by_key[key][1].startswith("y of")}
        if record.status is CompensationStatus.COMPENSATED and left - hoped:
            yield f"it says COMPENSATED, and {sorted(self.by_key[key][1] for key in left)} is still there"
        last = {event.key: event.what for event in self.log}
        if record.status is CompensationStatus.FAILED and not left and WRONG not in last.values():
            yield "it says that the compensation has failed, and nothing is missing"
        if record.status is CompensationStatus.COMPENSATING:
            yield "it has ended, and says that it goes on"
        if record.status is CompensationStatus.NOT_NEEDED and not any(node.pivot for node in self.nodes):
            yield "it says that nothing was to be undone"
        if all(node.fails == 0 for node in self.nodes) and record.status is CompensationStatus.FAILED:
            yield "no undo has failed, and it says that one has"


# Every place where a crash may come


@attrs.define
class Tally:
    """How many cases there were, of which sort."""

    cases: int = 0
    undone: int = 0
    failed: int = 0
    gone_on: int = 0
    past_pivot: int = 0
    twice: int = 0


class Story:
    """All that can happen to one graph."""

    def __init__(self, seed: int, tally: Tally, nodes: list[Node] | None = None) -> None:
        self.draw = random.Random(seed)
        self.nodes = drawn(self.draw) if nodes is None else nodes
        self.heals = self.draw.random() < 0.4
        self.world = World()
        self.graph = built(self.world, self.nodes)
        self.tally = tally

    async def tell(self) -> None:
        store = Watched(self.world)
        ended = await end(self.graph, store.store)
        log = list(self.world.log)
        self.judge(log, 0, 0, Facts(gone_back=False, undone=[], effects=[], begun=[], pivot=False), ended)
        for moment in store.moments:
            for happened in {moment.happened, moment.happens}:
                await self.go_on(store.memory, moment, log[:happened], 1)

    async def go_on(self, memory: MemoryStore, moment: Moment, log: list[Event], crashes: int) -> None:
        """Resumes what was left by a crash; and, if that was the first, what is left by another while that goes on."""
        left = left_by_a_crash(memory, moment)
        store = Watched(self.world, left)
        known = facts(self.nodes, kept_of(left).entries)
        self.world.log = list(log)
        self.world.broken = {"last": None, **{f"y of {node.name}": None for node in self.nodes}} if self.heals else {}
        if moment.compensation is CompensationStatus.COMPENSATED:  # it died between saying that, and that it has ended
            with pytest.raises(CompensationError):
                await self.graph.resume(RUN, store=store.store)
            assert self.world.log == log
            return
        ended = await resume(self.graph, store.store)
        now = list(self.world.log)
        self.judge(now, len(log), crashes, known, ended)
        if known.gone_back:
            self.tally.undone += ended.status is CompensationStatus.COMPENSATED
            self.tally.failed += ended.status is CompensationStatus.FAILED
        else:
            self.tally.gone_on += 1
            self.tally.past_pivot += known.pivot
        await self.afterwards(left, ended, now)
        if crashes == 1:
            moments = list(store.moments)
            for then in self.draw.sample(moments, min(2, len(moments))):
                self.tally.twice += 1
                await self.go_on(left, then, now[: self.draw.choice([then.happened, then.happens])], 2)

    def judge(self, log: list[Event], before: int, crashes: int, known: Facts, ended: Ended) -> None:
        self.tally.cases += 1
        wrong = list(Judge(self.nodes, log, before, crashes, known, ended)())
        if wrong:
            lines = [*map(repr, self.nodes), *(f"{event.what} {event.stage}" for event in log[:before]), "--- crash"]
            lines += [*(f"{event.what} {event.stage}" for event in log[before:]), f"known: {known}", *wrong]
            raise AssertionError("\n".join(lines))

    async def afterwards(self, memory: MemoryStore, ended: Ended, log: list[Event]) -> None:
        """What holds when it has come to its end."""
        kept = kept_of(memory)
        record = ended.results.compensation
        if record is not None and record.status is not CompensationStatus.NOT_NEEDED:
            assert kept.compensation is record.status
        again = MemoryStore()
        again._kept[RUN] = attrs.evolve(kept, entries=list(kept.entries))  # pyright: ignore[reportPrivateUsage]
        if kept.compensation is CompensationStatus.COMPENSATED:
            with pytest.raises(CompensationError, match="fork"):
                await self.graph.resume(RUN, store=again)
        elif kept.compensation is CompensationStatus.FAILED:  # somebody has seen to what was wrong
            self.world.mended = True
            assert (await resume(self.graph, again)).status is CompensationStatus.COMPENSATED
            self.world.mended = False
        assert self.world.log[: len(log)] == log
        if kept.compensation is CompensationStatus.COMPENSATED:
            assert len(self.world.log) == len(log)


def test_whenever_a_process_dies_another_undoes_what_is_left_and_says_what_is_true() -> None:
    tally = Tally()
    for seed, nodes in enumerate([*chosen(), *[None] * SEEDS]):
        trio.run(Story(seed, tally, nodes).tell, clock=MockClock(autojump_threshold=0))
    assert tally.cases >= CASES
    # And none of what it is about is missing.
    assert min(tally.undone, tally.failed, tally.gone_on, tally.twice) >= 100, tally
    assert tally.past_pivot >= 10, tally
    print(tally)


# What becomes of a stage that is not entered any more


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_a_stage_that_an_earlier_process_has_entered_is_undone_although_it_is_skipped_now(
    world: World, store: MemoryStore
) -> None:
    def of(first: Body, version: str) -> Pipeline:
        return (
            Pipeline("p")
            .with_stage("first", first, version=version)
            .with_stage("book", world.does(), after="first", version="1", compensate=world.undo())
            .with_stage("pay", world.does(), after="book", version="1", compensate=world.undo())
        )

    await end(of(world.does(), "1"), store)
    die(store, "attempt_started", "pay")  # `book` has succeeded, and `pay` is in doubt
    world.take()
    ended = await resume(of(raises(NO), "2"), store, on_change="rerun")
    assert ended.results.records["book"].state is StageState.SKIPPED
    assert world.of(DID) == []
    assert world.of(UNDONE) == ["pay", "book"]
    assert [event.given for event in world.log if event.what == UNDOES] == [None, None]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_a_stage_that_has_succeeded_once_is_undone_although_that_does_not_count_any_more(
    world: World, store: MemoryStore
) -> None:
    def of(first: Body, version: str) -> Pipeline:
        return (
            Pipeline("p")
            .with_stage("first", first, version=version)
            .with_stage(
                "book", world.does(), after="first", version="1", compensate=world.undo(), compensate_when="succeeded"
            )
        )

    await end(of(world.does(), "1"), store)
    die(store, "stage_settled", "book")
    ended = await resume(of(raises(NO), "2"), store, on_change="rerun")
    assert ended.undos == {"book": "undone"}


async def test_a_run_within_a_stage_of_which_it_is_not_on_record_that_it_was_entered_is_undone(
    world: World, store: MemoryStore
) -> None:
    child = Pipeline("child").with_stage("x", world.does(), version="1", compensate=world.undo())

    def of(first: Body, version: str) -> Pipeline:
        return Pipeline("p").with_stage("first", first, version=version).with_stage("inner", child, after="first")

    await end(of(world.does(), "1"), store)
    die(store, "attempt_started", "x")
    assert not any((entry.kind, entry.stage) == ("attempt_started", "inner") for entry in kept_of(store).entries)
    ended = await resume(of(raises(NO), "2"), store, on_change="rerun")
    assert ended.results.records["inner"].attempts == 0
    assert ended.undos == {"inner/0/x": "undone"}


async def test_a_run_that_begins_anew_within_a_stage_is_not_taken_for_the_one_before(
    world: World, store: MemoryStore
) -> None:
    given = iter(range(9))

    async def look(ctx: StageContext) -> StageOutput:
        world.note(DID, ctx)
        await trio.lowlevel.checkpoint()
        return StageOutput.ok(n=ctx.data["n"])

    child = (
        Pipeline("child")
        .with_stage("x", look, version="1", kind="work")
        .with_stage("y", world.does(), version="1", kind="work", after="x")
    )

    async def inner(ctx: StageContext) -> StageOutput:
        results = await ctx.run_pipeline(child, {"n": next(given)})
        return StageOutput.ok(n=results["x"]["n"])

    pipeline = Pipeline("p").with_stage("inner", inner, version="1")
    await end(pipeline, store)
    die(store, "stage_settled", "x")
    kept = kept_of(store)
    # As if it had died before it was written that the stage around was entered: that is not waited for.
    kept.entries[:] = [entry for entry in kept.entries if (entry.kind, entry.stage) != ("attempt_started", "inner")]
    await resume(pipeline, store)
    die(store, "attempt_started", "x", 1)
    results = (await resume(pipeline, store)).results
    (last,) = results.children["inner"]
    assert last["x"]["n"] == results["inner"]["n"] == 2


# What is changed between two processes


def trip(world: World, *names: str) -> Pipeline:
    pipeline, before = Pipeline("p"), list[str]()
    for name in names:
        pipeline = pipeline.with_stage(name, world.does(), after=before, version="1", compensate=world.undo())
        before = [name]
    return pipeline.with_stage("bad", world.does(then=NO), after=before, version="1")


async def test_a_stage_that_is_no_longer_there_is_never_called_undone_and_holds_what_it_used(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a", "b", "c"), store)
    die(store, "compensation_started", None)
    world.take()
    ended = await resume(trip(world, "a", "c"), store)
    assert ended.undos == {"b": "failed", "c": "undone", "a": "held"}
    assert ended.compensation.undos["b"].reason == "the pipeline has no such stage any more"
    assert ended.compensation.undos["a"].reason == "'b', which used it, is still there"
    assert ended.status is CompensationStatus.FAILED
    (info,) = await store.runs()
    assert info.compensation is CompensationStatus.FAILED
    # And when it is there again, the rest is done.
    ended = await resume(trip(world, "a", "b", "c"), store)
    assert ended.status is CompensationStatus.COMPENSATED
    assert world.of(UNDONE) == ["c", "b", "a"]


async def test_a_stage_that_was_undone_before_it_was_removed_counts_as_undone(world: World, store: MemoryStore) -> None:
    await end(trip(world, "a", "b"), store)
    die(store, "undo_ended", "b")
    ended = await resume(trip(world, "a"), store)
    assert ended.undos == {"b": "undone", "a": "undone"}
    assert ended.status is CompensationStatus.COMPENSATED


async def test_a_stage_that_does_not_say_any_more_how_it_is_undone_is_never_called_undone(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a", "b"), store)
    die(store, "compensation_started", None)
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), version="1", compensate=world.undo())
        .with_stage("b", world.does(), after="a", version="1")
        .with_stage("bad", raises(NO), after="b", version="1")
    )
    ended = await resume(pipeline, store)
    assert ended.undos == {"b": "failed", "a": "held"}
    assert ended.status is CompensationStatus.FAILED


async def test_a_run_of_which_nothing_says_any_more_how_it_is_undone_has_not_been(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a"), store)
    die(store, "compensation_started", None)
    ended = await resume(Pipeline("p").with_stage("bad", raises(NO), version="1"), store)
    assert ended.undos == {"a": "failed"}
    assert ended.status is CompensationStatus.FAILED


async def test_a_stage_that_was_left_out_when_the_run_was_resumed_is_never_called_undone(
    world: World, store: MemoryStore
) -> None:
    world.broken["last"] = NO

    def of(*names: str) -> Pipeline:
        pipeline = Pipeline("p", compensate_on={"fail"})
        for name in names:
            pipeline = pipeline.with_stage(name, world.does(), version="1", compensate=world.undo())
        return pipeline.with_stage("last", world.does(), after=list(names), version="1")

    await end(of("a", "b"), store)
    die(store, "stage_settled", "b")
    ended = await resume(of("a"), store, on_change="reuse")
    assert ended.undos == {"b": "failed", "a": "undone"}
    assert ended.status is CompensationStatus.FAILED


async def test_a_stage_that_was_renamed_while_its_run_was_undone_is_not_undone_twice(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a", "b"), store)
    die(store, "undo_ended", "b")
    world.take()
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), version="1", compensate=world.undo())
        .with_stage("b2", world.does(), after="a", version="1", aka="b", compensate=world.undo())
        .with_stage("bad", raises(NO), after="b2", version="1")
    )
    ended = await resume(pipeline, store)
    assert world.of(UNDOES) == ["a"]
    assert ended.undos == {"b2": "undone", "a": "undone"}
    assert ended.status is CompensationStatus.COMPENSATED


async def test_a_stage_that_was_renamed_and_then_removed_is_never_called_undone(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a", "b"), store)
    die(store, "compensation_started", None)
    world.mended = True

    async def hangs(ctx: StageContext, output: StageOutput | None) -> None:
        raise OSError("not yet")

    def of(*, there: bool) -> Pipeline:
        pipeline = Pipeline("p").with_stage("a", world.does(), version="1", compensate=world.undo())
        if there:
            failing = Compensation(hangs, retry=ONCE)
            pipeline = pipeline.with_stage("b2", world.does(), after="a", version="1", aka="b", compensate=failing)
        return pipeline.with_stage("bad", raises(NO), after="b2" if there else "a", version="1")

    assert (await resume(of(there=True), store)).undos == {"b2": "failed", "a": "held"}
    ended = await resume(of(there=False), store)
    assert ended.undos == {"b2": "failed", "a": "held"}
    assert ended.status is CompensationStatus.FAILED


@pytest.mark.parametrize("change", ["stage removed", "not undone", "other pipeline", "plain", "removed"])
async def test_what_a_run_within_has_done_is_never_called_undone_when_its_code_is_gone(
    world: World, store: MemoryStore, change: str
) -> None:
    def of(inner: Any) -> Pipeline:
        pipeline = Pipeline("p").with_stage("a", world.does(), version="1", compensate=world.undo())
        if inner is not None:
            pipeline = pipeline.with_stage("inner", inner, after="a", version="1")
        return pipeline.with_stage("bad", raises(NO), after="a" if inner is None else "inner", version="1")

    grandchild = Pipeline("grandchild").with_stage("x", world.does(), version="1", compensate=world.undo())
    child = Pipeline("child").with_stage("y", world.does(), version="1").with_stage("deep", grandchild, after="y")
    await end(of(child), store)
    die(store, "compensation_started", None)
    world.take()
    now: Any = {
        "stage removed": Pipeline("child").with_stage("y", world.does(), version="1"),
        "not undone": Pipeline("child")
        .with_stage("y", world.does(), version="1")
        .with_stage("deep", Pipeline("grandchild").with_stage("x", world.does(), version="1"), after="y"),
        "other pipeline": Pipeline("other").with_stage("z", world.does(), version="1"),
        "plain": world.does(),
        "removed": None,
    }[change]
    ended = await resume(of(now), store)
    assert world.of(UNDONE) == []
    assert "failed" in ended.undos.values()
    assert ended.undos["a"] == "held"
    assert ended.status is CompensationStatus.FAILED


async def test_what_a_run_within_has_done_is_not_forgotten_if_it_cannot_be_gone_on_with(
    world: World, store: MemoryStore
) -> None:
    def of(version: str) -> Pipeline:
        child = (
            Pipeline("child")
            .with_stage("x", world.does(), version=version, compensate=world.undo())
            .with_stage("y", world.does(), after="x", version="1", compensate=world.undo())
        )

        async def calls(ctx: StageContext) -> None:
            await ctx.run_pipeline(child)

        pipeline = Pipeline("p").with_stage("a", world.does(), version="1", compensate=world.undo())
        return pipeline.with_stage("calls", calls, after="a", version="1")

    await end(of("1"), store)
    die(store, "attempt_started", "y")
    ended = await resume(of("2"), store)
    assert isinstance(ended.error, StageExecutionError)
    assert isinstance(ended.error.original, ResumeRefusedError)
    assert ended.undos == {"calls/0": "failed", "a": "held"}
    assert ended.status is CompensationStatus.FAILED


async def test_what_was_run_with_the_context_by_a_process_that_died_is_never_called_undone(
    world: World, store: MemoryStore
) -> None:
    grandchild = Pipeline("grandchild").with_stage("x", world.does(), version="1", compensate=world.undo())
    child = Pipeline("child").with_stage("deep", grandchild)

    async def calls(ctx: StageContext) -> None:
        await ctx.run_pipeline(child)

    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), version="1", compensate=world.undo())
        .with_stage("calls", calls, after="a", version="1")
        .with_stage("bad", raises(NO), after="calls", version="1")
    )
    await end(pipeline, store)
    assert world.of(UNDONE) == ["x", "a"]  # as long as the process lives, it knows
    die(store, "compensation_started", None)
    ended = await resume(pipeline, store)
    assert ended.undos == {"calls/0": "failed", "a": "held"}
    assert "declare it with with_stage()" in ended.compensation.undos["calls/0"].reason
    assert ended.status is CompensationStatus.FAILED


async def test_only_what_was_run_with_the_context_is_never_called_undone_either(
    world: World, store: MemoryStore
) -> None:
    child = Pipeline("child").with_stage("x", world.does(), version="1", compensate=world.undo())

    async def calls(ctx: StageContext) -> None:
        await ctx.run_pipeline(child)

    pipeline = Pipeline("p").with_stage("calls", calls, version="1").with_stage("bad", raises(NO), after="calls")
    await end(pipeline, store)
    die(store, "compensation_started", None)
    ended = await resume(pipeline, store)
    assert ended.undos == {"calls/0": "failed"}
    assert ended.status is CompensationStatus.FAILED


async def test_a_pivot_that_is_declared_later_does_not_keep_a_run_from_being_undone(
    world: World, store: MemoryStore
) -> None:
    await end(trip(world, "a", "b"), store)
    die(store, "undo_ended", "b")
    pipeline = (
        Pipeline("p")
        .with_stage("a", world.does(), version="1", compensate=world.undo(), pivot=True)
        .with_stage("bad", raises(NO), after="a", version="1")
    )
    ended = await resume(pipeline, store)
    assert ended.status is CompensationStatus.COMPENSATED


# What an undo sees after a crash


@pytest.mark.parametrize("kind", ["child", "map", "map of pipelines"])
async def test_an_undo_within_sees_after_a_crash_what_it_would_have_seen_without(
    world: World, store: MemoryStore, kind: str
) -> None:
    seen: dict[str, list[tuple[object, ...]]] = {"did": [], "undo": []}

    def look(ctx: StageContext) -> tuple[object, ...]:
        where = (ctx.run_id, ctx.correlation_id, ctx.tenant, ctx.pipeline, ctx.stage, ctx.branch, ctx.idempotency_key)
        return (*where, ctx.data, dict(ctx.snapshot), ctx.metadata, dict(ctx.inputs))

    failed: list[str] = []

    async def book(ctx: StageContext) -> StageOutput:
        seen["did"].append(look(ctx))
        await trio.lowlevel.checkpoint()
        if not failed:
            failed.append(ctx.stage)
            raise NO
        return StageOutput.ok(n=1)

    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        seen["undo"].append(look(ctx))

    options: Any = {"version": "1", "retry": Retry(attempts=2)}
    item = stage(name="book", version="1", compensate=undo)(book)
    pipeline, child = Pipeline("p").with_stage("first", world.does(), version="1"), Pipeline("child").with_stage(item)
    if kind == "child":
        pipeline = pipeline.with_stage("inner", child, after="first", **options)
    else:
        runner: Any = item if kind == "map" else child
        pipeline = pipeline.with_map("inner", runner, over=lambda ctx: [{"n": 1}, {"n": 2}], after="first", **options)
    pipeline = pipeline.with_stage("bad", raises(NO), after="inner", version="1")
    context = PipelineContext(
        run_id=RUN,
        correlation_id="c",
        tenant=None,
        data={"n": 0},
        snapshot=ContextSnapshot({"s": 1}),
        metadata={"m": 2},
    )
    await end(pipeline, store, context)
    without = sorted(map(repr, seen["undo"]))
    assert set(map(repr, seen["undo"])) <= set(map(repr, seen["did"]))
    die(store, "compensation_started", None, -1)  # the last one is that of the run around
    seen["undo"].clear()
    ended = await resume(pipeline, store)
    assert ended.status is CompensationStatus.COMPENSATED
    assert set(map(repr, seen["undo"])) <= set(without)
    assert len(seen["undo"]) == (1 if kind == "child" else 3)


# Branches


def forked(world: World, then: StageOutput) -> Pipeline:
    return (
        Pipeline("p")
        .with_stage("root", world.does(), version="1", compensate=world.undo())
        .with_stage("left", world.does(), after="root", version="1", compensate=world.undo())
        .with_stage("left 2", world.does(then=then), after="left", version="1", compensate=world.undo())
        .with_stage("right", world.does(), after="root", version="1", compensate=world.undo())
    )


async def test_a_branch_is_undone_whenever_the_process_dies_that_was_to_undo_it(world: World) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    graph, store = forked(world, then).build(), Watched(world)
    await end(graph, store.store)
    log = world.take()
    cases = 0
    for moment in store.moments:
        for happened in {moment.happened, moment.happens}:
            left = left_by_a_crash(store.memory, moment)
            undone = (entry for entry in kept_of(left).entries if entry.kind == "undo_ended")
            on_record = {entry.stage for entry in undone if '"undone"' in entry.body}
            over = any(entry.kind == "run_ended" for entry in kept_of(left).entries)
            world.log = list(log[:happened])
            ended = await resume(graph, left)
            now = world.log[happened:]
            assert ended.results.status is RunStatus.PARTIAL
            assert ended.undos == {"left 2": "undone", "left": "undone"}
            assert ended.status is CompensationStatus.COMPENSATED
            assert not on_record.intersection(event.stage for event in now if event.what == UNDOES)
            assert {event.stage for event in world.log if event.what == UNDONE} == {"left", "left 2"}
            assert not over or not now
            cases += 1
    assert cases >= 15


async def test_a_branch_that_was_in_doubt_when_the_process_died_is_undone(world: World, store: MemoryStore) -> None:
    graph = forked(world, StageOutput.cancel_branch("no use", of="left", compensate=True)).build()
    await end(graph, store)
    die(store, "branch_ended", "left")
    world.take()
    ended = await resume(graph, store)
    assert world.of(DID) in ([], ["right"])
    assert world.of(UNDONE) == ["left 2", "left"]
    assert [event.given for event in world.log if event.what == UNDOES] == [None, {"by": "left"}]
    assert ended.status is CompensationStatus.COMPENSATED


async def test_an_undo_of_a_run_that_is_over_is_not_called_when_its_results_are_given_again(
    world: World, store: MemoryStore
) -> None:
    then = StageOutput.cancel_branch("no use", compensate=True)
    pipeline = (
        Pipeline("p")
        .with_stage("root", world.does(), version="1")
        .with_stage("left", world.does(), after="root", version="1", compensate=world.undo())
        .with_stage(
            "left 2",
            world.does(then=then),
            after="left",
            version="1",
            compensate=Compensation(world.undo(fails=9), retry=ONCE),
        )
        .with_stage("right", world.does(), after="root", version="1")
    )
    before = await end(pipeline, store)
    assert (before.results.status, before.undos) == (RunStatus.PARTIAL, {"left 2": "failed", "left": "held"})
    world.take()
    entries = list(kept_of(store).entries)
    again = await resume(pipeline, store)
    assert world.take() == []
    assert kept_of(store).entries == entries
    assert (again.undos, again.status) == (before.undos, CompensationStatus.FAILED)


# After that


async def test_a_run_that_was_undone_can_only_be_forked(world: World, store: MemoryStore) -> None:
    graph = trip(world, "a", "b").build()
    await end(graph, store)
    with pytest.raises(CompensationError) as caught:
        await graph.resume(RUN, store=store)
    assert caught.value.run_id == RUN
    assert not (await store.runs())[0].held
    world.take()
    world.broken["bad"] = None
    results = await graph.fork(RUN, from_stage="b", store=store, fork_id="run 2")
    assert results.status is RunStatus.SUCCEEDED
    assert world.of(DID)[-2:] == ["b", "bad"]


async def forked_in_vain(world: World, store: MemoryStore) -> tuple[StageGraph, PipelineTerminated]:
    """Forks a run that has succeeded, and the fork fails."""
    graph = trip(world, "a", "b").build()
    world.broken["bad"] = None
    await end(graph, store)
    world.broken.clear()
    world.take()
    with pytest.raises(PipelineTerminated) as failed:
        await graph.fork(RUN, from_stage="b", store=store, fork_id="run 2")
    return graph, failed.value


async def test_a_fork_undoes_what_it_has_done_and_nothing_of_what_it_took_over(
    world: World, store: MemoryStore
) -> None:
    _, error = await forked_in_vain(world, store)
    assert world.of(DID) == ["b", "bad"]
    assert world.of(UNDONE) == ["b"]
    assert error.compensation is not None
    undos = error.compensation.undos
    assert {name: undo.state for name, undo in undos.items()} == {"b": UndoState.UNDONE, "a": UndoState.NOT_NEEDED}
    assert undos["a"].reason == "it is that of the run that this was forked from"
    assert error.compensation.status is CompensationStatus.COMPENSATED


async def test_a_fork_that_died_while_it_was_undone_does_not_undo_what_it_took_over_either(
    world: World, store: MemoryStore
) -> None:
    graph, _ = await forked_in_vain(world, store)
    kept = store._kept["run 2"]  # pyright: ignore[reportPrivateUsage]
    kinds = [entry.kind for entry in kept.entries]
    del kept.entries[kinds.index("compensation_started") + 1 :]
    kept.status, kept.until, kept.compensation = RunStatus.RUNNING, 0.0, CompensationStatus.COMPENSATING
    world.take()
    with pytest.raises(PipelineTerminated) as failed:
        await graph.resume("run 2", store=store)
    assert world.of(UNDONE) == ["b"]
    assert failed.value.compensation is not None
    assert failed.value.compensation.status is CompensationStatus.COMPENSATED


async def test_a_compensation_that_has_failed_can_be_resumed_and_only_the_rest_is_undone(
    world: World, store: MemoryStore, autojump_clock: MockClock
) -> None:
    def of(fails: float) -> Pipeline:
        return (
            Pipeline("p")
            .with_stage("a", world.does(), version="1", compensate=world.undo())
            .with_stage("b", world.does(), after="a", version="1", compensate=world.undo(fails=fails))
            .with_stage("c", world.does(), after="b", version="1", compensate=world.undo())
            .with_stage("bad", raises(NO), after="c", version="1")
        )

    before = await end(of(math.inf), store)
    assert before.undos == {"c": "undone", "b": "failed", "a": "held"}
    (info,) = await store.runs()
    assert (info.status, info.compensation) == (RunStatus.FAILED, CompensationStatus.FAILED)
    world.take()
    ended = await resume(of(0), store)
    assert world.of(UNDOES) == ["b", "a"]
    assert ended.compensation.undos["b"].attempts == 4
    assert ended.status is CompensationStatus.COMPENSATED
    assert isinstance(ended.error, StageExecutionError)
    assert (ended.error.stage, ended.error.reason) == ("bad", "ValueError: no")


async def test_a_store_that_fails_while_a_run_is_undone_ends_that_and_a_resume_does_the_rest(world: World) -> None:
    for number in range(30):
        store, graph = MemoryStore(), trip(world, "a", "b").build()
        failing: Any = Failing(store, number)
        world.take()
        error: BaseException | None = None
        try:
            await graph.run(PipelineContext(run_id=RUN), store=failing)
        except Exception as raised:  # whichever it is
            error = raised
        if not failing.failed:
            break
        assert isinstance(error, CheckpointError)
        log = world.take()
        for name in ("a", "b"):
            begun = [entry for entry in kept_of(store).entries if (entry.kind, entry.stage) == ("undo_started", name)]
            assert sum((event.what, event.stage) == (UNDOES, name) for event in log) <= len(begun)
        if any(entry.kind == "compensation_started" for entry in kept_of(store).entries):
            kept_of(store).until = 0.0
            if kept_of(store).compensation is not CompensationStatus.COMPENSATED:
                ended = await resume(graph, store)
                assert ended.status is CompensationStatus.COMPENSATED
                assert world.of(DID) == []
    else:
        raise AssertionError("the store never got through")
    assert number >= 10


class Failing:
    """A store that fails at one append, and after it."""

    def __init__(self, store: MemoryStore, at: int) -> None:
        self._store, self._left, self.failed = store, at, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append_nowait(self, lease: Any, batch: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            self.failed = True
            lease = attrs.evolve(lease, epoch=-1)
        return self._store.append_nowait(lease, batch)
