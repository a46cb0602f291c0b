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
