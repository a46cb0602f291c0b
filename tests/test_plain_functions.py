"""Stages that are plain functions: in a thread, under the very same context, and in a process that can be killed.

Trio's mock clock does not wait for threads and processes, so these tests go by the real one: few and short.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from stageflow import (
    Artifact,
    CauseKind,
    ContractViolation,
    DefinitionError,
    FrozenDict,
    Pipeline,
    PipelineContext,
    ProcessContext,
    ProcessKilledError,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageTimeoutError,
    run_stage,
)
from stageflow.interceptors import TimeoutInterceptor
from tests.stages import CANCELLED, FAILED, OK, assert_whole, causes, gives, results_of, returns, states

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ABANDONED: dict[str, Any] = {"abandon_on_cancel": True}
THREADS: list[dict[str, Any]] = [{}, ABANDONED, {**ABANDONED, "timeout": 60, "heartbeat": 60}, {"retry": Retry()}]


@attrs.define
class Blocked:
    """A plain stage that blocks its thread until it is let go, and then says so."""

    began: threading.Event = attrs.field(factory=threading.Event)
    go: threading.Event = attrs.field(factory=threading.Event)
    ended: threading.Event = attrs.field(factory=threading.Event)

    def __call__(self, ctx: StageContext) -> dict[str, object]:
        ctx.save_partial(begun=True)
        self.began.set()
        self.go.wait(10)
        self.ended.set()
        return {"let": "go"}


async def set_soon(event: threading.Event) -> None:
    """Waits until an event of a thread is set."""
    assert await trio.to_thread.run_sync(event.wait, 10)


# In a thread


def nothing(ctx: StageContext) -> None:
    """A plain stage that does nothing."""


@pytest.mark.parametrize("options", THREADS)
async def test_a_plain_function_runs_in_another_thread_and_its_result_is_the_output(options: dict[str, Any]) -> None:
    def works(ctx: StageContext) -> dict[str, object]:
        return {"thread": threading.get_ident(), "rows": ctx.inputs["a"]["by"]}

    results = await Pipeline("thread").with_stage("a", gives()).with_stage("s", works, after="a", **options).run()
    assert results["s"]["rows"] == "a"
    assert results["s"]["thread"] != threading.get_ident()
    assert_whole(results)


@pytest.mark.parametrize("deadline", [None, 60])
@pytest.mark.parametrize("options", THREADS)
async def test_the_context_works_in_a_thread(options: dict[str, Any], deadline: float | None) -> None:
    left: list[bool] = []

    def works(ctx: StageContext) -> StageOutput:
        ctx.on_exit(lambda: left.append(trio.lowlevel.in_trio_run()))
        ctx.save_partial(x=1)
        ctx.heartbeat()
        ctx.add_artifact(Artifact(name="map"))
        timer = ctx.timer
        timer.extend(10)
        nearest = min(options.get("timeout", math.inf) + 10, deadline or math.inf)
        assert nearest == math.inf or nearest - 5 < timer.remaining <= nearest
        assert timer.deadline == ctx.deadline
        assert 0 <= timer.stage_elapsed <= timer.elapsed < 5
        assert not ctx.cancelled
        assert ctx.cancel_reason is None
        assert (ctx.stage, ctx.attempt, ctx.feedback, ctx.data) == ("s", 1, None, {"k": 1})
        assert dict(ctx.inputs) == {"a": StageOutput.ok(by="a")}
        assert len(ctx.idempotency_key) == 36
        assert "remaining" in repr(timer)
        return StageOutput.ok(run=ctx.run_id)

    pipeline = Pipeline("context", deadline=deadline).with_stage("a", gives())
    results = await pipeline.with_stage("s", works, after="a", **options).run({"k": 1})
    assert results["s"]["run"] == results.run_id
    assert results.records["s"].partial == {"x": 1}
    assert [artifact.stage for artifact in results.artifacts] == ["s"]
    assert left == [True]


async def test_a_thread_may_call_back_into_trio_with_its_context() -> None:
    child = Pipeline("child").with_stage("inner", gives())

    def works(ctx: StageContext) -> dict[str, object]:
        results = trio.from_thread.run(ctx.run_pipeline, child)
        trio.from_thread.run_sync(ctx.heartbeat)
        trio.from_thread.run(trio.sleep, ctx.timer.stage_elapsed * 0)
        return {"inner": results["inner"]["by"]}

    results = await Pipeline("calls").with_stage("s", works).run()
    assert results["s"]["inner"] == "inner"
    assert list(results.children) == ["s"]


@pytest.mark.parametrize(
    ("given", "state", "kind"),
    [
        (StageOutput.ok(x=1), OK, None),
        ({"x": 1}, OK, None),
        (None, OK, None),
        (StageOutput.fail("bad"), FAILED, CauseKind.FAILURE),
        (StageOutput.cancel_branch("enough"), CANCELLED, CauseKind.CANCEL_BRANCH),
        (StageOutput.cancel("enough"), CANCELLED, CauseKind.CANCEL),
        (42, FAILED, CauseKind.CONTRACT),
        (ValueError("bad"), FAILED, CauseKind.FAILURE),
    ],
)
async def test_a_plain_function_may_say_all_that_a_stage_may_say(
    given: object, state: object, kind: CauseKind | None
) -> None:
    def says(ctx: StageContext) -> object:
        if isinstance(given, Exception):
            raise given.with_traceback(None)
        return given

    results = await results_of(Pipeline("says").with_stage("s", says))
    assert states(results)["s"] is state
    assert causes(results).get("s", (None,))[0] is kind


async def test_a_plain_function_that_gives_an_awaitable_has_broken_its_contract() -> None:
    awaited = returns(1)

    def forgets(ctx: StageContext) -> object:
        return awaited(ctx)

    with pytest.raises(StageExecutionError) as caught:
        await Pipeline("forgets").with_stage("s", forgets).run()
    assert isinstance(caught.value.original, ContractViolation | TypeError)


async def test_a_plain_function_is_tried_again() -> None:
    def flaky(ctx: StageContext) -> dict[str, object]:
        if ctx.attempt < 3:
            raise OSError("line down")
        return {"attempt": ctx.attempt}

    results = await Pipeline("flaky").with_stage("s", flaky, retry=Retry()).run()
    assert results["s"]["attempt"] == 3


async def test_a_plain_function_alone_runs_as_in_a_graph() -> None:
    def looks(ctx: StageContext) -> dict[str, object]:
        return {"data": ctx.data["x"], "elapsed": ctx.timer.elapsed < 5}

    output = await run_stage(looks, {"x": 1})
    assert output.data == {"data": 1, "elapsed": True}


# Limits on what cannot be stopped


@pytest.mark.parametrize("option", ["timeout", "total_timeout", "heartbeat"])
def test_a_limit_on_a_thread_that_cannot_be_abandoned_is_refused_where_it_is_declared(option: str) -> None:
    options: dict[str, Any] = {option: 5}
    with pytest.raises(DefinitionError, match=rf"^{option}= of stage 's'.*abandon_on_cancel=True or processes=True"):
        Pipeline("wrong").with_stage("s", nothing, **options)
    Pipeline("right").with_stage("s", nothing, abandon_on_cancel=True, **options)
    options = {option: None}
    Pipeline("right").with_stage("s", nothing, **options)


async def test_a_limit_on_a_thread_that_cannot_be_abandoned_is_refused_by_the_run() -> None:
    graph = Pipeline("wrong").with_stage("s", nothing).build()
    with pytest.raises(DefinitionError, match=r"timeouts=\.\.\.\) sets a limit on stage 's'.*nothing can stop"):
        await graph.run(PipelineContext(timeouts={"s": 5}))
    assert (await graph.run(PipelineContext(timeouts={"s": None}))).status is RunStatus.SUCCEEDED
    graph = Pipeline("right").with_stage("s", nothing, abandon_on_cancel=True).build()
    assert (await graph.run(PipelineContext(timeouts={"s": 5}))).status is RunStatus.SUCCEEDED


def test_a_limit_on_a_thread_that_cannot_be_abandoned_is_refused_from_an_interceptor() -> None:
    pipeline = Pipeline("wrong", interceptors=[TimeoutInterceptor(5, names="s")])
    with pytest.raises(DefinitionError, match=r"TimeoutInterceptor sets a limit on stage 's'.*nothing can stop"):
        pipeline.with_stage("s", nothing).build()
    pipeline.with_stage("s", nothing, abandon_on_cancel=True).build()
    pipeline.with_stage("other", nothing).build()


async def test_the_default_limit_is_not_for_plain_functions() -> None:
    seen: list[float] = []

    def looks(ctx: StageContext) -> None:
        seen.append(ctx.timer.remaining)

    await (
        Pipeline("default", default_timeout=0)
        .with_stage("s", looks)
        .with_stage("abandoned", looks, after="s", abandon_on_cancel=True)
        .run()
    )
    assert seen == [math.inf] * 2


async def test_a_thread_that_cannot_be_abandoned_is_waited_for_and_its_result_counts() -> None:
    blocked = Blocked()

    async def beside(ctx: StageContext) -> None:
        await set_soon(blocked.began)
        raise ValueError("bad")

    async def lets_go(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:  # noqa: ASYNC114  # it is called here only
        task_status.started()
        await set_soon(blocked.began)
        await trio.sleep(0.02)
        assert not blocked.ended.is_set()
        blocked.go.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(lets_go)
        results = await results_of(Pipeline("waits").with_stage("s", blocked).with_stage("beside", beside))
    assert blocked.ended.is_set()
    assert states(results) == {"s": OK, "beside": FAILED}
    assert results["s"]["let"] == "go"
    assert results.records["s"].after_cancel
    assert_whole(results)


@pytest.mark.parametrize("option", ["timeout", "total_timeout", "heartbeat"])
async def test_a_thread_that_can_be_abandoned_is_left_to_itself_at_its_limit(option: str) -> None:
    blocked = Blocked()
    options: dict[str, Any] = {option: 0.02}
    with pytest.raises(StageTimeoutError) as caught:
        await Pipeline("left").with_stage("s", blocked, abandon_on_cancel=True, **options).run()
    assert not blocked.ended.is_set()
    assert (caught.value.limit, caught.value.partial) == (0.02, {"begun": True})
    assert 0.02 <= caught.value.elapsed < 5
    blocked.go.set()
    await set_soon(blocked.ended)
    assert states(caught.value.results) == {"s": FAILED}


async def test_a_thread_that_gives_signs_of_life_is_not_taken_for_dead() -> None:
    wait = threading.Event()

    def works(ctx: StageContext) -> None:
        for _ in range(6):
            wait.wait(0.05)
            ctx.heartbeat()

    results = await results_of(Pipeline("alive").with_stage("s", works, abandon_on_cancel=True, heartbeat=0.2))
    assert states(results) == {"s": OK}


async def test_an_abandoned_thread_cannot_change_what_is_written_of_its_stage() -> None:
    blocked, said = Blocked(), list[str]()
    done = threading.Event()

    def goes_on(ctx: StageContext) -> None:
        blocked(ctx)
        later: list[Callable[[], None]] = [
            lambda: ctx.save_partial(late=1),
            lambda: ctx.on_exit(print),
            lambda: ctx.timer.extend(1),
        ]
        for late in later:
            try:
                late()
            except RuntimeError as error:
                said.append(str(error))
        done.set()

    results = await results_of(Pipeline("late").with_stage("s", goes_on, abandon_on_cancel=True, timeout=0.02))
    blocked.go.set()
    await set_soon(done)
    assert len(said) == 3
    assert all("has ended" in words for words in said)
    assert results.records["s"].partial == {"begun": True}


@pytest.mark.parametrize("option", ["abandon_on_cancel", "processes"])
def test_what_is_for_plain_functions_is_refused_for_async_ones(option: str) -> None:
    options: dict[str, Any] = {option: True}
    with pytest.raises(DefinitionError, match=f"{option}= of stage 's' is for plain functions"):
        Pipeline("wrong").with_stage("s", gives(), **options)


# In a process


@attrs.define
class Written:
    """A plain function that pickles as its source: a worker process need not be able to import this module."""

    source: str

    def __call__(self, ctx: ProcessContext) -> object:
        raise AssertionError("it ran in this process")

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, (self.source,)


async def in_process(source: str, ctx: Mapping[str, object] | None = None, **options: Any) -> StageOutput:
    """Runs a stage in a worker process, after another stage."""
    pytest.importorskip("trio_parallel")
    function: Any = Written(source)
    pipeline = Pipeline("process").with_stage("a", gives())
    with trio.fail_after(60):
        results = await pipeline.with_stage("s", function, after="a", processes=True, **options).run(ctx)
    return results["s"]


async def test_a_process_gets_a_copy_of_the_context_and_gives_the_output() -> None:
    source = """lambda ctx: {
        "type": type(ctx).__name__, "pid": __import__("os").getpid(), "data": ctx.data, "inputs": ctx.inputs["a"]["by"],
        "stage": ctx.stage, "attempt": ctx.attempt, "key": ctx.idempotency_key, "feedback": ctx.feedback,
    }"""
    output = await in_process(source, {"x": [1]})
    assert output["pid"] != os.getpid()
    assert len(output["key"]) == 36
    assert {name: value for name, value in output.data.items() if name not in {"pid", "key"}} == {
        "type": "ProcessContext",
        "data": {"x": [1]},
        "inputs": "a",
        "stage": "s",
        "attempt": 1,
        "feedback": None,
    }
    assert type(output["data"]) is FrozenDict


async def test_what_a_process_raises_is_the_failure_of_its_stage() -> None:
    with pytest.raises(StageExecutionError, match="ZeroDivisionError") as caught:
        await in_process("lambda ctx: 1 // 0")
    assert isinstance(caught.value.original, ZeroDivisionError)


@pytest.mark.parametrize(
    ("death", "code", "words"),
    [
        ("os._exit(3)", 3, "exit code 3"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, r"exit code -9 \(signal 9\)"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="there are no signals")
async def test_a_process_that_dies_is_a_failure_that_names_its_exit_code(death: str, code: int, words: str) -> None:
    source = f"lambda ctx: [os := __import__('os'), {death}]"
    with pytest.raises(StageExecutionError, match=rf"process of stage 's' died with {words}") as caught:
        await in_process(source)
    original = caught.value.original
    assert isinstance(original, ProcessKilledError)
    assert (original.stage, original.exit_code) == ("s", code)
    assert original.__cause__ is not None
    assert causes(caught.value.results) == {"s": (CauseKind.FAILURE, "s")}


async def test_after_a_process_has_died_the_stage_can_be_tried_again_in_another() -> None:
    source = "lambda ctx: {'attempt': ctx.attempt} if ctx.attempt > 1 else __import__('os')._exit(3)"
    assert (await in_process(source, retry=Retry(on=ProcessKilledError)))["attempt"] == 2


async def test_a_process_is_killed_at_its_limit(tmp_path: os.PathLike[str]) -> None:
    path = os.fspath(tmp_path) + "/pid"
    source = f"lambda ctx: [open({path!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep(60)]"
    await in_process("lambda ctx: {}")  # so that a worker is there, and takes no part of the time
    with pytest.raises(StageTimeoutError) as caught:
        await in_process(source, timeout=0.5)
    assert 0.5 <= caught.value.elapsed < 20
    assert caught.value.limit == 0.5
    pid = int(await trio.Path(path).read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_default_limit_is_not_for_processes() -> None:
    pytest.importorskip("trio_parallel")
    function: Any = Written("lambda ctx: {}")
    pipeline = Pipeline("default", default_timeout=0).with_stage("s", function, processes=True)
    assert (await pipeline.run()).status is RunStatus.SUCCEEDED


def test_a_process_cannot_give_signs_of_life_nor_be_abandoned() -> None:
    pytest.importorskip("trio_parallel")
    with pytest.raises(DefinitionError, match="signs of life"):
        Pipeline("wrong").with_stage("s", nothing, processes=True, heartbeat=5)
    with pytest.raises(DefinitionError, match="leave out abandon_on_cancel="):
        Pipeline("wrong").with_stage("s", nothing, processes=True, abandon_on_cancel=True)


def test_without_the_extra_a_process_is_refused_and_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "trio_parallel", None)
    with pytest.raises(DefinitionError, match=r"pip install 'stageflow\[processes\]'"):
        Pipeline("wrong").with_stage("s", nothing, processes=True)
