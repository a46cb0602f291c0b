"""What `import stageflow` loads: the engine, so that no first run waits for it, and nothing that only some use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stageflow

LATER = {
    "cattrs",  # takes half as long as everything else together, and who declares no contract does not need it
    "cyclopts",
    "dataclasses",
    "datetime",
    "difflib",
    "rich",
    "sqlite3",
    "stageflow.context.alignment",
    "stageflow.context.bag",
    "stageflow.context.delta",
    "stageflow.context.host",  # for type checkers only
    "stageflow.engine.maps",
    "stageflow.engine.nested",
    "stageflow.stages.compatibility",
    "stageflow.stages.contract",
    "stageflow.stages.fault",
    "stageflow.stages.fields",
    "stageflow.stages.retry",
    "stageflow.stages.structure",
    "stageflow.stages.threads",
    "stageflow.stages.typed",
    "stageflow.trace",
    "uuid",
}


def told_by(program: str) -> str:
    """Give what a program prints in a fresh process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def loaded_by(program: str) -> set[str]:
    """Give the modules that are there at the end of a program, in a fresh process."""
    return set(told_by(f"{program}\nimport sys\nprint(*sys.modules)").split())


def test_importing_stageflow_does_not_import_what_only_some_need() -> None:
    assert not LATER & loaded_by("import stageflow")


def test_every_public_name_is_listed_and_found() -> None:
    program = "import stageflow\nprint(*set(stageflow.__all__) - set(dir(stageflow)))\nfrom stageflow import *\n"
    assert told_by(f"{program}print(*set(stageflow.__all__) - set(globals()))") == ""


def test_a_name_that_is_not_there_is_not_found() -> None:
    with pytest.raises(AttributeError, match="module 'stageflow' has no attribute 'Pipelines'"):
        getattr(stageflow, "Pipelines")  # noqa: B009  # type checkers know that already
    assert not hasattr(stageflow, "Pipelines")


def test_what_is_loaded_later_is_the_same_each_time() -> None:
    assert stageflow.Delta is stageflow.Delta is type(stageflow.ContextSnapshot().diff(stageflow.ContextSnapshot()))


DECLARED = {
    "stages": "p.with_stage('b', gives, after='a').with_stage('c', gives, after='a', when=lambda ctx: False)",
    "limits": "Pipeline('p', limits={'x': 1}, max_running=2, deadline=9).with_stage('a', gives, uses='x', priority=1)",
    "a retry": "p.with_stage('b', gives, retry=Retry(attempts=2), total_timeout=9, heartbeat=9)",
    "a plain function": "p.with_stage('b', lambda ctx: None)",
    "a nested pipeline": "p.with_stage('b', p)",
    "a map": "p.with_map('b', gives, over=lambda ctx: [1, 2])",
    "a contract": "p.with_stage('b', gives, output=dict[str, int])",
    "a typed stage": "p.with_stage('b', takes)",
}


@pytest.mark.parametrize("declared", DECLARED)
def test_a_run_loads_nothing_for_what_was_declared_has_been_loaded_then(declared: str) -> None:
    program = f"""
import sys
import trio
from stageflow import *

async def gives(ctx: StageContext) -> dict[str, int]:
    return {{"rows": 1}}

async def takes(a: dict[str, int]) -> None:
    pass

p = Pipeline("p").with_stage("a", gives)
pipeline = {DECLARED[declared]}
graph = pipeline.build()
trio.run(trio.to_thread.run_sync, len, "")  # Trio has what it loads later, too
before = set(sys.modules)
results = trio.run(graph.run)
print(*set(sys.modules) - before, results.status.name)
"""
    assert told_by(program) in {"SUCCEEDED", "PARTIAL"}
