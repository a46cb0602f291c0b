"""Typed stages: what a function takes, as its parameters say it.

A parameter that has the name of a stage stands for that stage's output; one that is annotated as a context gets the
context; any other is an item of the run's input. Which is which is known when the graph is built and all stages are
there, so `Typed.bind` makes the body then.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Union, cast, final, get_args, get_origin

import attrs

from stageflow.errors import ContractViolation, DefinitionError, in_words, nearest
from stageflow.stages.contract import Contract
from stageflow.stages.fault import Fault
from stageflow.stages.policy import shown, spelled
from stageflow.stages.runner import is_context, own_parameters

if TYPE_CHECKING:
    from types import FrameType

    from stageflow.context import StageContext
    from stageflow.stages.runner import Call, NativeBody

__all__ = ["Parameter", "Typed", "read_signature"]

_MISSING = object()


@final
@attrs.frozen(kw_only=True)
class Parameter:
    """A parameter of a typed stage.

    Attributes:
        name: Its name.
        declared: Its annotation, without the `None` of an optional one; `typing.Any` if it has none.
        nullable: Whether it may be `None`, as with ``T | None``.
        optional: Whether it may be absent: it may be `None`, or has a default.
        default: What it is then.
        context: Whether it is the context.
    """

    name: str
    declared: Any
    nullable: bool
    optional: bool
    default: Any = None
    context: bool = False

    @property
    def wanted(self) -> Any:
        """The annotation as it was written."""
        return Union[self.declared, None] if self.nullable else self.declared  # noqa: UP007

    def __str__(self) -> str:
        default = f" = {shown(self.default)}" if self.optional and self.default is not None else ""
        return f"{self.name}: {spelled(self.declared)}{' | None' if self.nullable else ''}{default}"


@final
@attrs.frozen(kw_only=True, eq=False)
class Typed:
    """What a typed stage takes and gives.

    Attributes:
        function: The function.
        parameters: Its parameters, by name.
        returns: Its return annotation; `inspect.Signature.empty` if it has none.
        declared_at: The file and line of the function.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    returns: Any
    declared_at: tuple[str, int] | None

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        returns = "" if self.returns is inspect.Signature.empty else f" -> {spelled(self.returns)}"
        at = "" if self.declared_at is None else f" ({self.declared_at[0]}:{self.declared_at[1]})"
        return f"{name}({', '.join(map(str, self.parameters.values()))}){returns}{at}"

    def bind(self, call: Call, sources: Mapping[str, str], proven: frozenset[str], where: str) -> NativeBody:
        """Gives the async function of a context that calls the typed one.

        Args:
            call: How the function is called, given the context and its arguments.
            sources: For the parameters that stand for stages, the names of those.
            proven: The parameters whose stages are known to give what they want.
            where: Where the stage was declared.
        """
        takes = [
            _Taken(
                parameter=parameter,
                stage=sources.get(name),
                contract=None if name in proven else Contract(parameter.declared, f"parameter {name!r} of {where}"),
            )
            for name, parameter in self.parameters.items()
            if not parameter.context
        ]
        contexts = [name for name, parameter in self.parameters.items() if parameter.context]

        async def body(ctx: StageContext) -> Any:
            arguments = {taken.parameter.name: taken.of(ctx) for taken in takes}
            for name in contexts:
                arguments[name] = ctx
            return await call(ctx, arguments)

        return body


@final
@attrs.frozen(kw_only=True, eq=False)
class _Taken:
    """Where a parameter comes from, and what it has to be."""

    parameter: Parameter
    stage: str | None
    contract: Contract | None

    def of(self, ctx: StageContext) -> Any:
        """Gives the argument for one call.

        Raises:
            ContractViolation: It is not there, or not what the parameter wants.
        """
        parameter = self.parameter
        if self.stage is not None:
            output = ctx.inputs.get(self.stage)
            value = _MISSING if output is None else output.data
        else:
            data: Any = ctx.data
            value = data.get(parameter.name, _MISSING) if _is_mapping(data) else getattr(data, parameter.name, _MISSING)
        if value is _MISSING and parameter.optional:
            return parameter.default
        if value is _MISSING:
            raise self._missing(ctx)
        if self.contract is None or (value is None and parameter.nullable):
            return value
        giver = "what the run's data gives" if self.stage is None else f"what stage {self.stage!r} gave"
        return self.contract.check(value, stage=ctx.stage, root=parameter.name, giver=giver)

    def _missing(self, ctx: StageContext) -> ContractViolation:
        parameter, data = self.parameter, ctx.data
        name, type_ = parameter.name, spelled(parameter.declared)
        path = f"data.{name}" if self.stage is None else name
        if self.stage is not None:
            hint = f"and stage {self.stage!r} gave nothing; say {name}: {type_} | None"
        else:
            near = nearest(name, map(str, data)) if _is_mapping(data) else ()
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            hint = (
                f"and there is no stage {name!r}, and no {name!r} in the run's data{meant}; give it, as in "
                f"run({{{name!r}: ...}}), or say {name}: {type_} | None"
            )
        return ContractViolation(
            f"stage {ctx.stage!r} takes {str(parameter)!r}, {hint}",
            stage=ctx.stage,
            faults=(Fault(path=path, found="nothing", wanted=type_),),
        )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def read_signature(function: Any, name: str, frame: FrameType | None) -> Typed:
    """Reads what a typed function takes and gives.

    Args:
        function: The function; of a class of stages, its `execute`, whose first parameter does not count.
        name: The stage's name.
        frame: Where it is declared: annotations of a function that was made there may name what is local there.

    Raises:
        DefinitionError: An annotation names something that cannot be found, or cannot be read.
    """
    target: Any = function
    while isinstance(target, functools.partial):
        target = target.func
    if not inspect.isroutine(target):
        target = type(target).__call__
    try:
        hints = _hints(inspect.unwrap(target), frame)
    except NameError as error:
        raise DefinitionError(
            f"stage {name!r}: an annotation names {error.name!r}, which cannot be found when the program runs; import "
            f"it outside of `if TYPE_CHECKING:`, and define it before the stage"
        ) from None
    except Exception as error:
        raise DefinitionError(f"stage {name!r}: an annotation cannot be read: {in_words(error)}") from error
    found: dict[str, Parameter] = {}
    for parameter in own_parameters(function):
        declared = hints.get(parameter.name, Any)
        context = is_context(declared)
        bare = _without_none(declared)
        has_default = parameter.default is not inspect.Parameter.empty
        found[parameter.name] = Parameter(
            name=parameter.name,
            declared=bare,
            nullable=bare is not declared,
            optional=bare is not declared or has_default,
            default=parameter.default if has_default else None,
            context=context,
        )
    code: Any = getattr(inspect.unwrap(target), "__code__", None)
    return Typed(
        function=cast("Callable[..., Any]", function),
        parameters=found,
        returns=hints.get("return", inspect.Signature.empty),
        declared_at=None if code is None else (code.co_filename, code.co_firstlineno),
    )


def _hints(function: Any, frame: FrameType | None) -> dict[str, Any]:
    """Reads annotations: a name means in them what it means where the function was written."""
    made_here = frame is not None and getattr(function, "__globals__", None) is frame.f_globals
    made_within = "<locals>" in getattr(function, "__qualname__", "")
    return typing.get_type_hints(function, localns=frame.f_locals if frame and made_here and made_within else None)


def _without_none(declared: Any) -> Any:
    if get_origin(declared) not in (Union, types.UnionType):
        return declared
    members = [member for member in get_args(declared) if member is not type(None)]
    return declared if len(members) == len(get_args(declared)) or not members else Union[tuple(members)]  # noqa: UP007
