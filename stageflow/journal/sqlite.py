"""The store on SQLite: one file, one thread that writes, and one transaction for all that has come together meanwhile.

The thread owns the connection. What is to be written is put into its queue, and it takes out all there is: so when a
thousand stages end at once, they share a commit, and a commit is what costs. (A worker thread for each write would cost
more than the write.) The file is in WAL mode with ``synchronous=FULL``: a commit is on the disk when it returns, and
who only looks is never in the way.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, final

import trio

from stageflow.errors import LeaseLostError, StageflowError, StoreError
from stageflow.journal.database import Database
from stageflow.journal.stillness import stillness
from stageflow.journal.store import Lease

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

    from stageflow.journal.store import Batch, Log, NewRun, RunInfo

__all__ = ["SQLiteStore"]

T = TypeVar("T")
_TOGETHER: Final = 10_000  # entries that share a transaction at most


def _not_yet(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


@final
class _Append:
    """One append on its way, which is the receipt for it."""

    __slots__ = ("_tasks", "_waited_for", "batch", "error", "finished", "lease")

    def __init__(self, lease: Lease, batch: Batch, waited_for: set[_Append]) -> None:
        self.lease: Lease = lease
        self.batch: Batch = batch
        self.error: Exception | None = None
        self.finished: bool = False
        self._waited_for = waited_for
        self._tasks: list[trio.lowlevel.Task] = []

    def finish(self) -> None:
        """Tells who waits, in Trio's thread."""
        self.finished = True
        if self._tasks:
            self._waited_for.discard(self)
            for task in self._tasks:
                trio.lowlevel.reschedule(task)
            self._tasks.clear()

    async def wait(self) -> None:  # noqa: ASYNC910  # at once, if it is written
        """Waits until it is durable.

        A shielded scope with a deadline would do the same for the price of a tenth of a commit. Here the store as a
        whole sees to it that nobody waits for ever (`SQLiteStore._watch`).
        """
        if not self.finished:
            self._tasks.append(trio.lowlevel.current_task())
            self._waited_for.add(self)
            await trio.lowlevel.wait_task_rescheduled(_not_yet)
        if self.error is not None:
            raise self.error


@final
class _Call:
    """Something else for the thread to do."""

    __slots__ = ("abandoned", "done", "error", "function", "result")

    def __init__(self, function: Callable[[Database], Any]) -> None:
        self.function = function
        self.done = trio.Event()
        self.abandoned = False  # whether nobody waits for it any more
        self.result: Any = None
        self.error: Exception | None = None

    def finish(self) -> None:
        """Tells who waits, in Trio's thread."""
        self.done.set()


def _release(lease: Lease, database: Database) -> None:
    database.release(lease)


@final
class _Idle:
    """Stands for that nothing was to be done for a while."""


@final
class SQLiteStore:
    """A store in a file of SQLite. `open_store` opens it."""

    def __init__(self, path: Path, patience: float) -> None:
        self._path = path
        self._patience = patience
        self._queue: queue.SimpleQueue[_Append | _Call | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._opened = trio.Event()
        self._ended = trio.Event()
        self._failure: Exception | None = None  # why it could not be opened
        self._closed = False
        self._pending = 0  # how many have been put into the queue and not been answered
        self._since = 0.0  # since when nothing has been answered although there was something
        self._waited_for: set[_Append] = set()
        self._watching = trio.CancelScope()
        self._still = stillness()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path, *, read_only: bool, lease: float, patience: float
    ) -> AsyncGenerator[SQLiteStore, None]:
        """Opens a file, and makes it if it is not there."""
        store = cls(path, patience)
        threading.Thread(
            target=store._work, args=(read_only, lease), name=f"stageflow store {path}", daemon=True
        ).start()
        try:
            store._still.begin()
            try:
                await store._wait(store._opened)
            finally:
                store._still.end()
            if store._failure is not None:
                raise store._failure
            trio.lowlevel.spawn_system_task(store._watch)
            yield store
        finally:
            store._watching.cancel()
            store._closed = True
            store._queue.put(None)
            store._still.begin()
            try:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + patience):
                    await store._ended.wait()
            finally:
                store._still.end()

    # What a store does

    @property
    def has_sql(self) -> bool:
        """See `Store.has_sql`."""
        return True

    async def create(self, run: NewRun, batch: Batch) -> Lease:
        """See `Store.create`."""
        return await self._call(lambda database: database.create(run, batch))

    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        """See `Store.acquire`."""
        return await self._call(lambda database: database.acquire(run_id, tenant))

    def append_nowait(self, lease: Lease, batch: Batch) -> _Append:
        """See `Store.append_nowait`."""
        append = _Append(lease, batch, self._waited_for)
        if self._closed:
            append.error = StoreError("the store is closed", run_id=lease.run_id)
            append.finish()
        else:
            self._put(append)
        return append

    async def release(self, lease: Lease) -> None:
        """See `Store.release`."""
        await self._call(lambda database: database.release(lease))

    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        """See `Store.read`."""
        return await self._call(lambda database: database.read(run_id, tenant))

    async def runs(self, *, tenant: str | None = None) -> Sequence[RunInfo]:
        """See `Store.runs`."""
        return await self._call(lambda database: database.runs(tenant))

    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        """See `Store.prune`."""
        return await self._call(lambda database: database.prune(older_than, tenant, dry_run=dry_run))

    async def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """See `Store.query`."""
        return await self._call(lambda database: database.query(sql, parameters))

    # Between Trio and the thread

    def _put(self, job: _Append | _Call) -> None:
        if not self._pending:
            self._still.begin()
            self._since = trio.current_time()
        self._pending += 1
        self._queue.put(job)

    async def _call(self, function: Callable[[Database], T]) -> T:
        """Has the thread do something. That is not cancelled, and neither is the wait."""
        if self._closed:
            raise StoreError("the store is closed")
        call = _Call(function)
        self._put(call)
        try:
            await self._wait(call.done)
        finally:
            call.abandoned = not call.done.is_set()
        if call.error is not None:
            raise call.error
        return cast("T", call.result)

    async def _wait(self, event: trio.Event) -> None:
        """Waits for the thread, shielded, for as long as there is patience."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._patience):
            await event.wait()
        if not event.is_set():
            raise StoreError(f"the store {self._path} has not answered for {self._patience:g} s")

    async def _watch(self) -> None:
        """Sees to it that nobody waits for a thread that does not come back, for longer than there is patience."""
        with self._watching:
            while not self._still.jumps:  # such a clock stands while there is anything to wait for
                await trio.sleep(self._patience / 4)
                if self._waited_for and trio.current_time() - self._since >= self._patience:
                    for append in tuple(self._waited_for):
                        append.error = StoreError(
                            f"the store {self._path} has written nothing for {self._patience:g} s",
                            run_id=append.lease.run_id,
                        )
                        append.finish()
            await trio.lowlevel.checkpoint()

    def _answer(self, jobs: Sequence[_Append | _Call]) -> None:
        """Tells all who wait for these, in Trio's thread."""
        self._pending -= len(jobs)
        if self._pending:
            self._since = trio.current_time()
        else:
            self._still.end()
        for job in jobs:
            job.finish()
            if isinstance(job, _Call) and job.abandoned and isinstance(job.result, Lease) and not self._closed:
                self._put(_Call(partial(_release, job.result)))  # nobody has it

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        """Has Trio's thread do something, if it is still there."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    # In the thread

    def _work(self, read_only: bool, lease: float) -> None:
        """Opens the file, and does what is in the queue until there comes `None`."""
        try:
            database = Database(self._path, read_only=read_only, lease=lease, patience=self._patience)
        except Exception as error:
            cannot = StoreError(f"the store {self._path} cannot be opened: {error}")
            cannot.__cause__ = error
            self._failure = error if isinstance(error, StoreError) else cannot
            self._tell(self._opened.set)
            self._tell(self._ended.set)
            return
        self._tell(self._opened.set)
        try:
            while (jobs := self._next(database, lease / 3)) is not None:
                appends, call = jobs
                if appends:
                    self._write(database, appends)
                    self._tell(self._answer, appends)
                if call is not None:
                    self._do(database, call)
                    self._tell(self._answer, [call])
        finally:
            with suppress(sqlite3.Error):  # whoever has a lease loses it in time
                database.close()
            self._tell(self._ended.set)

    def _next(self, database: Database, every: float) -> tuple[list[_Append], _Call | None] | None:
        """Waits for something to do, and takes all there is: what can be written together, and then something else.

        While there is nothing, it says from time to time of the runs in hand that they are.
        """
        job = self._get(every)
        while isinstance(job, _Idle):
            with suppress(sqlite3.Error):  # whoever writes next will see whether that lasts
                for lease, error in database.renew():
                    if lease.on_lost is not None:
                        self._tell(lease.on_lost, error)
            job = self._get(every)
        together: list[_Append] = []
        room = _TOGETHER
        while isinstance(job, _Append):
            together.append(job)
            room -= len(job.batch.entries)
            if job.batch.statements or room <= 0 or self._queue.empty():
                return together, None
            job = self._queue.get()
        if job is not None:
            return together, job
        if not together:
            return None
        self._queue.put(None)  # seen again, when these are done
        return together, None

    def _get(self, timeout: float) -> _Append | _Call | _Idle | None:
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return _Idle()

    def _write(self, database: Database, appends: list[_Append]) -> None:
        errors: list[Exception | None]
        try:
            errors = database.append([(append.lease, append.batch) for append in appends])
        except sqlite3.Error as failed:  # the transaction could not even be taken back
            errors = [database.failed(failed)] * len(appends)
        for append, error in zip(appends, errors, strict=True):
            append.error = error
            tell = append.lease.on_lost
            if isinstance(error, LeaseLostError) and tell is not None:  # nobody may be waiting for this one
                self._tell(tell, error)

    def _do(self, database: Database, call: _Call) -> None:
        if call.abandoned:
            return
        try:
            call.result = call.function(database)
        except StageflowError as error:
            call.error = error
        except Exception as error:  # also of what is damaged: a status that is none
            call.error = database.failed(error)
