"""Run the Python in README.md and docs/: the blocks of one page are one script, read from top to bottom."""

import signal

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.myst import PythonCodeBlockParser


def run_as_main(namespace: dict[str, object]) -> None:
    """Let a block say `if __name__ == "__main__":`."""
    namespace["__name__"] = "__main__"


pytest_collect_file = Sybil([PythonCodeBlockParser()], pattern="*.md", setup=run_as_main).pytest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the blocks of a page back in order: pytest-randomly shuffles them like tests."""
    blocks = [(slot, item) for slot, item in enumerate(items) if isinstance(item, SybilItem)]
    in_order = sorted((item for _, item in blocks), key=lambda item: (item.example.path, item.example.line))
    for (slot, _), item in zip(blocks, in_order, strict=True):
        items[slot] = item


def pytest_configure() -> None:
    """Let the tests interrupt processes also when run in the background by a shell, which has them ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
