"""When a stage starts that comes after several: one claim or more for every join."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    CauseKind,
    Join,
    MissingOutputError,
    Pipeline,
    PipelineResults,
    RunStatus,
    StageContext,
    StageOutput,
    StageState,
    optional,
)
from tests.stages import (
    CANCELLED,
    FAILED,
    OK,
    SKIPPED,
    Witness,
    assert_whole,
    causes,
    gives,
    results_of,
    sees,
    sleeps,
    states,
    times,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stageflow.stages import Body

WELL = None
BAD: dict[str, StageOutput] = {
    "skip": StageOutput.skip("nothing new"),
    "cancel_branch": StageOutput.cancel_branch("hopeless"),
    "fail": StageOutput.fail("broken"),
}
KINDS = {"skip": CauseKind.SKIP, "cancel_branch": CauseKind.CANCEL_BRANCH, "fail": CauseKind.FAILURE}


async def join(how: Join | str, *endings: str | None, loose: tuple[str, ...] = ()) -> PipelineResults:
    """Runs a, b, c …, which end like this after 1, 2, 3 … seconds, and then `j`, which joins them.

    Failures are tolerated. What is in `loose` is an optional dependency.
    """
    pipeline = Pipeline("joins").with_stage("root", gives())
    after: list[Any] = []
    for number, ending in enumerate(endings):
        name = "abcdefgh"[number]
        then = None if ending is None else BAD[ending]
        pipeline = pipeline.with_stage(name, sleeps(number + 1, then), after="root", on_failure="tolerate")
        after.append(optional(name) if name in loose else name)
    results = await pipeline.with_stage("j", sees(), after=after, join=how).run()
    assert_whole(results)
    return results


def started(results: PipelineResults) -> float | None:
    return times(results)["j"][0]


def settled(results: PipelineResults) -> float | None:
    return times(results)["j"][1]


# all


async def test_all_starts_when_everything_has_succeeded(autojump_clock: MockClock) -> None:
    results = await join("all", WELL, WELL, WELL)
    assert started(results) == 3
    assert results["j"]["saw"] == ["a", "b", "c"]


@pytest.mark.parametrize("ending", BAD)
async def test_all_is_skipped_at_once_when_something_it_needs_is_lost(autojump_clock: MockClock, ending: str) -> None:
    results = await join("all", WELL, ending, WELL)
    assert states(results)["j"] is SKIPPED
    assert settled(results) == 2
    assert causes(results)["j"] == (KINDS[ending], "b")


@pytest.mark.parametrize("ending", BAD)
async def test_all_waits_for_what_is_optional_and_does_without_it(autojump_clock: MockClock, ending: str) -> None:
    results = await join("all", WELL, WELL, ending, loose=("c",))
    assert started(results) == 3
    assert results["j"]["saw"] == ["a", "b"]


async def test_all_sees_what_is_optional_and_there(autojump_clock: MockClock) -> None:
    results = await join("all", WELL, WELL, loose=("a", "b"))
    assert results["j"]["saw"] == ["a", "b"]
    assert started(results) == 2


@pytest.mark.parametrize("ending", BAD)
async def test_all_starts_without_any_input_if_all_of_them_are_optional(autojump_clock: MockClock, ending: str) -> None:
    results = await join("all", ending, ending, loose=("a", "b"))
    assert results["j"]["saw"] == []
    assert started(results) == 2


async def test_an_optional_dependency_on_a_strand_need_not_bring_anything() -> None:
    pipeline = (
        Pipeline("strand")
        .with_stage("a", sleeps(0, BAD["skip"]))
        .with_stage("b", sees(), after=optional("a"))
        .with_stage("c", sees(), after="b")
    )
    results = await pipeline.run()
    assert states(results) == {"a": SKIPPED, "b": OK, "c": OK}
    assert results["b"]["saw"] == []


# any, n_of, quorum: as soon as it is decided


@pytest.mark.parametrize(
    ("how", "endings", "at", "saw"),
    [
        ("any", [WELL, WELL, WELL], 1, ["a"]),
        ("any", ["fail", "skip", WELL], 3, ["c"]),
        (Join.n_of(1), ["cancel_branch", WELL, WELL], 2, ["b"]),
        (Join.n_of(2), [WELL, WELL, WELL, WELL], 2, ["a", "b"]),
        (Join.n_of(2), [WELL, "fail", "skip", WELL], 4, ["a", "d"]),
        (Join.n_of(3), [WELL, WELL, WELL], 3, ["a", "b", "c"]),
        ("quorum", [WELL, WELL, WELL], 2, ["a", "b"]),
        ("quorum", [WELL, "skip", WELL], 3, ["a", "c"]),
        ("quorum", [WELL, WELL, WELL, WELL], 3, ["a", "b", "c"]),
        ("quorum", [WELL], 1, ["a"]),
    ],
)
async def test_an_early_join_starts_at_the_success_that_is_enough(
    autojump_clock: MockClock, how: Join | str, endings: list[str | None], at: float, saw: list[str]
) -> None:
    results = await join(how, *endings)
    assert started(results) == at
    assert results["j"]["saw"] == saw


@pytest.mark.parametrize(
    ("how", "endings", "at", "by"),
    [
        ("any", ["skip", "fail", "cancel_branch"], 3, "c"),
        (Join.n_of(2), ["fail", "skip", WELL], 2, "b"),
        (Join.n_of(3), [WELL, "fail", WELL], 2, "b"),
        ("quorum", ["fail", WELL, "skip", WELL], 3, "c"),
        ("quorum", ["fail", "cancel_branch", WELL], 2, "b"),
    ],
)
async def test_an_early_join_is_skipped_at_once_when_it_can_no_longer_be(
    autojump_clock: MockClock, how: Join | str, endings: list[str | None], at: float, by: str
) -> None:
    results = await join(how, *endings)
    assert states(results)["j"] is SKIPPED
    assert settled(results) == at
    assert causes(results)["j"] == causes(results)[by]
    assert started(results) is None


@pytest.mark.parametrize("loose", [("a",), ("a", "b", "c")])
async def test_an_early_join_counts_an_optional_dependency_like_any_other(
    autojump_clock: MockClock, loose: tuple[str, ...]
) -> None:
    results = await join(Join.n_of(2), WELL, WELL, WELL, loose=loose)
    assert started(results) == 2
    results = await join("any", "skip", "skip", loose=loose)
    assert states(results)["j"] is SKIPPED


@pytest.mark.parametrize("how", ["any", Join.n_of(1)])
async def test_the_inputs_of_an_early_join_are_fixed_when_it_starts(autojump_clock: MockClock, how: Join | str) -> None:
    seen: list[list[str]] = []

    async def looks_twice(ctx: StageContext) -> None:
        seen.append(list(ctx.inputs))
        await trio.sleep(5)
        seen.append(list(ctx.inputs))
        assert "b" not in ctx.inputs
        with pytest.raises(MissingOutputError):
            ctx.inputs["b"]

    pipeline = (
        Pipeline("early")
        .with_stage("a", sleeps(1))
        .with_stage("b", sleeps(2))
        .with_stage("j", looks_twice, after=["a", "b"], join=how)
    )
    results = await pipeline.run()
    assert seen == [["a"], ["a"]]
    assert results.status is RunStatus.SUCCEEDED


async def test_inputs_first_read_late_are_those_of_the_start_all_the_same(autojump_clock: MockClock) -> None:
    async def looks_late(ctx: StageContext) -> dict[str, object]:
        await trio.sleep(5)
        return {"saw": list(ctx.inputs)}

    pipeline = (
        Pipeline("early")
        .with_stage("a", sleeps(1))
        .with_stage("b", sleeps(2))
        .with_stage("j", looks_late, after=["a", "b"], join="any")
    )
    assert (await pipeline.run())["j"]["saw"] == ["a"]


@pytest.mark.parametrize("late", [WELL, *BAD])
async def test_what_arrives_late_at_an_early_join_runs_to_its_end_and_changes_nothing(
    autojump_clock: MockClock, late: str | None
) -> None:
    witness = Witness()
    pipeline = (
        Pipeline("late")
        .with_stage("a", sleeps(1))
        .with_stage("b", sleeps(2, None if late is None else BAD[late]), on_failure="tolerate")
        .with_stage("j", witness.of(sees()), after=["a", "b"], join="any")
        .with_stage("k", witness.of(sees()), after="j")
    )
    results = await pipeline.run()
    assert witness.entered == ["j", "k"]
    assert states(results)["b"] is {None: OK, "skip": SKIPPED, "fail": FAILED, "cancel_branch": CANCELLED}[late]
    assert results["j"]["saw"] == ["a"]
    assert times(results)["j"] == (1, 1)
    assert times(results)["b"] == (0, 2)


# any_settled and settled: when everything has settled


@pytest.mark.parametrize(
    ("how", "endings", "saw"),
    [
        ("any_settled", [WELL, "skip", "fail"], ["a"]),
        ("any_settled", ["skip", "cancel_branch", WELL], ["c"]),
        ("any_settled", [WELL, WELL, WELL], ["a", "b", "c"]),
        ("settled", [WELL, WELL, WELL], ["a", "b", "c"]),
        ("settled", [WELL, "fail", "skip"], ["a"]),
        ("settled", ["fail", "skip", "cancel_branch"], []),
    ],
)
async def test_a_settled_join_starts_when_the_last_has_settled(
    autojump_clock: MockClock, how: str, endings: list[str | None], saw: list[str]
) -> None:
    results = await join(how, *endings)
    assert started(results) == 3
    assert results["j"]["saw"] == saw


async def test_any_settled_is_skipped_if_nothing_succeeded(autojump_clock: MockClock) -> None:
    results = await join("any_settled", "fail", "skip", "cancel_branch")
    assert states(results)["j"] is SKIPPED
    assert settled(results) == 3
    assert causes(results)["j"] == (CauseKind.CANCEL_BRANCH, "c")


@pytest.mark.parametrize("chosen", ["high", "low", None])
async def test_any_settled_joins_the_routes_of_which_some_were_chosen(chosen: str | None) -> None:
    def is_chosen(ctx: StageContext) -> bool:
        return bool(ctx.inputs["route"]["chosen"] == ctx.stage)

    pipeline = (
        Pipeline("routes")
        .with_stage("route", gives(chosen=chosen), kind="route")
        .with_stage("high", gives(), after="route", when=is_chosen)
        .with_stage("low", gives(), after="route", when=is_chosen)
        .with_stage("end", sees(), after=["high", "low"], join="any_settled")
    )
    results = await pipeline.run()
    assert results.status is RunStatus.PARTIAL
    if chosen is None:
        assert states(results)["end"] is SKIPPED
        assert causes(results)["end"][0] is CauseKind.CONDITION
    else:
        assert results["end"]["saw"] == [chosen]


@pytest.mark.parametrize(("policy", "status"), [("tolerate", RunStatus.PARTIAL), ("isolate", RunStatus.FAILED)])
@pytest.mark.parametrize("shape", ["strand", "fork"])
async def test_a_settled_join_after_a_stage_is_its_error_handler(policy: str, status: RunStatus, shape: str) -> None:
    async def handle(ctx: StageContext) -> dict[str, object]:
        with pytest.raises(MissingOutputError) as missing:
            ctx.inputs["risky"]
        return {"because": missing.value.reason, "state": missing.value.state}

    pipeline = (
        Pipeline("handled")
        .with_stage("risky", sleeps(0, ValueError("no such page")), on_failure=policy)
        .with_stage("handler", handle, after="risky", join="settled")
    )
    if shape == "fork":
        pipeline = pipeline.with_stage("next", gives(), after="risky")
    results = await results_of(pipeline)
    assert results.status is status
    assert results["handler"]["state"] is StageState.FAILED
    assert "no such page" in results["handler"]["because"]
    if shape == "fork":
        assert states(results)["next"] is SKIPPED


def never(ctx: StageContext) -> bool:
    return False


ABSENT: dict[str, tuple[Body, dict[str, Any]]] = {
    "skipped": (sleeps(0, BAD["skip"]), {}),
    "tolerated": (sleeps(0, BAD["fail"]), {"on_failure": "tolerate"}),
    "not asked for": (gives(), {"when": never}),
}


@pytest.mark.parametrize(("body", "options"), ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("between", [1, 3])
async def test_a_settled_stage_further_down_starts_after_others_were_skipped(
    body: Body, options: dict[str, Any], between: int
) -> None:
    """Also where the stages between are on its strand, and where they are branches of their own."""
    pipeline = Pipeline("revived").with_stage("root", gives()).with_stage("a", body, after="root", **options)
    last = "a"
    for number in range(between):
        pipeline = pipeline.with_stage(f"b{number}", gives(), after=last)
        last = f"b{number}"
    pipeline = (
        pipeline.with_stage("fork1", gives(), after=last)
        .with_stage("fork2", gives(), after=last)
        .with_stage("end", sees(), after=["fork1", "fork2"], join="settled")
        .with_stage("beside", gives(), after="root")
    )
    results = await pipeline.run()
    assert_whole(results)
    alive = {name for name, state in states(results).items() if state is OK}
    assert alive == {"root", "end", "beside"}
    assert results["end"]["saw"] == []


@pytest.mark.parametrize("how", ["settled", "any_settled", "any", Join.n_of(1)])
async def test_only_a_cancelled_branch_skips_everything_in_it_whatever_its_joins_say(how: Join | str) -> None:
    pipeline = (
        Pipeline("cut")
        .with_stage("root", gives())
        .with_stage("x", sleeps(0, StageOutput.cancel_branch("hopeless")), after="root")
        .with_stage("p", gives(), after="x")
        .with_stage("q", gives(), after="x")
        .with_stage("inner", gives(), after=["p", "q"], join=how)
        .with_stage("after", gives(), after="inner", join="settled")
        .with_stage("beside", gives(), after="root")
        .with_stage("outer", sees(), after=["after", "beside"], join="settled")
    )
    results = await pipeline.run()
    assert_whole(results)
    assert states(results) == {
        "root": OK,
        "x": CANCELLED,
        "p": SKIPPED,
        "q": SKIPPED,
        "inner": SKIPPED,
        "after": SKIPPED,
        "beside": OK,
        "outer": OK,
    }
    assert results["outer"]["saw"] == ["beside"]
    assert set(causes(results).values()) == {(CauseKind.CANCEL_BRANCH, "x")}


async def test_a_join_of_the_whole_graph_starts_when_roots_have_settled(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("roots")
        .with_stage("a", sleeps(1))
        .with_stage("b", sleeps(2, BAD["cancel_branch"]))
        .with_stage("j", sees(), after=["a", optional("b")])
    )
    results = await pipeline.run()
    assert results["j"]["saw"] == ["a"]
    assert times(results)["j"] == (2, 2)
