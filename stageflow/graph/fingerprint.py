"""What a stage is known by from one version of a program to the next: its `Fingerprint`, in four digests.

A resumed run asks whether a stage is still the one that was recorded. What is compared is what was written, not how it
was laid out or where: a function counts by its syntax tree, so that comments and formatting are free, and a type by its
fields. What a function calls does not count, nor does the state of an object; for those there is ``version=``.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import inspect
import linecache
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MappingProxyType, MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    TypeAlias,
    Union,
    cast,
    final,
    get_args,
    get_type_hints,
    is_typeddict,
)
from weakref import WeakKeyDictionary

import attrs

from stageflow.errors import DefinitionError
from stageflow.frozen import FrozenDict
from stageflow.graph.graph import Graph
from stageflow.stages import Default, Settings, StageFunction, StageSpec
from stageflow.stages.fields import fields_of, origin_of, plain

if TYPE_CHECKING:
    from stageflow.stages.retry import Retry
    from stageflow.stages.typed import Parameter

__all__ = ["Fingerprint", "check_former_names", "fingerprint", "fingerprints", "run_within"]

_VERSION: Final = "version:"
_WITHIN: Final = " within:"
_DIGEST: Final = 16


@final
@attrs.frozen(kw_only=True)
class Fingerprint:
    """What a stage is known by.

    Attributes:
        code: A digest of its code; or ``"version:…"``, if that was declared. Of a stage that runs others, a digest of
            their code follows.
        contract: A digest of the types that it takes and gives.
        edges: A digest of what it comes after, and how.
        policy: A digest of how it is run.
    """

    code: str
    contract: str
    edges: str
    policy: str

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Says in what two fingerprints differ, in words for a user.

        Returns:
            Those of ``"version"``, ``"code"``, ``"contract"``, ``"edges"`` and ``"policy"`` that differ, in this order.
            It is the version if one of them was declared, for then nothing else of that code is compared.
        """
        found: list[str] = []
        if self.code != other.code:
            (version, code), (their_version, their_code) = _parts(self.code), _parts(other.code)
            if version != their_version:
                found.append("version")
            if code != their_code and bool(version) is bool(their_version):
                found.append("code")
        found.extend(name for name in ("contract", "edges", "policy") if getattr(self, name) != getattr(other, name))
        return tuple(found)

    def as_dict(self) -> dict[str, str]:
        """Gives it as plain data, for a journal."""
        return {"code": self.code, "contract": self.contract, "edges": self.edges, "policy": self.policy}

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> Fingerprint:
        """Makes it of what `as_dict` gave; what else is in there does not matter.

        Raises:
            KeyError: Something is missing.
        """
        return cls(code=data["code"], contract=data["contract"], edges=data["edges"], policy=data["policy"])


def _parts(code: str) -> tuple[str, str]:
    """Gives the version that was declared, and the digest of what else was read; either may be empty."""
    if not code.startswith(_VERSION):
        return "", code
    version, mark, within = code[:-_DIGEST], code[-_DIGEST - len(_WITHIN) : -_DIGEST], code[-_DIGEST:]
    return (version[: -len(_WITHIN)], within) if mark == _WITHIN else (code, "")


def fingerprint(spec: StageSpec, settings: Settings, *, known_as: Mapping[str, str] = FrozenDict()) -> Fingerprint:
    """Gives what one stage is known by. For many of them, `fingerprints` reads each file once only.

    Args:
        spec: The stage; as its graph has it, for that knows the edges that follow from parameters.
        settings: What its pipeline says.
        known_as: The former names of stages that have another one now, by the latter: edges are told by these.
    """
    return _Reader().fingerprint(spec, settings, known_as)


def fingerprints(graph: Graph, *, known_as: Mapping[str, str] = FrozenDict()) -> Mapping[str, Fingerprint]:
    """Gives what the stages of a graph are known by, by name. It is read once, and kept with the graph.

    Args:
        graph: The graph.
        known_as: For a run that was recorded before stages were renamed: their names in it, by those that they have
            now. Edges are told by these, so that a new name changes nothing for the stages that come after.
    """
    return _Reader().graph(graph, known_as)


def check_former_names(specs: Iterable[StageSpec]) -> None:
    """Sees whether every former name can mean one stage only.

    Raises:
        DefinitionError: Two stages had the same name before, or a stage had one that another stage has now.
    """
    by_name = {spec.name: spec for spec in specs}
    claimed: dict[str, StageSpec] = {}
    for spec in by_name.values():
        for former in spec.aka:
            other = by_name.get(former) or claimed.setdefault(former, spec)
            if other is not spec:
                what = "is the name of" if former in by_name else "is a former name also of"
                raise DefinitionError(
                    f"aka= of {spec.where} names {former!r}, which {what} {other.where}; a recorded run could mean "
                    f"either, so leave it to one of them",
                    stage=spec.name,
                    option="aka",
                )


_GRAPHS: Final[WeakKeyDictionary[Graph, Mapping[str, Fingerprint]]] = WeakKeyDictionary()
_CODES: Final[WeakKeyDictionary[CodeType, dict[str, str]]] = WeakKeyDictionary()
"""By file as well: code that is the same compares equal wherever it is from, but not every file can be read."""
_FunctionNode: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"


def _digest(*parts: Any) -> str:
    """Gives a digest of strings, and of tuples and lists of them, whose `repr` tells them apart."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]


@final
class _Reader:
    """Reads stages. It lives as long as one question, and so do the syntax trees of the files that it has read."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source | None] = {}
        self._runners: dict[int, str] = {}  # by identity: the specs keep them alive meanwhile
        self._open: set[int] = set()  # the functions that are being read, which may be in their own cells
        self._types: dict[Any, str] = {}
        self._digests: dict[Any, str] = {}

    def graph(self, graph: Graph, known_as: Mapping[str, str] = FrozenDict()) -> Mapping[str, Fingerprint]:
        """Gives what the stages of a graph are known by."""
        found = None if known_as else _GRAPHS.get(graph)
        if found is None:
            read = {name: self.fingerprint(spec, graph.settings, known_as) for name, spec in graph.stages.items()}
            found = MappingProxyType(read)
            if not known_as:
                _GRAPHS[graph] = found
        return found

    def fingerprint(self, spec: StageSpec, settings: Settings, known_as: Mapping[str, str]) -> Fingerprint:
        """Gives what a stage is known by."""
        graph, plan = run_within(spec.runner)
        over: Any = None if plan is None else spec.runner.over
        contract = edges = policy = within = ""
        if graph is not None:
            inner = self._inner(graph, None if plan is None else plan.stage)
            within, contract, edges, policy = inner.code, inner.contract, inner.edges, inner.policy
        if spec.version is not None:
            code = f"{_VERSION}{spec.version}" + (f"{_WITHIN}{_digest(within)}" if within else "")
        elif graph is None:
            code = self._code_of(spec.runner)
        else:
            code = _digest(within, "" if over is None or isinstance(over, str) else self._code_of(over))
        if isinstance(over, str):
            edges = _digest(edges, known_as.get(over, over))
        return Fingerprint(
            code=code,
            contract=self._contract(spec, contract),
            edges=_edges(spec, known_as, edges),
            policy=self._policy(spec, settings, (policy, "" if plan is None else f"{plan.limit} {plan.tolerate!r}")),
        )

    def _inner(self, graph: Graph, stage: str | None) -> Fingerprint:
        """Gives what a graph within a stage is known by: for an item that is one stage, as that."""
        found = self.graph(graph)
        if stage is not None:  # whose name is that of the map, which may have another one without being another
            return found[stage]
        named = sorted(found.items())
        takes = self._type(graph.settings.inputs)
        return Fingerprint(
            code=_digest([(name, each.code) for name, each in named]),
            contract=_digest([(name, each.contract) for name, each in named], takes),
            edges=_digest([(name, each.edges) for name, each in named]),
            policy=_digest([(name, each.policy) for name, each in named], repr(graph.settings.deadline)),
        )

    # Contract and policy

    def _contract(self, spec: StageSpec, within: str) -> str:
        taken: Iterable[Parameter] = () if spec.typed is None else spec.typed.parameters.values()
        takes = sorted([(each.name, self._type(each.wanted), each.optional) for each in taken if not each.context])
        return self._digest_of((self._type(spec.output), tuple(takes), within))

    def _type(self, declared: Any) -> str:
        try:
            found = self._types.get(declared)
        except TypeError:  # annotated with something that cannot be hashed
            return _TypeText().of(declared)
        if found is None:
            found = self._types[declared] = _TypeText().of(declared)
        return found

    def _policy(self, spec: StageSpec, settings: Settings, within: tuple[str, str]) -> str:
        timeout = spec.timeout
        if isinstance(timeout, Default):
            timeout = None if spec.unlimited else settings.default_timeout
        return self._digest_of(
            (
                spec.kind.value,
                (timeout, spec.total_timeout, spec.heartbeat),
                _retry(spec.retry),
                (settings.on_failure if isinstance(spec.on_failure, Default) else spec.on_failure).value,
                spec.uses,
                (spec.abandon_on_cancel, spec.processes),
                "" if spec.when is None else self._code_of(spec.when),
                within,
            )
        )

    def _digest_of(self, parts: tuple[Any, ...]) -> str:
        """Gives a digest of what many stages have in common."""
        found = self._digests.get(parts)
        if found is None:
            found = self._digests[parts] = _digest(*parts)
        return found

    # Code

    def _code_of(self, runner: Any) -> str:
        """Gives a digest of what was declared."""
        found = self._runners.get(id(runner))
        if found is None:
            found = self._runners[id(runner)] = _digest(self._code(runner))
        return found

    def _code(self, runner: Any) -> Any:
        """Gives what a digest is made of, for whatever can be called or executed."""
        if isinstance(runner, StageFunction):
            return self._code(cast("StageFunction[..., Any]", runner).function)
        if isinstance(runner, functools.partial):
            return self._partial(runner)
        if isinstance(runner, MethodType):
            return ["method of", _class_of(runner.__self__), self._code(runner.__func__)]
        if isinstance(runner, FunctionType):
            return self._function(runner)
        execute: Any = getattr(runner, "execute", None)
        if execute is not None:
            # The same for a class and for an instance of it.
            return ["stage", _class_of(runner), self._code(getattr(execute, "__func__", execute))]
        if hasattr(runner, "__wrapped__"):  # of a cache, say, which is written in C
            return ["around", _class_of(runner), self._code(runner.__wrapped__)]
        if inspect.isroutine(runner) or isinstance(runner, type):
            return ["named", str(getattr(runner, "__qualname__", _class_of(runner)))]
        return self._code(runner.__call__)

    def _partial(self, bound: Any) -> Any:
        named = sorted((name, self._value(value)) for name, value in bound.keywords.items())
        return ["partial", self._code(bound.func), [self._value(value) for value in bound.args], named]

    def _function(self, function: FunctionType) -> Any:
        body = self._body(function)
        if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
            return body
        if id(function) in self._open:
            return "itself"
        self._open.add(id(function))
        try:
            cells = sorted(
                (name, self._value(content))
                for name, content in zip(function.__code__.co_freevars, _contents(function), strict=True)
            )
            # A default is how many bind a variable of a loop, so what it was counts, not only how it was written.
            defaults = [self._value(value) for value in function.__defaults__ or ()]
            named = sorted((name, self._value(value)) for name, value in (function.__kwdefaults__ or {}).items())
        finally:
            self._open.discard(id(function))
        return [body, cells, defaults, named]

    def _value(self, value: Any) -> str:
        """Gives the text of what a function holds: of a constant its value, of anything else what sort of thing it is.

        It is the same in every process, for it has no addresses in it, and sets are sorted.
        """
        if _is_plain_tuple(value):
            return f"({', '.join(map(self._value, value))})"
        if isinstance(value, (FunctionType, MethodType, functools.partial, StageFunction)):
            return f"code {_digest(self._code(value))}"
        return _constant(value)

    def _body(self, function: FunctionType) -> str:
        """Gives a digest of what is written in a function.

        It is of the source if that is what runs: a file that was edited since, or that something rewrote on import,
        does not say what this process does. Then, as for a lambda, which cannot be told from others on its line, it is
        of the bytecode.
        """
        code, file = function.__code__, function.__code__.co_filename
        found = _CODES.get(code, {}).get(file)
        if found is None:
            if file not in self._sources:
                self._sources[file] = _read(file, function.__globals__)
            source = self._sources[file]
            node = None if source is None else source.node_of(code)
            found = _digest("bytecode", _bytecode(code)) if node is None else _digest("syntax", _dump(node))
            _CODES.setdefault(code, {})[file] = found
        return found


def run_within(runner: Any) -> tuple[Graph | None, Any]:
    """Gives the graph that a stage runs, and how, if it is a map. The engine, above, says what these are."""
    child = getattr(runner, "child", None)
    if isinstance(child, Graph):
        return child, None
    plan: Any = getattr(runner, "plan", None)
    graph = getattr(plan, "graph", None)
    return (graph, plan) if isinstance(graph, Graph) else (None, None)


def _edges(spec: StageSpec, known_as: Mapping[str, str], within: str) -> str:
    after = sorted([(known_as.get(edge.stage, edge.stage), edge.required) for edge in spec.after])
    sources = sorted([(name, known_as.get(stage, stage)) for name, stage in spec.sources.items()])
    return _digest(after, spec.join.mode, spec.join.count, sources, within)


def _retry(retry: Retry | None) -> tuple[Any, ...]:
    if retry is None:
        return ()
    kinds = sorted({kind.__qualname__ for kind in (retry.on if isinstance(retry.on, tuple) else (retry.on,))})
    numbers = (retry.delay, retry.factor, retry.max_delay, retry.jitter)
    return retry.attempts, *map(float, numbers), *kinds


def _class_of(value: Any) -> str:
    """Gives the name of a class, or of that of an instance; without its module, for files may be moved."""
    return value.__qualname__ if isinstance(value, type) else type(value).__qualname__


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty yet
            yield ...


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple  # and no named one, which is as much an object as others


def _constant(value: Any) -> str:
    kind = cast("Any", type(value))
    if kind is int:
        return hex(value)  # `repr` refuses very long ones
    if value is None or kind in (bool, float, complex, str, bytes):
        return repr(value)
    if _is_plain_tuple(value):
        return f"({', '.join(map(_constant, value))})"
    if kind is frozenset:
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, CodeType):
        return _digest(_bytecode(value))
    return f"class {value.__qualname__}" if isinstance(value, type) else f"a {kind.__qualname__}"


# Reading source


@final
@attrs.frozen
class _Source:
    """A file as it is now: what is defined in it, as syntax trees and as the code that they become."""

    nodes: Mapping[tuple[str, int], _FunctionNode]
    codes: Mapping[str, list[CodeType]]

    def node_of(self, code: CodeType) -> _FunctionNode | None:
        """Gives the definition that a function was made of, unless it says something else now."""
        wanted = _bytecode(code)
        same = [each for each in self.codes.get(code.co_qualname, ()) if _bytecode(each) == wanted]
        nearest = min(same, key=lambda each: abs(each.co_firstlineno - code.co_firstlineno), default=code)
        return self.nodes.get((nearest.co_name, nearest.co_firstlineno)) if same else None


def _read(file: str, module: dict[str, Any]) -> _Source | None:
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
    return _Source(nodes, codes)


_UNSAID: Final = frozenset({"annotation", "returns", "type_params", "type_comment", "kind", "ctx"})
"""The fields of syntax trees that do not say what is done."""


def _dump(function: _FunctionNode) -> str:
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
                pending.append(said if isinstance(said, (ast.AST, list)) else _constant(said))
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
    return item if isinstance(item, ast.AST) else f"{_constant(item)} "


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


def _bytecode(code: CodeType) -> str:
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
            _constant(constants),
        )
    )


_HAS_DOCSTRING: Final[int] = getattr(inspect, "CO_HAS_DOCSTRING", 0)  # Python tells since 3.14
_KINDS: Final = 0x3FF
"""The flags that say what sort of function it is; the others tell of docstrings, and of what the file imports."""


# Types


@final
class _TypeText:
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
            return f"Literal[{', '.join(sorted(map(_constant, arguments)))}]"
        if hasattr(origin, "__value__") and not isinstance(origin, type):
            name = self._alias(origin)
        else:
            names = (getattr(origin, each, None) for each in ("__qualname__", "__name__", "_name"))
            name = next((each for each in names if isinstance(each, str)), _class_of(origin))
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
            return f"enum {sorted((name, _constant(each.value)) for name, each in origin.__members__.items())}"
        if hasattr(origin, "_fields") and origin.__mro__[1] is tuple:
            return f"tuple {[(name, self._name(each)) for name, each in get_type_hints(origin).items()]}"
        return ""
