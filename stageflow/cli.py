"""The command ``stageflow``: runs pipelines, resumes them, and shows what became of them.

Exit codes:

- 0: all is well;
- 1: the run failed, or the audit found something;
- 2: the command was not understood, or asks for what is not there;
- 3: the run was not resumed: its code has changed, it is in doubt, parked, or in the hands of another process;
- 4: the store failed, is damaged, or could not keep a value;
- 5: a stage cancelled the run;
- 130: it was interrupted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stageflow.commands.ending import Exit, UsageError, exit_of, in_one_line
from stageflow.errors import StageflowError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


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
        return Exit.USAGE
    from stageflow.commands.app import app  # noqa: PLC0415 - brings cyclopts

    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # whatever a file is called, it can be printed
        reconfigure(errors="backslashreplace")
    try:
        result = app(list(sys.argv[1:] if arguments is None else arguments))
    except CycloptsError:
        return Exit.USAGE  # Cyclopts has said why
    except UsageError as error:
        print(f"stageflow: {error}", file=sys.stderr)
        return Exit.USAGE
    except StageflowError as error:
        print(f"stageflow: {in_one_line(error)}", file=sys.stderr)
        return exit_of(error)
    except KeyboardInterrupt as error:
        print("; ".join(["stageflow: interrupted", *filter(None, map(str, error.args))]), file=sys.stderr)
        return Exit.INTERRUPTED
    return result if isinstance(result, int) else Exit.WELL


if __name__ == "__main__":
    sys.exit(main())
