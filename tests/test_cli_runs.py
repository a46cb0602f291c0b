"""The command and recorded runs: `run`, `runs`, `resume`, `trace` and `prune`, also after the process was killed."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from rich.console import Console

from stageflow import (
    Pipeline,
    PipelineContext,
    Retry,
    StageContext,
    StageExecutionError,
    StageOutput,
    StageRecord,
    optional,
)
from stageflow.cli import main
from stageflow.journal.holder import new_holder
from stageflow.journal.resume import load
from stageflow.journal.store import open_store
from stageflow.trace.recorded import trace_of
from tests.test_demo import install

if TYPE_CHECKING:
    from collections.abc import Generator

    from stageflow.trace import Trace

FLOWS = """
from datetime import date
from pathlib import Path

import attrs
import trio
from stageflow import Pipeline, StageContext, StageOutput


def note(name):
    with Path("effects").open("a") as file:
        file.write(f"{name}\\n")


@attrs.frozen
class Order:
    number: int


async def fetch(ctx: StageContext):
    note("fetch")
    return {"rows": [1, 2], "day": date(2026, 3, 2), "odd": float("inf")}


async def send(ctx: StageContext):
    note("send")
    if not Path("go").exists():
        raise ValueError("nobody there")
    return {"sent": len(ctx.inputs["fetch"]["rows"])}


async def wait(ctx: StageContext):
    note("wait")
    while not Path("go").exists():
        await trio.sleep(0.01)


async def stop(ctx: StageContext):
    return StageOutput.cancel("enough")


async def tell(ctx: StageContext):
    return {"data": ctx.data, "tenant": ctx.tenant}


async def handle(ctx: StageContext):
    return {"handle": object()}


report = Pipeline("report").with_stage("fetch", fetch).with_stage("send", send, after="fetch", timeout=5)
blocked = (
    Pipeline("blocked")
    .with_stage("fetch", fetch)
    .with_stage("wait", wait, after="fetch", kind="work")
    .with_stage("end", tell, after="wait")
)
stopped = Pipeline("stopped").with_stage("fetch", fetch).with_stage("stop", stop, after="fetch")
told = Pipeline("told").with_stage("tell", tell)
ordered = Pipeline("ordered", inputs=Order).with_stage("tell", tell)
unstorable = Pipeline("unstorable").with_stage("handle", handle)
"""
MODULE = "flows_of_runs"


@pytest.fixture(autouse=True)
def flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a module of pipelines in it, and no word on where runs are."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("STAGEFLOW_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the module may be written twice within a second
    write(FLOWS)


def write(source: str) -> None:
    """Writes the module of pipelines, as somebody does who deploys another version of it."""
    sys.modules.pop(MODULE, None)
    Path(f"{MODULE}.py").write_text(source)


def effects() -> list[str]:
    return Path("effects").read_text().split()


def command(name: str, *arguments: str) -> int:
    return main([name, *arguments, "--store", "runs.db"])


def run(pipeline: str, *arguments: str) -> int:
    return command("run", f"{MODULE}:{pipeline}", *arguments)


def sql(statement: str, *parameters: object) -> None:
    with closing(sqlite3.connect("runs.db", isolation_level=None)) as connection:
        connection.execute(statement, parameters)


def lines(text: str) -> list[str]:
    """Gives what was printed, line by line, with every time and every date in the same words."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-03-02 09:30:00", text)
    return [line.rstrip() for line in text.splitlines()]


def states(printed: str) -> dict[str, str]:
    return {name: record["state"] for name, record in json.loads(printed)["records"].items()}


# run


def test_run_draws_the_trace_and_without_a_store_nothing_else_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", f"{MODULE}:told"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"told  ✓ succeeded in .* .?s\n1 stage succeeded\nrun [-0-9a-f]{36}, began .* UTC\n\ntell .*\n", out
    )
    assert err == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"{MODULE}.py"]


def test_run_with_a_store_first_says_which_run_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("told", "--run-id", "mine") == 0
    printed = lines(capsys.readouterr().out)
    assert printed[0] == "run mine, recorded in runs.db"
    assert printed[1].startswith("told  ✓ succeeded in ")
    assert printed[3] == "run mine, began 2026-03-02 09:30:00 UTC"


def test_a_run_that_fails_shows_why_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "a b") == 1
    out, err = capsys.readouterr()
    printed = lines(out)
    assert [line[:19].rstrip() for line in printed[5:7]] == ["fetch  ✓ succeeded", "send   ✗ failed"]
    assert printed[7:] == [
        "   ValueError: nobody there",
        "",
        "✗ send",
        "  Traceback (most recent call last):",
        '    File "flows_of_runs.py", line 28, in send',
        '      raise ValueError("nobody there")',
        "  ValueError: nobody there",
    ]
    assert err == "stageflow: to go on with it: stageflow resume 'a b' --store runs.db\n"


def test_run_as_json_is_one_object_with_outputs_as_json_knows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--json", "--run-id", "mine", "--tenant", "acme") == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert sorted(found) == [
        "began_at",
        "compensation",
        "duration",
        "outputs",
        "pipeline",
        "records",
        "run_id",
        "status",
    ]
    assert (found["run_id"], found["pipeline"], found["status"]) == ("mine", "report", "failed")
    assert found["outputs"] == {"fetch": {"rows": [1, 2], "day": "datetime.date(2026, 3, 2)", "odd": "inf"}}
    assert found["records"]["fetch"]["duration"] <= found["duration"]
    del found["records"]["fetch"]["duration"], found["records"]["send"]["duration"]
    cause = {"kind": "failure", "stage": "send", "reason": "ValueError: nobody there"}
    assert found["records"] == {
        "fetch": {"state": "succeeded", "branch": "trunk", "attempts": 1, "cause": None},
        "send": {"state": "failed", "branch": "trunk", "attempts": 1, "cause": cause},
    }
    assert err.splitlines() == [
        "run mine, recorded in runs.db",
        "stageflow: to go on with it: stageflow resume mine --store runs.db --tenant acme",
    ]


@pytest.mark.parametrize("given", ['{"a": [1, null]}', "@input.json", "-"])
def test_run_takes_its_data_from_the_command_a_file_or_standard_input(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("input.json").write_text('{"a": [1, null]}')
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": [1, null]}'))
    assert main(["run", f"{MODULE}:told", "--json", "--input", given, "--tenant", "acme"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["tell"] == {"data": {"a": [1, None]}, "tenant": "acme"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "--input is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[NaN]", "--input is no JSON: NaN is none"),
        ("@missing.json", "--input cannot be read: No such file or directory: 'missing.json'"),
    ],
)
def test_data_that_cannot_be_read_is_a_usage_error(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", f"{MODULE}:told", "--input", given]) == 2
    assert capsys.readouterr() == ("", f"stageflow: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stopped"], 5, "stageflow: to go on with it: stageflow resume mine --store runs.db"),
        (["stoped"], 2, r"stageflow: module 'flows_of_runs' has no 'stoped'; did you mean 'stopped' or 'told'\?"),
        (["ordered", "--input", '{"number": "one"}'], 2, r"stageflow: .*number.*"),
        (["unstorable"], 4, r"stageflow: what stage 'handle' gave cannot be kept in a store as it is: .*"),
    ],
)
def test_how_a_run_ended_is_its_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--run-id", "mine") == code
    assert re.fullmatch(message, capsys.readouterr().err.rstrip("\n"))


def test_a_run_id_is_used_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("told", "--run-id", "mine") == 0
    capsys.readouterr()
    assert run("told", "--run-id", "mine") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stageflow: there is a run mine in this store already; ")


def test_a_file_that_is_no_store_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs.db").write_text("Dear diary, " * 100)
    for arguments in (["run", f"{MODULE}:told"], ["runs"], ["trace", "mine"], ["prune", "--older-than", "1d"]):
        assert command(*arguments) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"stageflow: the store runs\.db .*: file is not a database\n", err)


def test_the_environment_may_say_where_runs_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAGEFLOW_STORE", "sqlite:env.db")
    assert main(["run", f"{MODULE}:told", "--run-id", "mine"]) == 0
    assert main(["trace", "mine"]) == 0
    assert "run mine, recorded in sqlite:env.db" in capsys.readouterr().out
    assert main(["runs", "--store", "other.db"]) == 2
    assert capsys.readouterr() == ("", "stageflow: there is no store 'other.db'\n")


@pytest.mark.parametrize(
    "arguments", [["runs"], ["trace", "mine"], ["resume", "mine"], ["prune", "--older-than", "1d"]]
)
def test_what_is_about_recorded_runs_has_to_know_where_they_are(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = "stageflow: say where the runs are: --store FILE, or STAGEFLOW_STORE=FILE in the environment\n"
    assert capsys.readouterr() == ("", message)
    assert command(*arguments) == 2
    assert capsys.readouterr() == ("", "stageflow: there is no store 'runs.db'\n")
    assert not (tmp_path / "runs.db").exists()
    assert main([*arguments, "--store", "postgresql://here/runs"]) == 2
    assert capsys.readouterr().err.startswith("stageflow: open_store() takes ")


# runs


def recorded() -> None:
    """Records a run that failed, one that was cancelled, and one that went well."""
    assert run("report", "--run-id", "first") == 1
    assert run("stopped", "--run-id", "second") == 5
    assert run("told", "--run-id", "third") == 0


def test_runs_are_listed_the_latest_first(capsys: pytest.CaptureFixture[str]) -> None:
    recorded()
    sql("UPDATE stageflow_runs SET recoveries = 2 WHERE run_id = 'first'")
    capsys.readouterr()
    assert command("runs") == 0
    assert lines(capsys.readouterr().out) == [
        "Run     Pipeline  Status     Began (UTC)          Stages ended     Recoveries",
        "─────────────────────────────────────────────────────────────────────────────",
        "third   told      succeeded  2026-03-02 09:30:00  1                         0",
        "second  stopped   cancelled  2026-03-02 09:30:00  2 (1 cancelled)           0",
        "first   report    failed     2026-03-02 09:30:00  2 (1 failed)              2",
    ]


def test_runs_may_be_those_that_are_not_over_some_of_them_or_a_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    recorded()
    assert run("told", "--run-id", "fourth", "--tenant", "acme") == 0
    capsys.readouterr()

    def listed(*arguments: str) -> list[str]:
        assert command("runs", "--json", *arguments) == 0
        return [info["run_id"] for info in json.loads(capsys.readouterr().out)["runs"]]

    assert listed() == ["third", "second", "first"]
    assert listed("--unfinished") == ["second", "first"]
    assert listed("--unfinished", "--limit", "1") == ["second"]
    assert listed("--tenant", "acme") == ["fourth"]
    assert command("runs", "--tenant", "acme", "--unfinished") == 0
    assert capsys.readouterr().out == "There are no unfinished runs in runs.db.\n"
    assert command("runs", "--limit", "0") == 2


def test_runs_as_json_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    capsys.readouterr()
    assert command("runs", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found.pop("began_at") < found.pop("changed_at")
    assert found == {
        "run_id": "mine",
        "pipeline": "report",
        "tenant": None,
        "status": "failed",
        "held": False,
        "died": False,
        "recoveries": 0,
        "base": None,
        "compensation": None,
        "stages": {"failed": 1, "succeeded": 1},
    }


# resume


def test_resume_knows_the_pipeline_of_a_run_that_the_command_has_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    Path("go").touch()
    capsys.readouterr()
    assert command("resume", "mine", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["status"], found["outputs"]["send"]) == ("succeeded", {"sent": 2})
    assert found["records"]["send"]["attempts"] == 2
    assert err == "run mine, recorded in runs.db\n"
    assert effects() == ["fetch", "send", "send"]


def test_resume_has_to_be_told_the_pipeline_of_any_other_run(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(Path.cwd()))
    report: Pipeline = importlib.import_module(MODULE).report

    async def start() -> None:
        async with open_store("sqlite:runs.db") as store:
            await report.build().run(PipelineContext(run_id="mine"), store=store)

    with pytest.raises(StageExecutionError):
        trio.run(start)
    Path("go").touch()
    assert command("resume", "mine") == 2
    message = "run mine was not started by this command, so say of what: resume mine MODULE:PIPELINE"
    assert capsys.readouterr() == ("", f"stageflow: {message}\n")
    assert command("resume", "mine", f"{MODULE}:report") == 0


def test_data_of_a_class_of_the_pipelines_module_is_there_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ordered", "--run-id", "mine", "--input", '{"number": 7}') == 0
    sys.modules.pop(MODULE)
    sys.path[:] = [path for path in sys.path if path != str(Path.cwd())]  # as in another process
    capsys.readouterr()
    assert command("resume", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == {"tell": {"data": "Order(number=7)", "tenant": None}}


def test_a_plan_says_what_would_be_done_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    capsys.readouterr()
    assert command("resume", "mine", "--plan") == 0
    assert lines(capsys.readouterr().out) == [
        "Resuming run mine of 'report':",
        "",
        "   Stage   Action   Why",
        "───────────────────────────────────────────────────────────────────────",
        "   fetch   reuse    succeeded",
        "   send    rerun    failed: failure of 'send': ValueError: nobody there",
        "",
        "It can be resumed.",
    ]
    assert effects() == ["fetch", "send"]
    assert run("told", "--run-id", "over") == 0
    capsys.readouterr()
    assert command("resume", "over", "--plan") == 0
    assert lines(capsys.readouterr().out)[-1] == "The run is over: nothing is run again."


CHANGED = FLOWS.replace('"rows": [1, 2]', '"rows": [1, 2, 3]')


def test_a_plan_marks_what_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    write(CHANGED)
    capsys.readouterr()
    assert command("resume", "mine", "--plan") == 3
    assert lines(capsys.readouterr().out) == [
        "Resuming run mine of 'report':",
        "",
        "    Stage   Action     Why",
        "──────────────────────────────────────────────────────────────────────────",
        "!   fetch   conflict   succeeded, but its code changed since",
        "    send    rerun      failed: failure of 'send': ValueError: nobody there",
        "",
        "Refused: it needs a word on what is marked with !; say --on-change reuse or rerun.",
    ]
    assert command("resume", "mine", "--plan", "--json") == 3
    assert json.loads(capsys.readouterr().out) == {
        "run_id": "mine",
        "pipeline": "report",
        "over": False,
        "hindrances": ["it needs a word on what is marked with !; say --on-change reuse or rerun"],
        "steps": {
            "fetch": {
                "action": "conflict",
                "reason": "succeeded, but its code changed since",
                "changed": ["code"],
                "blocks": True,
            },
            "send": {
                "action": "rerun",
                "reason": "failed: failure of 'send': ValueError: nobody there",
                "changed": [],
                "blocks": False,
            },
        },
    }
    assert command("resume", "mine", "--plan", "--on-change", "rerun") == 0


@pytest.mark.parametrize(("on_change", "sent"), [("reuse", 2), ("rerun", 3)])
def test_changed_code_is_refused_until_somebody_says_what_it_means(
    on_change: str, sent: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", "--run-id", "mine") == 1
    write(CHANGED)
    Path("go").touch()
    capsys.readouterr()
    assert command("resume", "mine") == 3
    assert capsys.readouterr() == (
        "",
        (
            "stageflow: run mine of 'report' was not resumed: fetch: conflict (succeeded, but its code changed since); "
            "say --on-change reuse or rerun\n"
        ),
    )
    assert command("resume", "mine", "--json", "--on-change", on_change) == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["send"] == {"sent": sent}


def test_a_run_that_another_process_has_in_hand_is_left_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    holder = new_holder()
    sql("UPDATE stageflow_runs SET holder = ?, lease_until = 1e11", holder)
    capsys.readouterr()
    assert command("resume", "mine") == 3
    assert capsys.readouterr().err.startswith(f"stageflow: run mine is in the hands of {holder}; ")
    assert command("resume", "mine", "--plan", "--json") == 3
    assert json.loads(capsys.readouterr().out)["hindrances"] == [f"it is in the hands of {holder}"]


def test_a_parked_run_is_resumed_when_somebody_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--run-id", "mine") == 1
    sql("UPDATE stageflow_runs SET recoveries = 6, status = 'running'")
    capsys.readouterr()
    assert command("resume", "mine") == 3
    assert capsys.readouterr().err == (
        "stageflow: run mine was resumed 6 times, and each time its process died before the run ended; see what kills "
        "it, then say --unpark\n"
    )
    assert command("resume", "mine", "--plan") == 3
    assert lines(capsys.readouterr().out)[-1] == (
        "Refused: it was resumed 6 times, and each time its process died; say --unpark."
    )
    Path("go").touch()
    assert command("resume", "mine", "--unpark", "--plan") == 0
    assert command("resume", "mine", "--unpark") == 0


@pytest.mark.parametrize("name", ["resume", "trace"])
def test_a_run_that_is_not_there_or_another_tenants_is_asked_for_in_vain(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("told", "--run-id", "mine", "--tenant", "acme") == 0
    capsys.readouterr()
    assert command(name, "yours") == 2
    assert capsys.readouterr() == ("", "stageflow: there is no run yours in this store\n")
    assert command(name, "mine") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stageflow: run mine belongs to ")
    assert command(name, "mine", "--tenant", "acme") == 0


@pytest.mark.parametrize("name", ["resume", "trace"])
def test_a_damaged_journal_is_said_to_be_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("told", "--run-id", "mine") == 0
    sql("UPDATE stageflow_events SET body = replace(body, 'succeeded', 'failed') WHERE seq = 2")
    capsys.readouterr()
    assert command(name, "mine") == 4
    assert capsys.readouterr() == ("", "stageflow: the journal of run mine is damaged at event 2\n")


# trace


def test_a_trace_from_the_store_is_that_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stopped", "--run-id", "mine") == 5
    drawn = lines(capsys.readouterr().out)[1:]
    assert command("trace", "mine") == 0
    assert lines(capsys.readouterr().out) == [
        *drawn,
        "",
        "To go on with it: stageflow resume mine --store runs.db",
    ]


def test_a_trace_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--json", "--run-id", "mine") == 1
    found = json.loads(capsys.readouterr().out)
    assert command("trace", "mine", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("held") is False
    assert again.pop("died") is False
    began, recorded = (datetime.fromisoformat(one.pop("began_at")) for one in (found, again))
    assert abs((began - recorded).total_seconds()) < 1
    del found["outputs"]
    for one in (found, again, *found["records"].values(), *again["records"].values()):
        one["duration"] = round(one["duration"], 9)  # the clock starts anywhere, and seconds are floats
    assert again == found


def test_a_trace_needs_neither_the_module_nor_its_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ordered", "--run-id", "mine", "--input", '{"number": 7}') == 0
    sys.modules.pop(MODULE)
    Path(f"{MODULE}.py").unlink()
    capsys.readouterr()
    assert command("trace", "mine", "--json") == 0
    assert states(capsys.readouterr().out) == {"tell": "succeeded"}


async def good(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(attempt=ctx.attempt, plain=True)


async def second_time(ctx: StageContext) -> StageOutput:
    return StageOutput.ok() if ctx.attempt == 2 else StageOutput.retry("not yet")


async def leaves(ctx: StageContext) -> StageOutput:
    return StageOutput.cancel_branch("nothing to do")


async def too_long(ctx: StageContext) -> None:
    ctx.save_partial(page=3)
    await trio.sleep(60)


async def of_item(ctx: StageContext) -> None:
    if ctx.data == 2:
        raise ValueError("not this one")


EVERYTHING = (
    Pipeline("everything")
    .with_stage("good", good)
    .with_stage("tried", second_time, after="good", retry=Retry(attempts=3, delay=0.5, jitter=0))
    .with_stage("left", leaves, after="good")
    .with_stage("below", good, after="left")
    .with_stage("slow", too_long, after="good", timeout=2, on_failure="tolerate")
    .with_stage("asked", good, after="good", when=lambda ctx: False)
    .with_map("items", of_item, over=lambda ctx: [1, 2, 3], after="good", tolerate=1)
    .with_stage("report", good, after=["tried", optional("below"), optional("slow"), optional("items")])
    .build()
)


def comparable(record: StageRecord) -> dict[str, Any]:
    """Gives what a trace shows of a record, in times since the first."""
    details = record.details
    return {
        "state": record.state,
        "branch": record.branch,
        "attempts": record.attempts,
        "cause": record.cause,
        "duration": None if record.duration is None else round(record.duration, 6),
        "output": record.output is not None,
        "partial": list(record.partial),
        "error": record.error is not None,
        "earlier": [(attempt.number, attempt.reason) for attempt in details.earlier],
        "limit": (details.limit, details.source),
        "items": {number: (item.state, item.cause) for number, item in details.items.items()},
    }


async def test_the_journal_knows_of_every_stage_what_the_run_did(autojump_clock: trio.testing.MockClock) -> None:
    async with open_store("memory:") as store:
        results = await EVERYTHING.run(store=store)
        trace = trace_of(*await load(store, results.run_id, tenant=None), started=results.trace.started)
    assert trace.shape.branch_names == EVERYTHING.shape.branch_names
    assert [branch.strand for branch in trace.shape.branches] == [branch.strand for branch in EVERYTHING.shape.branches]
    assert trace.status is results.status
    assert trace.ended == pytest.approx(results.trace.ended)  # pyright: ignore[reportUnknownMemberType]
    assert {record.name: comparable(record) for record in trace.records} == {
        record.name: comparable(record) for record in results.trace.records
    }
    assert in_order(trace) == in_order(results.trace) == ["good", "left", "items", "tried", "slow", "report"]
    drawn, again = map(drawing, (results.trace, trace))
    assert again == drawn


def in_order(trace: Trace) -> list[str]:
    """Gives the stages that were entered, in the order in which they settled; of the others that is written later."""
    entered = [(record.place, record.name) for record in trace.records if record.attempts]
    return [name for _, name in sorted(entered)]


def drawing(trace: Trace) -> list[str]:
    """Gives a trace as it is drawn, without what is told apart on purpose: an error itself, and words for it."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(trace)
    assert isinstance(console.file, io.StringIO)
    return lines(console.file.getvalue().partition("\n\n✗")[0])


# prune


def test_prune_removes_what_ended_long_ago(capsys: pytest.CaptureFixture[str]) -> None:
    recorded()
    sql("UPDATE stageflow_runs SET changed_at = changed_at - 3 * 86400 WHERE run_id <> 'second'")
    sql("UPDATE stageflow_runs SET status = 'interrupted' WHERE run_id = 'first'")
    capsys.readouterr()
    assert command("prune", "--older-than", "2d", "--dry-run") == 0
    table = [
        "Run    Pipeline  Status     Began (UTC)          Stages ended",
        "─────────────────────────────────────────────────────────────",
        "third  told      succeeded  2026-03-02 09:30:00  1",
        "",
    ]
    assert lines(capsys.readouterr().out) == [*table, "1 run would be removed."]
    assert command("prune", "--older-than", "2d") == 0
    assert lines(capsys.readouterr().out) == [*table, "1 run removed."]
    assert command("prune", "--older-than", "2d", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"dry_run": False, "runs": []}
    assert command("prune", "--older-than", "0.5w", "--dry-run") == 0
    assert capsys.readouterr().out == "0 runs would be removed.\n"
    assert command("runs", "--json") == 0
    assert [info["run_id"] for info in json.loads(capsys.readouterr().out)["runs"]] == ["second", "first"]


@pytest.mark.parametrize("age", ["30", "d", "-1d", "3 y", "1e3s"])
def test_an_age_has_a_unit(age: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", f"--older-than={age}", "--store", "runs.db"]) == 2
    message = f"{age!r} is no length of time; write a number and s, m, h, d or w, such as 30d"
    assert capsys.readouterr() == ("", f"stageflow: {message}\n")


# Processes that end before their run


@contextmanager
def process(*arguments: str) -> Generator[subprocess.Popen[str]]:
    """Runs the command in a process of its own, as long as the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "stageflow.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def until(run_id: str, stage: str, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Waits until a stage is in a state, as the store has it."""
    end = time.monotonic() + 30
    while True:
        assert time.monotonic() < end, f"{stage} is not {state}"
        code = command("trace", run_id, "--json")
        out, _ = capsys.readouterr()
        if code == 0 and states(out)[stage] == state:
            return
        time.sleep(0.02)


def test_a_run_whose_process_is_killed_is_seen_and_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    with process("run", f"{MODULE}:blocked", "--store", "runs.db", "--run-id", "mine") as started:
        until("mine", "wait", "running", capsys)
        assert command("trace", "mine") == 0
        going = lines(capsys.readouterr().out)
        assert going[0].startswith("blocked  ● running for ")
        assert going[1] == "3 stages: 1 running, 1 succeeded, 1 pending"
        assert len(going) == 7
        assert command("runs") == 0
        assert lines(capsys.readouterr().out)[2] == "mine  blocked   running  2026-03-02 09:30:00  1"
        assert command("resume", "mine") == 3
        assert capsys.readouterr().err.startswith("stageflow: run mine is in the hands of ")
        started.kill()
        assert started.wait() == -signal.SIGKILL
        assert started.stdout is not None
        assert started.stdout.read() == "run mine, recorded in runs.db\n"

    assert command("trace", "mine") == 0
    died = lines(capsys.readouterr().out)
    assert died[0].startswith("blocked  ● running for ")
    assert [line[:16] for line in died[4:7]] == ["fetch  ✓ succeed", "wait   ● running", "end    ○ pending"]
    assert died[7:] == ["", "Its process has died; to go on with it: stageflow resume mine --store runs.db"]
    assert command("trace", "mine", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["held"], found["died"]) == ("running", False, True)
    assert command("runs", "--unfinished") == 0
    assert lines(capsys.readouterr().out) == [
        "Run   Pipeline  Status  Began (UTC)          Stages ended",
        "─────────────────────────────────────────────────────────",
        "mine  blocked   died    2026-03-02 09:30:00  1",
    ]
    assert command("resume", "mine", "--in-doubt", "hold", "--plan") == 3
    assert lines(capsys.readouterr().out)[5:] == [
        "!   wait    in doubt   attempt 1 was entered, and is not known to have ended",
        "    end     run        not reached yet",
        "",
        "Refused: it needs a word on what is marked with !; say --in-doubt rerun.",
    ]
    assert command("resume", "mine", "--in-doubt", "hold") == 3
    assert capsys.readouterr().err == (
        "stageflow: run mine of 'blocked' was not resumed: wait: in doubt (attempt 1 was entered, and is not known to "
        "have ended); say --in-doubt rerun\n"
    )

    Path("go").touch()
    assert command("resume", "mine") == 0
    assert effects() == ["fetch", "wait", "wait"]
    assert command("runs", "--unfinished") == 0


def test_a_run_that_is_interrupted_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with process("run", f"{MODULE}:blocked", "--store", "runs.db", "--run-id", "mine", "--json") as started:
        until("mine", "wait", "running", capsys)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate()
    assert started.returncode == 130
    assert json.loads(out)["status"] == "interrupted"
    assert states(out) == {"fetch": "succeeded", "wait": "cancelled", "end": "skipped"}
    assert err.splitlines() == [
        "run mine, recorded in runs.db",
        "stageflow: interrupted; to go on with it: stageflow resume mine --store runs.db",
    ]
    Path("go").touch()
    assert command("resume", "mine") == 0
    assert effects() == ["fetch", "wait", "wait"]


# The demo


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that is torn, with a file whose reading lasts until somebody writes to it."""
    directory = tmp_path / "site"
    install(directory, "demo-slow", {"slow/a.py": "a", "slow/b.py": "b", "slow/z.py": ""})
    (directory / "slow/a.py").write_text("A")
    (directory / "slow/b.py").unlink()
    (directory / "slow/z.py").unlink()
    os.mkfifo(directory / "slow/z.py")
    monkeypatch.setattr(sys, "path", [str(directory), *sys.path])
    return directory


def test_an_audit_whose_process_is_killed_is_gone_on_with_and_finds_the_same(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with process("demo", "--only", "demo-slow", "--store", "runs.db", "--json") as started:
        assert started.stderr is not None
        run_id = started.stderr.readline().removeprefix("run ").removesuffix(", recorded in runs.db\n")
        until(run_id, "demo-slow: read", "succeeded", capsys)
        started.kill()
    (site / "slow/z.py").unlink()
    (site / "slow/z.py").touch()
    (site / "demo-slow-1.0.dist-info/RECORD").rename(site / "RECORD")  # which nobody will read again
    assert command("runs", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["died"] is True
    assert command("resume", run_id, "--plan") == 0
    assert [" ".join(line.split()) for line in lines(capsys.readouterr().out)[4:8]] == [
        "environment reuse succeeded",
        "demo-slow: read reuse succeeded",
        "demo-slow: verify run not reached yet",
        "report run not reached yet",
    ]
    assert command("resume", run_id, "--json") == 1
    resumed = json.loads(capsys.readouterr().out)
    (site / "RECORD").rename(site / "demo-slow-1.0.dist-info/RECORD")
    assert main(["demo", "--only", "demo-slow", "--json"]) == 1
    undisturbed = json.loads(capsys.readouterr().out)
    assert resumed.pop("seconds") > undisturbed.pop("seconds")
    assert resumed == undisturbed
    assert [finding["path"] for finding in resumed["findings"]] == ["slow/a.py", "slow/b.py"]


def test_an_audit_that_was_recorded_is_shown_as_ever(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "slow/z.py").unlink()
    assert command("demo", "--only", "demo-slow", "--no-trace") == 1
    said, *printed = lines(capsys.readouterr().out)
    assert printed[:-1] == [
        "Distribution   File                   Problem",
        "────────────────────────────────────────────────────────────",
        "demo-slow      slow/a.py              altered: other content",
        "demo-slow      slow/b.py              missing",
        "demo-slow      slow/z.py              missing",
        "",
    ]
    run_id = said.removeprefix("run ").removesuffix(", recorded in runs.db")
    assert command("resume", run_id) == 1
    again = lines(capsys.readouterr().out)
    assert again[: len(printed)] == [said, *printed[:-1]]
    assert again[len(printed) + 2].startswith("audit  ✓ succeeded in ")


def test_an_audit_goes_on_in_its_own_environment_with_the_same_versions(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with process("demo", "--only", "demo-slow", "--store", "runs.db", "--json") as started:
        assert started.stderr is not None
        run_id = started.stderr.readline().removeprefix("run ").removesuffix(", recorded in runs.db\n")
        until(run_id, "demo-slow: read", "succeeded", capsys)
        started.kill()
    here = sys.prefix
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert command("resume", run_id) == 2
    assert capsys.readouterr().err == (
        f"stageflow: this audit is of {here!r}; go on with it there, not in '/elsewhere'\n"
    )
    monkeypatch.setattr(sys, "prefix", here)
    (site / "demo-slow-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: demo-slow\nVersion: 2.0\n")
    assert command("resume", run_id) == 3
    assert "demo-slow: read: conflict (succeeded, but its code changed since)" in capsys.readouterr().err


def test_the_demo_is_recorded_only_where_it_is_told_to(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "slow/z.py").unlink()
    monkeypatch.setenv("STAGEFLOW_STORE", "runs.db")
    assert main(["demo", "--only", "demo-slow", "--no-trace"]) == 1
    assert not Path("runs.db").exists()


# Runs that are undone

TRIP = """
from pathlib import Path

from stageflow import Compensation, Pipeline, Retry


async def hotel(ctx):
    return {"booked": True}


async def pay(ctx):
    raise ValueError("no money")


async def cancel_hotel(ctx, output):
    if not Path("open").exists():
        raise OSError("the hotel does not answer")


trip = (
    Pipeline("trip")
    .with_stage("hotel", hotel, compensate=Compensation(cancel_hotel, retry=Retry(attempts=1)))
    .with_stage("pay", pay, after="hotel")
)
"""


def test_a_run_whose_undoing_has_failed_is_unfinished_and_resume_finishes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(TRIP)
    assert run("trip", "--run-id", "mine") == 1
    assert "hotel  ✗ failed" in capsys.readouterr().out
    assert command("runs", "--unfinished", "--json") == 0
    (info,) = json.loads(capsys.readouterr().out)["runs"]
    assert (info["status"], info["compensation"]) == ("failed", "compensation failed")
    assert command("resume", "mine", "--plan") == 0
    assert "hotel   undo" in capsys.readouterr().out
    Path("open").touch()
    assert command("resume", "mine") == 1  # for the run has failed, and that it is undone changes nothing of it
    assert "Compensation  ✓ compensated" in capsys.readouterr().out
    assert command("runs", "--unfinished") == 0
    assert capsys.readouterr().out == "There are no unfinished runs in runs.db.\n"


def test_a_run_that_was_undone_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    write(TRIP)
    Path("open").touch()
    run("trip", "--run-id", "mine")
    capsys.readouterr()
    assert command("resume", "mine", "--plan") == 3
    assert "Refused: it was undone; start a new one with fork()." in capsys.readouterr().out
    assert command("resume", "mine") == 3
    assert "run mine was undone" in capsys.readouterr().err
    assert command("trace", "mine", "--json") == 0
    found = json.loads(capsys.readouterr().out)["compensation"]
    assert found["status"] == "compensated"
    assert found["undos"]["hotel"] == {"state": "undone", "attempts": 1, "reason": ""}
