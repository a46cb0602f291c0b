"""Finding the pipeline that is meant by MODULE:PIPELINE, and saying what to change where there is none."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from stageflow.commands.ending import UsageError
from stageflow.errors import DefinitionError, DefinitionWarning
from stageflow.pipeline import Pipeline
from stageflow.running import StageGraph

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import ModuleType

__all__ = ["graph_at", "hint"]

# Files that nobody wrote who names a pipeline: Python's, those of what is installed, and our own.
_INSTALLED = (_path for key in ("stdlib", "platstdlib", "purelib", "platlib") if (_path := sysconfig.get_path(key)))
_FOREIGN = ("<", *(f"{path}{os.sep}" for path in (Path(__file__).parents[1], *_INSTALLED)))


def graph_at(where: str) -> StageGraph:
    """Imports a module, from the working directory too, and builds a pipeline in it.

    What building it warns of goes to standard error.

    Args:
        where: The pipeline, as ``MODULE:PIPELINE``.

    Raises:
        UsageError: There is none, or it cannot be built.
    """
    module_name, colon, name = where.partition(":")
    module = _imported(module_name)
    pipelines = [key for key, value in vars(module).items() if isinstance(value, (Pipeline, StageGraph))]
    if not colon or not name:
        raise UsageError(f"write MODULE:PIPELINE{hint('', [f'{module_name}:{key}' for key in pipelines])}")
    if not hasattr(module, name):
        raise UsageError(f"module {module_name!r} has no {name!r}{hint(name, pipelines)}")
    found = getattr(module, name)
    if not isinstance(found, (Pipeline, StageGraph)):
        kind = type(found).__name__
        what = f"{name!r} of module {module_name!r} is no pipeline, but of type {kind!r}"
        raise UsageError(f"{what}{hint(name, pipelines)}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DefinitionWarning)
            graph = found.build()
    except DefinitionError as error:
        raise UsageError(f"{where} cannot be built: {error}") from error
    for warning in caught:  # without the line of this module, which has nothing to do with it
        print(f"stageflow: {warning.message}", file=sys.stderr)
    return graph


def _imported(name: str) -> ModuleType:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        meant = f"; did you mean {'.'.join(Path(name).with_suffix('').parts)!r}?" if name.endswith(".py") else ""
        raise UsageError(f"{name!r} is no name of a module{meant}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"module {name!r} cannot be imported: {error}{_place(error)}") from error
        beside = [path.stem for path in Path.cwd().glob("*.py")]
        raise UsageError(f"there is no module {name!r}{hint(name, beside)}") from error
    except SystemExit as error:
        raise UsageError(f"module {name!r} cannot be imported: it raises {error!r}{_place(error)}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"module {name!r} cannot be imported: {what}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Gives the line at which a module that was imported went wrong, if there is one that its author wrote."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_FOREIGN):
            path = Path(frame.filename)
            path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            return f" ({path}:{frame.lineno})"
    return ""


def hint(name: str, known: Collection[str]) -> str:
    """Gives the rest of a message about a name that is not known: those it might have been meant to be."""
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if not known:
        return "; there is none to choose from"
    return f"; there is {', '.join(map(repr, sorted(known)))}" if len(known) <= 8 else ""
