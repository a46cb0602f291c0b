"""What a stage is: the `Stage` protocol, the `stage` decorator, and `StageSpec`, a stage as it was declared."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, Unpack, cast, final, overload, runtime_checkable

import attrs

from stageflow.errors import CycleError, DefinitionError
from stageflow.stages.policy import (
    DEFAULT,
    TRUNK_NAME,
    Default,
    Dependency,
    Join,
    OnFailure,
    StageKind,
    check_member,
    check_name,
    check_timeout,
    dependencies,
)
from stageflow.stages.runner import NativeBody, body_of, check_arguments, name_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from types import FrameType

    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages.runner import Body

__all__ = [
    "Runner",
    "Stage",
    "StageFunction",
    "StageOptions",
    "StageSpec",
    "caller",
    "declare",
    "stage",
]

Condition: TypeAlias = "Callable[[StageContext], object]"
"""What ``when=`` takes."""


@runtime_checkable
class Stage(Protocol):
    """A stage as an object, for stages that have state of their own or want to carry their name.

    A class is as good as an instance: it is instantiated without arguments, once per run.
    """

    @property
    def name(self) -> str:
        """What it is called, unless it is declared under another name."""
        ...

    @property
    def kind(self) -> StageKind:
        """What sort of work it does, unless it is declared as another."""
        ...

    async def execute(self, ctx: StageContext) -> StageOutput | Mapping[str, Any] | Any:
        """Does the work.

        Returns:
            A `StageOutput`, a mapping, an attrs instance or `None`.
        """
        ...


Runner: TypeAlias = "Body | Stage | type[Stage]"
"""What may be declared as a stage."""


@final
@attrs.frozen(kw_only=True)
class StageSpec:
    """A stage as it was declared, checked.

    Attributes:
        name: What it is called in its pipeline.
        runner: What was declared.
        body: The async function that runs it.
        kind: What sort of work it does.
        after: The stages it comes after.
        join: When it starts, given what becomes of those.
        when: The condition that is asked before the body is entered, or `None`.
        timeout: Its limit in seconds, `None` for none, `DEFAULT` for what the pipeline says.
        on_failure: What its failure means, or `DEFAULT` for what the pipeline says.
        declared_at: The file and line where that was written.
    """

    name: str
    runner: Runner
    body: NativeBody = attrs.field(repr=False, eq=False)
    kind: StageKind = StageKind.TRANSFORM
    after: tuple[Dependency, ...] = ()
    join: Join = Join.ALL
    when: Condition | None = None
    timeout: float | Default | None = DEFAULT
    on_failure: OnFailure | Default = DEFAULT
    declared_at: tuple[str, int] | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def where(self) -> str:
        """The place of the declaration, for messages."""
        return f"stage {self.name!r}" + (" ({}:{})".format(*self.declared_at) if self.declared_at else "")


@final
class StageFunction:
    """An async function with the options of its stage, as `stage` makes it. Calling it calls the function."""

    def __init__(self, function: Body, name: str, options: Mapping[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._name = name
        self.options = dict(options)

    @property
    def name(self) -> str:
        """What it is called, unless it is declared under another name."""
        return self._name

    @property
    def kind(self) -> StageKind:
        """What sort of work it does."""
        kind: StageKind | str = self.options.get("kind", StageKind.TRANSFORM)
        return check_member(StageKind, kind, "kind")

    async def execute(self, ctx: StageContext) -> Any:
        """Runs the function."""
        return await self.function(ctx)

    def __call__(self, ctx: StageContext) -> Awaitable[Any]:
        """Calls the function, as if it were not decorated."""
        return self.function(ctx)

    def __repr__(self) -> str:
        return f"<stage {self._name!r}>"


class StageOptions(TypedDict, total=False):
    """The options of a stage, the same wherever one declares it.

    Attributes:
        kind: What sort of work it does. Shown; a `StageKind.ROUTE` is known to choose between its successors.
        after: The stages it comes after: a name, `optional` of a name, or a sequence of these.
        join: When it starts, given what becomes of those: a `Join` or its lower-case name.
        when: A plain function of the stage's context, asked before the body is entered. If it gives something false,
            the stage is skipped; if it raises, the stage has failed.
        timeout: The limit on one attempt, in seconds. `None` is no limit; 0 expires at the first checkpoint.
        on_failure: What its failure means for the rest of the run: an `OnFailure` or its lower-case name.
    """

    kind: StageKind | str
    after: str | Dependency | Iterable[str | Dependency]
    join: Join | str
    when: Condition | None
    timeout: float | None
    on_failure: OnFailure | str


@overload
def stage(function: Body, /) -> StageFunction: ...
@overload
def stage(*, name: str | None = None, **options: Unpack[StageOptions]) -> Callable[[Body], StageFunction]: ...
def stage(
    function: Body | None = None, /, *, name: str | None = None, **options: Unpack[StageOptions]
) -> StageFunction | Callable[[Body], StageFunction]:
    """Makes a stage of an async function, carrying its options, for ``Pipeline.with_stage(function)``.

    Args:
        function: The function, if it is used without options: ``@stage``.
        name: What the stage is called; the function's name if left out.
        **options: The options of `StageOptions`. What is said again in `with_stage` counts instead.

    Raises:
        DefinitionError: The function is no async function of one argument, or an option is wrong.

    Example::

        @stage(after="fetch", timeout=5)
        async def count(ctx: StageContext) -> StageOutput:
            return StageOutput.ok(rows=len(ctx.inputs["fetch"]["rows"]))
    """
    if function is not None and not callable(cast("object", function)):
        raise DefinitionError(f"@stage takes options by name: write @stage(name={function!r})")

    def decorate(function: Body) -> StageFunction:
        title = str(getattr(function, "__name__", "") if name is None else name)
        declare(title, function, options, caller())
        return StageFunction(function, title, options)

    return decorate if function is None else decorate(function)


def caller() -> FrameType | None:
    """Gives the frame from which the function was called that asks, if this Python can tell."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    return frame


def declare(name: object, runner: Any, options: Mapping[str, Any], frame: FrameType | None) -> StageSpec:
    """Checks a declaration and gives what it says.

    Args:
        name: What the stage shall be called; `None` to ask the runner.
        runner: What does its work.
        options: The options of `StageOptions` that were given.
        frame: Where that was written.

    Raises:
        DefinitionError: Something about it cannot be right.
    """
    title = check_name(name_of(runner) if name is None else name, "a stage")
    given = dict(options)
    if isinstance(runner, StageFunction):
        given = runner.options | given
    elif isinstance(runner, Stage) and isinstance(cast("object", runner.kind), (StageKind, str)):
        given.setdefault("kind", runner.kind)  # a class whose kind is a property cannot tell it
    for option in given:
        if option not in StageOptions.__annotations__:
            near = difflib.get_close_matches(option, StageOptions.__annotations__, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(StageOptions.__annotations__)}"
            raise DefinitionError(f"stage {title!r} has an unknown option {option!r}; {hint}")
    edges = dependencies(given.get("after", ()), title)
    join = Join.of(given.get("join", Join.ALL), f"join= of stage {title!r}")
    if any(edge.stage == title for edge in edges):
        raise CycleError([title, title])
    if title == TRUNK_NAME:
        raise DefinitionError(f"{TRUNK_NAME!r} is what the outermost branch is called; give the stage another name")
    if join != Join.ALL and not edges:
        raise DefinitionError(f"stage {title!r} has a join, but comes after nothing; say after=")
    if join.count > len(edges):
        raise DefinitionError(f"stage {title!r} waits for {join.count} of {len(edges)} stages, which cannot happen")
    when: Condition | None = given.get("when")
    if when is not None:
        if not callable(when):
            raise DefinitionError(f"when= of stage {title!r} takes a plain function of the context, not {when!r}")
        if inspect.iscoroutinefunction(when):
            raise DefinitionError(f"when= of stage {title!r} is async; it takes a plain function of the context")
        check_arguments(when, (None,), title, "asked with the context")
    timeout: float | Default | None = given.get("timeout", DEFAULT)
    on_failure: OnFailure | Default | str = given.get("on_failure", DEFAULT)
    return StageSpec(
        name=title,
        runner=runner,
        body=body_of(runner.function if isinstance(runner, StageFunction) else runner, title),
        kind=check_member(StageKind, given.get("kind", StageKind.TRANSFORM), f"kind= of stage {title!r}"),
        after=edges,
        join=join,
        when=when,
        timeout=timeout if isinstance(timeout, Default) else check_timeout(timeout, f"timeout= of stage {title!r}"),
        on_failure=on_failure
        if isinstance(on_failure, Default)
        else check_member(OnFailure, on_failure, f"on_failure= of stage {title!r}"),
        declared_at=None if frame is None else (frame.f_code.co_filename, frame.f_lineno),
    )
