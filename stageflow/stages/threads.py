"""Stages that are plain functions: they run in a worker thread, or in a process of their own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio

from stageflow.context import ContextSnapshot, StageContext
from stageflow.context.stage_context import host_of
from stageflow.errors import DefinitionError, ProcessKilledError
from stageflow.output import Artifact, StageOutput

if TYPE_CHECKING:
    from stageflow.context.host import StageHost
    from stageflow.stages.runner import Call, NativeBody

__all__ = ["ProcessContext", "call_in_process", "call_in_thread", "in_process", "in_thread"]


def in_thread(function: Callable[[StageContext], Any], *, abandon_on_cancel: bool) -> NativeBody:
    """Gives the async function that runs a plain one in a worker thread, under Trio's default limiter of threads."""

    async def body(ctx: StageContext) -> Any:
        return await trio.to_thread.run_sync(function, _from_thread(ctx), abandon_on_cancel=abandon_on_cancel)

    return body


def call_in_thread(function: Callable[..., Any], *, abandon_on_cancel: bool) -> Call:
    """Gives what calls a plain function with arguments, of which one may be the context, in a worker thread."""

    async def call(ctx: StageContext, arguments: dict[str, Any]) -> Any:
        given = {name: _from_thread(ctx) if value is ctx else value for name, value in arguments.items()}
        return await trio.to_thread.run_sync(functools.partial(function, **given), abandon_on_cancel=abandon_on_cancel)

    return call


def _from_thread(ctx: StageContext) -> StageContext:
    """Gives the context of a stage for the use of a thread."""
    host, part = host_of(ctx)
    return StageContext(cast("StageHost", _HostFromThread(host)), part)


@final
class _HostFromThread:
    """What a branch does for the context of a stage in a thread: whatever that asks is done in Trio's own thread.

    Clocks, deadlines and scopes are Trio's, and nobody else may touch them.
    """

    __slots__ = ("_host", "state")

    def __init__(self, host: StageHost) -> None:
        self._host = host
        self.state = host.state

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._host, name)
        # What was left with `on_exit`, or is handed to `trio.from_thread.run`, uses the context in Trio's thread.
        return method if trio.lowlevel.in_trio_run() else functools.partial(trio.from_thread.run_sync, method)


def in_process(function: Callable[[Any], Any], name: str) -> NativeBody:
    """Gives the async function that runs a plain one in a worker process, which is killed if the stage is cancelled.

    Raises:
        DefinitionError: trio-parallel is not installed.
    """
    run = _process_of(name)

    async def body(ctx: StageContext) -> Any:
        return await run(ctx, function, ProcessContext.of(ctx))

    return body


def call_in_process(function: Callable[..., Any], name: str) -> Call:
    """Gives what calls a plain function with arguments, of which one may be the context, in a worker process.

    Raises:
        DefinitionError: trio-parallel is not installed.
    """
    run = _process_of(name)

    async def call(ctx: StageContext, arguments: dict[str, Any]) -> Any:
        given = {name: ProcessContext.of(ctx) if value is ctx else value for name, value in arguments.items()}
        return await run(ctx, functools.partial(function, **given))

    return call


def _process_of(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    try:
        trio_parallel: Any = importlib.import_module("trio_parallel")  # an extra, and without types
    except ImportError:
        raise DefinitionError(
            f"stage {name!r} says processes=True, which needs trio-parallel: pip install 'stageflow[processes]'"
        ) from None

    async def run(ctx: StageContext, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await trio_parallel.run_sync(function, *arguments, kill_on_cancel=True)
        except trio_parallel.BrokenWorkerError as error:
            code = getattr(error.args[-1] if error.args else None, "exitcode", None)
            raise ProcessKilledError(stage=ctx.stage, exit_code=code) from error

    return run


@final
@attrs.frozen(kw_only=True)
class ProcessContext:
    """What a stage with ``processes=True`` gets: a picklable copy of what its `StageContext` says.

    It has nothing that would need the run itself: no timer, no nursery, no way to save partial output.

    Attributes:
        run_id: The run's id.
        correlation_id: What ties this run to others.
        tenant: On whose behalf the run goes.
        data: The run's input.
        snapshot: The state around the run.
        artifacts: The artifacts so far.
        metadata: Whatever else is known of the run.
        stage: The stage's name.
        branch: The branch it is in.
        inputs: The outputs of the stages it comes after.
        attempt: Which try this is, from 1.
        feedback: Why it runs again, if a guard has sent it back.
        idempotency_key: The same on every try of this stage in this run, and nowhere else.
    """

    run_id: str
    correlation_id: str
    tenant: str | None
    data: Any
    snapshot: ContextSnapshot
    artifacts: tuple[Artifact, ...]
    metadata: Mapping[str, Any]
    stage: str
    branch: str
    inputs: Mapping[str, StageOutput]
    attempt: int
    feedback: str | None
    idempotency_key: str

    @classmethod
    def of(cls, ctx: StageContext) -> ProcessContext:
        """Copies what a context says."""
        values: dict[str, Any] = {field.name: getattr(ctx, field.name) for field in attrs.fields(cls)}
        values["inputs"] = dict(ctx.inputs)
        return cls(**values)
