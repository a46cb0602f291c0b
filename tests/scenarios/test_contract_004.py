"""CONTRACT-004: ten kinds of mistakes and more, each held to eight criteria.

The message says what happened, where, with which value, why that cannot be, and what to do about it; the nearest right
spelling, where there is one; the error carries what a program needs; and nobody is shown how stageflow is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import trio

from stageflow import (
    ContractViolation,
    CycleError,
    DefinitionError,
    Fault,
    MissingOutputError,
    Pipeline,
    PipelineTerminated,
    StageContext,
    StageExecutionError,
    StageflowError,
    StageOutput,
    UnknownStageError,
)
from tests.stages import gives, returns

LINE = r"\(\S*test_contract_004\.py:\d+\)"


@attrs.frozen
class Page:
    title: str


@attrs.frozen
class Job:
    url: str
    limit: int = 3


async def show(fetch: Page) -> str:
    return fetch.title


async def most(lmit: int) -> int:
    return lmit


async def peeks(ctx: StageContext) -> StageOutput:
    return StageOutput.ok(ctx.inputs["fetsch"].data)


SHOW: Any = show
MOST: Any = most
MISSPELLED: Any = {"timeut": 3}


@attrs.frozen(kw_only=True)
class Mistake:
    """A mistake, what raises for it, and what of the message meets each criterion, as a pattern."""

    make: Callable[[], object]
    kind: type[StageflowError]
    what: str
    where: str
    value: str
    why: str
    fix: str
    near: str | None
    attributes: Mapping[str, object] = attrs.field(factory=dict[str, object])


def run(pipeline: Pipeline, data: Any = None) -> object:
    return trio.run(pipeline.run, data)


MISTAKES: dict[str, Mistake] = {
    "a name that no stage has": Mistake(
        make=lambda: Pipeline("p").with_stage("fetch", gives()).with_stage("b", gives(), after="fetsch").build(),
        kind=UnknownStageError,
        what="names 'fetsch'",
        where=f"after= of stage 'b' {LINE}",
        value="'fetsch'",
        why="is no stage of this pipeline",
        fix="did you mean",
        near="'fetch'",
        attributes={"stage": "fetsch", "suggestions": ("fetch",)},
    ),
    "an option that there is not": Mistake(
        make=lambda: Pipeline("p").with_stage("fetch", gives(), **MISSPELLED),
        kind=DefinitionError,
        what="has an unknown option",
        where="stage 'fetch'",
        value="'timeut'",
        why="unknown",
        fix="did you mean",
        near="'timeout'",
    ),
    "a value that an option does not know": Mistake(
        make=lambda: Pipeline("p").with_stage("b", gives(), after="a", join="setled"),
        kind=DefinitionError,
        what="is 'setled'",
        where="join= of stage 'b'",
        value="'setled'",
        why="which is not known",
        fix="There are 'all', 'any', 'any_settled', 'quorum', 'settled', or Join.n_of",
        near="'settled'",
    ),
    "a value out of its range": Mistake(
        make=lambda: Pipeline("p").with_stage("b", gives(), timeout=-1),
        kind=DefinitionError,
        what="negative",
        where="timeout= of stage 'b'",
        value="-1",
        why="cannot be negative",
        fix="None is no limit, 0 is no time at all",
        near=None,
    ),
    "a limit that there is not": Mistake(
        make=lambda: Pipeline("p", limits={"gpu": 1}).with_stage("a", gives(), uses="gpuu").build(),
        kind=DefinitionError,
        what="uses 'gpuu'",
        where=f"stage 'a' {LINE}",
        value="'gpuu'",
        why="which is no limit of the pipeline",
        fix="did you mean",
        near="'gpu'",
    ),
    "a circle": Mistake(
        make=lambda: Pipeline("p").with_stage("a", gives(), after="b").with_stage("b", gives(), after="a").build(),
        kind=CycleError,
        what="stages wait for each other",
        where="'a' → 'b' → 'a'",
        value="'a' → 'b' → 'a'",
        why="in a circle",
        fix="remove one of these edges",
        near=None,
        attributes={"cycle": ("a", "b", "a")},
    ),
    "a type that is none": Mistake(
        make=lambda: Pipeline("p").with_stage("fetch", gives(), output="Page"),
        kind=DefinitionError,
        what="takes a type that values can be checked against",
        where="output= of stage 'fetch'",
        value="'Page'",
        why="is a string",
        fix="give the type itself",
        near=None,
    ),
    "an output with a field that is misspelled": Mistake(
        make=lambda: run(Pipeline("p").with_stage("fetch", returns({"titel": "x"}), output=Page)),
        kind=ContractViolation,
        what="what stage 'fetch' gave is in 2 ways not what",
        where=rf"output= of stage 'fetch' {LINE} declares, Page.*\n  fetch\.title: .*\n  fetch\.titel: ",
        value=r"found 'x' \(str\)",
        why="wanted no such field",
        fix="change either",
        near="did you mean 'title'",
        attributes={
            "stage": "fetch",
            "faults": (
                Fault(path="fetch.title", found="nothing", wanted="str"),
                Fault(path="fetch.titel", found="'x' (str)", wanted="no such field (did you mean 'title'?)"),
            ),
        },
    ),
    "data that is not what the run takes": Mistake(
        make=lambda: run(Pipeline("p", inputs=Job).with_stage("a", gives()), {"url": 3}),
        kind=ContractViolation,
        what="what the run was given as data is not what",
        where=r"inputs= of pipeline 'p' declares, Job.*\n  data\.url: ",
        value=r"found 3 \(int\)",
        why="wanted str",
        fix="change either",
        near=None,
        attributes={"stage": None, "faults": (Fault(path="data.url", found="3 (int)", wanted="str"),)},
    ),
    "stages that do not fit together": Mistake(
        make=lambda: Pipeline("p").with_stage("fetch", gives(), output=Job).with_stage("show", SHOW).build(),
        kind=DefinitionError,
        what="cannot take what stage 'fetch' gives",
        where=rf"stage 'show' {LINE}[^$]*given by  stage 'fetch' {LINE}, output=Job\n  taken by  show\(.* {LINE}",
        value="output=Job",
        why=r"fetch\.title: there is no such field",
        fix="change either",
        near=None,
    ),
    "a parameter that names nothing": Mistake(
        make=lambda: Pipeline("p", inputs=Job).with_stage("most", MOST).build(),
        kind=DefinitionError,
        what="takes 'lmit: int'",
        where=f"stage 'most' {LINE}",
        value="'lmit: int'",
        why="no stage has that name, and neither has a field of Job, the inputs= of the pipeline",
        fix="did you mean",
        near="'limit'",
    ),
    "a parameter that is not in the data": Mistake(
        make=lambda: run(Pipeline("p").with_stage("most", MOST), {"limit": 3}),
        kind=ContractViolation,
        what="takes 'lmit: int'",
        where="stage 'most'",
        value="'lmit: int'",
        why="there is no stage 'lmit', and no 'lmit' in the run's data",
        fix=r"give it, as in run\(\{'lmit': \.\.\.\}\), or say lmit: int | None",
        near="did you mean 'limit'",
        attributes={"stage": "most", "faults": (Fault(path="data.lmit", found="nothing", wanted="int"),)},
    ),
    "something that no stage may return": Mistake(
        make=lambda: run(Pipeline("p").with_stage("fetch", returns(42))),
        kind=ContractViolation,
        what="returned 42",
        where="stage 'fetch'",
        value=r"42 \(int\)",
        why="a stage returns a StageOutput, a mapping, an attrs instance or None",
        fix=r"so wrap it: StageOutput\.ok\(value=\.\.\.\)",
        near=None,
        attributes={"stage": "fetch"},
    ),
}


def raised_by(make: Callable[[], object]) -> StageflowError:
    """What is raised, or what the stage raised of which that tells."""
    with pytest.raises(StageflowError) as caught:
        make()
    error = caught.value
    if isinstance(error, StageExecutionError):
        assert isinstance(error.original, StageflowError)
        assert error.__cause__ is error.original
        assert in_one_line(error.original) in str(error)
        return error.original
    assert not isinstance(error, PipelineTerminated)
    return error


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


INTERNALS = (
    r"cattrs|site-packages|0x[0-9a-f]{4,}|<function|<class|<locals>|object at|FrozenDict|stageflow[./]|[^a-z]_[a-z]"
)


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("criterion", ["what", "where", "value", "why", "fix", "near"])
def test_the_message_says(case: str, criterion: str) -> None:
    pattern: str | None = getattr(MISTAKES[case], criterion)
    message = str(raised_by(MISTAKES[case].make))
    if pattern is None:
        assert "did you mean" not in message
    else:
        assert re.search(pattern, message), message


@pytest.mark.parametrize("case", MISTAKES)
def test_the_error_carries_what_a_program_needs(case: str) -> None:
    mistake = MISTAKES[case]
    error = raised_by(mistake.make)
    assert type(error) is mistake.kind
    assert {name: getattr(error, name) for name in mistake.attributes} == mistake.attributes


@pytest.mark.parametrize("case", MISTAKES)
def test_nobody_is_shown_how_it_is_made(case: str) -> None:
    error = raised_by(MISTAKES[case].make)
    message = re.sub(LINE, "", str(error))
    assert re.search(INTERNALS, message) is None, message
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


def test_every_definition_error_of_a_stage_carries_the_name_of_the_stage() -> None:
    for mistake in MISTAKES.values():
        error = raised_by(mistake.make)
        if type(error) is DefinitionError:
            assert hasattr(error, "stage"), error


def test_an_output_that_is_not_there_has_a_nearest_name() -> None:
    pipeline = Pipeline("p").with_stage("fetch", gives()).with_stage("peeks", peeks, after="fetch")
    error = raised_by(lambda: run(pipeline))
    assert isinstance(error, MissingOutputError)
    assert "did you mean 'fetch'" in str(error)
