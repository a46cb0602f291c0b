"""What becomes of runs when the store fails at any of its operations, or its file is damaged.

It is noticed, or nothing is lost; no value is ever another one; and what a stage had raised is never hidden.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import attrs
import pytest
import trio

from stageflow import (
    Pipeline,
    PipelineContext,
    Retry,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
)
from stageflow.errors import CheckpointError, StoreError, UnknownRunError
from stageflow.journal import RunStatus
from stageflow.journal.history import fold
from stageflow.journal.store import Batch, Entry, Log, NewRun, open_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from stageflow import PipelineResults, StageGraph
    from stageflow.journal.store import Store

FULL = os.environ.get("STAGEFLOW_FULL") == "1"
"""Whether every operation fails in every way, and every byte is damaged. Takes an hour or so."""

RUN = "the run"
FAULTS = ("disk I/O error", "database or disk is full", "database is locked")
connect = sqlite3.connect  # as it is without faults

Inject: TypeAlias = "Callable[[Faults | None], None]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def opened(path: Path, *, lease: float = 15.0, patience: float = 10.0) -> AbstractAsyncContextManager[Store]:
    return open_store(f"sqlite:{path}", lease=lease, patience=patience)


def execute(path: Path, sql: str, *parameters: object) -> list[Any]:
    """What another program than stageflow does with the file."""
    with closing(connect(path, timeout=10.0)) as connection:
        rows = connection.execute(sql, parameters).fetchall()
        connection.commit()
        return rows


# Operations that fail


@attrs.define
class Faults:
    """Which of the operations of a database fails, and how.

    Attributes:
        at: The first that fails, from 1.
        error: What it raises.
        lasting: Whether all that come after it fail as well.
        late: Whether it is done, and fails only then.
        count: How many operations there have been.
    """

    at: int
    error: str
    lasting: bool = False
    late: bool = False
    count: int = 0
    met: list[str] = attrs.field(factory=list[str])

    def meet(self, sql: str) -> bool:
        """Whether an operation is to fail."""
        self.count += 1
        fails = self.count >= self.at if self.lasting else self.count == self.at
        if fails:
            self.met.append(sql)
        return fails


class FaultyConnection(sqlite3.Connection):
    """A connection whose operations fail as `faults` has it."""

    faults: ClassVar[Faults]

    def execute(self, *args: Any) -> sqlite3.Cursor:
        return self._do(super().execute, *args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        return self._do(super().executemany, *args)

    def _do(self, operation: Callable[..., sqlite3.Cursor], *args: Any) -> sqlite3.Cursor:
        faults = type(self).faults
        fails = faults.meet(args[0])
        if not fails:
            return operation(*args)
        if faults.late:
            operation(*args).close()
        raise sqlite3.OperationalError(faults.error)


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Has all connections that are opened from now on fail."""

    def inject(faults: Faults | None) -> None:
        if faults is None:
            monkeypatch.setattr(sqlite3, "connect", connect)
            return
        kind = type("Faulty", (FaultyConnection,), {"faults": faults})

        def connect_faultily(*args: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, factory=kind, **options)
            return connection

        monkeypatch.setattr(sqlite3, "connect", connect_faultily)

    return inject


def every_fault(*, late: bool = False) -> Iterator[Iterator[Faults]]:
    """For each way to fail, the faults at the first operation, at the second, and so on, without end.

    Unless all are wanted, the ways take turns.
    """
    ways = [(error, lasting) for lasting in (False, True) for error in (FAULTS[:1] if late else FAULTS)]
    if late:
        ways = ways[:1]

    def of(shift: int | None) -> Iterator[Faults]:
        at = 0
        while True:
            at += 1
            error, lasting = ways[(at if shift is None else shift) % len(ways)]
            yield Faults(at, error, lasting=lasting, late=late)

    yield from map(of, range(len(ways)) if FULL else [None])


# What is run


@attrs.define
class Work:
    """A graph of all sorts, and what has become of its stages.

    Attributes:
        fails: Whether one of them fails.
        entered: The stages that were entered, in order.
        returned: The stages that came to their ends.
        raised: What has ended runs.
        error: What the stage that fails raises.
    """

    fails: bool = False
    entered: list[str] = attrs.field(factory=list[str])
    returned: list[str] = attrs.field(factory=list[str])
    raised: list[Exception] = attrs.field(factory=list[Exception])
    error: ValueError = attrs.field(factory=lambda: ValueError("of the stage itself"))

    @property
    def graph(self) -> StageGraph:
        inner = Pipeline("inner").with_stage("deep", self._gives("deep", 4)).build()

        async def first(ctx: StageContext) -> StageOutput:
            self.entered.append(ctx.stage)
            await trio.lowlevel.checkpoint()
            if ctx.attempt == 1:
                raise OSError("not yet")
            return self._ended(ctx.stage, 1)

        async def books(ctx: StageContext) -> StageOutput:
            self.entered.append(ctx.stage)
            await trio.lowlevel.checkpoint()
            ctx.transaction().execute("INSERT INTO bookings VALUES (?)", (ctx.run_id,))
            return self._ended(ctx.stage, 3)

        async def fails(ctx: StageContext) -> StageOutput:
            self.entered.append(ctx.stage)
            await trio.lowlevel.checkpoint()
            if self.fails:
                raise self.error
            return self._ended(ctx.stage, 5)

        async def adds(ctx: StageContext) -> StageOutput:
            self.entered.append(ctx.stage)
            total = sum(each.get("value", 0) for each in ctx.inputs.values())
            return self._ended(ctx.stage, total)

        return (
            Pipeline("p")
            .with_stage("first", first, retry=Retry(attempts=9, delay=0.0))
            .with_stage("works", self._gives("works", 2), after="first", kind="work")
            .with_stage("books", books, after="first")
            .with_stage("nests", inner, after="first")
            .with_stage("fails", fails, after=["works", "books", "nests"])
            .with_stage("adds", adds, after=["works", "books", "fails"])
            .build()
        )

    def _gives(self, name: str, value: int) -> Callable[[StageContext], Awaitable[StageOutput]]:
        async def gives(ctx: StageContext) -> StageOutput:
            self.entered.append(name)
            await trio.lowlevel.checkpoint()
            return self._ended(name, value)

        return gives

    def _ended(self, name: str, value: int) -> StageOutput:
        self.returned.append(name)
        return StageOutput.ok(value=value, large="x" * 70_000 if name == "first" else "")


VALUES = {"first": 1, "works": 2, "books": 3, "fails": 5, "adds": 10}


def assert_right(results: PipelineResults) -> None:
    """That what is in them is what the stages give."""
    for name, value in VALUES.items():
        if name in results:
            assert results[name].data["value"] == value, name
            assert results[name].data["large"] == ("x" * 70_000 if name == "first" else ""), name


def assert_whole(results: PipelineResults) -> None:
    """That the run has come to its end, and that all of it is right."""
    assert results.status is RunStatus.SUCCEEDED
    assert set(results) == {*VALUES, "nests"}
    assert_right(results)


def durable_ends(log: Log) -> set[str]:
    """The stages, also those within, that are known to have succeeded."""
    history = fold(log.entries)
    runs = [history, *(within for stage in history.stages.values() for within in stage.within.values())]
    return {
        name
        for run in runs
        for name, stage in run.stages.items()
        if stage.settled is not None and stage.settled.state is StageState.SUCCEEDED
    }


async def assert_recovered(path: Path, work: Work) -> None:
    """That a sound store has no value that is wrong, and that resuming goes on where the run was."""
    execute_if_there(path, "UPDATE stageflow_runs SET lease_until = 0")
    work.fails = False
    async with opened(path) as store:
        try:
            log = await store.read(RUN, tenant=None)
        except UnknownRunError:
            await work.graph.run(PipelineContext(run_id=RUN), store=store)
            return
        before = durable_ends(log)
        work.entered.clear()
        assert_whole(await work.graph.resume(RUN, store=store))
        assert not before & set(work.entered)
    assert execute(path, "SELECT * FROM bookings") == [(RUN,)]


def execute_if_there(path: Path, sql: str) -> None:
    try:
        execute(path, sql)
    except sqlite3.OperationalError:  # it has not come to that
        return


# Every operation fails


async def meet_faults(
    tmp_path: Path,
    inject: Inject,
    faults: Iterator[Faults],
    prepare: Callable[[Path], Awaitable[Work]],
    act: Callable[[Work, Store], Awaitable[object]],
    judge: Callable[[Work, Faults, CheckpointError | None], None],
) -> int:
    """Does something with a fault at every operation, until it gets through without; gives how many there were."""
    for number, fault in enumerate(faults):
        path = tmp_path / f"{number}-{FAULTS.index(fault.error)}-{fault.lasting}.db"
        execute(path, "CREATE TABLE bookings (run TEXT)")
        work = await prepare(path)
        inject(fault)
        error: CheckpointError | None = None
        with trio.fail_after(60):  # noqa: ASYNC912  # closing a store is one
            try:
                async with opened(path) as store:
                    await act(work, store)
            except CheckpointError as raised:
                error = raised
            except StageExecutionError as raised:
                work.raised.append(raised.original)
        inject(None)
        if not fault.met or not fault.met[0].startswith("INSERT INTO bookings"):  # which is the stage's own
            assert all(each is work.error for each in work.raised)
        judge(work, fault, error)
        await assert_recovered(path, work)
        if not fault.met:
            assert error is None
            return number
    raise AssertionError("faults have no end")


def judge_run(work: Work, fault: Faults, error: CheckpointError | None) -> None:
    """What holds of a run with a fault, whether or not a stage of it fails."""
    if error is None:  # it had no part in what was to be written
        harmless = "SET lease_until = 0", "INSERT INTO bookings"
        assert not fault.met or fault.late or any(each in fault.met[0] for each in harmless)
        return
    assert isinstance(error, StoreError)
    assert fault.error in str(error)
    if error.results is None:  # it has not begun
        assert work.entered == []
        return
    assert_right(error.results)
    finished = {name for name in work.returned if name not in ("deep", "books")}
    assert finished <= set(error.results)
    if "fails" in work.entered and work.fails:
        assert isinstance(error.__cause__, StageExecutionError)
        assert error.__cause__.original is work.error
        assert error.__cause__.stage == "fails"


async def start(work: Work, store: Store) -> object:
    return await work.graph.run(PipelineContext(run_id=RUN), store=store)


async def resume(work: Work, store: Store) -> object:
    return await work.graph.resume(RUN, store=store)


async def fresh(path: Path) -> Work:
    return Work()


async def fresh_and_failing(path: Path) -> Work:
    return Work(fails=True)


async def failed_before(path: Path) -> Work:
    work = Work(fails=True)
    async with opened(path) as store:
        with pytest.raises(StageExecutionError):
            await start(work, store)
    work.entered.clear()
    work.returned.clear()
    work.fails = False
    return work


@pytest.mark.parametrize("late", [False, True])
async def test_a_run_survives_a_fault_at_every_operation(tmp_path: Path, inject: Inject, late: bool) -> None:
    for faults in every_fault(late=late):
        assert await meet_faults(tmp_path, inject, faults, fresh, start, judge_run) > 30


async def test_a_fault_never_hides_what_a_stage_has_raised(tmp_path: Path, inject: Inject) -> None:
    for faults in every_fault():
        assert await meet_faults(tmp_path, inject, faults, fresh_and_failing, start, judge_run) > 30


async def test_resuming_survives_a_fault_at_every_operation(tmp_path: Path, inject: Inject) -> None:
    for faults in every_fault():
        assert await meet_faults(tmp_path, inject, faults, failed_before, resume, judge_run) > 20


async def test_looking_with_a_fault_gives_what_is_there_or_says_that_it_cannot(path: Path, inject: Inject) -> None:
    async with opened(path) as store:
        for number in range(3):
            lease = await store.create(NewRun(run_id=str(number), pipeline="p", tenant=None, began_at=1.0), Batch())
            batch = Batch(entries=[ENTRY], status=RunStatus.SUCCEEDED, states={("", "a"): ("succeeded", 1)})
            await store.append_nowait(lease, batch).wait()
            await store.release(lease)

    async def look(store: Store) -> object:
        logs = [await store.read(str(number), tenant=None) for number in range(3)]
        return logs, await store.runs(), await store.prune(older_than=0.0, dry_run=True)

    await trio.sleep(0.01)
    async with opened(path) as store:
        right = await look(store)
    said: set[bool] = set()
    for faults in every_fault():
        for fault in faults:
            inject(fault)
            try:
                async with opened(path) as store:
                    assert await look(store) == right
            except StoreError as error:
                said.add(fault.error in str(error))
            if not fault.met:
                break
    inject(None)
    assert said == {True}


ENTRY = Entry("", "a", "kind", "{}", "1")


async def test_removing_runs_with_a_fault_removes_all_of_them_or_none(tmp_path: Path, inject: Inject) -> None:
    said: set[bool] = set()
    for faults in every_fault():
        for number, fault in enumerate(faults):
            path = tmp_path / f"{number}-{FAULTS.index(fault.error)}-{fault.lasting}.db"
            async with opened(path) as store:
                for name in "ab":
                    lease = await store.create(
                        NewRun(run_id=name, pipeline="p", tenant=None, began_at=1.0), Batch(entries=[ENTRY])
                    )
                    await store.append_nowait(lease, Batch(status=RunStatus.SUCCEEDED)).wait()
                    await store.release(lease)
            await trio.sleep(0.01)
            inject(fault)
            removed = False
            try:
                async with opened(path) as store:
                    assert len(await store.prune(older_than=0.0)) == 2
                    removed = True
            except StoreError as error:
                said.add(fault.error in str(error))
            inject(None)
            async with opened(path) as store:
                left = [info.run_id for info in await store.runs()]
                assert left in (["b", "a"], [])
                assert not (removed and left)
                for name in left:
                    assert list((await store.read(name, tenant=None)).entries) == [ENTRY]
            if not fault.met:
                break
    assert said == {True}


# As SQLite does it itself


async def test_a_disk_that_is_full_is_told_of_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: set[str] = set()
    for pages in range(12, 60, 1 if FULL else 3):
        path = tmp_path / f"{pages}.db"
        execute(path, "CREATE TABLE bookings (run TEXT)")
        async with opened(path):
            pass
        work = Work()
        with monkeypatch.context() as patch:

            def connect_small(*args: Any, pages: int = pages, **options: Any) -> sqlite3.Connection:
                connection: sqlite3.Connection = connect(*args, **options)
                connection.execute(f"PRAGMA max_page_count = {pages}")
                return connection

            patch.setattr(sqlite3, "connect", connect_small)
            try:
                async with opened(path) as store:
                    await start(work, store)
                outcomes.add("")
            except StoreError as error:
                outcomes.add(str(error).partition("failed: ")[2])
        await assert_recovered(path, work)
    assert outcomes == {"", "database or disk is full"}


async def test_a_file_that_another_program_keeps_locked_is_told_of(path: Path) -> None:
    execute(path, "CREATE TABLE bookings (run TEXT)")
    work = Work()
    async with opened(path, patience=0.5) as store:
        with closing(connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match=r"database is locked|has not answered for 0.5 s"):
                await start(work, store)
            assert work.entered == []
            assert await store.runs() == []  # who only reads is not in its way
        await start(work, store)
    await assert_recovered(path, work)


async def test_a_lock_that_is_given_up_in_time_is_waited_for(path: Path) -> None:
    execute(path, "CREATE TABLE bookings (run TEXT)")
    work = Work()
    async with opened(path) as store, trio.open_nursery() as nursery:
        other = connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        nursery.start_soon(start, work, store)
        await trio.sleep(0.05)
        assert work.entered == []
        other.execute("COMMIT")
        other.close()
    await assert_recovered(path, work)


# A file that is damaged


@attrs.frozen
class Written:
    """Files of a store in which there is one run, and what is read of it."""

    place: Path
    log: Log
    database: bytes
    wal: bytes

    def put(self, database: bytes, wal: bytes | None = None) -> Path:
        """Writes files that are damaged, and gives where they are."""
        path = self.place / "damaged.db"
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(database)
        if wal is not None:
            path.with_name(path.name + "-wal").write_bytes(wal)
        return path


async def written(path: Path, *, fails: bool, closed: bool) -> Written:
    """Runs something, and takes the files while the store is open, as a killed process leaves them, or closed."""
    execute(path, "CREATE TABLE bookings (run TEXT)")
    copy = path.with_name("copy.db")
    wal = b""
    async with opened(path, lease=0.01) as store:  # so short that nobody has to wait for it to end
        try:
            await start(Work(fails=fails), store)
        except StageExecutionError:
            assert fails
        log = await store.read(RUN, tenant=None)
        if not closed:
            shutil.copy(path, copy)
            wal = read_bytes(path.with_name(path.name + "-wal"))
    if closed:
        shutil.copy(path, copy)
    return Written(path.parent, log, read_bytes(copy), wal)


def read_bytes(path: Path) -> bytes:
    return path.read_bytes()


def sample(count: int, most: int, seed: int) -> Sequence[int]:
    """Some of so many positions, always the same ones; all of them, if all are wanted."""
    return range(count) if FULL else sorted(random.Random(seed).sample(range(count), min(most, count)))


async def read_and_resume(path: Path, work: Work) -> Log | None:
    """Reads the run, and resumes it; `None` if it is not there any more.

    Raises:
        CheckpointError: Either could not be done. (Nothing else may be raised.)
    """
    with trio.fail_after(60):
        async with opened(path, patience=2.0) as store:
            try:
                log = await store.read(RUN, tenant=None)
            except UnknownRunError:
                return None
            before = durable_ends(log)
            assert_whole(await work.graph.resume(RUN, store=store))
            assert not before & set(work.entered)
    return log


async def test_a_torn_tail_leaves_a_beginning_of_the_run_that_can_be_resumed(path: Path) -> None:
    whole = await written(path, fails=True, closed=False)
    frames = range(32, len(whole.wal) + 1, 24 + 4096)  # that, and all of these whole, is its length
    lengths: set[int] = set()
    for cut in sorted({*frames, *sample(len(whole.wal), 20, 1)}):
        path = whole.put(whole.database, whole.wal[:cut])
        log = await read_and_resume(path, Work())
        if log is not None:
            lengths.add(len(log.entries))
            assert list(log.entries) == list(whole.log.entries[: len(log.entries)])
    assert frames[-1] == len(whole.wal)
    assert len(whole.log.entries) in lengths
    assert len(lengths) > 5


async def assert_noticed(path: Path, whole: Written) -> bool:
    """That what is read is what was written, or that it cannot be read; gives which."""
    try:
        log = await read_and_resume(path, Work())
    except CheckpointError:
        return False
    if log is None:
        return False
    assert list(log.entries) == list(whole.log.entries)
    assert dict(log.blobs) == dict(whole.log.blobs)
    # Not who had it in hand last, and when; nor the states of stages, which are there only to be listed.
    for name in ("run_id", "pipeline", "tenant", "status", "began_at", "base", "compensation"):
        assert getattr(log.info, name) == getattr(whole.log.info, name)
    return True


async def test_a_byte_that_flips_in_the_file_is_noticed_or_does_no_harm(path: Path) -> None:
    whole = await written(path, fails=True, closed=True)
    chance = random.Random(2)
    outcomes = [0, 0]
    for position in {*range(0, 100, 1 if FULL else 9), *sample(len(whole.database), 200, 2)}:
        damaged = bytearray(whole.database)
        damaged[position] ^= 1 << chance.randrange(8)
        outcomes[await assert_noticed(whole.put(bytes(damaged)), whole)] += 1
    assert all(outcomes)


async def test_a_byte_that_flips_in_the_log_of_the_file_leaves_a_beginning_of_the_run(path: Path) -> None:
    """SQLite takes what comes after damage in its log for what a crash has left unfinished."""
    whole = await written(path, fails=True, closed=False)
    chance = random.Random(3)
    for position in {*range(0, 56, 1 if FULL else 9), *sample(len(whole.wal), 80, 3)}:
        damaged = bytearray(whole.wal)
        damaged[position] ^= 1 << chance.randrange(8)
        log = await read_and_resume(whole.put(whole.database, bytes(damaged)), Work())
        if log is not None:
            assert list(log.entries) == list(whole.log.entries[: len(log.entries)])
