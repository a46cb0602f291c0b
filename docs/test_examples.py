"""Every example runs, as a user would run it."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parent.glob("examples/*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    runpy.run_path(str(example), run_name="__main__")
