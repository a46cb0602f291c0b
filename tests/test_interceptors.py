"""What is put around stages: the protocol, and the interceptors that come with stageflow."""

from __future__ import annotations

import logging
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from stageflow import (
    ContractViolation,
    DefinitionError,
    IdempotencyConflictError,
    Interceptor,
    Pipeline,
    PipelineContext,
    PipelineResults,
    PipelineTerminated,
    Retry,
    StageContext,
    StageExecutionError,
    StageKind,
    StageOutput,
    StageStatus,
    StageTimeoutError,
)
from stageflow.interceptors import (
    IdempotencyInterceptor,
    LoggingInterceptor,
    Metrics,
    MetricsInterceptor,
    TimeoutInterceptor,
)
from tests.stages import CANCELLED, FAILED, OK, SKIPPED, Witness, duration, gives, raises, results_of, sleeps, states

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from stageflow.stages import Body, Proceed


def around(body: Body, *interceptors: Interceptor, **options: Any) -> Pipeline:
    """A pipeline of one stage, `s`, with interceptors around it, outermost first."""
    return Pipeline("p", interceptors=interceptors).with_stage("s", body, **options)


async def fails(pipeline: Pipeline, ctx: PipelineContext | Mapping[str, Any] | None = None) -> StageExecutionError:
    """Runs it, and gives the error with which a stage of it fails."""
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run(ctx)
    return caught.value


def flaky(*endings: StageOutput | Exception | float) -> Body:
    """A stage that ends like this at its first attempt, like that at its second; a number is a sleep before success."""

    async def body(ctx: StageContext) -> StageOutput:
        ending = endings[ctx.attempt - 1]
        if isinstance(ending, Exception):
            raise ending.with_traceback(None)
        if isinstance(ending, StageOutput):
            return ending
        await trio.sleep(ending)
        return StageOutput.ok(attempt=ctx.attempt)

    return body


# The protocol


@attrs.define
class Noting:
    """Notes when it is entered and left."""

    name: str
    notes: list[str]

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> StageOutput:
        self.notes.append(f"> {self.name}")
        try:
            return await proceed()
        finally:
            self.notes.append(f"< {self.name}")


async def test_interceptors_are_put_around_a_stage_in_the_order_given_outermost_first() -> None:
    notes: list[str] = []

    async def body(ctx: StageContext) -> None:
        notes.append("stage")

    await around(body, Noting("a", notes), Noting("b", notes), Noting("c", notes)).run()
    assert notes == ["> a", "> b", "> c", "stage", "< c", "< b", "< a"]


async def test_an_async_function_is_an_interceptor() -> None:
    async def adds(ctx: StageContext, proceed: Proceed) -> dict[str, Any]:
        return {**await proceed(), "seen": ctx.stage}

    results = await around(gives(rows=1), adds).run()
    assert results["s"].data == {"rows": 1, "seen": "s"}


async def test_proceeding_gives_an_output_whatever_the_stage_returns() -> None:
    seen: list[StageOutput] = []

    async def looks(ctx: StageContext, proceed: Proceed) -> StageOutput:
        seen.append(await proceed())
        return seen[-1]

    async def mapping(ctx: StageContext) -> dict[str, int]:
        return {"rows": 1}

    async def nothing(ctx: StageContext) -> None:
        pass

    pipeline = Pipeline("p", interceptors=[looks]).with_stage("a", mapping).with_stage("b", nothing, after="a")
    results = await pipeline.run()
    assert seen == [StageOutput.ok(rows=1), StageOutput.ok()]
    assert dict(results) == {"a": seen[0], "b": seen[1]}


async def test_one_that_raises_fails_the_stage() -> None:
    broken = ValueError("not today")

    async def refuses(ctx: StageContext, proceed: Proceed) -> StageOutput:
        await proceed()
        raise broken

    witness = Witness()
    error = await fails(around(witness.of(gives()), refuses))
    assert error.original is broken
    assert error.stage == "s"
    assert witness.entered == ["s"]


async def test_one_that_does_not_proceed_decides_the_output() -> None:
    async def decides(ctx: StageContext, proceed: Proceed) -> dict[str, Any]:
        return {"instead": True}

    async def skips(ctx: StageContext, proceed: Proceed) -> StageOutput:
        return StageOutput.skip("not today")

    witness = Witness()
    results = await around(witness.of(gives()), decides).run()
    assert results["s"].data == {"instead": True}
    results = await around(witness.of(gives()), skips).run()
    assert states(results) == {"s": SKIPPED}
    assert witness.entered == []


async def test_one_may_proceed_twice() -> None:
    async def insists(ctx: StageContext, proceed: Proceed) -> StageOutput:
        await proceed()
        return await proceed()

    witness = Witness()
    notes: list[str] = []
    results = await around(witness.of(gives()), insists, Noting("inner", notes)).run()
    assert witness.entered == ["s", "s"]
    assert notes == ["> inner", "< inner"] * 2
    assert results.records["s"].attempts == 1


async def test_one_may_turn_a_failure_into_success() -> None:
    async def saves(ctx: StageContext, proceed: Proceed) -> StageOutput:
        try:
            return await proceed()
        except ConnectionError as error:
            return StageOutput.ok(instead=str(error))

    results = await around(raises(ConnectionError("no line")), saves).run()
    assert results["s"].data == {"instead": "no line"}


@pytest.mark.parametrize("rubbish", ["a string", 42, cast("Any", StageOutput(StageStatus.FAIL))])
async def test_what_no_stage_may_return_fails_where_it_is_returned(rubbish: object) -> None:
    caught: list[Exception] = []

    async def catches(ctx: StageContext, proceed: Proceed) -> object:
        try:
            return await proceed()
        except ContractViolation as error:
            caught.append(error)
            return rubbish

    async def body(ctx: StageContext) -> object:
        return rubbish

    error = await fails(around(body, catches))
    assert isinstance(error.original, ContractViolation)
    assert len(caught) == 1
    assert error.original is not caught[0]


async def test_they_wrap_every_attempt() -> None:
    seen: list[tuple[int, str]] = []

    async def looks(ctx: StageContext, proceed: Proceed) -> StageOutput:
        try:
            output = await proceed()
        except OSError:
            seen.append((ctx.attempt, "raised"))
            raise
        seen.append((ctx.attempt, output.status.value))
        return output

    body = flaky(OSError("gone"), StageOutput.retry("not good enough"), 0)
    results = await around(body, looks, retry=Retry(attempts=3)).run()
    assert seen == [(1, "raised"), (2, "retry"), (3, "ok")]
    assert results["s"]["attempt"] == 3


async def test_what_one_makes_of_an_attempt_decides_whether_there_is_another() -> None:
    async def insists(ctx: StageContext, proceed: Proceed) -> StageOutput:
        output = await proceed()
        return output if ctx.attempt == 3 else StageOutput.retry(f"attempt {ctx.attempt} will not do")

    results = await around(gives(), insists, retry=Retry(attempts=3)).run()
    assert results.records["s"].attempts == 3


async def test_they_are_not_asked_about_a_stage_that_is_not_entered() -> None:
    notes: list[str] = []
    pipeline = (
        Pipeline("p", interceptors=[Noting("i", notes)])
        .with_stage("a", gives(), when=lambda ctx: False)
        .with_stage("b", gives(), after="a")
    )
    assert states(await pipeline.run()) == {"a": SKIPPED, "b": SKIPPED}
    assert notes == []


async def test_they_are_under_the_limit_of_the_attempt(autojump_clock: MockClock) -> None:
    async def dawdles(ctx: StageContext, proceed: Proceed) -> StageOutput:
        await trio.sleep(3)
        return await proceed()

    error = await fails(around(sleeps(3), dawdles, timeout=5))
    assert isinstance(error, StageTimeoutError)
    assert (error.limit, error.elapsed) == (5, 5)


@pytest.mark.parametrize("kind", [TimeoutInterceptor, LoggingInterceptor, MetricsInterceptor, IdempotencyInterceptor])
async def test_those_that_come_with_stageflow_pass_on_what_the_stage_returns_and_raises(kind: type) -> None:
    one = {
        TimeoutInterceptor: TimeoutInterceptor(5),
        LoggingInterceptor: LoggingInterceptor(),
        MetricsInterceptor: MetricsInterceptor(Counts()),
        IdempotencyInterceptor: IdempotencyInterceptor(lambda ctx: "key"),
    }[kind]
    assert isinstance(one, Interceptor)
    output, error = StageOutput.ok(rows=[1, 2]), ValueError("bad")

    async def body(ctx: StageContext) -> StageOutput:
        return output

    assert (await fails(around(raises(error), one))).original is error
    assert states(await results_of(around(raises(trio.TooSlowError()), one))) == {"s": FAILED}
    assert (await around(body, one).run())["s"] is output


# Bad arguments


def no_argument() -> str:
    return ""


async def asynchronous(ctx: StageContext) -> str:
    return ""


class CountsOnly:
    def count(self, name: str, value: int, labels: Mapping[str, str]) -> None: ...


class Waits:
    async def count(self, name: str, value: int, labels: Mapping[str, str]) -> None: ...
    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...


NO_FUNCTION = "takes a plain function of the stage's context, not"
BAD: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any], str]] = [
    (TimeoutInterceptor, ("5",), {}, "TimeoutInterceptor() takes seconds, or None for no limit, not '5'"),
    (TimeoutInterceptor, (True,), {}, "TimeoutInterceptor() takes seconds, or None for no limit, not True"),
    (TimeoutInterceptor, (-1,), {}, "TimeoutInterceptor() cannot be negative: -1"),
    (TimeoutInterceptor, (None,), {}, "TimeoutInterceptor() takes seconds; None would limit nothing"),
    (TimeoutInterceptor, (math.inf,), {}, "TimeoutInterceptor() takes seconds; inf would limit nothing"),
    (TimeoutInterceptor, (5,), {"names": [" a"]}, "TimeoutInterceptor(names=...) needs a name without white space"),
    (TimeoutInterceptor, (5,), {"names": [5]}, "TimeoutInterceptor(names=...) needs a name, which is a string, not 5"),
    (TimeoutInterceptor, (5,), {"names": 5}, "TimeoutInterceptor(names=...) takes a stage's name, or a list of these"),
    (TimeoutInterceptor, (5,), {"names": {"a": 5}}, "or a list of these, not {'a': 5}"),
    (TimeoutInterceptor, (5,), {"kinds": "agnet"}, "(kinds=...) is 'agnet', which is not known; did you mean 'agent'?"),
    (TimeoutInterceptor, (5,), {"kinds": [5]}, "TimeoutInterceptor(kinds=...) is 5, which is not known"),
    (TimeoutInterceptor, (5,), {"kinds": 5}, "(kinds=...) takes a StageKind or its name, or a list of these, not 5"),
    (LoggingInterceptor, ("stageflow",), {}, "LoggingInterceptor() takes a logging.Logger, not 'stageflow'"),
    (LoggingInterceptor, (), {"level": "INFO"}, "LoggingInterceptor(level=...) takes a number such as logging.INFO"),
    (LoggingInterceptor, (), {"level": True}, "LoggingInterceptor(level=...) takes a number such as logging.INFO"),
    (LoggingInterceptor, (), {"payloads": 1}, "LoggingInterceptor(payloads=...) takes True or False, not 1"),
    (MetricsInterceptor, (None,), {}, "MetricsInterceptor() takes an object with the methods count("),
    (MetricsInterceptor, (CountsOnly(),), {}, "and record(name, value, labels), not <"),
    (MetricsInterceptor, (Waits,), {}, "and record(name, value, labels), not type Waits"),
    (MetricsInterceptor, (Waits(),), {}, "as plain functions, which method Waits.count is not"),
    (IdempotencyInterceptor, ("key",), {}, f"IdempotencyInterceptor(key=...) {NO_FUNCTION} 'key'"),
    (IdempotencyInterceptor, (None,), {}, f"IdempotencyInterceptor(key=...) {NO_FUNCTION} None"),
    (IdempotencyInterceptor, (no_argument,), {}, f"(key=...) {NO_FUNCTION} function no_argument"),
    (IdempotencyInterceptor, (asynchronous,), {}, f"(key=...) {NO_FUNCTION} function asynchronous"),
    (IdempotencyInterceptor, (str,), {"parameters": asynchronous}, f"(parameters=...) {NO_FUNCTION} function async"),
    (IdempotencyInterceptor, (str,), {"parameters": 5}, f"IdempotencyInterceptor(parameters=...) {NO_FUNCTION} 5"),
    (IdempotencyInterceptor, (str,), {"names": [""]}, "IdempotencyInterceptor(names=...) needs a name without white"),
    (IdempotencyInterceptor, (str,), {"keep": 0}, "(keep=...) needs a whole number of at least 1, not 0"),
    (IdempotencyInterceptor, (str,), {"keep": math.inf}, "(keep=...) needs a whole number of at least 1, not inf"),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "message"), BAD)
def test_a_bad_argument_is_found_at_construction(
    kind: Callable[..., object], arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DefinitionError) as caught:
        kind(*arguments, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [TimeoutInterceptor, LoggingInterceptor, MetricsInterceptor, IdempotencyInterceptor])
def test_what_is_optional_goes_by_name(kind: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        kind(5, 5)


# TimeoutInterceptor


async def test_its_limit_is_the_engines(autojump_clock: MockClock) -> None:
    error = await fails(around(sleeps(9), TimeoutInterceptor(2)))
    assert isinstance(error, StageTimeoutError)
    assert (error.stage, error.limit, error.elapsed) == ("s", 2, 2)
    assert error.source == "TimeoutInterceptor of the pipeline"
    assert error.partial == {"begun": "s"}
    assert duration(error.results) == 2


@pytest.mark.parametrize(
    ("declared", "interceptors", "limit", "source"),
    [
        (5, [3], 3, "TimeoutInterceptor"),
        (3, [5], 3, "timeout= of stage 's'"),
        (3, [3], 3, "timeout= of stage 's'"),
        (None, [5], 5, "TimeoutInterceptor"),
        (9, [5, 3, 7], 3, "TimeoutInterceptor"),
        (9, [0], 0, "TimeoutInterceptor"),
    ],
)
async def test_the_nearest_limit_wins(
    autojump_clock: MockClock, declared: float | None, interceptors: list[float], limit: float, source: str
) -> None:
    error = await fails(around(sleeps(20), *map(TimeoutInterceptor, interceptors), timeout=declared))
    assert isinstance(error, StageTimeoutError)
    assert (error.limit, error.elapsed) == (limit, limit)
    assert error.source.startswith(source)


async def test_it_cannot_lengthen_the_default_limit(autojump_clock: MockClock) -> None:
    error = await fails(around(sleeps(99), TimeoutInterceptor(60)))
    assert isinstance(error, StageTimeoutError)
    assert (error.limit, error.source) == (30, "default_timeout= of the pipeline")


async def test_the_stage_sees_its_limit_and_can_extend_it(autojump_clock: MockClock) -> None:
    async def body(ctx: StageContext) -> dict[str, float]:
        remaining = ctx.timer.remaining
        ctx.timer.extend(3)
        await trio.sleep(4)
        return {"remaining": remaining}

    results = await around(body, TimeoutInterceptor(2)).run()
    assert results["s"]["remaining"] == 2


async def test_its_limit_is_on_each_attempt(autojump_clock: MockClock) -> None:
    results = await around(flaky(9, 9, 1), TimeoutInterceptor(2), retry=Retry(attempts=3)).run()
    assert duration(results) == 2 + 2 + 1


async def test_its_limit_covers_all_interceptors_wherever_it_stands(autojump_clock: MockClock) -> None:
    async def dawdles(ctx: StageContext, proceed: Proceed) -> StageOutput:
        await trio.sleep(9)
        return await proceed()

    error = await fails(around(gives(), dawdles, TimeoutInterceptor(2)))
    assert isinstance(error, StageTimeoutError)
    assert error.elapsed == 2


@pytest.mark.parametrize(
    ("options", "limited"),
    [
        ({}, {"a", "b", "c"}),
        ({"names": "a"}, {"a"}),
        ({"names": ["a", "c"]}, {"a", "c"}),
        ({"names": ["elsewhere"]}, set[str]()),
        ({"kinds": "agent"}, {"b"}),
        ({"kinds": StageKind.AGENT}, {"b"}),
        ({"kinds": [StageKind.AGENT, "guard"]}, {"b", "c"}),
        ({"names": ("a",), "kinds": ("agent",)}, {"a", "b"}),
    ],
)
async def test_it_is_for_the_stages_chosen_by_name_or_kind(
    autojump_clock: MockClock, options: dict[str, Any], limited: set[str]
) -> None:
    pipeline = Pipeline("p", interceptors=[TimeoutInterceptor(2, **options)])
    for name, kind in {"a": StageKind.WORK, "b": StageKind.AGENT, "c": StageKind.GUARD}.items():
        pipeline = pipeline.with_stage(name, sleeps(3), kind=kind, on_failure="tolerate")
    results = await pipeline.run()
    assert {name for name, state in states(results).items() if state is FAILED} == limited


async def test_it_shortens_what_a_run_says_of_a_stage_as_well(autojump_clock: MockClock) -> None:
    graph = around(sleeps(9), TimeoutInterceptor(2)).build()
    for said in (None, 5):
        with pytest.raises(StageTimeoutError) as caught:
            await graph.run(PipelineContext(timeouts={"s": said}))
        assert (caught.value.limit, caught.value.source) == (2, "TimeoutInterceptor of the pipeline")
    with pytest.raises(StageTimeoutError) as caught:
        await graph.run(PipelineContext(timeouts={"s": 1}))
    assert (caught.value.limit, caught.value.source) == (1, "timeouts= of the PipelineContext")


async def test_what_runs_in_a_thread_that_nothing_can_stop_gets_no_limit() -> None:
    def plain(ctx: StageContext) -> None: ...

    with pytest.raises(DefinitionError, match="TimeoutInterceptor sets a limit on stage 's'"):
        around(cast("Any", plain), TimeoutInterceptor(2, names="s")).build()
    around(cast("Any", plain), TimeoutInterceptor(2, names="other")).build()
    around(cast("Any", plain), TimeoutInterceptor(2)).build()  # which is for what the default limit is for


def test_it_says_what_it_is() -> None:
    shown = "TimeoutInterceptor(seconds=2.0, names=('a',), kinds=(<StageKind.AGENT: 'agent'>,))"
    assert repr(TimeoutInterceptor(2, names="a", kinds="agent")) == shown


# LoggingInterceptor

LOGGER = logging.getLogger("stageflow.tests")
FIELDS = ("pipeline", "stage", "run_id", "correlation_id", "tenant", "attempt")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What stageflow has put on a record."""
    return {name: value for name, value in vars(record).items() if name.startswith("stageflow_")}


def shown(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The levels and messages of what was logged."""
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="stageflow")
    return caplog


async def test_one_record_tells_of_the_start_and_one_of_the_end(
    autojump_clock: MockClock, log: pytest.LogCaptureFixture
) -> None:
    await around(sleeps(1.5), LoggingInterceptor()).run()
    assert shown(log) == [
        ("DEBUG", "stage 's' of pipeline 'p', attempt 1: started"),
        ("INFO", "stage 's' of pipeline 'p', attempt 1: ok after 1.500 s"),
    ]
    assert {record.name for record in log.records} == {"stageflow"}


async def test_records_carry_what_is_known_as_attributes(
    autojump_clock: MockClock, log: pytest.LogCaptureFixture
) -> None:
    context = PipelineContext(run_id="r1", correlation_id="c1", tenant="acme", data={"secret": 1})
    await around(sleeps(1.5), LoggingInterceptor()).run(context)
    known = dict(zip([f"stageflow_{name}" for name in FIELDS], ["p", "s", "r1", "c1", "acme", 1], strict=True))
    started, ended = log.records
    assert fields(started) == {**known, "stageflow_status": "started"}
    assert fields(ended) == {**known, "stageflow_status": "ok", "stageflow_duration": 1.5}


@pytest.mark.parametrize(
    "body", [gives(secret="hush"), flaky(StageOutput.fail("broken", secret="hush"))], ids=["ok", "fail"]
)
async def test_no_payload_is_logged_by_default(log: pytest.LogCaptureFixture, body: Body) -> None:
    await results_of(around(body, LoggingInterceptor()), {"secret": "hush"})
    assert len(log.records) == 2
    assert not any("hush" in repr(vars(record)) + record.getMessage() for record in log.records)


async def test_payloads_are_logged_if_asked_for_and_not_in_the_message(log: pytest.LogCaptureFixture) -> None:
    await around(gives(rows=[1, 2]), LoggingInterceptor(payloads=True)).run()
    started, ended = log.records
    assert not hasattr(started, "stageflow_data")
    assert fields(ended)["stageflow_data"] == {"rows": [1, 2]}
    assert "rows" not in ended.getMessage()


@pytest.mark.parametrize(
    ("body", "level", "status", "message", "exc_info"),
    [
        (gives(), "ERROR", "ok", "ok after 0.000 s", False),
        (flaky(StageOutput.skip("nothing new")), "ERROR", "skip", "skip after 0.000 s: nothing new", False),
        (flaky(StageOutput.cancel("enough")), "ERROR", "cancel", "cancel after 0.000 s: enough", False),
        (flaky(StageOutput.fail("broken")), "WARNING", "fail", "fail after 0.000 s: broken", True),
        (flaky(StageOutput.retry("again")), "WARNING", "retry", "retry after 0.000 s: again", False),
        (raises(OSError("gone")), "WARNING", "error", "error after 0.000 s", True),
    ],
)
async def test_the_level_of_the_end_says_whether_it_is_trouble(
    autojump_clock: MockClock,
    log: pytest.LogCaptureFixture,
    body: Body,
    level: str,
    status: str,
    message: str,
    exc_info: bool,
) -> None:
    await results_of(around(body, LoggingInterceptor(level=logging.ERROR)))
    ended = log.records[-1]
    assert shown(log)[-1] == (level, f"stage 's' of pipeline 'p', attempt 1: {message}")
    assert fields(ended)["stageflow_status"] == status
    assert bool(ended.exc_info) is exc_info


async def test_an_error_is_logged_with_itself_and_raised(log: pytest.LogCaptureFixture) -> None:
    error = OSError("gone")
    assert (await fails(around(raises(error), LoggingInterceptor()))).original is error
    exc_info = log.records[-1].exc_info
    assert exc_info is not None
    assert exc_info[1] is error


async def test_each_attempt_is_logged(autojump_clock: MockClock, log: pytest.LogCaptureFixture) -> None:
    body = flaky(OSError("gone"), StageOutput.retry("not good enough"), 2)
    await around(body, LoggingInterceptor(), retry=Retry(attempts=3, delay=1)).run()
    ends = [fields(record) for record in log.records if fields(record)["stageflow_status"] != "started"]
    assert [(end["stageflow_attempt"], end["stageflow_status"], end["stageflow_duration"]) for end in ends] == [
        (1, "error", 0),
        (2, "retry", 0),
        (3, "ok", 2),
    ]


async def test_a_cancellation_is_logged_at_debug_and_goes_on(
    autojump_clock: MockClock, log: pytest.LogCaptureFixture
) -> None:
    with trio.move_on_after(2) as scope:
        await around(sleeps(9), LoggingInterceptor(level=logging.ERROR)).run()
    assert scope.cancelled_caught
    reason = "a cancel scope around the run was cancelled"
    assert shown(log)[-1] == ("DEBUG", f"stage 's' of pipeline 'p', attempt 1: cancelled after 2.000 s: {reason}")
    assert log.records[-1].exc_info is None


async def test_an_attempt_at_its_limit_is_cancelled_as_the_log_sees_it(
    autojump_clock: MockClock, log: pytest.LogCaptureFixture
) -> None:
    await fails(around(sleeps(9), LoggingInterceptor(), timeout=2))
    assert shown(log)[-1] == (
        "DEBUG",
        "stage 's' of pipeline 'p', attempt 1: cancelled after 2.000 s: ran longer than its limit of 2 s",
    )


def group_of_cancellation_and(*errors: BaseException) -> Body:
    """A stage whose nursery is cancelled, and gives these errors as well."""

    async def raises_this(error: BaseException) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise error

    async def body(ctx: StageContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            for error in errors:
                nursery.start_soon(raises_this, error)

    return body


async def test_a_group_of_cancellations_is_a_cancellation_and_a_mixed_one_is_an_error(
    autojump_clock: MockClock, log: pytest.LogCaptureFixture
) -> None:
    statuses: list[str] = []
    for body in (group_of_cancellation_and(), group_of_cancellation_and(ValueError("bad"))):
        with trio.move_on_after(2):
            await results_of(around(body, LoggingInterceptor()))
        statuses.append(fields(log.records[-1])["stageflow_status"])
    assert statuses == ["cancelled", "error"]


async def test_what_the_logger_is_not_enabled_for_is_not_even_put_together(caplog: pytest.LogCaptureFixture) -> None:
    class Unread:
        @property
        def pipeline(self) -> str:
            raise AssertionError("nobody wants to know")

    async def proceed() -> StageOutput:
        return StageOutput.ok()

    async def breaks() -> StageOutput:
        raise ValueError("bad")

    caplog.set_level(logging.CRITICAL, logger="stageflow")
    silent = LoggingInterceptor()
    await silent(cast("StageContext", Unread()), proceed)
    with pytest.raises(ValueError, match="bad"):
        await silent(cast("StageContext", Unread()), breaks)
    caplog.set_level(logging.INFO, logger="stageflow")
    with pytest.raises(AssertionError):
        await silent(cast("StageContext", Unread()), proceed)


async def test_it_logs_where_it_is_told_to(log: pytest.LogCaptureFixture) -> None:
    await around(gives(), LoggingInterceptor(LOGGER, level=logging.DEBUG)).run()
    assert [(record.name, record.levelname) for record in log.records] == [("stageflow.tests", "DEBUG")] * 2


# MetricsInterceptor


@attrs.define
class Counts:
    """Keeps numbers the way a library of metrics does."""

    counted: dict[tuple[str, ...], int] = attrs.field(factory=dict[tuple[str, ...], int])
    recorded: list[tuple[str, float, str]] = attrs.field(factory=list[tuple[str, float, str]])
    keys: dict[str, set[tuple[str, ...]]] = attrs.field(factory=dict[str, set[tuple[str, ...]]])

    def count(self, name: str, value: int, labels: Mapping[str, str]) -> None:
        self.keys.setdefault(name, set()).add(tuple(labels))
        series = (name.removeprefix("stageflow_attempts_"), *list(labels.values())[1:])
        self.counted[series] = self.counted.get(series, 0) + value

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.keys.setdefault(name, set()).add(tuple(labels))
        self.recorded.append((labels["stage"], value, labels["status"]))


async def test_attempts_are_counted_and_measured_by_how_they_end(autojump_clock: MockClock) -> None:
    counts = Counts()
    endings = flaky(OSError("gone"), StageOutput.retry("not good enough"), StageOutput.fail("x", recoverable=True), 2)
    await around(endings, MetricsInterceptor(counts), retry=Retry(attempts=4)).run()
    assert counts.counted == {
        ("started", "s"): 4,
        ("running", "s"): 0,
        ("ended", "s", "error"): 1,
        ("ended", "s", "retry"): 1,
        ("ended", "s", "fail"): 1,
        ("ended", "s", "ok"): 1,
    }
    assert counts.recorded == [("s", 0, "error"), ("s", 0, "retry"), ("s", 0, "fail"), ("s", 2, "ok")]


async def test_a_cancelled_attempt_is_counted_as_cancelled(autojump_clock: MockClock) -> None:
    counts = Counts()
    with trio.move_on_after(2) as scope:
        await around(sleeps(9), MetricsInterceptor(counts)).run()
    assert scope.cancelled_caught
    assert counts.counted == {("started", "s"): 1, ("running", "s"): 0, ("ended", "s", "cancelled"): 1}
    assert counts.recorded == [("s", 2, "cancelled")]


async def test_an_attempt_at_its_limit_is_counted_as_cancelled(autojump_clock: MockClock) -> None:
    counts = Counts()
    await fails(around(sleeps(9), MetricsInterceptor(counts), timeout=3))
    assert counts.recorded == [("s", 3, "cancelled")]


async def test_how_many_run_goes_up_and_down(autojump_clock: MockClock) -> None:
    counts = Counts()
    pipeline = Pipeline("p", interceptors=[MetricsInterceptor(counts)]).with_stage("a", sleeps(2))
    running: list[int] = []
    async with trio.open_nursery() as nursery:
        for start in range(2):
            nursery.start_soon(pipeline.run)
            await trio.testing.wait_all_tasks_blocked()
            running.append(counts.counted["running", "a"])
            await trio.sleep(1 + start / 2)
            running.append(counts.counted["running", "a"])
    assert running == [1, 1, 2, 1]
    assert counts.counted["running", "a"] == 0


async def test_labels_are_the_same_for_every_number_of_a_name_and_tell_no_run() -> None:
    counts = Counts()
    for body in (gives(), raises(OSError("gone"))):
        await results_of(around(body, MetricsInterceptor(counts)), PipelineContext(run_id="r1", tenant="acme"))
    assert counts.keys == {
        "stageflow_attempts_started": {("pipeline", "stage")},
        "stageflow_attempts_running": {("pipeline", "stage")},
        "stageflow_attempts_ended": {("pipeline", "stage", "status")},
        "stageflow_attempt_seconds": {("pipeline", "stage", "status")},
    }


async def test_what_keeps_the_numbers_fails_the_stage_if_it_raises() -> None:
    class Full(Counts):
        def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
            raise OSError("the disk is full")

    assert str((await fails(around(gives(), MetricsInterceptor(Full())))).original) == "the disk is full"


def test_metrics_is_a_protocol_that_can_be_asked_for() -> None:
    assert isinstance(Counts(), Metrics)
    assert not isinstance(CountsOnly(), Metrics)


# IdempotencyInterceptor


def key_of(ctx: StageContext) -> str | None:
    key: str | None = ctx.data["key"]
    return key


def once(**options: Any) -> IdempotencyInterceptor:
    return IdempotencyInterceptor(key_of, **options)


def calls(witness: Witness, *endings: StageOutput | Exception, seconds: float = 0) -> Body:
    """A stage that sleeps, and ends like this at the first call of all, like that at the second; later it succeeds."""

    async def body(ctx: StageContext) -> StageOutput:
        number = len(witness.entered)
        await trio.sleep(seconds)
        ending = endings[number - 1] if number <= len(endings) else StageOutput.ok(call=number)
        if isinstance(ending, Exception):
            raise ending.with_traceback(None)
        return ending

    return witness.of(body)


@attrs.define
class Caller:
    """A run beside others, in a scope of its own."""

    scope: trio.CancelScope
    ended: float = math.nan
    results: PipelineResults | None = None
    error: PipelineTerminated | None = None

    @property
    def said(self) -> Any:
        """What came of it: the output's data, the error of the stage, or that it was cancelled."""
        if self.error is not None:
            return self.error.__cause__
        return "cancelled" if self.results is None else self.results["s"].data


@attrs.define
class Callers:
    """Runs beside each other."""

    nursery: trio.Nursery
    began: float = attrs.field(factory=trio.current_time)

    async def call(self, pipeline: Pipeline, data: Mapping[str, Any] | None = None, **known: Any) -> Caller:
        """Begins one more, and lets it come to where it waits."""
        caller = Caller(trio.CancelScope())
        self.nursery.start_soon(self._run, pipeline, PipelineContext(data=data or {"key": "k"}, **known), caller)
        await trio.testing.wait_all_tasks_blocked()
        return caller

    async def _run(self, pipeline: Pipeline, context: PipelineContext, caller: Caller) -> None:
        with caller.scope:
            try:
                caller.results = await pipeline.run(context)
            except PipelineTerminated as error:
                caller.error = error
        caller.ended = trio.current_time() - self.began


@asynccontextmanager
async def callers() -> AsyncGenerator[Callers]:
    async with trio.open_nursery() as nursery:
        yield Callers(nursery)


def left(interceptor: IdempotencyInterceptor) -> tuple[int, int]:
    """How many keys are going, and how many done: nobody waits for the former when all runs have ended."""
    going: dict[Any, Any] = getattr(interceptor, "_going")  # noqa: B009
    done: dict[Any, Any] = getattr(interceptor, "_done")  # noqa: B009
    return len(going), len(done)


async def test_the_output_of_then_is_given_to_later_calls_with_that_key() -> None:
    witness = Witness()
    pipeline = around(calls(witness), once())
    first = await pipeline.run({"key": "k"})
    again = await pipeline.run({"key": "k"})
    other = await pipeline.run({"key": "other"})
    assert first["s"]["call"] == 1
    assert again["s"] is first["s"]
    assert other["s"]["call"] == 2


async def test_without_a_key_a_call_is_made_in_any_case() -> None:
    witness, interceptor = Witness(), once()
    for _ in range(2):
        await around(calls(witness), interceptor).run({"key": None})
    assert len(witness.entered) == 2
    assert left(interceptor) == (0, 0)


async def test_it_is_for_the_stages_named() -> None:
    witness = Witness()
    pipeline = Pipeline("p", interceptors=[once(names="a")])
    pipeline = pipeline.with_stage("a", witness.of(gives())).with_stage("b", witness.of(gives()), after="a")
    for _ in range(2):
        await pipeline.run({"key": "k"})
    assert witness.entered == ["a", "b", "b"]


async def test_concurrent_duplicates_are_made_once(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    pipeline = around(calls(witness, seconds=3), interceptor)
    async with callers() as beside:
        found = [await beside.call(pipeline)]
        await trio.sleep(1)
        found += [await beside.call(pipeline) for _ in range(3)]
    assert len(witness.entered) == 1
    assert [(caller.said, caller.ended) for caller in found] == [({"call": 1}, 3)] * 4
    assert left(interceptor) == (0, 1)


async def test_different_keys_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    pipeline = around(calls(Witness(), seconds=3), once())
    async with callers() as beside:
        found = [await beside.call(pipeline, {"key": key}) for key in "abc"]
    assert [caller.ended for caller in found] == [3, 3, 3]


@pytest.mark.parametrize(
    "ending",
    [ValueError("bad"), StageOutput.fail("broken"), StageOutput.skip("nothing new"), StageOutput.cancel("enough")],
)
async def test_only_success_is_remembered(ending: StageOutput | Exception) -> None:
    witness, interceptor = Witness(), once()
    pipeline = around(calls(witness, ending), interceptor)
    await results_of(pipeline, {"key": "k"})
    assert left(interceptor) == (0, 0)
    results = await pipeline.run({"key": "k"})
    assert results["s"]["call"] == 2


async def test_a_first_that_fails_hands_over_to_who_has_waited_longest(autojump_clock: MockClock) -> None:
    witness, interceptor, broken = Witness(), once(), ValueError("bad")
    pipeline = around(calls(witness, broken, seconds=3), interceptor)
    async with callers() as beside:
        found = [await beside.call(pipeline) for _ in range(3)]
        later = await beside.call(pipeline, {"key": "k"})
    assert [(caller.said, caller.ended) for caller in found] == [(broken, 3), ({"call": 2}, 6), ({"call": 2}, 6)]
    assert (later.said, later.ended) == ({"call": 2}, 6)
    assert len(witness.entered) == 2
    assert left(interceptor) == (0, 1)


async def test_every_first_that_fails_hands_over_until_nobody_waits(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    broken = [ValueError(str(number)) for number in range(3)]
    pipeline = around(calls(witness, *broken, seconds=1), interceptor)
    async with callers() as beside:
        found = [await beside.call(pipeline) for _ in range(3)]
    assert [(caller.said, caller.ended) for caller in found] == list(zip(broken, [1, 2, 3], strict=True))
    assert left(interceptor) == (0, 0)


async def test_a_first_that_is_tried_again_queues_up(autojump_clock: MockClock) -> None:
    witness = Witness()
    pipeline = around(calls(witness, OSError("gone"), seconds=1), once(), retry=Retry(attempts=2))
    async with callers() as beside:
        found = [await beside.call(pipeline) for _ in range(2)]
    assert [(caller.said, caller.ended) for caller in found] == [({"call": 2}, 2)] * 2
    attempts = [caller.results.records["s"].attempts for caller in found if caller.results is not None]
    assert attempts == [2, 1]


async def test_a_first_that_is_cancelled_hands_over(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    pipeline = around(calls(witness, seconds=3), interceptor)
    async with callers() as beside:
        found = [await beside.call(pipeline) for _ in range(3)]
        await trio.sleep(1)
        found[0].scope.cancel()
    assert [(caller.said, caller.ended) for caller in found] == [("cancelled", 1), ({"call": 2}, 4), ({"call": 2}, 4)]
    assert left(interceptor) == (0, 1)


async def test_a_first_at_its_limit_hands_over(autojump_clock: MockClock) -> None:
    interceptor = once()
    slow = around(sleeps(9), interceptor, timeout=5)
    pipeline = around(sleeps(1), interceptor, timeout=None)
    async with callers() as beside:
        first, second = await beside.call(slow), await beside.call(pipeline)
    assert isinstance(first.error, StageTimeoutError)
    assert (first.ended, second.said, second.ended) == (5, {"by": "s"}, 6)


async def test_a_first_that_is_cancelled_with_nobody_waiting_leaves_nothing(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    pipeline = around(calls(witness, seconds=3), interceptor)
    with trio.move_on_after(1):
        await pipeline.run({"key": "k"})
    assert left(interceptor) == (0, 0)
    assert (await pipeline.run({"key": "k"}))["s"]["call"] == 2


async def test_one_that_waits_and_is_cancelled_just_leaves(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    pipeline = around(calls(witness, ValueError("bad"), seconds=3), interceptor)
    async with callers() as beside:
        _, leaves, stays = [await beside.call(pipeline) for _ in range(3)]
        await trio.sleep(1)
        leaves.scope.cancel()
    assert (leaves.said, leaves.ended) == ("cancelled", 1)
    assert (stays.said, stays.ended) == ({"call": 2}, 6)
    assert len(witness.entered) == 2
    assert left(interceptor) == (0, 1)


async def test_one_that_waits_is_under_its_own_limit(autojump_clock: MockClock) -> None:
    interceptor = once()
    async with callers() as beside:
        first = await beside.call(around(sleeps(9), interceptor))
        hasty = await beside.call(around(sleeps(9), interceptor, timeout=2))
    assert isinstance(hasty.error, StageTimeoutError)
    assert (hasty.ended, first.ended) == (2, 9)


@pytest.mark.parametrize("waiting", [1, 2])
async def test_a_turn_given_to_one_that_is_cancelled_just_then_is_not_lost(
    autojump_clock: MockClock, waiting: int
) -> None:
    found: list[Caller] = []

    async def cancels_the_next(ctx: StageContext, proceed: Proceed) -> StageOutput:
        try:
            return await proceed()
        except ValueError:
            found[1].scope.cancel()  # it has its turn already, though it does not know yet
            raise

    witness, interceptor, broken = Witness(), once(), ValueError("bad")
    pipeline = around(calls(witness, broken, seconds=3), cancels_the_next, interceptor)
    async with callers() as beside:
        found += [await beside.call(pipeline) for _ in range(1 + waiting)]
    last = [({"call": 3}, 6)] if waiting == 2 else []
    assert [(caller.said, caller.ended) for caller in found] == [(broken, 3), ("cancelled", 3), *last]
    assert left(interceptor) == (0, waiting - 1)


async def test_one_that_would_get_the_output_of_then_can_be_cancelled(autojump_clock: MockClock) -> None:
    witness, interceptor = Witness(), once()
    await around(calls(witness), interceptor).run({"key": "k"})

    async def cancels(ctx: StageContext, proceed: Proceed) -> StageOutput:
        with trio.CancelScope() as scope:
            scope.cancel()
            return await proceed()
        return StageOutput.skip("cancelled")

    results = await around(calls(witness), cancels, interceptor).run({"key": "k"})
    assert states(results) == {"s": SKIPPED}
    assert left(interceptor) == (0, 1)
    assert len(witness.entered) == 1


async def test_a_success_in_spite_of_cancellation_is_remembered(autojump_clock: MockClock) -> None:
    async def stubborn(ctx: StageContext) -> StageOutput:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return StageOutput.ok(paid=True)

    witness, interceptor = Witness(), once()
    pipeline = around(witness.of(stubborn), interceptor)
    async with callers() as beside:
        first, second = await beside.call(pipeline), await beside.call(pipeline)
        first.scope.cancel()
    assert (second.said, second.ended) == ({"paid": True}, 3)
    assert len(witness.entered) == 1


async def test_the_same_key_for_something_else_is_a_conflict() -> None:
    witness = Witness()
    pipeline = around(calls(witness), once())
    await pipeline.run({"key": "k", "amount": 1})
    error = (await fails(pipeline, {"key": "k", "amount": 2})).original
    assert isinstance(error, IdempotencyConflictError)
    assert (error.key, error.stage) == ("k", "s")
    assert len(witness.entered) == 1
    assert (await pipeline.run({"key": "k", "amount": 1}))["s"]["call"] == 1


async def test_the_same_key_for_something_else_is_a_conflict_while_the_first_is_going(
    autojump_clock: MockClock,
) -> None:
    pipeline = around(calls(Witness(), seconds=3), once())
    async with callers() as beside:
        first = await beside.call(pipeline, {"key": "k", "amount": 1})
        other = await beside.call(pipeline, {"key": "k", "amount": 2})
    assert isinstance(other.said, IdempotencyConflictError)
    assert (other.ended, first.said) == (0, {"call": 1})


async def test_a_key_that_came_to_nothing_may_stand_for_something_else() -> None:
    pipeline = around(calls(Witness(), ValueError("bad")), once())
    await fails(pipeline, {"key": "k", "amount": 1})
    assert (await pipeline.run({"key": "k", "amount": 2}))["s"]["call"] == 2


async def test_what_the_inputs_carry_is_part_of_the_parameters() -> None:
    number = 0

    async def counts(ctx: StageContext) -> dict[str, int]:
        nonlocal number
        number += 1
        return {"number": number}

    pipeline = Pipeline("p", interceptors=[once(names="s")])
    pipeline = pipeline.with_stage("a", counts).with_stage("s", gives(), after="a")
    await pipeline.run({"key": "k"})
    error = await fails(pipeline, {"key": "k"})
    assert isinstance(error.original, IdempotencyConflictError)
    assert error.stage == "s"


async def test_parameters_may_be_what_one_says_they_are() -> None:
    def amount(ctx: StageContext) -> int:
        found: int = ctx.data["amount"]
        return found

    pipeline = around(calls(Witness()), once(parameters=amount))
    await pipeline.run({"key": "k", "amount": 1, "asked": "now"})
    assert (await pipeline.run({"key": "k", "amount": 1, "asked": "later"}))["s"]["call"] == 1
    error = (await fails(pipeline, {"key": "k", "amount": 2, "asked": "now"})).original
    assert isinstance(error, IdempotencyConflictError)


async def test_a_key_counts_for_one_tenant_pipeline_and_stage() -> None:
    witness, interceptor = Witness(), once()

    async def keys(tenant: str | None, pipeline: str, stage: str) -> int:
        declared = Pipeline(pipeline, interceptors=[interceptor]).with_stage(stage, calls(witness))
        results = await declared.run(PipelineContext(tenant=tenant, data={"key": "k"}))
        call: int = results[stage]["call"]
        return call

    scopes = [("acme", "p", "s"), ("other", "p", "s"), (None, "p", "s"), ("acme", "q", "s"), ("acme", "p", "t")]
    assert [await keys(*scope) for scope in scopes] == [1, 2, 3, 4, 5]
    assert [await keys(*scope) for scope in scopes] == [1, 2, 3, 4, 5]


async def test_so_many_keys_are_kept_that_were_used_last() -> None:
    witness, interceptor = Witness(), once(keep=2)
    pipeline = around(calls(witness), interceptor)
    made: list[int] = []
    for key in ["a", "b", "a", "c", "a", "b"]:  # c drives out b, for a was used after it
        made.append((await pipeline.run({"key": key}))["s"]["call"])
        assert left(interceptor)[1] <= 2
    assert made == [1, 2, 1, 3, 1, 4]


async def test_those_that_wait_get_the_output_even_if_the_key_is_not_kept(autojump_clock: MockClock) -> None:
    pipeline = around(calls(Witness(), seconds=3), once(keep=1))
    async with callers() as beside:
        found = [await beside.call(pipeline, {"key": key}) for key in ["a", "b", "a", "b"]]
    assert [caller.ended for caller in found] == [3, 3, 3, 3]


async def test_a_stage_sent_back_under_a_key_with_its_feedback_works_again() -> None:
    witness = Witness()

    async def guard(ctx: StageContext) -> StageOutput:
        return StageOutput.ok() if ctx.inputs["s"]["call"] == 2 else StageOutput.retry("do better", stage="s")

    interceptor = IdempotencyInterceptor(lambda ctx: f"{ctx.data['key']} {ctx.feedback}", names="s")
    pipeline = around(calls(witness), interceptor).with_stage("guard", guard, after="s", retry=Retry(attempts=2))
    results = await pipeline.run({"key": "k"})
    assert states(results) == {"s": OK, "guard": OK}
    assert results["s"]["call"] == 2


@pytest.mark.parametrize("key", [5, b"k", ["k"]])
async def test_a_key_that_is_no_string_fails_the_stage(key: object) -> None:
    witness = Witness()
    error = (await fails(around(calls(witness), once()), {"key": key})).original
    assert isinstance(error, TypeError)
    assert str(error).startswith(f"key= of IdempotencyInterceptor gave {key!r} for stage 's'")
    assert witness.entered == []


async def test_a_key_function_that_raises_fails_the_stage() -> None:
    error = (await fails(around(gives(), once()), {"no": "key"})).original
    assert isinstance(error, KeyError)


def test_it_remembers_from_one_trio_run_to_the_next() -> None:
    pipeline = around(calls(Witness()), once())
    assert [trio.run(pipeline.run, {"key": "k"})["s"]["call"] for _ in range(2)] == [1, 1]


async def test_a_duplicate_is_cancelled_with_its_own_run_only(autojump_clock: MockClock) -> None:
    interceptor = once()
    failing = around(sleeps(9), interceptor).with_stage("bad", sleeps(2, ValueError("bad")))
    async with callers() as beside:
        first = await beside.call(failing)
        second = await beside.call(around(sleeps(1), interceptor))
    assert first.error is not None
    assert states(first.error.results) == {"s": CANCELLED, "bad": FAILED}
    assert (second.said, second.ended) == ({"by": "s"}, 3)


@attrs.frozen
class Plan:
    """When a call begins, how long it takes if it is made, whether it succeeds then, and when it is cancelled."""

    begins: int
    takes: int
    succeeds: bool
    patience: float


PLANS = st.lists(
    st.builds(Plan, st.integers(0, 4), st.integers(0, 3), st.booleans(), st.sampled_from([0, 1, 2, 3, math.inf])),
    max_size=7,
)


@settings(max_examples=200, deadline=None)
@given(PLANS)
def test_of_all_calls_with_a_key_one_at_a_time_is_made_until_one_has_succeeded(plans: list[Plan]) -> None:
    entered: list[int] = []
    succeeded: list[int] = []
    inside = 0

    async def body(ctx: StageContext) -> StageOutput:
        nonlocal inside
        number: int = ctx.metadata["number"]
        assert (inside, succeeded) == (0, [])
        inside += 1
        entered.append(number)
        try:
            await trio.sleep(plans[number].takes)
            if not plans[number].succeeds:
                return StageOutput.fail(f"{number}")
        finally:
            inside -= 1
        succeeded.append(number)
        return StageOutput.ok(by=number)

    interceptor = once()
    pipeline = around(body, interceptor, timeout=None)
    found: dict[int, Caller] = {}

    async def begin(number: int, beside: Callers) -> None:
        plan = plans[number]
        await trio.sleep(plan.begins)
        found[number] = await beside.call(pipeline, metadata={"number": number})
        found[number].scope.deadline = plan.begins + plan.patience

    async def main() -> None:
        async with callers() as beside, trio.open_nursery() as nursery:
            for number in range(len(plans)):
                nursery.start_soon(begin, number, beside)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert left(interceptor) == (0, len(succeeded))
    for number, caller in found.items():
        if caller.results is not None:
            assert [caller.said["by"]] == succeeded
        elif caller.error is not None:
            assert str(caller.said) == f"{number}"
        else:
            assert plans[number].patience < math.inf
