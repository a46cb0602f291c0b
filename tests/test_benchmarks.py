"""The benchmarks measure what they say: the shapes, what the contestants do with them, the arithmetic, the report."""

# ruff: noqa: E402  # what is imported has to be made importable first

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import trio
from rich.console import Console

PLACE = Path(__file__).parent.parent / "benchmarks"


def take_from_working_tree() -> None:
    """Make `benchmarks` importable: it is not installed, and the working tree is not where imports are looked for."""
    spec = importlib.util.spec_from_file_location("benchmarks", PLACE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    spec.submodule_search_locations = [str(PLACE)]
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


take_from_working_tree()

from typing import TYPE_CHECKING

from benchmarks import page, shapes, worker
from benchmarks.bodies import Cannot, body
from benchmarks.bounds import Bound, bounds
from benchmarks.cases import Case, cases
from benchmarks.contestant import COMMIT, CONTESTANTS, FLOORS, OURS, PEERS, load
from benchmarks.figures import Figure, Results, Spread, spread
from benchmarks.picture import draw
from benchmarks.report import show
from benchmarks.run import Conductor, Plan, pythons

if TYPE_CHECKING:
    from trio.testing import MockClock

HERE = [entry.key for entry in (*FLOORS, OURS)]


# Shapes


def test_a_chain_is_a_line() -> None:
    assert shapes.chain(4).dependencies == ((), (0,), (1,), (2,))
    assert shapes.chain(4).strands == ((0, 1, 2, 3),)


def test_a_fan_has_a_first_and_a_last_stage_beside_its_branches() -> None:
    assert shapes.fan(3).dependencies == ((), (0,), (0,), (0,), (1, 2, 3))
    assert shapes.fan(3).followers == ((1, 2, 3), (4,), (4,), (4,), ())
    assert shapes.fan(3).strands == ((0,), (1,), (2,), (3,), (4,))


def test_the_diamond_has_five_stages() -> None:
    assert len(shapes.diamond(3)) == 5
    assert (shapes.diamond(3).roots, shapes.diamond(3).ends) == ((0,), (4,))


def test_a_layered_shape_has_three_inputs_each_from_the_layer_before() -> None:
    shape = shapes.layered(30)
    assert len(shape) == 900
    assert [len(layer) for layer in shape.layers] == [30] * 30
    for number, before in enumerate(shape.dependencies):
        assert len(set(before)) == (3 if number >= 30 else 0)
        assert all(other // 30 == number // 30 - 1 for other in before)


def test_a_layered_shape_is_the_same_whenever_it_is_drawn() -> None:
    assert shapes.layered(10) == shapes.layered(10)


# Contestants


@pytest.mark.parametrize("shape", [shapes.chain(5), shapes.fan(5), shapes.layered(4), shapes.diamond(3)], ids=str)
@pytest.mark.parametrize("contestant", HERE)
def test_a_contestant_runs_every_stage_once_and_after_those_it_waits_for(contestant: str, shape: shapes.Shape) -> None:
    worker.check(load(contestant), shape)


def test_the_check_notices_a_stage_that_runs_too_early() -> None:
    backwards = shapes.Shape("backwards", 2, ((1,), ()))
    with pytest.raises(AssertionError, match="stage 0 ran at the wrong time"):
        worker.check(load("floor_loop"), backwards)


@pytest.mark.parametrize("contestant", ["floor_task", "floor_scope", "floor_branch", "stageflow"])
async def test_the_branches_of_a_fan_out_run_at_the_same_time(contestant: str, autojump_clock: MockClock) -> None:
    shape = shapes.fan(10)
    run = load(contestant).prepare(shape, [body("sleep", "trio")] * len(shape))
    began = trio.current_time()
    await run()
    assert trio.current_time() - began == pytest.approx(3 * 0.05)


@pytest.mark.parametrize("contestant", [COMMIT.key, "stageflow"])
def test_a_run_that_is_written_down_does_the_same(contestant: str, tmp_path: Path) -> None:
    worker.check(load(contestant), shapes.chain(5), tmp_path)


def test_the_floor_commits_each_stage_on_its_own(tmp_path: Path) -> None:
    worker.check(load(COMMIT.key), shapes.chain(5), tmp_path)
    with closing(sqlite3.connect(tmp_path / "floor.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT run, count(*) FROM events GROUP BY run").fetchall() == [(0, 5), (1, 5)]


def test_who_writes_nothing_down_says_so(tmp_path: Path) -> None:
    with pytest.raises(Cannot, match="writes nothing down"):
        worker.check(load("floor_loop"), shapes.chain(5), tmp_path)


def test_a_run_that_was_written_down_is_gone_on_with_at_its_last_stage(tmp_path: Path) -> None:
    ours, shape = load("stageflow"), shapes.chain(5)
    worker.record(ours, shape, tmp_path)
    assert worker.reload(ours, shape, tmp_path).keys() == {"cpu", "wall"}


def test_a_run_that_begins_anew_is_no_reload(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="4 stages ran again"):
        worker.reload(load("stageflow"), shapes.chain(5), tmp_path)


def test_every_contestant_has_its_module_and_every_module_its_contestant() -> None:
    assert {path.stem for path in (PLACE / "contestants").glob("[!_]*.py")} == set(CONTESTANTS)


@pytest.mark.parametrize("what", ["cancel", "memory"])
@pytest.mark.parametrize("contestant", ["floor_branch", "stageflow"])
def test_what_waits_is_stopped_and_weighed(contestant: str, what: str) -> None:
    found = worker.measure(load(contestant), what, shapes.fan(5), "forever")
    assert found.get("leaked", 0) == 0
    assert found.get("bytes", 5000) >= 5000


def test_a_plain_function_cannot_checkpoint() -> None:
    with pytest.raises(Cannot, match="no checkpoint"):
        body("checkpoint", "threads")


@pytest.mark.parametrize(("first", "then", "reason"), [(10, 20, "at a smaller size"), (20, 10, "longer than 0.01 s")])
def test_whoever_takes_too_long_is_not_asked_for_more_but_for_less(
    first: int, then: int, reason: str, tmp_path: Path
) -> None:
    found = results()
    asked = [Case("time", "chain", first), Case("time", "chain", then)]
    plan = Plan(asked, 2, {"floor_loop": Path(sys.executable)}, 0.01, tmp_path)
    Conductor(plan, found, lambda _: None).conduct()
    assert [figure.status for figure in found.figures] == ["timeout", "timeout"]
    assert found.figures[1].reason.endswith(reason)


# Arithmetic


def results(**figures: list[float]) -> Results:
    case = Case("time", "chain", 1000)
    return Results(
        made="2000-01-01T00:00:00+00:00",
        mode="quick",
        rounds=3,
        machine={},
        absent={peer.key: "not asked for" for peer in PEERS},
        cases=[case],
        figures=[
            Figure(case.key, contestant, number, values={"cpu": value, "wall": value})
            for contestant, values in figures.items()
            for number, value in enumerate(values)
        ],
    )


def test_a_spread_is_the_median_between_the_least_and_the_greatest() -> None:
    assert spread([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    assert spread([]) is None


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was slow for both; the ratio of the medians would be 20/10.
    found = results(stageflow=[10.0, 60.0, 20.0], floor_checkpoint=[10.0, 40.0, 5.0])
    assert found.ratio("time chain 1000 return", "stageflow", "floor_checkpoint") == Spread(1.5, 1.0, 4.0)


def test_a_round_that_one_of_two_did_not_finish_does_not_count() -> None:
    found = results(stageflow=[10.0, 60.0], floor_checkpoint=[5.0])
    assert found.ratio("time chain 1000 return", "stageflow", "floor_checkpoint") == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("ours", "holds"), [(0.9, True), (1.0, True), (1.1, False)])
def test_a_bound_holds_up_to_its_limit(ours: float, holds: bool) -> None:
    [chain, *others] = bounds(results(stageflow=[ours], floor_checkpoint=[1.0]))
    assert (chain.what, chain.limit, chain.holds) == ("chain of 1,000", 1.0, holds)
    assert {other.holds for other in others} == {None}


def test_what_is_written_down_is_compared_in_wall_time_and_reloaded_in_milliseconds() -> None:
    found = results()
    chain, reload = Case("durable", "chain", 1000, "give"), Case("reload", "chain", 10_000, "give")
    found.cases += [chain, reload]
    for contestant, cpu, wall in (("stageflow", 4.0, 3.0), (COMMIT.key, 1.0, 2.0)):
        found.figures.append(Figure(chain.key, contestant, 0, values={"cpu": cpu, "wall": wall}))
    found.figures.append(Figure(reload.key, "stageflow", 0, values={"cpu": 0.25, "wall": 0.5}))
    shown = {bound.what: (bound.found, bound.holds) for bound in bounds(found) if bound.found is not None}
    assert shown == {
        "durable chain of 1,000": (Spread(1.5, 1.5, 1.5), True),
        "reload of 10,000 stages": (Spread(250.0, 250.0, 250.0), False),
    }
    assert "| **stageflow** | 3,000 | 4,000 |" in page.write(found)["durable"]
    texts = {"".join(element.itertext()) for element in ET.fromstring(draw(found)).iter() if element.text}
    assert {"durable chain of 1,000, to (f)", "reload of 10,000 stages"} <= texts


def test_whatever_leaks_breaks_its_bound() -> None:
    assert Bound("cancel", "floor", 1.3, Spread(1.0, 1.0, 1.0), note="leaked 3").holds is False


def test_every_case_has_a_key_of_its_own() -> None:
    for quick in (True, False):
        keys = [case.key for case in cases(quick=quick)]
        assert len(set(keys)) == len(keys)


# What is shown


def test_results_are_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    before = results(stageflow=[1.0, 2.0], floor_checkpoint=[1.0])
    before.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == before


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="measure anew"):
        Results.read(tmp_path / "results.json")


def test_a_peer_that_was_not_measured_is_in_the_report_with_the_reason() -> None:
    found = results(stageflow=[1.0])
    found.absent["dask"] = "could not be installed: no reason given"
    found.figures.append(Figure("time chain 1000 return", "langgraph", 0, "timeout", "longer than 60 s"))
    out = StringIO()
    show(found, Console(file=out, width=200))
    for text in (out.getvalue(), page.write(found)["missing"]):
        assert "could not be installed: no reason given" in text
        assert "timeout: longer than 60 s" in text


def test_an_environment_that_could_not_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "dask.log").write_text("Collecting\nERROR: No matching distribution found for dask\n")
    found, absent = pythons(tmp_path)
    assert list(found) == [*(floor.key for floor in FLOORS), COMMIT.key, OURS.key]
    assert absent["dask"] == "could not be installed: No matching distribution found for dask"
    assert absent["prefect"] == "not asked for"


def test_the_page_has_a_row_for_each_bound_and_one_for_each_contestant() -> None:
    parts = page.write(results(stageflow=[2e-3], floor_checkpoint=[1e-3]))
    assert "| chain of 1,000 | (b) loop, checkpoint | 2.00× | 2.00 … 2.00 | 1× | **missed** |  |" in parts["bounds"]
    assert "| **stageflow** | 2 |" in parts["floors"]
    assert "| (b) loop, checkpoint | 1 |" in parts["floors"]


def test_the_picture_is_well_formed_and_names_who_is_in_it() -> None:
    picture = ET.fromstring(draw(results(stageflow=[1.0], floor_checkpoint=[2.0])))
    texts = {"".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert "stageflow" in texts
