"""The book: the journal of a run with all that it runs within itself, on its way to the store.

What needs no waiting for is kept back, and goes along with the next thing that is written. If something cannot be
written, the book is closed: nothing that comes later is written either, for it must not be there without what came
before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import trio

from stageflow.errors import CheckpointError, StoreError, UnstorableValueError
from stageflow.journal.store import Batch, Entry, Lease, Receipt, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stageflow.journal.record import RunStatus, StageState
    from stageflow.journal.resume import Policy
    from stageflow.journal.undo import CompensationStatus

__all__ = ["Book"]


@final
class Book:
    """The journal of a run with all that it runs within itself, as it is being written.

    Attributes:
        store: Where it is kept.
        run_id: The run.
        policy: What resuming goes by, also for the runs within.
        blobs: The large values that were read with it.
        failure: Why what has happened could not be written.
        told: Who is told of that.
    """

    def __init__(self, store: Store, run_id: str, policy: Policy, blobs: Mapping[str, bytes] | None = None) -> None:
        self.store = store
        self.run_id = run_id
        self.policy = policy
        self.blobs: Mapping[str, bytes] = {} if blobs is None else blobs
        self.failure: CheckpointError | None = None
        self.told: dict[Callable[[CheckpointError], None], None] = {}
        self._closed = False
        self._lease: Lease | None = None
        self._later: list[Entry] = []
        self._blobs: dict[str, bytes] = {}
        self._states: dict[tuple[str, str], tuple[str, int]] = {}

    @property
    def is_open(self) -> bool:
        """Whether anything can be written."""
        return not self._closed and self._lease is not None

    def take(self, lease: Lease) -> None:
        """Takes the right to write."""
        self._lease = lease
        lease.on_lost = self.fail

    @property
    def has_more(self) -> bool:
        """Whether anything is kept back."""
        return bool(self._later)

    def later(self, entry: Entry) -> None:
        """Keeps an entry back until something else is written."""
        self._later.append(entry)

    def keep(self, blobs: Mapping[str, bytes]) -> None:
        """Keeps large values back likewise."""
        self._blobs |= blobs

    def add(self, entry: Entry, state: StageState, attempts: int) -> None:
        """Keeps an entry back that says how far a stage is."""
        assert entry.stage is not None
        self._later.append(entry)
        self._states[entry.scope, entry.stage] = state.value, attempts

    def batch(self) -> Batch:
        """Gives all that was kept back."""
        batch = Batch(entries=self._later, blobs=self._blobs, states=self._states)
        self._later, self._blobs, self._states = [], {}, {}
        return batch

    def send(
        self,
        status: RunStatus | None = None,
        recoveries: int | None = None,
        statements: Sequence[tuple[str, Any]] = (),
        compensation: CompensationStatus | None = None,
    ) -> Receipt | None:
        """Writes all that was kept back; `None` if nothing is written any more."""
        batch = self.batch()
        batch.status, batch.recoveries = status, recoveries
        batch.statements, batch.compensation = statements, compensation
        if self._closed or self._lease is None:
            return None
        try:
            return self.store.append_nowait(self._lease, batch)
        except Exception as error:  # of a store that is not one of ours
            self.fail(self._as_failure(error))
            return None

    async def durable(self, receipt: Receipt | None) -> None:  # noqa: ASYNC910  # as a receipt has it
        """Waits until something is written; if it could not be, the run has been told."""
        if receipt is None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        try:
            await receipt.wait()
        except CheckpointError as error:
            self.fail(error)
        except Exception as error:
            self.fail(self._as_failure(error))

    def _as_failure(self, error: Exception) -> StoreError:
        failed = StoreError(f"the store failed: {type(error).__name__}: {error}", run_id=self.run_id)
        failed.__cause__ = error
        return failed

    def fail(self, error: CheckpointError) -> None:
        """Tells the run that something could not be written, and closes the book.

        It stays open if it was a value that could not be kept: that is as if its stage had not ended, and since nothing
        is started after it, how the rest ends can be on record.
        """
        self._closed |= not isinstance(error, UnstorableValueError)
        if self.failure is None:
            error.run_id = self.run_id
            self.failure = error
            for tell in tuple(self.told):
                tell(error)

    async def close(self) -> None:  # noqa: ASYNC910
        """Gives the run out of hand."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.on_lost = None
            try:
                await self.store.release(lease)
            except CheckpointError:  # its lease will end by itself
                return  # noqa: ASYNC910
