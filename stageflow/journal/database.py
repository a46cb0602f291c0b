"""The file of SQLite in which runs are kept: every method is one transaction, and blocks.

Every event carries a checksum, and the events of a run are numbered without gaps, so that damage is noticed when a run
is read. (SQLite checks its log, but not its file.)
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
import zlib
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast, final

import attrs

from stageflow.errors import LeaseLostError, RunExistsError, StoreError, UnknownRunError
from stageflow.journal.holder import is_gone, new_holder
from stageflow.journal.record import RunStatus, StageState
from stageflow.journal.store import Batch, Entry, Lease, Log, NewRun, RunInfo, check_tenant
from stageflow.journal.uncollected import uncollected
from stageflow.journal.undo import CompensationStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

__all__ = ["Database"]

MIGRATIONS: Final[Sequence[str]] = (
    """
    CREATE TABLE stageflow_runs (
        id INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, pipeline TEXT NOT NULL, tenant TEXT,
        status TEXT NOT NULL, began_at REAL NOT NULL, changed_at REAL NOT NULL, last_seq INTEGER NOT NULL,
        holder TEXT, epoch INTEGER NOT NULL, lease_until REAL NOT NULL, recoveries INTEGER NOT NULL, base TEXT,
        compensation TEXT, blobs INTEGER NOT NULL DEFAULT 0, checksum INTEGER NOT NULL
    );
    CREATE TABLE stageflow_events (
        run INTEGER NOT NULL, seq INTEGER NOT NULL, scope TEXT NOT NULL, stage TEXT, kind TEXT NOT NULL,
        body TEXT NOT NULL, value TEXT, checksum INTEGER NOT NULL, PRIMARY KEY (run, seq)
    ) WITHOUT ROWID;
    CREATE TABLE stageflow_stages (
        run INTEGER NOT NULL, scope TEXT NOT NULL, stage TEXT NOT NULL, state TEXT NOT NULL,
        attempts INTEGER NOT NULL, PRIMARY KEY (run, scope, stage)
    ) WITHOUT ROWID;
    CREATE TABLE stageflow_blobs (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE stageflow_blob_refs (
        run INTEGER NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (run, digest)
    ) WITHOUT ROWID;
    """,
)
"""What makes a file of one version into one of the next. The number of them that have been run is the version."""

_NOW: Final = "((julianday('now') - 2440587.5) * 86400.0)"  # the clock of the database, in seconds since the epoch
_INFO: Final = (
    "SELECT id, run_id, pipeline, tenant, status, began_at, changed_at, last_seq, holder, epoch, "
    f"lease_until > {_NOW}, recoveries, base, compensation, blobs, checksum FROM stageflow_runs"
)  # no index but that of run_id: what an index that is damaged leaves out, nobody misses

_NUMBERED: Final = (
    f"UPDATE stageflow_runs SET last_seq = last_seq + ?, changed_at = {_NOW}, lease_until = {_NOW} + ? "
    "WHERE id = ? AND epoch = ? RETURNING last_seq"
)


@final
@attrs.define(eq=False)
class _Held:
    """What the thread knows of a lease."""

    lease: Lease
    run: int
    broken: Exception | None = None  # why nothing more is written under it


class _TakenBackError(Exception):
    """SQL of a user has taken back the transaction in which it was."""


@final
class Database:
    """The file, of which one thread makes use.

    Args:
        path: Where it is.
        read_only: Whether nothing is written to it.
        lease: For how many seconds a run stays in hand of a process that gives no sign of life.
        patience: For how many seconds it waits for other processes that write.

    Raises:
        StoreError: It is no store, or one of another version.
        sqlite3.Error: It cannot be opened. (So all methods may raise.)
    """

    def __init__(self, path: Path, *, read_only: bool, lease: float, patience: float) -> None:
        self._path = path
        self._read_only = read_only
        self._lease = lease
        self._patience = patience
        self._holder = new_holder()
        self._held: dict[Lease, _Held] = {}
        where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        self._connection = sqlite3.connect(where, uri=True, timeout=patience, isolation_level=None)
        self._transaction = _Transaction(self._connection)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _switch_to_wal(self) -> None:
        """Has the file keep a log. SQLite does not wait for others that do the same just now, so this does."""
        until = time.monotonic() + self._patience
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() >= until:
                    raise
                time.sleep(0.01)
            else:
                return

    def close(self) -> None:
        """Gives all runs out of hand, and closes the file."""
        try:
            for lease in tuple(self._held):
                self.release(lease)
        finally:
            self._connection.close()

    def _prepare(self) -> None:
        """Sees whether the file is a store, of which version, and makes it one of this version."""
        connection = self._connection
        if not self._read_only:
            self._switch_to_wal()
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("SELECT count(*) FROM sqlite_master")  # raises if it is no file of SQLite
        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"a store needs SQLite 3.35 or later, and this Python has {sqlite3.sqlite_version}")
        version = _version_of(connection)
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the store {self._path} is of version {version}, and this stageflow knows versions up to "
                f"{len(MIGRATIONS)}; use a later one"
            )
        if version == len(MIGRATIONS):
            return
        if self._read_only:
            raise StoreError(f"the store {self._path} is of an older version, or none; open it once for writing")
        with self._transaction:
            version = _version_of(connection)  # another process may have been first
            for migration in MIGRATIONS[version:]:
                for statement in migration.split(";"):
                    connection.execute(statement)
            connection.execute("CREATE TABLE IF NOT EXISTS stageflow_version (version INTEGER NOT NULL)")
            connection.execute("DELETE FROM stageflow_version")
            connection.execute("INSERT INTO stageflow_version VALUES (?)", (len(MIGRATIONS),))

    def create(self, run: NewRun, batch: Batch) -> Lease:
        """Begins a run."""
        lease = Lease(run_id=run.run_id, tenant=run.tenant, holder=self._holder, epoch=1)
        with self._transaction:
            try:
                cursor = self._connection.execute(
                    "INSERT INTO stageflow_runs (run_id, pipeline, tenant, status, began_at, changed_at, last_seq, "
                    f"holder, epoch, lease_until, recoveries, base, checksum) VALUES (?, ?, ?, ?, ?, {_NOW}, 0, ?, 1, "
                    f"{_NOW} + ?, 0, ?, ?)",
                    (run.run_id, run.pipeline, run.tenant, RunStatus.RUNNING.value, run.began_at, self._holder,
                     self._lease, run.base,
                     _sum_of_run(run.run_id, run.pipeline, run.tenant, run.began_at, run.base)),
                )  # fmt: skip
            except sqlite3.IntegrityError:
                raise RunExistsError(run.run_id) from None
            held = _Held(lease, cast("int", cursor.lastrowid))
            self._write(held, [batch])
        self._held[lease] = held
        return lease

    def acquire(self, run_id: str, tenant: str | None) -> Lease:
        """Takes a run in hand."""
        with self._transaction:
            row = self._find(run_id)
            run, owner, holder, epoch, held = row[0], row[3], row[8], row[9], row[10]
            check_tenant(run_id, tenant, owner)
            if held and holder is not None and not is_gone(holder):
                raise LeaseLostError(run_id, holder=holder)
            self._connection.execute(
                f"UPDATE stageflow_runs SET holder = ?, epoch = epoch + 1, lease_until = {_NOW} + ? WHERE id = ?",
                (self._holder, self._lease, run),
            )
        lease = Lease(run_id=run_id, tenant=tenant, holder=self._holder, epoch=epoch + 1)
        self._held[lease] = _Held(lease, run)
        return lease

    def release(self, lease: Lease) -> None:
        """Gives a run out of hand."""
        if self._held.pop(lease, None) is not None:
            self._connection.execute(
                "UPDATE stageflow_runs SET lease_until = 0 WHERE run_id = ? AND epoch = ?",
                (lease.run_id, lease.epoch),
            )

    def append(self, jobs: Sequence[tuple[Lease, Batch]]) -> list[Exception | None]:
        """Appends to runs, all in one transaction; gives for each what was wrong with it.

        Only the last may have statements of a user, so that what they do wrong can be taken back alone.
        """
        errors: list[Exception | None] = [None] * len(jobs)
        by_lease: dict[Lease, list[int]] = {}
        for number, (lease, _) in enumerate(jobs):
            if lease in self._held:
                by_lease.setdefault(lease, []).append(number)
            else:
                errors[number] = StoreError("the run has ended, or was given out of hand", run_id=lease.run_id)
        last = len(jobs) - 1 if jobs[-1][1].statements else None
        try:
            with self._transaction:
                for lease, numbers in by_lease.items():
                    held = self._held[lease]
                    ordinary = [jobs[number][1] for number in numbers if number != last]
                    try:
                        if held.broken is not None:
                            raise held.broken
                        if ordinary:
                            self._write(held, ordinary)
                        if last is not None and last in numbers:
                            errors[last] = self._write_with_statements(held, jobs[last][1])
                    except (LeaseLostError, StoreError) as error:
                        self._break(held, error, numbers, errors)
        except _TakenBackError as taken_back:  # with the rest, which has no part in that
            others = self.append(jobs[:-1]) if jobs[:-1] else []
            return [*others, cast("Exception", taken_back.__cause__)]
        except Exception as error:
            failed = self.failed(error)
            for lease, numbers in by_lease.items():
                self._break(self._held[lease], failed, numbers, errors)
        return errors

    def _write_with_statements(self, held: _Held, batch: Batch) -> Exception | None:
        """Executes statements of a user, and appends; gives what was wrong with the statements.

        Raises:
            _TakenBackError: They have taken all of the transaction back.
        """
        connection, wrong = self._connection, None
        connection.execute("SAVEPOINT stageflow_user")
        try:
            with _only(connection, _may_write):
                for sql, parameters in batch.statements:
                    connection.execute(sql, parameters)
        except Exception as error:  # also of parameters; it is the stage that has failed with it, not the store
            if not connection.in_transaction:
                if isinstance(error, sqlite3.IntegrityError):  # INSERT OR ROLLBACK
                    raise _TakenBackError from error
                raise  # as for a full disk
            connection.execute("ROLLBACK TO stageflow_user")
            wrong = error
        connection.execute("RELEASE stageflow_user")
        if wrong is None:
            self._write(held, [batch])
        return wrong

    def _break(self, held: _Held, error: Exception, numbers: Sequence[int], errors: list[Exception | None]) -> None:
        """Notes that nothing more is written under a lease: what comes later must not be there without this."""
        held.broken = error
        for number in numbers:
            errors[number] = errors[number] or error

    def _write(self, held: _Held, batches: Sequence[Batch]) -> None:
        """Writes batches of one run, in a transaction that is open.

        Raises:
            LeaseLostError: The run belongs to another process.
        """
        lease, run = held.lease, held.run
        entries: list[Entry] = []
        states: dict[tuple[str, str], tuple[str, int]] = {}
        for batch in batches:
            entries += batch.entries
            states.update(batch.states)
        row = self._connection.execute(_NUMBERED, (len(entries), self._lease, run, lease.epoch)).fetchall()
        if not row:
            raise LeaseLostError(lease.run_id, holder=_holder_of(self._connection, run))
        first: int = row[0][0] - len(entries) + 1
        self._connection.executemany(
            "INSERT INTO stageflow_events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (run, seq, entry.scope, entry.stage, entry.kind, entry.body, entry.value, _checksum(seq, entry))
                for seq, entry in enumerate(entries, first)
            ],
        )
        if states:
            self._connection.executemany(
                "INSERT OR REPLACE INTO stageflow_stages VALUES (?, ?, ?, ?, ?)",
                [(run, scope, stage, state, attempts) for (scope, stage), (state, attempts) in states.items()],
            )
        for batch in batches:
            if batch.blobs:
                self._connection.executemany("INSERT OR IGNORE INTO stageflow_blobs VALUES (?, ?)", batch.blobs.items())
                more = self._connection.executemany(
                    "INSERT OR IGNORE INTO stageflow_blob_refs VALUES (?, ?)",
                    [(run, digest) for digest in batch.blobs],
                ).rowcount
                if more:
                    self._connection.execute("UPDATE stageflow_runs SET blobs = blobs + ? WHERE id = ?", (more, run))
            if batch.status is not None:
                self._connection.execute("UPDATE stageflow_runs SET status = ? WHERE id = ?", (batch.status.value, run))
            if batch.compensation is not None:
                self._connection.execute(
                    "UPDATE stageflow_runs SET compensation = ? WHERE id = ?", (batch.compensation.value, run)
                )
            if batch.recoveries is not None:
                self._connection.execute(
                    "UPDATE stageflow_runs SET recoveries = ? WHERE id = ?", (batch.recoveries, run)
                )

    def renew(self) -> list[tuple[Lease, LeaseLostError]]:
        """Says of all runs in hand that they still are; gives those that turn out not to be."""
        lost: list[tuple[Lease, LeaseLostError]] = []
        for held in self._held.values():
            renewed = self._connection.execute(
                f"UPDATE stageflow_runs SET lease_until = {_NOW} + ? WHERE id = ? AND epoch = ?",
                (self._lease, held.run, held.lease.epoch),
            ).rowcount
            if not renewed and held.broken is None:
                error = LeaseLostError(held.lease.run_id, holder=_holder_of(self._connection, held.run))
                held.broken = error
                lost.append((held.lease, error))
        return lost

    def read(self, run_id: str, tenant: str | None) -> Log:
        """Reads a run."""
        try:
            self._connection.execute("BEGIN")
            row = self._find(run_id)
            check_tenant(run_id, tenant, row[3])
            info = self._infos([row])[0]
            with uncollected():
                entries = _entries(self._connection, row[0], row[7], run_id)
            blobs = _blobs(self._connection, row[0], row[14], run_id)
        finally:
            if self._connection.in_transaction:  # what is wrong with the file may have ended it
                self._connection.execute("ROLLBACK")
        return Log(info=info, entries=entries, blobs=blobs)

    def _find(self, run_id: str) -> Any:
        """Gives the row of a run.

        Raises:
            UnknownRunError: There is no such run.
            StoreError: It is damaged.
        """
        row = self._connection.execute(f"{_INFO} WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            if self._connection.execute(f"{_INFO} NOT INDEXED WHERE run_id = ?", (run_id,)).fetchone() is None:
                raise UnknownRunError(run_id)
            raise StoreError(f"the store {self._path} is damaged: its index does not have run {run_id}", run_id=run_id)
        self._check(row)
        return row

    def _check(self, row: Any) -> None:
        """Sees whether what does not change of a run is what it was."""
        run_id, pipeline, tenant, began_at, base = row[1], row[2], row[3], row[5], row[12]
        if row[15] != _sum_of_run(run_id, pipeline, tenant, began_at, base):
            raise StoreError(f"the store {self._path} is damaged in what it says of run {run_id}", run_id=run_id)

    def runs(self, tenant: str | None) -> list[RunInfo]:
        """Lists the runs of a tenant."""
        rows = self._connection.execute(f"{_INFO} WHERE tenant IS ? ORDER BY began_at DESC, id DESC", (tenant,))
        return self._infos(rows.fetchall())

    def prune(self, older_than: float, tenant: str | None, *, dry_run: bool) -> list[RunInfo]:
        """Removes runs."""
        with self._transaction:
            done = CompensationStatus.COMPENSATED.value
            ended = [status.value for status in RunStatus if status.ended]
            rows = self._connection.execute(
                f"{_INFO} WHERE tenant IS ? AND changed_at < {_NOW} - ? AND lease_until <= {_NOW} "
                f"AND status IN ({', '.join('?' * len(ended))}) AND ifnull(compensation, ?) = ? "
                "ORDER BY began_at DESC, id DESC",
                (tenant, older_than, *ended, done, done),
            ).fetchall()
            bases = dict(self._connection.execute("SELECT run_id, base FROM stageflow_runs WHERE base IS NOT NULL"))
            rows = _without_bases(rows, bases)
            infos = self._infos(rows)
            for row in rows if not dry_run else ():
                for table in ("events", "stages", "blob_refs"):
                    self._connection.execute(f"DELETE FROM stageflow_{table} WHERE run = ?", (row[0],))
                self._connection.execute("DELETE FROM stageflow_runs WHERE id = ?", (row[0],))
            if rows and not dry_run:
                self._connection.execute(
                    "DELETE FROM stageflow_blobs WHERE digest NOT IN (SELECT digest FROM stageflow_blob_refs)"
                )
        return infos

    def query(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        """Reads rows for a user."""
        with _only(self._connection, _may_read):
            return self._connection.execute(sql, parameters).fetchall()

    def _infos(self, rows: Sequence[Any]) -> list[RunInfo]:
        infos: list[RunInfo] = []
        for row in rows:
            self._check(row)
            run, run_id, pipeline, tenant, status, began_at, changed_at, _, holder = row[:9]
            held, recoveries, base, compensation = row[10:14]
            counts = self._connection.execute(
                "SELECT state, count(*) FROM stageflow_stages WHERE run = ? AND scope = '' GROUP BY state", (run,)
            )
            infos.append(
                RunInfo(
                    run_id=run_id,
                    pipeline=pipeline,
                    tenant=tenant,
                    status=RunStatus(status),
                    began_at=datetime.fromtimestamp(began_at, UTC),
                    changed_at=datetime.fromtimestamp(changed_at, UTC),
                    held=bool(held) and holder is not None and not is_gone(holder),
                    holder=holder,
                    recoveries=recoveries,
                    base=base,
                    compensation=None if compensation is None else CompensationStatus(compensation),
                    stages={StageState(state).value: count for state, count in counts},
                )
            )
        return infos

    def failed(self, error: Exception) -> StoreError:
        """Gives the error that says that the store has failed."""
        failed = StoreError(f"the store {self._path} failed: {error}")
        failed.__cause__ = error
        return failed


@final
class _Transaction:
    """A transaction that is committed if the block ends well, and otherwise taken back. One after the other."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:  # which may have begun nevertheless
            self._take_back()
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            self._take_back()

    def _take_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _version_of(connection: sqlite3.Connection) -> int:
    """The version of the store that a file is; 0 if it is none."""
    there = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'stageflow_version'").fetchone()
    return 0 if there is None else connection.execute("SELECT version FROM stageflow_version").fetchone()[0]


def _holder_of(connection: sqlite3.Connection, run: int) -> str | None:
    row = connection.execute("SELECT holder FROM stageflow_runs WHERE id = ?", (run,)).fetchone()
    return None if row is None else row[0]


def _checksum(seq: int, entry: Entry) -> int:
    text = f"{seq}\0{entry.scope}\0{entry.stage}\0{entry.kind}\0{entry.body}\0{entry.value}"
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _sum_of_run(run_id: str, pipeline: str, tenant: str | None, began_at: float, base: str | None) -> int:
    text = "\0".join(map(repr, (run_id, pipeline, tenant, float(began_at), base)))
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _entries(connection: sqlite3.Connection, run: int, last: int, run_id: str) -> list[Entry]:
    """Reads the events of a run.

    Raises:
        StoreError: They are damaged.
    """
    rows = connection.execute(
        "SELECT seq, scope, stage, kind, body, value, checksum FROM stageflow_events WHERE run = ? ORDER BY seq", (run,)
    )
    entries: list[Entry] = []
    try:
        for expected, (seq, scope, stage, kind, body, value, checksum) in enumerate(rows, 1):
            entry = Entry(scope, stage, kind, body, value)
            if seq != expected or checksum != _checksum(seq, entry):
                raise StoreError(f"the journal of run {run_id} is damaged at event {expected}", run_id=run_id)
            entries.append(entry)
    except (UnicodeError, sqlite3.Error) as error:  # bytes that are no text
        raise StoreError(
            f"the journal of run {run_id} is damaged after event {len(entries)}: {error}", run_id=run_id
        ) from error
    if len(entries) != last:
        raise StoreError(
            f"the journal of run {run_id} is damaged: it has {len(entries)} events of {last}", run_id=run_id
        )
    return entries


def _blobs(connection: sqlite3.Connection, run: int, count: int, run_id: str) -> dict[str, bytes]:
    blobs: dict[str, bytes] = dict(
        connection.execute(
            "SELECT digest, data FROM stageflow_blob_refs LEFT JOIN stageflow_blobs USING (digest) WHERE run = ?",
            (run,),
        ).fetchall()
    )
    for digest, data in blobs.items():
        if type(data) is not bytes or hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"the journal of run {run_id} is damaged in the value {digest[:12]}", run_id=run_id)
    if len(blobs) != count:
        raise StoreError(
            f"the journal of run {run_id} is damaged: it has {len(blobs)} large values of {count}", run_id=run_id
        )
    return blobs


def _without_bases(rows: Sequence[Any], bases: dict[str, str]) -> list[Any]:
    """Leaves out the runs from which others were forked that stay."""
    kept = list(rows)
    while True:
        going = {row[1] for row in kept}
        needed = {base for fork, base in bases.items() if fork not in going}
        fewer = [row for row in kept if row[1] not in needed]
        if len(fewer) == len(kept):
            return kept
        kept = fewer


# What SQL of the user may do

_READING: Final = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN: Final = {
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_SAVEPOINT,
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA,
}


def _may_read(action: int, first: str | None, *_: str | None) -> int:
    ours = action == sqlite3.SQLITE_READ and str(first).casefold().startswith("stageflow_")
    return sqlite3.SQLITE_OK if action in _READING and not ours else sqlite3.SQLITE_DENY


def _may_write(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    ours = any(str(name).casefold().startswith("stageflow_") for name in (first, second))
    return sqlite3.SQLITE_DENY if ours or action in _FORBIDDEN else sqlite3.SQLITE_OK


@contextmanager
def _only(connection: sqlite3.Connection, may: Callable[..., int]) -> Generator[None]:
    """Lets SQL of the user do only what it may: it must not end the transaction, or touch what is stageflow's own."""
    connection.set_authorizer(may)
    try:
        yield
    finally:
        connection.set_authorizer(None)
