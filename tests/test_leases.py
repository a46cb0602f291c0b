"""A run is in one hand: who resumes it while another process has it is told, and who has lost it writes no more."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs
import pytest
import trio

from stageflow import Pipeline, PipelineContext, StageContext, StageOutput
from stageflow.errors import LeaseLostError, StageflowError
from stageflow.journal import RunStatus
from stageflow.journal.holder import is_gone, new_holder
from stageflow.journal.store import Batch, Entry, Log, NewRun, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from stageflow.journal.store import RunInfo, Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stops processes with signals")

RUN = "the run"
PATIENCE = 60.0  # for processes, in seconds, on a machine that has a lot to do

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import trio
from stageflow import Pipeline, PipelineContext, StageflowError
from stageflow.journal.store import open_store

place, act, run_id, lease, habit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5]

def say(**words):
    print(json.dumps(words), flush=True)

async def first(ctx):
    say(entered="first")
    return {"value": 1}

async def second(ctx):
    say(entered="second")
    if habit.startswith("stops"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if habit == "stops and sleeps":
        await trio.sleep(3600)
    while habit == "waits" and not (place / "go").exists():
        await trio.sleep(0.01)
    return {"value": 2}

async def third(ctx):
    say(entered="third")
    return {"value": sum(each["value"] for each in ctx.inputs.values())}

graph = (
    Pipeline("p")
    .with_stage("first", first)
    .with_stage("second", second, after="first", kind="work")
    .with_stage("third", third, after=["first", "second"])
    .build()
)

async def main():
    try:
        async with open_store(f"sqlite:{place / 'runs.db'}", lease=lease) as store:
            if act == "start":
                results = await graph.run(PipelineContext(run_id=run_id), store=store)
            else:
                results = await graph.resume(run_id, store=store)
    except StageflowError as error:
        say(raised=type(error).__name__, holder=getattr(error, "holder", None), results=sorted(error.results or ()))
    else:
        say(value=results["third"].data["value"])

say(ready=True)
sys.stdin.readline()
trio.run(main)
"""


class Process:
    """A process that starts or resumes a run, and says what it does."""

    def __init__(self, place: Path, act: str, run_id: str, lease: float, habit: str) -> None:
        command = [sys.executable, "-c", PROGRAM, str(place), act, run_id, str(lease), habit]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.hears() == {"ready": True}

    def go(self) -> None:
        """Has it begin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def hears(self) -> dict[str, Any]:
        """Waits for what it says next."""
        assert self.popen.stdout is not None
        return cast("dict[str, Any]", json.loads(self.popen.stdout.readline() or '{"silence": true}'))

    def hears_all(self) -> list[dict[str, Any]]:
        """Waits until it has ended, and gives what it said since."""
        said = [json.loads(line) for line in self.popen.communicate(timeout=PATIENCE)[0].splitlines()]
        assert self.popen.returncode == 0
        return said

    def signal(self, number: int) -> None:
        os.kill(self.popen.pid, number)


Spawn: TypeAlias = "Callable[..., Process]"


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Makes processes, and ends them with the test."""
    made: list[Process] = []

    def spawn(act: str, *, run_id: str = RUN, lease: float = 60.0, habit: str = "", go: bool = True) -> Process:
        made.append(process := Process(tmp_path, act, run_id, lease, habit))
        if go:
            process.go()
        return process

    yield spawn
    for process in made:
        process.popen.kill()
        process.popen.communicate(timeout=PATIENCE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def opened(path: Path, *, lease: float = 15.0, read_only: bool = False) -> AbstractAsyncContextManager[Store]:
    return open_store(f"sqlite:{path}", lease=lease, read_only=read_only)


def log_of(path: Path, run_id: str = RUN) -> Log:
    async def read() -> Log:
        async with opened(path, read_only=True) as store:
            return await store.read(run_id, tenant=None)

    return trio.run(read)


def kinds(entries: Sequence[Entry]) -> list[tuple[str, str | None]]:
    return [(each.kind, each.stage) for each in entries]


def forge(path: Path, holder: str, seconds: float, run_id: str = RUN) -> None:
    """Puts a run into the hands of somebody, for some seconds from now on."""
    with closing(sqlite3.connect(path)) as connection:
        sql = "UPDATE stageflow_runs SET holder = ?, lease_until = ?, epoch = epoch + 1 WHERE run_id = ?"
        assert connection.execute(sql, (holder, time.time() + seconds, run_id)).rowcount == 1
        connection.commit()


# Processes


def test_of_two_processes_that_resume_a_run_one_does(tmp_path: Path, path: Path, spawn: Spawn) -> None:
    for number in range(2):
        run_id = f"run {number}"
        killed = spawn("start", run_id=run_id, habit="waits")
        assert [killed.hears(), killed.hears()] == [{"entered": "first"}, {"entered": "second"}]
        killed.signal(signal.SIGKILL)
        killed.popen.wait(PATIENCE)

        both = [spawn("resume", run_id=run_id, habit="waits", go=False) for _ in range(2)]
        for process in both:
            process.go()
        said = [process.hears() for process in both]
        winner, loser = both if said[0] == {"entered": "second"} else both[::-1]
        info = log_of(path, run_id).info
        assert {"entered": "second"} in said
        assert {"raised": "LeaseLostError", "holder": info.holder, "results": []} in said
        assert info.held
        assert f" pid {winner.popen.pid} " in str(info.holder)
        assert loser.hears_all() == []

        (tmp_path / "go").touch()
        assert winner.hears_all() == [{"entered": "third"}, {"value": 3}]
        (tmp_path / "go").unlink()
        log = log_of(path, run_id)
        assert kinds(log.entries) == [
            ("run_started", None),
            ("stage_settled", "first"),
            ("attempt_started", "second"),
            ("run_resumed", None),
            ("attempt_started", "second"),
            ("stage_settled", "second"),
            ("stage_settled", "third"),
            ("run_ended", None),
        ]
        assert log.info.status is RunStatus.SUCCEEDED
        assert not log.info.held


@pytest.mark.parametrize("habit", ["stops", "stops and sleeps"])
def test_a_process_that_was_stopped_past_its_lease_writes_nothing_more(path: Path, habit: str, spawn: Spawn) -> None:
    stopped = spawn("start", lease=0.3, habit=habit)
    assert [stopped.hears(), stopped.hears()] == [{"entered": "first"}, {"entered": "second"}]
    os.waitpid(stopped.popen.pid, os.WUNTRACED)
    deadline = time.monotonic() + PATIENCE
    while log_of(path).info.held and time.monotonic() < deadline:
        time.sleep(0.02)
    before = log_of(path)
    assert kinds(before.entries) == [
        ("run_started", None),
        ("stage_settled", "first"),
        ("attempt_started", "second"),
    ]

    other = spawn("resume")
    assert other.hears_all() == [{"entered": "second"}, {"entered": "third"}, {"value": 3}]
    after = log_of(path)
    assert list(after.entries[:3]) == list(before.entries)

    stopped.signal(signal.SIGCONT)
    (said,) = stopped.hears_all()
    assert (said["raised"], said["holder"]) == ("LeaseLostError", after.info.holder)
    assert "first" in said["results"]
    assert "third" not in said["results"]
    assert log_of(path) == after


def test_a_process_that_was_stopped_for_less_than_its_lease_goes_on(spawn: Spawn) -> None:
    stopped = spawn("start", habit="stops")
    assert [stopped.hears(), stopped.hears()] == [{"entered": "first"}, {"entered": "second"}]
    os.waitpid(stopped.popen.pid, os.WUNTRACED)
    other = spawn("resume")
    (said,) = other.hears_all()
    assert said["raised"] == "LeaseLostError"
    assert f" pid {stopped.popen.pid} " in said["holder"]
    stopped.signal(signal.SIGCONT)
    assert stopped.hears_all() == [{"entered": "third"}, {"value": 3}]


def test_that_a_holder_was_killed_is_noticed_at_once(path: Path, spawn: Spawn) -> None:
    killed = spawn("start", lease=3600.0, habit="waits")
    assert [killed.hears(), killed.hears()] == [{"entered": "first"}, {"entered": "second"}]
    assert log_of(path).info.held
    killed.signal(signal.SIGKILL)
    os.waitid(os.P_PID, killed.popen.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie, which nobody has waited for
    info = log_of(path).info
    assert (info.status, info.held) == (RunStatus.RUNNING, False)
    assert f" pid {killed.popen.pid} " in str(info.holder)
    other = spawn("resume", lease=3600.0)
    assert other.hears_all() == [{"entered": "second"}, {"entered": "third"}, {"value": 3}]


def test_a_process_that_ends_leaves_its_run_to_others_at_once(path: Path, spawn: Spawn) -> None:
    one = spawn("start", lease=3600.0)
    assert one.hears_all()[-1] == {"value": 3}
    assert not log_of(path).info.held
    assert spawn("resume", lease=3600.0).hears_all() == [{"value": 3}]  # it is over, and nothing is entered


# Holders


def altered(holder: str, *, machine: str | None = None, pid: int | None = None, started: str | None = None) -> str:
    before, _, rest = holder.partition(" pid ")
    process, _, number = rest.partition("#")
    old_pid, _, old_started = process.partition(" ")
    return f"{machine or before} pid {pid or old_pid} {started or old_started}#{number}"


def test_a_holder_of_this_process_is_not_gone() -> None:
    assert not is_gone(new_holder())
    assert new_holder() != new_holder()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells by /proc when a process has started")
def test_a_process_that_has_the_number_of_another_one_is_not_that_one() -> None:
    assert is_gone(altered(new_holder(), started="1"))


def test_of_holders_elsewhere_and_of_those_that_are_none_nobody_knows() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(PATIENCE)
    gone = altered(new_holder(), pid=ended.pid)
    assert is_gone(gone)
    assert not is_gone(altered(gone, machine="elsewhere"))
    for none in ("", "x", " pid ", " pid x#1", altered(gone).partition(" pid ")[0]):
        assert not is_gone(none)


async def test_a_holder_that_is_alive_elsewhere_is_respected_until_its_lease_ends(path: Path) -> None:
    async with opened(path) as store:
        await store.release(await store.create(NewRun(run_id=RUN, pipeline="p", tenant=None, began_at=1.0), Batch()))
        until = time.time() + 0.5
        forge(path, "elsewhere/1/2 pid 3 4#5", 0.5)
        lease, refused = None, list[str | None]()
        while lease is None:
            try:
                lease = await store.acquire(RUN, tenant=None)
            except LeaseLostError as error:
                refused.append(error.holder)
            await trio.sleep(0.01)
        assert set(refused) == {"elsewhere/1/2 pid 3 4#5"}
        assert time.time() > until - 0.01
        assert lease.epoch > 2


async def test_a_holder_of_this_machine_that_is_gone_is_not_waited_for(path: Path) -> None:
    async with opened(path) as store:
        await store.release(await store.create(NewRun(run_id=RUN, pipeline="p", tenant=None, began_at=1.0), Batch()))
        forge(path, altered(new_holder(), pid=2**22 - 1, started="1"), 3600.0)
        assert not (await store.runs())[0].held
        await store.acquire(RUN, tenant=None)


# Within a process


async def info_of(store: Store) -> RunInfo:
    return (await store.read(RUN, tenant=None)).info


@pytest.mark.parametrize("blocks", [False, True])
async def test_a_lease_is_renewed_for_as_long_as_the_process_lives(path: Path, blocks: bool) -> None:
    async def takes_long(ctx: StageContext) -> None:
        for _ in range(10):
            if blocks:  # all of Trio
                time.sleep(0.1)  # noqa: ASYNC251
            else:
                await trio.sleep(0.1)
            async with opened(path) as other:
                with pytest.raises(LeaseLostError):
                    await other.acquire(RUN, tenant=None)

    graph = Pipeline("p").with_stage("s", takes_long).build()
    async with opened(path, lease=0.5) as store:
        results = await graph.run(PipelineContext(run_id=RUN), store=store)
        assert results.status is RunStatus.SUCCEEDED
        assert not (await info_of(store)).held


@attrs.define
class Taken:
    """A run that is taken over while its second stage runs.

    Attributes:
        path: Where its store is.
        lingers: Whether the stage waits then, for longer than any test.
        entered: The stages that were entered.
        log: The run, as it was when it had been taken over.
        holder: Who has it then.
    """

    path: Path
    lingers: bool = False
    entered: list[str] = attrs.field(factory=list[str])
    log: Log | None = None
    holder: str = ""

    async def first(self, ctx: StageContext) -> StageOutput:
        self.entered.append("first")
        return StageOutput.ok(value=1)

    async def second(self, ctx: StageContext) -> StageOutput:
        self.entered.append("second")
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("UPDATE stageflow_runs SET lease_until = 0")
            connection.commit()
        async with opened(self.path) as other:
            lease = await other.acquire(RUN, tenant=None)
            self.holder = lease.holder
            await other.append_nowait(lease, Batch(entries=[Entry("", None, "theirs", "{}")])).wait()
            self.log = await other.read(RUN, tenant=None)
            if self.lingers:
                await trio.sleep(3600)
            return StageOutput.ok(value=2)

    async def third(self, ctx: StageContext) -> StageOutput:
        self.entered.append("third")
        return StageOutput.ok(value=3)

    async def run(self, *, lease: float = 15.0) -> LeaseLostError:
        pipeline = Pipeline("p").with_stage("first", self.first).with_stage("second", self.second, after="first")
        graph = pipeline.with_stage("third", self.third, after="second").build()
        async with opened(self.path, lease=lease) as store:
            with pytest.raises(LeaseLostError) as caught:
                await graph.run(PipelineContext(run_id=RUN), store=store)
            assert self.log is not None
            assert list((await store.read(RUN, tenant=None)).entries) == list(self.log.entries)
        assert self.entered == ["first", "second"]
        return caught.value


async def test_a_run_that_is_taken_over_ends_and_keeps_in_hand_what_had_finished(path: Path) -> None:
    taken = Taken(path)
    error = await taken.run()
    assert (error.run_id, error.holder) == (RUN, taken.holder)
    assert error.results is not None
    assert dict(error.results)["first"].data == {"value": 1}
    assert "third" not in error.results
    assert error.results.status is RunStatus.FAILED


async def test_a_run_that_is_taken_over_is_cancelled_as_soon_as_its_lease_is_not_renewed(path: Path) -> None:
    with trio.fail_after(PATIENCE):
        taken = Taken(path, lingers=True)
        error = await taken.run(lease=0.3)
    assert isinstance(error, StageflowError)
    assert error.results is not None
    assert list(error.results) == ["first"]


async def test_a_run_with_others_in_the_same_store_is_taken_over_alone(path: Path) -> None:
    """Appends of several runs share a transaction, and their fates are apart."""
    async with opened(path) as store, opened(path) as other:
        names = [f"run {number}" for number in range(4)]
        leases = [
            await store.create(NewRun(run_id=name, pipeline="p", tenant=None, began_at=1.0), Batch()) for name in names
        ]
        forge(path, "elsewhere", -1.0, names[1])
        await other.acquire(names[1], tenant=None)
        batch = Batch(entries=[Entry("", "s", "kind", "{}")])
        receipts = [store.append_nowait(lease, batch) for _ in range(50) for lease in leases]
        for number, receipt in enumerate(receipts):
            if number % 4 == 1:
                with pytest.raises(LeaseLostError):
                    await receipt.wait()
            else:
                await receipt.wait()
        lengths = [len((await store.read(name, tenant=None)).entries) for name in names]
        assert lengths == [50, 0, 50, 50]
