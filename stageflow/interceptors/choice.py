"""How one writes which stages an interceptor is for: a name or a kind, or a list of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from stageflow.errors import DefinitionError
from stageflow.stages import StageKind
from stageflow.stages.policy import check_member, check_name, shown

__all__ = ["read_kinds", "read_names"]


def read_names(value: str | Iterable[str], option: str) -> tuple[str, ...]:
    """Gives the names of stages in what was written for an option.

    Raises:
        DefinitionError: It is no name, and no list of names.
    """
    return tuple(check_name(each, option) for each in _listed(value, option, "a stage's name"))


def read_kinds(value: StageKind | str | Iterable[StageKind | str], option: str) -> tuple[StageKind, ...]:
    """Gives the kinds of stages in what was written for an option.

    Raises:
        DefinitionError: It is no kind or its lower-case name, and no list of these.
    """
    kinds = cast("Iterable[StageKind | str]", _listed(value, option, "a StageKind or its name"))
    return tuple(check_member(StageKind, each, option) for each in kinds)


def _listed(value: object, option: str, what: str) -> Iterable[object]:
    if isinstance(value, (str, StageKind)):
        return (value,)
    given = value
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise DefinitionError(f"{option} takes {what}, or a list of these, not {shown(given)}")
    return cast("Iterable[object]", value)
