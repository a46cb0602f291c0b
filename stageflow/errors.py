"""Every error of stageflow, as one tree.

::

    StageflowError
    ├── DefinitionError (ValueError)         what was declared cannot be right; .stage .option
    │   ├── CycleError                         .cycle
    │   ├── DuplicateStageError                .stage
    │   └── UnknownStageError                  .stage, .suggestions
    ├── PipelineTerminated                   a run ended before its end; .results .run_id .stage .reason
    │   ├── StageExecutionError                a stage failed; .original .recoverable .failures
    │   │   └── StageTimeoutError (TimeoutError)   .limit .elapsed .source .partial
    │   └── UnifiedPipelineCancelled           somebody cancelled it (also exported as PipelineCancelled)
    ├── ContractViolation (TypeError)        a stage gave what it may not give; .stage .faults
    ├── MissingOutputError (KeyError)        asked for an output that is not there; .stage .state .reason
    ├── OutputConflictError                  a second output under one name; .stage
    ├── StagnationError                      a guard sent a stage back, and nothing changed; .stage .guard
    ├── ProcessKilledError                   a stage's process died; .stage .exit_code
    ├── MaxDepthError                        runs are nested too deep; .depth
    ├── TenantMismatchError                  what belongs to one tenant was given to another; .tenant .owner
    └── IdempotencyConflictError             a key was used again for something else; .key .stage

The data of an error is in its attributes; its message says what happened, where, and what to do about it. Every error
survives `pickle` and `copy` with its attributes (not with its traceback).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stageflow.engine.results import PipelineResults
    from stageflow.journal.record import StageRecord, StageState
    from stageflow.stages.fault import Fault

__all__ = [
    "ContractViolation",
    "CycleError",
    "DefinitionError",
    "DefinitionWarning",
    "DuplicateStageError",
    "IdempotencyConflictError",
    "MaxDepthError",
    "MissingOutputError",
    "OutputConflictError",
    "PipelineTerminated",
    "ProcessKilledError",
    "StageExecutionError",
    "StageTimeoutError",
    "StageflowError",
    "StagnationError",
    "TenantMismatchError",
    "UnifiedPipelineCancelled",
    "UnknownStageError",
    "in_words",
    "nearest",
    "ungroup",
]


class StageflowError(Exception):
    """The root of everything stageflow raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses take keyword arguments, which the default `type(self)(*self.args)` would lose.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[StageflowError], args: tuple[Any, ...], state: dict[str, Any]) -> StageflowError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class DefinitionError(StageflowError, ValueError):
    """A pipeline, a stage or an option was declared in a way that cannot be right.

    Attributes:
        stage: The stage that was declared so; `None` if it is about a pipeline.
        option: The option that cannot be right; `None` if it is about the whole.
    """

    stage: str | None = None
    option: str | None = None

    def __init__(self, message: str, *, stage: str | None = None, option: str | None = None) -> None:
        if stage is not None:
            self.stage = stage
        if option is not None:
            self.option = option
        super().__init__(message)


class DefinitionWarning(UserWarning):
    """A pipeline was declared in a way that is possible, but hardly meant."""


class CycleError(DefinitionError):
    """Stages wait for each other in a circle.

    Attributes:
        cycle: The names along the circle; the first is repeated at the end.
    """

    def __init__(self, cycle: Sequence[str]) -> None:
        self.cycle: tuple[str, ...] = tuple(cycle)
        shown = self.cycle if len(self.cycle) <= 12 else (*self.cycle[:8], "…", *self.cycle[-3:])
        arrows = " → ".join(name if name == "…" else repr(name) for name in shown)
        super().__init__(f"stages wait for each other in a circle: {arrows}; remove one of these edges")


class DuplicateStageError(DefinitionError):
    """A second stage was declared under a name that is taken.

    Attributes:
        stage: The name.
    """

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message, stage=stage)


class UnknownStageError(DefinitionError):
    """A name was given that no stage has.

    Attributes:
        stage: The name as it was given.
        suggestions: The nearest names there are, best first.
    """

    def __init__(self, stage: str, known: Iterable[str], *, where: str) -> None:
        names = list(known)
        self.suggestions: tuple[str, ...] = nearest(stage, names)
        if self.suggestions:
            hint = "did you mean " + " or ".join(map(repr, self.suggestions)) + "?"
        elif any(part.strip(" '\"") in names for part in stage.replace(";", ",").split(",")):
            hint = "several names are written as a list"
        elif len(names) <= 8:
            hint = "known stages: " + (", ".join(map(repr, names)) or "none")
        else:
            hint = f"none of the {len(names)} known stages is spelled like it"
        super().__init__(f"{where} names {stage!r}, which is no stage of this pipeline; {hint}", stage=stage)


class PipelineTerminated(StageflowError):
    """A run ended before its end. What it had finished is in `results`.

    Attributes:
        results: Everything the run knows: finished outputs, and a record of every stage.
        run_id: Which run it was.
        stage: The stage that ended the run, or `None` if nobody inside did.
        reason: Why, in words.
    """

    def __init__(self, message: str, *, results: PipelineResults, stage: str | None, reason: str) -> None:
        super().__init__(message)
        self.results = results
        self.run_id: str = results.run_id
        self.stage = stage
        self.reason = reason


class StageExecutionError(PipelineTerminated):
    """A stage failed and thereby the run. Raised `from` the stage's own exception, if it raised one.

    Attributes:
        original: What the stage raised, whole, or the error it returned with `StageOutput.fail`.
        recoverable: Whether the stage called its failure recoverable.
        failures: The record of every stage that failed in this run, in the order in which they failed.
    """

    def __init__(
        self,
        message: str,
        *,
        results: PipelineResults,
        stage: str | None,
        reason: str,
        original: Exception,
        recoverable: bool,
        failures: tuple[StageRecord, ...],
    ) -> None:
        super().__init__(message, results=results, stage=stage, reason=reason)
        self.original = original
        self.recoverable = recoverable
        self.failures = failures


class StageTimeoutError(StageExecutionError, TimeoutError):
    """A stage ran longer than its limit, or the run longer than its deadline.

    Attributes:
        limit: The limit, in seconds.
        elapsed: How long that ran which was limited, the last attempt or the stage or the run as a whole, until it had
            stopped, its cleanup included, in seconds.
        source: What set the limit, and where.
        partial: What the stage had saved until then.
    """

    limit: float
    elapsed: float
    source: str
    partial: Mapping[str, Any]


class UnifiedPipelineCancelled(PipelineTerminated):
    """A run was cancelled: a stage returned `StageOutput.cancel`, or `Run.cancel` was called."""


class ContractViolation(StageflowError, TypeError):
    """A stage gave, or was to be given, something other than what is declared, or than a stage may give at all.

    Attributes:
        stage: The stage's name; `None` for the data of a run.
        faults: Every way in which it is not what was declared.
    """

    def __init__(self, message: str, *, stage: str | None, faults: tuple[Fault, ...] = ()) -> None:
        self.stage = stage
        self.faults = faults
        super().__init__(message)


class MissingOutputError(StageflowError, KeyError):
    """An output was asked for that is not there.

    Attributes:
        stage: The name that was asked for.
        state: How far that stage came, or `None` if there is no such stage.
        reason: Why its output is not there, in words.
        suggestions: If there is no such stage, the nearest names there are, best first.
    """

    def __init__(self, stage: str, *, state: StageState | None, reason: str, known: Iterable[str] = ()) -> None:
        self.stage = stage
        self.state = state
        self.reason = reason
        self.suggestions: tuple[str, ...] = nearest(stage, known)
        hint = f"; did you mean {' or '.join(map(repr, self.suggestions))}?" if self.suggestions else ""
        super().__init__(f"there is no output of {stage!r}: {reason}{hint}")

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0])


class OutputConflictError(StageflowError):
    """An output was written under a name that has one already.

    Attributes:
        stage: The name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        super().__init__(f"{stage!r} has an output already, and an output is written once; use another name")


class StagnationError(StageflowError):
    """A guard sent a stage back to do better, and what came was the same again.

    Attributes:
        stage: The stage that was sent back.
        guard: The stage that sent it back.
    """

    def __init__(self, *, stage: str, guard: str) -> None:
        self.stage = stage
        self.guard = guard
        super().__init__(
            f"{guard!r} sent {stage!r} back, but its output did not change, so trying again would not help; "
            f"let {stage!r} make use of ctx.feedback, or {guard!r} accept what it gets"
        )


class ProcessKilledError(StageflowError):
    """The process in which a stage ran has died.

    Attributes:
        stage: The stage's name.
        exit_code: The exit code of the process, negative if a signal killed it; `None` if it is not known.
    """

    def __init__(self, *, stage: str, exit_code: int | None) -> None:
        self.stage = stage
        self.exit_code = exit_code
        how = "" if exit_code is None else f" with exit code {exit_code}"
        signal = f" (signal {-exit_code})" if exit_code is not None and exit_code < 0 else ""
        super().__init__(f"the process of stage {stage!r} died{how}{signal} before it returned anything")


class MaxDepthError(StageflowError):
    """A stage wanted to run a pipeline within a pipeline, within a pipeline, and so on, deeper than is allowed.

    Attributes:
        depth: How deep it would have been; the outermost run has depth 0.
    """

    def __init__(self, pipeline: str, *, depth: int) -> None:
        self.depth = depth
        super().__init__(
            f"pipeline {pipeline!r} would run at depth {depth}, but runs may be nested {depth - 1} deep; if it does "
            f"not run itself by mistake, run it beside the others, or hand its work up as data"
        )


class TenantMismatchError(StageflowError):
    """What belongs to one tenant was to be used on behalf of another.

    Attributes:
        tenant: On whose behalf it was to be used.
        owner: To whom it belongs.
    """

    def __init__(self, what: str, *, tenant: str | None, owner: str | None) -> None:
        self.tenant = tenant
        self.owner = owner
        whose = "no tenant" if owner is None else f"tenant {owner!r}"
        behalf = "no tenant" if tenant is None else f"tenant {tenant!r}"
        super().__init__(
            f"{what} belongs to {whose}, and cannot be used on behalf of {behalf}; use it in a run of its own tenant, "
            f"or hand over a copy of what may be shared"
        )


class IdempotencyConflictError(StageflowError):
    """A key of idempotency was used again, but for something else.

    Attributes:
        key: The key.
        stage: The stage that used it.
    """

    def __init__(self, key: str, *, stage: str) -> None:
        self.key = key
        self.stage = stage
        super().__init__(
            f"stage {stage!r} was called again under the key {key!r}, but with other parameters; a key stands for one "
            f"piece of work, so derive it from all that the work depends on"
        )


def nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Gives up to three of the known names that are spelled nearly like one that is not known, best first."""
    names = list(known)
    if not names:
        return ()
    import difflib  # noqa: PLC0415  # only those need it who have mistyped something

    return tuple(difflib.get_close_matches(name, names, n=3))


def in_words(error: BaseException) -> str:
    """Gives an error in one line: its type and message; for a group of one, those of that one."""
    error = ungroup(error)
    try:
        text = " ".join(str(error).split())
    except Exception as broken:  # it is the user's, and may do anything
        text = f"its message cannot be shown, for __str__ raised {type(broken).__name__}"
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def ungroup(error: BaseException) -> BaseException:
    """Gives the one exception in a group of one, however deep; any other error as it is."""
    parts = _parts(error)
    while len(parts) == 1:
        error = next(iter(parts))
        parts = _parts(error)
    return error


def _parts(error: BaseException) -> tuple[BaseException, ...]:
    return cast("BaseExceptionGroup[BaseException]", error).exceptions if isinstance(error, BaseExceptionGroup) else ()
