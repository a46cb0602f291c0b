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
import statistics
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.bodies import Body, Cannot, Gauge, body, recording
from benchmarks.contestant import CONTESTANTS, Contestant, Runnable, load
from benchmarks.shapes import Shape, shape

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["check", "main", "measure"]

Found: TypeAlias = dict[str, Any]
ENOUGH = 0.1
"""Seconds that the samples of one process should take together."""
LEAST = 0.01
"""Seconds that a sample should last at least: shorter runs are repeated within it."""
MOST = 5.0
"""Seconds that a sample should last at most, even if that is not as many runs as wanted."""
COLD = 2.0
"""Seconds from which on the first run has to be enough, although everything in it happens for the first time."""
SMALL = 5
"""The size of the shape that is checked before one is timed."""
PATIENCE = 20.0
"""Seconds that all branches may take to be running."""


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("contestant", choices=list(CONTESTANTS))
    parser.add_argument("measure", choices=["time", "cancel", "memory", "check"])
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
    gauge = Gauge(graph.size)
    bodies = _bodies(contestant, graph, kind, gauge)
    if what == "cancel":
        return _in_loop(contestant, lambda: _cancel(contestant, contestant.prepare(graph, bodies), gauge))
    if what == "memory":
        return _in_loop(contestant, lambda: _memory(contestant, contestant.prepare(graph, bodies), gauge))
    # That is enough to see whether it does the shape right, and little next to the run itself.
    check(contestant, shape(graph.name, min(graph.size, SMALL)))
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


def check(contestant: Contestant, graph: Shape) -> None:
    """Run a graph twice, and see that every stage ran once each time, after those it waits for.

    Raises:
        Cannot: The contestant cannot do that.
        AssertionError: A stage did not.
    """
    log: list[int] = []
    run = contestant.prepare(graph, [recording(contestant.LIBRARY, number, log) for number in range(len(graph))])

    async def twice() -> Found:
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


async def _time(run: Runnable, in_turn: int, *, collecting: bool) -> Found:
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
    if wall[0] < COLD:
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
            nursery.cancel_scope.cancel()
    else:
        before = _traced()
        task = asyncio.ensure_future(run())
        await _until_all_wait(gauge, asyncio.sleep)
        used = _traced() - before
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
