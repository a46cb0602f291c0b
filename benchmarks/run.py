"""Runs the cases: a fresh process for every figure, the contestants taking turns.

A round measures every contestant in every case once; the next round begins with another contestant. So whatever else
the machine does meanwhile befalls all of them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.contestant import CONTESTANTS, OURS, PEERS
from benchmarks.figures import Figure, Results

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from benchmarks.cases import Case

__all__ = ["Conductor", "Plan", "pythons"]

IMPORTS_PER_ROUND = 5
ANSWER = '{"status"'
"""How the line begins in which a worker answers; some peers print, too."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "HAMILTON_TELEMETRY_ENABLED": "false",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "ERROR",
}
"""Tells peers to report to nobody, and not to write about each stage."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        cases: In which cases.
        rounds: How often.
        pythons: The interpreter of each contestant that takes part.
        patience: Seconds that one process may take.
        disk: Where durable runs are written down.
    """

    cases: Sequence[Case]
    rounds: int
    pythons: Mapping[str, Path]
    patience: float
    disk: Path


def pythons(environments: Path | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the interpreter of every contestant: ours for the floors and stageflow, one of its own for every peer.

    Args:
        environments: Where the peers' environments are. Instead of a `NAME` that could not be made, there is a
            `NAME.log` that says why.

    Returns:
        Those that were found, and the reason for each that was not.
    """
    found: dict[str, Path] = {}
    absent: dict[str, str] = {}
    for key, entry in CONTESTANTS.items():
        if entry not in PEERS:
            found[key] = Path(sys.executable)
        elif environments is None:
            absent[key] = "not asked for"
        elif (python := environments / key / "bin" / "python").exists():
            found[key] = python
        elif (log := environments / f"{key}.log").exists():
            absent[key] = f"could not be installed: {_complaint(log.read_text(encoding='utf-8'))}"
        else:
            absent[key] = "not asked for"
    return found, absent


def _complaint(log: str) -> str:
    """The line of pip's output that says most."""
    lines = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    for line in lines:
        if "require a different python" in line:
            return "needs Python " + line.rsplit("Requires-Python ", 1)[1].strip()
    return lines[0] if lines else "no reason given"


@dataclass
class Conductor:
    """Has everything measured that a plan says.

    Attributes:
        plan: That plan.
        results: What was found so far.
        tell: Is told what is going on.
    """

    plan: Plan
    results: Results
    tell: Callable[[str], None]
    _given_up: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    _too_large: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def conduct(self) -> None:
        """Measure it all."""
        with playground(self.plan.disk) as ground:
            for number in range(self.plan.rounds):
                for case in self.plan.cases:
                    if number >= case.rounds:
                        continue
                    self.tell(f"round {number + 1} of {self.plan.rounds}: {case.key}")
                    if case.measure == "import":
                        continue
                    taking_part = [key for key in self.plan.pythons if case.admits(key)]
                    turn = number % len(taking_part)
                    for key in taking_part[turn:] + taking_part[:turn]:
                        self._measure(case, key, number, ground)
                imports = [case for case in self.plan.cases if case.measure == "import"]
                self.results.figures += _imports(imports, number, ground)

    def _measure(self, case: Case, key: str, number: int, ground: Path) -> None:
        if (key, case.key) in self._given_up:
            return  # why has been written down in the first round
        kind = (key, f"{case.measure} {case.shape} {case.body} {case.at_once}")
        if case.size > self._too_large.get(kind, case.size):
            reason = f"longer than {self.plan.patience:g} s at a smaller size"
            figure = Figure(case.key, key, number, "timeout", reason)
        else:
            figure = self._ask(case, key, number, ground)
        self.results.figures.append(figure)
        if figure.status != "ok":
            self.tell(f"{case.key}: {CONTESTANTS[key].title}: {figure.status}: {figure.reason}")
            self._given_up.add((key, case.key))
        if figure.status == "timeout":
            self._too_large.setdefault(kind, case.size)

    def _ask(self, case: Case, key: str, number: int, ground: Path) -> Figure:
        if case.measure == "reload" and number == 0:  # all rounds go on with the same run
            recorded = self._have("record", case, key, number, ground)
            if recorded.status != "ok":
                return recorded
        return self._have(case.measure, case, key, number, ground)

    def _have(self, what: str, case: Case, key: str, number: int, ground: Path) -> Figure:
        """Have a process do something for a case."""
        command = [str(self.plan.pythons[key]), "-m", "benchmarks.worker", key, what, case.shape]
        command += [str(case.size), "--body", case.body, "--at-once", str(case.at_once), "--in-turn", str(case.in_turn)]
        if not case.gc:
            command.append("--no-gc")
        with subprocess.Popen(
            command,
            cwd=ground,
            env=_environment(ground, ours=CONTESTANTS[key] not in PEERS),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as worker:
            try:
                out, complaints = worker.communicate(timeout=self.plan.patience)
            except subprocess.TimeoutExpired:
                return Figure(case.key, key, number, "timeout", f"longer than {self.plan.patience:g} s")
            finally:
                # Some peers start servers, which must not outlive them.
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
        try:
            found: dict[str, Any] = json.loads([line for line in out.splitlines() if line.startswith(ANSWER)][-1])
        except (ValueError, IndexError):
            reason = (complaints.strip().splitlines() or ["it said nothing"])[-1]
            return Figure(case.key, key, number, "failed", f"exit code {worker.returncode}: {reason}"[:300])
        status, reason = found.pop("status"), found.pop("reason", "")
        version, python = found.pop("version"), found.pop("python")
        self.results.versions[key] = f"{version or 'working tree'} on Python {python}"
        return Figure(case.key, key, number, status, reason, found)


@contextmanager
def playground(disk: Path) -> Generator[Path]:
    """Give a directory to run workers in, where there is a package `benchmarks`, and nothing else.

    A peer may have the import name of something that lies around here; so does stageflow-core.

    Args:
        disk: Where to make it: what workers write, they write there.
    """
    disk.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="benchmarks-", dir=disk.resolve(), ignore_cleanup_errors=True) as name:
        ground = Path(name)
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(Path(__file__).parent, ground / "benchmarks", ignore=ignored)
        (ground / "home").mkdir()
        yield ground


def _environment(ground: Path, *, ours: bool) -> dict[str, str]:
    """What a worker sees of the environment: peers nothing of our imports, and all a home that is thrown away."""
    hidden = {"PYTHONDONTWRITEBYTECODE", *(() if ours else ("PYTHONPATH", "VIRTUAL_ENV"))}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    if ours and "PYTHONPATH" in kept:
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(part).resolve()) for part in kept["PYTHONPATH"].split(os.pathsep))
    home = {"HOME": str(ground / "home"), "PYTHONPYCACHEPREFIX": str(ground / "pycache")}
    return {**kept, **home, **QUIET, "PYTHONNOUSERSITE": "1", "PYTHONHASHSEED": "0"}


def _imports(cases: Sequence[Case], number: int, ground: Path) -> list[Figure]:
    """Time processes that import something and end: the least of a few, since only disturbance makes it longer."""
    cpu: dict[str, list[float]] = {case.key: [] for case in cases}
    wall: dict[str, list[float]] = {case.key: [] for case in cases}
    # The first one compiles what is imported, and does not count.
    for attempt in range(-1 if number == 0 else 0, IMPORTS_PER_ROUND):
        for case in cases:
            program = "pass" if case.shape == "nothing" else f"import {case.shape}"
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, "-c", program], cwd=ground, env=_environment(ground, ours=True), check=True)
            ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            if attempt >= 0:
                cpu[case.key].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
                wall[case.key].append(ended - began)
    return [
        Figure(key, OURS.key, number, values={"cpu": min(cpu[key]), "wall": min(wall[key]), "samples": len(cpu[key])})
        for key in cpu
    ]
