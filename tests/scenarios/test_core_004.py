"""CORE-004: a hundred thousand run ids are unique, and in the order of time; in one store, none is used twice."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from stageflow import Pipeline, PipelineContext, RunExistsError, open_store
from stageflow.context.ids import new_run_id
from tests.stages import gives

if TYPE_CHECKING:
    from pathlib import Path


def test_a_hundred_thousand_ids_are_unique_and_sorted_as_they_were_drawn() -> None:
    ids = [new_run_id() for _ in range(100_000)]
    assert len(set(ids)) == 100_000
    assert ids == sorted(ids)


def test_ids_are_uuids_of_version_seven_that_tell_when_they_were_drawn() -> None:
    before = time.time_ns() // 1_000_000
    first, *_, last = (uuid.UUID(new_run_id()) for _ in range(1_000))
    after = time.time_ns() // 1_000_000
    for drawn in (first, last):
        assert (drawn.version, drawn.variant) == (7, uuid.RFC_4122)
        assert before <= drawn.int >> 80 <= after + 1


def test_ids_drawn_in_several_threads_are_unique_and_sorted_in_each() -> None:
    drawn: list[list[str]] = [[] for _ in range(8)]

    def draw(into: list[str]) -> None:
        into.extend(new_run_id() for _ in range(2_000))

    threads = [threading.Thread(target=draw, args=(into,)) for into in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each for into in drawn for each in into}) == 16_000
    assert all(into == sorted(into) for into in drawn)


async def test_every_run_of_one_description_has_an_id_of_its_own_unless_it_names_one() -> None:
    graph = Pipeline("p").with_stage("s", gives()).build()
    context = PipelineContext()
    ids = [(await graph.run(context)).run_id for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert ids == sorted(ids)
    assert (await graph.run(PipelineContext(run_id="mine"))).run_id == "mine"


@pytest.mark.parametrize("where", ["memory:", "sqlite:{}/runs.db"])
async def test_a_thousand_collisions_in_one_store_are_refused_and_leave_the_run_as_it_was(
    where: str, tmp_path: Path
) -> None:
    graph = Pipeline("p").with_stage("s", gives()).build()
    async with open_store(where.format(tmp_path)) as store:
        await graph.run(PipelineContext(run_id="mine"), store=store)
        before = (await store.read("mine", tenant=None)).entries
        for number in range(1_000):
            with pytest.raises(RunExistsError):
                await graph.run(PipelineContext(run_id="mine", tenant=f"tenant {number % 2}"), store=store)
        assert (await store.read("mine", tenant=None)).entries == before
        assert len(await store.runs()) == 1
