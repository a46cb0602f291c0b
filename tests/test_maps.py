"""Maps: one stage that runs something per item, however the items come and however they end."""

from __future__ import annotations

import gc
import io
import pickle
import tracemalloc
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from rich.console import Console

from stageflow import (
    Artifact,
    CauseKind,
    DefinitionError,
    MissingOutputError,
    Pipeline,
    PipelineContext,
    PipelineResults,
    Retry,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageKind,
    StageOutput,
    StageState,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    UnknownStageError,
    stage,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    assert_whole,
    duration,
    end,
    gives,
    leaves,
    raises,
    returns,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator

    from trio.testing import MockClock

    from stageflow.stages import Body

ERROR = ValueError("no such page")


async def double(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(n=ctx.data * 2)


async def naps(ctx: StageContext) -> StageOutput:
    """Sleeps for as many seconds as the item says."""
    ctx.save_partial(begun=ctx.data)
    await trio.sleep(ctx.data)
    return StageOutput.ok(n=ctx.data)


def ends_at(bad: int, ending: StageOutput | Exception, *, after: float = 1) -> Body:
    """Succeeds after a second for each item but one, which ends like this."""

    async def body(ctx: StageContext) -> StageOutput:
        ctx.save_partial(begun=ctx.data)
        await trio.sleep(after if ctx.data == bad else 1)
        if ctx.data != bad:
            return StageOutput.ok(n=ctx.data)
        if isinstance(ending, Exception):
            raise ending.with_traceback(None)
        return ending

    return body


def mapping(runner: Any, items: Any, **options: Any) -> Pipeline:
    """A pipeline of one map, over these items."""
    return Pipeline("mapping").with_map("m", runner, over=lambda _: items, **options)


def numbers(results: PipelineResults, name: str = "m") -> list[int | None]:
    """The numbers in the outputs of a map."""
    return [None if item is None else item["n"] for item in results[name].data]


def numbers_of(outputs: Any) -> list[int | None]:
    return [None if item is None else item["n"] for item in outputs]


async def failure_of(runnable: Pipeline, ctx: Any = None) -> StageExecutionError:
    with pytest.raises(StageExecutionError) as caught:
        await runnable.run(ctx)
    return caught.value


@attrs.define
class Gauge:
    """Notes how many are in flight at once."""

    now: int = 0
    most: int = 0
    of: list[str] = attrs.field(factory=list[str])

    async def naps(self, ctx: StageContext) -> StageOutput:
        self.of.append(ctx.branch)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await naps(ctx)
        finally:
            self.now -= 1


# Outputs


async def test_outputs_come_in_the_order_of_the_items_whatever_the_order_of_their_ends(
    autojump_clock: MockClock,
) -> None:
    results = await mapping(naps, [3, 1, 2]).run()
    assert numbers(results) == [3, 1, 2]
    assert duration(results) == 3
    assert results.status is RunStatus.SUCCEEDED


async def test_a_map_over_a_stage_comes_after_it_and_takes_the_list_it_gave() -> None:
    pipeline = Pipeline("p").with_map("m", double, over="list").with_stage("list", returns(StageOutput.ok([1, 2, 3])))
    assert numbers(await pipeline.run()) == [2, 4, 6]


async def test_a_map_may_name_the_stage_it_goes_over_in_after_as_well() -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("other", gives())
        .with_stage("list", returns(StageOutput.ok([1])))
        .with_map("m", double, over="list", after=["list", "other"])
    )
    results = await pipeline.run()
    assert numbers(results) == [2]
    assert [edge.stage for edge in pipeline.build().stages["m"].after] == ["list", "other"]


async def test_a_function_gives_the_items_from_the_context() -> None:
    pipeline = Pipeline("p").with_map("m", double, over=lambda ctx: ctx.data["pages"])
    assert numbers(await pipeline.run({"pages": [1, 5]})) == [2, 10]


async def test_an_empty_map_succeeds_with_an_empty_list() -> None:
    results = await mapping(double, []).run()
    assert results["m"].data == []
    assert results.status is RunStatus.SUCCEEDED


async def test_an_item_that_returns_nothing_has_an_output_all_the_same() -> None:
    results = await mapping(returns(None), [1, 2]).run()
    assert results["m"].data == [{}, {}]


async def test_a_pipeline_as_the_runner_gives_its_outputs_by_name_for_each_item() -> None:
    child = Pipeline("child").with_stage("a", double).with_stage("b", gives(x=1), after="a")
    results = await mapping(child, [1, 2]).run()
    assert results["m"].data == [{"a": {"n": 2}, "b": {"x": 1}}, {"a": {"n": 4}, "b": {"x": 1}}]


async def test_an_item_sees_its_own_item_as_data_and_the_run_around_it_for_the_rest() -> None:
    seen: list[tuple[Any, ...]] = []

    async def looks(ctx: StageContext) -> None:
        seen.append((ctx.data, ctx.stage, ctx.branch, ctx.run_id, ctx.correlation_id, ctx.tenant, ctx.metadata["k"]))

    results = await mapping(looks, ["x"]).run(PipelineContext(tenant="acme", metadata={"k": "v"}))
    run_id = results.run_id
    assert seen == [("x", "m", "m[0]", f"{run_id}/m[0]", run_id, "acme", "v")]


async def test_maps_nest(autojump_clock: MockClock) -> None:
    inner = Pipeline("inner").with_map("row", double, over=lambda ctx: ctx.data)
    results = await mapping(inner, [[1, 2], [3]]).run()
    assert [numbers_of(item["row"]) for item in results["m"].data] == [[2, 4], [6]]


async def test_a_map_within_a_stage_within_a_map_runs(autojump_clock: MockClock) -> None:
    inner = Pipeline("inner").with_map("row", naps, over=lambda ctx: ctx.data["items"])

    async def runs_it(ctx: StageContext) -> StageOutput:
        return StageOutput.ok(n=sum(item["n"] for item in (await ctx.run_pipeline(inner, ctx.data))["row"].data))

    results = await mapping(runs_it, [{"items": [1, 2]}, {"items": [4]}]).run()
    assert numbers(results) == [3, 4]
    assert duration(results) == 4


# Where the items come from


def count(items: int) -> Generator[int]:
    yield from range(items)


async def acount(items: int) -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
    for item in range(items):
        await trio.lowlevel.checkpoint()
        yield item


class Countable:
    """An iterable without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class OnlyNext:
    """An iterator that has just what the `for` statement needs of it."""

    def __init__(self) -> None:
        self.at = -1

    def __next__(self) -> int:
        self.at += 1
        if self.at == 4:
            raise StopIteration
        return self.at


class Minimal:
    """An iterable whose iterator is not iterable."""

    def __iter__(self) -> Iterator[int]:
        return OnlyNext()  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


class AsyncCountable:
    """An async iterable that is no generator."""

    def __init__(self) -> None:
        self.at = -1

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await trio.lowlevel.checkpoint()
        self.at += 1
        if self.at == 4:
            raise StopAsyncIteration
        return self.at


class Both(AsyncCountable):
    """An async iterator that is an ordinary one as well, which then counts for nothing."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("it was not to be asked")

    def __next__(self) -> int:
        raise AssertionError("it was not to be asked")


def filled_channel() -> trio.MemoryReceiveChannel[int]:
    send, receive = trio.open_memory_channel[int](4)
    for item in range(4):
        send.send_nowait(item)
    send.close()
    return receive


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2, 3],
    "tuple": lambda: (0, 1, 2, 3),
    "range": lambda: range(4),
    "iterable": Countable,
    "iterator": lambda: iter([0, 1, 2, 3]),
    "iterator that is not iterable": Minimal,
    "generator": lambda: count(4),
    "async generator": lambda: acount(4),
    "async iterable": AsyncCountable,
    "iterable both ways": Both,
    "memory channel": filled_channel,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("limit", [1, 2, 16])
async def test_items_come_from_whatever_can_be_iterated_over(source: str, limit: int) -> None:
    results = await Pipeline("p").with_map("m", double, over=lambda _: SOURCES[source](), limit=limit).run()
    assert numbers(results) == [0, 2, 4, 6]


@pytest.mark.parametrize("items", [5, None, "text", b"bytes", {"a": 1}, object()])
async def test_what_is_no_list_of_items_is_a_type_error_that_names_the_map(items: Any) -> None:
    error = await failure_of(mapping(double, items))
    assert isinstance(error.original, TypeError)
    assert "map 'm' goes over" in str(error.original)
    assert error.stage == "m"


async def test_what_the_function_for_the_items_raises_is_the_failure_of_the_map() -> None:
    def breaks(_: StageContext) -> list[int]:
        raise ERROR.with_traceback(None)

    error = await failure_of(Pipeline("p").with_map("m", double, over=breaks))
    assert error.original is ERROR


async def test_a_function_may_give_the_output_of_a_stage_as_it_is() -> None:
    for given in ([1, 2], {"a": 1}):
        pipeline = Pipeline("p").with_stage("list", returns(StageOutput.ok(given)))
        pipeline = pipeline.with_map("m", double, over=lambda ctx: ctx.inputs["list"], after="list")
        if isinstance(given, list):
            assert numbers(await pipeline.run()) == [2, 4]
        else:
            assert isinstance((await failure_of(pipeline)).original, TypeError)


async def test_a_map_over_a_skipped_stage_is_skipped() -> None:
    pipeline = Pipeline("p").with_stage("list", returns(StageOutput.skip("none"))).with_map("m", double, over="list")
    results = await pipeline.run()
    assert states(results) == {"list": SKIPPED, "m": SKIPPED}


def breaking(at: int) -> Generator[int]:
    yield from range(at)
    raise ERROR.with_traceback(None)


async def abreaking(at: int) -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
    for item in range(at):
        await trio.lowlevel.checkpoint()
        yield item
    raise ERROR.with_traceback(None)


@pytest.mark.parametrize("source", [breaking, abreaking])
async def test_a_source_that_breaks_fails_the_map_with_its_own_error_and_what_was_finished_is_kept(
    autojump_clock: MockClock, source: Callable[[int], Any]
) -> None:
    error = await failure_of(Pipeline("p").with_map("m", naps, over=lambda _: source(3), limit=2))
    # Items 0 and 1 have ended when the third asks for room; the source breaks at the fourth, while item 2 naps.
    assert error.original is ERROR
    record = error.results.records["m"]
    assert numbers_of(record.partial["outputs"]) == [0, 1, None]
    assert error.results.records["m[2]"].state is CANCELLED
    assert duration(error.results) == 1


# Never more than `limit`, and no item before there is room for it


@pytest.mark.parametrize("limit", [1, 3, 16, 100])
async def test_no_more_items_are_in_flight_than_the_limit_says_and_no_fewer(
    autojump_clock: MockClock, limit: int
) -> None:
    gauge = Gauge()
    results = await mapping(gauge.naps, [1] * 48, limit=limit).run()
    assert gauge.most == min(limit, 48)
    assert duration(results) == -(-48 // limit)


async def test_sixteen_items_are_in_flight_if_nothing_is_said(autojump_clock: MockClock) -> None:
    gauge = Gauge()
    await mapping(gauge.naps, [1] * 40).run()
    assert gauge.most == 16


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_item_is_asked_for_only_when_there_is_room_for_it(autojump_clock: MockClock, is_async: bool) -> None:
    asked: list[tuple[int, float]] = []
    begun = trio.current_time()

    def ask(item: int) -> int:
        asked.append((item, trio.current_time() - begun))
        return 2

    async def asks() -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
        for item in range(6):
            yield ask(item)

    source: Any = asks() if is_async else (ask(item) for item in range(6))
    await mapping(naps, source, limit=2).run()
    assert asked == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4)]


async def test_endless_items_are_no_obstacle_to_a_limit_of_time(autojump_clock: MockClock) -> None:
    def forever() -> Generator[int]:
        while True:
            yield 1

    error = await failure_of(mapping(naps, forever(), limit=2, timeout=3.5))
    assert isinstance(error, StageTimeoutError)
    assert error.limit == error.elapsed == 3.5
    assert numbers_of(error.partial["outputs"]) == [1] * 6 + [None] * 2


async def test_endless_items_that_end_at_once_can_be_cancelled() -> None:
    def forever() -> Generator[int]:
        while True:
            yield 1

    with trio.move_on_after(0.05) as scope:
        await mapping(double, forever(), timeout=None).run()
    assert scope.cancelled_caught


async def test_items_that_come_late_are_waited_for(autojump_clock: MockClock) -> None:
    async def late() -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
        for item in (1, 2, 3):
            await trio.sleep(10)
            yield item

    results = await mapping(naps, late()).run()
    assert numbers(results) == [1, 2, 3]
    assert duration(results) == 33


async def test_a_map_of_many_items_holds_sixteen_of_them_and_nothing_of_those_that_have_ended(
    autojump_clock: MockClock,
) -> None:
    gauge = Gauge()

    async def objects_at_the_end_of(items: int) -> int:
        """How many objects there are when the last of so many items is asked for."""
        objects = 0

        def source() -> Generator[int]:
            nonlocal objects
            for item in range(items):
                if item == items - 1:
                    gc.collect()
                    objects = len(gc.get_objects())
                yield 1

        async def one(ctx: StageContext) -> StageOutput:
            await gauge.naps(ctx)
            return StageOutput.ok(1)  # nothing that the collector of garbage would count

        results = await mapping(one, source()).run()
        assert len(results["m"].data) == items
        return objects

    await objects_at_the_end_of(100)
    few = await objects_at_the_end_of(100)
    many = await objects_at_the_end_of(20_000)
    assert gauge.most == 16
    # Trio forgets the deadlines of closed scopes in batches of a thousand; one object per item would be 19,900.
    assert many - few < 5_000


async def test_a_map_of_many_items_takes_no_memory_but_for_its_outputs() -> None:
    async def one(ctx: StageContext) -> StageOutput:
        await trio.lowlevel.checkpoint()
        return StageOutput.ok(1)

    async def peak(items: int) -> int:
        graph = mapping(one, range(items), timeout=None).build()
        gc.collect()
        tracemalloc.start()
        try:
            await graph.run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    await peak(100)
    assert (await peak(3_000) - await peak(1_000)) / 2_000 < 64  # bytes an item: its places in lists, and slack


# Generators are closed


class Source:
    """Generators that note when they are closed, and where."""

    def __init__(self) -> None:
        self.closed: list[float] = []
        self.begun = trio.current_time()

    def _note(self) -> None:
        self.closed.append(trio.current_time() - self.begun)

    def generator(self) -> Generator[int]:
        try:
            yield from range(9)
        finally:
            self._note()

    async def async_generator(self) -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
        try:
            for item in range(9):
                await trio.lowlevel.checkpoint()
                yield item
        finally:
            self._note()


ENDINGS: dict[str, tuple[Body, float]] = {
    "ok": (sleeps(1), 5),
    "failure": (ends_at(2, ERROR), 2),
    "cancel": (ends_at(2, StageOutput.cancel("enough")), 2),
    "timeout": (sleeps(1), 2.5),
    "scope": (sleeps(1), 2.5),
    "run.cancel": (sleeps(1), 1),
    "cancel_branch": (sleeps(1), 1),
}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_generator_of_items_is_closed_when_the_map_ends_however_it_ends(
    autojump_clock: MockClock, ending: str, is_async: bool
) -> None:
    body, at = ENDINGS[ending]
    source = Source()
    items: Any = source.async_generator() if is_async else source.generator()
    timeout = 2.5 if ending == "timeout" else None

    def act(scope: trio.CancelScope, run: Run) -> None:
        if ending == "run.cancel":
            run.cancel("enough")
        elif ending == "cancel_branch":
            run.cancel_branch("m", "enough")

    ended = await end(mapping(body, items, limit=2, timeout=timeout), act, within=2.5 if ending == "scope" else 60)
    assert duration(ended.results) == at
    assert source.closed == [4 if ending == "ok" else at]  # there it is exhausted while the last item still runs


async def test_an_async_generator_may_take_its_time_to_close_but_no_longer_than_cleanup_may(
    autojump_clock: MockClock,
) -> None:
    async def slow() -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
        try:
            while True:
                yield 1
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            await trio.sleep(60)  # noqa: ASYNC102  # in time that is limited by the map

    pipeline = Pipeline("p", cleanup_timeout=3).with_map("m", naps, over=lambda _: slow(), limit=2, timeout=1.5)
    error = await failure_of(pipeline)
    assert isinstance(error, StageTimeoutError)
    assert duration(error.results) == 1.5 + 3
    overran = error.results.records["m"].details.overran
    assert len(overran) == 1
    assert "aclose" in overran[0]


# Failures


async def test_the_first_failure_ends_the_map_and_cancels_the_others(autojump_clock: MockClock) -> None:
    error = await failure_of(mapping(ends_at(5, ERROR, after=0.5), range(20), limit=4))
    assert error.original is ERROR
    assert error.stage == "m"
    results = error.results
    assert duration(results) == 1.5
    record = results.records["m"]
    assert record.state is FAILED
    assert numbers_of(record.partial["outputs"]) == [0, 1, 2, 3, None, None, None, None]
    assert results.records["m[5]"].state is FAILED
    assert results.records["m[5]"].error is ERROR
    for number in (4, 6, 7):
        item = results.records[f"m[{number}]"]
        assert item.state is CANCELLED
        assert item.partial == {"begun": number}
        assert item.cause is not None
        assert (item.cause.kind, item.cause.stage) == (CauseKind.FAILURE, "m[5]")
    assert "m[5] failed" in str(error)
    assert "ValueError: no such page" in str(error)


async def test_a_failure_does_not_wait_for_items_that_come_late(autojump_clock: MockClock) -> None:
    async def late() -> AsyncGenerator[int]:  # noqa: ASYNC900  # the map closes it
        yield 1
        await trio.sleep(60)
        yield 2

    error = await failure_of(mapping(ends_at(1, ERROR), late()))
    assert duration(error.results) == 1


async def test_a_recoverable_failure_of_an_item_is_one_of_the_map(autojump_clock: MockClock) -> None:
    async def recovers(ctx: StageContext) -> StageOutput:
        tries.append(ctx.data)
        return StageOutput.fail("not yet", recoverable=True) if len(tries) == 1 else StageOutput.ok(n=ctx.data)

    tries: list[int] = []
    error = await failure_of(mapping(recovers, [1]))
    assert error.recoverable
    tries.clear()
    results = await mapping(recovers, [1], retry=Retry(attempts=2, on=OSError)).run()
    assert numbers(results) == [1]


async def test_what_had_finished_is_found_item_by_item_in_the_records_of_a_map_that_failed(
    autojump_clock: MockClock,
) -> None:
    error = await failure_of(mapping(ends_at(5, ERROR), range(20), limit=4))
    item = error.results.records["m[2]"]
    assert item.state is OK
    assert item.output == StageOutput.ok(n=2)
    with pytest.raises(MissingOutputError):
        error.results.records["m[19]"]


async def test_a_failed_item_is_its_own_cause() -> None:
    error = await failure_of(mapping(raises(ERROR), [1]))
    cause = error.results.records["m[0]"].cause
    assert cause is not None
    assert (cause.kind, cause.stage, cause.reason) == (CauseKind.FAILURE, "m[0]", "ValueError: no such page")


async def test_an_item_that_reaches_its_limit_has_failed_by_that(autojump_clock: MockClock) -> None:
    results = await mapping(stage(timeout=2)(naps), [1, 9], tolerate=1).run()
    item = results.records["m[1]"]
    assert item.state is FAILED
    assert item.cause is not None
    assert (item.cause.kind, item.cause.stage) == (CauseKind.TIMEOUT, "m[1]")
    assert item.limit == 2
    assert item.partial == {"begun": 9}
    assert numbers(results) == [1, None]


async def test_an_item_has_the_default_limit_of_the_pipeline_and_the_map_has_none(autojump_clock: MockClock) -> None:
    results = await Pipeline("p", default_timeout=2).with_map("m", naps, over=lambda _: [1] * 9, limit=1).run()
    assert duration(results) == 9
    error = await failure_of(Pipeline("p", default_timeout=2).with_map("m", naps, over=lambda _: [3]))
    assert duration(error.results) == 2


@pytest.mark.parametrize(("tolerate", "fails"), [(0, True), (1, True), (2, False), (3, False)])
async def test_as_many_items_may_fail_as_are_tolerated(autojump_clock: MockClock, tolerate: int, fails: bool) -> None:
    async def odd_fails(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        return StageOutput.fail(f"{ctx.data} is odd") if ctx.data % 2 else StageOutput.ok(n=ctx.data)

    pipeline = mapping(odd_fails, range(4), tolerate=tolerate)
    if fails:
        assert (await failure_of(pipeline)).stage == "m"
        return
    results = await pipeline.run()
    assert numbers(results) == [0, None, 2, None]
    assert results.status is RunStatus.PARTIAL
    assert states(results) == {"m": OK}
    assert [results.records[f"m[{number}]"].state for number in range(4)] == [OK, FAILED, OK, FAILED]


async def fails_below(ctx: StageContext) -> StageOutput:
    await trio.lowlevel.checkpoint()
    return StageOutput.ok(n=ctx.data[0]) if ctx.data[0] >= ctx.data[1] else StageOutput.fail("below")


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize(
    ("tolerate", "items", "failing", "fails"),
    [
        (0.5, 4, 2, False),
        (0.5, 4, 3, True),
        (0.5, 5, 3, True),
        (1.0, 3, 3, False),
        (0.0, 3, 1, True),
        (0.29, 100, 29, False),
        (0.29, 100, 30, True),
        (0.07, 100, 7, False),
    ],
)
async def test_a_part_of_the_items_may_fail_whether_or_not_their_number_is_known_beforehand(
    with_length: bool, tolerate: float, items: int, failing: int, fails: bool
) -> None:
    pairs = [(item, failing) for item in range(items)]
    pipeline = mapping(fails_below, pairs if with_length else iter(pairs), tolerate=tolerate)
    if fails:
        error = await failure_of(pipeline)
        assert f"{tolerate:.0%} may" in error.reason
        assert "outputs" in error.results.records["m"].partial
    else:
        results = await pipeline.run()
        assert numbers(results) == [None] * failing + list(range(failing, items))


async def test_a_part_of_a_known_number_ends_the_map_as_soon_as_it_is_exceeded(autojump_clock: MockClock) -> None:
    async def fails_in_turn(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        return StageOutput.fail("never")

    error = await failure_of(mapping(fails_in_turn, range(10), tolerate=0.2, limit=1))
    assert duration(error.results) == 3
    error = await failure_of(mapping(fails_in_turn, iter(range(10)), tolerate=0.2, limit=1))
    assert duration(error.results) == 10


async def test_several_failures_are_counted_and_the_first_is_the_original(autojump_clock: MockClock) -> None:
    async def fails(ctx: StageContext) -> StageOutput:
        await trio.sleep(3 - ctx.data)
        raise ValueError(ctx.data)

    error = await failure_of(mapping(fails, range(3), tolerate=1))
    assert isinstance(error.original, ValueError)
    assert error.original.args == (2,)
    assert error.reason == "m[2] and 1 more failed, and 1 may: ValueError: 2"
    assert [record.name for record in error.failures] == ["m"]


async def test_a_tolerated_failure_of_a_map_lets_the_run_go_on() -> None:
    pipeline = mapping(raises(ERROR), [1, 2], on_failure="tolerate").with_stage(
        "handler", gives(x=1), after="m", join="settled"
    )
    results = await pipeline.run()
    assert states(results) == {"m": FAILED, "handler": OK}
    assert results.status is RunStatus.PARTIAL
    assert results.records["m[0]"].error is ERROR


async def test_a_task_that_an_item_leaves_in_its_nursery_fails_the_item_when_it_fails(
    autojump_clock: MockClock,
) -> None:
    async def fails_later() -> None:
        await trio.sleep(2)
        raise ERROR.with_traceback(None)

    async def leaves_it(ctx: StageContext) -> StageOutput:
        ctx.nursery.start_soon(fails_later)
        return StageOutput.ok(n=ctx.data)

    error = await failure_of(mapping(leaves_it, [7]))
    assert ERROR in leaves(error.original)
    results = await mapping(leaves_it, [7], tolerate=1).run()
    assert results.records["m[0]"].state is FAILED
    assert results.status is RunStatus.PARTIAL


async def test_a_failed_item_that_is_a_pipeline_keeps_its_results(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", double).with_stage("b", raises(ERROR), after="a")
    error = await failure_of(mapping(child, [4]))
    assert error.original is ERROR
    item = error.results.records["m[0]"]
    (results,) = item.details.children
    assert results["a"]["n"] == 8
    assert states(results) == {"a": OK, "b": FAILED}
    assert item.cause is not None
    assert item.cause.stage == "m[0]"
    assert "'b'" in item.cause.reason or "no such page" in item.cause.reason


async def test_an_item_that_is_a_pipeline_and_ends_in_part_makes_the_run_partial() -> None:
    child = Pipeline("child").with_stage("a", double).with_stage("b", returns(StageOutput.skip("no")), after="a")
    results = await mapping(child, [4]).run()
    assert results["m"].data == [{"a": {"n": 8}}]
    assert results.status is RunStatus.PARTIAL


async def test_a_run_is_not_partial_by_what_happened_in_an_attempt_that_was_followed_by_another(
    autojump_clock: MockClock,
) -> None:
    entered: list[int] = []

    async def skips_at_first(ctx: StageContext) -> StageOutput:
        entered.append(ctx.data)
        return StageOutput.skip("not yet") if len(entered) == 1 else StageOutput.ok(n=1)

    def breaks_at_first(_: StageContext) -> Generator[int]:
        yield 0
        if len(entered) == 1:
            raise ERROR.with_traceback(None)

    child = Pipeline("child").with_stage("a", skips_at_first).with_stage("b", gives(), after="a")
    pipeline = Pipeline("p").with_map("m", child, over=breaks_at_first, limit=1, retry=Retry(attempts=2))
    results = await pipeline.run()
    assert results.records["m"].attempts == 2
    assert results.status is RunStatus.SUCCEEDED


# Endings that are no failures


async def test_an_item_may_cancel_itself_and_nothing_else(autojump_clock: MockClock) -> None:
    results = await mapping(ends_at(1, StageOutput.cancel_branch("no more")), range(3)).run()
    assert numbers(results) == [0, None, 2]
    assert results.status is RunStatus.PARTIAL
    item = results.records["m[1]"]
    assert item.state is CANCELLED
    assert item.cause is not None
    assert (item.cause.kind, item.cause.reason) == (CauseKind.CANCEL_BRANCH, "no more")
    assert item.partial == {"begun": 1}


async def test_an_item_may_be_skipped(autojump_clock: MockClock) -> None:
    results = await mapping(ends_at(1, StageOutput.skip("nothing new")), range(3)).run()
    assert numbers(results) == [0, None, 2]
    assert results.status is RunStatus.PARTIAL
    assert results.records["m[1]"].state is SKIPPED


async def test_an_item_that_cancels_the_run_ends_it(autojump_clock: MockClock) -> None:
    pipeline = mapping(ends_at(1, StageOutput.cancel("enough")), range(8), limit=2).with_stage(
        "after", gives(), after="m"
    )
    with pytest.raises(UnifiedPipelineCancelled) as caught:
        await pipeline.run()
    results = caught.value.results
    assert caught.value.stage == "m"
    assert "enough" in caught.value.reason
    assert "m[1]" in caught.value.reason
    assert states(results) == {"m": CANCELLED, "after": SKIPPED}
    assert numbers_of(results.partial["m"]["outputs"])[0] == 0
    assert results.records["m[1]"].state is CANCELLED


async def test_a_pipeline_of_an_item_that_cancels_the_run_ends_it_too(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", ends_at(1, StageOutput.cancel("enough"), after=0.5))
    with pytest.raises(UnifiedPipelineCancelled) as caught:
        await mapping(child, range(8), limit=2).run()
    assert caught.value.stage == "m"
    assert duration(caught.value.results) == 0.5


# From outside


async def test_an_item_in_flight_is_cancelled_from_outside_and_nothing_else(autojump_clock: MockClock) -> None:
    ended = await end(mapping(naps, [3, 3, 3]), lambda _, run: run.cancel_branch("m[1]", "not this one"))
    results = ended.results
    assert numbers(results) == [3, None, 3]
    assert results.status is RunStatus.PARTIAL
    item = results.records["m[1]"]
    assert (item.state, item.partial) == (CANCELLED, {"begun": 3})
    assert item.cause is not None
    assert (item.cause.kind, item.cause.stage, item.cause.reason) == (CauseKind.CANCEL_BRANCH, None, "not this one")
    assert item.ended == results.trace.started + 1


async def test_an_item_that_is_a_pipeline_is_cancelled_from_outside(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", gives(x=1)).with_stage("b", sleeps(3), after="a")
    ended = await end(mapping(child, range(2)), lambda _, run: run.cancel_branch("m[1]", "not this one"))
    item = ended.results.records["m[1]"]
    assert ended.results["m"].data == [{"a": {"x": 1}, "b": {"by": "b"}}, None]
    assert item.state is CANCELLED
    assert item.cause is not None
    assert (item.cause.kind, item.cause.stage, item.cause.reason) == (CauseKind.CANCEL_BRANCH, None, "not this one")
    (results,) = item.details.children
    assert results["a"]["x"] == 1
    assert results.partial == {"b": {"begun": "b"}}


async def test_an_item_cancelled_before_its_turn_is_never_run(autojump_clock: MockClock) -> None:
    gauge = Gauge()
    ended = await end(
        mapping(gauge.naps, [2, 2, 2, 2], limit=1), lambda _, run: run.cancel_branch("m[2]", "not this one")
    )
    assert numbers(ended.results) == [2, 2, None, 2]
    assert duration(ended.results) == 6
    item = ended.results.records["m[2]"]
    assert (item.state, item.attempts) == (SKIPPED, 0)
    assert item.cause is not None
    assert item.cause.reason == "not this one"


async def test_an_item_cancelled_before_its_map_began_is_never_run(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("p").with_stage("first", sleeps(2)).with_map("m", naps, over=lambda _: [1, 1], after="first")
    ended = await end(pipeline, lambda _, run: run.cancel_branch("m[0]", "not this one"))
    assert numbers(ended.results) == [None, 1]


async def test_an_item_that_has_ended_cannot_be_cancelled_any_more(autojump_clock: MockClock) -> None:
    ended = await end(mapping(naps, [0.5, 3]), lambda _, run: run.cancel_branch("m[0]", "too late"))
    assert numbers(ended.results) == [0.5, 3]
    assert ended.results.status is RunStatus.SUCCEEDED


async def test_cancelling_an_item_that_never_comes_means_nothing(autojump_clock: MockClock) -> None:
    ended = await end(mapping(naps, [3]), lambda _, run: run.cancel_branch("m[99]", "not this one"))
    assert ended.results.status is RunStatus.SUCCEEDED


@pytest.mark.parametrize("name", ["n[0]", "m[x]", "m[-1]", "m[", "m[]", "m[0", "[0]", "m[0][1]", "mm"])
async def test_a_name_that_is_no_item_of_a_map_is_an_error(autojump_clock: MockClock, name: str) -> None:
    async with mapping(naps, [1]).build().open() as run:
        with pytest.raises(UnknownStageError):
            run.cancel_branch(name, "whatever")


async def test_a_stage_that_is_no_map_has_no_items_to_cancel(autojump_clock: MockClock) -> None:
    async with Pipeline("p").with_stage("plain", sleeps(1)).build().open() as run:
        with pytest.raises(UnknownStageError, match=r"plain\[0\]"):
            run.cancel_branch("plain[0]", "whatever")


async def test_an_item_is_cancelled_even_if_it_was_only_just_handed_out() -> None:
    """For a generator that is asked for the next item, the one before has started, whether or not it has run a step."""
    for _ in range(20):  # Trio shuffles
        runs: list[Run] = []

        def source(runs: list[Run] = runs) -> Generator[int]:
            yield 0
            runs[0].cancel_branch("m[0]", "not this one")
            yield 1

        async def slow(ctx: StageContext) -> StageOutput:
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            return StageOutput.ok(n=ctx.data)

        async with mapping(slow, source(), limit=2).build().open() as run:
            runs.append(run)
        assert numbers(run.results) == [None, 1]


@pytest.mark.parametrize("ending", ["scope", "run.cancel", "cancel_branch", "timeout", "deadline", "other stage"])
async def test_a_map_that_is_ended_from_outside_keeps_what_had_finished(autojump_clock: MockClock, ending: str) -> None:
    def act(scope: trio.CancelScope, run: Run) -> None:
        if ending == "scope":
            scope.cancel()
        elif ending == "run.cancel":
            run.cancel("enough")
        elif ending == "cancel_branch":
            run.cancel_branch("m", "enough")

    pipeline = Pipeline("p", deadline=1 if ending == "deadline" else None).with_stage("root", gives())
    pipeline = pipeline.with_map(
        "m", naps, over=lambda _: [0.25, 9, 0.5, 9], after="root", timeout=1 if ending == "timeout" else None
    )
    if ending == "other stage":
        pipeline = pipeline.with_stage("other", sleeps(1, ERROR), after="root")
    else:
        pipeline = pipeline.with_stage("other", sleeps(0.5), after="root")
    results = (await end(pipeline, act)).results
    record = results.records["m"]
    assert duration(results) == 1
    assert numbers_of(record.partial["outputs"]) == [0.25, None, 0.5, None]
    assert results.partial["m"] is record.partial
    assert results.records["m[0]"].output == StageOutput.ok(n=0.25)
    kinds = {
        "scope": CauseKind.CALLER,
        "run.cancel": CauseKind.CANCEL,
        "cancel_branch": CauseKind.CANCEL_BRANCH,
        "timeout": CauseKind.TIMEOUT,
        "deadline": CauseKind.DEADLINE,
        "other stage": CauseKind.FAILURE,
    }
    for number in (1, 3):
        item = results.records[f"m[{number}]"]
        assert item.state is CANCELLED
        assert item.partial == {"begun": 9}
        assert item.cause is not None
        assert item.cause.kind is kinds[ending]


async def test_every_item_that_was_cut_short_says_why_if_it_is_a_pipeline(autojump_clock: MockClock) -> None:
    child = Pipeline("child").with_stage("a", gives(x=1)).with_stage("b", sleeps(9), after="a")
    results = (await end(mapping(child, range(2)), lambda scope, _: scope.cancel())).results
    for number in range(2):
        item = results.records[f"m[{number}]"]
        assert item.state is CANCELLED
        assert item.cause is not None
        assert item.cause.kind is CauseKind.CALLER
        assert item.details.children[0]["a"]["x"] == 1


async def test_what_finished_in_an_item_in_spite_of_its_cancellation_counts(autojump_clock: MockClock) -> None:
    async def shields(ctx: StageContext) -> StageOutput:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return StageOutput.ok(n=ctx.data)

    ended = await end(mapping(shields, [7, 8]), lambda _, run: run.cancel_branch("m[1]", "not this one"))
    assert numbers(ended.results) == [7, 8]
    ended = await end(mapping(shields, [7, 8]), lambda scope, _: scope.cancel())
    assert numbers_of(ended.results.records["m"].partial["outputs"]) == [7, 8]


# Options


async def test_the_options_that_a_decorated_runner_carries_hold_for_each_item(autojump_clock: MockClock) -> None:
    tried: list[tuple[int, int]] = []

    @stage(retry=Retry(attempts=2, delay=1), timeout=5)
    async def flaky(ctx: StageContext) -> StageOutput:
        tried.append((ctx.data, ctx.attempt))
        if ctx.attempt == 1 and ctx.data == 1:
            raise ERROR.with_traceback(None)
        return StageOutput.ok(n=ctx.data)

    results = await mapping(flaky, range(3)).run()
    assert numbers(results) == [0, 1, 2]
    assert sorted(tried) == [(0, 1), (1, 1), (1, 2), (2, 1)]
    assert duration(results) == 1
    assert results.status is RunStatus.SUCCEEDED


async def test_a_map_that_is_tried_again_runs_all_of_its_items_again_under_the_same_ids_and_keys(
    autojump_clock: MockClock,
) -> None:
    seen: list[tuple[str, str]] = []

    async def fails_at_first(ctx: StageContext) -> StageOutput:
        seen.append((ctx.run_id, ctx.idempotency_key))
        if len(seen) == 3:
            raise ERROR.with_traceback(None)
        return StageOutput.ok(n=ctx.data)

    results = await mapping(fails_at_first, range(3), limit=1, retry=Retry(attempts=2, delay=1)).run()
    assert numbers(results) == [0, 1, 2]
    assert results.records["m"].attempts == 2
    assert seen[:3] == seen[3:]
    assert len({key for _, key in seen}) == 3
    assert len({run_id for run_id, _ in seen}) == 3
    assert results.status is RunStatus.SUCCEEDED
    assert results.records["m[2]"].state is OK


async def test_items_of_different_runs_have_different_keys() -> None:
    keys: list[str] = []

    async def notes(ctx: StageContext) -> None:
        keys.append(ctx.idempotency_key)

    pipeline = mapping(notes, range(2))
    await pipeline.run()
    await pipeline.run()
    assert len(set(keys)) == 4


async def test_a_map_goes_where_a_branch_has_a_deadline(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("p")
        .with_stage("a", sleeps(1))
        .with_branch(of="a", deadline=5)
        .with_map("m", naps, over=lambda _: [1], after="a")
    )
    assert duration(await pipeline.run()) == 2


async def test_an_artifact_of_an_item_is_one_of_the_run(autojump_clock: MockClock) -> None:
    async def makes(ctx: StageContext) -> StageOutput:
        ctx.add_artifact(Artifact(name=f"page {ctx.data}"))
        if ctx.data == 1:
            raise ERROR.with_traceback(None)
        return StageOutput.ok(n=ctx.data)

    results = await mapping(makes, range(2), tolerate=1).run()
    assert [artifact.name for artifact in results.artifacts] == ["page 0", "page 1"]
    child = Pipeline("child").with_stage("a", makes)
    results = await mapping(child, range(2), tolerate=1).run()
    assert [artifact.name for artifact in results.artifacts] == ["page 0", "page 1"]


async def test_a_class_of_stages_is_made_anew_for_each_item() -> None:
    class Once:
        name = "once"
        kind = StageKind.TRANSFORM

        def __init__(self) -> None:
            self.used = False

        async def execute(self, ctx: StageContext) -> StageOutput:
            assert not self.used
            self.used = True
            return StageOutput.ok(n=ctx.data)

    assert numbers(await mapping(Once, range(3)).run()) == [0, 1, 2]


async def test_a_run_may_set_another_limit_on_a_map_and_its_items_keep_theirs(autojump_clock: MockClock) -> None:
    with pytest.raises(StageTimeoutError) as caught:
        await mapping(naps, [1] * 9, limit=1).run(PipelineContext(timeouts={"m": 5}))
    assert caught.value.limit == duration(caught.value.results) == 5
    results = await mapping(naps, [29, 29], limit=1).run(PipelineContext(timeouts={"m": 60}))
    assert duration(results) == 58


async def test_items_that_are_cut_short_by_the_limit_on_all_attempts_say_so(autojump_clock: MockClock) -> None:
    error = await failure_of(mapping(naps, [1, 9], total_timeout=5))
    cause = error.results.records["m[1]"].cause
    assert cause is not None
    assert (cause.kind, cause.stage) == (CauseKind.TIMEOUT, "m")
    assert numbers_of(error.results.records["m"].partial["outputs"]) == [1, None]


async def test_a_guard_may_send_a_map_back(autojump_clock: MockClock) -> None:
    ran: list[int] = []

    async def skips_at_first(ctx: StageContext) -> StageOutput:
        ran.append(ctx.data)
        return StageOutput.skip("not yet") if ran.count(1) == 1 and ctx.data == 1 else StageOutput.ok(n=ctx.data)

    async def guard(ctx: StageContext) -> StageOutput:
        return StageOutput.retry("not all", stage="m") if None in ctx.inputs["m"].data else StageOutput.ok()

    pipeline = mapping(skips_at_first, [0, 1]).with_stage("guard", guard, after="m", retry=Retry(attempts=2))
    results = await pipeline.run()
    assert numbers(results) == [0, 1]
    assert sorted(ran) == [0, 0, 1, 1]
    assert results.records["m"].details.items == {}
    assert results.status is RunStatus.SUCCEEDED


async def test_an_item_that_is_cancelled_while_it_waits_for_a_limit_is_never_run(autojump_clock: MockClock) -> None:
    gauge = Gauge()
    pipeline = Pipeline("p", limits={"gpu": 1}).with_map(
        "m", stage(uses="gpu")(gauge.naps), over=lambda _: [3, 3, 3], limit=3
    )
    results: PipelineResults | None = None
    async with pipeline.build().open() as run:
        await trio.sleep(1)
        waiting = [number for number in range(3) if f"m[{number}]" not in gauge.of]
        run.cancel_branch(f"m[{waiting[0]}]", "not this one")
        results = run.results
    assert numbers(results).count(None) == 1
    assert gauge.most == 1
    assert duration(results) == 6
    item = results.records[f"m[{waiting[0]}]"]
    assert (item.state, item.attempts) == (SKIPPED, 0)


@pytest.mark.parametrize("policy", ["fail_fast", "drain", "isolate"])
async def test_a_map_that_failed_means_for_the_run_what_any_stage_does(autojump_clock: MockClock, policy: str) -> None:
    pipeline = (
        Pipeline("p", on_failure=policy)
        .with_map("m", ends_at(1, ERROR), over=lambda _: range(3))
        .with_stage("other", sleeps(2))
        .with_stage("next", gives(), after="other")
    )
    error = await failure_of(pipeline)
    other, following = {
        "fail_fast": (CANCELLED, SKIPPED),
        "drain": (OK, SKIPPED),
        "isolate": (OK, OK),
    }[policy]
    assert states(error.results) == {"m": FAILED, "other": other, "next": following}


@pytest.mark.parametrize("limit", [1, 2])
async def test_no_item_is_asked_for_when_a_failure_has_ended_the_map(autojump_clock: MockClock, limit: int) -> None:
    asked: list[int] = []

    def source() -> Generator[int]:
        for item in range(9):
            asked.append(item)
            yield item

    error = await failure_of(mapping(ends_at(limit - 1, ERROR, after=0.5), source(), limit=limit))
    assert asked == list(range(limit))
    assert len(error.results.records["m"].partial["outputs"]) == limit


async def test_results_pickle_with_the_records_of_items() -> None:
    child = Pipeline("child").with_stage("a", gives(x=1)).with_stage("b", raises(ERROR), after="a")
    results = await mapping(child, range(2), tolerate=2).run()
    copy = pickle.loads(pickle.dumps(results))
    assert copy["m"].data == [None, None]
    assert copy.records["m[1]"].details.children[0]["a"]["x"] == 1


async def test_the_trace_of_a_map_names_the_items_without_output() -> None:
    results = await mapping(ends_at(1, StageOutput.skip("no"), after=0), [1], tolerate=1).run()
    console = Console(width=100, file=io.StringIO())
    console.print(results.trace)
    assert isinstance(console.file, io.StringIO)
    assert "m[0]" in console.file.getvalue()


async def test_a_graph_is_as_good_a_runner_as_its_pipeline() -> None:
    graph = Pipeline("child").with_stage("a", double).build()
    results = await mapping(graph, [1]).run()
    assert results["m"].data == [{"a": {"n": 2}}]


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before a task takes the given step, counted over all tasks."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.scope, self.step, self.taken = scope, step, 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken += 1
        if self.taken == self.step:
            self.scope.cancel()


@pytest.mark.parametrize("kind", ["stage", "pipeline", "async source"])
async def test_a_cancellation_at_any_step_loses_nothing_that_an_item_had_finished(
    autojump_clock: MockClock, kind: str
) -> None:
    finished: list[int] = []

    async def one(ctx: StageContext) -> StageOutput:
        await trio.sleep(ctx.data % 3)
        finished.append(ctx.data)
        return StageOutput.ok(n=ctx.data)

    source = Source()
    child: Any = Pipeline("child").with_stage("a", one) if kind == "pipeline" else one

    def items(_: StageContext) -> Any:
        return source.async_generator() if kind == "async source" else source.generator()

    graph = Pipeline("p").with_map("m", child, over=items, limit=3).with_stage("end", gives(), after="m").build()
    before = trio.lowlevel.current_statistics().tasks_living
    statuses: list[RunStatus] = []
    step = taken = 0
    while taken >= step:
        step += 1
        finished.clear()
        source.closed.clear()
        run: Run | None = None
        scope = trio.CancelScope()
        instrument = CancelAtStep(scope, step)
        with scope:  # noqa: ASYNC912  # leaving a run is a checkpoint
            trio.lowlevel.add_instrument(instrument)
            try:
                async with graph.open() as run:
                    pass
            finally:
                trio.lowlevel.remove_instrument(instrument)
        taken = instrument.taken
        assert run is not None
        assert_whole(run.results)
        assert trio.lowlevel.current_statistics().tasks_living == before
        assert len(source.closed) <= 1
        record = run.results.records["m"]
        outputs = run.results["m"].data if "m" in run.results else record.partial.get("outputs", [])
        kept = [item if kind != "pipeline" or item is None else item["a"] for item in outputs]
        assert sorted(item["n"] for item in kept if item is not None) == sorted(finished)
        for number, item in enumerate(kept):
            assert item is None or item["n"] == number
            assert (item is None) == (number in record.details.items)
        for item_record in record.details.items.values():
            assert item_record.state in (CANCELLED, SKIPPED)
            assert item_record.cause is not None
            assert item_record.cause.kind is CauseKind.CALLER
        statuses.append(run.results.status)
    assert statuses[0] is RunStatus.INTERRUPTED
    assert statuses[-1] is RunStatus.SUCCEEDED
    assert step > 20


async def test_many_runs_of_one_graph_with_a_map_do_not_see_each_other(autojump_clock: MockClock) -> None:
    graph = Pipeline("p").with_map("m", naps, over=lambda ctx: ctx.data["items"], limit=2).build()
    found: dict[int, list[int | None]] = {}

    async def run(number: int) -> None:
        found[number] = numbers(await graph.run({"items": [number, 1, number]}))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(run, number)
    assert found == {number: [number, 1, number] for number in range(20)}


WRONG: dict[str, dict[str, Any]] = {
    "limit of zero": {"over": "x", "limit": 0},
    "limit that is no number": {"over": "x", "limit": "many"},
    "limit that is true": {"over": "x", "limit": True},
    "negative tolerance": {"over": "x", "tolerate": -1},
    "tolerance above everything": {"over": "x", "tolerate": 1.5},
    "tolerance that is true": {"over": "x", "tolerate": True},
    "tolerance in words": {"over": "x", "tolerate": "all"},
    "tolerance that is no number": {"over": "x", "tolerate": float("nan")},
    "items instead of a function": {"over": [1, 2]},
    "a coroutine function": {"over": naps},
    "a function of nothing": {"over": lambda: [1]},  # pyright: ignore[reportUnknownLambdaType]
    "empty name to go over": {"over": ""},
    "unknown option": {"over": "x", "tolerat": 1},
    "negative timeout": {"over": "x", "timeout": -1},
    "itself": {"over": "m"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_shows_where_it_is_written(wrong: str) -> None:
    with pytest.raises(DefinitionError):
        Pipeline("p").with_map("m", double, **WRONG[wrong])


@pytest.mark.parametrize(
    "option", [{"after": "x"}, {"after": "x", "join": "any"}, {"when": bool}, {"on_failure": "tolerate"}]
)
def test_an_option_that_means_nothing_for_an_item_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="means nothing for an item"):
        Pipeline("p").with_map("m", stage(**option)(double), over="x")


def test_an_unknown_stage_to_go_over_shows_when_the_pipeline_is_built() -> None:
    with pytest.raises(UnknownStageError, match="did you mean 'list'"):
        Pipeline("p").with_stage("list", gives()).with_map("m", double, over="lits").build()


async def test_a_keyboard_interrupt_in_an_item_goes_through(autojump_clock: MockClock) -> None:
    async def interrupts(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        if ctx.data == 1:
            raise KeyboardInterrupt
        await trio.sleep(9)
        return StageOutput.ok(n=1)

    seen: list[PipelineResults] = []
    with pytest.raises(KeyboardInterrupt):
        async with mapping(interrupts, range(3)).build().open() as run:
            seen.append(run.results)
    assert seen[0].status is RunStatus.FAILED
    assert seen[0].records["m"].state.settled
    assert isinstance(seen[0].records["m[1]"].error, KeyboardInterrupt)
    assert seen[0].records["m[0]"].state is StageState.CANCELLED


async def test_an_item_that_ends_is_a_sign_of_life_of_its_map(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("p").with_map("m", sleeps(3), over=lambda _: range(4), limit=1, heartbeat=4)
    assert duration(await pipeline.run()) == 12


async def test_an_item_may_be_none(autojump_clock: MockClock) -> None:
    async def tells(ctx: StageContext) -> dict[str, object]:
        return {"item": ctx.data}

    results = await Pipeline("p").with_map("m", tells, over=lambda _: [None, {}, 0]).run()
    assert results["m"].data == [{"item": None}, {"item": {}}, {"item": 0}]


async def test_a_map_keeps_to_its_source_when_it_is_composed_under_a_prefix(autojump_clock: MockClock) -> None:
    async def tells(ctx: StageContext) -> dict[str, object]:
        return {"item": ctx.data}

    part = Pipeline("part").with_stage("items", returns(StageOutput.ok([1, 2]))).with_map("m", tells, over="items")
    results = await Pipeline("whole").compose(part, prefix="left.").compose(part, prefix="right.").run()
    assert results["left.m"].data == results["right.m"].data == [{"item": 1}, {"item": 2}]
