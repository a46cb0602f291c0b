"""CORE-001: many write into one `OutputBag`: all is there, readers see a whole, a second writer of a key is refused."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading

import pytest
import trio

from stageflow import OutputBag, OutputConflictError, StageContext
from tests.stages import fan


async def test_twenty_writers_of_ten_keys_each_are_all_there() -> None:
    bag: OutputBag[int] = OutputBag()

    async def write(writer: int) -> None:
        for number in range(10):
            await trio.lowlevel.checkpoint()
            bag.put(f"{writer}.{number}", writer * 10 + number)
            assert bag[f"{writer}.{number}"] == writer * 10 + number

    async with trio.open_nursery() as nursery:
        for writer in range(20):
            nursery.start_soon(write, writer)
    assert len(bag) == 200
    assert dict(bag) == {f"{writer}.{number}": writer * 10 + number for writer in range(20) for number in range(10)}


async def test_writers_in_threads_are_all_there_and_one_of_two_gets_a_key() -> None:
    bag: OutputBag[int] = OutputBag()
    lost = [0] * 20
    start = threading.Barrier(20)

    def write(writer: int) -> None:
        start.wait()
        for number in range(10):
            bag.put(f"{writer}.{number}", writer)
            try:
                bag.put(f"shared.{number}", writer)
            except OutputConflictError:
                lost[writer] += 1

    async with trio.open_nursery() as nursery:
        for writer in range(20):
            nursery.start_soon(trio.to_thread.run_sync, write, writer)
    assert len(bag) == 210
    assert sum(lost) == 190


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_one_of_two_writers_of_the_very_same_object_is_refused_whenever_the_other_comes(moment: int) -> None:
    bag: OutputBag[None] = OutputBag()
    won: list[str] = []
    lookups = itertools.count(1)

    def write(writer: str, name: str) -> None:
        with contextlib.suppress(OutputConflictError):
            bag.put(name, None)
            won.append(writer)

    class Name(str):
        """A name with another writer behind it, who writes at a certain moment of its being looked up."""

        __slots__ = ()

        def __hash__(self) -> int:
            if next(lookups) == moment:
                write("other", "a")
            return str.__hash__(self)

    write("one", Name("a"))
    if next(lookups) <= moment:
        write("other", "a")
    assert won == (["other"] if moment == 1 else ["one"])
    assert dict(bag) == {"a": None}


def test_a_bag_pickles_prints_and_compares_like_what_is_in_it() -> None:
    bag: OutputBag[list[int]] = OutputBag()
    bag.put("b", [1])
    bag.put("a", [2])
    twin: OutputBag[list[int]] = pickle.loads(pickle.dumps(bag))
    assert isinstance(twin, OutputBag)
    assert list(twin.items()) == list(bag.items()) == [("b", [1]), ("a", [2])]
    assert bag == twin == {"a": [2], "b": [1]}
    assert repr(bag) == "OutputBag({'b': [1], 'a': [2]})"
    with pytest.raises(OutputConflictError):
        twin.put("a", [3])


async def test_fifty_stages_at_once_are_all_in_the_results_of_their_run() -> None:
    async def works(ctx: StageContext) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        return {"n": int(ctx.stage[1:])}

    results = await fan(50, works).run()
    assert {name: output["n"] for name, output in results.items() if name.startswith("b")} == {
        f"b{number}": number for number in range(50)
    }


async def test_a_reader_sees_what_was_there_when_it_began() -> None:
    bag: OutputBag[int] = OutputBag()
    for number in range(10):
        bag.put(f"before.{number}", number)
    seen: list[str] = []
    for name in bag:
        seen.append(name)
        bag.put(f"during.{name}", 0)
    assert seen == [f"before.{number}" for number in range(10)]
    assert list(bag)[:10] == seen
    assert len(bag) == 20


def test_a_second_writer_of_a_key_is_refused_and_the_first_stays() -> None:
    bag: OutputBag[str] = OutputBag()
    bag.put("a", "first")
    with pytest.raises(OutputConflictError, match="'a' has an output already") as caught:
        bag.put("a", "second")
    assert caught.value.stage == "a"
    assert dict(bag) == {"a": "first"}
    with pytest.raises(KeyError):
        bag["b"]
    assert not hasattr(bag, "__setitem__")
    assert not hasattr(bag, "__delitem__")
