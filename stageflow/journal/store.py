"""What a store is: the protocol, what goes into it and what comes out, and `open_store`.

A store keeps, for each run, a log of entries in the order in which they were appended. What the rest of stageflow
relies on is little, and `stageflow.testing.store_checks` tests it:

- an append is atomic, and durable when its receipt says so; what was appended before it is durable by then as well;
- only who holds the lease of a run appends to it. A lease has an epoch, which whoever takes the run over makes greater;
  an append under an older epoch writes nothing;
- what is read is what was written, or a `StoreError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import attrs

from stageflow.errors import DefinitionError, LeaseLostError, TenantMismatchError
from stageflow.journal.record import RunStatus
from stageflow.journal.undo import CompensationStatus

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

__all__ = ["Batch", "Entry", "Lease", "Log", "NewRun", "Receipt", "RunInfo", "Store", "open_store"]


@final
@attrs.define  # not frozen: there are many of them, and that takes a third of the time
class Entry:
    """One event, as it is kept.

    Attributes:
        scope: Which run within the run it is of, as a JSON pointer: ``"/stage/0"``; empty for the run itself.
        stage: The stage it is about, if it is about one.
        kind: What sort of event it is.
        body: What the event says, as JSON.
        value: The user's value that belongs to it, encoded, if there is one.
    """

    scope: str
    stage: str | None
    kind: str
    body: str
    value: str | None = None


@final
@attrs.define(kw_only=True)  # not frozen: likewise
class Batch:
    """What is appended as one: all of it, or nothing.

    Attributes:
        entries: The events, in order.
        blobs: Large values, by their digests.
        states: How far stages are by these events, for whoever lists them: by scope and stage, state and attempts.
        status: How far the run is by these events, if that changes.
        recoveries: The new count of recoveries, if that changes.
        compensation: How far the undoing of the run is by these events, if that changes.
        statements: SQL of the user, with its parameters, that takes effect with the rest.
    """

    entries: Sequence[Entry] = ()
    blobs: Mapping[str, bytes] = attrs.field(factory=dict[str, bytes])
    states: Mapping[tuple[str, str], tuple[str, int]] = attrs.field(factory=dict[tuple[str, str], tuple[str, int]])
    status: RunStatus | None = None
    recoveries: int | None = None
    compensation: CompensationStatus | None = None
    statements: Sequence[tuple[str, Any]] = ()


@final
@attrs.frozen(kw_only=True)
class NewRun:
    """What a store is told of a run that begins.

    Attributes:
        run_id: Its id.
        pipeline: The pipeline's name.
        tenant: On whose behalf it goes.
        began_at: When it began, in seconds since the epoch.
        base: The run that it was forked from, whose log it reads through.
    """

    run_id: str
    pipeline: str
    tenant: str | None
    began_at: float
    base: str | None = None


@final
@attrs.define(eq=False, kw_only=True)
class Lease:
    """The right to append to a run.

    Attributes:
        run_id: The run.
        tenant: On whose behalf it goes.
        holder: Who has it: a process.
        epoch: How many have had it before, and this one.
        on_lost: Called when it is found to be lost, with the error; set by who holds it.
    """

    run_id: str
    tenant: str | None
    holder: str
    epoch: int
    on_lost: Callable[[LeaseLostError], None] | None = None


@final
@attrs.frozen(kw_only=True)
class RunInfo:
    """A run, as it is listed.

    Attributes:
        run_id: Its id.
        pipeline: The pipeline's name.
        tenant: On whose behalf it goes.
        status: How far it is. A run whose process has died is `RunStatus.RUNNING`, and not `held`.
        began_at: When it began, by the wall clock.
        changed_at: When something was written of it last.
        held: Whether a process has it in hand.
        holder: Which one has, or had it last.
        recoveries: How often it was resumed after its process had died, since it last came to an end.
        base: The run that it was forked from.
        compensation: How far its undoing is, if it is undone.
        stages: How many of its stages are in which state, without those that nothing has happened to.
    """

    run_id: str
    pipeline: str
    tenant: str | None
    status: RunStatus
    began_at: datetime
    changed_at: datetime
    held: bool
    holder: str | None
    recoveries: int
    base: str | None
    compensation: CompensationStatus | None
    stages: Mapping[str, int]

    @property
    def finished(self) -> bool:
        """Whether it came to an end from which there is nothing to resume."""
        undone = self.compensation is CompensationStatus.COMPENSATED
        return undone or self.status in (RunStatus.SUCCEEDED, RunStatus.PARTIAL)


@final
@attrs.frozen(kw_only=True)
class Log:
    """All that a store has of a run.

    Attributes:
        info: The run.
        entries: Its events, in order.
        blobs: The large values that they refer to.
    """

    info: RunInfo
    entries: Sequence[Entry]
    blobs: Mapping[str, bytes]


class Receipt(Protocol):
    """What an append gives: when it is durable, and whether."""

    @property
    def error(self) -> Exception | None:
        """Why it was not written, once that is known; `None` if it was, or is still on its way."""
        ...

    async def wait(self) -> None:
        """Waits until it is durable. Shielded, for as long as the store has patience.

        Raises:
            StoreError: It could not be written.
            LeaseLostError: The run belongs to another process.
        """
        ...


class Store(Protocol):
    """Where runs are kept. `open_store` opens the ones that come with stageflow."""

    @property
    def has_sql(self) -> bool:
        """Whether a batch may have statements, and rows can be read with `query`."""
        ...

    async def create(self, run: NewRun, batch: Batch) -> Lease:
        """Begins a run, which is durable when this returns.

        Raises:
            RunExistsError: There is a run of that id.
            StoreError: It could not be written.
        """
        ...

    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        """Takes a run in hand to go on with it.

        Raises:
            LeaseLostError: Another process has it in hand.
            UnknownRunError: There is no such run.
            TenantMismatchError: It is another tenant's.
            StoreError: The store failed.
        """
        ...

    def append_nowait(self, lease: Lease, batch: Batch) -> Receipt:
        """Appends to a run. It returns at once; the receipt tells when it is durable."""
        ...

    async def release(self, lease: Lease) -> None:
        """Gives a run out of hand, so that another process may take it."""
        ...

    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        """Reads a run.

        Raises:
            UnknownRunError: There is no such run.
            TenantMismatchError: It is another tenant's.
            StoreError: What is there is damaged, or cannot be read.
        """
        ...

    async def runs(self, *, tenant: str | None = None) -> Sequence[RunInfo]:
        """Lists the runs of a tenant, the latest first."""
        ...

    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        """Removes the runs of a tenant that came to an end before, each as a whole, and gives those.

        What was cut off by the end of its process, or by its caller, stays, and so does what is not undone yet. A run
        that failed or was cancelled came to an end, and cannot be resumed any more when it is removed. A run from which
        another one was forked that stays, stays as well.

        Args:
            older_than: How long ago a run must have changed last, in seconds.
            tenant: Whose runs.
            dry_run: Whether to say only what would be removed.
        """
        ...

    async def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Reads rows with SQL, if the store has it.

        Raises:
            StoreError: It could not be read, or the store has no SQL.
        """
        ...


def open_store(
    url: str, *, read_only: bool = False, lease: float = 15.0, patience: float = 30.0
) -> AbstractAsyncContextManager[Store]:
    """Opens a place where runs are kept, for the block of an ``async with``.

    Leaving the block waits until all that was appended is written.

    Args:
        url: ``"sqlite:PATH"``, or ``"memory:"`` for a store that lasts as long as the block.
        read_only: Whether it is opened to look at, which is possible while another process writes to it.
        lease: For how many seconds a run stays in hand of a process that gives no sign of life. A process that has
            died on this machine is noticed at once.
        patience: For how many seconds the store may keep the run waiting before it counts as failed.

    Raises:
        DefinitionError: An argument is wrong.
        StoreError: It cannot be opened: it is no store, or one of a later version of stageflow.

    Example::

        async with open_store("sqlite:runs.db") as store:
            results = await graph.run(store=store)
    """
    for name, seconds in (("lease", lease), ("patience", patience)):
        if not 0 < seconds < math.inf:
            raise DefinitionError(f"open_store({name}=...) takes seconds, more than none, not {seconds!r}")
    scheme, colon, place = url.partition(":")
    if scheme == "sqlite" and place:
        from stageflow.journal.sqlite import SQLiteStore  # noqa: PLC0415  # brings sqlite3

        return SQLiteStore.open(Path(place), read_only=read_only, lease=lease, patience=patience)
    if scheme == "memory" and colon and not place:
        from stageflow.journal.memory import MemoryStore  # noqa: PLC0415

        return MemoryStore(lease=lease)
    raise DefinitionError(f'open_store() takes "sqlite:PATH" or "memory:", not {url!r}')


def check_tenant(run_id: str, tenant: str | None, owner: str | None) -> None:
    """Sees whether a run is a tenant's.

    Raises:
        TenantMismatchError: It is another tenant's.
    """
    if tenant != owner:
        raise TenantMismatchError(f"run {run_id}", tenant=tenant, owner=owner)
