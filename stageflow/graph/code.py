"""What a function says, as text: of its source by the syntax tree, and where there is none, of its bytecode."""

from __future__ import annotations

import ast
import enum
import hashlib
import inspect
import linecache
import sys
import warnings
from collections.abc import Mapping
from types import CodeType
from typing import Any, Final, TypeAlias, cast, final

import attrs

__all__ = ["DIGEST", "Source", "bytecode", "class_of", "constant", "digest", "dump", "is_plain_tuple", "read_source"]

DIGEST: Final = 16
_FunctionNode: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"


def digest(*parts: Any) -> str:
    """Gives a digest of strings, and of tuples and lists of them, whose `repr` tells them apart."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]


def class_of(value: Any) -> str:
    """Gives the name of a class, or of that of an instance; without its module, for files may be moved."""
    return value.__qualname__ if isinstance(value, type) else type(value).__qualname__


def is_plain_tuple(value: Any) -> bool:
    """Whether it is a tuple, whose elements are all there is to it."""
    return type(value) is tuple  # and no named one, which is as much an object as others


def constant(value: Any) -> str:
    """Gives the text of a value that is plain; of any other, what sort of thing it is."""
    kind = cast("Any", type(value))
    if kind is int:
        return hex(value)  # `repr` refuses very long ones
    if value is None or kind in (bool, float, complex, str, bytes):
        return repr(value)
    if is_plain_tuple(value):
        return f"({', '.join(map(constant, value))})"
    if kind is frozenset:
        return f"{{{', '.join(sorted(map(constant, value)))}}}"
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, CodeType):
        return digest(bytecode(value))
    return f"class {value.__qualname__}" if isinstance(value, type) else f"a {kind.__qualname__}"


@final
@attrs.frozen
class Source:
    """A file as it is now: what is defined in it, as syntax trees and as the code that they become."""

    nodes: Mapping[tuple[str, int], _FunctionNode]
    codes: Mapping[str, list[CodeType]]

    def node_of(self, code: CodeType) -> _FunctionNode | None:
        """Gives the definition that a function was made of, unless it says something else now."""
        wanted = bytecode(code)
        same = [each for each in self.codes.get(code.co_qualname, ()) if bytecode(each) == wanted]
        nearest = min(same, key=lambda each: abs(each.co_firstlineno - code.co_firstlineno), default=code)
        return self.nodes.get((nearest.co_name, nearest.co_firstlineno)) if same else None


def read_source(file: str, module: dict[str, Any]) -> Source | None:
    """Reads a file of source, if it is there."""
    linecache.checkcache(file)
    text = "".join(linecache.getlines(file, module))
    if not text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever imported it has been warned
            tree = ast.parse(text, file)
            pending = [compile(tree, file, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    codes: dict[str, list[CodeType]] = {}
    while pending:
        code = pending.pop()
        codes.setdefault(code.co_qualname, []).append(code)
        pending.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    nodes = {
        (node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])): node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    return Source(nodes, codes)


_UNSAID: Final = frozenset({"annotation", "returns", "type_params", "type_comment", "kind", "ctx"})
"""The fields of syntax trees that do not say what is done."""


def dump(function: _FunctionNode) -> str:
    """Gives the text of a function: all of it but its name, its decorators, annotations and docstrings.

    Unlike `ast.dump`, it gives the same in every version of Python that has the same trees, and it does not recurse.
    """
    written: list[str] = [type(function).__name__]
    pending: list[Any] = [_statements(function, function.body), function.args]
    while pending:
        item: Any = pending.pop()
        if isinstance(item, ast.AST):
            pending.append(")")
            for name, value in reversed(list(ast.iter_fields(item))):
                # What a class annotates may be its fields.
                if (name in _UNSAID and not isinstance(item, ast.AnnAssign)) or value == []:
                    continue
                if value is None and not isinstance(item, ast.Constant):
                    continue
                said: Any = _statements(item, value) if name in ("body", "orelse", "finalbody") else value
                pending.append(said if isinstance(said, (ast.AST, list)) else constant(said))
                pending.append(f" {name}=")
            written.append(f"({type(item).__name__}")
        elif isinstance(item, list):
            pending.append("]")
            pending.extend(_item(each) for each in reversed(cast("Any", item)))
            written.append("[")
        else:
            written.append(item)
    return "".join(written)


def _item(item: Any) -> Any:
    """Gives what stands for an item of a list: names (of globals, say) and gaps (in a dict) are no trees."""
    return item if isinstance(item, ast.AST) else f"{constant(item)} "


def _statements(owner: ast.AST, value: Any) -> Any:
    """Gives what is done of what is written: no docstring, no ``pass``, no annotations but those of a class."""
    if not isinstance(value, list):  # of a lambda, or of an `if` within an expression
        return value
    body = cast("list[ast.stmt]", value)
    documented = isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if documented and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:] if isinstance(body[0].value.value, str) else body
    done: list[ast.stmt] = []
    for each in body:
        if isinstance(each, ast.AnnAssign) and not isinstance(owner, ast.ClassDef):
            if each.value is not None:
                done.append(ast.Assign(targets=[each.target], value=each.value))
        elif not isinstance(each, ast.Pass):
            done.append(each)
    return done


def bytecode(code: CodeType) -> str:
    """Gives the text of compiled code, without names of files and lines. No two versions of Python agree on it."""
    constants = code.co_consts
    if _HAS_DOCSTRING:
        documented = bool(code.co_flags & _HAS_DOCSTRING)
    else:  # of a function, it is always the first constant; what is no function has a name like <genexpr>
        documented = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
    if documented and isinstance(constants[0], str):
        constants = (None, *constants[1:])
    return repr(
        (
            sys.version_info[:2],
            code.co_code,
            code.co_exceptiontable,
            code.co_flags & _KINDS,
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars),
            constant(constants),
        )
    )


_HAS_DOCSTRING: Final[int] = getattr(inspect, "CO_HAS_DOCSTRING", 0)  # Python tells since 3.14
_KINDS: Final = 0x3FF
"""The flags that say what sort of function it is; the others tell of docstrings, and of what the file imports."""
