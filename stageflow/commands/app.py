"""The commands as they are called: their names, arguments and options. What they do is in the modules beside."""

# Cyclopts reads the annotations when the program runs, so they are no strings here.

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal, TypeAlias

from cyclopts import App, Parameter
from cyclopts.validators import Number

from stageflow.commands import auditing, going, looking
from stageflow.commands.ending import Exit, UsageError
from stageflow.commands.stores import STORE, Place, place_of, seconds_in

__all__ = ["app"]

Flag: TypeAlias = Annotated[bool, Parameter(negative=(), show_default=False)]
Text: TypeAlias = Annotated[str | None, Parameter(show_default=False)]


def demo(
    *,
    only: Annotated[list[str] | None, Parameter(negative=(), show_default=False)] = None,
    store: Text = None,
    json: Flag = False,
    trace: bool = True,
) -> Exit:
    """Audit the packages installed in the running environment.

    Compares every installed file with the size and the hash in its distribution's RECORD, in a pipeline that has
    one branch for each distribution. Exits with 0 if all is as it was installed, and with 1 if not.

    Args:
        only: Audit the distribution of this name only. May be given several times.
        store: Record the audit in this file, so that `stageflow resume` can go on with it.
        json: Print one JSON object, and nothing else.
        trace: Draw how the pipeline went.
    """
    return auditing.demo(only or (), place_of(store, environment=False), as_json=json, trace=trace)


def show(pipeline: str, /, *, mermaid: Flag = False) -> Exit:
    """Draw the graph of a pipeline.

    Args:
        pipeline: Where it is, as MODULE:PIPELINE. The module is imported, from the working directory too.
        mermaid: Print it as a Mermaid flowchart.
    """
    return looking.show(pipeline, as_mermaid=mermaid)


def run(
    pipeline: str,
    /,
    *,
    store: Text = None,
    input: Annotated[str | None, Parameter(show_default=False, allow_leading_hyphen=True)] = None,  # noqa: A002
    run_id: Text = None,
    tenant: Text = None,
    json: Flag = False,
) -> Exit:
    """Run a pipeline.

    Args:
        pipeline: Where it is, as MODULE:PIPELINE. The module is imported, from the working directory too.
        store: Record the run in this file, so that it survives its process; without one, it just runs. The environment
            variable STAGEFLOW_STORE may say it instead.
        input: The run's data, as JSON; `@FILE` reads it from a file, and `-` from standard input.
        run_id: The run's id. If left out, it draws one.
        tenant: On whose behalf the run goes.
        json: Print one JSON object, and nothing else.
    """
    return going.run(pipeline, place_of(store), given=input, run_id=run_id, tenant=tenant, as_json=json)


def resume(
    run_id: str,
    pipeline: Annotated[str | None, Parameter(show_default=False)] = None,
    /,
    *,
    store: Text = None,
    plan: Flag = False,
    on_change: Literal["refuse", "reuse", "rerun"] = "refuse",
    in_doubt: Literal["rerun", "hold"] = "rerun",
    unpark: Flag = False,
    tenant: Text = None,
    json: Flag = False,
) -> Exit:
    """Go on with a run that failed, was cancelled or interrupted, or whose process died.

    Args:
        run_id: The run.
        pipeline: Where its pipeline is, as MODULE:PIPELINE. May be left out if `stageflow run` has started it.
        store: Where it is recorded. The environment variable STAGEFLOW_STORE may say it instead.
        plan: Say what would be done with every stage, and why, and do nothing. Exits with 0 if the run can be
            resumed, and with 3 if not.
        on_change: What it means that the code of a stage that has ended is not what it was: do not resume, reuse what
            it gave, or run it and what comes after it again.
        in_doubt: What becomes of a stage with effects that was entered, and is not known to have ended: run it again,
            or do not resume.
        unpark: Resume the run even if its process has died again and again.
        tenant: On whose behalf.
        json: Print one JSON object, and nothing else.
    """
    manner = going.Manner(on_change=on_change, in_doubt=in_doubt, unpark=unpark, tenant=tenant)
    return going.resume(run_id, pipeline, _there(store), manner, plan_only=plan, as_json=json)


def runs(
    *,
    store: Text = None,
    unfinished: Flag = False,
    limit: Annotated[int | None, Parameter(show_default=False, validator=Number(gte=1))] = None,
    tenant: Text = None,
    json: Flag = False,
) -> Exit:
    """List the runs of a store, the latest first.

    Args:
        store: Where they are recorded. The environment variable STAGEFLOW_STORE may say it instead.
        unfinished: Only those that can still be resumed.
        limit: So many at most.
        tenant: Whose runs.
        json: Print one JSON object, and nothing else.
    """
    return looking.runs(_there(store), unfinished=unfinished, limit=limit, tenant=tenant, as_json=json)


def trace(run_id: str, /, *, store: Text = None, tenant: Text = None, json: Flag = False) -> Exit:
    """Draw how a run went, or how far it is while another process runs it.

    Args:
        run_id: The run.
        store: Where it is recorded. The environment variable STAGEFLOW_STORE may say it instead.
        tenant: On whose behalf.
        json: Print one JSON object, and nothing else.
    """
    return looking.trace(run_id, _there(store), tenant=tenant, as_json=json)


def prune(
    *,
    older_than: str,
    store: Text = None,
    dry_run: Flag = False,
    tenant: Text = None,
    json: Flag = False,
) -> Exit:
    """Remove runs that came to an end long ago.

    Those stay that were interrupted, or whose process died, and those from which others were forked that stay.

    Args:
        older_than: How long ago a run must have changed last: a number and s, m, h, d or w, such as 30d.
        store: Where they are recorded. The environment variable STAGEFLOW_STORE may say it instead.
        dry_run: Only say what would be removed.
        tenant: Whose runs.
        json: Print one JSON object, and nothing else.
    """
    age = seconds_in(older_than)
    return looking.prune(_there(store), older_than=age, dry_run=dry_run, tenant=tenant, as_json=json)


def _there(store: str | None) -> Place:
    place = place_of(store)
    if place is None:
        raise UsageError(f"say where the runs are: --store FILE, or {STORE}=FILE in the environment")
    return place


def _version() -> str:
    try:
        return f"stageflow {version('stageflow')}"
    except PackageNotFoundError:
        return "stageflow, not installed"


app: App = App(
    name="stageflow",
    help="Reliable DAG pipelines on Trio.",
    help_format="markdown",
    version=_version,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
for _command in (demo, show, run, runs, resume, trace, prune):
    app.command(_command)
