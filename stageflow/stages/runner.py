"""What may do the work of a stage, and the async function that is meant by it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from stageflow.context import Context
from stageflow.errors import DefinitionError
from stageflow.stages.policy import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from stageflow.context import StageContext

__all__ = [
    "Body",
    "Call",
    "NativeBody",
    "PlainBody",
    "body_of",
    "call_of",
    "called",
    "check_arguments",
    "is_context",
    "is_plain",
    "is_typed",
    "name_of",
    "own_parameters",
]

Body: TypeAlias = "Callable[..., Awaitable[Any]]"
"""An async function that does a stage's work: of the context, or typed."""
PlainBody: TypeAlias = "Callable[..., Any]"
"""A plain function that does a stage's work in a thread or a process."""
Call: TypeAlias = "Callable[[StageContext, dict[str, Any]], Awaitable[Any]]"
"""Calls a typed function, given the context and its arguments."""
NativeBody: TypeAlias = "Callable[[StageContext], Coroutine[Any, Any, Any]]"
"""The same, known to be written with ``async def``."""


def name_of(runner: Any) -> str | None:
    """Gives the name that a runner has of its own; a class whose name is a property cannot tell it."""
    name = getattr(runner, "name", None)
    return name if isinstance(name, str) else None


def is_plain(runner: Any) -> bool:
    """Whether a runner is not async, so that it needs a thread or a process."""
    if isinstance(runner, type):
        return False
    execute: Any = getattr(runner, "execute", None)
    function = _called(runner) if execute is None else execute
    return not (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function))


def _called(runner: Any) -> Any:
    """Gives the function that is run when something callable is called."""
    if inspect.isroutine(runner) or isinstance(runner, functools.partial):
        return cast("Any", runner)
    return getattr(cast("object", runner), "__call__", None)  # noqa: B004


def is_typed(function: Any) -> bool:
    """Whether a function declares what it takes by its parameters, and not just a context."""
    try:
        parameters = own_parameters(function)
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(parameter.kind not in plain for parameter in parameters):
        return False
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if len(required) == 1 and _may_be_context(required[0].annotation):
        return False  # and what has a default keeps it
    # An unannotated function of several parameters is a mistake, and better called one.
    return all(parameter.annotation is not inspect.Parameter.empty for parameter in required)


def _may_be_context(annotation: Any) -> bool:
    """Whether a parameter with this annotation, if it is the only one, gets the context."""
    if annotation is inspect.Parameter.empty or annotation in (Any, object):
        return True
    if isinstance(annotation, str):  # it may be imported for type checkers only
        last = annotation.rsplit(".", 1)[-1].strip("'\" ")
        return last in {"Any", "object", "Context", "StageContext", "ProcessContext"}
    return is_context(annotation)


def is_context(annotation: Any) -> bool:
    """Whether an annotation is a class of contexts, so that a parameter with it gets the context."""
    if not isinstance(annotation, type):
        return False
    if issubclass(annotation, Context):
        return True
    from stageflow.stages.threads import ProcessContext  # noqa: PLC0415

    return issubclass(annotation, ProcessContext)


def own_parameters(function: Any) -> list[inspect.Parameter]:
    """Gives the parameters of a function; without the first, if it is to be bound to an instance yet."""
    parameters = list(inspect.signature(function).parameters.values())
    part = function
    while isinstance(part, functools.partial):  # what it binds by name is not asked for any more
        parameters = [parameter for parameter in parameters if parameter.name not in part.keywords]
        part = part.func
    unbound = inspect.isfunction(function) and parameters and parameters[0].name == "self"
    return parameters[1:] if unbound else parameters


def called(runner: Any) -> Any:
    """Gives the function that does the work of a runner; of a class of stages, one that is not bound yet."""
    execute: Any = getattr(runner, "execute", None)
    return _called(runner) if execute is None else execute


def call_of(runner: Any, name: str, *, abandon_on_cancel: bool = False, processes: bool = False) -> Call:
    """Gives what calls a typed runner with its arguments, as `body_of` does with a context.

    Raises:
        DefinitionError: It is no function that could do the work of a stage, nor has it one as its `execute`.
    """
    if isinstance(runner, type):
        make = _made_by(runner, name)
        return lambda _, arguments: make().execute(**arguments)
    function = called(runner)
    _check_returns_once(function, name)
    if not is_plain(runner):
        return lambda _, arguments: function(**arguments)
    from stageflow.stages.threads import call_in_process, call_in_thread  # noqa: PLC0415  # most stages are async

    if processes:
        return call_in_process(function, name)
    return call_in_thread(function, abandon_on_cancel=abandon_on_cancel)


def _made_by(runner: type, name: str) -> Callable[[], Any]:
    """Gives a class of stages, as what makes one.

    Raises:
        DefinitionError: It cannot be one.
    """
    if not inspect.iscoroutinefunction(getattr(runner, "execute", None)):
        raise DefinitionError(f"stage {name!r}: class {runner.__qualname__} has no `async def execute(self, ctx)`")
    check_arguments(runner, (), name, "instantiated without arguments, once per run")
    return runner


def _check_returns_once(function: Any, name: str) -> None:
    for is_kind, kind in (
        (inspect.isasyncgenfunction, "an async generator"),
        (inspect.isgeneratorfunction, "a generator"),
    ):
        if is_kind(function):
            raise DefinitionError(f"stage {name!r} is {kind}; return once, and save_partial() on the way")


def body_of(runner: Any, name: str, *, abandon_on_cancel: bool = False, processes: bool = False) -> NativeBody:
    """Gives the async function of one argument that is meant by a runner.

    Args:
        runner: What does the work of a stage.
        name: The stage's name.
        abandon_on_cancel: For a plain function: whether its thread is left to itself if the stage is cancelled.
        processes: For a plain function: whether it runs in a process instead.

    Raises:
        DefinitionError: It is no function of one argument, nor has it one as its `execute`.
    """
    execute: Any = getattr(runner, "execute", None)
    if isinstance(runner, type):
        make = _made_by(runner, name)
        check_arguments(execute, (None, None), name, "called with the context")

        async def instantiate_and_execute(ctx: StageContext) -> Any:
            return await make().execute(ctx)

        return instantiate_and_execute
    if execute is None:
        execute = _called(runner)
    _check_returns_once(execute, name)
    if not callable(execute):
        raise DefinitionError(
            f"stage {name!r}: {shown(cast('object', runner))} cannot be run; it needs an async function of the "
            f"context, a plain one, or an object with `async def execute(self, ctx)`"
        )
    check_arguments(execute, (None,), name, "called with the context")
    if is_plain(runner):
        from stageflow.stages.threads import in_process, in_thread  # noqa: PLC0415

        return in_process(execute, name) if processes else in_thread(execute, abandon_on_cancel=abandon_on_cancel)
    body = cast("NativeBody", execute)
    if _is_native(body):
        return body

    async def call_and_await(ctx: StageContext) -> Any:
        return await body(ctx)

    return call_and_await


def _is_native(function: Any) -> bool:
    """Whether it was written with ``async def``; others are only marked as if they were, and may give any awaitable."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_COROUTINE)


def check_arguments(function: Callable[..., Any], arguments: tuple[None, ...], name: str, how: str) -> None:
    """Sees whether a function can be called with so many arguments.

    Raises:
        DefinitionError: It cannot.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C do not say
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise DefinitionError(f"stage {name!r}: {shown(cast('object', function))} cannot be {how}: {error}") from None
