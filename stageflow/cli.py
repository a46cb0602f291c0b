"""The command ``stageflow``: `demo` audits what is installed, `show` draws a graph.

Exit codes: 0 all is well, 1 the audit found something, 2 the command asks for what is not there, 130 interrupted.
"""

import importlib
import json
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from stageflow.demo import Audit, Target, audit_of, audit_pipeline, find_targets, normalised, settled
from stageflow.engine import PipelineResults, Run
from stageflow.errors import DefinitionError, DefinitionWarning, nearest
from stageflow.pipeline import Pipeline
from stageflow.running import StageGraph

if TYPE_CHECKING:
    from cyclopts import App

__all__ = ["main"]

CLEAN, FINDINGS, USAGE, INTERRUPTED = 0, 1, 2, 130
_ROWS = 40  # of the table of findings
_REFRESH = 0.05  # seconds between two pictures of the progress
# Files that nobody wrote who asks to be shown a pipeline: Python's, those of what is installed, and our own.
_INSTALLED = (_path for key in ("stdlib", "platstdlib", "purelib", "platlib") if (_path := sysconfig.get_path(key)))
_FOREIGN = ("<", *(f"{path}{os.sep}" for path in (Path(__file__).parent, *_INSTALLED)))


class _UsageError(Exception):
    """The command asks for something that is not there. Said without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What stands behind the command's name; if left out, what the program was called with.

    Returns:
        The exit code.
    """
    try:
        from cyclopts import CycloptsError  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name != "cyclopts":
            raise
        print('The command stageflow needs cyclopts: pip install "stageflow[cli]"', file=sys.stderr)
        return USAGE
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # whatever a file is called, it can be printed
        reconfigure(errors="backslashreplace")
    try:
        result = _app()(list(sys.argv[1:] if arguments is None else arguments))
    except CycloptsError:
        return USAGE  # Cyclopts has said why
    except _UsageError as error:
        print(f"stageflow: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("stageflow: interrupted", file=sys.stderr)
        return INTERRUPTED
    return result if isinstance(result, int) else CLEAN


def _app() -> "App":
    from cyclopts import App, Parameter  # noqa: PLC0415 - an extra

    def demo(
        *,
        only: Annotated[list[str] | None, Parameter(negative=(), show_default=False)] = None,
        json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
        trace: bool = True,
    ) -> int:
        """Audit the packages installed in the running environment.

        Compares every installed file with the size and the hash in its distribution's RECORD, in a pipeline that has
        one branch for each distribution. Exits with 0 if all is as it was installed, and with 1 if not.

        Parameters
        ----------
        only
            Audit the distribution of this name only. May be given several times.
        json
            Print one JSON object, and nothing else.
        trace
            Draw how the pipeline went.
        """
        return _demo(only or (), as_json=json, trace=trace)

    def show(pipeline: str, /, *, mermaid: Annotated[bool, Parameter(negative=(), show_default=False)] = False) -> int:
        """Draw the graph of a pipeline.

        Parameters
        ----------
        pipeline
            Where it is, as MODULE:PIPELINE. The module is imported, from the working directory too.
        mermaid
            Print it as a Mermaid flowchart.
        """
        return _show(pipeline, as_mermaid=mermaid)

    app = App(
        name="stageflow",
        help="Reliable DAG pipelines on Trio.",
        help_format="markdown",
        version=_version,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    app.command(demo)
    app.command(show)
    return app


def _version() -> str:
    try:
        return f"stageflow {version('stageflow')}"
    except PackageNotFoundError:
        return "stageflow, not installed"


# demo


def _demo(only: Sequence[str], *, as_json: bool, trace: bool) -> int:
    targets = _chosen(find_targets(), only)
    console = Console()
    results, interrupted = _audit(targets, console if console.is_interactive and not as_json else None)
    audit = audit_of(results, targets)
    if as_json:
        print(json.dumps(audit.as_json(), indent=2))
    else:
        _print_audit(console, audit)
        if trace:
            console.print()
            console.print(results.trace)
    if interrupted:
        raise KeyboardInterrupt
    return CLEAN if audit.clean else FINDINGS


def _chosen(targets: Sequence[Target], only: Sequence[str]) -> list[Target]:
    chosen: dict[str, Target] = {}
    for name in only:
        found = [target for target in targets if target.name.partition(" ")[0] == normalised(name)]
        if not found:
            known = {target.name.partition(" ")[0] for target in targets}
            raise _UsageError(f"no distribution {name!r} is installed{_hint(normalised(name), known)}")
        chosen.update((target.name, target) for target in found)
    return list(chosen.values()) if only else list(targets)


def _audit(targets: Sequence[Target], console: Console | None) -> tuple[PipelineResults, bool]:
    """Runs the audit, and says whether it was interrupted. What it had found by then is there nevertheless."""
    graph = audit_pipeline(targets).build()
    runs: list[Run] = []

    async def audit() -> None:
        async with graph.open() as run:
            runs.append(run)
            if console is not None:
                await _show_progress(console, run, targets)

    interrupted = False
    try:
        trio.run(audit)
    except KeyboardInterrupt:
        interrupted = True
    if not runs:
        raise KeyboardInterrupt
    return runs[0].results, interrupted


async def _show_progress(console: Console, run: Run, targets: Sequence[Target]) -> None:
    """Draws a bar until the run has ended. The drawing is done in this task, and nothing else is redirected to it."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("distributions"), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        bar = progress.add_task("audit", total=len(targets))
        while True:
            progress.update(bar, completed=settled(run.results, targets), refresh=True)
            with trio.move_on_after(_REFRESH):
                await run.wait()
                return


def _print_audit(console: Console, audit: Audit) -> None:
    if audit.findings:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("Distribution", overflow="fold", max_width=24)
        table.add_column("File", overflow="fold", min_width=20)
        table.add_column("Problem", style="red", overflow="fold", max_width=32)
        for finding in audit.findings[:_ROWS]:
            problem = f"{finding.problem}: {finding.detail}" if finding.detail else finding.problem
            table.add_row(*map(Text, (finding.distribution, finding.path, problem)))
        console.print(table)
        if len(audit.findings) > _ROWS:
            console.print(Text(f"and {len(audit.findings) - _ROWS:,} more; --json gives them all", "italic"))
        console.print()
    told = {finding.distribution for finding in audit.findings if finding.problem == "unreadable"}
    _print_reasons(console, {name: reason for name, reason in audit.failed.items() if name not in told})
    _print_reasons(console, audit.skipped)
    console.print(_summary(audit))


def _print_reasons(console: Console, reasons: Mapping[str, str]) -> None:
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    for reason, names in together.items():
        console.print(Text.assemble(("Not audited: ", "yellow"), f"{', '.join(names)} ({reason})"))
    if together:
        console.print()


def _summary(audit: Audit) -> Text:
    problems = [f"{len(audit.findings):,} finding{'s'[: len(audit.findings) != 1]}"] if audit.findings else []
    problems += [f"{len(audit.failed):,} could not be read"] if audit.failed else []
    verified = f"{audit.verified:,} of {audit.distributions:,} distributions verified"
    if audit.interrupted:
        found = ", ".join(problems) or "no findings"
        return Text.assemble(("Interrupted. ", "bold yellow"), f"{verified} so far, {found}.")
    verified = f"{verified}: {audit.files:,} files, {decimal(audit.bytes)}, {audit.seconds:.2f} s."
    if problems:
        return Text.assemble((f"{', '.join(problems)}. ", "bold red"), verified)
    return Text.assemble(("Clean. ", "bold green") if audit.verified else ("Nothing to compare. ", "yellow"), verified)


# show


def _show(where: str, *, as_mermaid: bool) -> int:
    module_name, colon, name = where.partition(":")
    module = _imported(module_name)
    pipelines = [key for key, value in vars(module).items() if isinstance(value, (Pipeline, StageGraph))]
    if not colon or not name:
        raise _UsageError(f"write MODULE:PIPELINE{_hint('', [f'{module_name}:{key}' for key in pipelines])}")
    if not hasattr(module, name):
        raise _UsageError(f"module {module_name!r} has no {name!r}{_hint(name, pipelines)}")
    found = getattr(module, name)
    if not isinstance(found, (Pipeline, StageGraph)):
        kind = type(found).__name__
        what = f"{name!r} of module {module_name!r} is no pipeline, but of type {kind!r}"
        raise _UsageError(f"{what}{_hint(name, pipelines)}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DefinitionWarning)
            graph = found.build() if isinstance(found, Pipeline) else found
    except DefinitionError as error:
        raise _UsageError(f"{where} cannot be built: {error}") from error
    for warning in caught:  # without the line of this module, which has nothing to do with it
        print(f"stageflow: {warning.message}", file=sys.stderr)
    if as_mermaid:
        print(graph.to_mermaid(), end="")
    else:
        Console().print(graph)
    return CLEAN


def _imported(name: str) -> ModuleType:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        hint = f"; did you mean {'.'.join(Path(name).with_suffix('').parts)!r}?" if name.endswith(".py") else ""
        raise _UsageError(f"{name!r} is no name of a module{hint}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _UsageError(f"module {name!r} cannot be imported: {error}{_place(error)}") from error
        beside = [path.stem for path in Path.cwd().glob("*.py")]
        raise _UsageError(f"there is no module {name!r}{_hint(name, beside)}") from error
    except SystemExit as error:
        raise _UsageError(f"module {name!r} cannot be imported: it raises {error!r}{_place(error)}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise _UsageError(f"module {name!r} cannot be imported: {what}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Gives the line at which a module that was imported went wrong, if there is one that its author wrote."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_FOREIGN):
            path = Path(frame.filename)
            path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            return f" ({path}:{frame.lineno})"
    return ""


def _hint(name: str, known: Collection[str]) -> str:
    """Gives the rest of a message about a name that is not known: those it might have been meant to be."""
    near = nearest(name, known)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if not known:
        return "; there is none to choose from"
    return f"; there is {', '.join(map(repr, sorted(known)))}" if len(known) <= 8 else ""


if __name__ == "__main__":
    sys.exit(main())
