"""What `import stageflow` loads: the engine, so that no first run waits for it, and nothing that only some use."""

from __future__ import annotations

import subprocess
import sys

LATER = {
    "cattrs",  # takes half as long as everything else together, and who declares no contract does not need it
    "cyclopts",
    "difflib",
    "rich",
    "sqlite3",
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
