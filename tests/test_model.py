"""The engine against the model of `tests.model`: every small DAG with every script, and samples of everything else."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from stageflow import (
    CauseKind,
    Join,
    Pipeline,
    PipelineTerminated,
    StageContext,
    StageExecutionError,
    StageGraph,
    StageOutput,
    StageState,
    StageTimeoutError,
    UnifiedPipelineCancelled,
    optional,
)
from tests.model import Node, Observation, Outcome, Script, admits, explore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FULL = os.environ.get("STAGEFLOW_FULL") == "1"
"""Whether to run the full product: every numbering of every DAG, and a dozen times the examples. Takes some minutes."""

NAMES = "abcdef"
DOES = ("ok", "fail", "cancel", "cancel_branch")
POLICIES = ("fail_fast", "drain", "isolate")
KINDS = {
    CauseKind.FAILURE: "fail",
    CauseKind.TIMEOUT: "timeout",
    CauseKind.SKIP: "skip",
    CauseKind.CONDITION: "when",
    CauseKind.CANCEL: "cancel",
    CauseKind.CANCEL_BRANCH: "cancel_branch",
}


@attrs.frozen
class Case:
    """What one run is made of."""

    dag: tuple[Node, ...]
    scripts: tuple[Script, ...]
    policy: str

    def __str__(self) -> str:
        lines = [f"policy {self.policy}"]
        for stage, (node, script) in enumerate(zip(self.dag, self.scripts, strict=True)):
            after = ", ".join(NAMES[other] + "?" * (other in node.optional) for other in node.after)
            join = f"{node.join}({node.count})" if node.count else node.join
            does = script.does if script.of is None else f"{script.does}(of={NAMES[script.of]})"
            details = [f"{script.ticks} checkpoints"] * bool(script.ticks) + [f"sleep {script.sleep}"] * bool(
                script.sleep
            )
            details += ["stubborn"] * script.stubborn + (
                [f"on_failure={script.on_failure}"] if script.on_failure else []
            )
            lines.append(f"  {NAMES[stage]} after [{after}] {join}: {', '.join([does, *details])}")
        return "\n".join(lines)


# A case as a pipeline


def declared(case: Case) -> object:
    """All of a case but what bodies do: cases that agree in that may share a graph."""
    limits = [script.sleep if script.does == "timeout" else None for script in case.scripts]
    policies = [script.on_failure for script in case.scripts]
    return case.dag, case.policy, limits, policies, [script.does == "when" for script in case.scripts]


class Stand:
    """A graph whose bodies do what `scripts` say at the moment, and what was seen of them in the last run."""

    def __init__(self, case: Case) -> None:
        self.declared = declared(case)
        self.scripts = case.scripts
        self.graph = self._build(case)
        self.entered: list[int] = []
        self.saw: dict[int, list[dict[str, Any]]] = {}

    def _build(self, case: Case) -> StageGraph:
        pipeline = Pipeline("case", on_failure=case.policy, default_timeout=None)
        for stage, (node, script) in enumerate(zip(case.dag, case.scripts, strict=True)):
            options: dict[str, Any] = {
                "after": [optional(NAMES[other]) if other in node.optional else NAMES[other] for other in node.after],
                "join": Join.n_of(node.count) if node.join == "n_of" else node.join,
                "when": _never if script.does == "when" else None,
                "timeout": script.sleep if script.does == "timeout" else None,
            }
            if script.on_failure is not None:
                options["on_failure"] = script.on_failure
            pipeline = pipeline.with_stage(NAMES[stage], self._body(stage), **options)
        return pipeline.build()

    def _body(self, stage: int) -> Any:
        async def play(ctx: StageContext) -> StageOutput:
            self.entered.append(stage)
            script = self.scripts[stage]
            self.saw[stage] = [{name: output["by"] for name, output in ctx.inputs.items()}]
            if script.ticks or script.sleep:
                with trio.CancelScope(shield=script.stubborn):
                    await self._pause(script)
            self.saw[stage].append({name: output["by"] for name, output in ctx.inputs.items()})
            return self._answer(stage, script)

        return play

    @staticmethod
    async def _pause(script: Script) -> None:
        for _ in range(script.ticks):
            await trio.lowlevel.checkpoint()
        if script.does == "timeout":
            await trio.sleep_forever()
        elif not script.ticks:
            await trio.sleep(script.sleep)

    @staticmethod
    def _answer(stage: int, script: Script) -> StageOutput:
        match script.does:
            case "ok":
                return StageOutput.ok(by=stage)
            case "skip":
                return StageOutput.skip("nothing to do")
            case "cancel":
                return StageOutput.cancel("enough")
            case "cancel_branch":
                return StageOutput.cancel_branch("no need", of=None if script.of is None else NAMES[script.of])
            case _:
                raise ValueError(NAMES[stage])

    async def run(self, *, opened: bool) -> Observation:
        """Runs the graph, checks what must be so of every run, and gives what was seen."""
        self.entered, self.saw = [], {}
        living = trio.lowlevel.current_statistics().tasks_living
        error: PipelineTerminated | None = None
        handle = None
        try:
            if opened:
                async with self.graph.open() as handle:
                    results = handle.results
            else:
                results = await self.graph.run()
        except PipelineTerminated as raised:
            error, results = raised, raised.results
        assert trio.lowlevel.current_statistics().tasks_living == living, "a task was left behind"

        records = [results.records[name] for name in NAMES[: len(self.graph)]]
        if handle is not None:  # the same results on every way out
            assert all(handle.results.records[record.name] is record for record in records)
            assert dict(handle.results) == dict(results)
            assert handle.results.status is results.status
        for stage, record in enumerate(records):
            self._check_record(stage, record)
        assert sorted(record.place for record in records if record.place is not None) == list(range(len(records)))
        done = [record for record in records if record.state is StageState.SUCCEEDED]
        assert dict(results) == {record.name: record.output for record in done}
        self._check_error(error, records)
        return Observation(
            states=tuple(record.state.value for record in records),
            status=results.status.value,
            raised=None if error is None else (_kind_of(error), NAMES.index(error.stage or "?")),
            inputs=tuple(
                frozenset(map(NAMES.index, self.saw[stage][0])) if stage in self.saw else None
                for stage in range(len(records))
            ),
            after_cancel=frozenset(stage for stage, record in enumerate(records) if record.after_cancel),
            causes=tuple(
                None if record.cause is None else (
                    KINDS.get(record.cause.kind, record.cause.kind.value), NAMES.find(record.cause.stage or "?")
                )
                for record in records
            ),
        )  # fmt: skip

    def _check_record(self, stage: int, record: Any) -> None:
        entered = self.entered.count(stage)
        assert record.state.settled, f"{record.name} is {record.state} in the end"
        assert (record.cause is None) == (record.state is StageState.SUCCEEDED), f"{record.name}: {record.cause}"
        assert (record.output is None) == (record.state is not StageState.SUCCEEDED)
        assert (record.error is None) == (record.state is not StageState.FAILED)
        assert entered == record.attempts <= 1, f"{record.name} was entered {entered} times"
        if record.state is StageState.SKIPPED and record.cause.kind is not CauseKind.SKIP:
            assert entered == 0, f"{record.name} was entered, and then skipped: {record.cause}"
        elif record.state is not StageState.SKIPPED:
            assert entered == 1, f"{record.name} is {record.state}, but was never entered"
            assert record.started <= record.ended
        for inputs in self.saw.get(stage, []):
            assert inputs == {name: NAMES.index(name) for name in inputs}
            assert inputs == self.saw[stage][0], f"the inputs of {record.name} changed while it ran"

    def _check_error(self, error: PipelineTerminated | None, records: list[Any]) -> None:
        failed = [record for record in records if record.state is StageState.FAILED]
        failed.sort(key=lambda record: record.place)
        if isinstance(error, StageExecutionError):
            assert list(error.failures) == failed
            assert error.original is error.__cause__ is error.results.records[error.stage or "?"].error


def _never(ctx: StageContext) -> bool:
    return False


def _kind_of(error: PipelineTerminated) -> str:
    if isinstance(error, StageTimeoutError):
        return "timeout"
    return "cancel" if isinstance(error, UnifiedPipelineCancelled) else "fail"


def compare(case: Case, outcomes: Iterable[Outcome], seen: Observation) -> None:
    """Fails, and says all there is to say, unless what was seen is what the model says."""
    if not admits(outcomes, seen):
        allowed = "\n".join(f"  {outcome}" for outcome in sorted(outcomes, key=repr))
        pytest.fail(f"{case}\nengine:\n  {seen}\nmodel:\n{allowed}", pytrace=False)


def check(cases: Iterable[Case], *, times: int = 1) -> None:
    """Runs cases and compares; every other time in an opened run."""

    async def main() -> None:
        stand: Stand | None = None
        for case in cases:
            if stand is None or stand.declared != declared(case):
                stand = Stand(case)
            stand.scripts = case.scripts
            outcomes = explore(case.dag, case.scripts, case.policy)
            for _ in range(times):
                opened = next(turn) % 2 == 0
                try:
                    seen = await stand.run(opened=opened)
                except Exception as error:
                    error.add_note(f"{case}\nopened: {opened}")
                    raise
                compare(case, outcomes, seen)

    turn = itertools.count()
    trio.run(main, clock=MockClock(autojump_threshold=0))


# Every DAG


def every_dag(size: int) -> Iterator[tuple[Node, ...]]:
    """Every DAG of a number of stages. Unless `FULL`, one numbering of each."""
    pairs = [(one, other) for other in range(size) for one in range(other)]
    seen: set[frozenset[tuple[int, int]]] = set()
    for chosen in itertools.product((False, True), repeat=len(pairs)):
        edges = frozenset(itertools.compress(pairs, chosen))
        if edges not in seen:
            yield tuple(Node(tuple(one for one, other in sorted(edges) if other == stage)) for stage in range(size))
        if not FULL:
            for order in itertools.permutations(range(size)):
                seen.add(frozenset((order[one], order[other]) for one, other in edges))


def plain_cases(size: int, policy: str) -> Iterator[Case]:
    """Every DAG of a number of stages with every script of immediate bodies."""
    for dag in every_dag(size):
        for does in itertools.product(DOES, repeat=size):
            yield Case(dag, tuple(map(Script, does)), policy)


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (2, 2), (3, 8), (4, 64)] if FULL else [(1, 1), (2, 2), (3, 6), (4, 31)]
)
def test_every_small_dag_is_there(size: int, count: int) -> None:
    assert len(set(every_dag(size))) == count


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_small_dag_ends_as_the_model_says(size: int, policy: str) -> None:
    check(plain_cases(size, policy))


# The model itself, or it might admit anything

CHAIN = (Node(), Node((0,)), Node((1,)))
FAN = (Node(), Node((0,)), Node((0,)))
DIAMOND = (Node(), Node((0,)), Node((0,)), Node((1, 2)))


def joined(join: str = "all", *, count: int = 0, optionally: Iterable[int] = ()) -> tuple[Node, ...]:
    """Two stages and what comes after both."""
    return (Node(), Node(), Node((0, 1), optional=frozenset(optionally), join=join, count=count))


def case_of(dag: tuple[Node, ...], does: str, policy: str = "fail_fast", **changes: Script) -> Case:
    """A case in few words: what each stage does, or a script for the stage of a name."""
    scripts = [changes.get(NAMES[stage], Script(word)) for stage, word in enumerate(does.split())]
    return Case(dag, tuple(scripts), policy)


SLEEPS = Script(sleep=2)
WAITS = Script(ticks=1)

# For every row of the table of endings and for every join: a case, and the only ways in which it may end. States by
# their first letters, K for skipped; then the status, and who ended the run.
TABLE: dict[str, tuple[Case, set[tuple[str, str, str]]]] = {
    "ok": (case_of(DIAMOND, "ok ok ok ok"), {("SSSS", "succeeded", "")}),
    "skip": (case_of(DIAMOND, "ok skip ok ok"), {("SKSK", "partial", "")}),
    "when": (case_of(CHAIN, "ok when ok"), {("SKK", "partial", "")}),
    "cancel_branch": (case_of(DIAMOND, "ok cancel_branch ok ok"), {("SCSK", "partial", "")}),
    "cancel_branch, beyond an optional edge": (
        case_of((*FAN, Node((1, 2), frozenset({1}))), "ok cancel_branch ok ok"),
        {("SCSS", "partial", "")},
    ),
    "cancel_branch of the trunk": (case_of(CHAIN, "ok cancel_branch ok"), {("SCK", "partial", "")}),
    "cancel_branch of another": (
        case_of((*FAN, Node((1,)), Node((1,))), "ok ok ok _ _", d=Script("cancel_branch", of=1), e=SLEEPS),
        {("SSSCC", "partial", "")},
    ),
    "cancel_branch of one that is not upstream": (
        case_of(FAN, "ok _ ok", b=Script("cancel_branch", of=2)),
        {("SFS", "failed", "fail b")},
    ),
    "cancel_branch of one that comes later": (
        case_of(CHAIN, "ok _ ok", b=Script("cancel_branch", of=2)),
        {("SFK", "failed", "fail b")},
    ),
    "cancel": (case_of(DIAMOND, "ok cancel ok ok"), {("SCSK", "cancelled", "cancel b")}),
    "cancel, while another runs": (case_of(FAN, "ok cancel _", c=WAITS), {("SCC", "cancelled", "cancel b")}),
    "fail": (case_of(DIAMOND, "ok fail ok ok"), {("SFSK", "failed", "fail b")}),
    "fail, while another runs": (case_of(FAN, "ok fail _", c=WAITS), {("SFC", "failed", "fail b")}),
    "fail, when another wakes": (
        case_of((*FAN, Node((2,))), "ok _ _ ok", b=Script("fail", sleep=2), c=SLEEPS),
        {("SFSS", "failed", "fail b"), ("SFSK", "failed", "fail b")},  # the strand of c may yield before d
    ),
    "fail, both in one tick": (
        case_of(FAN, "ok fail cancel"),
        {("SFC", "failed", "fail b"), ("SFC", "cancelled", "cancel c")},
    ),
    "fail, while a stubborn one runs": (
        case_of((*FAN, Node((2,))), "ok fail _ ok", c=Script(sleep=1, stubborn=True)),
        {("SFSK", "failed", "fail b")},
    ),
    "drain": (
        case_of((*FAN, Node((2,))), "ok fail _ ok", "drain", c=WAITS),
        {("SFSK", "failed", "fail b")},
    ),
    "drain, immediate siblings": (
        case_of((*FAN, Node((2,))), "ok fail ok ok", "drain"),
        {("SFSS", "failed", "fail b")},
    ),
    "isolate": (
        case_of((*FAN, Node((2,)), Node((1, 3))), "ok fail _ ok ok", "isolate", c=SLEEPS),
        {("SFSSK", "failed", "fail b")},
    ),
    "tolerate": (
        case_of((*DIAMOND, Node((1,), join="settled")), "ok _ ok ok ok", b=Script("fail", on_failure="tolerate")),
        {("SFSKS", "partial", "")},
    ),
    "timeout": (case_of(CHAIN, "ok _ ok", b=Script("timeout", sleep=1)), {("SFK", "failed", "timeout b")}),
    "all": (case_of(joined(), "ok skip ok"), {("SKK", "partial", "")}),
    "all, optional": (case_of(joined(optionally=[1]), "ok skip ok"), {("SKS", "partial", "")}),
    "any": (case_of(joined("any"), "skip ok ok"), {("KSS", "partial", "")}),
    "any, none": (case_of(joined("any"), "skip skip ok"), {("KKK", "partial", "")}),
    "any, before the other": (
        case_of(joined("any"), "ok _ fail", b=SLEEPS),
        {("SCF", "failed", "fail c")},
    ),
    "any_settled": (case_of(joined("any_settled"), "_ skip fail", a=SLEEPS), {("SKF", "failed", "fail c")}),
    "any_settled, none": (case_of(joined("any_settled"), "skip when ok"), {("KKK", "partial", "")}),
    "quorum": (case_of(joined("quorum"), "ok skip ok"), {("SKK", "partial", "")}),
    "n_of": (case_of(joined("n_of", count=1), "skip _ ok", b=WAITS), {("KSS", "partial", "")}),
    "settled": (case_of(joined("settled"), "skip cancel_branch ok"), {("KCS", "partial", "")}),
    "settled, in a cancelled branch": (
        case_of((*CHAIN, Node((2,), join="settled")), "ok ok cancel_branch ok"),
        {("SSCK", "partial", "")},
    ),
}


@pytest.mark.parametrize(("case", "expected"), TABLE.values(), ids=TABLE)
def test_model_and_engine_do_what_the_table_says(case: Case, expected: set[tuple[str, str, str]]) -> None:
    found: set[tuple[str, str, str]] = set()
    for outcome in explore(case.dag, case.scripts, case.policy):
        states = "".join("K" if state == "skipped" else state[0].upper() for state in outcome.states)
        raised = "" if outcome.raised is None else f"{outcome.raised[0]} {NAMES[outcome.raised[1]]}"
        found.add((states, outcome.status, raised))
    assert found == expected
    check([case], times=10)


WRONG: dict[str, dict[str, Any]] = {
    "an immediate output is lost": {"states": ("succeeded", "failed", "skipped", "skipped")},
    "a finished stage is cancelled": {"states": ("succeeded", "failed", "cancelled", "skipped")},
    "a join starts without its input": {"states": ("succeeded", "failed", "succeeded", "succeeded")},
    "another status": {"status": "partial"},
    "nothing is raised": {"raised": None},
    "another stage is blamed": {"raised": ("fail", 2)},
    "another error is raised": {"raised": ("cancel", 1)},
    "an input is missing": {"inputs": (frozenset(), frozenset({0}), frozenset(), None)},
    "a body is entered": {"inputs": (frozenset(), frozenset({0}), frozenset({0}), frozenset({2}))},
    "a flag too many": {"after_cancel": frozenset({2})},
    "a cause is missing": {"causes": (None, ("fail", 1), None, None)},
    "a cause too many": {"causes": (None, ("fail", 1), ("fail", 1), ("fail", 1))},
    "another cause": {"causes": (None, ("fail", 1), None, ("fail", 2))},
    "another kind of cause": {"causes": (None, ("cancel", 1), None, ("cancel", 1))},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_model_does_not_admit_what_is_wrong(wrong: dict[str, Any]) -> None:
    case = case_of(DIAMOND, "ok fail ok ok")
    right = Observation(
        states=("succeeded", "failed", "succeeded", "skipped"),
        status="failed",
        raised=("fail", 1),
        inputs=(frozenset(), frozenset({0}), frozenset({0}), None),
        after_cancel=frozenset(),
        causes=(None, ("fail", 1), None, ("fail", 1)),
    )
    outcomes = explore(case.dag, case.scripts, case.policy)
    assert admits(outcomes, right)
    assert not admits(outcomes, attrs.evolve(right, **wrong))


def test_an_early_join_sees_just_the_first() -> None:
    case = case_of(joined("any"), "ok ok ok")
    assert {outcome.inputs[2] for outcome in explore(case.dag, case.scripts, case.policy)} == {
        frozenset({0}),
        frozenset({1}),
    }


def test_a_stubborn_body_is_marked_if_it_ends_after_its_cancellation() -> None:
    case = case_of(FAN, "ok _ _", b=Script("fail", sleep=1), c=Script(sleep=2, stubborn=True))
    (outcome,) = explore(case.dag, case.scripts, case.policy)
    assert outcome.outputs == {0, 2}
    assert outcome.after_cancel == {2}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_which_immediate_outputs_exist_does_not_depend_on_the_order(size: int) -> None:
    for policy in POLICIES:
        for case in plain_cases(size, policy):
            outcomes = explore(case.dag, case.scripts, case.policy)
            assert len({outcome.states for outcome in outcomes}) == 1, case


# What ends in spite of a cancellation

ENDINGS = (
    Script("ok", sleep=2, stubborn=True),
    Script("skip", sleep=2, stubborn=True),
    Script("cancel", sleep=2, stubborn=True),
    Script("cancel_branch", sleep=2, stubborn=True),
    Script("cancel_branch", of=1, sleep=2, stubborn=True),
    Script("cancel_branch", of=0, sleep=2, stubborn=True),
    *(Script("fail", sleep=2, stubborn=True, on_failure=policy) for policy in (*POLICIES, "tolerate")),
)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: f"{ending.does}-{ending.on_failure or ending.of}")
def test_what_a_body_says_in_a_cancelled_branch_counts_as_the_model_says(ending: Script) -> None:
    """d ends the branch of b, in which e is stubborn; f is beyond, behind e and what runs beside that branch."""

    def cases() -> Iterator[Case]:
        for join, beside in itertools.product(("all", "any", "any_settled", "settled"), (Script(), Script(sleep=2))):
            dag = (Node(), Node((0,)), Node((0,)), Node((1,)), Node((1,)), Node((2, 4), join=join))
            ends_b = Script("cancel_branch", of=1, ticks=1)
            for policy in POLICIES:
                yield Case(dag, (Script(), Script(), beside, ends_b, ending, Script()), policy)

    check(cases(), times=3)


# Samples of everything else


JOINS = ("all", "all", "any", "any_settled", "quorum", "n_of", "settled")
EVENTS = ("skip", "when", "fail", "cancel", "cancel_branch", "of", "timeout")


@st.composite
def nodes(draw: st.DrawFn, stage: int, *, joins: bool) -> Node:
    after = tuple(sorted(draw(st.sets(st.integers(0, stage - 1), max_size=3)))) if stage else ()
    if not joins or not after:
        return Node(after)
    join = draw(st.sampled_from(JOINS))
    if join == "all":
        return Node(after, frozenset(other for other in after if draw(st.booleans())))
    if join == "n_of":
        return Node(after, join=join, count=min(2, len(after)))
    return Node(after, join=join)


@st.composite
def scripts(draw: st.DrawFn, stage: int, size: int, *, pauses: bool, stubborn: bool) -> Script:
    does = draw(st.sampled_from(("ok", "ok", "ok", *EVENTS)))
    if does == "timeout" and not pauses:
        does = "ok"
    of = None
    if does == "of":
        does, of = "cancel_branch", draw(st.integers(0, stage) | st.integers(0, size - 1))
    on_failure = draw(st.sampled_from((None, None, "tolerate", *POLICIES))) if does in ("fail", "timeout") else None
    ticks, sleep = draw(st.sampled_from(((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (0, 3)))) if pauses else (0, 0)
    if does == "timeout":
        ticks, sleep = 0, sleep or 1
    shielded = stubborn and does != "timeout" and bool(ticks or sleep) and draw(st.booleans())
    return Script(does, of=of, ticks=ticks, sleep=sleep, stubborn=shielded, on_failure=on_failure)


@st.composite
def mixed_cases(draw: st.DrawFn, *, joins: bool = True, pauses: bool = True, stubborn: bool = False) -> Case:
    """Cases of up to six stages."""
    size = draw(st.integers(2, 6))
    return Case(
        tuple(draw(nodes(stage, joins=joins)) for stage in range(size)),
        tuple(draw(scripts(stage, size, pauses=pauses, stubborn=stubborn)) for stage in range(size)),
        draw(st.sampled_from(POLICIES)),
    )


SAMPLED = settings(max_examples=5_000 if FULL else 400, deadline=None)


@SAMPLED
@given(mixed_cases(pauses=False))
def test_which_immediate_outputs_exist_does_not_depend_on_the_order_whatever_the_joins(case: Case) -> None:
    outcomes = explore(case.dag, case.scripts, case.policy, prompt=True)
    assert len({outcome.states for outcome in outcomes}) == 1


@SAMPLED
@given(mixed_cases(pauses=False))
def test_every_join_is_decided_as_the_model_says(case: Case) -> None:
    check([case], times=3)


@SAMPLED
@given(mixed_cases(joins=False))
def test_bodies_that_wait_end_as_the_model_says(case: Case) -> None:
    check([case], times=3)


@SAMPLED
@given(mixed_cases())
def test_joins_of_bodies_that_wait_end_as_the_model_says(case: Case) -> None:
    check([case], times=3)


@SAMPLED
@given(mixed_cases(stubborn=True))
def test_bodies_that_finish_in_spite_of_a_cancellation_end_as_the_model_says(case: Case) -> None:
    check([case], times=3)
