"""What may be put around stages: the `Interceptor` protocol, and how several of them are put around one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from stageflow.stages.returned import as_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages.runner import NativeBody

__all__ = ["Interceptor", "Proceed", "intercepted"]

Proceed: TypeAlias = "Callable[[], Awaitable[StageOutput]]"
"""Runs what is inside of an interceptor: the next one, or the stage. May be called again, or not at all."""


@runtime_checkable
class Interceptor(Protocol):
    """Something that is put around stages: ``Pipeline(interceptors=[outermost, …, innermost])``.

    It is called for each attempt of each stage, under the limits of that attempt. What it returns is what the stage has
    returned; what it raises is the stage's failure. If it does not call `proceed`, the stage is not entered, and the
    interceptor alone decides. It must let `trio.Cancelled` through, like every stage.

    An interceptor that has a method ``limit_of(spec)`` also shortens the limits of stages, through the engine's
    own machinery: see `TimeoutInterceptor`.
    """

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> Any:
        """Does something around a stage.

        Args:
            ctx: The stage's own context.
            proceed: Runs what is inside. It gives the `StageOutput`, or raises what the stage raises.

        Returns:
            What a stage may return.
        """
        ...


def intercepted(body: NativeBody, interceptors: Sequence[Interceptor]) -> NativeBody:
    """Puts interceptors around the body of a stage; the first one is the outermost."""
    for interceptor in reversed(interceptors):
        body = _around(interceptor, body)
    return body


def _around(interceptor: Interceptor, inner: NativeBody) -> NativeBody:
    async def body(ctx: StageContext) -> Any:
        async def proceed() -> StageOutput:
            return as_output(await inner(ctx), ctx.stage)

        return await interceptor(ctx, proceed)

    return body
