"""The command: what it prints, where, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from stageflow.cli import main
from tests.test_demo import install

if TYPE_CHECKING:
    from pathlib import Path

FLOWS = """
from stageflow import Pipeline, StageContext


async def step(ctx: StageContext) -> None: ...


report = Pipeline("report").with_stage("fetch", step).with_stage("send", step, after="fetch")
built = report.build()
nothing = 42
round_and_round = Pipeline("round").with_stage("a", step, after="b").with_stage("b", step, after="a")
ways = (
    Pipeline("ways")
    .with_stage("route", step, kind="route")
    .with_stage("left", step, after="route", when=bool)
    .with_stage("right", step, after="route", when=bool)
)
mistaken = ways.with_stage("meet", step, after=["left", "right"])
"""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of made-up distributions, as a part of the running environment."""
    directory = tmp_path / "site"
    install(directory, "demo-tidy", {"demo_tidy.py": "x = 1\n"})
    install(directory, "demo-torn", {"demo_torn/a.py": "a", "demo_torn/b.py": "b"})
    (directory / "demo_torn/a.py").unlink()
    (directory / "demo_torn/b.py").write_text("B")
    install(directory, "demo-linked", {}, url="file:///elsewhere", dir_info={"editable": True})
    monkeypatch.setattr(sys, "path", [str(directory), *sys.path])
    return directory


@pytest.fixture
def flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a module of pipelines in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "flows_of_test", raising=False)
    (tmp_path / "flows_of_test.py").write_text(FLOWS)


def demo(*arguments: str) -> int:
    return main(["demo", *arguments])


# demo


@pytest.mark.usefixtures("site")
def test_a_clean_audit_says_so_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--only", "demo-tidy", "--no-trace") == 0
    out, err = capsys.readouterr()
    assert out.startswith("Clean. 1 of 1 distributions verified: 1 files, 6 bytes, ")
    assert len(out.splitlines()) == 1
    assert err == ""


@pytest.mark.usefixtures("site")
def test_findings_come_first_then_the_summary_then_the_trace_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo("--only", "demo-torn", "--only", "demo-linked", "--only", "Demo_Tidy") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines[:7]] == [
        "Distribution   File                   Problem",
        "────────────────────────────────────────────────────────────",
        "demo-torn      demo_torn/a.py         missing",
        "demo-torn      demo_torn/b.py         altered: other content",
        "",
        "Not audited: demo-linked (editable: its files are elsewhere)",
        "",
    ]
    assert lines[7].startswith("2 findings. 2 of 3 distributions verified: 3 files, 7 bytes, ")
    assert lines[8] == ""
    assert lines[9].startswith("audit  ✓ partial in ")
    assert lines[10] == "8 stages: 1 cancelled, 6 succeeded, 1 skipped"
    assert [line[:35].rstrip() for line in lines[13:16]] == [
        "environment             ✓ succeeded",
        "├─ demo-torn: read      ✓ succeeded",
        "│  demo-torn: verify    ✓ succeeded",
    ]


@pytest.mark.usefixtures("site")
def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--json", "--only", "demo-torn", "--trace") == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["interrupted"], found["clean"]) == (False, False)
    assert [(finding["path"], finding["problem"]) for finding in found["findings"]] == [
        ("demo_torn/a.py", "missing"),
        ("demo_torn/b.py", "altered"),
    ]
    assert err == ""


@pytest.mark.usefixtures("site")
def test_nothing_to_compare_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--only", "demo-linked", "--no-trace") == 0
    assert "Nothing to compare. 0 of 1 distributions verified" in capsys.readouterr().out


def test_a_distribution_that_failed_counts_as_found(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = install(site, "demo-garbled", {"garbled.py": ""})
    (directory / "RECORD").write_bytes(b"garbled.py,sha256=\xff,0\n")
    (install(site, "demo-locked", {"locked/z.py": "z"}) / "../locked/z.py").unlink()
    (site / "locked/z.py").mkdir()
    assert demo("--only", "demo-garbled", "--only", "demo-locked", "--no-trace") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "demo-locked locked/z.py unreadable: Is a directory" in out
    assert "Not audited: demo-garbled (UnicodeDecodeError: " in out
    assert "1 finding, 2 could not be read. 0 of 2 distributions verified" in out


def test_many_findings_are_counted_instead_of_shown(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "demo-gone", {f"gone/{number}.py": "" for number in range(100)})
    for path in (site / "gone").iterdir():
        path.unlink()
    assert demo("--only", "demo-gone", "--no-trace") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 40 + 3
    assert lines[-3] == "and 60 more; --json gives them all"


@pytest.mark.usefixtures("site")
def test_an_unknown_distribution_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--only", "demo-tiddy") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stageflow: no distribution 'demo-tiddy' is installed; did you mean 'demo-tidy'")
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("site")
def test_an_unknown_distribution_that_is_like_no_other_is_not_compared_with_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo("--only", "xyzzy") == 2
    assert capsys.readouterr() == ("", "stageflow: no distribution 'xyzzy' is installed\n")


@pytest.mark.parametrize("arguments", [["--onl", "x"], ["--only"], ["surplus"], ["--trace=maybe"]])
def test_what_is_not_understood_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error" in err


def interrupted(tmp_path: Path, *options: str) -> str:
    """Runs a demo that would take minutes, interrupts it when it has begun, and gives what it prints."""
    install(tmp_path, "demo-vast", {}, record=f"vast.bin,sha256=abc,{1 << 36}\n")
    install(tmp_path, "demo-tidy", {"tidy.py": ""})
    with (tmp_path / "vast.bin").open("wb") as file:
        file.truncate(1 << 36)  # it takes no room, but minutes to read
    program = f"""
        import os, signal, sys, threading, time
        from stageflow.cli import main

        def interrupt():
            while not any(thread.name.startswith("Trio thread") for thread in threading.enumerate()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        sys.exit(main(["demo", "--only", "demo-vast", "--only", "demo-tidy", *{options}]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "stageflow: interrupted\n"
    return done.stdout


def test_an_audit_that_is_interrupted_says_what_it_knows_and_is_not_clean(tmp_path: Path) -> None:
    first, _, rest = interrupted(tmp_path).partition("\n")
    assert re.fullmatch(r"Interrupted\. [01] of 2 distributions verified so far, no findings\.", first)
    assert rest.startswith("\naudit  ⊘ interrupted in ")


def test_an_audit_that_is_interrupted_is_one_json_object_nevertheless(tmp_path: Path) -> None:
    found = json.loads(interrupted(tmp_path, "--json"))
    assert (found["interrupted"], found["clean"]) == (True, False)
    assert (found["distributions"], found["findings"]) == (2, [])


# show


@pytest.mark.usefixtures("flows")
@pytest.mark.parametrize("name", ["report", "built"])
def test_show_draws_a_pipeline_or_a_graph_of_a_module_in_the_working_directory(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", f"flows_of_test:{name}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "report",
        "2 stages in 1 branch",
        "unless a stage says otherwise: timeout 30 s, on failure fail_fast",
        "",
        "fetch  transform",
        "send   transform  after fetch",
    ]


@pytest.mark.usefixtures("flows")
def test_show_prints_mermaid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "flows_of_test:report", "--mermaid"]) == 0
    assert capsys.readouterr().out == 'flowchart TD\n    s0["fetch"]\n    s1["send"]\n    s0 --> s1\n'


@pytest.mark.usefixtures("flows")
def test_show_says_what_build_warns_of_and_draws_the_graph_nevertheless(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "flows_of_test:mistaken", "--mermaid"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("flowchart TD")
    assert len(err.splitlines()) == 1
    assert err.startswith("stageflow: stage 'meet' (")
    assert err.endswith('say join="any_settled"\n')


@pytest.mark.usefixtures("flows")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "flows_of_test",
            (
                "write MODULE:PIPELINE; there is 'flows_of_test:built', 'flows_of_test:mistaken', "
                "'flows_of_test:report', 'flows_of_test:round_and_round', 'flows_of_test:ways'"
            ),
        ),
        ("flows_of_test:reprot", "module 'flows_of_test' has no 'reprot'; did you mean 'report'?"),
        (
            "flows_of_test:nothing",
            (
                "'nothing' of module 'flows_of_test' is no pipeline, but of type 'int'; "
                "there is 'built', 'mistaken', 'report', 'round_and_round', 'ways'"
            ),
        ),
        ("flow_of_test:report", "there is no module 'flow_of_test'; did you mean 'flows_of_test'?"),
        ("flows_of_test.py:report", "'flows_of_test.py' is no name of a module; did you mean 'flows_of_test'?"),
        ("flows/of.py:report", "'flows/of.py' is no name of a module; did you mean 'flows.of'?"),
        (":report", "'' is no name of a module"),
        (
            "flows_of_test:round_and_round",
            (
                "flows_of_test:round_and_round cannot be built: stages wait for each other in a circle: "
                "'a' → 'b' → 'a'; remove one of these edges"
            ),
        ),
    ],
)
def test_show_says_what_to_change(where: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", where]) == 2
    assert capsys.readouterr() == ("", f"stageflow: {message}\n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import not_there_at_all", "No module named 'not_there_at_all' (broken_flows.py:1)"),
        ("def f():\n    1 / 0\n\nf()", "ZeroDivisionError: division by zero (broken_flows.py:2)"),
        (
            "import json\njson.loads('')",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (broken_flows.py:2)",
        ),
        ("x = (", "SyntaxError: '(' was never closed (broken_flows.py, line 1)"),
        ("import sys\nsys.exit(3)", "it raises SystemExit(3) (broken_flows.py:2)"),
    ],
)
@pytest.mark.usefixtures("flows")
def test_show_says_why_a_module_cannot_be_imported(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_flows.py").write_text(source)
    assert main(["show", "broken_flows:report"]) == 2
    assert capsys.readouterr() == ("", f"stageflow: module 'broken_flows' cannot be imported: {message}\n")


# The command itself


def test_without_arguments_it_shows_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^│ ([a-z]+)  ", out, re.MULTILINE) == [
        "demo",
        "prune",
        "resume",
        "run",
        "runs",
        "show",
        "trace",
    ]


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stageflow")


def test_without_cyclopts_it_says_in_one_sentence_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == 'The command stageflow needs cyclopts: pip install "stageflow[cli]"\n'


def test_it_runs_as_a_module_and_audits_what_is_really_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stageflow.cli", "demo", "--only", "attrs"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Clean. 1 of 1 distributions verified: ")
    assert "└─ report" in done.stdout
    assert done.stderr == ""
