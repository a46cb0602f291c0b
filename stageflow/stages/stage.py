"""What a stage is: the `Stage` protocol, and `StageSpec`, a stage as it was declared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    final,
    runtime_checkable,
)

import attrs

from stageflow.frozen import FrozenDict
from stageflow.stages.policy import DEFAULT, Default, Dependency, Join, OnFailure, StageKind, check_member
from stageflow.stages.runner import NativeBody

if TYPE_CHECKING:
    from stageflow.context import StageContext
    from stageflow.output import StageOutput
    from stageflow.stages.retry import Retry  # noqa: TC004  # nor could a StageSpec be structured
    from stageflow.stages.runner import Body, PlainBody
    from stageflow.stages.typed import Typed

__all__ = ["Condition", "Runner", "Stage", "StageFunction", "StageSpec"]

P = ParamSpec("P")
R = TypeVar("R")
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


Runner: TypeAlias = "Body | PlainBody | Stage | type[Stage]"
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
        timeout: The limit on an attempt in seconds, `None` for none, `DEFAULT` for what the pipeline says.
        total_timeout: The limit on all attempts with their delays, in seconds; `None` for none.
        heartbeat: For how many seconds an attempt may give no sign of life; `None` for ever.
        retry: How it is tried again, or `None`.
        on_failure: What its failure means, or `DEFAULT` for what the pipeline says.
        output: The type that its output must have; `DEFAULT` if none was declared.
        uses: What it takes of the pipeline's limits while it runs.
        priority: Who goes first among those that wait for a limit: the greater.
        abandon_on_cancel: For a plain function: whether its thread is left to itself if the stage is cancelled.
        processes: For a plain function: whether it runs in a process.
        plain: Whether it is a plain function.
        unlimited: Whether the pipeline's default limit is not for it: it is a plain function, or runs others.
        typed: What it takes by its parameters (`Typed`); `None` for a function of the context.
        sources: The stages that its code knows by a name, by that name: parameters, and what a map goes over.
        version: Which version of its code this is, if that was declared; `None` to compare the code itself.
        aka: The names that it had before.
        bind: Makes its body of these, and of the names under which nothing needs to be checked, if it has any.
        compensate: How what it has done is undone (`Compensation`), or `None`.
        compensate_when: ``"attempted"``, or ``"succeeded"``.
        pivot: Whether nothing of the run is undone any more when it has succeeded.
        irrevocable: Whether what it has done cannot be undone.
        declared_at: The file and line where that was written.
    """

    name: str
    runner: Any
    body: NativeBody = attrs.field(repr=False, eq=False)
    kind: StageKind = StageKind.TRANSFORM
    after: tuple[Dependency, ...] = ()
    join: Join = Join.ALL
    when: Condition | None = None
    timeout: float | Default | None = DEFAULT
    total_timeout: float | None = None
    heartbeat: float | None = None
    retry: Retry | None = None
    on_failure: OnFailure | Default = DEFAULT
    output: Any = DEFAULT
    uses: tuple[str, ...] = ()
    priority: int = 0
    abandon_on_cancel: bool = False
    processes: bool = False
    plain: bool = False
    unlimited: bool = False
    typed: Any = attrs.field(default=None, repr=False, eq=False)
    sources: Mapping[str, str] = FrozenDict()
    version: str | None = None
    aka: tuple[str, ...] = ()
    bind: Callable[[Mapping[str, str], frozenset[str]], NativeBody] | None = attrs.field(
        default=None, repr=False, eq=False
    )
    compensate: Any = None
    compensate_when: str = "attempted"
    pivot: bool = False
    irrevocable: bool = False
    declared_at: tuple[str, int] | None = attrs.field(default=None, repr=False, eq=False)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # a mapping is in it

    @property
    def stoppable(self) -> bool:
        """Whether it can be cancelled while it runs, so that there can be a limit on it."""
        return not self.plain or self.abandon_on_cancel or self.processes

    @property
    def has_effects(self) -> bool:
        """Whether it takes effect outside of the run, so that it matters whether it was entered."""
        return self.kind is StageKind.WORK or self.compensate is not None or self.pivot or self.irrevocable

    @property
    def where(self) -> str:
        """The place of the declaration, for messages."""
        return f"stage {self.name!r}" + (" ({}:{})".format(*self.declared_at) if self.declared_at else "")


@final
class StageFunction(Generic[P, R]):
    """A function with the options of its stage, as `stage` makes it. Calling it calls the function."""

    def __init__(
        self, function: Callable[P, R], name: str, options: Mapping[str, Any], typed: Typed | None = None
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._name = name
        self.options: dict[str, Any] = dict(options)
        self.typed = typed

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
        function: Any = self.function
        return await function(ctx)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function, as if it were not decorated."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<stage {self._name!r}>"
