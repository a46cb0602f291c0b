"""Contracts: the type that a value must have, and by path everything that is not as the type wants it.

cattrs checks values and structures mappings, with hooks that are strict: nothing is converted that is not the same
thing in another form. A mapping becomes the class that it describes; a list may stand for a tuple and a tuple for a
list, since JSON knows but one of them; a whole number may stand for a float. An instance of a declared class passes as
it is: it was checked when it was made.

This module is imported when the first contract is declared, for it brings cattrs along.
"""

from __future__ import annotations

from typing import (
    Any,
    TypeVar,
    final,
    get_args,
)

import attrs
import cattrs
from cattrs.errors import (
    StructureHandlerNotFoundError,
)

from stageflow.errors import ContractViolation, DefinitionError, in_words
from stageflow.stages.compatibility import weaknesses
from stageflow.stages.fault import Fault
from stageflow.stages.fields import parts_of
from stageflow.stages.policy import spelled
from stageflow.stages.structure import NOTHING, Hook, Mismatch, converter_of_contracts, is_class_with_fields, is_literal

__all__ = ["Contract"]

_SHOWN = 60  # characters of a value that is shown
_MOST = 20  # faults that a message lists


@final
class Contract:
    """The type that is declared for a value.

    Args:
        declared: A class, or anything else that can be an annotation.
        where: Where that was declared, for messages: ``"output= of stage 'parse' (file:12)"``.

    Raises:
        DefinitionError: It is no type, or none that can be checked.
    """

    __slots__ = ("_class", "_hook", "declared", "where")

    def __init__(self, declared: Any, where: str) -> None:
        self.declared: Any = None if declared is type(None) else declared
        self.where: str = where
        # What is of just this class needs no further look.
        self._class: Any = declared if isinstance(declared, type) and is_class_with_fields(declared) else None
        try:
            _prove(declared, [])
        except StructureHandlerNotFoundError as error:
            raise DefinitionError(
                f"{where} takes a type that values can be checked against, and {_unusable(error.type_)}"
            ) from None
        except DefinitionError as error:
            raise DefinitionError(f"{where}: {error}") from None
        self._hook: Hook = converter_of_contracts().get_structure_hook(declared)

    def check(self, value: Any, *, stage: str | None, root: str, giver: str | None = None) -> Any:
        """Gives a value as the contract wants it: the value itself, or what a mapping describes.

        Args:
            value: The value.
            stage: The stage to which it matters.
            root: What the value is called in the paths of faults.
            giver: Who gave it, in words, if it was not the stage.

        Raises:
            ContractViolation: It is not as the contract wants it; all faults are listed.
        """
        if type(value) is self._class:
            return value
        try:
            return self._hook(value, self.declared)
        except RecursionError:
            deep = f"{type(value).__name__} that is nested too deep to be checked, or holds itself"
            faults = [Fault(path=root, found=f"a {deep}", wanted=spelled(self.declared))]
        except Exception as error:
            faults = _faults(error, root)
        lines = [f"\n  {fault}" for fault in faults[:_MOST]]
        if len(faults) > _MOST:
            lines.append(f"\n  and {len(faults) - _MOST} more")
        count = "is not" if len(faults) == 1 else f"is in {len(faults)} ways not"
        raise ContractViolation(
            f"{giver or f'what stage {stage!r} gave'} {count} what {self.where} declares, {spelled(self.declared)}; "
            f"change either:{''.join(lines)}",
            stage=stage,
            faults=tuple(faults),
        )


def _faults(error: Exception, root: str) -> list[Fault]:
    """Reads the tree of errors that was raised."""
    causes: list[BaseException] = []

    def remember(cause: BaseException, _: Any) -> str:
        causes.append(cause)
        return ""

    paths = cattrs.transform_error(error, root, remember)
    return [_fault(path.removeprefix(" @ "), cause) for path, cause in zip(paths, causes, strict=True)]


def _fault(path: str, cause: BaseException) -> Fault:
    if isinstance(cause, Mismatch):
        found = "nothing" if cause.value is NOTHING else _shown(cause.value)
        return Fault(path=path, found=found, wanted=cause.wanted)
    return Fault(path=path, found=_said(cause), wanted="what its class accepts")  # a validator of the class raised


def _said(cause: BaseException) -> str:
    """Gives in words what a validator raised; those of attrs raise more than that, which concerns nobody."""
    if cause.args and isinstance(cause.args[0], str) and any(isinstance(arg, attrs.Attribute) for arg in cause.args):
        return f"{type(cause).__name__}: {cause.args[0]}"
    return in_words(cause)


def _unusable(declared: Any) -> str:
    if isinstance(declared, str):
        return f"{declared!r} is a string: give the type itself"
    if isinstance(declared, TypeVar):
        return f"{declared.__name__} is a type variable: say what it stands for"
    return f"{spelled(declared)} is none"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # it is the user's
        return f"an object that cannot be shown ({type(value).__name__})"
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return f"{text} ({type(value).__name__})"


def _prove(declared: Any, seen: list[Any]) -> None:
    """Sees whether values can be checked against a type, and all that it is made of."""
    if declared in seen:
        return
    seen.append(declared)
    converter_of_contracts().get_structure_hook(declared)
    for weakness in weaknesses(declared):
        raise DefinitionError(f"{weakness}; narrow it, or derive from something else")
    if not is_literal(declared):
        for part in parts_of(getattr(declared, "__supertype__", declared)):
            if part is not ... and not _is_note(declared, part):
                _prove(part, seen)


def _is_note(declared: Any, part: Any) -> bool:
    """Whether it is what an annotated type says besides the type."""
    return hasattr(declared, "__metadata__") and part is not get_args(declared)[0]
