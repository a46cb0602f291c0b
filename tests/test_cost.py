"""What the engine does per stage, counted: calls, instructions, tasks, scopes.

Unlike times, counts are the same on every machine. (Nearly: which of several tasks goes first is random in Trio, and it
may decide which of them starts another. That is less than one in a hundred.)

The bounds leave a little room over what was counted when they were written, so that a call more somewhere passes, and a
scope, a task, or a walk over the graph per stage does not. Times are the business of `benchmarks/`.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.abc import Instrument
from trio.testing import MockClock

import stageflow
from stageflow import Pipeline, StageContext, StageGraph

if TYPE_CHECKING:
    from types import FrameType

if TYPE_CHECKING:
    from _typeshed import TraceFunction

OURS = str(Path(stageflow.__file__).parent)
TRIO = str(Path(trio.__file__).parent)


@attrs.define(eq=False)
class Tally(Instrument):
    """What happened in a run.

    Attributes:
        own: Calls of and by the library's own functions. A resumed coroutine counts as a call.
        all: All calls, Trio's included.
        instructions: Bytecode instructions of the library's own functions.
        scopes: Cancel scopes that were entered, those of nurseries included.
        nurseries: Nurseries that were opened.
        tasks: Tasks that were started.
        turns: How often Trio let a task run.
    """

    own: int = 0
    all: int = 0
    instructions: int = 0
    scopes: int = 0
    nurseries: int = 0
    tasks: int = 0
    turns: int = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.tasks += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.turns += 1

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """Be told of a call by `sys.setprofile`."""
        if event not in {"call", "c_call"}:
            return
        self.all += 1
        code = frame.f_code  # of the function that is called; of the one that calls, if what it calls is written in C
        if code.co_filename.startswith(OURS):
            self.own += 1
        elif event == "call" and code.co_filename.startswith(TRIO):
            self.scopes += code.co_qualname == "CancelScope.__enter__"
            self.nurseries += code.co_qualname == "NurseryManager.__aenter__"

    def trace(self, frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        """Be told of a call by `sys.settrace`, and say whether to be told what happens within."""
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> TraceFunction:
        """Be told of an instruction."""
        self.instructions += event == "opcode"
        return self.step


@contextmanager
def told(tally: Tally) -> Generator[None]:
    """Tell a tally what happens in the block."""
    profile, trace, collecting = sys.getprofile(), sys.gettrace(), gc.isenabled()
    gc.disable()  # finalizers are calls, too
    sys.setprofile(tally.profile)
    sys.settrace(tally.trace)
    try:
        yield
    finally:
        sys.settrace(trace)
        sys.setprofile(profile)
        if collecting:
            gc.enable()


def count(graph: StageGraph) -> Tally:
    """Count what a run of a graph does, once everything has been done before."""
    tally = Tally()

    async def main() -> None:
        await graph.run()
        trio.lowlevel.add_instrument(tally)
        with told(tally):
            await graph.run()
        trio.lowlevel.remove_instrument(tally)

    # On a clock that stands still no stage can take so long that its strand lets others run.
    trio.run(main, clock=MockClock())
    return tally


async def immediate(ctx: StageContext) -> None:
    pass


async def waiting(ctx: StageContext) -> None:
    await trio.lowlevel.checkpoint()


Body = Callable[[StageContext], Any]


def built(after: list[list[int]], body: Body = immediate) -> StageGraph:
    pipeline = Pipeline("counted")
    for number, before in enumerate(after):
        pipeline = pipeline.with_stage(str(number), body, after=[str(other) for other in before])
    return pipeline.build()


def chain(size: int, body: Body = immediate) -> StageGraph:
    return built([[], *([number] for number in range(size - 1))], body)


def fan(size: int, body: Body = immediate) -> StageGraph:
    return built([[], *([0] for _ in range(size - 2)), list(range(1, size - 1))], body)


def layered(size: int, inputs: int = 3) -> StageGraph:
    """Layers of ten stages, each after a few random ones of the layer before."""
    draw = random.Random(3)
    after: list[list[int]] = [[] for _ in range(10)]
    while len(after) < size:
        before = range(len(after) - 10, len(after))
        after += [sorted(draw.sample(before, inputs)) for _ in range(10)]
    return built(after)


SHAPES = [chain, fan, layered]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stage_costs_the_same_in_a_graph_ten_times_as_large(shape: Callable[[int], StageGraph]) -> None:
    small, large = count(shape(100)), count(shape(1000))
    # Whatever goes through the whole graph, or through all that has finished, for every stage would make this ten times
    # as much. What is done once per run makes it less.
    assert large.all / 1000 <= 1.05 * small.all / 100
    assert large.own / 1000 <= 1.05 * small.own / 100
    # Loops take instructions even where they call nothing. How many there are depends on the version of Python, so
    # nothing but their growth is bounded.
    assert large.instructions / 1000 <= 1.05 * small.instructions / 100


def test_a_stage_of_a_chain_takes_no_task_and_no_scope_and_no_turn_of_its_own() -> None:
    tally = count(chain(1000))
    # A strand runs inline, in the caller's task, under one scope that is re-armed: what there is of these is the run's.
    assert tally.tasks == 0
    assert tally.nurseries <= 1
    assert tally.scopes <= 3
    # Stages that return at once share the millisecond after which a strand lets others run.
    assert tally.turns <= 5


def test_a_stage_of_a_chain_takes_ten_calls() -> None:
    tally = count(chain(1000))
    # Begin it, make its context, call its body and take the first step, read what that returned, store it, settle it;
    # and one or two built-in functions in each of those.
    assert tally.own / 1000 <= 10
    # Trio adds one look for a cancellation, and one at the clock: a few calls each.
    assert tally.all / 1000 <= 20


def test_a_stage_that_waits_arms_the_scope_it_has_and_makes_no_new_one() -> None:
    tally = count(chain(1000, waiting))
    assert tally.tasks == 0
    assert tally.scopes <= 3
    # One turn for the one checkpoint of each body.
    assert tally.turns <= 1000 + 5
    # As above, and: take the other steps of the body, move the deadline, look at the clock afterwards.
    assert tally.own / 1000 <= 18


def test_a_branch_takes_one_task_with_one_nursery_and_one_scope() -> None:
    tally = count(fan(1000))
    assert tally.tasks <= 1000
    assert tally.nurseries <= 1000
    # A nursery comes with a scope, and the strand has its own, for the limit on its stages.
    assert tally.scopes <= 2 * 1000 + 3
    # One turn to run, and one to leave the nursery, which is a checkpoint.
    assert tally.turns <= 2 * 1000 + 5


def test_a_branch_takes_some_twenty_five_calls() -> None:
    tally = count(fan(1000))
    # What a stage of a chain takes, and: make the branch, start its task, open and close it, count down what its
    # followers wait for.
    assert tally.own / 1000 <= 26


def test_a_stage_of_many_takes_hardly_more_than_that_of_a_fan_out() -> None:
    # Nearly every stage has a branch of its own, and the last of three inputs starts it.
    assert count(layered(1000)).own / 1000 <= 30


def test_every_other_join_of_layers_takes_over_task_nursery_and_scope_of_a_branch_that_is_done() -> None:
    tally = count(layered(1000))
    # A stage that is the last input of several joins goes on with one of them; the others are new tasks. With three
    # random inputs each, that is about half of them.
    assert tally.tasks / 1000 <= 0.6
    assert tally.nurseries / 1000 <= 0.6
    assert tally.scopes / 1000 <= 1.2


def test_an_edge_takes_a_call_or_two() -> None:
    few, many = count(layered(1000, inputs=3)), count(layered(1000, inputs=6))
    # To count down what waits at its end, and to see whether that may start now.
    assert (many.own - few.own) / (3 * 990) <= 2


def test_a_run_takes_as_many_calls_by_itself_as_a_few_stages() -> None:
    diamond, alone = count(fan(5)), count(chain(1))
    # Draw an id, note the time, make the collector and the results: what a short pipeline cannot share out.
    assert alone.own <= 50
    assert diamond.own <= 50 + 5 * 24
