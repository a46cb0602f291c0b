"""What a trace looks like, as whole pictures, and what holds of every one."""

from __future__ import annotations

import io
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from trio.testing import MockClock

from stageflow import (
    Compensation,
    Pipeline,
    PipelineContext,
    Retry,
    Run,
    StageContext,
    StageOutput,
    Trace,
    UnifiedPipelineCancelled,
    optional,
)
from stageflow.trace.layout import fold, samples
from stageflow.trace.tracebacks import trimmed
from stageflow.trace.words import duration, durations, shortened
from tests.stages import chain, fan, gives, raises, results_of, returns, sleeps

if TYPE_CHECKING:
    from pathlib import Path

    from stageflow.stages import Body

SKIP = StageOutput.skip("nothing new")


def drawn(trace: Trace, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    known = attrs.evolve(trace, run_id="run-1", began_at=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC))
    Console(file=file, width=width, force_terminal=False, color_system=None).print(known)
    file.seek(0)
    return file.read()


def picture(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


async def drawn_run(pipeline: Pipeline, **options: Any) -> str:
    return drawn((await results_of(pipeline)).trace, **options)


def body_from(path: Path, source: str) -> Body:
    """An async function `stage` from a file of its own, as its traceback shows it."""
    source = textwrap.dedent(source).lstrip("\n")
    path.write_text(source)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), namespace)
    body: Body = namespace["stage"]
    return body


# Pictures


async def test_a_trace_shows_when_each_stage_ran_and_why_some_did_not(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("report")
        .with_stage("fetch", sleeps(1))
        .with_stage("left", sleeps(2), after="fetch")
        .with_stage("left and on", sleeps(0.2), after="left")
        .with_stage("right", sleeps(0.5, StageOutput.cancel_branch("nothing to enrich")), after="fetch")
        .with_stage("after right", gives(), after="right")
        .with_stage("report", sleeps(0.8), after=["left and on", optional("after right")])
    )
    assert await drawn_run(pipeline) == picture("""
        report  ✓ partial in 4.00 s
        6 stages: 1 cancelled, 4 succeeded, 1 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        fetch           ✓ succeeded  ━━━━━━━━━━                                 1.00 s
        ├─ left         ✓ succeeded            ━━━━━━━━━━━━━━━━━━━━             2.00 s
        │  left and on  ✓ succeeded                                ━━           200 ms
        ├─ right        ⊘ cancelled            ━━━━━                            500 ms
        │     ended its branch: nothing to enrich · partial: begun
        │  after right  – skipped    because 'right' ended its branch
        └─ report       ✓ succeeded                                  ━━━━━━━━   800 ms
    """)


async def test_a_failure_shows_what_it_took_down_and_what_was_saved(autojump_clock: MockClock) -> None:
    async def stubborn(ctx: StageContext) -> StageOutput:
        with trio.CancelScope(shield=True):
            await trio.sleep(1.5)
        return StageOutput.ok()

    pipeline = (
        Pipeline("down")
        .with_stage("fetch", gives())
        .with_stage("left", sleeps(1, StageOutput.fail("no such row", rows=3)), after="fetch")
        .with_stage("right", sleeps(9), after="fetch")
        .with_stage("next", gives(), after="right")
        .with_stage("stubborn", stubborn, after="fetch")
        .with_stage("late", sleeps(9), after="fetch", timeout=0.25, on_failure="tolerate")
        .with_stage("unasked", gives(), after="fetch", when=lambda ctx: False)
        .with_stage("report", gives(), after=["left", "right"])
    )
    assert await drawn_run(pipeline) == picture("""
        down  ✗ failed in 1.50 s
        8 stages: 2 failed, 1 cancelled, 2 succeeded, 3 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        fetch        ✓ succeeded  ╸                                             0 s
        ├─ left      ✗ failed     ━━━━━━━━━━━━━━━━━━━━━━━━━━╸                1.00 s
        │     no such row · partial: begun, rows
        ├─ right     ⊘ cancelled  ━━━━━━━━━━━━━━━━━━━━━━━━━━╸                1.00 s
        │     because 'left' failed · partial: begun
        │  next      – skipped    because 'left' failed
        ├─ stubborn  ✓ succeeded  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   1.50 s
        │     ended by itself while being cancelled
        ├─ late      ✗ failed     ━━━━━━╸                                    250 ms
        │     ran longer than its limit of 0.25 s · partial: begun
        ├─ unasked   – skipped    when= said no
        └─ report    – skipped    because 'left' failed
    """)


async def test_an_error_shows_the_frames_of_the_users_code_and_no_others(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = body_from(
        tmp_path / "flow.py",
        """
        async def inner():
            raise LookupError("no rows")

        async def stage(ctx):
            try:
                await inner()
            except LookupError as error:
                raise ValueError("cannot go on") from error
        """,
    )
    assert await drawn_run(Pipeline("error").with_stage("only", body)) == picture("""
        error  ✗ failed in 0 s
        1 stage failed
        run run-1, began 2025-01-02 03:04:05 UTC

        only  ✗ failed     ╸                                             0 s
           ValueError: cannot go on

        ✗ only
          Traceback (most recent call last):
            File "flow.py", line 6, in stage
              await inner()
            File "flow.py", line 2, in inner
              raise LookupError("no rows")
          LookupError: no rows

          The above exception was the direct cause of the following exception:

          Traceback (most recent call last):
            File "flow.py", line 8, in stage
              raise ValueError("cannot go on") from error
          ValueError: cannot go on
    """)


async def test_an_exception_group_shows_each_of_its_errors(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = body_from(
        tmp_path / "flow.py",
        """
        import trio

        async def inner():
            raise LookupError("no rows, and a message that is too long for one line of a terminal, so that it goes on")

        async def stage(ctx):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inner)
        """,
    )
    text = await drawn_run(Pipeline("group").with_stage("only", body))
    assert text.endswith(
        picture("""
        only  ✗ failed     ╸                                             0 s
           LookupError: no rows, and a message that is too long for one line of a …

        ✗ only
            + Exception Group Traceback (most recent call last):
            |   File "flow.py", line 7, in stage
            |     async with trio.open_nursery() as nursery:
            | ExceptionGroup: Exceptions from Trio nursery (1 sub-exception)
            +-+---------------- 1 ----------------
              | Traceback (most recent call last):
              |   File "flow.py", line 4, in inner
              |     raise LookupError("no rows, and a message that is too long for one …
              | LookupError: no rows, and a message that is too long for one line of a
              | terminal, so that it goes on
              +------------------------------------
        """)
    )


async def test_a_run_that_goes_shows_how_far_it_is(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("live")
        .with_stage("fetch", sleeps(1))
        .with_stage("left", sleeps(2), after="fetch")
        .with_stage("right", sleeps(4), after="fetch")
        .with_stage("report", gives(), after=["left", "right"])
    )
    async with pipeline.build().open() as run:
        await trio.sleep(2)
        before = drawn(run.results.trace)
    assert before == picture("""
        live  ● running for 2.00 s
        4 stages: 2 running, 1 succeeded, 1 pending
        run run-1, began 2025-01-02 03:04:05 UTC

        fetch      ✓ succeeded  ━━━━━━━━━━━━━━━━━━━━                       1.00 s
        ├─ left    ● running                        ━━━━━━━━━━━━━━━━━━━━   1.00 s
        │     partial: begun
        ├─ right   ● running                        ━━━━━━━━━━━━━━━━━━━━   1.00 s
        │     partial: begun
        └─ report  ○ pending
    """)


async def test_pipelines_of_several_first_stages_have_a_tree_without_a_root(autojump_clock: MockClock) -> None:
    pipeline = (
        Pipeline("roots")
        .with_stage("a", sleeps(1))
        .with_stage("a2", sleeps(1), after="a")
        .with_stage("b", sleeps(1))
        .with_stage("c", sleeps(2), after=["a2", "b"])
    )
    assert (await drawn_run(pipeline)).endswith(
        picture("""
        ┌─ a   ✓ succeeded  ━━━━━━━━━━                                 1.00 s
        │  a2  ✓ succeeded            ━━━━━━━━━━                       1.00 s
        ├─ b   ✓ succeeded  ━━━━━━━━━━                                 1.00 s
        └─ c   ✓ succeeded                      ━━━━━━━━━━━━━━━━━━━━   2.00 s
        """)
    )


async def test_a_cancelled_run_names_who_cancelled_it(autojump_clock: MockClock) -> None:
    runs: list[Run] = []

    async def cancelled() -> None:
        async with fan(1, sleeps(9)).build().open() as run:
            runs.append(run)
            await trio.sleep(1)
            run.cancel("seen enough")

    with pytest.raises(UnifiedPipelineCancelled):
        await cancelled()
    with trio.move_on_after(1):
        async with fan(1, sleeps(9)).build().open() as run:
            runs.append(run)
    assert drawn(runs[0].results.trace) == picture("""
        fan  ⊘ cancelled in 1.00 s
        3 stages: 1 cancelled, 1 succeeded, 1 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        root  ✓ succeeded  ╸                                             0 s
        b0    ⊘ cancelled  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   1.00 s
           Run.cancel: seen enough · partial: begun
        join  – skipped    Run.cancel: seen enough
    """)
    assert drawn(runs[1].results.trace) == picture("""
        fan  ⊘ interrupted in 1.00 s
        3 stages: 1 cancelled, 1 succeeded, 1 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        root  ✓ succeeded  ╸                                             0 s
        b0    ⊘ cancelled  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   1.00 s
           a cancel scope around the run was cancelled · partial: begun
        join  – skipped    a cancel scope around the run was cancelled
    """)


async def test_what_was_undone_is_a_part_of_its_own(autojump_clock: MockClock) -> None:
    async def undo(ctx: StageContext, output: StageOutput | None) -> None:
        await trio.sleep(0.25)
        if ctx.stage == "hotel":
            raise ConnectionError("nobody answers")

    twice = Compensation(undo, retry=Retry(attempts=2))
    pipeline = (
        Pipeline("trip")
        .with_stage("flight", sleeps(1), compensate=undo)
        .with_stage("hotel", sleeps(1), after="flight", compensate=twice)
        .with_stage("car", sleeps(1), after="flight", compensate=undo)
        .with_stage("pay", sleeps(1, StageOutput.fail("no money")), after=["hotel", "car"])
    )
    assert (await drawn_run(pipeline)).partition("\n\nC")[2] == picture(
        """
        ompensation  ✗ compensation failed
        car     ✓ undone  250 ms
        hotel   ✗ failed  500 ms · attempt 2 · ConnectionError: nobody answers
        flight  ⊘ held  'hotel', which used it, is still there
        """
    )


async def test_a_thousand_siblings_fold_and_what_did_not_succeed_stays(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("wide").with_stage("root", sleeps(1))
    for number in range(1000):
        body = returns(SKIP) if number in (7, 300) else sleeps(2 if number == 500 else 1 + number / 10_000)
        pipeline = pipeline.with_stage(f"item {number}", body, after="root")
    pipeline = pipeline.with_stage("join", sleeps(1), after=[optional(f"item {n}") for n in range(1000)])
    assert await drawn_run(pipeline) == picture("""
        wide  ✓ partial in 4.00 s
        1,002 stages: 1,000 succeeded, 2 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        root                     ✓ succeeded  ━━━━━━━━                            1.00 s
        ├─ item 7                – skipped    nothing new
        ├─ item 300              – skipped    nothing new
        ├─ item 500              ✓ succeeded          ━━━━━━━━━━━━━━━━━           2.00 s
        ├─ item 998              ✓ succeeded          ━━━━━━━━━╸                  1.10 s
        ├─ item 999              ✓ succeeded          ━━━━━━━━━╸                  1.10 s
        ├─ join                  ✓ succeeded                           ━━━━━━━━   1.00 s
        └─ … 995 more succeeded, 1.00–1.10 s          ━━━━━━━━━╸
    """)


async def test_a_chain_of_10_000_folds_around_what_did_not_succeed(autojump_clock: MockClock) -> None:
    pipeline = Pipeline("chain").with_stage("0", gives())
    for number in range(1, 10_000):
        body = returns(SKIP) if number == 7000 else gives()
        pipeline = pipeline.with_stage(str(number), body, after=str(number - 1), join="settled")
    assert (await drawn_run(pipeline)).endswith(
        picture("""
        0               ✓ succeeded  ╸                                             0 s
        1               ✓ succeeded  ╸                                             0 s
        … 6,998 more succeeded, 0 s  ╸
        7000            – skipped    nothing new
        … 2,997 more succeeded, 0 s  ╸
        9998            ✓ succeeded  ╸                                             0 s
        9999            ✓ succeeded  ╸                                             0 s
        """)
    )


# What holds of every picture


def deep(depth: int, failing: int) -> Pipeline:
    """Branches within branches: each stage forks into the next one and a side."""
    pipeline = Pipeline("deep", on_failure="isolate").with_stage("0", gives())
    for number in range(1, depth):
        side = raises(ValueError("boom")) if number == failing else gives()
        pipeline = pipeline.with_stage(str(number), gives(), after=str(number - 1))
        pipeline = pipeline.with_stage(f"side {number}", side, after=str(number - 1))
    return pipeline


async def test_a_thousand_nested_branches_fold_and_the_failure_in_the_deepest_stays(autojump_clock: MockClock) -> None:
    lines = (await drawn_run(deep(1000, failing=999))).splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "side 999 " in line and "✗ failed" in line]


async def test_a_hundred_failures_are_capped_and_the_rest_of_them_counted(autojump_clock: MockClock) -> None:
    pipeline = fan(300, raises(ValueError("a message that is long enough for a line of its own")), on_failure="isolate")
    lines = (await drawn_run(pipeline)).splitlines()
    assert len(lines) <= 100
    failed = [line for line in lines if "✗ failed" in line][1:]  # after the head line
    folded = next(line for line in lines if "more (" in line or "more failed" in line)
    assert 10 < len(failed) < 30
    assert f"… {300 - len(failed)} more failed" in folded


@pytest.mark.parametrize("width", [40, 60, 79, 80, 81, 120, 200])
async def test_no_line_is_wider_than_the_terminal(autojump_clock: MockClock, width: int) -> None:
    pipeline = (
        Pipeline("a pipeline with a long name, because somebody felt like it")
        .with_stage("the first stage of several, whose name goes on and on until nobody reads it", sleeps(1))
        .with_stage(
            "日本語のとても長い名前の段階です日本語のとても長い名前の段階です", sleeps(1, StageOutput.fail("x" * 300))
        )
        .with_stage("b", sleeps(1, StageOutput.cancel_branch("a reason of many words " * 20)))
        .with_stage("next", gives(), after="b")
    )
    results = await results_of(pipeline)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False)
    console.print(results.trace)
    lines = file.getvalue().splitlines()
    assert all(Console().measure(line).maximum <= width for line in lines)
    assert any("nobody reads it" in line or "ads it" in line for line in lines)  # its end is there, the middle is not


async def test_names_are_shown_as_they_are_and_do_nothing_to_the_terminal(autojump_clock: MockClock) -> None:
    text = await drawn_run(Pipeline("[red]").with_stage("[bold]a[/bold]\x1b[31m\nb", sleeps(1)))
    assert "\x1b" not in text
    assert "[bold]a[/bold] [31m b  ✓ succeeded" in text
    assert text.startswith("[red]  ✓ succeeded in 1.00 s\n")


async def test_a_terminal_without_unicode_gets_a_drawing_it_can_show(autojump_clock: MockClock) -> None:
    pipeline = fan(2, sleeps(1)).with_stage("skip", returns(SKIP), after="root")
    assert await drawn_run(pipeline, encoding="ascii") == picture("""
        fan  + partial in 1.00 s
        5 stages: 4 succeeded, 1 skipped
        run run-1, began 2025-01-02 03:04:05 UTC

        root     + succeeded  =                                             0 s
        |- b0    + succeeded  ========================================   1.00 s
        |- b1    + succeeded  ========================================   1.00 s
        |- skip  - skipped    nothing new
        `- join  + succeeded                                         =      0 s
    """)


async def test_colours_repeat_what_words_say(autojump_clock: MockClock) -> None:
    results = await results_of(fan(2, sleeps(1)))
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="truecolor", record=True)
    console.print(results.trace)
    assert "\x1b[32m✓ succeeded\x1b[0m" in file.getvalue()
    assert console.export_text().splitlines()[4].startswith("root     ✓ succeeded")


def test_a_trace_is_drawn_outside_of_trio_as_far_as_it_went() -> None:
    traces: list[Trace] = []

    async def main() -> None:
        async with fan(1, sleeps(9)).build().open() as run:
            await trio.sleep(1)
            traces.append(run.results.trace)
            run.cancel("seen enough")
            traces.append(attrs.evolve(traces[0], records=tuple(map(attrs.evolve, traces[0].records))))

    with pytest.raises(UnifiedPipelineCancelled):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert drawn(traces[1]).startswith("fan  ● running for 0 s\n3 stages: 1 running, 1 succeeded, 1 pending\n")


async def test_a_failure_of_a_task_in_the_nursery_is_shown_with_the_stage_that_asked_for_it(
    autojump_clock: MockClock,
) -> None:
    async def late() -> None:
        await trio.sleep(1)
        raise ValueError("too late")

    async def asks(ctx: StageContext) -> None:
        ctx.nursery.start_soon(late)

    lines = (
        await drawn_run(Pipeline("late").with_stage("asks", asks).with_stage("on", sleeps(9), after="asks"))
    ).split("\n")
    assert lines[4].startswith("asks  ✓ succeeded")
    assert lines[5].strip().startswith("a task in its nursery raised")
    assert lines[7].strip() == "because 'asks' failed · partial: begun"
    assert "      | ValueError: too late" in lines


# The parts


edges = st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=30)


@given(edges=edges, limit=st.integers(1, 40), data=st.data())
def test_every_stage_is_drawn_or_folded_exactly_once(edges: list[list[int]], limit: int, data: st.DataObject) -> None:
    pipeline = Pipeline("random")
    for number, needed in enumerate(edges):
        after = [f"s{other}" for other in dict.fromkeys(other % number for other in needed)] if number else []
        pipeline = pipeline.with_stage(f"s{number}", gives(), after=after)
    shape = pipeline.build().shape
    order = data.draw(st.permutations(range(len(edges))))
    entries = fold(shape, order, [1] * len(edges), limit)
    assert sorted(number for entry in entries for number in entry.stages) == list(range(len(edges)))
    assert len(entries) <= max(limit, 1)
    drawn_at = {number: place for place, entry in enumerate(entries) for number in entry.stages if not entry.folded}
    for branch in shape.branches:
        places = [drawn_at[number] for number in branch.strand if number in drawn_at]
        assert places == sorted(places)


def test_samples_prefer_joins_and_what_is_heavy() -> None:
    shape = fan(10).build().shape
    names = [shape.names[number] for number in samples(shape)]
    weights = [float(branch.index) for branch in shape.branches]
    heavy = [shape.names[number] for number in samples(shape, weights)]
    assert names == ["root", "join", "b0", "b1", "b2"]
    assert heavy == ["root", "join", "b9", "b8", "b7"]
    ends = chain(10).build().shape
    assert [ends.names[number] for number in samples(ends)] == ["s0", "s9", "s1", "s8"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000_000_5, "0.50 µs"),
        (0.000_012_34, "12.3 µs"),
        (0.000_999_9, "1.00 ms"),
        (0.001_234, "1.23 ms"),
        (0.25, "250 ms"),
        (0.9999, "1.00 s"),
        (1, "1.00 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (125, "2m 05s"),
        (3600, "1h 00m"),
        (3 * 3600 + 240, "3h 04m"),
        (90_000, "1d 01h"),
    ],
)
def test_a_duration_has_three_digits_and_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_range_of_durations_names_its_unit_once() -> None:
    assert durations([0.0034, 0.0012, 0.002]) == "1.20–3.40 ms"
    assert durations([0.5, 2]) == "500 ms–2.00 s"
    assert durations([2, 2]) == "2.00 s"
    assert durations([65, 125]) == "1m 05s–2m 05s"


def test_a_long_name_loses_its_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"
    assert shortened("日本語日本語", 8) == "日本…語"


def test_frames_of_an_installed_package_are_kept_if_the_stage_is_in_it(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "users" / "flow.py"
    other = tmp_path / "site-packages" / "other" / "lib.py"
    own = tmp_path / "app.py"
    for path in (package, other):
        path.parent.mkdir(parents=True)
    failing = body_from(other, "def stage():\n    raise ValueError('deep down')\n")
    source = "def stage():\n    other()\n"

    def lines_of(path: Path) -> list[str]:
        stage = body_from(path, source)
        stage.__globals__["other"] = failing
        namespace: dict[str, Any] = {"stage": stage}
        exec(compile("def standard():\n    stage()\n", textwrap.__file__, "exec"), namespace)
        exec(compile("def run():\n    standard()\n", trio.__file__, "exec"), namespace)
        with pytest.raises(ValueError, match="deep down") as caught:
            namespace["run"]()
        error = caught.value
        assert error.__traceback__ is not None
        return trimmed(error.with_traceback(error.__traceback__.tb_next))

    for path in (package, own):
        assert [line.strip() for line in lines_of(path) if "File" in line] == [f'File "{path}", line 2, in stage']


def test_an_error_whose_message_cannot_be_shown_is_shown_nevertheless() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    async def stage(ctx: StageContext) -> None:
        raise Broken

    results = trio.run(results_of, Pipeline("broken").with_stage("only", stage))
    assert "✗ failed" in drawn(results.trace)


async def test_taking_a_trace_imports_nothing(autojump_clock: MockClock) -> None:
    results = await chain(3).run(PipelineContext(run_id="mine"))
    assert repr(results.trace).startswith("Trace(run_id='mine', status=<RunStatus.SUCCEEDED")
