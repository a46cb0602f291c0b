"""The semantics of branches, row by row: what each way in which a stage can end means for it and for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio

from stageflow import (
    Cause,
    CauseKind,
    Pipeline,
    PipelineTerminated,
    Run,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageState,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    UnknownStageError,
    optional,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    Ended,
    Witness,
    causes,
    duration,
    end,
    gives,
    raises,
    results_of,
    returns,
    sees,
    sleeps,
    states,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stageflow.stages import Body

ERROR = ValueError("no such page")
MARKS = {"+": OK, "!": FAILED, "x": CANCELLED, "-": SKIPPED}


def marked(names: list[str], marks: str) -> dict[str, StageState]:
    return dict(zip(names, (MARKS[mark] for mark in marks.replace(" ", "")), strict=True))


# One stage `s` among others. It ends after one second, when o1 is running and o2 has yet to start:
#
#   root ─┬─ s ── s2 ── s3 (join="settled")    only s leads to s2 and s3
#         ├─ o1 ── o2                          another branch
#         ├─ all        after s2, o2
#         ├─ maybe      after optional(s2), o2
#         └─ settled    after s2, o2 (join="settled")

NAMES = ["root", "s", "s2", "s3", "o1", "o2", "all", "maybe", "settled"]


def around(body: Body, witness: Witness, *, policy: str = "fail_fast", **options: Any) -> Pipeline:
    if policy == "tolerate":
        options["on_failure"] = policy
    return (
        Pipeline("table", on_failure="fail_fast" if policy == "tolerate" else policy)
        .with_stage("root", witness.of(gives()))
        .with_stage("s", witness.of(body), after="root", **options)
        .with_stage("s2", witness.of(gives()), after="s")
        .with_stage("s3", witness.of(gives()), after="s2", join="settled")
        .with_stage("o1", witness.of(sleeps(2)), after="root")
        .with_stage("o2", witness.of(gives()), after="o1")
        .with_stage("all", witness.of(sees()), after=["s2", "o2"])
        .with_stage("maybe", witness.of(sees()), after=[optional("s2"), "o2"])
        .with_stage("settled", witness.of(sees()), after=["s2", "o2"], join="settled")
    )


@attrs.frozen
class Row:
    """What is to become of everything."""

    marks: str  # of `NAMES`
    status: RunStatus
    at: float = 2
    raised: type[PipelineTerminated] | None = None


#                    root  s  s2 s3  o1 o2  all maybe settled
ALL_WELL = Row("      +    +  +  +   +  +    +    +     +   ", RunStatus.SUCCEEDED)
SKIPS = Row("         +    -  -  +   +  +    -    +     +   ", RunStatus.PARTIAL)
ENDS_BRANCH = Row("   +    x  -  -   +  +    -    +     +   ", RunStatus.PARTIAL)
CANCELS = Row("       +    x  -  -   x  -    -    -     -   ", RunStatus.CANCELLED, 1, UnifiedPipelineCancelled)
INTERRUPTED = Row("   +    x  -  -   x  -    -    -     -   ", RunStatus.INTERRUPTED, 1)
FAILS = {
    "fail_fast": Row("+    !  -  -   x  -    -    -     -   ", RunStatus.FAILED, 1, StageExecutionError),
    "drain": Row("    +    !  -  -   +  -    -    -     -   ", RunStatus.FAILED, 2, StageExecutionError),
    "isolate": Row("  +    !  -  +   +  +    -    +     +   ", RunStatus.FAILED, 2, StageExecutionError),
    "tolerate": Row(" +    !  -  +   +  +    -    +     +   ", RunStatus.PARTIAL, 2),
}


def assert_row(ended: Ended, row: Row, witness: Witness, cause: tuple[CauseKind, str | None]) -> None:
    """That a run around `s` ended as the row says, and for that cause."""
    results = ended.results
    expected = marked(NAMES, row.marks)
    assert states(results) == expected
    assert results.status is row.status
    raised = StageTimeoutError if row.raised and cause[0] is CauseKind.TIMEOUT else row.raised
    assert type(ended.error) is (raised or type(None))
    assert ended.caught == (row.status is RunStatus.INTERRUPTED)
    assert duration(results) == row.at

    assert causes(results) == {name: cause for name, state in expected.items() if state is not OK}
    assert set(results) == {name for name, state in expected.items() if state is OK}
    assert (
        {"root"} <= set(witness.entered) <= {name for name, state in expected.items() if state is not SKIPPED} | {"s"}
    )
    assert results.records["o1"].partial == {"begun": "o1"}
    for join in ("maybe", "settled"):
        if expected[join] is OK:
            assert results[join]["saw"] == (["o2", "s2"] if expected["s2"] is OK else ["o2"])
    if ended.error is not None:
        assert ended.error.stage == cause[1]
        assert ended.error.run_id == results.run_id


async def test_ok_lets_everything_go_on(autojump_clock: MockClock) -> None:
    witness = Witness()
    assert_row(await end(around(sleeps(1), witness)), ALL_WELL, witness, (CauseKind.SKIP, None))


async def test_a_skip_leaves_other_branches_alone(autojump_clock: MockClock) -> None:
    witness = Witness()
    ended = await end(around(sleeps(1, StageOutput.skip("nothing new")), witness))
    assert_row(ended, SKIPS, witness, (CauseKind.SKIP, "s"))
    assert ended.results.records["s2"].cause == Cause(CauseKind.SKIP, "s", "nothing new")


def is_orphan(ctx: StageContext) -> bool:
    return "root" not in ctx.inputs


async def test_a_condition_that_says_no_is_a_skip_without_entering(autojump_clock: MockClock) -> None:
    witness = Witness()
    ended = await end(around(gives(), witness, when=is_orphan))
    assert_row(ended, SKIPS, witness, (CauseKind.CONDITION, "s"))
    assert "s" not in witness.entered
    assert ended.results.records["s"].attempts == 0


@pytest.mark.parametrize("of", [None, "s"])
async def test_cancel_branch_ends_its_own_branch_only(autojump_clock: MockClock, of: str | None) -> None:
    witness = Witness()
    ended = await end(around(sleeps(1, StageOutput.cancel_branch("nothing to enrich", of=of)), witness))
    assert_row(ended, ENDS_BRANCH, witness, (CauseKind.CANCEL_BRANCH, "s"))
    assert ended.results.records["s"].partial == {"begun": "s"}
    assert ended.results.records["s3"].cause == Cause(CauseKind.CANCEL_BRANCH, "s", "nothing to enrich")


@pytest.mark.parametrize("named", ["s", "s2", "s3"])
async def test_run_cancel_branch_ends_the_branch_the_named_stage_is_in(autojump_clock: MockClock, named: str) -> None:
    witness = Witness()
    ended = await end(around(sleeps(5), witness), lambda scope, run: run.cancel_branch(named, "enough"))
    assert_row(ended, ENDS_BRANCH, witness, (CauseKind.CANCEL_BRANCH, None))
    assert ended.results.records["s"].partial == {"begun": "s"}


async def test_cancel_ends_everything(autojump_clock: MockClock) -> None:
    witness = Witness()
    ended = await end(around(sleeps(1, StageOutput.cancel("wrong account")), witness))
    assert_row(ended, CANCELS, witness, (CauseKind.CANCEL, "s"))
    assert ended.error is not None
    assert ended.error.reason == "wrong account"


async def test_run_cancel_ends_everything(autojump_clock: MockClock) -> None:
    witness = Witness()
    ended = await end(around(sleeps(5), witness), lambda scope, run: run.cancel("wrong account"))
    assert_row(ended, CANCELS, witness, (CauseKind.CANCEL, None))
    assert ended.error is not None
    assert ended.error.reason == "wrong account"


WAYS_TO_FAIL: dict[str, tuple[Body, dict[str, Any], CauseKind]] = {
    "an exception": (sleeps(1, ERROR), {}, CauseKind.FAILURE),
    "fail with an error": (sleeps(1, StageOutput.fail(ERROR)), {}, CauseKind.FAILURE),
    "a timeout": (sleeps(5), {"timeout": 1}, CauseKind.TIMEOUT),
    "a broken contract": (sleeps(1, cast("StageOutput", 42)), {}, CauseKind.CONTRACT),
}


@pytest.mark.parametrize("policy", FAILS)
@pytest.mark.parametrize(("body", "options", "kind"), WAYS_TO_FAIL.values(), ids=WAYS_TO_FAIL)
async def test_a_failure_means_what_the_policy_says(
    autojump_clock: MockClock, body: Body, options: dict[str, Any], kind: CauseKind, policy: str
) -> None:
    witness = Witness()
    ended = await end(around(body, witness, policy=policy, **options))
    assert_row(ended, FAILS[policy], witness, (kind, "s"))
    record = ended.results.records["s"]
    if kind is CauseKind.FAILURE:
        assert record.error is ERROR
    assert record.partial == {"begun": "s"}
    if isinstance(ended.error, StageExecutionError):
        assert ended.error.original is record.error
        assert ended.error.failures == (record,)
        assert ended.error.__cause__ is record.error


@pytest.mark.parametrize("policy", FAILS)
async def test_a_condition_that_raises_is_a_failure_of_its_stage_which_is_not_entered(
    autojump_clock: MockClock, policy: str
) -> None:
    def breaks(ctx: StageContext) -> bool:
        raise ERROR

    witness = Witness()
    row = attrs.evolve(FAILS[policy], at=0 if FAILS[policy].at == 1 else 2)
    ended = await end(around(gives(), witness, policy=policy, when=breaks))
    assert_row(ended, row, witness, (CauseKind.FAILURE, "s"))
    assert "s" not in witness.entered
    assert ended.results.records["s"].error is ERROR
    assert ended.results.records["s"].attempts == 0


async def test_a_limit_of_a_stages_own_making_is_a_failure_like_any_other(autojump_clock: MockClock) -> None:
    async def limits_itself(ctx: StageContext) -> None:
        with trio.fail_after(1):
            await trio.sleep(5)

    ended = await end(around(limits_itself, Witness(), timeout=5))
    assert type(ended.error) is StageExecutionError
    assert causes(ended.results)["s"] == (CauseKind.FAILURE, "s")


@pytest.mark.parametrize("policy", ["fail_fast", "drain", "isolate"])
async def test_a_stage_may_say_of_itself_what_its_failure_means(autojump_clock: MockClock, policy: str) -> None:
    witness = Witness()
    others = "isolate" if policy == "fail_fast" else "fail_fast"
    ended = await end(around(sleeps(1, ERROR), witness, policy=others, on_failure=policy))
    assert_row(ended, FAILS[policy], witness, (CauseKind.FAILURE, "s"))


async def test_the_callers_cancellation_propagates_and_everything_is_kept(
    autojump_clock: MockClock,
) -> None:
    witness = Witness()
    ended = await end(around(sleeps(5), witness), lambda scope, run: scope.cancel())
    assert_row(ended, INTERRUPTED, witness, (CauseKind.CALLER, None))
    assert ended.results.partial == {"s": {"begun": "s"}, "o1": {"begun": "o1"}}


# Ending a branch from within it or from outside, when others run in it. `x` has a branch of its own, where `r` runs
# when `s` ends it:
#
#   root ─┬─ x ─┬─ s ── s2
#         │     ├─ r ── r2
#         │     └─ inner    after s2, r2 (join="settled")
#         ├─ o1 ── o2
#         └─ outer    after optional(inner), o2

NESTED = ["root", "x", "s", "s2", "r", "r2", "inner", "o1", "o2", "outer"]


def nested(body: Body, **options: Any) -> Pipeline:
    return (
        Pipeline("nested", **options)
        .with_stage("root", gives())
        .with_stage("x", gives(), after="root")
        .with_stage("s", body, after="x")
        .with_stage("s2", gives(), after="s")
        .with_stage("r", sleeps(3), after="x")
        .with_stage("r2", gives(), after="r")
        .with_stage("inner", sees(), after=["s2", "r2"], join="settled")
        .with_stage("o1", sleeps(2), after="root")
        .with_stage("o2", gives(), after="o1")
        .with_stage("outer", sees(), after=[optional("inner"), "o2"])
    )


#                   root x  s s2 r r2 inner o1 o2 outer
ENDS_BRANCH_OF_X = " +   +  x -  x -   -    +  +   +   "
ENDS_BRANCH_OF_S = " +   +  x -  + +   +    +  +   +   "
ENDS_THE_TRUNK = "   +   +  x -  x -   -    x  -   -   "


@pytest.mark.parametrize(
    ("of", "marks", "at"), [("x", ENDS_BRANCH_OF_X, 2), ("root", ENDS_THE_TRUNK, 1), ("s", ENDS_BRANCH_OF_S, 3)]
)
async def test_cancel_branch_of_a_stage_upstream_ends_that_ones_branch(
    autojump_clock: MockClock, of: str, marks: str, at: float
) -> None:
    ended = await end(nested(sleeps(1, StageOutput.cancel_branch("hopeless", of=of))))
    results = ended.results
    assert states(results) == marked(NESTED, marks)
    assert set(causes(results).values()) == {(CauseKind.CANCEL_BRANCH, "s")}
    assert results.partial.get("r") == (None if of == "s" else {"begun": "r"})
    assert results.status is RunStatus.PARTIAL
    assert ended.error is None
    assert duration(results) == at


@pytest.mark.parametrize(
    ("named", "marks", "at"),
    [("x", ENDS_BRANCH_OF_X, 2), ("root", ENDS_THE_TRUNK, 1), ("s", ENDS_BRANCH_OF_S, 3), ("s2", ENDS_BRANCH_OF_S, 3)],
)
async def test_run_cancel_branch_ends_what_runs_in_the_branch(
    autojump_clock: MockClock, named: str, marks: str, at: float
) -> None:
    ended = await end(nested(sleeps(5)), lambda scope, run: run.cancel_branch(named, "enough"))
    results = ended.results
    assert states(results) == marked(NESTED, marks)
    assert set(causes(results).values()) == {(CauseKind.CANCEL_BRANCH, None)}
    assert results.partial.get("s") == {"begun": "s"}
    assert results.partial.get("r") == (None if marks == ENDS_BRANCH_OF_S else {"begun": "r"})
    assert results.status is RunStatus.PARTIAL
    assert ended.error is None
    assert duration(results) == at


@pytest.mark.parametrize("by", ["cancel_branch", "scope"])
async def test_a_branch_can_be_ended_while_the_stage_runs_after_which_it_forks(
    autojump_clock: MockClock, by: str
) -> None:
    """Not even a settled join below the fork starts then."""

    def act(scope: trio.CancelScope, run: Run) -> None:
        if by == "scope":
            scope.cancel()
        else:
            run.cancel_branch("x", "enough")

    pipeline = (
        Pipeline("forks")
        .with_stage("root", gives())
        .with_stage("x", sleeps(5), after="root")
        .with_stage("s", gives(), after="x")
        .with_stage("t", gives(), after="x")
        .with_stage("j", gives(), after=["s", "t"], join="settled")
        .with_stage("o", gives(), after="root")
    )
    ended = await end(pipeline, act)
    assert states(ended.results) == {"root": OK, "x": CANCELLED, "s": SKIPPED, "t": SKIPPED, "j": SKIPPED, "o": OK}
    kind = CauseKind.CALLER if by == "scope" else CauseKind.CANCEL_BRANCH
    assert set(causes(ended.results).values()) == {(kind, None)}
    assert ended.caught == (by == "scope")


async def test_cancel_branch_on_the_trunk_returns() -> None:
    pipeline = (
        Pipeline("trunk")
        .with_stage("a", gives())
        .with_stage("s", returns(StageOutput.cancel_branch("up to date")), after="a")
        .with_stage("b", gives(), after="s", join="settled")
    )
    ended = await end(pipeline)
    assert states(ended.results) == {"a": OK, "s": CANCELLED, "b": SKIPPED}
    assert set(causes(ended.results).values()) == {(CauseKind.CANCEL_BRANCH, "s")}
    assert ended.results.status is RunStatus.PARTIAL
    assert ended.error is None


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("o1", "not upstream on its line"),
        ("s2", "not upstream on its line"),
        ("r", "not upstream on its line"),
        ("roof", "did you mean 'root'?"),
    ],
)
async def test_cancel_branch_of_what_is_not_upstream_is_a_failure(
    autojump_clock: MockClock, of: str, message: str
) -> None:
    ended = await end(nested(sleeps(1, StageOutput.cancel_branch("hopeless", of=of))))
    assert ended.results.records["s"].state is FAILED
    assert isinstance(ended.error, StageExecutionError)
    assert message in str(ended.error)
    assert isinstance(ended.error.original, UnknownStageError) == (of == "roof")


async def test_several_failures_raise_the_first_and_carry_the_others(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("several", on_failure="isolate").with_stage("root", gives())
    for seconds in (3, 1, 2):
        pipeline = pipeline.with_stage(f"f{seconds}", sleeps(seconds, ValueError(seconds)), after="root")
    ended = await end(pipeline)
    assert isinstance(ended.error, StageExecutionError)
    assert ended.error.stage == "f1"
    assert [record.name for record in ended.error.failures] == ["f1", "f2", "f3"]


# What is recorded in one tick


@pytest.mark.parametrize("ending", ["fail", "raise", "cancel"])
async def test_immediate_outputs_beside_a_failure_do_not_depend_on_the_order_of_turns(
    autojump_clock: MockClock, ending: str
) -> None:
    """On a clock that stands still: a strand that has worked for a millisecond would rest, and end its turn by that."""
    ways = {
        "fail": returns(StageOutput.fail("broken")),
        "raise": raises(ERROR),
        "cancel": returns(StageOutput.cancel("wrong account")),
    }
    graph = (
        Pipeline("siblings")
        .with_stage("a", gives())
        .with_stage("b", ways[ending], after="a")
        .with_stage("c", gives(), after="a")
        .with_stage("c2", gives(), after="c")
        .with_stage("d", gives(), after=["b", "c2"])
        .build()
    )
    outcomes = {tuple(sorted(await results_of(graph))) for _ in range(300)}
    assert outcomes == {("a", "c", "c2")}


async def test_a_body_is_never_entered_once_its_branch_is_cancelled(autojump_clock: MockClock) -> None:
    witness = Witness()

    async def ends_its_branch(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        return StageOutput.cancel_branch("hopeless", of="x")

    pipeline = (
        Pipeline("late")
        .with_stage("root", gives())
        .with_stage("x", gives(), after="root")
        .with_stage("s", ends_its_branch, after="x")
        .with_stage("y", sleeps(1), after="x")  # wakes in the very tick in which `s` ends the branch they are both in
        .with_stage("y2", witness.of(sleeps(1)), after="y")
        .with_stage("y3", witness.of(gives()), after="y2")
        .with_stage("o", gives(), after="root")
    )
    outcomes: set[tuple[StageState, ...]] = set()
    for _ in range(20):
        results = (await end(pipeline)).results
        outcomes.add(tuple(states(results).values()))
        assert results.records["y"].state is OK  # it was ready in that tick, whichever of the two had its turn first
        assert not results.records["y"].after_cancel or results.records["y2"].state is SKIPPED
    assert len(outcomes) == 1
    assert "y3" not in witness.entered


async def test_drain_starts_nothing_after_its_tick(autojump_clock: MockClock) -> None:
    """Not even in a strand that just rests, to let others run, between two stages."""
    witness = Witness()

    async def works_long(ctx: StageContext) -> None:
        autojump_clock.jump(1)  # a second of work without a checkpoint, so that the strand then rests

    pipeline = (
        Pipeline("drain", on_failure="drain")
        .with_stage("f", raises(ERROR))
        .with_stage("x1", works_long)
        .with_stage("x2", witness.of(gives()), after="x1")
    )
    for _ in range(10):
        ended = await end(pipeline)
        assert states(ended.results) == {"f": FAILED, "x1": OK, "x2": SKIPPED}
    assert witness.entered == []


# Completion beats cancellation


async def test_a_body_that_returns_although_it_is_cancelled_has_succeeded(
    autojump_clock: MockClock,
) -> None:
    async def stubborn(ctx: StageContext) -> dict[str, object]:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return {"kept": True}

    ended = await end(around(stubborn, Witness()), lambda scope, run: run.cancel("wrong account"))
    record = ended.results.records["s"]
    assert record.state is OK
    assert record.after_cancel
    assert ended.results["s"] == StageOutput.ok(kept=True)
    assert ended.results.records["s2"].state is SKIPPED
    assert duration(ended.results) == 3
    assert not any(record.after_cancel for record in ended.results.records.values() if record.name != "s")
