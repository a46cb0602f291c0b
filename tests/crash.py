"""Kills real processes at every point of random graphs, resumes what they leave behind, and judges what came of it.

``python tests/crash.py --kills 300 --seed 1`` prints what it has found as JSON, each violation with the command that
repeats it. It runs as a script, in a process of one thread, for it forks: a child that runs a graph with a store and
kills itself at one of its points, then another that resumes, which in half of the cases is killed as well, and a last
one that comes to the end.

A point is just before or just after a commit of SQLite, in the thread of the store, and just before or just after an
effect, in a body. An effect is a line in a file of which the store knows nothing. Before a commit the thread may hang
for a while, as on a slow disk, so that it shows if somebody does not wait for it. (A power cut is not tried: all
files are in memory.)

What has to hold
----------------
Whenever a process was killed:

- the journal can be read, and says that the run goes on, and that nobody has it in hand;
- of an effect of a stage of kind WORK there is the attempt in the journal, and of any effect the ends of all stages
  that had to end before;
- rows that were written with `ctx.transaction` are there exactly if the end of their stage is.

When a process has come to the end:

- the results are those of the run without a kill. The attempts may be more by one for each kill that left the stage
  unfinished;
- a stage has *ended for good* with a kill if, by the journal, it has succeeded, or was skipped or cancelled with its
  branch by its own word, or the stage has in which the run is that it is a part of. Of a stage that ended for good
  there is no effect any more, but for those that would be there without a kill: a guard sends it back, or the stage
  around it is tried again. How many these are at most follows from the graph (`Chain`);
- of any stage there are at most as many effects as without a kill, and those that a kill has left in doubt: by the
  journal, the attempts have not ended that had them. Of a stage of kind WORK that is one for each kill. (Another may
  have begun its next attempt, and had its effect, before the end of the one before is on the disk.)
- what fails for good is run again by every process, and so it is only said of it that each does so once.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, final

import attrs
import trio

from stageflow import (
    Artifact,
    Join,
    Pipeline,
    PipelineContext,
    PipelineResults,
    PipelineTerminated,
    Retry,
    StageContext,
    StageGraph,
    StageOutput,
    StageRecord,
    optional,
    stage,
)
from stageflow.context.stage_context import host_of
from stageflow.graph.fingerprint import fingerprints
from stageflow.journal.database import Database
from stageflow.journal.history import RunHistory, StageHistory, fold
from stageflow.journal.memory import MemoryStore
from stageflow.journal.record import CauseKind, RunStatus
from stageflow.journal.store import Entry, Log, Store, open_store

RUN: Final = "the-run"
PER_GRAPH: Final = 20
"""How many cases there are of one graph."""
MANY: Final = 20
"""After how many violations it gives up."""
MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files are kept that only have to survive a process."""
PATIENCE: Final = 60
"""After how many seconds a child counts as hanging."""

Below: TypeAlias = Callable[[int], int]
"""Draws a number below another one. The simplest is 0."""


# What a graph is


@attrs.frozen(kw_only=True, repr=False)
class Node:
    """A stage, and what it does.

    Attributes:
        name: Its name.
        what: ``"stage"``; ``"thread"``, a plain function; ``"child"``, a pipeline as a stage; ``"calls"``, a stage that
            runs pipelines one after the other; ``"map"``.
        after: The stages it comes after.
        optional: Those of them that it can do without.
        join: Its join.
        does: How it ends: ``"ok"``, ``"skip"``, ``"when"`` (its condition says no), ``"cancel_branch"``, ``"cancel"``,
            ``"tolerate"``, ``"isolate"`` or ``"fail_fast"`` (it fails, with that policy).
        fails: Where each of its first attempts fails: ``"before"`` its effect, ``"between"`` the runs within it,
            ``"paying"``, in SQL, or ``"after"`` all.
        stumbles: How many effects it has with the same inputs before an attempt of it does not fail.
        work: Whether it is of kind WORK.
        before: The seconds that it sleeps before its effect, one after the other; 0 is a checkpoint.
        behind: The same, after its effect.
        large: Whether its output is large enough to be kept apart.
        lists: Whether its output is a list of so many items.
        pays: Whether it writes a row with its end.
        adds: Whether it adds an artifact.
        saves: Whether it saves a partial output.
        uses: Whether it takes a token of a limit.
        sends_back: The stage that it, as a guard, sends back once.
        region: Whether it is sent back by a guard, or between what is and the guard, or the guard.
        within: The graphs within it: of a map, that of an item.
        items: How many items a map has.
        over: The stage whose output is the items.
        limit: How many items are in flight.
        whole: Whether an item is a pipeline, and not just a stage.
        odd: What the first item does, if it is a stage.
    """

    name: str
    what: str = "stage"
    after: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    join: str = "all"
    does: str = "ok"
    fails: tuple[str, ...] = ()
    stumbles: int = 0
    work: bool = False
    before: tuple[float, ...] = ()
    behind: tuple[float, ...] = ()
    large: bool = False
    lists: int = 0
    pays: bool = False
    adds: bool = False
    saves: bool = False
    uses: bool = False
    sends_back: str | None = None
    region: bool = False
    within: tuple[tuple[Node, ...], ...] = ()
    items: int = 0
    over: str | None = None
    limit: int = 4
    whole: bool = False
    odd: str = "ok"

    def __repr__(self) -> str:
        usual = {field.name: field.default for field in attrs.fields(Node)}
        said = attrs.asdict(self, recurse=False).items()
        return f"Node({', '.join(f'{name}={value!r}' for name, value in said if value != usual[name])})"

    @property
    def early(self) -> bool:
        """Whether it may start before all it comes after has settled, so that its inputs are not always the same."""
        return self.join in {"any", "quorum", "two"}


FAILING: Final = frozenset({"tolerate", "isolate", "fail_fast"})
AGAIN: Final = FAILING | {"cancel"}
"""What is done again by every process, until the run has ended."""


@final
class Drawing:
    """Draws a graph.

    Args:
        below: Where the chance comes from.
        real: Whether it will run in a process of its own, with a store that has SQL, and on a real clock.
    """

    def __init__(self, below: Below, *, real: bool) -> None:
        self._below = below
        self._real = real
        self._odd = 0  # how many stages may still end in another way than well
        self._raises = False  # whether there is one that makes the run raise

    def graph(self) -> tuple[Node, ...]:
        self._odd = self._below(4)
        nodes = self._stages(2 + self._below(5), 0)
        end = self._below(8)
        if end > 4 and not self._raises:
            # After all others, so that which of them it cancels is not left to chance.
            every = tuple(node.name for node in nodes)
            does = "ok" if end == 5 else "cancel" if end == 6 else "fail_fast"
            join = "settled" if self._below(2) else "any_settled"
            nodes = (*nodes, attrs.evolve(self._plain("end", 0), after=every, join=join, does=does))
        return nodes

    def _maybe(self, one_in: int) -> bool:
        return self._below(one_in) == one_in - 1

    def _some(self, choices: Sequence[str], weights: Sequence[int]) -> str:
        at = self._below(sum(weights))
        for choice, weight in zip(choices, weights, strict=True):
            at -= weight
            if at < 0:
                return choice
        raise AssertionError

    def _stages(self, count: int, depth: int) -> tuple[Node, ...]:
        """Draws the stages of a pipeline."""
        nodes: list[Node] = []
        free: list[str] = []  # on what others may build
        for number in range(count):
            name = f"{'snt'[depth]}{number}"
            if self._maybe(7 if depth == 0 else 12):
                made = self._guarded(name, free, depth)
            elif self._maybe(8) and depth < 2:
                made = self._listed(name, free, depth)
            else:
                made = [self._odd_one(self._joined(self._any(name, depth), free))]
            nodes += made
            free.append(made[-1].name)
        return tuple(nodes)

    def _any(self, name: str, depth: int) -> Node:
        what = self._some(
            ("stage", "thread", "child", "calls", "map") if depth < 2 else ("stage", "thread"),
            ((10, 1, 2, 3, 3) if depth == 0 else (10, 1, 1, 1, 2)) if depth < 2 else (10, 1),
        )
        node = self._plain(name, depth)
        if what == "thread":
            return attrs.evolve(node, what="thread" if self._real else "stage")
        if what == "child":
            return Node(name=name, what="child", within=(self._stages(1 + self._below(3), depth + 1),), work=node.work)
        if what == "calls":
            within = tuple(self._stages(1 + self._below(2), depth + 1) for _ in range(1 + self._below(2)))
            fails = self._fails(("before", "between", "after"))
            return attrs.evolve(node, what="calls", within=within, fails=fails, stumbles=0)
        return self._map(name, depth) if what == "map" else node

    def _map(self, name: str, depth: int) -> Node:
        node, whole = self._plain(name, depth), self._maybe(3)
        item = self._stages(1 + self._below(2), depth + 1) if whole else (self._plain(name, depth),)
        odd = self._some(("ok", "skip", "tolerate", "cancel_branch"), (4, 1, 1, 1)) if self._odd and not whole else "ok"
        self._odd -= odd != "ok"
        return Node(
            name=name,
            what="map",
            within=(item,),
            items=1 + self._below(4),
            limit=1 + self._below(3),
            whole=whole,
            odd=odd,
            work=node.work,
            fails=self._fails(("before", "between")),
        )

    def _fails(self, where: Sequence[str]) -> tuple[str, ...]:
        return tuple(where[self._below(len(where))] for _ in range(max(0, self._below(6) - 3)))

    def _plain(self, name: str, depth: int) -> Node:
        """Draws a stage without an environment."""
        stumbles = 1 + self._below(2) if self._maybe(6) else 0
        pays = self._maybe(3) and self._real
        return Node(
            name=name,
            fails=() if stumbles else self._fails(("before", "after", *["paying"] * pays)),
            stumbles=stumbles,
            work=bool(self._below(2)),
            before=self._pauses(),
            behind=self._pauses(),
            large=self._maybe(6),
            pays=pays,
            adds=self._maybe(4),
            saves=self._maybe(4),
            uses=self._maybe(6) and depth == 0,
        )

    def _pauses(self) -> tuple[float, ...]:
        return tuple((0.0, 0.0003, 0.001, 0.002)[self._below(4)] for _ in range(self._below(3)))

    def _joined(self, node: Node, free: Sequence[str]) -> Node:
        """Draws what a stage comes after."""
        wanted = min(len(free), (1, 2, 1, 0, 3, 2, 1)[self._below(7)])
        after = tuple(sorted({free[-1 - self._below(len(free))] for _ in range(wanted)}))
        joins, weights = ["all", "optional", "any_settled", "settled"], [6, 2, 2, 2]
        if node.what in {"stage", "thread"}:  # what is within others is gone on with only if its data is the same
            joins, weights = [*joins, "any", "quorum", "two"], [*weights, 2, 2, 1]
        join = self._some(joins, weights) if len(after) > 1 else "all"
        if join == "optional":
            return attrs.evolve(node, after=after, optional=after[: 1 + self._below(len(after))])
        return attrs.evolve(node, after=after, join=join)

    def _odd_one(self, node: Node) -> Node:
        """Draws how a stage ends."""
        if not self._odd or not self._maybe(3):
            return node
        kinds, weights = ["skip", "when", "cancel_branch", "tolerate"], [2, 2, 2, 3]
        if node.what not in {"stage", "thread", "calls"}:
            kinds, weights = ["when"], [1]
        elif node.name.startswith("s") and not self._raises:
            kinds, weights = [*kinds, "isolate"], [*weights, 1]
        self._odd -= 1
        does = self._some(kinds, weights)
        self._raises |= does == "isolate"
        return attrs.evolve(node, does=does, stumbles=0)

    def _guarded(self, name: str, free: Sequence[str], depth: int) -> list[Node]:
        """Draws a stage that is sent back, something between, and the guard."""
        draft = attrs.evolve(self._joined(self._plain(f"{name}d", depth), free), region=True)
        if draft.early:
            draft = attrs.evolve(draft, join="all")
        if self._maybe(2) and depth < 2:
            within = (self._stages(1 + self._below(2), depth + 1),)
            draft = attrs.evolve(draft, what="calls", within=within, stumbles=0, fails=())
        made = [draft]
        for number in range(self._below(3)):
            between = self._any(f"{name}b{number}", depth)
            made.append(attrs.evolve(between, after=(made[-1].name,), region=True))
        guard = attrs.evolve(self._plain(name, depth), sends_back=draft.name, region=True, stumbles=0)
        after = tuple(dict.fromkeys((draft.name, made[-1].name)))
        return [*made, attrs.evolve(guard, after=after, fails=guard.fails[:1])]

    def _listed(self, name: str, free: Sequence[str], depth: int) -> list[Node]:
        """Draws a stage that gives a list, and a map over that."""
        mapped = self._map(name, depth)
        source = attrs.evolve(self._joined(self._plain(f"{name}l", depth), free), lists=mapped.items, large=False)
        return [source, attrs.evolve(mapped, after=(source.name,), over=source.name, fails=())]


# What the stages do


@final
class World:
    """What the bodies of a process act upon.

    Attributes:
        process: Which one, from 0.
        lines: The effects of earlier processes, and those of this one.
    """

    def __init__(self, process: int, lines: Iterable[Line], write: Callable[[Line], None]) -> None:
        self.process = process
        self.lines = list(lines)
        self._write = write
        self._lock = threading.Lock()

    def effect(self, ctx: StageContext, node: Node, token: str) -> int:
        """Has an effect; gives how many there have been before with the same token."""
        with self._lock:
            key = ctx.idempotency_key
            before = sum(line.key == key and line.token == token for line in self.lines)
            line = Line(
                process=self.process,
                scope=scope_of(ctx),
                stage=ctx.stage,
                attempt=ctx.attempt,
                key=key,
                token=token,
            )
            self.lines.append(line)
        self._write(line)
        return before


@final
@attrs.frozen(kw_only=True)
class Line:
    """An effect, as it is written down."""

    process: int
    scope: str
    stage: str
    attempt: int
    key: str
    token: str

    @property
    def place(self) -> Place:
        """The stage that had it, whichever attempt of the stages around that was in."""
        return place_of(self.scope, self.stage)


Place: TypeAlias = "tuple[str, str]"
"""A scope, and a stage of it."""


def place_of(scope: str, stage: str) -> Place:
    """Gives a place without the attempts in which the runs were begun that it is in."""
    return re.sub(r"(/\d+)\.\d+", r"\1", scope), stage


@final
class Here:
    """Where the world is that the bodies of this process find."""

    world: World


def scope_of(ctx: StageContext) -> str:
    """Gives the scope in which a stage is recorded."""
    host: Any = host_of(ctx)[0]
    scribe = getattr(host, "_host", host).execution.scribe  # in a thread, the context has another host before it
    return "" if scribe is None else scribe.scope


def shown(value: Any) -> str:
    """Writes a value down in one way only: items of mappings come in the order in which their stages have ended."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, Any]", value)
        return f"{kind}({', '.join(f'{name}: {shown(mapping[name])}' for name in sorted(mapping))})"
    if isinstance(value, (list, tuple)):
        return f"{kind}({', '.join(map(shown, cast('Sequence[Any]', value)))})"
    text = repr(value)
    return text if len(text) < 99 else f"{text[:20]}… {token_of(text)}"


def token_of(*parts: Any) -> str:
    text = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else shown(parts)
    return f"{zlib.crc32(text.encode()):08x}"


def inputs_of(ctx: StageContext, node: Node) -> Any:
    """What a stage has got, as far as it is the same in every run."""
    seen = [] if node.early else [(name, ctx.inputs[name].data) for name in sorted(ctx.inputs)]
    return seen, ctx.data


async def pause(pauses: Iterable[float]) -> None:
    for seconds in pauses:
        await trio.sleep(seconds)


class Stumbled(Exception):
    """What bodies raise."""


def fails_at(ctx: StageContext, node: Node, where: str) -> bool:
    return ctx.attempt <= len(node.fails) and node.fails[ctx.attempt - 1] == where


def fail_if(ctx: StageContext, node: Node, where: str) -> None:
    if fails_at(ctx, node, where):
        raise Stumbled(f"{node.name} {where}")


def act(ctx: StageContext, node: Node) -> None:
    """Does what a stage is there for."""
    fail_if(ctx, node, "before")
    if node.saves:
        ctx.save_partial(saved=node.name)
    token = token_of(inputs_of(ctx, node), ctx.feedback)
    before = Here.world.effect(ctx, node, token)
    if node.adds:
        ctx.add_artifact(Artifact(name=f"of {node.name}", data={"large": "x" * 5000} if node.large else node.name))
    if node.pays:
        pay(ctx, node)
    if before < node.stumbles:
        raise Stumbled(f"{node.name} stumbled")


def pay(ctx: StageContext, node: Node) -> None:
    transaction = ctx.transaction()
    transaction.execute("CREATE TABLE IF NOT EXISTS paid (key TEXT)")
    transaction.execute("INSERT INTO paid VALUES (?)", (ctx.idempotency_key,))
    if fails_at(ctx, node, "paying"):
        transaction.execute("INSERT INTO nowhere VALUES (1)")


def end(ctx: StageContext, node: Node, *more: Any) -> StageOutput:
    """Gives how a stage ends."""
    fail_if(ctx, node, "after")
    does = node.does
    if node.odd != "ok" and ctx.data["item"] == 0:
        does = node.odd
    if does in FAILING:
        raise Stumbled(f"{node.name} fails")
    if does == "skip":
        return StageOutput.skip("nothing to do")
    if does == "cancel":
        return StageOutput.cancel("enough")
    if does == "cancel_branch":
        return StageOutput.cancel_branch("not this way")
    if node.sends_back is not None and ctx.inputs[node.sends_back]["feedback"] is None:
        return StageOutput.retry("not good enough", stage=node.sends_back)
    if node.lists:
        return StageOutput.ok(items_of(node.lists, token_of(inputs_of(ctx, node))))
    large = {"large": [node.name * 3000, (1, 2)]} if node.large else {}
    return StageOutput.ok(
        by=node.name, feedback=ctx.feedback, inputs=token_of(inputs_of(ctx, node)), more=token_of(*more), **large
    )


def items_of(count: int, of: str) -> list[dict[str, Any]]:
    return [{"item": number, "of": of} for number in range(count)]


# The graphs


def build(nodes: Sequence[Node], name: str = "p") -> StageGraph:
    """Makes a graph of a description."""
    pipeline = Pipeline(name, default_timeout=None, limits={"slot": 1})
    for node in nodes:
        options = options_of(node)
        if node.what == "map":
            item = node.within[0]
            runner: Any = build(item, f"{name}.{node.name}") if node.whole else item_stage(node, item[0])
            tolerate = 1 if node.odd == "tolerate" else 0
            over = node.over or over_of(node)
            pipeline = pipeline.with_map(
                node.name, runner, over=over, limit=node.limit, tolerate=tolerate, version="1", **options
            )
        elif node.what == "child":
            pipeline = pipeline.with_stage(
                node.name, build(node.within[0], f"{name}.{node.name}"), version="1", **options
            )
        else:
            graphs = [build(within, f"{name}.{node.name}.{place}") for place, within in enumerate(node.within)]
            pipeline = pipeline.with_stage(node.name, body_of(node, graphs), version="1", **options)
    return pipeline.build()


def options_of(node: Node) -> Any:
    options: dict[str, Any] = {
        "after": [optional(name) if name in node.optional else name for name in node.after],
        "join": Join.n_of(2) if node.join == "two" else node.join,
    }
    if node.does == "when":
        options["when"] = never
    if node.does in FAILING:
        options["on_failure"] = node.does
    return options | own_options_of(node)


def never(_: StageContext) -> bool:
    return False


def own_options_of(node: Node) -> Any:
    options: dict[str, Any] = {"kind": "work" if node.work else "transform"}
    attempts = attempts_of(node)
    if attempts > 1:
        options["retry"] = Retry(attempts=attempts, delay=0.001 if node.before else 0.0)
    if node.uses:
        options["uses"] = "slot"
    return options


def attempts_of(node: Node) -> int:
    """How often a stage is tried at most."""
    return 1 + len(node.fails) + node.stumbles + (node.sends_back is not None)


def item_stage(mapped: Node, item: Node) -> Any:
    body = body_of(attrs.evolve(item, odd=mapped.odd), [])
    return stage(name=mapped.name, version="1", **own_options_of(item))(body)


def over_of(node: Node) -> Callable[[StageContext], Iterator[Any]]:
    def over(ctx: StageContext) -> Iterator[Any]:
        act(ctx, node)
        for item in items_of(node.items, token_of(inputs_of(ctx, node))):
            yield item
            if item["item"] >= node.items // 2:
                fail_if(ctx, node, "between")

    return over


def body_of(node: Node, graphs: Sequence[StageGraph]) -> Any:
    if node.what == "thread":

        def plain(ctx: StageContext) -> StageOutput:
            time.sleep(sum(node.before))
            act(ctx, node)
            time.sleep(sum(node.behind))
            return end(ctx, node)

        return plain

    async def body(ctx: StageContext) -> StageOutput:
        await pause(node.before)
        act(ctx, node)
        given: list[Any] = []
        for place, graph in enumerate(graphs):
            results = await ctx.run_pipeline(graph, {"place": place, "of": token_of(inputs_of(ctx, node))})
            given += [(name, results[name].data) for name in sorted(results)]
            if place == 0:
                fail_if(ctx, node, "between")
        await pause(node.behind)
        return end(ctx, node, *given)

    return body


# What is told of a run


def told(results: PipelineResults) -> dict[str, Any]:
    """Gives what has to be the same whatever has happened on the way, and the attempts."""
    return {
        "status": results.status.value,
        "stages": {name: told_of(record) for name, record in results.records.items()},
        "attempts": {name: record.attempts for name, record in results.records.items()},
        "partial": {name: shown(partial) for name, partial in results.partial.items()},
        "artifacts": sorted({f"{each.name} by {each.stage}: {shown(each.data)}" for each in results.artifacts}),
    }


def told_of(record: StageRecord) -> dict[str, Any]:
    found: dict[str, Any] = {"state": record.state.value}
    if record.output is not None:
        found["data"] = shown(record.output.data)
    if record.cause is not None:
        # Of what is skipped by its join, any of the inputs that it misses may be the cause.
        own = record.cause.stage == record.name
        found["cause"] = str(record.cause) if own else record.cause.kind is not CauseKind.CHECKPOINT
    if record.error is not None:
        name = type(record.error).__name__
        found["error"] = str(record.error) if name == "RecordedError" else f"{name}: {record.error}"
    if record.details.items:
        found["items"] = {str(number): told_of(item) for number, item in sorted(record.details.items.items())}
    return found


async def go(graph: StageGraph, store: Store) -> PipelineResults:
    """Begins a run, or goes on with it if it had begun."""
    begun = any(info.run_id == RUN for info in await store.runs())
    try:
        if begun:
            return await graph.resume(RUN, store=store)
        return await graph.run(PipelineContext(run_id=RUN, data={"given": 1}), store=store)
    except PipelineTerminated as error:
        return error.results


async def say(graph: StageGraph, store: Store, *, again: bool) -> dict[str, Any]:
    """Has a run come to its end, and gives all that is said of it; `again`, if it is resumed once more."""
    said = told(await go(graph, store))
    (info,) = await store.runs()
    said["info"] = {"status": info.status.value, "stages": dict(info.stages), "recoveries": info.recoveries}
    if again and info.finished:
        said["again"] = told(await graph.resume(RUN, store=store))
    return said


def kept_of(store: MemoryStore) -> Any:
    """Gives what a store in memory keeps of the run."""
    return store._kept[RUN]  # pyright: ignore[reportPrivateUsage]


def after_a_crash(
    store: MemoryStore, entries: int, status: RunStatus = RunStatus.RUNNING, recoveries: int = 0
) -> MemoryStore:
    """Gives what a store in memory would have held if its process had died when there were so many entries."""
    kept, left = kept_of(store), MemoryStore()
    left._kept[RUN] = attrs.evolve(  # pyright: ignore[reportPrivateUsage]
        kept,
        status=status,
        recoveries=recoveries,
        until=0.0,
        entries=kept.entries[:entries],
        blobs=dict(kept.blobs),
        states=dict(kept.states),
    )
    return left


def warm_up() -> None:
    """Does once what every child would have to do otherwise: imports, and code that is made when it is needed first."""
    nodes = (
        Node(name="a", fails=("after",), adds=True, saves=True, work=True),
        Node(name="b", what="child", after=("a",), within=((Node(name="c", large=True),),)),
        Node(name="d", what="map", after=("a",), within=((Node(name="d"),),), items=2),
        Node(name="e", after=("d",), does="skip"),
        Node(name="f", after=("d",), region=True),
        Node(name="g", after=("f",), region=True, sends_back="f"),
        Node(name="h", after=("d",), does="cancel_branch"),
        Node(name="i", after=("d",), does="isolate"),
    )
    graph = build(nodes)

    async def run() -> None:
        Here.world = World(0, [], lambda _: None)
        store = MemoryStore()
        await go(graph, store)
        for entries in range(1, len(kept_of(store).entries), 5):
            await go(graph, after_a_crash(store, entries))

    trio.run(run)
    importlib.import_module("stageflow.journal.sqlite")


# What the graph has to do with how many effects there are


@final
class Chain:
    """A stage of a run within a run, with the stages around it, and what follows for its effects.

    Attributes:
        node: The stage.
        around: The stages that it is within, the outermost first, each with the scope it is in.
        exact: Whether it runs once only, if no process is killed.
        fails: Whether it, or one around it, fails for good.
        ends: How often it ends at most.
        each: How many effects it has at most before it ends.
        most: How many it has at most in all.
    """

    def __init__(self, nodes: Sequence[Node], scope: str, name: str) -> None:
        graph, at = nodes, ""
        self.around: list[tuple[str, Node]] = []
        parts = scope.split("/")[1:]
        for step, place in zip(parts[::2], parts[1::2], strict=True):
            node = next(node for node in graph if node.name == step)
            self.around.append((at, node))
            at = f"{at}/{step}/{place}"
            graph = node.within[int(place.partition(".")[0]) if node.what == "calls" else 0]
        self.node = node = next(node for node in graph if node.name == name)
        outer = self.around[-1][1] if self.around else None
        if outer is not None and outer.what == "map" and not outer.whole and scope.endswith("/0"):
            node = attrs.evolve(node, does=outer.odd)
        runs = 1
        for _, each in self.around:
            runs *= 1 + len(each.fails) + each.region
        self.ends = runs * (1 + node.region)
        self.each = 1 + node.stumbles + sum(where != "before" for where in node.fails)
        self.most = self.ends * self.each
        self.exact = runs == 1 and not node.region
        self.fails = node.does in AGAIN or any(each.does in AGAIN for _, each in self.around)


def needs_of(scope: str, node: Node) -> Iterator[Place]:
    if node.join == "all":
        for name in node.after:
            if name not in node.optional:
                yield scope, name


# What a kill leaves


@final
class Remains:
    """What there is after a process has been killed, or has ended.

    Args:
        log: What the store has of the run; `None` if it had not begun.
        rows: The keys of the rows that were written with the ends of stages.
        lines: The effects so far.

    Attributes:
        history: What is known of the run.
        ends: How often each stage has ended for good.
        paid: How often it has succeeded.
        succeeded: The stages that have succeeded, in scopes with the attempts in which these were begun.
        started: The attempts that are known to have begun, in such scopes.
        attempts: How many attempts of a stage in such a scope are known to have ended.
        doubts: The effects of the last process of which it is not known that their attempt has ended.
        doubtful: How many these are, by stage.
    """

    def __init__(self, log: Log | None, rows: Sequence[str], lines: Sequence[Line]) -> None:
        self.log = log
        self.rows = rows
        self.lines = lines
        self.history: RunHistory = RunHistory() if log is None else fold(log.entries)
        self.ends: collections.Counter[Place] = collections.Counter()
        self.paid: collections.Counter[Place] = collections.Counter()
        self.succeeded: set[Place] = set()
        self.started: set[tuple[str, str, int]] = set()
        self.attempts: dict[Place, int] = {}
        for entry in () if log is None else log.entries:
            self._note(entry)
        self.doubts: Sequence[Line] = [
            line
            for line in lines
            if line.process == lines[-1].process and line.attempt > self.attempts.get((line.scope, line.stage), 0)
        ]
        self.doubtful: collections.Counter[Place] = collections.Counter(line.place for line in self.doubts)

    def _note(self, entry: Entry) -> None:
        body: dict[str, Any] = json.loads(entry.body)
        if entry.stage is None:
            return
        if entry.kind == "stage_settled":
            cause = body.get("cause", {})
            place = place_of(entry.scope, entry.stage)
            self.ends[place] += counts(entry.stage, body["state"], cause.get("kind"), cause.get("stage"))
            if body["state"] == "succeeded":
                self.paid[place] += 1
                self.succeeded.add((entry.scope, entry.stage))
        if entry.kind in {"stage_settled", "attempt_ended"}:
            ended = max(self.attempts.get((entry.scope, entry.stage), 0), body.get("attempt", body.get("attempts", 0)))
            self.attempts[entry.scope, entry.stage] = ended
        if entry.kind == "attempt_started":
            self.started.add((entry.scope, entry.stage, body["attempt"]))

    def finished(self, place: Place) -> bool:
        """Whether a stage has ended for good."""
        run, parts = self.history, place[0].split("/")[1:]
        for name, within in zip(parts[::2], parts[1::2], strict=True):
            known = run.stages.get(name)
            if known is None:
                return False
            if has_ended(name, known):
                return True
            if within not in known.latest:
                return False
            run = known.within[known.latest[within]]
        known = run.stages.get(place[1])
        return known is not None and has_ended(place[1], known)


def has_ended(name: str, known: StageHistory) -> bool:
    """Whether a stage has ended for good."""
    settled = known.settled
    if settled is None:
        return False
    cause = settled.cause
    if cause is None:
        return counts(name, settled.state.value, None, None)
    return counts(name, settled.state.value, cause.kind.value, cause.stage)


def counts(name: str, state: str, kind: str | None, by: str | None) -> bool:
    """Whether a stage that has ended like this has ended for good."""
    return state == "succeeded" or (by == name and kind in {"skip", "condition", "cancel_branch"})


def check_kill(nodes: Sequence[Node], remains: Remains) -> Iterator[str]:
    """Says what is wrong with what a kill has left."""
    log = remains.log
    if log is not None:
        ended = remains.history.ended is not None
        if log.info.status.ended != ended:
            yield f"the run is said to be {log.info.status.value}; by its events, it has ended: {ended}"
        if log.info.held:
            yield f"the run is said to be in hand of {log.info.holder}, which was killed"
    places = {line.key: line.place for line in remains.lines}
    for line in remains.lines:
        if places[line.key] != line.place:
            yield f"{line.place} and {places[line.key]} have the same key"
        chain = Chain(nodes, line.scope, line.stage)
        if chain.node.work and (line.scope, line.stage, line.attempt) not in remains.started:
            yield f"{line.place} had an effect in attempt {line.attempt}, of which there is no record"
        for scope, node in [*chain.around, (line.scope, chain.node)]:
            missing = [needed for needed in needs_of(scope, node) if needed not in remains.succeeded]
            if missing:
                yield f"{line.place} had an effect, and there is no record that {missing[0]} had ended before"
    for (scope, name), number in collections.Counter((line.scope, line.stage) for line in remains.doubts).items():
        if number > 1 and Chain(nodes, scope, name).node.work:
            yield f"{name} in {scope!r} was left with {number} effects in doubt"
    yield from check_rows(nodes, remains)


def check_rows(nodes: Sequence[Node], remains: Remains) -> Iterator[str]:
    rows = collections.Counter(remains.rows)
    for key, place in {line.key: line.place for line in remains.lines}.items():
        paid = remains.paid[place] if Chain(nodes, *place).node.pays else 0
        if rows[key] != paid:
            yield f"{place} has succeeded {paid} times by the journal, and paid {rows[key]} times"


def check_effects(nodes: Sequence[Node], before: Remains, kills: Sequence[Remains], after: Remains) -> Iterator[str]:
    """Says what is wrong with the effects of a run that was killed, and came to its end.

    Args:
        nodes: The graph.
        before: The run that was not killed.
        kills: What each of the kills has left.
        after: What there is now.
    """
    wanted = {line.place for line in before.lines}
    found = collections.Counter(line.place for line in after.lines)
    for place in wanted - found.keys():
        yield f"{place} never took effect"
    for place in found.keys() - wanted:
        yield f"{place} took effect, which it does not do without a kill"
    for place in wanted & found.keys():
        chain = Chain(nodes, *place)
        if chain.fails:
            if found[place] > chain.ends * attempts_of(chain.node) * (len(kills) + 1):
                yield f"{place} took effect {found[place]} times in {len(kills) + 1} processes"
            continue
        doubtful = [kill.doubtful[place] for kill in kills]
        if found[place] > chain.most + sum(doubtful):
            yield (
                f"{place} took effect {found[place]} times; without a kill it is {chain.most} at most, and "
                f"{sum(doubtful)} of its effects were left in doubt"
            )
        for number, kill in enumerate(kills):
            if kill.finished(place):
                later = found[place] - sum(line.place == place for line in kill.lines)
                may = max(0, chain.ends - kill.ends[place]) * chain.each + sum(doubtful[number:])
                if later > may:
                    yield f"{place} had ended by kill {number}, and took effect {later} times after that, not {may}"
        if chain.exact and after.ends[place] > 1:
            yield f"{place} has ended {after.ends[place]} times"


def check_results(
    nodes: Sequence[Node], before: Mapping[str, Any], kills: Sequence[Remains], after: Mapping[str, Any]
) -> Iterator[str]:
    """Says in what results are not those of a run that was not killed."""
    for what in ("status", "partial", "artifacts"):
        if before[what] != after[what]:
            yield f"{what}: {before[what]!r} without a kill, {after[what]!r} with it"
    for name, record in before["stages"].items():
        if record != after["stages"].get(name):
            yield f"{name}: {record!r} without a kill, {after['stages'].get(name)!r} with it"
        attempts, least = after["attempts"][name], before["attempts"][name]
        more = sum(not kill.finished(("", name)) for kill in kills)
        node = next(node for node in nodes if node.name == name)
        if node.stumbles:  # and it does not any more, if it was killed after the effect
            least = min(least, 1)
        most = before["attempts"][name] + more
        if node.does in AGAIN:
            most += attempts_of(node) * len(kills)
        if not least <= attempts <= most:
            yield f"{name} was entered {attempts} times; without a kill {least}, and {more} kills left it unfinished"


# Processes


@final
class Points:
    """Counts the points that a process passes, and kills it at one of them.

    Args:
        at: Which one, if it is to be killed.
        label: Where it writes down which one it was.
        lag: For how many seconds the disk lags behind then, so that the bodies go on meanwhile as far as they may.
    """

    def __init__(self, at: int | None, label: Path, lag: float) -> None:
        self._at = at
        self._label = label
        self._lag = lag
        self._count = itertools.count()

    def __call__(self, what: str, *, lags: bool = False) -> None:
        if next(self._count) == self._at:
            self._label.write_text(what, "utf-8")
            if lags:
                time.sleep(self._lag)
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def passed(self) -> int:
        return next(self._count)


def watched(points: Points) -> type[sqlite3.Connection]:
    """Gives connections that have a point before and after every commit."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            commits = sql == "COMMIT" or (sql.startswith("UPDATE") and not self.in_transaction)
            if not commits:
                return super().execute(sql, parameters)
            points(f"before {sql[:28]}", lags=True)
            cursor = super().execute(sql, parameters)
            points(f"after {sql[:28]}")
            return cursor

    return Connection


@final
class Case:
    """One run, in a directory of its own, with all processes that work on it."""

    def __init__(self, graph: StageGraph, place: Path, seed: str) -> None:
        self._graph = graph
        self.place = place
        self._seed = seed
        self._processes = 0
        place.mkdir()

    def process(self, kill_at: int | None) -> bool:
        """Begins the run, or goes on with it, in a process of its own; tells whether that was killed at its point.

        Raises:
            RuntimeError: It ended in any other way.
        """
        number = self._processes
        self._processes += 1
        pid = os.fork()
        if not pid:
            self._live(number, kill_at)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return False
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        failure = self.place / "failure"
        why = failure.read_text("utf-8") if failure.exists() else ""
        raise RuntimeError(f"process {number} ended with {status}: {why}")

    def _live(self, number: int, kill_at: int | None) -> None:
        """Is the process. It never returns."""
        try:
            signal.alarm(PATIENCE)
            lag = random.Random(f"{self._seed}/{number}").choice([0.0, 0.002, 0.01])
            points = Points(kill_at, self.place / f"killed-{number}", lag)
            of_sqlite, of_trio = (cast("Any", importlib.import_module(name)) for name in ("sqlite3", "trio._core._run"))
            of_sqlite.connect = functools.partial(sqlite3.connect, factory=watched(points))
            of_trio._r.seed(f"{self._seed}/{number}")  # in what order tasks run
            file = os.open(self._effects, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

            def write(line: Line) -> None:
                points(f"before the effect of {line.place}")
                os.write(file, json.dumps(attrs.asdict(line)).encode() + b"\n")
                points(f"after the effect of {line.place}")

            Here.world = World(number, self.lines(), write)
            said = trio.run(self._run)
            said["points"] = points.passed
            (self.place / "said").write_text(json.dumps(said), "utf-8")
            os._exit(0)
        except BaseException:  # noqa: ASYNC103  # there is nobody above it
            (self.place / "failure").write_text(traceback.format_exc(), "utf-8")
            os._exit(1)

    async def _run(self) -> dict[str, Any]:
        async with open_store(f"sqlite:{self._store}") as store:
            return await say(self._graph, store, again=random.Random(self._seed).random() < 0.3)

    @property
    def _store(self) -> Path:
        return self.place / "runs.db"

    @property
    def _effects(self) -> Path:
        return self.place / "effects"

    def lines(self) -> list[Line]:
        """The effects so far."""
        text = self._effects.read_text("utf-8") if self._effects.exists() else ""
        return [Line(**json.loads(line)) for line in text.splitlines()]

    def said(self) -> dict[str, Any]:
        """What the process that came to the end has said."""
        found: dict[str, Any] = json.loads((self.place / "said").read_text("utf-8"))
        return found

    def killed_at(self) -> list[str]:
        """Where the processes were that were killed."""
        return [file.read_text("utf-8") for file in sorted(self.place.glob("killed-*"))]

    def remains(self) -> Remains:
        """Reads what there is, without a thread."""
        if not self._store.exists():
            return Remains(None, [], self.lines())
        connection = sqlite3.connect(self._store)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            rows = [key for (key,) in connection.execute("SELECT key FROM paid")] if "paid" in tables else []
            begun = "stageflow_runs" in tables and connection.execute("SELECT 1 FROM stageflow_runs").fetchone()
        finally:
            connection.close()
        log = None
        if begun:
            database = Database(self._store, read_only=True, lease=15.0, patience=30.0)
            try:
                log = database.read(RUN, None)
            finally:
                database.close()
        return Remains(log, rows, self.lines())


@final
class Trial:
    """A graph that is run once without a kill, and then with kills."""

    def __init__(self, seed: int, place: Path, keep: Path | None = None) -> None:
        self.seed = seed
        self._keep = keep
        self.nodes: tuple[Node, ...] = Drawing(random.Random(seed).randrange, real=True).graph()
        self._graph = build(self.nodes)
        fingerprints(self._graph)  # which every child would do otherwise
        self._place = place
        self.problems: list[dict[str, Any]] = []
        self.kills = 0
        self.cases = 0
        first = Case(self._graph, place / "first", f"{seed}")
        self.points = 0
        try:
            first.process(None)
            self._before, self._said = first.remains(), first.said()
            self.points = int(self._said["points"])
            problems = [*check_kill(self.nodes, self._before), *check_end(self._said), *check_first(self._said)]
        except Exception:
            problems = [traceback.format_exc()]
        self._blame(None, first, problems)
        if self.problems:
            self.points = 0

    def case(self, point: int) -> None:
        """Has it killed at a point."""
        self.cases += 1
        chance = random.Random(f"{self.seed}/{point}")
        again = chance.randrange(5) < 3
        second = chance.randrange(max(6, self.points - point + 6))
        case = Case(self._graph, self._place / f"at-{point}", f"{self.seed}/{point}")
        problems: list[str] = []
        try:
            kills: list[Remains] = []
            for kill_at in (point, *([second] if again else []), None):
                if not case.process(kill_at):
                    break
                self.kills += 1
                kills.append(case.remains())
                problems += check_kill(self.nodes, kills[-1])
            after, said = case.remains(), case.said()
            problems += check_rows(self.nodes, after)
            problems += check_end(said)
            problems += check_effects(self.nodes, self._before, kills, after)
            problems += check_results(self.nodes, self._said, kills, said)
        except Exception:
            problems.append(traceback.format_exc())
        self._blame(point, case, problems)
        shutil.rmtree(case.place)

    def _blame(self, point: int | None, case: Case, problems: Sequence[str]) -> None:
        if problems:
            if self._keep is not None:
                shutil.copytree(case.place, self._keep / f"{self.seed}-{point}", dirs_exist_ok=True)
            repeat = f"python tests/crash.py --seed {self.seed}" + ("" if point is None else f" --point {point}")
            self.problems.append(
                {
                    "seed": self.seed,
                    "point": point,
                    "killed": case.killed_at(),
                    "problems": list(dict.fromkeys(problems)),
                    "repeat": repeat,
                }
            )


def check_first(said: Mapping[str, Any]) -> Iterator[str]:
    """Says what has failed in a run that was not killed without being meant to."""
    for name, record in said["stages"].items():
        if not record.get("error", "Stumbled").startswith("Stumbled"):
            yield f"{name}: {record['error']}"


def check_end(said: Mapping[str, Any]) -> Iterator[str]:
    """Says what is wrong with what a process has said that came to the end."""
    info, states = said["info"], collections.Counter(each["state"] for each in said["stages"].values())
    if info != {"status": said["status"], "stages": dict(states), "recoveries": 0}:
        yield f"the run is listed as {info!r}, and it was {said['status']} with {dict(states)!r}"
    if "again" in said:
        for what in ("status", "stages", "artifacts", "attempts"):
            if said["again"][what] != said[what]:
                yield f"{what}: {said[what]!r} at the end, {said['again'][what]!r} when it is resumed once more"


def try_all(seed: int, kills: int, keep: Path | None = None) -> dict[str, Any]:
    """Tries one graph after the other until there have been so many kills."""
    found: dict[str, Any] = {"kills": 0, "cases": 0, "graphs": 0, "violations": []}
    while found["kills"] < kills and len(found["violations"]) < MANY:
        with tempfile.TemporaryDirectory(prefix="stageflow-crash-", dir=MEMORY) as place:
            trial = Trial(seed, Path(place), keep)
            order = random.Random(seed).sample(range(trial.points), min(trial.points, PER_GRAPH))
            for point in order:
                if found["kills"] + trial.kills < kills:
                    trial.case(point)
        found["kills"] += trial.kills
        found["cases"] += trial.cases
        found["graphs"] += 1
        found["violations"] += trial.problems
        seed += 1
    return found


def try_one(seed: int, point: int, times: int, keep: Path | None) -> dict[str, Any]:
    """Tries one graph with a kill at one point, again and again: which points there are depends on the time too."""
    with tempfile.TemporaryDirectory(prefix="stageflow-crash-", dir=MEMORY) as place:
        trial = Trial(seed, Path(place), keep)
        for node in trial.nodes:
            print(node, file=sys.stderr)
        for _ in range(times):
            trial.case(point)
    return {"kills": trial.kills, "cases": trial.cases, "graphs": 1, "violations": trial.problems}


def share(seed: int, kills: int, jobs: int, more: Sequence[str]) -> dict[str, Any]:
    """Has several processes like this one try, each from a seed of its own on."""
    commands = [
        [sys.executable, __file__, "--seed", str(seed + 100_000 * job), "--kills", str(-(-kills // jobs)), *more]
        for job in range(jobs)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    found: dict[str, Any] = {"kills": 0, "cases": 0, "graphs": 0, "violations": []}
    for process in processes:
        part = json.loads(process.communicate()[0])
        for what in found:
            found[what] += part[what]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the first graph")
    parser.add_argument("--kills", type=int, default=100, help="how many there shall be")
    parser.add_argument("--point", type=int, help="the one point at which the graph of the seed is killed")
    parser.add_argument("--jobs", type=int, default=1, help="in how many processes")
    parser.add_argument("--times", type=int, default=1, help="how often it is killed at that point")
    parser.add_argument("--keep", type=Path, help="a directory for what the cases leave in which something was wrong")
    given = parser.parse_args()
    warm_up()
    gc.collect()
    gc.freeze()
    if given.point is not None:
        found = try_one(given.seed, given.point, given.times, given.keep)
    elif given.jobs > 1:
        found = share(given.seed, given.kills, given.jobs, [] if given.keep is None else ["--keep", str(given.keep)])
    else:
        found = try_all(given.seed, given.kills, given.keep)
    print(json.dumps(found, indent=2))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
