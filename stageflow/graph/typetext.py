"""What a type says, as text: its name, and what it is made of."""

from __future__ import annotations

import enum
import types
from typing import (
    Any,
    Literal,
    Union,
    cast,
    final,
    get_args,
    get_type_hints,
    is_typeddict,
)

from stageflow.graph.code import class_of, constant
from stageflow.stages import Default
from stageflow.stages.fields import fields_of, origin_of, plain

__all__ = ["TypeText"]


@final
class TypeText:
    """Writes down a type: names, and for each name of a class with fields or an enumeration once what is in it.

    So it ends for types that have themselves within, and two classes that differ in a field differ in their text.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[str, Any]] = []
        self._named: dict[str, list[Any]] = {}
        self._aliases: list[Any] = []

    def of(self, declared: Any) -> str:
        """Gives the text of a type, and of all that it is made of."""
        text = self._name(declared)
        defined: list[str] = []
        while self._pending:
            name, each = self._pending.pop()
            content = self._content(each)
            if content:
                defined.append(f"{name} = {content}")
        return "; ".join([text, *sorted(defined)])

    def _name(self, declared: Any) -> str:
        declared = plain(declared)
        origin, arguments = origin_of(declared), get_args(declared)
        if isinstance(declared, Default) or declared is Any:
            return "Any"
        if declared is type(None):
            return "None"
        if declared is ...:
            return "..."
        if isinstance(declared, list):  # the parameters of a callable
            return f"[{', '.join(map(self._name, cast('Any', declared)))}]"
        if isinstance(declared, str) or hasattr(declared, "__forward_arg__"):
            return str(getattr(declared, "__forward_arg__", declared))
        if origin in (Union, types.UnionType):
            return f"({' | '.join(sorted(map(self._name, arguments)))})"
        if origin is Literal:
            return f"Literal[{', '.join(sorted(map(constant, arguments)))}]"
        if hasattr(origin, "__value__") and not isinstance(origin, type):
            name = self._alias(origin)
        else:
            names = (getattr(origin, each, None) for each in ("__qualname__", "__name__", "_name"))
            name = next((each for each in names if isinstance(each, str)), class_of(origin))
        if arguments:
            name = f"{name}[{', '.join(map(self._name, arguments))}]"
        if isinstance(origin, type):
            same = self._named.setdefault(name, [])
            if not any(each is origin for each in same):  # two classes may have one name
                same.append(origin)
                self._pending.append((name, declared))
        return name

    def _alias(self, alias: Any) -> str:
        """Gives what an alias, as of ``type Name = ...``, stands for; within itself, its name."""
        if any(each is alias for each in self._aliases):
            return str(alias.__name__)
        self._aliases.append(alias)
        try:
            return self._name(alias.__value__)
        finally:
            self._aliases.pop()

    def _content(self, declared: Any) -> str:
        """Gives what is in a class; of one that has no fields, nothing."""
        origin: Any = origin_of(declared)
        fields = fields_of(declared)
        if fields is not None:
            lines = [
                f"{field.name} ({field.key}): {self._name(field.declared)}"
                f"{'' if field.required else ', optional'}{'' if field.init else ', made'}"
                for field in fields.values()
            ]
            return f"{'mapping' if is_typeddict(origin) else 'class'} {sorted(lines)}"
        if issubclass(origin, enum.Enum):
            return f"enum {sorted((name, constant(each.value)) for name, each in origin.__members__.items())}"
        if hasattr(origin, "_fields") and origin.__mro__[1] is tuple:
            return f"tuple {[(name, self._name(each)) for name, each in get_type_hints(origin).items()]}"
        return ""
