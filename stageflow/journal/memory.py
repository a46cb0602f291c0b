"""The store in memory: for tests, and for whoever wants the semantics of a store without its durability."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from stageflow.errors import LeaseLostError, RunExistsError, StoreError, UnknownRunError
from stageflow.journal.holder import new_holder
from stageflow.journal.record import RunStatus
from stageflow.journal.store import Batch, Entry, Lease, Log, NewRun, RunInfo, check_tenant
from stageflow.journal.undo import CompensationStatus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["MemoryStore"]


@attrs.define(eq=False)
class _Kept:
    """What is kept of a run."""

    run: NewRun
    changed_at: float
    status: RunStatus = RunStatus.RUNNING
    recoveries: int = 0
    compensation: CompensationStatus | None = None
    epoch: int = 1
    holder: str | None = None
    until: float = 0.0
    entries: list[Entry] = attrs.field(factory=list[Entry])
    blobs: dict[str, bytes] = attrs.field(factory=dict[str, bytes])
    states: dict[tuple[str, str], str] = attrs.field(factory=dict[tuple[str, str], str])


@final
class _Written:
    """The receipt for what was written at once, or not at all."""

    __slots__ = ("error",)

    def __init__(self, error: Exception | None) -> None:
        self.error: Exception | None = error

    async def wait(self) -> None:
        """See `Receipt.wait`."""
        await trio.lowlevel.cancel_shielded_checkpoint()
        if self.error is not None:
            raise self.error


@final
class MemoryStore:
    """A store in memory. `open_store` opens one; several that share one memory are as several processes.

    Args:
        lease: For how many seconds a run stays in hand of a store that gives no sign of life.
        shared: A store whose memory this one shares.
    """

    def __init__(self, *, lease: float = 15.0, shared: MemoryStore | None = None) -> None:
        self._lease = lease
        self._kept: dict[str, _Kept] = {} if shared is None else shared._kept
        self._holder = new_holder()
        self._leases: dict[Lease, None] = {}
        self._closed = False

    async def __aenter__(self) -> MemoryStore:
        await trio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for lease in tuple(self._leases):
            await self.release(lease)  # noqa: ASYNC102  # shielded
        self._closed = True
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _begin_call(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise StoreError("the store is closed")

    @property
    def has_sql(self) -> bool:
        """See `Store.has_sql`."""
        return False

    async def create(self, run: NewRun, batch: Batch) -> Lease:
        """See `Store.create`."""
        await self._begin_call()
        if run.run_id in self._kept:
            raise RunExistsError(run.run_id)
        kept = _Kept(run, time.time(), holder=self._holder)
        self._kept[run.run_id] = kept
        return self._begin(kept, batch)

    def _begin(self, kept: _Kept, batch: Batch) -> Lease:
        lease = Lease(run_id=kept.run.run_id, tenant=kept.run.tenant, holder=self._holder, epoch=kept.epoch)
        self._leases[lease] = None
        self._write(kept, batch)
        return lease

    async def acquire(self, run_id: str, *, tenant: str | None) -> Lease:
        """See `Store.acquire`."""
        await self._begin_call()
        kept = self._of(run_id, tenant)
        if kept.until > time.time():
            raise LeaseLostError(run_id, holder=kept.holder)
        kept.epoch, kept.holder = kept.epoch + 1, self._holder
        return self._begin(kept, Batch())

    def append_nowait(self, lease: Lease, batch: Batch) -> _Written:
        """See `Store.append_nowait`."""
        if self._closed:
            return _Written(StoreError("the store is closed", run_id=lease.run_id))
        if lease not in self._leases:
            return _Written(StoreError("the run has ended, or was given out of hand", run_id=lease.run_id))
        if batch.statements:
            return _Written(StoreError("a store in memory has no SQL", run_id=lease.run_id))
        kept = self._kept[lease.run_id]
        if kept.epoch != lease.epoch:
            error = LeaseLostError(lease.run_id, holder=kept.holder)
            if lease.on_lost is not None:
                trio.lowlevel.current_trio_token().run_sync_soon(lease.on_lost, error)
            return _Written(error)
        self._write(kept, batch)
        return _Written(None)

    def _write(self, kept: _Kept, batch: Batch) -> None:
        kept.changed_at = time.time()
        kept.until = kept.changed_at + self._lease
        kept.entries += batch.entries
        kept.blobs |= batch.blobs
        kept.states |= {key: state for key, (state, _) in batch.states.items()}
        kept.status = batch.status or kept.status
        kept.compensation = batch.compensation or kept.compensation
        kept.recoveries = kept.recoveries if batch.recoveries is None else batch.recoveries

    async def release(self, lease: Lease) -> None:
        """See `Store.release`."""
        await trio.lowlevel.cancel_shielded_checkpoint()
        kept = self._kept.get(lease.run_id)
        if self._leases.pop(lease, lease) is None and kept is not None and kept.epoch == lease.epoch:
            kept.until = 0.0

    async def read(self, run_id: str, *, tenant: str | None) -> Log:
        """See `Store.read`."""
        await self._begin_call()
        kept = self._of(run_id, tenant)
        return Log(info=_info(kept), entries=tuple(kept.entries), blobs=dict(kept.blobs))

    def _of(self, run_id: str, tenant: str | None) -> _Kept:
        if run_id not in self._kept:
            raise UnknownRunError(run_id)
        check_tenant(run_id, tenant, self._kept[run_id].run.tenant)
        return self._kept[run_id]

    async def runs(self, *, tenant: str | None = None) -> Sequence[RunInfo]:
        """See `Store.runs`."""
        await self._begin_call()
        return [_info(kept) for kept in self._latest_first() if kept.run.tenant == tenant]

    def _latest_first(self) -> list[_Kept]:
        return sorted(self._kept.values(), key=lambda kept: -kept.run.began_at)

    async def prune(self, *, older_than: float, tenant: str | None = None, dry_run: bool = False) -> Sequence[RunInfo]:
        """See `Store.prune`."""
        await self._begin_call()
        now = time.time()
        going = {
            kept.run.run_id: kept
            for kept in self._latest_first()
            if kept.run.tenant == tenant
            and kept.status.ended
            and kept.compensation in (None, CompensationStatus.COMPENSATED)
            and kept.changed_at < now - older_than
            and kept.until <= now
        }
        while needed := {kept.run.base for name, kept in self._kept.items() if name not in going} & going.keys():
            for name in needed:
                del going[name or ""]
        infos = [_info(kept) for kept in going.values()]
        for name in () if dry_run else going:
            del self._kept[name]
        return infos

    async def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """See `Store.query`."""
        await self._begin_call()
        raise StoreError(f"a store in memory has no SQL; open one with sqlite:PATH for {sql!r}, {parameters!r}")


def _info(kept: _Kept) -> RunInfo:
    counts: dict[str, int] = {}
    for (scope, _), state in kept.states.items():
        if not scope:
            counts[state] = counts.get(state, 0) + 1
    return RunInfo(
        run_id=kept.run.run_id,
        pipeline=kept.run.pipeline,
        tenant=kept.run.tenant,
        status=kept.status,
        began_at=datetime.fromtimestamp(kept.run.began_at, UTC),
        changed_at=datetime.fromtimestamp(kept.changed_at, UTC),
        held=kept.until > time.time(),
        holder=kept.holder,
        recoveries=kept.recoveries,
        base=kept.run.base,
        compensation=kept.compensation,
        stages=counts,
    )
