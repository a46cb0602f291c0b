"""DAG-003: guards that reject a draft: always, once, or over and over the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from stageflow import (
    Pipeline,
    Retry,
    RunStatus,
    StageContext,
    StageExecutionError,
    StageOutput,
    StagnationError,
)
from tests.stages import FAILED, OK, SKIPPED, duration, states

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

    from stageflow.stages import Body


class Scene:
    """A generator, a guard, and others who consume what the guard has let pass; it notes what each of them saw."""

    def __init__(self, write: Callable[[int, str | None], object], accept: Callable[[str], bool], *, attempts: int = 3):
        self.feedback: list[str | None] = []
        self.judged: list[str] = []
        self.consumed: list[tuple[str, str]] = []

        async def draft(ctx: StageContext) -> StageOutput:
            self.feedback.append(ctx.feedback)
            await trio.sleep(1)
            return StageOutput.ok(text=write(ctx.attempt, ctx.feedback))

        async def guard(ctx: StageContext) -> StageOutput:
            text = ctx.inputs["draft"]["text"]
            self.judged.append(text)
            await trio.sleep(0.5)
            if accept(text):
                return StageOutput.ok(accepted=text)
            return StageOutput.retry(f"{text} will not do", stage="draft")

        async def consumes(ctx: StageContext) -> None:
            self.consumed.append((ctx.stage, ctx.inputs["draft"]["text"]))

        self.pipeline = (
            Pipeline("guarded")
            .with_stage("draft", draft, kind="agent")
            .with_stage("guard", guard, kind="guard", after="draft", retry=Retry(attempts=attempts))
            .with_stage("publish", consumes, after=["draft", "guard"])
            .with_stage("index", consumes, after=["draft", "guard"])
            .with_stage("report", self._counts(), after=["publish", "index"])
        )

    def _counts(self) -> Body:
        async def report(ctx: StageContext) -> StageOutput:
            return StageOutput.ok(consumed=len(self.consumed))

        return report


def numbered(attempt: int, feedback: str | None) -> str:
    """Drafts that differ each time."""
    return f"draft {attempt}"


async def test_a_guard_that_accepts_at_once_costs_one_draft(autojump_clock: MockClock) -> None:
    scene = Scene(numbered, lambda text: True)
    results = await scene.pipeline.run()
    assert (scene.feedback, scene.judged) == ([None], ["draft 1"])
    assert results["report"]["consumed"] == 2
    assert (duration(results), results.status) == (1.5, RunStatus.SUCCEEDED)


async def test_a_guard_that_rejects_once_gives_its_feedback_to_the_generator_and_nobody_sees_that_draft(
    autojump_clock: MockClock,
) -> None:
    scene = Scene(numbered, lambda text: text == "draft 2")
    results = await scene.pipeline.run()
    assert scene.feedback == [None, "draft 1 will not do"]
    assert scene.judged == ["draft 1", "draft 2"]
    assert sorted(scene.consumed) == [("index", "draft 2"), ("publish", "draft 2")]
    assert results["draft"]["text"] == results["guard"]["accepted"] == "draft 2"
    assert (duration(results), results.status) == (3, RunStatus.SUCCEEDED)
    assert [record.attempts for record in results.records.values()] == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("attempts", [1, 2, 3, 10])
async def test_a_guard_that_always_rejects_is_asked_a_bounded_number_of_times(
    autojump_clock: MockClock, attempts: int
) -> None:
    scene = Scene(numbered, lambda text: False, attempts=attempts)
    with pytest.raises(StageExecutionError, match=f"draft {attempts} will not do; given up after {attempts}") as caught:
        await scene.pipeline.run()
    results = caught.value.results
    assert scene.judged == [f"draft {number}" for number in range(1, attempts + 1)]
    assert scene.feedback == [None, *(f"draft {number} will not do" for number in range(1, attempts))]
    assert scene.consumed == []
    assert states(results) == {"draft": OK, "guard": FAILED, "publish": SKIPPED, "index": SKIPPED, "report": SKIPPED}
    assert duration(results) == attempts * 1.5
    assert caught.value.stage == "guard"


@pytest.mark.parametrize(("stuck_from", "drafts"), [(1, 2), (3, 4)])
async def test_a_generator_that_is_stuck_on_the_same_answer_is_told_by_content_and_not_by_count(
    autojump_clock: MockClock, stuck_from: int, drafts: int
) -> None:
    scene = Scene(lambda attempt, _: f"draft {min(attempt, stuck_from)}", lambda text: False, attempts=100)
    with pytest.raises(StageExecutionError, match="did not change") as caught:
        await scene.pipeline.run()
    original = caught.value.original
    assert isinstance(original, StagnationError)
    assert (original.stage, original.guard) == ("draft", "guard")
    assert len(scene.feedback) == drafts
    assert len(scene.judged) == drafts - 1  # the same draft is not judged again
    assert scene.consumed == []


async def test_content_is_compared_deeply_and_by_value(autojump_clock: MockClock) -> None:
    scene = Scene(lambda attempt, _: {"pages": [{"title": "same"}]}, lambda text: False, attempts=100)
    with pytest.raises(StageExecutionError) as caught:
        await scene.pipeline.run()
    assert isinstance(caught.value.original, StagnationError)
    assert len(scene.feedback) == 2


async def test_a_generator_that_makes_use_of_feedback_gets_through(autojump_clock: MockClock) -> None:
    scene = Scene(
        lambda _, feedback: "short" if feedback is None else feedback.split()[0] + "er",
        lambda text: len(text) > 8,
        attempts=5,
    )
    results = await scene.pipeline.run()
    assert scene.judged == ["short", "shorter", "shorterer"]
    assert results["guard"]["accepted"] == "shorterer"


@pytest.mark.parametrize("rejected", [{1}, {1, 3}])
async def test_of_two_guards_the_second_sends_the_draft_through_the_first_again(
    autojump_clock: MockClock, rejected: set[int]
) -> None:
    """Which may send it back in its turn, while it is itself run again; each has its attempts anew."""
    seen: list[str] = []

    async def draft(ctx: StageContext) -> StageOutput:
        seen.append(f"draft {ctx.attempt}: {ctx.feedback}")
        return StageOutput.ok(number=ctx.attempt)

    async def style(ctx: StageContext) -> StageOutput:
        number = ctx.inputs["draft"]["number"]
        seen.append(f"style of {number}")
        return StageOutput.retry("ugly", stage="draft") if number in rejected else StageOutput.ok(number=number)

    async def facts(ctx: StageContext) -> StageOutput:
        number = ctx.inputs["style"]["number"]
        seen.append(f"facts of {number}")
        return StageOutput.retry("untrue", stage="draft") if number == 2 else StageOutput.ok(number=number)

    results = await (
        Pipeline("two guards")
        .with_stage("draft", draft)
        .with_stage("style", style, after="draft", retry=Retry(attempts=2))
        .with_stage("facts", facts, after="style", retry=Retry(attempts=2))
        .run()
    )
    expected = ["draft 1: None", "style of 1", "draft 2: ugly", "style of 2", "facts of 2", "draft 3: untrue"]
    expected += ["style of 3", "draft 4: ugly", "style of 4", "facts of 4"] if 3 in rejected else []
    assert seen == (expected if 3 in rejected else [*expected, "style of 3", "facts of 3"])
    assert results.status is RunStatus.SUCCEEDED
    assert results["facts"]["number"] == results["style"]["number"] == results["draft"]["number"]


async def test_a_hundred_guarded_runs_at_once_do_not_mix_up_their_feedback(autojump_clock: MockClock) -> None:
    async def draft(ctx: StageContext) -> StageOutput:
        await trio.sleep(1)
        return StageOutput.ok(text=f"{ctx.data['run']}: {ctx.feedback}")

    async def guard(ctx: StageContext) -> StageOutput:
        text = ctx.inputs["draft"]["text"]
        wanted = f"{ctx.data['run']}: 2 more for {ctx.data['run']}"
        if text == wanted:
            return StageOutput.ok()
        return StageOutput.retry(f"{3 - ctx.attempt} more for {ctx.data['run']}", stage="draft")

    graph = Pipeline("many").with_stage("draft", draft).with_stage("guard", guard, after="draft", retry=Retry()).build()
    texts: dict[int, str] = {}

    async def run(number: int) -> None:
        results = await graph.run({"run": number})
        texts[number] = results["draft"]["text"]

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(run, number)
    assert texts == {number: f"{number}: 2 more for {number}" for number in range(100)}
