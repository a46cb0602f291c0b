"""What the benchmarks ran on, as far as it matters for the figures, and no further."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pyperf

__all__ = ["machine"]

TELLING = ("cpu_count", "cpu_model_name", "load_avg_1min", "python_implementation", "timer")


def machine() -> dict[str, str]:
    """Describe this machine. Nothing in it says whose it is."""
    run: Any = cast("Any", pyperf).Run([1.0], collect_metadata=True)
    metadata: dict[str, object] = run.get_metadata()
    found = {name: str(metadata[name]) for name in TELLING if name in metadata}
    return {**found, "python": sys.version.split()[0], "trio": version("trio"), "revision": _revision()}


def _revision() -> str:
    """The commit that is measured, with a mark if the working tree differs from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()
