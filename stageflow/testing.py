"""What users test their own things with: whether a store keeps what stageflow relies on.

Every check is an async function, whose name says what it checks. The promises are those of `stageflow.journal.store`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial, wraps
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar, cast

import trio
from trio.testing import MockClock

from stageflow.errors import (
    CheckpointError,
    LeaseLostError,
    RunExistsError,
    StoreError,
    TenantMismatchError,
    UnknownRunError,
    in_words,
    ungroup,
)
from stageflow.journal.record import RunStatus, StageState
from stageflow.journal.store import Batch, Entry, Lease, Log, NewRun, Store
from stageflow.journal.undo import CompensationStatus

__all__ = ["EndLease", "OpenAgain", "StoreCheck", "TakeoverCheck", "store_checks", "takeover_checks"]

OpenAgain: TypeAlias = Callable[[], AbstractAsyncContextManager[Store]]
"""Opens the same storage once more, as another process would; several may be open at once."""

EndLease: TypeAlias = Callable[[str], Awaitable[object]]
"""Given the id of a run: makes its lease end, as if whoever has it had given no sign of life for too long."""

StoreCheck: TypeAlias = Callable[[OpenAgain], Coroutine[Any, Any, None]]
TakeoverCheck: TypeAlias = Callable[[OpenAgain, EndLease], Coroutine[Any, Any, None]]

E = TypeVar("E", bound=Exception)
P = ParamSpec("P")


def store_checks() -> Sequence[StoreCheck]:
    """Gives the checks of what every store promises: one async function for each promise.

    A check takes what opens the storage: called again, it opens *the same* storage once more, as another process would.
    The storage is to be empty at first, and of its own for every check. One of the checks opens it in a run of Trio in
    another thread, to see that the time of a `MockClock` stands still meanwhile.

    Returns:
        The checks. They are called after what they check, so that pytest names the tests after it. Each raises
        `AssertionError`, with a sentence on what was promised, if the store does not keep to it.

    Example::

        @pytest.mark.parametrize("check", store_checks())
        async def test_my_store(check: StoreCheck, tmp_path: Path) -> None:
            await check(lambda: open_my_store(tmp_path / "runs"))
    """
    return _CHECKS


def takeover_checks() -> Sequence[TakeoverCheck]:
    """Gives the checks of what a store promises when a process is taken for dead, and is not.

    The other process takes the run over, and the first one must not write to it any more. To bring that about, these
    checks need to make a lease end whose holder is alive, which a store itself has no word for.

    Returns:
        The checks, as `store_checks` does; they take a function of a run's id besides, which makes the lease of that
        run end in the storage.

    Example::

        @pytest.mark.parametrize("check", takeover_checks())
        async def test_my_store_is_fenced(check: TakeoverCheck, tmp_path: Path) -> None:
            async def end_lease(run_id: str) -> None:
                await database.execute("UPDATE runs SET lease_until = 0 WHERE run_id = ?", run_id)

            await check(lambda: open_my_store(tmp_path / "runs"), end_lease)
    """
    return _TAKEOVER_CHECKS


# In what words the checks speak


def _promised(kept: bool, sentence: str) -> None:
    if not kept:
        raise AssertionError(sentence)


def _same(found: object, wanted: object, sentence: str) -> None:
    if found != wanted:
        raise AssertionError(f"{sentence}: wanted {wanted!r}, found {found!r}")


async def _refused(  # noqa: ASYNC910  # as what is awaited
    kind: type[E], doing: Callable[[], Awaitable[object]], sentence: str
) -> E:
    """Does something that is to raise; gives what it has raised."""
    try:
        await doing()
    except kind as error:
        return error  # noqa: ASYNC910
    except Exception as error:
        raise AssertionError(f"{sentence}, not with {error!r}") from error
    raise AssertionError(sentence)


def _run(run_id: str, *, tenant: str | None = None, began_at: float = 1.5, base: str | None = None) -> NewRun:
    return NewRun(run_id=run_id, pipeline="pipe", tenant=tenant, began_at=began_at, base=base)


def _entry(number: int, text: str = "{}") -> Entry:
    return Entry("", f"stage {number}", "stage_settled", text, str(number))


def _batch(*numbers: int, status: RunStatus | None = None) -> Batch:
    return Batch(entries=[_entry(number) for number in numbers], status=status)


def _blob(data: bytes) -> dict[str, bytes]:
    return {hashlib.sha256(data).hexdigest(): data}


def _values(log: Log) -> list[str | None]:
    return [entry.value for entry in log.entries]


async def _append(store: Store, lease: Lease, batch: Batch) -> None:
    await store.append_nowait(lease, batch).wait()


async def _ended(store: Store, run: NewRun, batch: Batch | None = None) -> None:
    """Makes a run that has ended."""
    lease = await store.create(run, batch or _batch(1))
    await _append(store, lease, Batch(status=RunStatus.SUCCEEDED))
    await store.release(lease)


async def _wall_clock_moves() -> None:
    """Waits until the wall clock has moved on, whatever Trio's clock is; stores count in milliseconds."""
    start = time.time()
    while time.time() < start + 0.01:  # noqa: ASYNC110  # of the wall clock there are no events
        await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()


# What is written, and read


async def what_is_read_is_what_was_written(open_again: OpenAgain) -> None:
    """A run is read as it was written, in order, over several appends."""
    odd = (
        Entry("", None, "run_started", "{}", "null"),
        Entry("", "a", "attempt_started", '{"attempt":1}'),
        Entry("/a/0", "", "stage_settled", '"é ☃ 😀 \\u0000"', ""),
        Entry("/a/0/~1~0/12", "é\n\t'\"%?; --", "x", "[]", "1.5"),
        Entry("", "None", "x" * 1000, "{}", "0" * 100_000),
    )
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1", base="0"), Batch(entries=odd[:2]))
        await _append(store, lease, Batch(entries=odd[2:3]))
        await _append(store, lease, Batch())
        await _append(store, lease, Batch(entries=odd[3:]))
        for reader in (store, other):
            log = await reader.read("1", tenant=None)
            _same(tuple(log.entries), odd, "the events of a run are read as they were written, in that order")
            _same(dict(log.blobs), {}, "a run without large values has none")
            info = log.info
            _same(
                (info.run_id, info.pipeline, info.tenant, info.began_at.timestamp(), info.base),
                ("1", "pipe", None, 1.5, "0"),
                "what a run was created with is read with it",
            )


async def large_values_come_back(open_again: OpenAgain) -> None:
    """Large values come back with every run that has them, however often they were written."""
    small, large, other = _blob(b""), _blob(bytes(range(256)) * 4096), _blob(b"other")
    async with open_again() as store:
        lease = await store.create(_run("1"), Batch(entries=[_entry(1)], blobs=small | large))
        await _append(store, lease, Batch(blobs=large))
        await store.create(_run("2"), Batch(blobs=large | other))
        first, second = await store.read("1", tenant=None), await store.read("2", tenant=None)
        _promised(dict(first.blobs) == small | large, "large values come back as they were written")
        _promised(dict(second.blobs) == large | other, "large values come back with every run that has them")


async def appends_are_kept_in_order(open_again: OpenAgain) -> None:
    """What is appended without waiting is read in the order in which it was appended."""
    async with open_again() as store:
        leases = [await store.create(_run(name), Batch()) for name in "ab"]
        receipts = [store.append_nowait(leases[number % 2], _batch(number)) for number in range(200)]
        for receipt in reversed(receipts):
            await receipt.wait()
        for start, name in enumerate("ab"):
            found = _values(await store.read(name, tenant=None))
            wanted = [str(number) for number in range(start, 200, 2)]
            _same(found, wanted, "what is appended without waiting is read in the order of the calls")


async def what_came_before_something_durable_is_durable(open_again: OpenAgain) -> None:
    """When a receipt says that something is durable, so is all that was appended to the run before."""
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1"), _batch(0))
        _same(_values(await other.read("1", tenant=None)), ["0"], "a run that was created is there for others")
        before = [store.append_nowait(lease, _batch(number)) for number in range(1, 50)]
        await _append(store, lease, _batch(50))
        found = _values(await other.read("1", tenant=None))
        _same(found, [str(number) for number in range(51)], "what was appended before something durable is there too")
        _promised(all(receipt.error is None for receipt in before), "the receipt for what was written has no error")


async def waiting_for_a_receipt_is_not_cancelled(open_again: OpenAgain) -> None:
    """Waiting until something is durable goes on in a cancelled scope, and so does what creates a run."""
    async with open_again() as store, open_again() as other:
        lease: Lease | None = None
        with trio.CancelScope() as scope:
            scope.cancel()
            lease = await store.create(_run("1"), _batch(0))
        names = [info.run_id for info in await other.runs()]
        _same(names, [] if lease is None else ["1"], "whoever is cancelled while creating a run has not created it")
        if lease is None:
            lease = await store.create(_run("1"), _batch(0))
        durable = False
        with trio.CancelScope() as scope:
            receipt = store.append_nowait(lease, _batch(1))
            scope.cancel()
            await receipt.wait()
            durable = True
        _promised(durable, "waiting for a receipt is shielded from cancellation")
        found = _values(await other.read("1", tenant=None))
        _same(found, ["0", "1"], "what a receipt was waited for is there, also in a cancelled scope")


# Which runs there are


async def a_run_is_created_once(open_again: OpenAgain) -> None:
    """A second run of one id is refused, and nothing of it is there."""
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1"), Batch(entries=[_entry(1)], blobs=_blob(b"first")))
        second = Batch(entries=[_entry(2)], blobs=_blob(b"second"), status=RunStatus.FAILED, recoveries=3)
        for place in (store, other):
            again = partial(place.create, _run("1", tenant="other", began_at=2.5), second)
            await _refused(RunExistsError, again, "a run whose id is taken is refused with RunExistsError")
        log = await other.read("1", tenant=None)
        _same((_values(log), dict(log.blobs)), (["1"], _blob(b"first")), "the run that is there stays as it was")
        _same((log.info.status, log.info.recoveries), (RunStatus.RUNNING, 0), "the run that is there stays as it was")
        await _append(store, lease, _batch(3))
        _same(_values(await other.read("1", tenant=None)), ["1", "3"], "who has the run in hand goes on with it")


async def of_two_that_create_a_run_one_does(open_again: OpenAgain) -> None:
    """If two create a run at once, one of them does, and the other one is refused."""
    async with open_again() as store, open_again() as other:
        for name in "abcde":
            made: list[str] = []

            async def create(place: Store, value: int, name: str = name, made: list[str] = made) -> None:
                try:
                    await place.create(_run(name), _batch(value))
                    made.append(str(value))
                except RunExistsError:
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(create, store, 1)
                nursery.start_soon(create, other, 2)
            _same(len(made), 1, "of two that create a run at once exactly one does")
            _same(_values(await store.read(name, tenant=None)), made, "the run is that of the one that created it")


async def unknown_runs_are_told_of(open_again: OpenAgain) -> None:
    """Reading and taking in hand what is not there raises `UnknownRunError`."""
    async with open_again() as store:
        await store.create(_run("1"), Batch())
        for name in ("2", "", "1 ", "%", "🙈"):
            for doing in (store.read, store.acquire):
                await _refused(
                    UnknownRunError,
                    partial(doing, name, tenant=None),
                    "a run that is not there is refused with UnknownRunError",
                )


async def tenants_do_not_see_each_other(open_again: OpenAgain) -> None:
    """The runs of a tenant are not read, taken in hand, listed or removed on behalf of another."""
    async with open_again() as store, open_again() as other:
        for tenant in ("a", "b", None):
            await _ended(store, _run(f"of {tenant}", tenant=tenant))
        await _wall_clock_moves()
        for tenant in ("a", "b", None):
            for owner in {"a", "b", None} - {tenant}:
                for doing in (other.read, other.acquire, store.acquire):
                    sentence = "a run of another tenant is refused with TenantMismatchError"
                    theirs = partial(doing, f"of {owner}", tenant=tenant)
                    error = await _refused(TenantMismatchError, theirs, sentence)
                    _same((error.tenant, error.owner), (tenant, owner), "the error says whose the run is, and for whom")
            found = [info.run_id for info in await other.runs(tenant=tenant)]
            _same(found, [f"of {tenant}"], "the runs of a tenant are listed, and no others")
        await other.prune(older_than=0.0, tenant="a")
        left = [len(await store.runs(tenant=tenant)) for tenant in ("a", "b", None)]
        _same(left, [0, 1, 1], "only the runs of one tenant are removed on its behalf")
        await other.prune(older_than=0.0)
        left = [len(await store.runs(tenant=tenant)) for tenant in ("a", "b", None)]
        _same(left, [0, 1, 0], "without a tenant, only the runs that are of none are removed")


async def how_far_a_run_is_can_be_listed(open_again: OpenAgain) -> None:
    """Status, recoveries, compensation and the states of stages are those that were appended last."""
    running, succeeded, failed = (each.value for each in (StageState.RUNNING, StageState.SUCCEEDED, StageState.FAILED))
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1"), Batch(states={("", "a"): (running, 1)}))

        async def see(status: RunStatus, recoveries: int, stages: dict[str, int], sentence: str) -> None:
            for place in (store, other):
                for info in (*await place.runs(), (await place.read("1", tenant=None)).info):
                    found = info.status, info.recoveries, dict(info.stages)
                    _same(found, (status, recoveries, stages), sentence)

        await see(RunStatus.RUNNING, 0, {running: 1}, "a run that was created is running")
        began = (await store.runs())[0]
        states = {("", "a"): (succeeded, 1), ("", "b"): (running, 1), ("/b/0", "c"): (failed, 1)}
        await _wall_clock_moves()
        await _append(store, lease, Batch(states=states))
        await see(RunStatus.RUNNING, 0, {succeeded: 1, running: 1}, "the states of the run's own stages are listed")
        changed = (await store.runs())[0]
        _promised(changed.changed_at > began.changed_at, "an append moves the time when the run was changed last")
        _promised(changed.held and changed.holder == lease.holder, "a run in hand is listed as held, and by whom")
        store.append_nowait(lease, Batch(states={("", "b"): (running, 2)}, recoveries=2))
        await _append(store, lease, Batch(states={("", "b"): (failed, 3)}, status=RunStatus.FAILED))
        await see(RunStatus.FAILED, 2, {succeeded: 1, failed: 1}, "what is listed is what was appended last")
        await _append(store, lease, Batch(status=RunStatus.RUNNING, recoveries=0))
        await see(RunStatus.RUNNING, 0, {succeeded: 1, failed: 1}, "what is listed is what was appended last")
        for compensation in (CompensationStatus.COMPENSATING, CompensationStatus.COMPENSATED):
            _promised(compensation is not (await other.runs())[0].compensation, "compensation is what was appended")
            await _append(store, lease, Batch(compensation=compensation))
            await _append(store, lease, _batch(1))
            _same((await other.runs())[0].compensation, compensation, "compensation is what was appended last")
        await store.release(lease)
        _promised(not (await other.runs())[0].held, "a run that was given out of hand is not held")


async def runs_are_listed_the_latest_first(open_again: OpenAgain) -> None:
    """Runs are listed by when they began, the latest first."""
    async with open_again() as store:
        for began_at, name in ((20.0, "b"), (10.0, "a"), (30.5, "d"), (30.25, "c")):
            await store.create(_run(name, began_at=began_at), Batch())
        _same([info.run_id for info in await store.runs()], list("dcba"), "runs are listed the latest first")


# In whose hands a run is


async def a_run_in_hand_is_not_given_to_another(open_again: OpenAgain) -> None:
    """A run that somebody has in hand is not given to another, who is told who has it."""
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1"), _batch(1))
        sentence = "a run in hand is refused with LeaseLostError"
        for _ in range(2):
            error = await _refused(LeaseLostError, partial(other.acquire, "1", tenant=None), sentence)
            _same(error.holder, lease.holder, "the error names who has the run in hand")
        await _append(store, lease, _batch(2))
        _same(_values(await other.read("1", tenant=None)), ["1", "2"], "who has the run in hand goes on with it")
        await store.release(lease)
        taken = await other.acquire("1", tenant=None)
        error = await _refused(LeaseLostError, partial(store.acquire, "1", tenant=None), sentence)
        _same(error.holder, taken.holder, "the error names who has the run in hand")


async def of_two_that_take_a_run_one_does(open_again: OpenAgain) -> None:
    """If two take a run in hand at once, one of them does, and the other one is told."""
    async with open_again() as store, open_again() as other:
        await store.release(await store.create(_run("1"), Batch()))
        for _ in range(5):
            taken: list[tuple[Store, Lease]] = []

            async def take(place: Store, taken: list[tuple[Store, Lease]] = taken) -> None:
                try:
                    taken.append((place, await place.acquire("1", tenant=None)))
                except LeaseLostError:
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, store)
                nursery.start_soon(take, other)
            _same(len(taken), 1, "of two that take a run in hand at once exactly one does")
            await taken[0][0].release(taken[0][1])


async def a_run_given_out_of_hand_can_be_taken(open_again: OpenAgain) -> None:
    """A run that was given out of hand can be taken, with a greater epoch, and who gave it writes no more."""
    async with open_again() as store, open_again() as other:
        first = await store.create(_run("1"), _batch(1))
        await store.release(first)
        second = await other.acquire("1", tenant=None)
        _promised(second.epoch > first.epoch, "whoever takes a run in hand makes its epoch greater")
        _same((second.run_id, second.tenant), ("1", None), "a lease says of which run it is")
        late = store.append_nowait(first, _batch(2))
        await _refused(CheckpointError, late.wait, "who has given a run out of hand cannot append to it")
        _promised(late.error is not None, "the receipt of what was not written has the error")
        await store.release(first)  # again, and it is not its own any more
        await _refused(LeaseLostError, partial(store.acquire, "1", tenant=None), "a lease ends only for who has it")
        await _append(other, second, _batch(3))
        found = _values(await store.read("1", tenant=None))
        _same(found, ["1", "3"], "what was appended without a lease is not there")
        await other.release(second)
        third = await store.acquire("1", tenant=None)
        _promised(third.epoch > second.epoch, "whoever takes a run in hand makes its epoch greater")
        await _refused(CheckpointError, store.append_nowait(first, _batch(4)).wait, "an old lease stays an old one")


async def closing_a_store_releases_its_runs(open_again: OpenAgain) -> None:
    """When a store is closed, what was appended is written, and others can take its runs."""
    async with open_again() as other:
        async with open_again() as store:
            lease = await store.create(_run("1"), _batch(0))
            store.append_nowait(lease, _batch(1))
            await store.create(_run("2"), Batch())
            store.append_nowait(lease, _batch(2))
        found = _values(await other.read("1", tenant=None))
        _same(found, ["0", "1", "2"], "leaving the block of a store waits until all is written")
        for name in "12":
            await other.acquire(name, tenant=None)


async def a_closed_store_is_refused(open_again: OpenAgain) -> None:
    """Whatever is done with a store that was closed raises `StoreError`."""
    async with open_again() as store:
        lease = await store.create(_run("1"), Batch())
    for doing in (
        partial(store.create, _run("2"), Batch()),
        partial(store.acquire, "1", tenant=None),
        partial(store.read, "1", tenant=None),
        store.runs,
        partial(store.prune, older_than=0.0),
        partial(store.query, "SELECT 1"),
        store.append_nowait(lease, _batch(1)).wait,
    ):
        await _refused(StoreError, doing, "a store that was closed refuses everything with StoreError")


# What is removed


async def a_dry_run_removes_nothing(open_again: OpenAgain) -> None:
    """What would be removed is what is removed then, and asking for it changes nothing."""
    async with open_again() as store:
        for name in "abc":
            await _ended(store, _run(name, began_at=float(ord(name))))
        await store.release(await store.create(_run("open", began_at=0.0), Batch()))
        await _wall_clock_moves()
        before = await store.runs()
        said = await store.prune(older_than=0.0, dry_run=True)
        _same(list(await store.runs()), list(before), "a dry run changes nothing")
        _same([info.run_id for info in said], list("cba"), "what would be removed is said, the latest first")
        done = await store.prune(older_than=0.0)
        _same(list(done), list(said), "what is removed is what a dry run says")
        _same([info.run_id for info in await store.runs()], ["open"], "what is said to be removed is gone")


async def only_what_ended_of_its_own_is_removed(open_again: OpenAgain) -> None:
    """Runs that were cut off stay, and those that are not undone yet, are in hand, or have changed since."""
    async with open_again() as store, open_again() as other:
        for status in RunStatus:
            lease = await store.create(_run(status.value), _batch(1, status=status))
            await store.release(lease)
        for compensation in CompensationStatus:
            batch = Batch(status=RunStatus.FAILED, compensation=compensation)
            await store.release(await store.create(_run(compensation.value), batch))
        await store.create(_run("in hand"), Batch(status=RunStatus.SUCCEEDED))
        await _wall_clock_moves()
        young = await other.prune(older_than=3600.0)
        _same([info.run_id for info in young], [], "what has changed since stays")
        gone = {info.run_id for info in await other.prune(older_than=0.0)}
        wanted = {status.value for status in RunStatus if status.ended} | {CompensationStatus.COMPENSATED.value}
        sure = gone - {CompensationStatus.NOT_NEEDED.value}
        _same(sure, wanted, "only what ended of its own is removed, and has been undone if it is to be")
        left = {info.run_id for info in await store.runs()}
        stays = {CompensationStatus.COMPENSATING.value, CompensationStatus.FAILED.value, "in hand"}
        wanted = {status.value for status in RunStatus if not status.ended} | stays
        sure = left - {CompensationStatus.NOT_NEEDED.value}
        _same(sure, wanted, "what was cut off stays, what is not undone yet, and what is in hand")


async def what_is_removed_is_removed_as_a_whole(open_again: OpenAgain) -> None:
    """Of a run that is removed nothing is left, also if its id is used again."""
    async with open_again() as store:
        states = {("", "a"): (StageState.FAILED.value, 1)}
        await _ended(store, _run("1"), Batch(entries=[_entry(1), _entry(2)], blobs=_blob(b"old"), states=states))
        await _wall_clock_moves()
        await store.prune(older_than=0.0)
        for doing in (store.read, store.acquire):
            await _refused(UnknownRunError, partial(doing, "1", tenant=None), "a run that was removed is unknown")
        await store.create(_run("1"), _batch(3))
        log = await store.read("1", tenant=None)
        _same(_values(log), ["3"], "of a run that was removed no event is left")
        _promised(not log.blobs and not log.info.stages, "of a run that was removed nothing is left")


async def what_others_need_is_not_removed(open_again: OpenAgain) -> None:
    """Large values that other runs have stay, and so does a run from which one was forked that stays."""
    async with open_again() as store:
        shared = _blob(b"shared")
        await _ended(store, _run("shares"), Batch(blobs=shared | _blob(b"own")))
        await store.create(_run("stays"), Batch(blobs=shared))
        for name, base in (("base", None), ("fork", "base"), ("fork of fork", "fork")):
            await _ended(store, _run(name, base=base), _batch(1))
        for name, base in (("old base", None), ("old fork", "old base")):
            await _ended(store, _run(name, base=base), _batch(1))
        lease = await store.acquire("fork of fork", tenant=None)
        await _wall_clock_moves()
        gone = {info.run_id for info in await store.prune(older_than=0.0)}
        _same(gone, {"shares", "old base", "old fork"}, "a run from which another one was forked that stays, stays")
        blobs = (await store.read("stays", tenant=None)).blobs
        _same(dict(blobs), shared, "a large value that another run has stays")
        _same(_values(await store.read("base", tenant=None)), ["1"], "what stays is as it was")
        await store.release(lease)
        gone = {info.run_id for info in await store.prune(older_than=0.0)}
        _same(gone, {"base", "fork", "fork of fork"}, "runs that were forked from each other go together")


# SQL, and time


async def statements_take_effect_with_their_batch(open_again: OpenAgain) -> None:
    """SQL takes effect with the rest of its batch, or neither does; a store without SQL refuses it."""
    async with open_again() as store, open_again() as other:
        lease = await store.create(_run("1"), _batch(0))
        make = Batch(entries=[_entry(1)], statements=[("CREATE TABLE kept (value INTEGER NOT NULL)", ())])
        if not store.has_sql:
            await _refused(StoreError, store.append_nowait(lease, make).wait, "a store without SQL refuses statements")
            await _refused(StoreError, partial(store.query, "SELECT 1"), "a store without SQL refuses queries")
            _same(_values(await other.read("1", tenant=None)), ["0"], "nothing is there of a batch that was refused")
            return
        await _append(store, lease, make)
        insert = ("INSERT INTO kept VALUES (?)", (7,))
        await _append(store, lease, Batch(entries=[_entry(2)], statements=[insert, insert]))
        rows = [tuple(row) for row in await other.query("SELECT value FROM kept WHERE value = ?", (7,))]
        _same(rows, [(7,), (7,)], "statements take effect with their batch, in order")
        before = store.append_nowait(lease, _batch(3))
        wrong = [insert, ("INSERT INTO kept VALUES (?)", (None,))]
        refused = store.append_nowait(lease, Batch(entries=[_entry(4)], blobs=_blob(b"x"), statements=wrong))
        after = store.append_nowait(lease, _batch(5))
        error = await _refused(Exception, refused.wait, "the receipt of statements that fail has their error")
        _promised(
            not isinstance(error, CheckpointError), "that statements fail is the stage's failure, and not the store's"
        )
        await before.wait()
        await after.wait()
        log = await other.read("1", tenant=None)
        _same(_values(log), list("01235"), "a batch whose statements fail is not there")
        _promised(not log.blobs, "a batch whose statements fail is not there")
        count = [tuple(row) for row in await other.query("SELECT count(*) FROM kept")]
        _same(count, [(2,)], "of statements of which one fails none takes effect")
        await _refused(StoreError, partial(store.query, "SELECT * FROM nowhere"), "a query that fails is a StoreError")


async def virtual_time_stands_still_meanwhile(open_again: OpenAgain) -> None:
    """Under a `MockClock`, no time passes while a store is opened, writes, reads and is closed."""

    async def use() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0.001)  # something to jump to
            nursery.start_soon(trio.sleep_forever)
            start = trio.current_time()
            async with open_again() as store:
                lease = await store.create(_run("1"), _batch(0))
                for number in range(1, 6):
                    await _append(store, lease, _batch(number))
                await store.read("1", tenant=None)
                store.append_nowait(lease, _batch(6))
                await store.release(lease)
                store.append_nowait(await store.acquire("1", tenant=None), _batch(7))
                _same(trio.current_time() - start, 0.0, "virtual time does not pass while a store is at work")
            _same(trio.current_time() - start, 0.0, "virtual time does not pass while a store is closed")
            nursery.cancel_scope.cancel()

    def use_alone() -> None:
        try:
            trio.run(use, clock=MockClock(autojump_threshold=0.0))
        except BaseExceptionGroup as group:
            raise ungroup(cast("BaseException", group)) from None

    await trio.to_thread.run_sync(use_alone)


# When somebody is taken for dead


async def a_lease_that_has_ended_can_be_taken(open_again: OpenAgain, end_lease: EndLease) -> None:
    """A run whose holder has given no sign of life can be taken in hand, with a greater epoch."""
    async with open_again() as store, open_again() as other:
        first = await store.create(_run("1"), _batch(1))
        await end_lease("1")
        second = await other.acquire("1", tenant=None)
        _promised(second.epoch > first.epoch, "whoever takes a run over makes its epoch greater")
        await _append(other, second, _batch(2))
        _same(_values(await store.read("1", tenant=None)), ["1", "2"], "who has taken a run over goes on with it")


async def who_was_taken_over_writes_nothing(open_again: OpenAgain, end_lease: EndLease) -> None:
    """An append under an older epoch writes nothing, raises `LeaseLostError`, and the holder is told."""
    async with open_again() as store, open_again() as other:
        first = await store.create(_run("1"), _batch(1))
        lost = trio.Event()
        told: list[LeaseLostError] = []

        def on_lost(error: LeaseLostError) -> None:
            told.append(error)
            lost.set()

        first.on_lost = on_lost
        await end_lease("1")
        second = await other.acquire("1", tenant=None)
        before = await other.read("1", tenant=None)
        late = store.append_nowait(
            first,
            Batch(
                entries=[_entry(2)],
                blobs=_blob(b"late"),
                states={("", "late"): (StageState.SUCCEEDED.value, 1)},
                status=RunStatus.SUCCEEDED,
                recoveries=4,
            ),
        )
        sentence = "an append under an older epoch is refused with LeaseLostError"
        error = await _refused(LeaseLostError, late.wait, sentence)
        _same(error.holder, second.holder, "the error names who has the run in hand now")
        _promised(isinstance(late.error, LeaseLostError), "the receipt of what was not written has the error")
        _same(await other.read("1", tenant=None), before, "an append under an older epoch writes nothing")
        with trio.move_on_after(5):
            await lost.wait()
        _promised(bool(told), "lease.on_lost is called when an append finds the lease lost")
        _same(told[0].holder, second.holder, "lease.on_lost is given the error")
        await _append(other, second, _batch(3))
        _same(_values(await other.read("1", tenant=None)), ["1", "3"], "who has taken a run over goes on with it")


async def nothing_is_written_after_a_gap(open_again: OpenAgain, end_lease: EndLease) -> None:
    """After an append that failed, no other under that lease is written, whatever becomes of the run meanwhile."""
    async with open_again() as store, open_again() as other:
        first = await store.create(_run("1"), _batch(1))
        await end_lease("1")
        second = await other.acquire("1", tenant=None)
        late = [store.append_nowait(first, _batch(number)) for number in range(2, 5)]
        for receipt in late:
            await _refused(LeaseLostError, receipt.wait, "all that comes after an append that failed fails as well")
        await other.release(second)
        again = store.append_nowait(first, _batch(5)).wait
        await _refused(LeaseLostError, again, "a lease that was lost stays lost, also when nobody has the run in hand")
        third = await store.acquire("1", tenant=None)
        await _refused(LeaseLostError, store.append_nowait(first, _batch(6)).wait, "a lease that was lost stays lost")
        await _append(store, third, _batch(7))
        _same(_values(await other.read("1", tenant=None)), ["1", "7"], "nothing is written under a lease that was lost")


async def who_was_taken_over_gives_nothing_away(open_again: OpenAgain, end_lease: EndLease) -> None:
    """When who was taken over releases the run, or is closed, the other one still has it."""
    async with open_again() as other:
        async with open_again() as store:
            leases = [await store.create(_run(name), Batch()) for name in "12"]
            taken: list[Lease] = []
            for name in "12":
                await end_lease(name)
                taken.append(await other.acquire(name, tenant=None))
            await store.release(leases[0])
        async with open_again() as third:
            for name in "12":
                sentence = "a lease that was lost ends nothing when it is released, or its store closed"
                error = await _refused(LeaseLostError, partial(third.acquire, name, tenant=None), sentence)
                _same(error.holder, taken[0].holder, "the run stays with who has taken it over")


# A store that raises against all promises has broken the one that is being checked.


def _checked(check: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, Coroutine[Any, Any, None]]:
    @wraps(check)
    async def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await check(*args, **kwargs)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{check.__doc__} But there was {in_words(error)}") from error

    return checked


_CHECKS: Final[Sequence[StoreCheck]] = tuple(
    map(
        _checked,
        (
            what_is_read_is_what_was_written,
            large_values_come_back,
            appends_are_kept_in_order,
            what_came_before_something_durable_is_durable,
            waiting_for_a_receipt_is_not_cancelled,
            a_run_is_created_once,
            of_two_that_create_a_run_one_does,
            unknown_runs_are_told_of,
            tenants_do_not_see_each_other,
            how_far_a_run_is_can_be_listed,
            runs_are_listed_the_latest_first,
            a_run_in_hand_is_not_given_to_another,
            of_two_that_take_a_run_one_does,
            a_run_given_out_of_hand_can_be_taken,
            closing_a_store_releases_its_runs,
            a_closed_store_is_refused,
            a_dry_run_removes_nothing,
            only_what_ended_of_its_own_is_removed,
            what_is_removed_is_removed_as_a_whole,
            what_others_need_is_not_removed,
            statements_take_effect_with_their_batch,
            virtual_time_stands_still_meanwhile,
        ),
    )
)
_TAKEOVER_CHECKS: Final[Sequence[TakeoverCheck]] = tuple(
    map(
        _checked,
        (
            a_lease_that_has_ended_can_be_taken,
            who_was_taken_over_writes_nothing,
            nothing_is_written_after_a_gap,
            who_was_taken_over_gives_nothing_away,
        ),
    )
)
