"""Every error says what, where and what to do, carries that as attributes, and survives pickle and copy."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

import stageflow
from stageflow import (
    CheckpointError,
    CompensationError,
    ContractViolation,
    CycleError,
    DefinitionError,
    DuplicateStageError,
    IdempotencyConflictError,
    LeaseLostError,
    MaxDepthError,
    MissingOutputError,
    OutputConflictError,
    Pipeline,
    PipelineCancelled,
    PipelineResults,
    PipelineTerminated,
    ProcessKilledError,
    RecordedError,
    ResumeRefusedError,
    RunExistsError,
    RunParkedError,
    StageContext,
    StageExecutionError,
    StageflowError,
    StageOutput,
    StageState,
    StageTimeoutError,
    StagnationError,
    StoreError,
    TenantMismatchError,
    UnifiedPipelineCancelled,
    UnknownRunError,
    UnknownStageError,
    UnstorableValueError,
    errors,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    causes,
    gives,
    raises,
    results_of,
    returns,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stageflow.stages import Body

SHARED = ["run_id", "stage", "reason"]


def raised_by(body: Body, **options: Any) -> PipelineTerminated:
    """What a run raises in which `bad` is this, and `good` succeeded before."""
    pipeline = Pipeline("p").with_stage("good", gives(x=[1])).with_stage("bad", body, after="good", **options)
    with pytest.raises(PipelineTerminated) as caught:
        trio.run(pipeline.run)
    return caught.value


async def saves_and_sleeps(ctx: StageContext) -> None:
    ctx.save_partial(page=1)
    await trio.sleep(60)


def results() -> PipelineResults:
    return trio.run(Pipeline("p").with_stage("a", gives()).run)


SAMPLES: dict[type[StageflowError], Callable[[], StageflowError]] = {
    StageflowError: lambda: StageflowError("something"),
    DefinitionError: lambda: DefinitionError("something"),
    CycleError: lambda: CycleError(["a", "b", "a"]),
    DuplicateStageError: lambda: DuplicateStageError("twice", stage="a"),
    UnknownStageError: lambda: UnknownStageError("fetsch", ["fetch", "report"], where="after= of stage 'x'"),
    PipelineTerminated: lambda: PipelineTerminated("over", results=results(), stage="a", reason="enough"),
    StageExecutionError: lambda: raised_by(returns(StageOutput.fail(ValueError("no such page"), recoverable=True))),
    StageTimeoutError: lambda: raised_by(saves_and_sleeps, timeout=0.001),
    UnifiedPipelineCancelled: lambda: raised_by(returns(StageOutput.cancel("wrong account"))),
    ContractViolation: lambda: ContractViolation("stage 'a' returned 3", stage="a"),
    MissingOutputError: lambda: MissingOutputError("a", state=StageState.SKIPPED, reason="the stage is skipped"),
    OutputConflictError: lambda: OutputConflictError("a"),
    TenantMismatchError: lambda: TenantMismatchError("artifact 'x'", tenant="a", owner="b"),
    StagnationError: lambda: StagnationError(stage="draft", guard="check"),
    ProcessKilledError: lambda: ProcessKilledError(stage="render", exit_code=-9),
    MaxDepthError: lambda: MaxDepthError("tree", depth=17),
    IdempotencyConflictError: lambda: IdempotencyConflictError("order 7", stage="charge"),
    RecordedError: lambda: RecordedError("ValueError: no", kind="builtins:ValueError", traceback="…"),
    CompensationError: lambda: CompensationError("r"),
    CheckpointError: lambda: CheckpointError("something", run_id="r"),
    StoreError: lambda: StoreError("the disk is full"),
    UnstorableValueError: lambda: UnstorableValueError(run_id="r", stage="a", path="output.x", why="a lock"),
    LeaseLostError: lambda: LeaseLostError("r", holder="elsewhere"),
    RunExistsError: lambda: RunExistsError("r"),
    UnknownRunError: lambda: UnknownRunError("r"),
    ResumeRefusedError: lambda: ResumeRefusedError("no", run_id="r", plan=None),
    RunParkedError: lambda: RunParkedError("r", recoveries=5),
}


def tree(root: type[StageflowError]) -> list[type[StageflowError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


ALL = [kind for kind in dict.fromkeys(tree(StageflowError)) if kind.__module__.startswith("stageflow")]


def test_every_error_is_in_the_one_tree_and_public() -> None:
    in_module = {thing for _, thing in inspect.getmembers(errors, inspect.isclass) if issubclass(thing, Exception)}
    assert in_module - {stageflow.DefinitionWarning} == set(ALL)
    assert all(getattr(stageflow, kind.__name__) is kind for kind in ALL if kind is not StageflowError)
    assert set(SAMPLES) == set(ALL)
    assert PipelineCancelled is UnifiedPipelineCancelled


def test_every_error_is_drawn_at_the_head_of_its_module() -> None:
    drawn = re.findall(r"^ *[│├└─ ]*(\w+)(?= \(\w+\)| {2,}|$)", str(errors.__doc__), re.MULTILINE)
    assert {kind.__name__ for kind in ALL} <= set(drawn)


def comparable(value: Any) -> Any:
    """Something to compare that means the same before and after a copy."""
    if isinstance(value, BaseException):
        return type(value), str(value), comparable(value.__dict__)
    if isinstance(value, PipelineResults):
        return (
            {name: comparable(output) for name, output in value.items()},
            states(value),
            causes(value),
            dict(value.partial),
            value.status,
            value.run_id,
        )
    if isinstance(value, stageflow.StageRecord):
        return {field.name: comparable(getattr(value, field.name)) for field in attrs.fields(stageflow.StageRecord)}
    if issubclass(type(value), dict):
        return {key: comparable(item) for key, item in value.items()}
    if issubclass(type(value), (tuple, list)):
        return [comparable(item) for item in value]
    return value


COPIES: dict[str, Callable[[Any], Any]] = {
    # Below protocol 3, which is Python 2's, pickle itself turns a TimeoutError into an OSError.
    "pickle 3": lambda thing: pickle.loads(pickle.dumps(thing, 3)),
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickle_and_copy_with_its_attributes(kind: type[StageflowError], how: str) -> None:
    error = SAMPLES[kind]()
    assert type(error) is kind
    twin = COPIES[how](error)
    assert twin is not error
    assert comparable(twin) == comparable(error)
    assert twin.args == error.args


@pytest.mark.parametrize("how", COPIES)
def test_results_survive_pickle_and_copy(how: str) -> None:
    pipeline = (
        Pipeline("p", on_failure="isolate")
        .with_stage("a", gives(x=[1, {"y": (2,)}]))
        .with_stage("b", sleeps(0, ValueError("no such page")), after="a")
        .with_stage("c", returns(StageOutput.cancel_branch("hopeless")), after="a")
        .with_stage("d", gives(), after=["b", "c"])
    )
    whole = trio.run(results_of, pipeline)
    assert states(whole) == {"a": OK, "b": FAILED, "c": CANCELLED, "d": SKIPPED}
    twin = COPIES[how](whole)
    assert isinstance(twin, PipelineResults)
    assert comparable(twin) == comparable(whole)
    assert comparable(dict(twin.records)) == comparable(dict(whole.records))
    assert twin.trace.run_id == whole.trace.run_id
    with pytest.raises(MissingOutputError, match="hopeless"):
        twin.require("c")


# What they say


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (CycleError, ["'a' → 'b' → 'a'", "remove one of these edges"]),
        (UnknownStageError, ["after= of stage 'x'", "'fetsch'", "did you mean 'fetch'?"]),
        (StageExecutionError, ["'bad'", "test_errors.py:", "no such page", "1 of 2 stages had succeeded", ".results"]),
        (StageTimeoutError, ["'bad'", "test_errors.py:", "limit of 0.001 s", "1 of 2 stages had succeeded"]),
        (UnifiedPipelineCancelled, ["'p'", "by stage 'bad'", "wrong account", "1 of 2 stages", ".results"]),
        (MissingOutputError, ["no output of 'a'", "the stage is skipped"]),
        (OutputConflictError, ["'a'", "written once", "another name"]),
    ],
)
def test_a_message_says_what_where_and_what_to_do(kind: type[StageflowError], parts: list[str]) -> None:
    message = str(SAMPLES[kind]())
    assert [part for part in parts if part not in message] == [], message


def test_builtin_bases_are_what_users_catch_anyway() -> None:
    for kind, builtin in {
        DefinitionError: ValueError,
        StageTimeoutError: TimeoutError,
        ContractViolation: TypeError,
        MissingOutputError: KeyError,
    }.items():
        assert issubclass(kind, builtin)
    for kind in (StageExecutionError, UnifiedPipelineCancelled):
        assert issubclass(kind, PipelineTerminated)


def test_what_ended_a_run_reads_the_same_way_whatever_it_was() -> None:
    for body in (raises(ValueError("x")), returns(StageOutput.cancel("x"))):
        error = raised_by(body)
        assert error.results["good"]["x"] == [1]
        assert error.run_id == error.results.run_id
        assert error.stage == "bad"
        assert error.results.records["bad"].cause is not None
        assert error.reason == error.results.records["bad"].cause.reason


def test_a_foreign_exception_survives_as_the_cause() -> None:
    original = ValueError("no such page")
    error = raised_by(raises(original))
    assert isinstance(error, StageExecutionError)
    assert error.original is original
    assert error.__cause__ is original
    assert not error.recoverable
    traceback = original.__traceback__
    names: list[str] = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert names[-1] == "body"


def test_a_timeout_carries_limit_and_elapsed_time() -> None:
    error = raised_by(saves_and_sleeps, timeout=0.001)
    assert isinstance(error, StageTimeoutError)
    assert error.limit == 0.001
    assert error.elapsed >= 0.001
    assert isinstance(error.original, TimeoutError)
    assert error.results.partial == {"bad": {"page": 1}}


@pytest.mark.parametrize("value", [42, "text", [1], object(), {1}])
def test_a_stage_that_returns_what_it_may_not_is_told_what_it_may(value: object) -> None:
    error = raised_by(returns(value))
    assert isinstance(error, StageExecutionError)
    assert isinstance(error.original, ContractViolation)
    assert isinstance(error.original, TypeError)
    assert error.original.stage == "bad"
    assert f"stage 'bad' returned {value!r}" in str(error)
    assert "StageOutput.ok(value=...)" in str(error)


def test_a_long_list_of_names_is_shortened() -> None:
    assert str(CycleError([f"s{number}" for number in range(1000)])).count("→") < 15
    many = UnknownStageError("x", [f"stage{number}" for number in range(100)], where="after=")
    assert "none of the 100 known stages" in str(many)
    few = UnknownStageError("x", ["alpha", "beta"], where="after=")
    assert "known stages: 'alpha', 'beta'" in str(few)
