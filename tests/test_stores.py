"""Stores keep what they promise; the kit that tests it finds the ones that do not; and what is SQLite's own."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import AbstractAsyncContextManager, closing
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio

from stageflow import (
    Pipeline,
    PipelineContext,
    PipelineTerminated,
    Retry,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
)
from stageflow.errors import (
    CheckpointError,
    DefinitionError,
    LeaseLostError,
    RunExistsError,
    StoreError,
    UnknownRunError,
)
from stageflow.journal import RunStatus, database
from stageflow.journal.history import RunHistory, fold, scope_within
from stageflow.journal.memory import MemoryStore
from stageflow.journal.store import Batch, Entry, Lease, Log, NewRun, Receipt, RunInfo, Store, open_store
from stageflow.testing import EndLease, OpenAgain, StoreCheck, TakeoverCheck, store_checks, takeover_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from stageflow import PipelineResults, StageGraph
    from stageflow.stages import Body

SQL = "CREATE TABLE bookings (seat TEXT PRIMARY KEY, run TEXT)"


@attrs.frozen
class Storage:
    """Where the kit is let loose."""

    open_again: OpenAgain
    end_lease: EndLease


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, path: Path) -> Storage:
    return in_memory() if request.param == "memory" else in_file(path)


def in_memory(kind: Callable[[MemoryStore], AbstractAsyncContextManager[Store]] | None = None) -> Storage:
    """A storage in memory, of stores that are made of `MemoryStore` by this."""
    first = MemoryStore()

    def open_again() -> AbstractAsyncContextManager[Store]:
        again = MemoryStore(shared=first)
        return again if kind is None else kind(again)

    async def end_lease(run_id: str) -> None:
        kept_in(first)[run_id].until = 0.0

    return Storage(open_again, end_lease)


def in_file(path: Path) -> Storage:
    async def end_lease(run_id: str) -> None:
        execute(path, "UPDATE stageflow_runs SET lease_until = 0 WHERE run_id = ?", run_id)

    return Storage(lambda: opened(path), end_lease)


def opened(path: Path, *, read_only: bool = False) -> AbstractAsyncContextManager[Store]:
    return open_store(f"sqlite:{path}", read_only=read_only, patience=10.0)


def execute(path: Path, sql: str, *parameters: object) -> list[Any]:
    """What another program than stageflow does with the file."""
    with closing(sqlite3.connect(path, timeout=10.0)) as connection:
        rows = connection.execute(sql, parameters).fetchall()
        connection.commit()
        return rows


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def kept_in(store: MemoryStore) -> dict[str, Any]:
    return cast("dict[str, Any]", store._kept)  # pyright: ignore[reportPrivateUsage]


# The kit


@pytest.mark.parametrize("check", store_checks())
async def test_every_store_keeps_what_stores_promise(check: StoreCheck, storage: Storage) -> None:
    await check(storage.open_again)


@pytest.mark.parametrize("check", takeover_checks())
async def test_who_was_taken_over_cannot_harm_a_run_of_any_store(check: TakeoverCheck, storage: Storage) -> None:
    await check(storage.open_again, storage.end_lease)


def test_every_check_says_in_its_docstring_what_was_promised() -> None:
    for check in (*store_checks(), *takeover_checks()):
        assert check.__doc__
        assert check.__doc__.endswith(".")


class Faulty:
    """A store with one defect, in the classes after this one. This one has none."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner
        self.kept = kept_in(inner)

    async def __aenter__(self) -> Store:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.inner.__aexit__(None, None, None)  # noqa: ASYNC102

    @property
    def has_sql(self) -> bool:
        return self.inner.has_sql

    async def create(self, run: NewRun, batch: Batch) -> Lease:
        return await self.inner.create(run, batch)

    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        return await self.inner.acquire(run_id, tenant=tenant)

    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        return self.inner.append_nowait(lease, batch)

    async def release(self, lease: Lease) -> None:
        await self.inner.release(lease)

    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        return await self.inner.read(run_id, tenant=tenant)

    async def runs(self, *, tenant: str | None = None) -> Sequence[RunInfo]:
        return await self.inner.runs(tenant=tenant)

    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        return await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)

    async def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        return await self.inner.query(sql, parameters)


class ReadsBackwards(Faulty):
    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        log = await self.inner.read(run_id, tenant=tenant)
        return attrs.evolve(log, entries=log.entries[::-1])


class TakesNullForNothing(Faulty):
    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        log = await self.inner.read(run_id, tenant=tenant)
        return attrs.evolve(log, entries=[attrs.evolve(each, value=each.value or None) for each in log.entries])


class GivesBlobsToTheFirst(Faulty):
    async def create(self, run: NewRun, batch: Batch) -> Lease:
        there = {digest for kept in self.kept.values() for digest in kept.blobs}
        blobs = {digest: data for digest, data in batch.blobs.items() if digest not in there}
        return await self.inner.create(run, attrs.evolve(batch, blobs=blobs))


class WritesTheOthersFirst(Faulty):
    """Every other append is written with the next one, after it."""

    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        entries = self.kept[lease.run_id].entries
        receipt = self.inner.append_nowait(lease, batch)
        if len(entries) % 2 == 0:
            entries[-2:] = entries[-2:][::-1]
        return receipt


class WritesWhenWaitedFor(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        inner = self.inner

        class Late:
            error: Exception | None = None

            async def wait(self) -> None:
                await inner.append_nowait(lease, batch).wait()

        return Late()


class CanBeCancelled(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        receipt = self.inner.append_nowait(lease, batch)

        class Impatient:
            error = receipt.error

            async def wait(self) -> None:
                await trio.lowlevel.checkpoint()
                await receipt.wait()

        return Impatient()


class CreatesBeforeItIsCancelled(Faulty):
    async def create(self, run: NewRun, batch: Batch) -> Lease:
        with trio.CancelScope(shield=True):
            await self.inner.create(run, batch)
        await trio.lowlevel.checkpoint()
        return await self.inner.acquire(run.run_id, tenant=run.tenant)


class CreatesTwice(Faulty):
    async def create(self, run: NewRun, batch: Batch) -> Lease:
        self.kept.pop(run.run_id, None)
        return await self.inner.create(run, batch)


class KeepsBlobsOfTheRefused(Faulty):
    async def create(self, run: NewRun, batch: Batch) -> Lease:
        if run.run_id in self.kept:
            self.kept[run.run_id].blobs |= batch.blobs
        return await self.inner.create(run, batch)


class LooksBeforeItCreates(Faulty):
    async def create(self, run: NewRun, batch: Batch) -> Lease:
        there = run.run_id in self.kept
        await trio.sleep(0.01)
        if there:
            raise RunExistsError(run.run_id)
        while True:  # noqa: ASYNC913
            try:
                return await self.inner.create(run, batch)
            except RunExistsError:
                del self.kept[run.run_id]


class LeavesKeyErrors(Faulty):
    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        assert self.kept[run_id]
        return await self.inner.read(run_id, tenant=tenant)


class HasNoTenants(Faulty):
    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        return await self.inner.acquire(run_id, tenant=self.kept[run_id].run.tenant)


class PrunesForAll(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        owners = {kept.run.tenant for kept in self.kept.values()} if tenant is None else {tenant}
        gone = [await self.inner.prune(older_than=older_than, tenant=each, dry_run=dry_run) for each in owners]
        return [info for each in gone for info in each]


class ListsStatesOfAllScopes(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        states = {("", stage): state for (_, stage), state in batch.states.items()}
        return self.inner.append_nowait(lease, attrs.evolve(batch, states=states))


class TakesNoneForNothing(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        return self.inner.append_nowait(lease, attrs.evolve(batch, recoveries=batch.recoveries or None))


class ForgetsCompensation(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        return self.inner.append_nowait(lease, attrs.evolve(batch, compensation=None))


class ListsAsCreated(Faulty):
    async def runs(self, *, tenant: str | None = None) -> Sequence[RunInfo]:
        infos = {info.run_id: info for info in await self.inner.runs(tenant=tenant)}
        return [infos[run_id] for run_id in self.kept if run_id in infos]


class GivesWhatIsHeld(Faulty):
    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        if run_id in self.kept:
            self.kept[run_id].until = 0.0
        return await self.inner.acquire(run_id, tenant=tenant)


class LooksBeforeItTakes(Faulty):
    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        until = self.kept[run_id].until if run_id in self.kept else 0.0
        await trio.sleep(0.01)
        while True:  # noqa: ASYNC913
            try:
                return await self.inner.acquire(run_id, tenant=tenant)
            except LeaseLostError:
                if until:
                    raise
                self.kept[run_id].until = 0.0


class KeepsTheEpoch(Faulty):
    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        lease = await self.inner.acquire(run_id, tenant=tenant)
        self.kept[run_id].epoch = lease.epoch = 1
        return lease


class KeepsItsLeases(Faulty):
    async def __aexit__(self, *raised: object) -> None:
        await trio.lowlevel.checkpoint()  # noqa: ASYNC102


class StaysOpen(Faulty):
    async def __aexit__(self, *raised: object) -> None:
        for lease in tuple(self.inner._leases):  # pyright: ignore[reportPrivateUsage]
            await self.inner.release(lease)  # noqa: ASYNC102


class MeansIt(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        return await self.inner.prune(older_than=older_than, tenant=tenant)


class PrunesWhatWasCutOff(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        for kept in self.kept.values():
            kept.status = RunStatus.FAILED if kept.status is RunStatus.INTERRUPTED else kept.status
        return await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)


class PrunesWhatIsNotUndone(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        for kept in self.kept.values():
            kept.compensation = None
        return await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)


class PrunesTheYoung(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        return await self.inner.prune(older_than=0.0, tenant=tenant, dry_run=dry_run)


class LeavesRests(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        self.rests = {run_id: kept.blobs for run_id, kept in self.kept.items()}
        return await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)

    async def create(self, run: NewRun, batch: Batch) -> Lease:
        rests: dict[str, bytes] = getattr(self, "rests", {}).get(run.run_id, {})
        return await self.inner.create(run, attrs.evolve(batch, blobs={**batch.blobs, **rests}))


class ForgetsForks(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        for kept in self.kept.values():
            kept.run = attrs.evolve(kept.run, base=None)
        return await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)


class PrunesBlobsOfOthers(Faulty):
    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        infos = await self.inner.prune(older_than=older_than, tenant=tenant, dry_run=dry_run)
        for kept in self.kept.values():
            kept.blobs.clear()
        return infos


class SwallowsStatements(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        return self.inner.append_nowait(lease, attrs.evolve(batch, statements=()))


class LetsTimePass(Faulty):
    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        await trio.sleep(0.001)
        return await self.inner.read(run_id, tenant=tenant)


class LetsTimePassAtTheEnd(Faulty):
    async def __aexit__(self, *raised: object) -> None:
        await trio.sleep(0.001)  # noqa: ASYNC102
        await self.inner.__aexit__(None, None, None)  # noqa: ASYNC102


class NeverGivesUp(Faulty):
    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        raise LeaseLostError(run_id, holder=self.kept[run_id].holder)


class HasNoFence(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        self.kept[lease.run_id].epoch = lease.epoch
        return self.inner.append_nowait(lease, batch)


class TellsNobody(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        lease.on_lost = None
        return self.inner.append_nowait(lease, batch)


class TakesItUpAgain(Faulty):
    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        if not self.kept[lease.run_id].until:
            self.kept[lease.run_id].epoch = lease.epoch
        return self.inner.append_nowait(lease, batch)


class ReleasesWhatIsNotItsOwn(Faulty):
    async def release(self, lease: Lease) -> None:
        await self.inner.release(lease)
        self.kept[lease.run_id].until = 0.0


DEFECTS: dict[str, list[type[Faulty]]] = {
    "what_is_read_is_what_was_written": [ReadsBackwards, TakesNullForNothing],
    "large_values_come_back": [GivesBlobsToTheFirst],
    "appends_are_kept_in_order": [WritesTheOthersFirst],
    "what_came_before_something_durable_is_durable": [WritesWhenWaitedFor],
    "waiting_for_a_receipt_is_not_cancelled": [CanBeCancelled, CreatesBeforeItIsCancelled],
    "a_run_is_created_once": [CreatesTwice, KeepsBlobsOfTheRefused],
    "of_two_that_create_a_run_one_does": [LooksBeforeItCreates],
    "unknown_runs_are_told_of": [LeavesKeyErrors],
    "tenants_do_not_see_each_other": [HasNoTenants, PrunesForAll],
    "how_far_a_run_is_can_be_listed": [ListsStatesOfAllScopes, TakesNoneForNothing, ForgetsCompensation],
    "runs_are_listed_the_latest_first": [ListsAsCreated],
    "a_run_in_hand_is_not_given_to_another": [GivesWhatIsHeld],
    "of_two_that_take_a_run_one_does": [LooksBeforeItTakes],
    "a_run_given_out_of_hand_can_be_taken": [KeepsTheEpoch, ReleasesWhatIsNotItsOwn],
    "closing_a_store_releases_its_runs": [KeepsItsLeases],
    "a_closed_store_is_refused": [StaysOpen],
    "a_dry_run_removes_nothing": [MeansIt],
    "only_what_ended_of_its_own_is_removed": [PrunesWhatWasCutOff, PrunesWhatIsNotUndone, PrunesTheYoung],
    "what_is_removed_is_removed_as_a_whole": [LeavesRests],
    "what_others_need_is_not_removed": [ForgetsForks, PrunesBlobsOfOthers],
    "statements_take_effect_with_their_batch": [SwallowsStatements],
    "virtual_time_stands_still_meanwhile": [LetsTimePass, LetsTimePassAtTheEnd],
    "a_lease_that_has_ended_can_be_taken": [NeverGivesUp],
    "who_was_taken_over_writes_nothing": [HasNoFence, TellsNobody],
    "nothing_is_written_after_a_gap": [TakesItUpAgain],
    "who_was_taken_over_gives_nothing_away": [ReleasesWhatIsNotItsOwn],
}


async def find_fault(check: Callable[..., Any], kind: type[Faulty]) -> None:
    storage = in_memory(kind)
    await (check(storage.open_again, storage.end_lease) if check in takeover_checks() else check(storage.open_again))


@pytest.mark.parametrize("check", [*store_checks(), *takeover_checks()])
async def test_every_check_finds_a_store_that_breaks_its_promise(
    check: Callable[..., Any], autojump_clock: trio.testing.MockClock
) -> None:
    await find_fault(check, Faulty)
    for defect in DEFECTS[check.__name__]:
        with pytest.raises(AssertionError, match=r"\w+ \w+"):
            await find_fault(check, defect)


# Opening a store


@pytest.mark.parametrize(
    "url", ["", "sqlite:", "sqlite", "memory", "memory:x", "postgresql://x", "runs.db", ":memory:"]
)
def test_a_url_that_is_none_is_refused_with_what_there_is(url: str) -> None:
    with pytest.raises(DefinitionError, match=r'takes "sqlite:PATH" or "memory:", not '):
        open_store(url)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_lease_and_patience_are_seconds(seconds: float) -> None:
    for option in ("lease", "patience"):
        with pytest.raises(DefinitionError, match=option):
            open_store("memory:", **{option: seconds})  # type: ignore[arg-type]


async def test_a_fresh_file_is_a_store_of_this_version(path: Path) -> None:
    async with opened(path) as store:
        assert await store.runs() == []
    assert execute(path, "SELECT version FROM stageflow_version") == [(len(database.MIGRATIONS),)]


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    write(path, b"")
    async with opened(path) as store:
        await store.create(run("1"), Batch())


async def test_a_file_of_a_later_version_is_refused_with_what_to_do(path: Path) -> None:
    async with opened(path):
        pass
    execute(path, "UPDATE stageflow_version SET version = 99")
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"runs\.db is of version 99, and .* versions up to \d+; use a later one"):
            await anything(path, read_only=read_only)


@pytest.mark.parametrize("content", [b"no database, whatever it is called\n" * 1000, b"SQLite format 3\0"])
async def test_a_file_that_is_no_database_is_refused_and_stays_as_it_was(path: Path, content: bytes) -> None:
    write(path, content)
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"runs\.db cannot be opened"):
            await anything(path, read_only=read_only)
    assert content_of(path) == content


async def test_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere" / "runs.db", tmp_path):
        with pytest.raises(StoreError, match="cannot be opened"):
            await anything(place)


async def test_migrations_are_applied_once_and_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tuple(database.MIGRATIONS)
    async with opened(path) as store:
        await store.create(run("1"), Batch(entries=[entry(1)]))
    later = (*first, "CREATE TABLE stageflow_marks (mark TEXT)", "INSERT INTO stageflow_marks VALUES ('second')")
    monkeypatch.setattr(database, "MIGRATIONS", later)
    with pytest.raises(StoreError, match="open it once for writing"):
        await anything(path, read_only=True)
    for _ in range(2):
        async with opened(path) as store:
            assert await values(store, "1") == ["1"]
    assert execute(path, "SELECT * FROM stageflow_marks") == [("second",)]
    monkeypatch.setattr(database, "MIGRATIONS", (*later, "INSERT INTO stageflow_marks VALUES ('third')"))
    await anything(path)
    await anything(path, read_only=True)
    assert execute(path, "SELECT * FROM stageflow_marks") == [("second",), ("third",)]
    assert execute(path, "SELECT version FROM stageflow_version") == [(len(first) + 3,)]


async def test_a_migration_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await anything(path)
    with monkeypatch.context() as patch:
        later = (*database.MIGRATIONS, "CREATE TABLE stageflow_marks (mark TEXT); INSERT INTO nowhere VALUES (1)")
        patch.setattr(database, "MIGRATIONS", later)
        with pytest.raises(StoreError, match="cannot be opened: no such table: nowhere"):
            await anything(path)
    async with opened(path) as store:
        await store.create(run("1"), Batch())
    assert execute(path, "SELECT name FROM sqlite_master WHERE name = 'stageflow_marks'") == []


async def test_many_can_open_a_fresh_file_at_once(tmp_path: Path) -> None:
    for attempt in range(10):
        place = tmp_path / f"{attempt}.db"

        async def open_and_create(name: str, place: Path = place) -> None:
            async with opened(place) as store:
                await store.create(run(name), Batch(entries=[entry(1)]))

        async with trio.open_nursery() as nursery:
            for name in "abcd":
                nursery.start_soon(open_and_create, name)
        async with opened(place) as store:
            assert {info.run_id for info in await store.runs()} == set("abcd")


CREATE = """
import sys, time, trio
from stageflow.journal.store import Batch, NewRun, open_store

async def main():
    async with open_store("sqlite:" + sys.argv[1], patience=10.0) as store:
        await store.create(NewRun(run_id=sys.argv[2], pipeline="p", tenant=None, began_at=1.0), Batch())

print(flush=True)
sys.stdin.readline()  # until all are ready
trio.run(main)
"""


def test_processes_can_open_a_fresh_file_at_once(tmp_path: Path) -> None:
    async def names(path: Path) -> set[str]:
        async with opened(path) as store:
            return {info.run_id for info in await store.runs()}

    for attempt in range(3):
        path = tmp_path / f"{attempt}.db"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CREATE, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for name in "ab"
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            with process:
                assert process.wait() == 0
        assert trio.run(names, path) == set("ab")


# Looking


async def test_who_only_looks_sees_what_another_has_written_meanwhile(path: Path) -> None:
    async with opened(path) as store:
        lease = await store.create(run("1"), Batch(entries=[entry(1)]))
        async with opened(path, read_only=True) as looker:
            assert await values(looker, "1") == ["1"]
            for number in range(2, 20):
                await store.append_nowait(lease, Batch(entries=[entry(number)])).wait()
                assert len(await values(looker, "1")) == number
                assert (await looker.runs())[0].held
    async with opened(path, read_only=True) as looker:  # also when nobody writes
        assert len(await values(looker, "1")) == 19


async def test_who_only_looks_cannot_write(path: Path) -> None:
    async with opened(path) as store:
        await store.release(await store.create(run("1"), Batch(entries=[entry(1)])))
        async with opened(path, read_only=True) as looker:
            for doing in (looker.acquire("1", tenant=None), looker.create(run("2"), Batch())):
                with pytest.raises(StoreError, match="readonly"):
                    await doing
            assert await values(looker, "1") == ["1"]


async def test_looking_at_a_file_that_is_not_there_does_not_make_it(path: Path) -> None:
    with pytest.raises(StoreError, match=r"runs\.db cannot be opened: unable to open"):
        await anything(path, read_only=True)
    assert content_of(path) is None


async def test_looking_at_a_database_that_is_no_store_leaves_it_alone(path: Path) -> None:
    execute(path, "CREATE TABLE mine (x)")
    before = content_of(path)
    with pytest.raises(StoreError, match="is of an older version, or none; open it once for writing"):
        await anything(path, read_only=True)
    assert content_of(path) == before


# The file


async def test_tables_of_the_user_in_the_same_file_stay_untouched(path: Path) -> None:
    execute(path, "CREATE TABLE mine (id INTEGER PRIMARY KEY, what TEXT)")
    execute(path, "CREATE INDEX mine_what ON mine (what)")
    execute(path, "INSERT INTO mine VALUES (1, 'a'), (2, 'b')")
    schema = execute(path, "SELECT sql FROM sqlite_master WHERE tbl_name = 'mine'")
    async with opened(path) as store:
        lease = await store.create(run("1"), Batch(entries=[entry(1)]))
        execute(path, "INSERT INTO mine VALUES (3, 'c')")
        await store.append_nowait(lease, Batch(status=RunStatus.SUCCEEDED)).wait()
        await store.release(lease)
        await trio.sleep(0.01)
        assert await store.prune(older_than=0.0)
        assert await store.query("SELECT what FROM mine ORDER BY id") == [("a",), ("b",), ("c",)]
    assert execute(path, "SELECT * FROM mine") == [(1, "a"), (2, "b"), (3, "c")]
    assert execute(path, "SELECT sql FROM sqlite_master WHERE tbl_name = 'mine'") == schema


async def test_the_same_large_value_is_kept_once(path: Path) -> None:
    async with opened(path) as store:
        leases = [await store.create(run(name), Batch(blobs={DIGEST: b"large"})) for name in "abc"]
        for lease in leases:
            await store.append_nowait(lease, Batch(blobs={DIGEST: b"large"}, status=RunStatus.SUCCEEDED)).wait()
        for lease in leases[:2]:
            await store.release(lease)
        assert execute(path, "SELECT count(*) FROM stageflow_blobs") == [(1,)]
        await trio.sleep(0.01)
        assert len(await store.prune(older_than=0.0)) == 2
        assert execute(path, "SELECT count(*) FROM stageflow_blobs") == [(1,)]
        await store.release(leases[2])
        await trio.sleep(0.01)
        assert len(await store.prune(older_than=0.0)) == 1
    for table in ("runs", "events", "stages", "blobs", "blob_refs"):
        assert execute(path, f"SELECT count(*) FROM stageflow_{table}") == [(0,)], table


async def test_what_cannot_be_text_fails_the_append_and_not_the_store(path: Path) -> None:
    async with opened(path) as store:
        lease = await store.create(run("1"), Batch(entries=[entry(1)]))
        other = await store.create(run("2"), Batch())
        with pytest.raises(StoreError):
            await store.append_nowait(lease, Batch(entries=[Entry("", "\ud800", "kind", "{}")])).wait()
        with pytest.raises(StoreError):  # nothing after a gap
            await store.append_nowait(lease, Batch(entries=[entry(2)])).wait()
        await store.append_nowait(other, Batch(entries=[entry(3)])).wait()
        assert await values(store, "1") == ["1"]
        assert await values(store, "2") == ["3"]


async def test_a_call_that_was_given_up_leaves_no_run_in_hand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire, given_up = database.Database.acquire, threading.Event()

    def slowly(self: database.Database, run_id: str, tenant: str | None) -> Lease:
        lease = acquire(self, run_id, tenant)
        given_up.wait(60)
        return lease

    async with opened(path) as other:
        await other.release(await other.create(run("1"), Batch()))
        monkeypatch.setattr(database.Database, "acquire", slowly)
        async with open_store(f"sqlite:{path}", patience=0.5) as store:
            with pytest.raises(StoreError, match=r"has not answered for 0\.5 s"):
                await store.acquire("1", tenant=None)
            with pytest.raises(StoreError, match=r"has not answered for 0\.5 s"):
                await store.create(run("2"), Batch())
            monkeypatch.undo()
            given_up.set()
            with trio.fail_after(60):
                while (await other.runs())[0].held:  # noqa: ASYNC110  # of a thread, which tells nobody
                    await trio.sleep(0.01)
            assert [info.run_id for info in await other.runs()] == ["1"]
            await other.acquire("1", tenant=None)


# Damage


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE stageflow_runs SET run_id = 'q'",
        "UPDATE stageflow_runs SET pipeline = 'q'",
        "UPDATE stageflow_runs SET tenant = 'q'",
        "UPDATE stageflow_runs SET began_at = began_at + 1",
        "UPDATE stageflow_runs SET began_at = 1e300",
        "UPDATE stageflow_runs SET base = 'q'",
        "UPDATE stageflow_runs SET status = 'gone'",
        "UPDATE stageflow_runs SET last_seq = last_seq + 1",
        "UPDATE stageflow_runs SET changed_at = 1e300",
        "UPDATE stageflow_runs SET checksum = checksum + 1",
        "UPDATE stageflow_events SET seq = 9 WHERE seq = 2",
        "UPDATE stageflow_events SET stage = 'q' WHERE seq = 2",
        "UPDATE stageflow_events SET stage = NULL WHERE seq = 2",
        "UPDATE stageflow_events SET body = '[]' WHERE seq = 2",
        "UPDATE stageflow_events SET body = x'ff' WHERE seq = 2",
        "UPDATE stageflow_events SET body = CAST(x'ff' AS TEXT) WHERE seq = 2",
        "UPDATE stageflow_events SET value = 2 WHERE seq = 2",
        "UPDATE stageflow_events SET checksum = 'q' WHERE seq = 2",
        "DELETE FROM stageflow_events WHERE seq = 1",
        "DELETE FROM stageflow_events WHERE seq = 3",
        "DELETE FROM stageflow_events",
        "DELETE FROM stageflow_blobs",
        "DELETE FROM stageflow_blob_refs",
        "UPDATE stageflow_blob_refs SET digest = 'q'",
        "UPDATE stageflow_blobs SET data = x''",
        "UPDATE stageflow_blobs SET data = 'large'",
        "UPDATE stageflow_stages SET state = 'gone'",
        "DROP TABLE stageflow_events",
        "ALTER TABLE stageflow_runs RENAME COLUMN base TO basis",
    ],
)
async def test_what_was_changed_behind_its_back_is_not_read(path: Path, sql: str) -> None:
    async with opened(path) as store:
        states = {("", "s"): (StageState.SUCCEEDED.value, 1)}
        batch = Batch(entries=[entry(number) for number in range(3)], blobs={DIGEST: b"large"}, states=states)
        await store.release(await store.create(run("1"), batch))
        assert await values(store, "1") == ["0", "1", "2"]
        execute(path, sql)
        with pytest.raises((StoreError, UnknownRunError) if "run_id" in sql else StoreError):
            await store.read("1", tenant=None)
        if "TABLE" not in sql:
            await store.create(run("2"), Batch())  # the store goes on


# Transactions of stages


def books(*seats: str, then: Callable[[StageContext], object] | None = None) -> Body:
    async def body(ctx: StageContext) -> object:
        for seat in seats:
            ctx.transaction().execute("INSERT INTO bookings VALUES (?, ?)", (seat, ctx.run_id))
        return StageOutput.ok(booked=len(seats)) if then is None else then(ctx)

    return body


def says(sql: str, parameters: Any = ()) -> Body:
    async def body(ctx: StageContext) -> None:
        ctx.transaction().execute(sql, parameters)

    return body


def alone(body: Body, **options: Any) -> StageGraph:
    return Pipeline("p").with_stage("book", body, **options).build()


async def test_rows_and_the_end_of_their_attempt_are_one_commit(path: Path) -> None:
    execute(path, SQL)
    seen: list[tuple[int, int]] = []

    async def looks(ctx: StageContext) -> None:
        rows = execute(path, "SELECT count(*) FROM bookings")[0][0]
        ends = execute(path, "SELECT count(*) FROM stageflow_events WHERE kind = 'stage_settled' AND stage = 'book'")
        seen.append((rows, ends[0][0]))

    async def books_late(ctx: StageContext) -> None:
        ctx.transaction().execute("INSERT INTO bookings VALUES ('1', 'x')")
        await looks(ctx)

    graph = Pipeline("p").with_stage("book", books_late).with_stage("look", looks, after="book").build()
    async with opened(path) as store:
        results = await graph.run(store=store)
    assert results.status is RunStatus.SUCCEEDED
    assert seen == [(0, 0), (1, 1)]


async def test_sql_that_fails_fails_its_stage_and_nothing_of_it_is_there(path: Path) -> None:
    execute(path, SQL)
    execute(path, "INSERT INTO bookings VALUES ('taken', 'before')")
    async with opened(path) as store:
        with pytest.raises(StageExecutionError) as caught:
            await alone(books("free", "taken")).run(store=store)
        assert isinstance(caught.value.original, sqlite3.IntegrityError)
        assert execute(path, "SELECT seat FROM bookings") == [("taken",)]
        history = fold((await store.read(str(caught.value.run_id), tenant=None)).entries)
        ended = history.stages["book"].settled
        assert ended is not None
        assert ended.state is StageState.FAILED
        execute(path, "DELETE FROM bookings")
        results = await alone(books("free", "taken")).resume(str(caught.value.run_id), store=store)
        assert results["book"].data == {"booked": 2}
    assert execute(path, "SELECT seat FROM bookings ORDER BY seat") == [("free",), ("taken",)]


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        ("DELETE FROM stageflow_events", ()),
        ("UPDATE stageflow_runs SET epoch = 99", ()),
        ("INSERT INTO bookings SELECT body, kind FROM stageflow_events", ()),
        ("DROP TABLE stageflow_stages", ()),
        ("CREATE TABLE stageflow_mine (x)", ()),
        ("CREATE TABLE STAGEFLOW_mine (x)", ()),
        ("DELETE FROM STAGEFLOW_events", ()),
        ("CREATE TRIGGER t AFTER INSERT ON stageflow_events BEGIN DELETE FROM bookings; END", ()),
        ("CREATE INDEX i ON stageflow_events (body)", ()),
        ("ALTER TABLE stageflow_events RENAME TO mine", ()),
        ("INSERT INTO bookings SELECT kind, body FROM peeks", ()),
        ("COMMIT", ()),
        ("ROLLBACK", ()),
        ("BEGIN", ()),
        ("SAVEPOINT mine", ()),
        ("RELEASE stageflow_user", ()),
        ("ROLLBACK TO stageflow_user", ()),
        ("PRAGMA synchronous = OFF", ()),
        ("PRAGMA journal_mode = DELETE", ()),
        ("ATTACH ':memory:' AS other", ()),
        ("VACUUM", ()),
        ("INSERT INTO bookings VALUES ('a', 'b'); COMMIT", ()),
        ("INSERT INTO nowhere VALUES (1)", ()),
        ("no SQL", ()),
        ("", (1,)),
        ("INSERT INTO bookings VALUES (?, ?)", ("a",)),
        ("INSERT INTO bookings VALUES (?, ?)", ("a", object())),
        ("INSERT INTO bookings VALUES (?, ?)", ("a", 2**64)),
        ("INSERT INTO bookings VALUES (?, ?)", ("a", "\ud800")),
        ("INSERT INTO bookings VALUES (?, ?)", 5),
        ("INSERT INTO bookings VALUES (:seat, :run)", {"seat": "a"}),
        ("INSERT INTO bookings VALUES ('\0', 'b')", ()),
        (5, ()),
    ],
)
async def test_sql_that_may_not_be_fails_its_stage_and_does_no_harm(path: Path, sql: Any, parameters: Any) -> None:
    execute(path, SQL)
    await anything(path)
    execute(path, "CREATE VIEW peeks AS SELECT * FROM stageflow_events")
    graph = Pipeline("p").with_stage("first", books("1")).with_stage("book", says(sql, parameters), after="first")
    async with opened(path) as store:
        with pytest.raises(StageExecutionError) as caught:
            await graph.build().run(store=store)
        assert caught.value.stage == "book"
        assert isinstance(caught.value.original, Exception)
        assert not isinstance(caught.value.original, CheckpointError)
        assert execute(path, "SELECT seat FROM bookings") == [("1",)]
        # And the store goes on.
        await alone(books("2")).run(store=store)
        log = await store.read(str(caught.value.run_id), tenant=None)
        assert log.info.status is RunStatus.FAILED
        assert dict(log.info.stages) == {"succeeded": 1, "failed": 1}
    assert execute(path, "SELECT seat FROM bookings") == [("1",), ("2",)]
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    names = {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {f"stageflow_{name}" for name in ("runs", "events", "stages", "blobs", "blob_refs", "version")} | {
        "bookings"
    }


async def test_a_retried_stage_writes_its_rows_once(path: Path) -> None:
    execute(path, SQL)

    def fails_twice(ctx: StageContext) -> StageOutput:
        ctx.transaction().execute("INSERT INTO bookings VALUES ('again', ?)", (str(ctx.attempt),))
        if ctx.attempt < 3:
            raise OSError("not yet")
        return StageOutput.ok()

    async with opened(path) as store:
        results = await alone(books("1", then=fails_twice), retry=Retry(attempts=5)).run(store=store)
    assert results.records["book"].attempts == 3
    assert execute(path, "SELECT * FROM bookings WHERE seat = 'again'") == [("again", "3")]
    assert execute(path, "SELECT count(*) FROM bookings") == [(2,)]


async def test_a_stage_whose_sql_failed_is_tried_again(path: Path) -> None:
    execute(path, SQL)
    execute(path, "INSERT INTO bookings VALUES ('1', 'before')")

    async def books_the_next(ctx: StageContext) -> None:
        ctx.transaction().execute("INSERT INTO bookings VALUES (?, ?)", (str(ctx.attempt), ctx.run_id))

    async with opened(path) as store:
        results = await alone(books_the_next, retry=Retry(attempts=5)).run(PipelineContext(run_id="r"), store=store)
    assert results.records["book"].attempts == 2
    assert execute(path, "SELECT * FROM bookings ORDER BY seat") == [("1", "before"), ("2", "r")]


async def test_sql_that_takes_its_transaction_back_fails_its_stage_alone(path: Path) -> None:
    execute(path, "CREATE TABLE bookings (seat TEXT PRIMARY KEY, run TEXT)")
    execute(path, "INSERT INTO bookings VALUES ('taken', 'before')")
    async with opened(path) as store:
        lease = await store.create(run("1"), Batch())
        other = await store.create(run("2"), Batch())
        statements = [(f"INSERT {how}INTO bookings VALUES (?, 'x')", (seat,)) for how, seat in BOOKINGS]
        receipts = [
            store.append_nowait(other, Batch(entries=[entry(1)])),
            store.append_nowait(lease, Batch(entries=[entry(2)])),
            store.append_nowait(lease, Batch(entries=[entry(3)], statements=statements)),
            store.append_nowait(lease, Batch(entries=[entry(4)])),
        ]
        with pytest.raises(sqlite3.IntegrityError):
            await receipts.pop(2).wait()
        for receipt in receipts:
            await receipt.wait()
        assert await values(store, "1") == ["2", "4"]
        assert await values(store, "2") == ["1"]
    assert execute(path, "SELECT seat FROM bookings") == [("taken",)]


BOOKINGS = [("", "free"), ("OR ROLLBACK ", "taken"), ("", "another")]


@pytest.mark.parametrize("how", ["fail", "raise", "skip", "cancel"])
async def test_a_stage_that_does_not_succeed_writes_no_rows(path: Path, how: str) -> None:
    execute(path, SQL)

    def ends(ctx: StageContext) -> StageOutput:
        if how == "raise":
            raise ValueError("no")
        if how == "fail":
            return StageOutput.fail(ValueError("no"))
        return StageOutput.skip("no need") if how == "skip" else StageOutput.cancel("enough")

    async with opened(path) as store:
        try:
            await alone(books("1", then=ends)).run(store=store)
        except PipelineTerminated:
            assert how != "skip"
        assert execute(path, "SELECT count(*) FROM bookings") == [(0,)]
        await alone(books("2")).run(store=store)
    assert execute(path, "SELECT seat FROM bookings") == [("2",)]


async def test_a_stage_can_read_what_is_there(path: Path) -> None:
    execute(path, SQL)
    execute(path, "INSERT INTO bookings VALUES ('1', 'a'), ('2', 'b')")

    async def counts(ctx: StageContext) -> StageOutput:
        transaction = ctx.transaction()
        transaction.execute("INSERT INTO bookings VALUES ('3', 'c')")
        rows = await transaction.query("SELECT seat FROM bookings WHERE run < ? ORDER BY seat", ("c",))
        return StageOutput.ok(rows=rows)

    async with opened(path) as store:
        results = await alone(counts).run(store=store)
    assert results["book"].data["rows"] == [("1",), ("2",)]
    assert execute(path, "SELECT count(*) FROM bookings") == [(3,)]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO bookings VALUES ('1', 'a')",
        "SELECT * FROM stageflow_events",
        "SELECT * FROM STAGEFLOW_events",
        "DELETE FROM bookings",
        "PRAGMA journal_mode = DELETE",
        "ATTACH ':memory:' AS other",
        "COMMIT",
        "SELECT 1; SELECT 2",
        "SELECT ?",
        "no SQL",
    ],
)
async def test_a_query_only_reads_and_not_what_is_stageflows(path: Path, sql: str) -> None:
    execute(path, SQL)
    async with opened(path) as store:
        with pytest.raises(StoreError):
            await store.query(sql)
        await store.create(run("1"), Batch())
        assert await store.query("SELECT count(*) FROM bookings") == [(0,)]


async def test_a_store_in_memory_has_no_transactions() -> None:
    async with open_store("memory:") as store:
        with pytest.raises(StageExecutionError, match=r"needs a run with a store that has SQL: .*sqlite:PATH"):
            await alone(books("1")).run(store=store)


async def test_without_a_store_there_are_no_transactions() -> None:
    with pytest.raises(StageExecutionError, match="needs a run with a store that has SQL"):
        await alone(books("1")).run()


async def test_sql_that_fails_takes_nothing_of_other_stages_with_it(path: Path) -> None:
    """What is kept back until something else is written must not be lost with the SQL of a stage."""
    execute(path, SQL)
    entered: list[str] = []
    began, failed = trio.Event(), trio.Event()

    async def inner(ctx: StageContext) -> StageOutput:
        entered.append("inner")
        began.set()
        await failed.wait()
        return StageOutput.ok(done=True)

    async def last(ctx: StageContext) -> None:
        entered.append("last")
        if entered.count("last") == 1:
            raise ValueError("once")

    child = Pipeline("child").with_stage("inner", inner).with_stage("last", last, after="inner").build()

    async def fails(ctx: StageContext) -> None:
        await began.wait()
        if ctx.attempt > 1:
            failed.set()
            return
        ctx.transaction().execute("INSERT INTO nowhere VALUES (1)")

    graph = Pipeline("p").with_stage("nests", child).with_stage("fails", fails, retry=Retry(attempts=3)).build()
    async with opened(path) as store:
        with pytest.raises(StageExecutionError) as caught:
            await graph.run(store=store)
        results = await graph.resume(str(caught.value.run_id), store=store)
    assert results.status is RunStatus.SUCCEEDED
    assert entered == ["inner", "last", "last"]


# The projection


def random_pipeline(chance: random.Random, moods: dict[str, str], name: str = "p", *, nests: bool = True) -> Pipeline:
    """A pipeline whose stages do what is said of them in `moods`, under their names."""

    def body_of(key: str) -> Body:
        async def body(ctx: StageContext) -> StageOutput:
            await trio.sleep(len(key) % 3)
            mood = moods.get(key, "ok")
            if mood == "fail" or (mood == "once" and ctx.attempt == 1):
                raise ValueError(key)
            if mood == "skip":
                return StageOutput.skip("no need")
            if mood == "cancel_branch":
                return StageOutput.cancel_branch("enough")
            return StageOutput.ok(by=key)

        return body

    pipeline = Pipeline(name, on_failure=chance.choice(["fail_fast", "drain", "isolate"]))
    for number in range(chance.randint(2, 6)):
        stage, key = f"s{number}", f"{name}.{number}"
        moods[key] = chance.choice(["ok", "ok", "ok", "fail", "once", "skip", "cancel_branch"])
        after = [f"s{other}" for other in range(number) if chance.random() < 0.4]
        options: dict[str, Any] = {"after": after, "retry": chance.choice([None, Retry(attempts=3)])}
        if nests and chance.random() < 0.3:
            inner = random_pipeline(chance, moods, key, nests=False)
            pipeline = pipeline.with_stage(stage, inner.build(), after=after)
        else:
            if chance.random() < 0.5:
                options["kind"] = "work"
            pipeline = pipeline.with_stage(stage, body_of(key), **options)
    return pipeline


def states_of(history: RunHistory, scope: str = "") -> dict[tuple[str, str], tuple[str, int]]:
    """What the projection is to say, from the events."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for name, stage in history.stages.items():
        if stage.settled is not None:
            found[scope, name] = stage.settled.state.value, stage.settled.attempts
        elif stage.recorded:
            found[scope, name] = "running", stage.attempts
        for place, within in stage.within.items():
            found |= states_of(within, scope_within(scope, name, place))
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_the_table_of_stages_says_what_the_events_say(
    path: Path, seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    chance = random.Random(seed)
    moods: dict[str, str] = {}
    graph = random_pipeline(chance, moods).build()

    async def compare(store: Store) -> None:
        log = await store.read("r", tenant=None)
        rows = execute(path, "SELECT scope, stage, state, attempts FROM stageflow_stages")
        found = {(scope, stage): (state, attempts) for scope, stage, state, attempts in rows}
        wanted = states_of(fold(log.entries))
        assert {key: found.get(key) for key in wanted} == wanted
        assert {key for key in found if not key[0]} == {key for key in wanted if not key[0]}
        counts = dict[str, int]()
        for (scope, _), (state, _) in wanted.items():
            if not scope:
                counts[state] = counts.get(state, 0) + 1
        assert dict(log.info.stages) == counts

    async def go(doing: Callable[[], Any]) -> PipelineResults | None:
        with trio.move_on_after(chance.choice([0.5, 100])):  # noqa: ASYNC912
            try:
                return cast("PipelineResults", await doing())
            except PipelineTerminated as error:
                return error.results
        return None

    async with opened(path) as store:
        await go(lambda: graph.run(PipelineContext(run_id="r"), store=store))
        await compare(store)
        for _ in range(2):
            moods.update((key, "ok") for key in tuple(moods) if chance.random() < 0.5)
            await go(lambda: graph.resume("r", store=store))
            await compare(store)


# In short

DIGEST = hashlib.sha256(b"large").hexdigest()


def run(run_id: str) -> NewRun:
    return NewRun(run_id=run_id, pipeline="p", tenant=None, began_at=1.0)


def entry(number: int) -> Entry:
    return Entry("", "s", "kind", "{}", str(number))


async def values(store: Store, run_id: str) -> list[str | None]:
    return [each.value for each in (await store.read(run_id, tenant=None)).entries]


async def anything(path: Path, *, read_only: bool = False) -> None:
    """Opens a store, and closes it."""
    async with opened(path, read_only=read_only) as store:
        with pytest.raises(UnknownRunError):
            await store.read("nothing", tenant=None)
