"""The checks a change has to pass.

`nox` runs them all; `nox -s tests -- -k name` passes what follows `--` on to pytest.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.10.14"
nox.options.sessions = ["lint", "typing", "tests", "docs"]
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"

PYPROJECT = nox.project.load_toml("pyproject.toml")
LIBRARY = ("stageflow",)
AROUND = ("tests", "docs/examples", "docs/test_examples.py", "benchmarks", "conftest.py", "noxfile.py")


def group(name: str) -> list[str]:
    """Return the requirements of one of pyproject.toml's dependency groups."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def python_files(*places: str) -> list[str]:
    """Return every Python file in or at these places."""
    paths = [Path(place) for place in places]
    return sorted(str(file) for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, Trio's rules, and which way imports point."""
    session.install(".[cli]", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    # A stage is async by protocol, whether or not it awaits (124). What an async function of the library promises, a
    # checkpoint on every normal return (910, 911), is asked of nobody else's.
    session.run("flake8-async", "--disable=ASYNC124", *python_files(*LIBRARY))
    session.run("flake8-async", "--disable=ASYNC124,ASYNC910,ASYNC911", *python_files(*AROUND))
    session.run("lint-imports", "--no-cache", "--no-logo")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types, with both mypy and pyright."""
    session.install(".[cli,processes]", *group("typing"))
    session.run("mypy", *(place for place in LIBRARY + AROUND if Path(place).exists()))
    session.run("pyright")
    session.run("pyright", "--verifytypes", "stageflow", "--ignoreexternal")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, the examples, and the Python in the documentation."""
    session.install(".[cli,processes]", *group("tests"))
    # On all processors, a file on each, unless somebody wants to look inside.
    alone = {"-n", "-s", "--pdb", "--trace"} & set(session.posargs)
    session.run("pytest", *([] if alone else ["-n", "auto", "--dist", "loadfile"]), *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Run the tests in the sizes that take too long for every change."""
    session.install(".[cli,processes]", *group("tests"))
    session.run("pytest", *session.posargs, env={"STAGEFLOW_FULL": "1"})


@nox.session
def crash(session: nox.Session) -> None:
    """Kill 5,000 processes at random points of random graphs. `--kills`, `--seed` and the like are passed on."""
    session.install(".")
    session.run("python", "tests/crash.py", "--kills", "5000", "--jobs", str(os.cpu_count() or 1), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, then run its examples where only what a user gets is installed."""
    session.install(".", *group("docs"))
    # -E: a reused environment must not hide the warnings of pages it read last time.
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-E", "docs", f"{session.create_tmp()}/html")
    for example in python_files("docs/examples"):
        session.run("python", example)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks. `--peers`, or `--peers=dask,dbos`, takes in others, each in an environment of its own."""
    session.install(".", *group("bench"))
    asked = [argument for argument in session.posargs if argument.split("=")[0] == "--peers"]
    others = [argument for argument in session.posargs if argument not in asked]
    if asked:
        names = [name for argument in asked for name in argument.partition("=")[2].split(",") if name]
        others = ["--peers", str(peers(session, names)), *others]
    session.run("python", "-m", "benchmarks", *others)


def peers(session: nox.Session, names: list[str]) -> Path:
    """Make the environments of the benchmarks' peers, or of some of them; where that fails, leave pip's words."""
    listed = nox.project.load_toml("benchmarks/peers.toml")
    if unknown := set(names) - set(listed):
        session.error(f"no such peers: {', '.join(sorted(unknown))}; there are {', '.join(listed)}")
    session.install("virtualenv")
    place = Path(session.create_tmp(), "peers").resolve()
    for name in names or listed:
        session.run("virtualenv", "--quiet", str(place / name))
        with (place / f"{name}.log").open("w") as log:
            pip = [str(place / name / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            try:
                session.run(*pip, *listed[name]["requires"], external=True, stdout=log, stderr=subprocess.STDOUT)
            except CommandFailed:
                shutil.rmtree(place / name)
    return place
