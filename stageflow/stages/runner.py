"""What may do the work of a stage, and the async function that is meant by it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from stageflow.errors import DefinitionError
from stageflow.stages.policy import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from stageflow.context import StageContext

__all__ = ["Body", "NativeBody", "body_of", "check_arguments", "name_of"]

Body: TypeAlias = "Callable[[StageContext], Awaitable[Any]]"
"""An async function that does a stage's work."""
NativeBody: TypeAlias = "Callable[[StageContext], Coroutine[Any, Any, Any]]"
"""The same, known to be written with ``async def``."""


def name_of(runner: Any) -> str | None:
    """Gives the name that a runner has of its own; a class whose name is a property cannot tell it."""
    name = getattr(runner, "name", None)
    return name if isinstance(name, str) else None


def body_of(runner: Any, name: str) -> NativeBody:
    """Gives the async function of one argument that is meant by a runner.

    Raises:
        DefinitionError: It is no async function of one argument, nor has it one as its `execute`.
    """
    execute: Any = getattr(runner, "execute", None)
    if isinstance(runner, type):
        if not inspect.iscoroutinefunction(execute):
            raise DefinitionError(f"stage {name!r}: class {runner.__qualname__} has no `async def execute(self, ctx)`")
        check_arguments(runner, (), name, "instantiated without arguments, once per run")
        check_arguments(execute, (None, None), name, "called with the context")
        make: Callable[[], Any] = runner

        async def instantiate_and_execute(ctx: StageContext) -> Any:
            return await make().execute(ctx)

        return instantiate_and_execute
    if execute is None:
        plain = inspect.isroutine(runner) or isinstance(runner, functools.partial)
        execute = cast("Any", runner) if plain else getattr(cast("object", runner), "__call__", None)  # noqa: B004
    if inspect.isasyncgenfunction(execute):
        raise DefinitionError(f"stage {name!r} is an async generator; return once, and save_partial() on the way")
    if not inspect.iscoroutinefunction(execute):
        raise DefinitionError(
            f"stage {name!r}: {shown(cast('object', runner))} is not async; it needs `async def`, or an object with "
            f"`async def execute(self, ctx)`"
        )
    check_arguments(execute, (None,), name, "called with the context")
    if _is_native(execute):
        body: NativeBody = execute
        return body

    async def call_and_await(ctx: StageContext) -> Any:
        return await execute(ctx)

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
