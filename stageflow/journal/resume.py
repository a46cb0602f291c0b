"""What resuming a run means: what is kept of it, what is run again, and why. Decided here, and nothing is done.

A stage that succeeded is kept, and so is what a user decided: a stage that was skipped, a branch that was ended. What
failed, was cancelled or was cut short is run again, and what never ran just runs. That holds as long as the code is
what it was: where a stage has ended under other code, the one who resumes has to say what that means.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

import attrs

from stageflow.errors import ContractViolation, DefinitionError, StoreError
from stageflow.graph.fingerprint import Fingerprint, fingerprints, run_within
from stageflow.journal.codec import Undecodable, decode, reads_plainly
from stageflow.journal.history import RunHistory, StageHistory, fold
from stageflow.journal.plan import Action, ResumePlan, Step, refuse_if_blocked
from stageflow.journal.record import CauseKind, StageState
from stageflow.journal.uncollected import uncollected
from stageflow.journal.undo import CompensationStatus, UndoState
from stageflow.output import StageOutput
from stageflow.stages import Default

if TYPE_CHECKING:
    from stageflow.graph import Graph
    from stageflow.journal.events import RunStarted
    from stageflow.journal.store import Entry, RunInfo, Store
    from stageflow.stages import StageSpec

__all__ = ["Policy", "Probe", "describe", "load", "plan_of"]

Probe: TypeAlias = Callable[[str, str], Awaitable[StageOutput | None]]
"""Asked of a stage in doubt, with its name and its key of idempotency; gives what it gave, or `None` if it did not."""

_descriptions: weakref.WeakKeyDictionary[Graph, tuple[str, bytes]] = weakref.WeakKeyDictionary()


def describe(graph: Graph) -> tuple[str, bytes]:
    """Gives the description of a graph as it is kept, and its digest: names, edges and fingerprints."""
    found = _descriptions.get(graph)
    if found is None:
        shape = graph.shape
        description = {
            "pipeline": graph.name,
            "names": shape.names,
            "dependencies": shape.dependencies,
            "effects": [name for name, spec in graph.stages.items() if spec.has_effects],
            "undone": [name for name, spec in graph.stages.items() if spec.compensate is not None],
            "fingerprints": {name: each.as_dict() for name, each in fingerprints(graph).items()},
        }
        data = json.dumps(description, separators=(",", ":")).encode("ascii")
        found = _descriptions[graph] = hashlib.sha256(data).hexdigest(), data
    return found


_BY_HAND = {CauseKind.SKIP, CauseKind.CONDITION}


@final
@attrs.frozen(kw_only=True)
class Policy:
    """What the one who resumes says.

    Attributes:
        on_change: What it means that a stage has ended under other code.
        in_doubt: What becomes of a stage with effects that was entered, and is not known to have ended.
    """

    on_change: str = "refuse"
    in_doubt: str | Probe = "rerun"

    def __attrs_post_init__(self) -> None:
        if self.on_change not in {"refuse", "reuse", "rerun"}:
            raise DefinitionError(f'on_change= takes "refuse", "reuse" or "rerun", not {self.on_change!r}')
        if self.in_doubt not in {"rerun", "hold"} and not callable(self.in_doubt):
            raise DefinitionError(f'in_doubt= takes "rerun", "hold" or an async function, not {self.in_doubt!r}')

    def plan_within(self, history: RunHistory, graph: Graph, blobs: Mapping[str, bytes], run_id: str) -> ResumePlan:
        """Decides what becomes of the stages of a run within a stage if that is gone on with.

        Raises:
            ResumeRefusedError: Its code has changed, and nothing is said of what that means.
        """
        plan = plan_of(history, graph, blobs, run_id, self)
        refuse_if_blocked(plan)
        return plan


async def load(store: Store, run_id: str, *, tenant: str | None) -> tuple[RunInfo, RunHistory, dict[str, bytes]]:
    """Reads what is known of a run, also from those that it was forked from.

    Raises:
        UnknownRunError: There is no such run.
        TenantMismatchError: It is another tenant's.
        StoreError: What is recorded of it is damaged.
    """
    log = await store.read(run_id, tenant=tenant)
    blobs = dict(log.blobs)
    own = fold(log.entries)
    if own.started is None:
        raise StoreError(f"the journal of run {run_id} is damaged: it does not begin with a beginning", run_id=run_id)
    if own.started.base is None:
        own.length = len(log.entries)
        return log.info, own, blobs
    chain: list[tuple[RunStarted, Sequence[Entry]]] = []
    begun: RunStarted | None = own.started
    entries = log.entries
    while begun is not None and begun.base is not None:  # through all that it goes back to
        chain.append((begun, entries))
        older = await store.read(begun.base, tenant=tenant)
        blobs |= older.blobs
        entries = older.entries[: begun.base_length]
        begun = fold(entries[:1]).started
    history = fold(entries)
    for begun, entries in reversed(chain):
        before = 0.0 if history.started is None else history.started.began_at
        history = fold(entries, history.select(begun.keeps, later=begun.began_at - before))
    history.length = len(log.entries)
    return log.info, history, blobs


def plan_of(history: RunHistory, graph: Graph, blobs: Mapping[str, bytes], run_id: str, policy: Policy) -> ResumePlan:
    """Decides what resuming a run would do."""
    if history.compensation is not None:
        return _plan_to_undo(history, graph, run_id)
    if history.graph == describe(graph)[0]:
        with uncollected():
            return _plan(history, graph, graph.shape.names, {}, {}, blobs, run_id, policy)
    recorded = _description(history, blobs, run_id)
    names: Sequence[str] = recorded["names"]
    before = {name: Fingerprint.from_dict(each) for name, each in recorded["fingerprints"].items()}
    renamed = {
        old: spec.name
        for spec in graph.stages.values()
        for old in spec.aka
        if old in before and old not in graph.stages and spec.name not in before
    }
    before = {renamed.get(name, name): each for name, each in before.items()}
    now = fingerprints(graph, known_as={new: old for old, new in renamed.items()})
    changes = {name: before[name].differences(now[name]) for name in graph.stages if name in before}
    return _plan(history, graph, names, renamed, changes, blobs, run_id, policy)


def _plan_to_undo(history: RunHistory, graph: Graph, run_id: str) -> ResumePlan:
    """Says what becomes of a run that is being undone: that is finished, and nothing is run again."""
    steps: dict[str, Step] = {}
    renamed = {
        old: spec.name
        for spec in graph.stages.values()
        for old in spec.aka
        if old in history.stages and old not in graph.stages and spec.name not in history.stages
    }
    for old, stage in history.stages.items():
        name = renamed.get(old, old)
        spec, undo = graph.stages.get(name), history.undos.get(old)
        if undo is not None and not (undo.state is UndoState.FAILED or undo.state.open):
            step = Step(stage=name, action=Action.REUSE, reason=undo.state.value)
        elif spec is not None and spec.compensate is not None and stage.attempts:
            reason = "not undone yet" if undo is None else f"{undo.state.value} {undo.reason}".rstrip()
            step = Step(stage=name, action=Action.UNDO, reason=reason)
        else:
            step = Step(stage=name, action=Action.REUSE, reason="the run is undone, and it says nothing of that")
        steps[name] = step
    undone = history.compensated is CompensationStatus.COMPENSATED
    return ResumePlan(run_id=run_id, pipeline=graph.name, steps=steps, renamed=renamed, over=undone, undone=undone)


def _plan(
    history: RunHistory,
    graph: Graph,
    names: Sequence[str],
    renamed: Mapping[str, str],
    changes: Mapping[str, tuple[str, ...]],
    blobs: Mapping[str, bytes],
    run_id: str,
    policy: Policy,
) -> ResumePlan:
    known: Mapping[str, StageHistory] = history.stages
    if renamed:
        known = {renamed.get(name, name): stage for name, stage in known.items()}
        names = [renamed.get(name, name) for name in names]
    recorded = frozenset(names)
    steps: dict[str, Step] = {}
    values: dict[str, Any] = {}
    again: dict[str, str] = {}  # what is run again because of other code, and what follows from that
    over = history.ended is not None and history.ended.status.value in {"succeeded", "partial"}
    for name, spec in graph.stages.items():
        stage = known.get(name)
        changed = changes.get(name, ())
        if stage is None or not stage.recorded:
            what = "not reached yet" if name in recorded else "new"
            steps[name] = Step(stage=name, action=Action.RUN, reason=what, changed=changed)
            continue
        settled = stage.settled
        if over and settled is not None:
            steps[name] = Step(stage=name, action=Action.REUSE, reason=f"{settled.state.value}; the run is over")
            if stage.value is not None and not reads_plainly(stage.value):
                values[name] = _decoded(stage, blobs)
            continue
        succeeded = settled is not None and settled.state is StageState.SUCCEEDED
        if succeeded and not (changed or again) and (stage.value is None or reads_plainly(stage.value)):
            steps[name] = Step(stage=name, action=Action.REUSE, reason="succeeded")  # as almost all have
            continue
        step = _step(name, spec, stage, changed, known, graph, blobs, policy, values)
        cause = next((edge.stage for edge in spec.after if edge.stage in again), None)
        if step.action is Action.REUSE and cause is not None:
            step = Step(stage=name, action=Action.RERUN, reason=f"comes after {cause!r}, which is run again")
            values.pop(name, None)
        if step.action is Action.RERUN or step.action is Action.IN_DOUBT:
            step = _with_what_is_within(step, spec, stage, blobs, run_id, policy)
        if step.action is Action.RERUN and (cause is not None or (step.changed and policy.on_change == "rerun")):
            again[name] = step.reason
        steps[name] = step
    for name, stage in known.items():
        if name not in graph.stages and stage.recorded and not over:
            steps[name] = _orphan(name, stage, graph, policy)
    return ResumePlan(run_id=run_id, pipeline=graph.name, steps=steps, renamed=renamed, over=over, values=values)


def _with_what_is_within(
    step: Step, spec: StageSpec, stage: StageHistory, blobs: Mapping[str, bytes], run_id: str, policy: Policy
) -> Step:
    """Lets a stage that is run again hold the run if what it goes on with, within itself, does."""
    graph, _ = run_within(spec.runner)
    if graph is None:
        return step
    for number, place in stage.latest.items():
        run = stage.within[place]
        if run.compensation is not None or (run.graph == describe(graph)[0] and policy.in_doubt != "hold"):
            continue
        blocked = _plan_within(run, graph, blobs, run_id, policy)
        if blocked:
            reason = f"{step.reason}; run {number} within it: {blocked[0]}"
            return attrs.evolve(step, reason=reason, changed=blocked[0].changed, blocks=True)
    return step


def _plan_within(
    history: RunHistory, graph: Graph, blobs: Mapping[str, bytes], run_id: str, policy: Policy
) -> tuple[Step, ...]:
    if history.started is None or history.started.pipeline != graph.name:
        return ()  # it begins anew
    return plan_of(history, graph, blobs, run_id, policy).blocked


def _description(history: RunHistory, blobs: Mapping[str, bytes], run_id: str) -> Mapping[str, Any]:
    try:
        return cast("Mapping[str, Any]", json.loads(blobs[history.graph]))
    except (KeyError, ValueError) as error:
        raise StoreError(f"the journal of run {run_id} is damaged: its graph cannot be read", run_id=run_id) from error


def _step(
    name: str,
    spec: StageSpec,
    stage: StageHistory,
    changed: tuple[str, ...],
    known: Mapping[str, StageHistory],
    graph: Graph,
    blobs: Mapping[str, bytes],
    policy: Policy,
    values: dict[str, Any],
) -> Step:
    """Decides about a stage of which something is recorded."""
    settled = stage.settled
    if settled is None:
        if stage.running and spec.has_effects:
            return _in_doubt(name, stage, policy)
        what = f"attempt {stage.attempts} was cut short" if stage.running else f"attempt {stage.attempts} had failed"
        return Step(stage=name, action=Action.RERUN, reason=what, changed=changed)
    cause = "" if settled.cause is None else f": {settled.cause}"
    if not _is_kept(name, stage, known, graph):
        action = Action.RERUN if settled.attempts else Action.RUN
        values.pop(name, None)
        return Step(stage=name, action=action, reason=f"{settled.state.value}{cause}", changed=changed)
    reason = f"{settled.state.value}{cause}"
    if stage.value is not None:
        try:
            values[name] = decode(stage.value, blobs.__getitem__)
        except Undecodable as error:
            unreadable = f"its output cannot be read any more: {error.path}: {error.why}"
            blocks = policy.on_change != "rerun"
            action = Action.CONFLICT if blocks else Action.RERUN
            return Step(stage=name, action=action, reason=unreadable, changed=(*changed, "output"), blocks=blocks)
    if not changed:
        return Step(stage=name, action=Action.REUSE, reason=reason)
    what = f"{reason}, but its {' and '.join(changed)} changed since"
    if policy.on_change == "rerun":
        values.pop(name, None)
        return Step(stage=name, action=Action.RERUN, reason=what, changed=changed)
    faults = _faults(name, spec, values) if "contract" in changed else ""
    if policy.on_change == "reuse" and not faults:
        return Step(stage=name, action=Action.REUSE, reason=what, changed=changed)
    return Step(stage=name, action=Action.CONFLICT, reason=what + faults, changed=changed, blocks=True)


def _is_kept(name: str, stage: StageHistory, known: Mapping[str, StageHistory], graph: Graph) -> bool:
    """Whether the end of a stage counts for good."""
    settled = stage.settled
    assert settled is not None
    if settled.state is StageState.SUCCEEDED:
        return True
    cause = settled.cause
    if cause is not None and cause.kind in _BY_HAND:
        return cause.stage == name  # what follows from it is decided again
    if cause is not None and cause.kind is CauseKind.CANCEL_BRANCH:
        return True
    if not settled.tolerated:
        return False
    # A failure that was tolerated, and taken into account by a stage that has ended since: maybe by way of others that
    # were skipped because of it.
    reached = {name}
    for other, spec in graph.stages.items():  # in topological order
        after = known.get(other)
        if after is None or after.settled is None or not any(edge.stage in reached for edge in spec.after):
            continue
        if after.settled.state is StageState.SUCCEEDED:
            return True
        if after.settled.state is StageState.SKIPPED:
            reached.add(other)
    return False


def _in_doubt(name: str, stage: StageHistory, policy: Policy) -> Step:
    what = f"attempt {stage.attempts} was entered, and is not known to have ended"
    if policy.in_doubt == "rerun":
        return Step(stage=name, action=Action.IN_DOUBT, reason=f"{what}; it is run again")
    if policy.in_doubt == "hold":
        return Step(stage=name, action=Action.IN_DOUBT, reason=what, blocks=True)
    return Step(stage=name, action=Action.IN_DOUBT, reason=f"{what}; the probe is asked")


def _orphan(name: str, stage: StageHistory, graph: Graph, policy: Policy) -> Step:
    state = "was entered" if stage.settled is None else stage.settled.state.value
    blocks = policy.on_change == "refuse"
    what = "left out" if not blocks else "if it was renamed, say aka= on the stage that it is now"
    return Step(
        stage=name,
        action=Action.ORPHANED,
        reason=f"{state}, and {graph.name!r} has no such stage any more; {what}",
        blocks=blocks,
    )


def _decoded(stage: StageHistory, blobs: Mapping[str, bytes]) -> Any:
    assert stage.value is not None
    try:
        return decode(stage.value, blobs.__getitem__)
    except Undecodable as error:
        raise StoreError(f"an output cannot be read any more: {error.path}: {error.why}") from error


def _faults(name: str, spec: StageSpec, values: dict[str, Any]) -> str:
    """Sees whether a recorded output is what the contract of now wants; makes it that if it is."""
    if isinstance(spec.output, Default) or name not in values:
        return ""
    from stageflow.stages.contract import Contract  # noqa: PLC0415

    try:
        values[name] = Contract(spec.output, f"output= of {spec.where}").check(values[name], stage=name, root="output")
    except ContractViolation as error:
        return "; it does not fit: " + "; ".join(map(str, error.faults))
    return ""
