"""CORE-002: messages and documents go through a snapshot without loss, in linear time, at most 1.1 times their size.

Here it is a tenth of the messages and documents; with `STAGEFLOW_FULL=1` it is all 10,000 and 100 of them.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stageflow import (
    ContextSnapshot,
    FrozenDict,
    FrozenList,
    Pipeline,
    PipelineContext,
    StageContext,
    StageExecutionError,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FULL = os.environ.get("STAGEFLOW_FULL") == "1"
"""Whether to run it in full size, which takes a gigabyte of memory."""

MESSAGES, DOCUMENTS = (10_000, 100) if FULL else (1_000, 10)
LETTERS = "abcdefghijklmnopqrstuvwxyz     äß€"


@functools.cache
def texts(size: int, number: int) -> list[str]:
    """Texts of at least so many bytes each, no two of them alike."""
    dice = random.Random(size)
    base = "".join(dice.choices(LETTERS, k=size))
    return [f"{number} {base[number % size :]}{base[: number % size]}" for number in range(number)]


def state(messages: int, documents: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": text, "n": n, "tags": []} for n, text in enumerate(texts(10_000, messages))
        ],
        "documents": [
            {"title": f"document {n}", "text": text, "ratio": n / 7} for n, text in enumerate(texts(100_000, documents))
        ],
    }


def payload(snapshot: ContextSnapshot) -> int:
    """The size of the texts alone, in bytes."""
    every = [message["content"] for message in snapshot["messages"]] + [each["text"] for each in snapshot["documents"]]
    return sum(len(text.encode()) for text in every)


def pickled(snapshot: ContextSnapshot) -> bytes:
    return pickle.dumps(snapshot)


def unpickled(stored: bytes) -> ContextSnapshot:
    snapshot = pickle.loads(stored)
    assert type(snapshot) is ContextSnapshot
    return snapshot


def as_json(snapshot: ContextSnapshot) -> bytes:
    return json.dumps(dict(snapshot), ensure_ascii=False).encode()


def from_json(stored: bytes) -> ContextSnapshot:
    return ContextSnapshot(json.loads(stored))


WAYS: dict[str, tuple[Callable[[ContextSnapshot], bytes], Callable[[bytes], ContextSnapshot]]] = {
    "pickle": (pickled, unpickled),
    "json": (as_json, from_json),
}


@pytest.mark.parametrize(("store", "load"), WAYS.values(), ids=WAYS)
def test_a_round_trip_loses_nothing_and_takes_little_more_than_the_texts(
    store: Callable[[ContextSnapshot], bytes], load: Callable[[bytes], ContextSnapshot], tmp_path: Path
) -> None:
    snapshot = ContextSnapshot(state(MESSAGES, DOCUMENTS))
    file = tmp_path / "snapshot"
    file.write_bytes(store(snapshot))
    least = MESSAGES * 10_000 + DOCUMENTS * 100_000
    assert least <= payload(snapshot) <= file.stat().st_size <= 1.1 * payload(snapshot)
    twin = load(file.read_bytes())
    assert twin == snapshot
    assert not twin.diff(snapshot)
    assert (len(twin["messages"]), len(twin["documents"])) == (MESSAGES, DOCUMENTS)
    assert (type(twin["messages"]), type(twin["messages"][0])) == (FrozenList, FrozenDict)


def test_a_later_version_is_stored_with_what_it_shares_stored_once() -> None:
    snapshot = ContextSnapshot(state(MESSAGES, DOCUMENTS))
    alone = len(pickled(snapshot))
    for number in range(3):
        snapshot = snapshot.evolve(messages=[*snapshot["messages"], {"role": "user", "content": f"more {number}"}])
    assert len(pickled(snapshot)) <= 1.1 * alone
    twin = unpickled(pickled(snapshot))
    assert (twin, twin.version, twin.rollback(1)) == (snapshot, 3, snapshot.rollback(1))


async def test_texts_go_through_a_run_without_being_copied() -> None:
    original = state(MESSAGES, DOCUMENTS)

    async def looks(ctx: StageContext) -> dict[str, object]:
        for kind, field in (("messages", "content"), ("documents", "text")):
            for before, after in zip(original[kind], ctx.snapshot[kind], strict=True):
                assert before[field] is after[field]
        return {"messages": ctx.snapshot["messages"]}

    snapshot = ContextSnapshot(original)
    results = await Pipeline("p").with_stage("looks", looks).run(PipelineContext(snapshot=snapshot))
    assert results["looks"]["messages"] is snapshot["messages"]


STEPS: dict[str, Callable[[dict[str, Any]], object]] = {
    "making": ContextSnapshot,
    "evolving": lambda values: ContextSnapshot().evolve(**values),
    "storing": lambda values: pickled(ContextSnapshot(values)),
    "reading": lambda values: unpickled(pickled(ContextSnapshot(values))),
    "comparing": lambda values: ContextSnapshot(values).diff(ContextSnapshot(values)),
    "comparing all that is new": lambda values: ContextSnapshot(values).diff(ContextSnapshot({"messages": []})),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_work_is_linear(step: Callable[[dict[str, Any]], object]) -> None:
    """Counted in calls of functions, which unlike seconds are the same each time."""

    def calls(number: int) -> int:
        values, counted = state(number, number // 100), 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            step(values)
        finally:
            sys.setprofile(before)
        return counted

    small, large = MESSAGES // 10, MESSAGES // 2
    assert calls(large) <= 1.1 * (large / small) * calls(small) + 100


def test_a_store_takes_at_most_a_tenth_more_than_the_texts_themselves(tmp_path: Path) -> None:
    seen: list[ContextSnapshot] = []

    async def fail(ctx: StageContext) -> None:
        seen.append(ctx.snapshot)
        if len(seen) == 1:
            raise ValueError("not yet")

    snapshot = ContextSnapshot(state(MESSAGES, DOCUMENTS))
    pipeline = Pipeline("p").with_stage("fail", fail)

    async def main() -> None:
        async with open_store(f"sqlite:{tmp_path / 'runs.db'}") as store:
            with pytest.raises(StageExecutionError):
                await pipeline.run(PipelineContext(run_id="r", snapshot=snapshot), store=store)
            await pipeline.build().resume("r", store=store)

    trio.run(main)
    assert seen[1] == snapshot
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.1 * payload(snapshot)
