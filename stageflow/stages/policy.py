"""The values that say how a stage is run, and the checks on what users write for them."""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar, Union, cast, final, get_args, get_origin

import attrs

from stageflow.errors import DefinitionError, nearest

__all__ = [
    "DEFAULT",
    "TRUNK_NAME",
    "Default",
    "Dependency",
    "Join",
    "OnFailure",
    "StageKind",
    "check_count",
    "check_member",
    "check_name",
    "check_timeout",
    "dependencies",
    "optional",
    "shown",
    "spelled",
]


@final
class StageKind(enum.Enum):
    """What sort of work a stage does. It is shown, and a `ROUTE` stage is known to choose between its successors."""

    TRANSFORM = "transform"
    ENRICH = "enrich"
    ROUTE = "route"
    GUARD = "guard"
    WORK = "work"
    AGENT = "agent"


@final
class OnFailure(enum.Enum):
    """What the failure of a stage means for the rest of the run."""

    FAIL_FAST = "fail_fast"
    """Everything else is cancelled, and the run raises."""
    DRAIN = "drain"
    """What runs may finish, nothing new starts, and the run raises."""
    ISOLATE = "isolate"
    """Everything that does not need this stage runs to its end, and then the run raises."""
    TOLERATE = "tolerate"
    """As if it had been skipped; the run returns, `PARTIAL`. For single stages only."""


class Default(enum.Enum):
    """The type of `DEFAULT`."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "DEFAULT"


TRUNK_NAME: Final = "trunk"
"""What the outermost branch is called, whatever its first stage is."""
DEFAULT: Final = Default.DEFAULT
"""Stands for "as the pipeline says", where `None` has a meaning of its own."""


@final
@attrs.frozen(repr=False)
class Join:
    """When a stage starts, given what becomes of the stages it comes after.

    The members are `ALL`, `ANY`, `ANY_SETTLED`, `QUORUM` and `SETTLED`; `n_of` makes more. Except for `ALL`, an
    optional dependency counts like any other, for there any of them may be absent.

    Attributes:
        mode: The name of the member, or ``"n_of"``.
        count: How many must succeed, for ``"n_of"``.
    """

    mode: str = attrs.field(validator=attrs.validators.in_(("all", "any", "any_settled", "quorum", "n_of", "settled")))
    count: int = 0

    ALL: ClassVar[Join]
    """Every required dependency succeeded, and the optional ones have settled. Otherwise the stage is skipped."""
    ANY: ClassVar[Join]
    """At the first success; skipped if there is none."""
    ANY_SETTLED: ClassVar[Join]
    """When all have settled, if at least one succeeded. The one for conditional routes."""
    QUORUM: ClassVar[Join]
    """As soon as more than half have succeeded; skipped as soon as that cannot happen any more."""
    SETTLED: ClassVar[Join]
    """When all have settled, whatever became of them."""

    @staticmethod
    def n_of(count: int) -> Join:
        """As soon as `count` dependencies have succeeded; skipped as soon as that cannot happen any more.

        Raises:
            DefinitionError: `count` is no whole number of at least 1.
        """
        return Join("n_of", check_count(count, "Join.n_of()"))

    @classmethod
    def of(cls, value: Join | str, option: str = "join=") -> Join:
        """Gives the member that is meant by a member or its lower-case name.

        Raises:
            DefinitionError: There is no such member.
        """
        if isinstance(value, Join):
            return value
        if isinstance(cast("object", value), str) and value in _JOINS:
            return _JOINS[value]
        raise DefinitionError(f"{_unknown(option, value, _JOINS)}, or Join.n_of(2) for a number")

    def __repr__(self) -> str:
        return f"Join.n_of({self.count})" if self.mode == "n_of" else f"Join.{self.mode.upper()}"


def check_count(value: object, option: str) -> int:
    """Gives back a number of things.

    Raises:
        DefinitionError: It is no whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DefinitionError(f"{option} needs a whole number of at least 1, not {value!r}")
    return value


Join.ALL = Join("all")
Join.ANY = Join("any")
Join.ANY_SETTLED = Join("any_settled")
Join.QUORUM = Join("quorum")
Join.SETTLED = Join("settled")
_JOINS = {join.mode: join for join in (Join.ALL, Join.ANY, Join.ANY_SETTLED, Join.QUORUM, Join.SETTLED)}


@final
@attrs.frozen
class Dependency:
    """An edge to a stage that comes before.

    Attributes:
        stage: Its name.
        required: Whether a `Join.ALL` needs it to succeed.
    """

    stage: str
    required: bool = True


def optional(name: str) -> Dependency:
    """An edge that need not bring anything.

    The stage waits for `name` to settle, and runs without its output if need be.

    Args:
        name: The name of the stage that comes before.

    Raises:
        DefinitionError: `name` is no name.
    """
    return Dependency(check_name(name, "optional()"), required=False)


def dependencies(after: object, stage: str) -> tuple[Dependency, ...]:
    """Reads what was written for ``after=``.

    Raises:
        DefinitionError: It is no name, no `optional` and no sequence of these, or it names a stage twice or itself.
    """
    where, given = f"after= of stage {stage!r}", after
    if isinstance(after, (str, Dependency)):
        after = (after,)
    if not isinstance(after, Iterable) or isinstance(after, Mapping):
        raise DefinitionError(f"{where} takes a stage's name, optional(name), or a list of these, not {shown(given)}")
    edges: dict[str, Dependency] = {}
    for item in cast("Iterable[object]", after):
        edge = item if isinstance(item, Dependency) else Dependency(check_name(item, where))
        if edge.stage in edges:
            raise DefinitionError(f"{where} names {edge.stage!r} twice; once is enough")
        edges[edge.stage] = edge
    return tuple(edges.values())


def check_name(name: object, where: str) -> str:
    """Gives back a name that can be one.

    Raises:
        DefinitionError: It is no string, empty, or padded with white space.
    """
    if not isinstance(name, str):
        raise DefinitionError(f"{where} needs a name, which is a string, not {shown(name)}")
    if not name or name != name.strip():
        raise DefinitionError(f"{where} needs a name without white space around it, not {name!r}")
    return str.__str__(name)  # of a subclass as well, whose methods might do anything


def shown(value: object) -> str:
    """Gives what a user would recognise a value by: a function or class by its name, without an address."""
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if isinstance(name, str) else repr(value)


def spelled(declared: Any) -> str:
    """Gives a type as one would write it: ``list[int]``, ``Page | None``."""
    if declared is None or declared is type(None):
        return "None"
    if get_origin(declared) in (Union, types.UnionType):
        return " | ".join(map(spelled, get_args(declared)))
    if get_args(declared) and get_origin(declared) is not Literal:
        name = getattr(get_origin(declared), "__name__", str(get_origin(declared)))
        return f"{name}[{', '.join('…' if arg is ... else spelled(arg) for arg in get_args(declared))}]"
    return declared.__qualname__ if isinstance(declared, type) else str(declared).removeprefix("typing.")


def check_timeout(timeout: object, option: str) -> float | None:
    """Gives a limit as a float, or `None` for no limit.

    Raises:
        DefinitionError: It is no number, or negative.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or math.isnan(timeout):
        raise DefinitionError(f"{option} takes seconds, or None for no limit, not {timeout!r}")
    if timeout < 0:
        raise DefinitionError(f"{option} cannot be negative: {timeout!r}; None is no limit, 0 is no time at all")
    return None if timeout == math.inf else float(timeout)


M = TypeVar("M", bound=enum.Enum)


def check_member(kind: type[M], value: M | str, option: str, *, without: tuple[M, ...] = ()) -> M:
    """Gives the member of an enumeration that is meant by a member or its lower-case name.

    Raises:
        DefinitionError: There is no such member.
    """
    if isinstance(value, kind) and value not in without:
        return value
    choices = {str(member.value): member for member in kind if member not in without}
    if isinstance(cast("object", value), str) and value in choices:
        return choices[value]
    raise DefinitionError(_unknown(option, value, choices))


def _unknown(option: str, value: object, choices: Iterable[str]) -> str:
    names = list(choices)
    near = nearest(str(value).lower(), names)
    hint = f"did you mean {near[0]!r}? There are" if near else "choose one of"
    return f"{option} is {value!r}, which is not known; {hint} {', '.join(map(repr, names))}"
