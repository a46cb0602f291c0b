"""Measures one contestant in one case, in this process, and prints what it found as JSON.

It runs in a contestant's own environment, so it needs nothing but the standard library and that contestant:
``python -m benchmarks.worker CONTESTANT MEASURE SHAPE SIZE [options]``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import importlib.metadata
import json
import shutil
import statistics
import sys
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.bodies import Body, Cannot, Gate, Gauge, body, recording
from benchmarks.contestant import CONTESTANTS, Contestant, Runnable, durable, load
from benchmarks.shapes import Shape, shape

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

__all__ = ["check", "main", "measure", "record", "reload"]

Found: TypeAlias = dict[str, Any]
ENOUGH = 0.1
"""Seconds that the samples of one process should take together."""
LEAST = 0.01
"""Seconds that a sample should last at least: shorter runs are repeated within it."""
MOST = 5.0
"""Seconds that a sample should last at most, even if that is not as many runs as wanted."""
COLD = 2.0
"""Seconds from which on the first run has to be enough, although everything in it happens for the first time."""
RECORDED = Path("recorded")
"""Where the run is that is gone on with."""
MEMORY = Path("/dev/shm")
"""Where it is written, if there is such a place: waiting for a disk ten thousand times tells nothing of reading it."""
SMALL = 5
"""The size of the shape that is checked before one is timed."""
PATIENCE = 20.0
"""Seconds that all branches may take to be running."""


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("contestant", choices=list(CONTESTANTS))
    parser.add_argument("measure", choices=["time", "durable", "reload", "record", "cancel", "memory", "check"])
    parser.add_argument("shape")
    parser.add_argument("size", type=int)
    parser.add_argument("--body", default="return")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--in-turn", type=int, default=1)
    parser.add_argument("--no-gc", action="store_true")
    asked = parser.parse_args()
    found: Found
    try:
        contestant = load(asked.contestant)
        found = measure(
            contestant,
            asked.measure,
            shape(asked.shape, asked.size),
            asked.body,
            at_once=asked.at_once,
            in_turn=asked.in_turn,
            collecting=not asked.no_gc,
        )
        found = {"status": "ok", **found}
    except Cannot as reason:
        found = {"status": "cannot", "reason": str(reason)}
    except Exception as error:
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    package = CONTESTANTS[asked.contestant].package
    try:
        found["version"] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found["version"] = None
    found["python"] = sys.version.split()[0]
    # On a line of its own: some libraries print, too.
    print()
    print(json.dumps(found))


def measure(
    contestant: Contestant,
    what: str,
    graph: Shape,
    kind: str,
    *,
    at_once: int = 1,
    in_turn: int = 1,
    collecting: bool = True,
) -> Found:
    """Measure a contestant.

    Raises:
        Cannot: The contestant cannot do that.
    """
    if what == "check":
        check(contestant, graph)
        return {}
    if what == "record":
        with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
            record(contestant, shape(graph.name, graph.size + 1), Path(place))
            shutil.copytree(place, RECORDED)
        return {}
    gauge = Gauge(graph.size)
    bodies = _bodies(contestant, graph, kind, gauge)
    if what == "cancel":
        return _in_loop(contestant, lambda: _cancel(contestant, contestant.prepare(graph, bodies), gauge))
    if what == "memory":
        return _in_loop(contestant, lambda: _memory(contestant, contestant.prepare(graph, bodies), gauge))
    # That is enough to see whether it does the shape right, and little next to the run itself.
    small = shape(graph.name, min(graph.size, SMALL))
    if what in {"durable", "reload"}:
        check(contestant, small, _new_place())
        if what == "reload":
            return reload(contestant, shape(graph.name, graph.size + 1), shutil.copytree(RECORDED, _new_place() / "it"))
        opened = durable(contestant).durable(graph, bodies, _new_place())
        return _in_loop(contestant, lambda: _durable(opened))
    check(contestant, small)
    began, began_cpu = time.perf_counter(), time.process_time()
    run = contestant.prepare(graph, bodies)
    built = {"build_wall": time.perf_counter() - began, "build_cpu": time.process_time() - began_cpu}
    if at_once > 1:
        run = _at_once(contestant, run, at_once)
    return _in_loop(contestant, lambda: _time(run, in_turn, collecting=collecting)) | built


def _bodies(contestant: Contestant, graph: Shape, kind: str, gauge: Gauge) -> list[Body]:
    """One body for all stages; but where they wait, the first and last one do not."""
    bodies = [body(kind, contestant.LIBRARY, gauge)] * len(graph)
    if kind in {"sleep", "forever"}:
        for number in (*graph.roots, *graph.ends):
            bodies[number] = body("return", contestant.LIBRARY)
    return bodies


def _in_loop(contestant: Contestant, main: Callable[[], Awaitable[Found]]) -> Found:
    if contestant.LIBRARY == "trio":
        found: Found = importlib.import_module("trio").run(main)
        return found

    async def coroutine() -> Found:
        return await main()

    return asyncio.run(coroutine())


def _new_place() -> Path:
    """Make a directory for what is written down: where we are, which is where the one who asks wants it."""
    return Path(mkdtemp(dir=".")).resolve()


def check(contestant: Contestant, graph: Shape, place: Path | None = None) -> None:
    """Run a graph twice, and see that every stage ran once each time, after those it waits for.

    If there is a place to write that down, it is.

    Raises:
        Cannot: The contestant cannot do that.
        AssertionError: A stage did not.
    """
    log: list[int] = []
    bodies = [recording(contestant.LIBRARY, number, log) for number in range(len(graph))]
    opened: AbstractAsyncContextManager[Runnable]
    if place is None:
        opened = nullcontext(contestant.prepare(graph, bodies))
    else:
        opened = durable(contestant).durable(graph, bodies, place)

    async def twice() -> Found:
        async with opened as run:
            for _ in range(2):
                log.clear()
                await run()
                done: set[int] = set()
                for number in log:
                    if number in done or not done.issuperset(graph.dependencies[number]):
                        raise AssertionError(f"stage {number} ran at the wrong time")
                    done.add(number)
                if len(done) < len(graph):
                    raise AssertionError(f"{len(graph) - len(done)} stages did not run")
        return {}

    _in_loop(contestant, twice)


def _at_once(contestant: Contestant, run: Runnable, many: int) -> Runnable:
    if contestant.LIBRARY == "threads":
        raise Cannot("a run of it blocks its thread")
    if contestant.LIBRARY == "asyncio":

        async def gathered() -> None:
            await asyncio.gather(*(run() for _ in range(many)))

        return gathered
    trio: Any = importlib.import_module("trio")

    async def nursed() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(many):
                nursery.start_soon(run)

    return nursed


async def _durable(opened: AbstractAsyncContextManager[Runnable]) -> Found:
    """Time a run that is written down: the first one, for everybody, as it is in a program that has just been started.

    That makes the log of the file longer, and those after it overwrite it, which takes a disk about half the time.
    """
    async with opened as run:
        return await _time(run, 1, collecting=True, cold=0.0)


def record(contestant: Contestant, graph: Shape, place: Path) -> None:
    """Have a run written down that stops at its last stage.

    Raises:
        Cannot: The contestant cannot do that.
    """
    gate = Gate(is_open=False)
    opened = durable(contestant).durable(graph, _gated(graph, gate), place)

    async def stopping() -> Found:
        async with opened as run:
            try:
                await run()
            except Exception:
                if gate.reached is None:
                    raise
        return {}

    _in_loop(contestant, stopping)


def reload(contestant: Contestant, graph: Shape, place: Path) -> Found:
    """Go on with a run that is written down, and see when its last stage is reached.

    Raises:
        Cannot: The contestant cannot do that.
        AssertionError: Others ran as well, or that one did not.
    """
    gate = Gate(is_open=True)
    opened = durable(contestant).durable(graph, _gated(graph, gate), place)

    async def going_on() -> Found:
        async with opened as run:
            gc.collect()
            began, began_cpu = time.perf_counter(), time.process_time()
            await run()
        if gate.passed or gate.reached is None:
            raise AssertionError(f"{gate.passed} stages ran again, or the last one did not")
        return {"cpu": gate.reached[1] - began_cpu, "wall": gate.reached[0] - began}

    return _in_loop(contestant, going_on)


def _gated(graph: Shape, gate: Gate) -> list[Body]:
    return [*[gate.before] * (len(graph) - 1), gate.last]


async def _time(run: Runnable, in_turn: int, *, collecting: bool, cold: float = COLD) -> Found:
    """Time runs: the first one does not count, unless it takes so long that it has to be enough."""
    cpu: list[float] = []
    wall: list[float] = []

    async def sample(runs: int) -> None:
        gc.collect()  # so that nobody pays for what came before
        if not collecting:
            gc.disable()
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(runs):
            await run()
        cpu.append((time.process_time() - began_cpu) / runs)
        wall.append((time.perf_counter() - began) / runs)
        gc.enable()

    await sample(1)
    runs = max(in_turn, int(LEAST / max(wall[0], 1e-6)))
    runs = max(1, min(runs, int(MOST / max(wall[0], 1e-6))))
    if wall[0] < cold:
        del cpu[:], wall[:]
        spent = 0.0
        while spent < ENOUGH and len(wall) < 25:
            await sample(runs)
            spent += wall[-1] * runs
    return {"cpu": statistics.median(cpu), "wall": statistics.median(wall), "samples": len(cpu), "runs": runs}


async def _cancel(contestant: Contestant, run: Runnable, gauge: Gauge) -> Found:
    """Cancel a run while all its branches sleep, and wait for them."""
    if contestant.LIBRARY == "trio":
        trio: Any = importlib.import_module("trio")
        before = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await _until_all_wait(gauge, trio.sleep)
            began, began_cpu = time.perf_counter(), time.process_time()
            nursery.cancel_scope.cancel()
        cpu, wall = time.process_time() - began_cpu, time.perf_counter() - began
        await trio.lowlevel.checkpoint()
        leaked = trio.lowlevel.current_statistics().tasks_living - before
    else:
        before = len(asyncio.all_tasks())
        task = asyncio.ensure_future(run())
        await _until_all_wait(gauge, asyncio.sleep)
        began, began_cpu = time.perf_counter(), time.process_time()
        task.cancel()
        await asyncio.wait([task])
        cpu, wall = time.process_time() - began_cpu, time.perf_counter() - began
        await asyncio.sleep(0)
        leaked = len(asyncio.all_tasks()) - before
    return {"cpu": cpu, "wall": wall, "leaked": max(leaked, gauge.waiting - gauge.stopped)}


async def _memory(contestant: Contestant, run: Runnable, gauge: Gauge) -> Found:
    """Look at what Python has allocated before a run, and while all its branches sleep."""
    if contestant.LIBRARY == "trio":
        trio: Any = importlib.import_module("trio")
        before = _traced()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await _until_all_wait(gauge, trio.sleep)
            used = _traced() - before
            tracemalloc.stop()  # nobody asks what it takes to end
            nursery.cancel_scope.cancel()
    else:
        before = _traced()
        task = asyncio.ensure_future(run())
        await _until_all_wait(gauge, asyncio.sleep)
        used = _traced() - before
        tracemalloc.stop()
        for every in asyncio.all_tasks() - {asyncio.current_task()}:
            every.cancel()
        await asyncio.wait([task])
    return {"bytes": used}


def _traced() -> int:
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def _until_all_wait(gauge: Gauge, sleep: Callable[[float], Awaitable[None]]) -> None:
    deadline = time.perf_counter() + PATIENCE
    while gauge.waiting < gauge.expected:
        await sleep(0.01)
        if time.perf_counter() > deadline:
            raise Cannot(f"only {gauge.waiting} of {gauge.expected} stages run at the same time")
    await sleep(0.05)


if __name__ == "__main__":
    main()
