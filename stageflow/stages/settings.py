"""`Settings`: what a pipeline says for all of its stages, and for its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, final

import attrs

from stageflow.errors import DefinitionError
from stageflow.frozen import FrozenDict
from stageflow.stages.interceptor import Interceptor
from stageflow.stages.limit import Limit
from stageflow.stages.policy import DEFAULT, Default, OnFailure, check_count, check_member, check_name, check_timeout
from stageflow.stages.runner import is_plain

__all__ = ["CLEANUP_TIMEOUT", "DEFAULT_TIMEOUT", "Settings"]

DEFAULT_TIMEOUT = 30.0
"""The limit in seconds on a stage of which neither it nor its pipeline says anything."""
CLEANUP_TIMEOUT = 5.0
"""The seconds that the cleanup of a stage may take if its pipeline says nothing."""


def _on_failure(value: OnFailure | str) -> OnFailure:
    if value in {OnFailure.TOLERATE, OnFailure.TOLERATE.value}:
        raise DefinitionError('on_failure="tolerate" is for single stages: say it in with_stage()')
    return check_member(OnFailure, value, "on_failure=", without=(OnFailure.TOLERATE,))


def _default_timeout(value: float | None) -> float | None:
    return check_timeout(value, "default_timeout=")


def _deadline(value: float | None) -> float | None:
    return check_timeout(value, "deadline=")


def _cleanup_timeout(value: float) -> float:
    found = check_timeout(value, "cleanup_timeout=")
    if found is None:
        raise DefinitionError("cleanup_timeout= takes seconds: without a limit, nobody could end what is shielded")
    return found


def _interceptors(value: Iterable[Interceptor]) -> tuple[Interceptor, ...]:
    if not isinstance(cast("object", value), Iterable):
        raise DefinitionError(f"interceptors= takes a list of interceptors, outermost first, not {value!r}")
    found = tuple(value)
    for each in found:
        if isinstance(each, type) or not callable(each) or is_plain(each):
            raise DefinitionError(
                f"interceptors= takes objects with `async def __call__(self, ctx, proceed)`, not {each!r}"
            )
    return found


def _limits(value: Mapping[str, int | Limit]) -> Mapping[str, int | Limit]:
    if not isinstance(cast("object", value), Mapping):
        raise DefinitionError(f'limits= takes a mapping, as in limits={{"gpu": 2}}, not {value!r}')
    for name, limit in value.items():
        check_name(name, "limits=")
        if not isinstance(limit, Limit):
            check_count(limit, f"limits= for {name!r}")
    return FrozenDict(value)


def _max_running(value: int | None) -> int | None:
    return None if value is None else check_count(value, "max_running=")


def _inputs(declared: Any) -> Any:
    if not isinstance(declared, Default):
        from stageflow.stages.contract import Contract  # noqa: PLC0415  # with it comes cattrs, which takes its time

        Contract(declared, "inputs= of the pipeline")
    return declared


ENDINGS = ("fail", "cancel", "interrupt")


def _compensate_on(value: Iterable[str]) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(cast("object", value), Iterable):
        raise DefinitionError(f'compensate_on= takes several of {ENDINGS}, as in {{"fail"}}, not {value!r}')
    found = frozenset(value)
    for each in found:
        if each not in ENDINGS:
            raise DefinitionError(f"compensate_on= takes {', '.join(map(repr, ENDINGS))}, not {each!r}")
    return found


def _undo_limit(value: int) -> int:
    return check_count(value, "undo_limit=")


def _compensation_budget(value: float) -> float:
    found = check_timeout(value, "compensation_budget=")
    if found is None:
        raise DefinitionError("compensation_budget= takes seconds: without a limit, the caller could not cancel a run")
    return found


@final
@attrs.frozen(kw_only=True, eq=False)
class Settings:
    """What a pipeline says for all of its stages, and for its runs, checked.

    Attributes:
        on_failure: What the failure of a stage means that does not say so itself.
        default_timeout: The limit in seconds on a stage that does not say so itself; `None` for none.
        deadline: The seconds that a run may take; `None` for no such limit.
        cleanup_timeout: The seconds that the cleanup of one attempt may take.
        interceptors: What is put around every stage, outermost first.
        limits: How many stages may use a thing at once, by its name.
        max_running: How many stages of a run may run at once; `None` for all that can.
        inputs: The type that the data of a run must have; `DEFAULT` for any.
        compensate_on: What a run has to come to for its stages to be undone.
        undo_limit: How many undos are called at once.
        compensation_budget: The seconds that undoing may take after the caller has cancelled the run.
        branch_deadlines: The seconds that a branch may take, by the name of a stage in it.
    """

    on_failure: OnFailure = attrs.field(default=OnFailure.FAIL_FAST, converter=_on_failure)
    default_timeout: float | None = attrs.field(default=DEFAULT_TIMEOUT, converter=_default_timeout)
    deadline: float | None = attrs.field(default=None, converter=_deadline)
    cleanup_timeout: float = attrs.field(default=CLEANUP_TIMEOUT, converter=_cleanup_timeout)
    interceptors: tuple[Interceptor, ...] = attrs.field(default=(), converter=_interceptors)
    limits: Mapping[str, int | Limit] = attrs.field(default=FrozenDict(), converter=_limits)
    max_running: int | None = attrs.field(default=None, converter=_max_running)
    inputs: Any = attrs.field(default=DEFAULT, converter=_inputs)
    compensate_on: frozenset[str] = attrs.field(default=frozenset({"fail", "cancel"}), converter=_compensate_on)
    undo_limit: int = attrs.field(default=16, converter=_undo_limit)
    compensation_budget: float = attrs.field(default=5.0, converter=_compensation_budget)
    branch_deadlines: Mapping[str, float] = FrozenDict()
