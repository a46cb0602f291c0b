"""Crashes: processes that are killed at any moment, for real and in memory, and what is made of what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from stageflow.journal.memory import MemoryStore
from stageflow.journal.record import RunStatus
from stageflow.journal.store import open_store
from tests.crash import (
    RUN,
    Drawing,
    Here,
    Line,
    Node,
    Remains,
    World,
    after_a_crash,
    build,
    check_effects,
    check_end,
    check_first,
    check_kill,
    check_results,
    go,
    kept_of,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stageflow import StageGraph

FULL = os.environ.get("STAGEFLOW_FULL") == "1"
"""Whether to try many more random graphs in memory. Many more kills are a session of their own: `nox -s crash`."""

KILLS = 300
HARNESS = Path(__file__).with_name("crash.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_whenever_a_process_is_killed_nothing_is_lost_or_done_again() -> None:
    # Several at once, for most of the time they wait for their children.
    command = [sys.executable, str(HARNESS), "--seed", "1", "--kills", str(KILLS), "--jobs", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    found = json.loads(ended.stdout)
    assert found["violations"] == []
    assert found["kills"] >= KILLS


def test_the_harness_notices_what_is_lost_and_what_is_done_again() -> None:
    node = Node(name="a", work=True, pays=True)
    line = Line(process=0, scope="", stage="a", attempt=1, key="key", token="")
    nothing, once, twice = (Remains(None, (), [line] * times) for times in range(3))
    paid = Remains(None, ("key",), [line])

    def said(state: str, attempts: int) -> dict[str, Any]:
        stages = {"a": {"state": state}}
        return {"status": state, "partial": {}, "artifacts": [], "stages": stages, "attempts": {"a": attempts}}

    assert list(check_effects([node], once, [], once)) == []
    assert list(check_effects([node], once, [once], twice)) == []  # it was left in doubt
    assert list(check_effects([node], once, [], nothing)) == ["('', 'a') never took effect"]
    assert list(check_effects([node], once, [nothing], twice)) == [
        "('', 'a') took effect 2 times; without a kill it is 1 at most, and 0 of its effects were left in doubt"
    ]
    assert list(check_kill([node], once)) == ["('', 'a') had an effect in attempt 1, of which there is no record"]
    assert "('', 'a') has succeeded 0 times by the journal, and paid 1 times" in check_kill([node], paid)
    assert list(check_results([node], said("succeeded", 1), [], said("succeeded", 1))) == []
    assert list(check_results([node], said("succeeded", 1), [once], said("succeeded", 2))) == []
    assert len(list(check_results([node], said("succeeded", 1), [], said("failed", 2)))) == 3


# In memory, where a crash is just a journal that ends


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Node, ...]:
    """Random graphs, as the harness has them."""
    return Drawing(lambda number: draw(st.integers(0, number - 1)), real=False).graph()


@attrs.frozen
class Moment:
    """When a process may die.

    Attributes:
        entries: How many entries there are.
        status: How far the run is.
        recoveries: How often it was resumed.
        happened: How many effects there are.
    """

    entries: int
    status: RunStatus
    recoveries: int
    happened: int


class Watched:
    """A store in memory that notes when its process may die."""

    def __init__(self, memory: MemoryStore, world: World) -> None:
        self.memory = memory
        self.moments: list[Moment] = []
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    async def create(self, run: Any, batch: Any) -> Any:
        lease = await self.memory.create(run, batch)
        self._note(len(self._world.lines))
        return lease

    def append_nowait(self, lease: Any, batch: Any) -> Any:
        happened = len(self._world.lines)
        receipt = self.memory.append_nowait(lease, batch)
        self._note(happened)
        return receipt

    def _note(self, happened: int) -> None:
        kept = kept_of(self.memory)
        self.moments.append(Moment(len(kept.entries), kept.status, kept.recoveries, happened))


class Life:
    """What one process makes of what it finds, and what is left if it dies on the way.

    Args:
        graph: What it runs.
        memory: The store that it finds.
        lines: What had taken effect before.
        process: Which one it is.
    """

    def __init__(self, graph: StageGraph, memory: MemoryStore, lines: Iterable[Line], process: int) -> None:
        self.world = World(process, lines, lambda _: None)
        self.store = Watched(memory, self.world)
        self.said = trio.run(self._live, graph, clock=MockClock(autojump_threshold=0))
        self.end = trio.run(self._read, memory, self.world.lines)

    async def _live(self, graph: StageGraph) -> dict[str, Any]:
        Here.world = self.world
        return await say(graph, cast("Any", self.store), again=True)

    async def _read(self, memory: MemoryStore, lines: list[Line]) -> Remains:
        return Remains(await memory.read(RUN, tenant=None), (), lines)

    def dies(self, when: int, *, late: bool) -> tuple[MemoryStore, Remains]:
        """Gives what it leaves if it dies after something it has written, or just before it writes the next thing."""
        number = when % len(self.store.moments)
        moment = self.store.moments[number]
        happened = moment.happened
        if late:
            later = self.store.moments[number + 1 :]
            happened = later[0].happened if later else len(self.world.lines)
        left = after_a_crash(self.store.memory, moment.entries, moment.status, moment.recoveries)
        return left, trio.run(self._read, left, self.world.lines[:happened])


@settings(
    max_examples=1000 if FULL else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(graphs(), st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=3))
def test_resume_equals_no_crash(nodes: tuple[Node, ...], deaths: list[tuple[int, bool]]) -> None:
    graph = build(nodes)
    first = Life(graph, MemoryStore(), [], 0)
    problems = [*check_first(first.said), *check_end(first.said), *check_kill(nodes, first.end)]
    assert problems == []
    _die(nodes, graph, first, deaths)


GUARDED = Node(name="guard", after=("draft",), sends_back="draft", region=True)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(
            (Node(name="draft", what="calls", within=((Node(name="in", does="when"),),), region=True), GUARDED),
            id="what was sent back succeeds in part",
        ),
        pytest.param(
            (Node(name="draft", stumbles=1, region=True, work=True), GUARDED), id="what was sent back is tried again"
        ),
        pytest.param(
            (
                Node(name="draft", region=True),
                Node(name="between", after=("draft",), region=True, stumbles=1, work=True),
                attrs.evolve(GUARDED, after=("draft", "between")),
            ),
            id="what comes after what was sent back is tried again",
        ),
        pytest.param(
            (
                Node(name="draft", region=True),
                GUARDED,
                *(Node(name=f"beside {number}", before=(0.0,) * number, work=True) for number in range(9)),
            ),
            id="others write while a guard sends back",
        ),
    ],
)
def test_resume_equals_no_crash_wherever_that_is(nodes: tuple[Node, ...]) -> None:
    graph = build(nodes)
    first = Life(graph, MemoryStore(), [], 0)
    for number in range(len(first.store.moments)):
        for late in (False, True):
            _die(nodes, graph, first, [(number, late)])


def _die(nodes: tuple[Node, ...], graph: StageGraph, first: Life, deaths: Iterable[tuple[int, bool]]) -> None:
    """Has one process after the other die, and compares what the last one says with what one said that lived."""
    life, kills, problems = first, list[Remains](), list[str]()
    for when, late in deaths:
        if not life.store.moments:  # the run was over, and so it has written nothing
            break
        memory, left = life.dies(when, late=late)
        kills.append(left)
        problems += check_kill(nodes, left)
        life = Life(graph, memory, left.lines, len(kills))
    problems += check_end(life.said)
    problems += check_effects(nodes, first.end, kills, life.end)
    problems += check_results(nodes, first.said, kills, life.said)
    assert problems == [], "\n".join(_told(nodes, kills))


async def test_wrong_sql_takes_nothing_with_it_that_others_have_noted(tmp_path: Path) -> None:
    nodes = (
        Node(name="a", what="child", within=((Node(name="in", before=(0.05,)),),)),
        Node(name="b", before=(0.01,), fails=("paying",), pays=True),
    )
    Here.world = World(0, [], lambda _: None)
    async with open_store(f"sqlite:{tmp_path / 'runs.db'}") as store:
        await go(build(nodes), store)
        entries = (await store.read(RUN, tenant=None)).entries
    assert [entry.kind for entry in entries if entry.scope == "/a/0"] == [
        "run_started",
        "attempt_started",
        "stage_settled",
    ]


def _told(nodes: Iterable[Node], kills: Iterable[Remains]) -> Iterator[str]:
    yield from map(repr, nodes)
    for kill in kills:
        yield "killed when there were these:"
        assert kill.log is not None
        yield from (f"  {entry.scope} {entry.stage} {entry.kind} {entry.body[:99]}" for entry in kill.log.entries)
