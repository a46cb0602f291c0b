"""`IdempotencyInterceptor`: what has been done under a key is not done again.

Of all calls under one key, at most one is inside. It is the *first*; those that come meanwhile are parked. How the
first ends decides:

- It succeeds: its output is kept, and everyone who waits leaves with it.
- It ends in any other way, cancellation included: that is its own affair. Who has waited longest is the first now.

The turn is handed over within the `finally` of the one and taken up in the task of the other, with no checkpoint in
which it could get lost. If the other is cancelled just then, it meets that inside, at its first checkpoint, as the
first that it has become, and hands over in its turn. (To wake all of them and see who comes first would be simpler. But
a failed first is often tried again at once, and could have its turn again and again, by chance, while others wait.)
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

import attrs
from trio.lowlevel import ParkingLot, checkpoint

from stageflow.context import StageContext
from stageflow.errors import DefinitionError, IdempotencyConflictError
from stageflow.interceptors.choice import read_names
from stageflow.output import StageOutput, StageStatus
from stageflow.stages.policy import check_count, shown

if TYPE_CHECKING:
    from stageflow.stages import Proceed

__all__ = ["IdempotencyInterceptor"]

_Scope: TypeAlias = tuple[str | None, str, str, str]  # tenant, pipeline, stage, key


@attrs.define(eq=False)
class _Work:
    """What a key stands for."""

    parameters: object
    output: StageOutput | None = None  # once it has been done
    waiting: ParkingLot = attrs.field(factory=ParkingLot)


def _data_and_inputs(ctx: StageContext) -> object:
    return ctx.data, {name: output.data for name, output in ctx.inputs.items()}


def _key(value: Callable[[StageContext], str | None]) -> Callable[[StageContext], str | None]:
    _check_function(value, "IdempotencyInterceptor(key=...)")
    return value


def _parameters(value: Callable[[StageContext], object] | None) -> Callable[[StageContext], object]:
    if value is None:
        return _data_and_inputs
    _check_function(value, "IdempotencyInterceptor(parameters=...)")
    return value


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    return read_names(value, "IdempotencyInterceptor(names=...)")


def _keep(value: int) -> int:
    return check_count(value, "IdempotencyInterceptor(keep=...)")


def _check_function(value: Any, option: str) -> None:
    error = DefinitionError(f"{option} takes a plain function of the stage's context, not {shown(value)}")
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise error
    try:
        signature = inspect.signature(value)
    except ValueError:  # some callables written in C do not say
        return
    try:
        signature.bind(None)
    except TypeError:
        raise error from None


@final
@attrs.frozen(eq=False)
class IdempotencyInterceptor:
    """Has a stage do its work once for each key, and gives later calls with that key the output of then.

    A key counts for one tenant, one pipeline and one stage; runs and attempts share it. Only success is remembered:
    what failed, was skipped or cancelled is done again by the next call. Of calls at the same time, one is made, and
    the others wait for it, under their own limits. If it does not succeed, nobody but its caller hears of that: the one
    that has waited longest makes the call then.

    An output that is given again is all that comes again: the stage is not entered, so there are no partial output, no
    artifacts, no cleanup.

    It remembers in this object, in memory: not beyond the process, and not between processes. One object may serve many
    pipelines and any number of runs, but of one `trio.run` at a time.

    Choose keys with care where a stage runs more than once on purpose:

    - A stage that a guard sends back would give the same output again, unless its key depends on ``ctx.feedback``.
    - A stage that runs itself, in a pipeline within, under its own key would wait for itself. To this class, a map and
      its items are one stage.

    Attributes:
        key: A plain function that gives the key of a call, or `None` for one that shall be made in any case.
        parameters: A plain function that gives what a call under a key depends on, to be compared with ``==``. Left
            out, it gives the run's data, and what the inputs carry. It is kept as it is, so give a digest of what is
            large.
        names: The names of the stages it is for: one, or several; left out, all stages.
        keep: How many keys are remembered whose work is done: those that were used last.

    Raises:
        DefinitionError: An argument is wrong.

    Example::

        once = IdempotencyInterceptor(lambda ctx: ctx.data["order"], names="charge")
        pipeline = Pipeline("shop", interceptors=[once]).with_stage("charge", charge)
    """

    key: Callable[[StageContext], str | None] = attrs.field(converter=_key)
    parameters: Callable[[StageContext], object] = attrs.field(default=None, kw_only=True, converter=_parameters)
    names: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_names)
    keep: int = attrs.field(default=10_000, kw_only=True, converter=_keep)
    _going: dict[_Scope, _Work] = attrs.field(factory=dict[_Scope, _Work], init=False, repr=False)
    _done: OrderedDict[_Scope, _Work] = attrs.field(factory=OrderedDict[_Scope, _Work], init=False, repr=False)

    async def __call__(self, ctx: StageContext, proceed: Proceed) -> StageOutput:
        """Proceeds, or waits for one that has, or gives what that gave.

        Raises:
            IdempotencyConflictError: The key stands for other parameters; nothing was called.
            TypeError: `key` gave neither a string nor `None`.
            Exception: What the stage raises, or `key`, `parameters`, or the comparison of what that gives.
            trio.Cancelled: The stage was cancelled. If it was inside, its turn goes to one that waits; if it waited, it
                just leaves.
        """
        key = self.key(ctx) if not self.names or ctx.stage in self.names else None
        if key is None:
            return await proceed()
        if not isinstance(cast("object", key), str):
            raise TypeError(f"key= of IdempotencyInterceptor gave {key!r} for stage {ctx.stage!r}; it gives a string")
        parameters = self.parameters(ctx)
        scope = (ctx.tenant, ctx.pipeline, ctx.stage, key)
        work = self._going.get(scope) or self._done.get(scope)
        if work is None:
            work = self._going[scope] = _Work(parameters)
            return await self._do(work, scope, proceed)
        if not work.parameters == parameters:  # and not `!=`, which may be something else
            raise IdempotencyConflictError(key, stage=ctx.stage)
        if work.output is None:
            await work.waiting.park()
        else:
            self._done.move_to_end(scope)
            await checkpoint()
        return await self._do(work, scope, proceed) if work.output is None else work.output

    async def _do(self, work: _Work, scope: _Scope, proceed: Proceed) -> StageOutput:
        """Goes in as the first. There must be no checkpoint between having the turn and this."""
        try:
            output = await proceed()
            if output.status is StageStatus.OK:
                work.output = output
            return output
        finally:
            if work.output is not None:
                del self._going[scope]
                self._done[scope] = work
                if len(self._done) > self.keep:
                    self._done.popitem(last=False)
                work.waiting.unpark_all()
            elif not work.waiting.unpark():
                del self._going[scope]
