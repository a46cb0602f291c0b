"""What a stage is known by from one version of a program to the next: its `Fingerprint`, in four digests.

A resumed run asks whether a stage is still the one that was recorded. What is compared is what was written, not how it
was laid out or where: a function counts by its syntax tree, so that comments and formatting are free, and a type by its
fields. What a function calls does not count, nor does the state of an object; for those there is ``version=``.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType, FunctionType, MappingProxyType, MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    cast,
    final,
)
from weakref import WeakKeyDictionary

import attrs

from stageflow.errors import DefinitionError
from stageflow.frozen import FrozenDict
from stageflow.graph.code import DIGEST, Source, bytecode, class_of, constant, digest, dump, is_plain_tuple, read_source
from stageflow.graph.graph import Graph
from stageflow.graph.typetext import TypeText
from stageflow.stages import Default, Settings, StageFunction, StageSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from stageflow.stages.retry import Retry
    from stageflow.stages.typed import Parameter

__all__ = ["Fingerprint", "check_former_names", "fingerprint", "fingerprints", "run_within"]

_VERSION: Final = "version:"
_WITHIN: Final = " within:"


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
    version, mark, within = code[:-DIGEST], code[-DIGEST - len(_WITHIN) : -DIGEST], code[-DIGEST:]
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


@final
class _Reader:
    """Reads stages. It lives as long as one question, and so do the syntax trees of the files that it has read."""

    def __init__(self) -> None:
        self._sources: dict[str, Source | None] = {}
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
            code = f"{_VERSION}{spec.version}" + (f"{_WITHIN}{digest(within)}" if within else "")
        elif graph is None:
            code = self._code_of(spec.runner)
        else:
            code = digest(within, "" if over is None or isinstance(over, str) else self._code_of(over))
        if isinstance(over, str):
            edges = digest(edges, known_as.get(over, over))
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
            code=digest([(name, each.code) for name, each in named]),
            contract=digest([(name, each.contract) for name, each in named], takes),
            edges=digest([(name, each.edges) for name, each in named]),
            policy=digest([(name, each.policy) for name, each in named], repr(graph.settings.deadline)),
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
            return TypeText().of(declared)
        if found is None:
            found = self._types[declared] = TypeText().of(declared)
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
            found = self._digests[parts] = digest(*parts)
        return found

    # Code

    def _code_of(self, runner: Any) -> str:
        """Gives a digest of what was declared."""
        found = self._runners.get(id(runner))
        if found is None:
            found = self._runners[id(runner)] = digest(self._code(runner))
        return found

    def _code(self, runner: Any) -> Any:
        """Gives what a digest is made of, for whatever can be called or executed."""
        if isinstance(runner, StageFunction):
            return self._code(cast("StageFunction[..., Any]", runner).function)
        if isinstance(runner, functools.partial):
            return self._partial(runner)
        if isinstance(runner, MethodType):
            return ["method of", class_of(runner.__self__), self._code(runner.__func__)]
        if isinstance(runner, FunctionType):
            return self._function(runner)
        execute: Any = getattr(runner, "execute", None)
        if execute is not None:
            # The same for a class and for an instance of it.
            return ["stage", class_of(runner), self._code(getattr(execute, "__func__", execute))]
        if hasattr(runner, "__wrapped__"):  # of a cache, say, which is written in C
            return ["around", class_of(runner), self._code(runner.__wrapped__)]
        if inspect.isroutine(runner) or isinstance(runner, type):
            return ["named", str(getattr(runner, "__qualname__", class_of(runner)))]
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
        if is_plain_tuple(value):
            return f"({', '.join(map(self._value, value))})"
        if isinstance(value, (FunctionType, MethodType, functools.partial, StageFunction)):
            return f"code {digest(self._code(value))}"
        return constant(value)

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
                self._sources[file] = read_source(file, function.__globals__)
            source = self._sources[file]
            node = None if source is None else source.node_of(code)
            found = digest("bytecode", bytecode(code)) if node is None else digest("syntax", dump(node))
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
    return digest(after, spec.join.mode, spec.join.count, sources, within)


def _retry(retry: Retry | None) -> tuple[Any, ...]:
    if retry is None:
        return ()
    kinds = sorted({kind.__qualname__ for kind in (retry.on if isinstance(retry.on, tuple) else (retry.on,))})
    numbers = (retry.delay, retry.factor, retry.max_delay, retry.jitter)
    return retry.attempts, *map(float, numbers), *kinds


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty yet
            yield ...
