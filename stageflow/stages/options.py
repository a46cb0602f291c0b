"""The options of a stage: `StageOptions`, the `stage` decorator that carries them, and how they are checked."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, Union, Unpack, cast, get_args, get_origin, overload

from stageflow.errors import CycleError, DefinitionError, nearest
from stageflow.output import StageOutput
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
    shown,
)
from stageflow.stages.runner import NativeBody, body_of, call_of, called, check_arguments, is_plain, is_typed, name_of
from stageflow.stages.stage import Condition, P, R, Stage, StageFunction, StageSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from stageflow.context import StageContext
    from stageflow.stages.compensation import Compensation, Undo
    from stageflow.stages.retry import Retry
    from stageflow.stages.runner import Call
    from stageflow.stages.typed import Typed

__all__ = ["StageOptions", "caller", "declare", "stage"]


class StageOptions(TypedDict, total=False):
    """The options of a stage, the same wherever one declares it.

    Attributes:
        kind: What sort of work it does. Shown; a `StageKind.ROUTE` is known to choose between its successors, and
            interceptors may be for certain kinds.
        after: The stages it comes after: a name, `optional` of a name, or a sequence of these.
        join: When it starts, given what becomes of those: a `Join` or its lower-case name.
        when: A plain function of the stage's context, asked before the body is entered. If it gives something false,
            the stage is skipped; if it raises, the stage has failed.
        timeout: The limit on one attempt, in seconds. `None` is no limit; 0 expires at the first checkpoint.
        total_timeout: The limit on all attempts together, with the delays between them, in seconds.
        heartbeat: For how many seconds an attempt may give no sign of life, which `StageContext.heartbeat` and
            `StageContext.save_partial` are.
        retry: How it is tried again after a failure.
        on_failure: What its failure means for the rest of the run: an `OnFailure` or its lower-case name.
        output: The type that the stage's output must have: a class, or anything else that can be an annotation. A
            mapping is made into the class it describes; anything that does not fit is a `ContractViolation`, which is a
            failure. Left out, it is what a typed stage is annotated to return, and otherwise anything.
        uses: The names of those of the pipeline's ``limits=`` that it takes one of while it runs.
        priority: Who goes first among the stages that wait for a limit: the greater. Those that wait get older, and
            thereby go first at last; see `Limit`.
        abandon_on_cancel: For a plain function, which runs in a thread: whether a cancelled stage leaves its thread to
            itself. Only then can it have a limit, for a thread cannot be stopped.
        processes: For a plain function: whether it runs in a worker process, which can be killed. It and what it
            returns must pickle; it gets a `ProcessContext`.
        compensate: How what it has done is undone when the run fails or is cancelled: an async function of the context
            and the output, or a `Compensation`. The output is `None` if it is not known whether it took effect.
        compensate_when: Whether it is undone when it was ``"attempted"``, or only when it has ``"succeeded"``.
        pivot: Whether it is the point of no return: when it has succeeded, nothing of the run is undone any more.
        irrevocable: Whether what it has done cannot be undone.
        version: Which version of its code this is, for resuming a recorded run: while it stays the same, the code
            counts as the same, whatever was edited. Left out, the code itself is compared.
        aka: The names that the stage had before, under which a recorded run may know it: a name, or several.
    """

    kind: StageKind | str
    after: str | Dependency | Iterable[str | Dependency]
    join: Join | str
    when: Condition | None
    timeout: float | None
    total_timeout: float | None
    heartbeat: float | None
    retry: Retry | None
    on_failure: OnFailure | str
    output: Any
    uses: str | Iterable[str]
    priority: int
    abandon_on_cancel: bool
    processes: bool
    compensate: Compensation | Undo | None
    compensate_when: str
    pivot: bool
    irrevocable: bool
    version: str
    aka: str | Iterable[str]


@overload
def stage(function: Callable[P, R], /) -> StageFunction[P, R]: ...
@overload
def stage(
    *, name: str | None = None, **options: Unpack[StageOptions]
) -> Callable[[Callable[P, R]], StageFunction[P, R]]: ...
def stage(
    function: Callable[P, R] | None = None, /, *, name: str | None = None, **options: Unpack[StageOptions]
) -> StageFunction[P, R] | Callable[[Callable[P, R]], StageFunction[P, R]]:
    """Makes a stage of a function, carrying its options, for ``Pipeline.with_stage(function)``.

    Args:
        function: The function, if it is used without options: ``@stage``.
        name: What the stage is called; the function's name if left out.
        **options: The options of `StageOptions`. What is said again in `with_stage` counts instead.

    Raises:
        DefinitionError: The function cannot be a stage, or an option is wrong.

    Example::

        @stage(after="fetch", timeout=5)
        async def count(ctx: StageContext) -> StageOutput:
            return StageOutput.ok(rows=len(ctx.inputs["fetch"]["rows"]))
    """
    if function is not None and not callable(cast("object", function)):
        raise DefinitionError(f"@stage takes options by name: write @stage(name={function!r})")

    def decorate(function: Callable[P, R], frame: FrameType | None = None) -> StageFunction[P, R]:
        title = str(getattr(function, "__name__", "") if name is None else name)
        spec = declare(title, function, options, frame or caller())
        return StageFunction(function, title, options, spec.typed)

    return decorate if function is None else decorate(function, caller())


def caller() -> FrameType | None:
    """Gives the frame from which the function was called that asks, if this Python can tell."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    return frame


def declare(
    name: object, runner: Any, options: Mapping[str, Any], frame: FrameType | None, *, unlimited: bool = False
) -> StageSpec:
    """Checks a declaration and gives what it says.

    Args:
        name: What the stage shall be called; `None` to ask the runner.
        runner: What does its work.
        options: The options of `StageOptions` that were given.
        frame: Where that was written.
        unlimited: Whether the pipeline's default limit is not for it.

    Raises:
        DefinitionError: Something about it cannot be right.
    """
    title = check_name(name_of(runner) if name is None else name, "a stage")
    try:
        return _declare(title, runner, options, frame, unlimited=unlimited)
    except DefinitionError as error:
        if error.stage is None:
            error.stage = title
        if error.option is None:
            error.option = next((option for option in options if str(error).startswith(f"{option}=")), None)
        raise


def _declare(
    title: str, runner: Any, options: Mapping[str, Any], frame: FrameType | None, *, unlimited: bool
) -> StageSpec:
    given = dict(options)
    if isinstance(runner, StageFunction):
        given = runner.options | given
    elif isinstance(runner, Stage) and isinstance(cast("object", runner.kind), (StageKind, str)):
        given.setdefault("kind", runner.kind)  # a class whose kind is a property cannot tell it
    for option in given:
        if option not in StageOptions.__annotations__:
            near = nearest(option, StageOptions.__annotations__)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(StageOptions.__annotations__)}"
            raise DefinitionError(f"stage {title!r} has an unknown option {option!r}; {hint}", option=option)
    function = runner.function if isinstance(runner, StageFunction) else runner
    # What is decorated was read where that was written, and may name what is local there.
    typed = runner.typed if isinstance(runner, StageFunction) else _typed(function, title, frame)
    edges = dependencies(given.get("after", ()), title)
    join = Join.of(given.get("join", Join.ALL), f"join= of stage {title!r}")
    if any(edge.stage == title for edge in edges):
        raise CycleError([title, title])
    if title == TRUNK_NAME:
        raise DefinitionError(f"{TRUNK_NAME!r} is what the outermost branch is called; give the stage another name")
    if join != Join.ALL and not edges and typed is None:
        raise DefinitionError(f"stage {title!r} has a join, but comes after nothing; say after=", option="join")
    if join.count > len(edges) and typed is None:
        raise DefinitionError(
            f"stage {title!r} waits for {join.count} of {len(edges)} stages, which cannot happen", option="join"
        )
    when: Condition | None = given.get("when")
    if when is not None:
        if not callable(when):
            raise DefinitionError(f"when= of stage {title!r} takes a plain function of the context, not {when!r}")
        if inspect.iscoroutinefunction(when):
            raise DefinitionError(f"when= of stage {title!r} is async; it takes a plain function of the context")
        check_arguments(when, (None,), title, "asked with the context")
    timeout: float | Default | None = given.get("timeout", DEFAULT)
    retry: Retry | None = given.get("retry")
    if retry is not None:
        _check_retry(retry, title)
    priority = given.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise DefinitionError(f"priority= of stage {title!r} takes a whole number, not {priority!r}")
    on_failure: OnFailure | Default | str = given.get("on_failure", DEFAULT)
    plain = is_plain(function)
    abandon, processes = bool(given.get("abandon_on_cancel", False)), bool(given.get("processes", False))
    _check_limits_of_plain(title, given, plain=plain)
    compensation: Compensation | Undo | None = given.get("compensate")
    if compensation is not None:
        from stageflow.stages.compensation import check_compensation  # noqa: PLC0415  # few pipelines undo anything

        compensation = check_compensation(compensation, title)
    when_undone: object = given.get("compensate_when", "attempted")
    pivot, irrevocable = bool(given.get("pivot", False)), bool(given.get("irrevocable", False))
    if when_undone not in ("attempted", "succeeded"):
        raise DefinitionError(
            f'compensate_when= of stage {title!r} takes "attempted" or "succeeded", not {when_undone!r}'
        )
    if irrevocable and compensation is not None:
        raise DefinitionError(f"stage {title!r} says compensate=, and irrevocable=True; it cannot be both")
    return StageSpec(
        name=title,
        compensate=compensation,
        compensate_when=when_undone,
        pivot=pivot,
        irrevocable=irrevocable,
        runner=runner,
        body=body_of(function, title, abandon_on_cancel=abandon, processes=processes) if typed is None else _unbound,
        kind=check_member(StageKind, given.get("kind", StageKind.TRANSFORM), f"kind= of stage {title!r}"),
        after=edges,
        join=join,
        when=when,
        timeout=timeout if isinstance(timeout, Default) else check_timeout(timeout, f"timeout= of stage {title!r}"),
        total_timeout=check_timeout(given.get("total_timeout"), f"total_timeout= of stage {title!r}"),
        heartbeat=check_timeout(given.get("heartbeat"), f"heartbeat= of stage {title!r}"),
        retry=retry,
        on_failure=on_failure
        if isinstance(on_failure, Default)
        else check_member(OnFailure, on_failure, f"on_failure= of stage {title!r}"),
        output=_output(given.get("output", DEFAULT), typed, title),
        typed=typed,
        bind=None
        if typed is None
        else _binder(typed, call_of(function, title, abandon_on_cancel=abandon, processes=processes), title),
        uses=_names_of_limits(given.get("uses", ()), title),
        priority=priority,
        abandon_on_cancel=abandon,
        processes=processes,
        plain=plain,
        unlimited=plain or unlimited,
        version=_version(given["version"], title) if "version" in given else None,
        aka=_former_names(given.get("aka", ()), title),
        declared_at=None if frame is None else (frame.f_code.co_filename, frame.f_lineno),
    )


def _check_retry(retry: object, name: str) -> None:
    from stageflow.stages.retry import Retry  # noqa: PLC0415  # whoever has made one has loaded it

    if not isinstance(retry, Retry):
        raise DefinitionError(f"retry= of stage {name!r} takes a Retry, as in Retry(attempts=3), not {retry!r}")


def _typed(function: Any, name: str, frame: FrameType | None) -> Typed | None:
    """Gives what a function takes by its parameters, if it is not a function of the context."""
    target = called(function)
    if not callable(target) or not is_typed(target):
        return None
    from stageflow.stages.typed import read_signature  # noqa: PLC0415  # with it comes cattrs, which takes its time

    return read_signature(target, name, frame)


def _binder(typed: Typed, call: Call, name: str) -> Callable[[Mapping[str, str], frozenset[str]], NativeBody]:
    return lambda sources, proven: typed.bind(call, sources, proven, f"stage {name!r}")


async def _unbound(_: StageContext) -> None:  # noqa: ASYNC910
    """Stands for the body of a typed stage, which is made when the graph is built."""
    raise AssertionError("a typed stage is bound when its graph is built")


def _output(declared: Any, typed: Typed | None, name: str) -> Any:
    """Gives the type that is declared for an output.

    Raises:
        DefinitionError: It is no type that values can be checked against.
    """
    if isinstance(declared, Default) and typed is not None:
        declared = _without_output(typed.returns)
    if isinstance(declared, Default) or declared in (inspect.Signature.empty, StageOutput, Any):
        return DEFAULT
    from stageflow.stages.contract import Contract  # noqa: PLC0415

    Contract(declared, f"output= of stage {name!r}")
    return declared


def _without_output(returns: Any) -> Any:
    """Gives what a typed stage returns if it does not return a `StageOutput`, by which it says something else."""
    members = get_args(returns) if get_origin(returns) in (Union, types.UnionType) else ()
    if StageOutput not in members:
        return returns
    rest = [member for member in members if member is not StageOutput]
    return StageOutput if rest == [type(None)] else Union[tuple(rest)]  # noqa: UP007


def _check_limits_of_plain(name: str, given: Mapping[str, Any], *, plain: bool) -> None:
    """Sees whether a stage can keep the limits that it declares.

    Raises:
        DefinitionError: It runs in a thread, which nothing can stop; or it is async, and asks for what others need.
    """
    for option in ("abandon_on_cancel", "processes"):
        if given.get(option) and not plain:
            raise DefinitionError(f"{option}= of stage {name!r} is for plain functions, and this one is async")
    if given.get("abandon_on_cancel") and given.get("processes"):
        raise DefinitionError(
            f"stage {name!r} says processes=True, and a process is killed; leave out abandon_on_cancel="
        )
    if given.get("processes") and given.get("heartbeat") is not None:
        raise DefinitionError(f"heartbeat= of stage {name!r}: a process cannot give signs of life; use timeout=")
    if not plain or given.get("abandon_on_cancel") or given.get("processes"):
        return
    for option in ("timeout", "total_timeout", "heartbeat"):
        if given.get(option) is not None:
            raise DefinitionError(
                f"{option}= of stage {name!r}: it is a plain function, which runs in a thread, and nothing can stop a "
                f"thread; make it async, or say abandon_on_cancel=True or processes=True"
            )


def _names_of_limits(uses: object, stage: str) -> tuple[str, ...]:
    where = f"uses= of stage {stage!r}"
    if isinstance(uses, str):
        uses = (uses,)
    if not isinstance(uses, (list, tuple, set, frozenset)):
        raise DefinitionError(f"{where} takes the name of a limit, or several, not {uses!r}")
    names = [check_name(name, where) for name in cast("Iterable[object]", uses)]
    # All stages take their limits in the same order, so that no two can wait for each other.
    return tuple(sorted(set(names)))


def _version(version: object, stage: str) -> str:
    if isinstance(version, str) and version.strip():
        return str.__str__(version)
    hint = f'; write it as a string: version="{version}"' if isinstance(version, (int, float)) else ""
    raise DefinitionError(f"version= of stage {stage!r} takes a string that is not empty, not {version!r}{hint}")


def _former_names(aka: object, stage: str) -> tuple[str, ...]:
    where, given = f"aka= of stage {stage!r}", aka
    if isinstance(aka, str):
        aka = (aka,)
    if not isinstance(aka, Iterable) or isinstance(aka, Mapping):
        raise DefinitionError(f"{where} takes a name that the stage had before, or several, not {shown(given)}")
    names = [check_name(name, where) for name in cast("Iterable[object]", aka)]
    for name in names:
        if name == stage:
            raise DefinitionError(f"{where} names the stage itself; it takes the names that it had before")
        if names.count(name) > 1:
            raise DefinitionError(f"{where} names {name!r} twice; once is enough")
    return tuple(names)
