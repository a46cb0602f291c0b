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
    ├── IdempotencyConflictError             a key was used again for something else; .key .stage
    ├── RecordedError                        stands for what a stage had raised in another process; .kind .traceback
    ├── CompensationError                    a run was undone, so there is nothing to go on with; .run_id
    └── CheckpointError                      a run could not be recorded, or not be resumed; .run_id .results
        ├── StoreError                         the store failed, or what it holds is damaged
        ├── UnstorableValueError (TypeError)   a value cannot be kept as it is; .stage .path
        ├── LeaseLostError                     the run belongs to another process by now; .holder
        ├── RunExistsError                     a run id was used twice
        ├── UnknownRunError (KeyError)         there is no such run
        ├── ResumeRefusedError                 a run cannot be resumed just like that; .plan
        └── RunParkedError                     a run was resumed too often; .recoveries

The data of an error is in its attributes; its message says what happened, where, and what to do about it. Every error
survives `pickle` and `copy` with its attributes (not with its traceback).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stageflow.engine.results import PipelineResults
    from stageflow.journal.plan import ResumePlan
    from stageflow.journal.record import StageRecord, StageState
    from stageflow.journal.undo import CompensationRecord
    from stageflow.stages.fault import Fault

__all__ = [
    "CheckpointError",
    "CompensationError",
    "ContractViolation",
    "CycleError",
    "DefinitionError",
    "DefinitionWarning",
    "DuplicateStageError",
    "IdempotencyConflictError",
    "LeaseLostError",
    "MaxDepthError",
    "MissingOutputError",
    "OutputConflictError",
    "PipelineTerminated",
    "ProcessKilledError",
    "RecordedError",
    "ResumeRefusedError",
    "RunExistsError",
    "RunParkedError",
    "StageExecutionError",
    "StageTimeoutError",
    "StageflowError",
    "StagnationError",
    "StoreError",
    "TenantMismatchError",
    "UnifiedPipelineCancelled",
    "UnknownRunError",
    "UnknownStageError",
    "UnstorableValueError",
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

    @property
    def compensation(self) -> CompensationRecord | None:
        """What was undone of the run, stage by stage, and what was not; `None` if there was nothing to undo."""
        return self.results.compensation


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


class RecordedError(StageflowError):
    """Stands for an exception that a stage had raised in an earlier process, of which only words were kept.

    Attributes:
        kind: The class of that exception, as ``module:qualname``.
        traceback: Where it was raised, as text; empty if that is not known.
    """

    def __init__(self, message: str, *, kind: str, traceback: str) -> None:
        self.kind = kind
        self.traceback = traceback
        super().__init__(message)


class CompensationError(StageflowError):
    """A run was undone, so there is nothing to go on with.

    Attributes:
        run_id: The run.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        super().__init__(
            f"run {run_id} was undone, so it cannot be gone on with; start a new one from where it was with fork()"
        )


class CheckpointError(StageflowError):
    """A run could not be recorded, or what was recorded of it could not be used.

    Attributes:
        run_id: The run; `None` if it is about a store as a whole.
        results: Everything the run knows, if it was going: nothing that had finished is lost from there.
    """

    results: PipelineResults | None = None

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        self.run_id = run_id
        super().__init__(message)


class StoreError(CheckpointError):
    """A store failed: it could not read or write, or what it holds is damaged."""


class UnstorableValueError(CheckpointError, TypeError):
    """A value would not be the same again when it is read from a store, so it was not written.

    Attributes:
        stage: The stage that gave it; `None` for the data of a run.
        path: Where in the value, as one would write it: ``data.pages[3].taken_at``.
    """

    def __init__(self, *, run_id: str | None, stage: str | None, path: str, why: str) -> None:
        self.stage = stage
        self.path = path
        giver = "what the run was given" if stage is None else f"what stage {stage!r} gave"
        super().__init__(f"{giver} cannot be kept in a store as it is: {path}: {why}", run_id=run_id)


class LeaseLostError(CheckpointError):
    """A run belongs to another process, which goes on with it; this one has written nothing since.

    Attributes:
        holder: The process that has it; `None` if that is not known.
    """

    def __init__(self, run_id: str, *, holder: str | None) -> None:
        self.holder = holder
        by = "another process" if holder is None else holder
        super().__init__(
            f"run {run_id} is in the hands of {by}; leave it there, or resume it when its lease has ended",
            run_id=run_id,
        )


class RunExistsError(CheckpointError):
    """A run was started under an id that a run in this store has already."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"there is a run {run_id} in this store already; resume that one, or leave out run_id= so that the run "
            f"draws an id of its own",
            run_id=run_id,
        )


class UnknownRunError(CheckpointError, KeyError):
    """There is no run of that id in the store."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"there is no run {run_id} in this store", run_id=run_id)

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0])


class ResumeRefusedError(CheckpointError):
    """A run cannot be resumed without a word on what has changed since, or on what may or may not have happened.

    Attributes:
        plan: What resuming it would do, stage by stage, and why.
    """

    def __init__(self, message: str, *, run_id: str, plan: ResumePlan | None) -> None:
        self.plan = plan
        super().__init__(message, run_id=run_id)


class RunParkedError(CheckpointError):
    """A run was resumed again and again, and each time the process died.

    Attributes:
        recoveries: How often it was resumed since it last came to an end.
    """

    def __init__(self, run_id: str, *, recoveries: int) -> None:
        self.recoveries = recoveries
        super().__init__(
            f"run {run_id} was resumed {recoveries} times, and each time its process died before the run ended; see "
            f"what kills it, then resume it with unpark=True",
            run_id=run_id,
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
    if isinstance(error, RecordedError):  # which says it already
        return str(error)
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
