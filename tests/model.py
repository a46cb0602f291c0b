"""A model of how runs end: what the engine promises, as a pure state machine that is explored over all interleavings.

It knows nothing of the engine, of Trio or of how branches are computed, and it is written to be obvious, not to be
fast: dominators come from deleting stages, and every order of events is tried.

The model of time
-----------------
Time goes in *ticks*, and the clock stands still while there is anything to do.

- All that is ready in a tick has its turn in it, in any order. A turn goes on, stage after stage of a strand, until a
  body waits or the strand has ended. Only if the clock has moved meanwhile may the strand yield before its next stage.
- What a failure, a `cancel` or a ``cancel_branch(of=...)`` means for others happens between two ticks, in the order in
  which they were recorded. Bodies that wait are then cancelled, unless they are stubborn, and what has not begun never
  does.
- A branch begins in the tick after that in which its join was decided.
- Bodies that sleep until the same moment wake in the same tick.
- How long it takes to clear away what was cancelled, or to pass on that something was skipped, is nobody's promise. So
  the news of it travels for some ticks, and the model tries how many: `CLEARING` and `PASSING`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Node", "Observation", "Outcome", "Regions", "Script", "admits", "explore", "regions"]

PENDING, RUNNING = "pending", "running"
SUCCEEDED, FAILED, CANCELLED, SKIPPED = "succeeded", "failed", "cancelled", "skipped"

CLEARING = range(5)
"""How many ticks the news of what ended with its branch may take."""
PASSING = range(2)
"""How many ticks the news of what was skipped because of its join may take."""

Cause: TypeAlias = "tuple[str, int]"
"""A kind, and the stage where it began."""


@attrs.frozen
class Node:
    """A stage's place in a DAG.

    Attributes:
        after: The stages it comes after; their numbers are smaller than its own.
        optional: Those of them that an `all` join can do without.
        join: Its join.
        count: How many it needs, for ``"n_of"``.
    """

    after: tuple[int, ...] = ()
    optional: frozenset[int] = frozenset()
    join: str = "all"
    count: int = 0


@attrs.frozen
class Script:
    """What a stage does.

    Attributes:
        does: ``"ok"``, ``"skip"``, ``"when"`` (its condition says no), ``"fail"``, ``"timeout"`` (it never answers, its
            limit is `sleep`), ``"cancel"`` or ``"cancel_branch"``.
        of: The stage whose branch a ``"cancel_branch"`` ends; `None` for its own.
        ticks: How many checkpoints it passes before it answers.
        sleep: How long it sleeps before it answers, if it passes no checkpoints.
        stubborn: Whether it is shielded from cancellation while it waits.
        on_failure: What its failure means, if something else than in the rest of the pipeline.
    """

    does: str = "ok"
    of: int | None = None
    ticks: int = 0
    sleep: int = 0
    stubborn: bool = False
    on_failure: str | None = None


@attrs.frozen
class Outcome:
    """One way in which a run may end.

    Attributes:
        states: The final state of every stage.
        status: The run's status.
        raised: What kind of stage ended it, and which; `None` if it returns.
        inputs: What every stage that was entered saw; `None` for the others.
        after_cancel: The stages that ended by themselves although they were being cancelled.
        causes: For every stage the causes it may name; none for one that succeeded.
    """

    states: tuple[str, ...]
    status: str
    raised: Cause | None
    inputs: tuple[frozenset[int] | None, ...]
    after_cancel: frozenset[int]
    causes: tuple[frozenset[Cause], ...]

    @property
    def outputs(self) -> frozenset[int]:
        """The stages of which there is an output."""
        return frozenset(stage for stage, state in enumerate(self.states) if state == SUCCEEDED)


@attrs.frozen
class Observation:
    """What was seen of a run, to be compared with an `Outcome`: there every stage names one cause."""

    states: tuple[str, ...]
    status: str
    raised: Cause | None
    inputs: tuple[frozenset[int] | None, ...]
    after_cancel: frozenset[int]
    causes: tuple[Cause | None, ...]


def admits(outcomes: Iterable[Outcome], seen: Observation) -> bool:
    """Whether what was seen is one of the outcomes."""
    return any(
        outcome.states == seen.states
        and outcome.status == seen.status
        and outcome.raised == seen.raised
        and outcome.inputs == seen.inputs
        and outcome.after_cancel == seen.after_cancel
        and all(
            cause in allowed if allowed else cause is None
            for cause, allowed in zip(seen.causes, outcome.causes, strict=True)
        )
        for outcome in outcomes
    )


# Branches, by the definition of a dominator


@attrs.frozen
class Regions:
    """How a DAG falls into branches.

    Attributes:
        dominators: For every stage those without which it cannot be reached; it is one of them.
        above: For every stage its immediate dominator; `None` if that is the virtual root.
        head: For every stage the first stage of its branch; `None` if that is the trunk.
        onward: For every stage the one that continues its strand, if there is one.
    """

    dominators: tuple[frozenset[int], ...]
    above: tuple[int | None, ...]
    head: tuple[int | None, ...]
    onward: tuple[int | None, ...]

    def within(self, head: int | None) -> list[int]:
        """The stages of a branch and of all branches in it."""
        return [stage for stage, above in enumerate(self.dominators) if head is None or head in above]


@lru_cache(maxsize=256)
def regions(edges: tuple[tuple[int, ...], ...]) -> Regions:
    """Finds the branches of a DAG by brute force.

    Args:
        edges: For every stage those it comes after, which have smaller numbers.
    """
    everything = range(len(edges))
    reached_without = [_reached(edges, without) for without in everything]
    dominators = tuple(
        frozenset(other for other in everything if other == stage or stage not in reached_without[other])
        for stage in everything
    )
    # The nearest of the strict dominators is the one that all others dominate.
    above = tuple(
        max(dominators[stage] - {stage}, key=lambda other: len(dominators[other]), default=None) for stage in everything
    )
    below: dict[int | None, list[int]] = {}
    for stage in everything:
        below.setdefault(above[stage], []).append(stage)
    head: list[int | None] = []
    for stage in everything:
        dominator = above[stage]
        opens = len(below[dominator]) > 1
        head.append(stage if opens else None if dominator is None else head[dominator])
    onward = tuple(below[stage][0] if len(below.get(stage, ())) == 1 else None for stage in everything)
    return Regions(dominators, above, tuple(head), onward)


def _reached(edges: Sequence[Sequence[int]], without: int) -> set[int]:
    """The stages that can be reached from the virtual root when one is deleted."""
    found: set[int] = set()
    for stage, needed in enumerate(edges):
        if stage != without and (not needed or found.intersection(needed)):
            found.add(stage)
    return found


# The state machine


@attrs.define(eq=False)
class _World:
    """A run at one moment. It is changed in place, and copied before a choice."""

    states: list[str]
    causes: list[frozenset[Cause]]
    inputs: list[frozenset[int] | None]
    waits: list[int]  # checkpoints left
    told: frozenset[int]  # of whose end those after them know
    ready: frozenset[int]  # that have their turn in this tick
    soon: frozenset[int] = frozenset()  # that have it in the next
    asleep: frozenset[tuple[int, int]] = frozenset()  # until when, and who
    now: int = 0
    news: frozenset[tuple[int, int]] = frozenset()  # how many ticks away, and of whom
    fresh: tuple[tuple[int, range], ...] = ()  # news of which it is not yet known how long it takes
    latched: tuple[tuple[str, int, int | None], ...] = ()  # what happens between this tick and the next
    cut: frozenset[int | None] = frozenset()  # the branches that have ended, by their heads
    swept: frozenset[int] = frozenset()  # skipped because of what ended around them
    held: frozenset[int] = frozenset()  # skipped because nothing starts any more
    doomed: frozenset[int] = frozenset()  # stubborn, but being cancelled
    after_cancel: frozenset[int] = frozenset()
    verdict: Cause | None = None

    def copy(self) -> _World:
        twin = attrs.evolve(self)
        twin.states, twin.causes = self.states.copy(), self.causes.copy()
        twin.inputs, twin.waits = self.inputs.copy(), self.waits.copy()
        return twin

    def key(self) -> tuple[object, ...]:
        return (
            tuple(self.states), tuple(self.causes), tuple(self.inputs), tuple(self.waits), self.told, self.ready,
            self.soon, self.asleep, self.now, self.news, self.latched, self.cut, self.swept, self.held,
            self.doomed, self.after_cancel, self.verdict,
        )  # fmt: skip


def explore(dag: Sequence[Node], scripts: Sequence[Script], policy: str, *, prompt: bool = False) -> set[Outcome]:
    """Gives every way in which a run may end.

    Args:
        dag: The stages.
        scripts: What each of them does.
        policy: The pipeline's ``on_failure``.
        prompt: Whether news takes no time, and no strand yields before it must.
    """
    return _Machine(dag, scripts, policy, prompt=prompt).explore()


class _Machine:
    def __init__(self, dag: Sequence[Node], scripts: Sequence[Script], policy: str, *, prompt: bool) -> None:
        self.dag = dag
        self.scripts = scripts
        self.policy = policy
        self.regions = regions(tuple(node.after for node in dag))
        self.followers = [[other for other, node in enumerate(dag) if stage in node.after] for stage in range(len(dag))]
        self.prompt = prompt

    def explore(self) -> set[Outcome]:
        size = len(self.dag)
        roots = frozenset(stage for stage, node in enumerate(self.dag) if not node.after)
        nobody: frozenset[int] = frozenset()
        inputs = [nobody if stage in roots else None for stage in range(size)]
        start = _World([PENDING] * size, [frozenset()] * size, inputs, [0] * size, nobody, roots)
        outcomes: set[Outcome] = set()
        seen = {start.key()}
        todo = [start]
        while todo:
            world = todo.pop()
            following = list(self.next(world))
            if not following:
                outcomes.add(self.outcome(world))
            for other in following:
                key = other.key()
                if key not in seen:
                    seen.add(key)
                    todo.append(other)
        return outcomes

    def next(self, world: _World) -> Iterator[_World]:
        """The worlds that may follow; none if the run has ended."""
        if world.ready:
            for stage in world.ready:
                slept = world.states[stage] == RUNNING and not self.scripts[stage].ticks
                for yields in (False, True) if slept and not self.prompt else (False,):
                    other = world.copy()
                    other.ready -= {stage}
                    self.turn(other, stage, yields=yields)
                    yield from self.spread(other)
        elif world.latched or world.soon or world.news or world.asleep:
            other = world.copy()
            for what, stage, head in world.latched:
                self.happen(other, what, stage, head)
            other.latched = ()
            for after_news in self.spread(other):
                yield self.tick(after_news)

    def tick(self, world: _World) -> _World:
        """Begins the next tick."""
        arrived = [stage for away, stage in world.news if away == 1]
        world.news = frozenset((away - 1, stage) for away, stage in world.news if away > 1)
        world.ready, world.soon = world.soon.union(arrived), frozenset()
        if not world.ready and not world.news and world.asleep:
            world.now = min(until for until, _ in world.asleep)
            world.ready = frozenset(stage for until, stage in world.asleep if until == world.now)
            world.asleep = frozenset(sleeper for sleeper in world.asleep if sleeper[0] > world.now)
        return world

    # A turn

    def turn(self, world: _World, stage: int, *, yields: bool) -> None:
        """Lets a strand go on until it waits or has ended; or just to the end of its first stage, if it yields then.

        (The turn of a stage that has settled is that of the news of it.)
        """
        if world.states[stage] not in (PENDING, RUNNING):
            self.tell(world, stage)
            return
        at = self.rested(world, stage) if world.states[stage] == PENDING else stage
        while at is not None:
            script = self.scripts[at]
            if world.states[at] == PENDING:
                if script.does != "when":
                    world.states[at] = RUNNING
                    world.waits[at] = script.ticks
                    if not script.ticks and script.sleep:
                        world.asleep |= {(world.now + script.sleep, at)}
                        return
            else:
                world.waits[at] -= bool(script.ticks)
            if world.waits[at]:
                world.soon |= {at}
                return
            going_on = self.answer(world, at)
            following = self.regions.onward[at]
            if yields and going_on and following is not None and world.states[following] == PENDING:
                world.soon |= {following}
                return
            at = self.onward(world, at) if going_on else None

    def onward(self, world: _World, stage: int) -> int | None:
        """Gives the next stage of the strand that starts; passes over those that are skipped."""
        at = self.regions.onward[stage]
        if at is None or world.states[at] != PENDING:
            return None
        if self.decide(world, at) is True:
            self.give(world, at)
            return at
        self.settle(world, at, SKIPPED, world.causes[stage])
        self.tell(world, at, inline=True)
        return self.onward(world, at)

    def rested(self, world: _World, stage: int) -> int | None:
        """Gives the next stage of the strand that starts, from one on with which a turn begins."""
        if world.inputs[stage] is not None:
            return stage
        (before,) = self.dag[stage].after
        return self.onward(world, before)

    def answer(self, world: _World, stage: int) -> bool:
        """Does what a stage's answer means. Returns whether its strand goes on."""
        script = self.scripts[stage]
        does, head = script.does, self.regions.head[stage]
        if does == "cancel_branch" and script.of is not None:
            if script.of not in self.regions.dominators[stage]:
                does = "fail"  # that is no branch of its to end
            else:
                head = self.regions.head[script.of]
        if stage in world.doomed:
            world.after_cancel |= {stage}
        match does:
            case "ok":
                self.settle(world, stage, SUCCEEDED, frozenset())
            case "skip" | "when":
                if does == "when":
                    world.inputs[stage] = None
                self.settle(world, stage, SKIPPED, frozenset({(does, stage)}))
            case "cancel_branch":
                self.settle(world, stage, CANCELLED, frozenset({(does, stage)}))
                if head != self.regions.head[stage]:
                    world.latched += (("cut", stage, head),)
                    return False
                self.sweep(world, head, does, stage)
            case "cancel":
                self.settle(world, stage, CANCELLED, frozenset({(does, stage)}))
                world.verdict = world.verdict or (does, stage)
                world.latched += (("end", stage, None),)
                return False
            case _:
                self.settle(world, stage, FAILED, frozenset({(does, stage)}))
                policy = script.on_failure or self.policy
                if policy != "tolerate":
                    world.verdict = world.verdict or (does, stage)
                if policy in ("fail_fast", "drain"):
                    world.latched += (("end" if policy == "fail_fast" else "drain", stage, None),)
                    return False
        self.tell(world, stage, inline=True)
        return True

    def settle(self, world: _World, stage: int, state: str, causes: frozenset[Cause]) -> None:
        world.states[stage] = state
        world.causes[stage] = causes

    # What that means for others

    def tell(self, world: _World, stage: int, *, inline: bool = False) -> None:
        """Lets those after a stage know that it has settled; if inline, its own turn sees to the next of the strand."""
        world.told |= {stage}
        for follower in self.followers[stage]:
            if world.states[follower] != PENDING or follower in world.soon or follower in world.ready:
                continue
            if inline and follower == self.regions.onward[stage]:
                continue
            decision = self.decide(world, follower)
            if decision is True:
                self.give(world, follower)
                world.soon |= {follower}
            elif decision is False:
                self.settle(world, follower, SKIPPED, self.reasons(world, follower))
                world.fresh += ((follower, PASSING),)

    def decide(self, world: _World, stage: int) -> bool | None:
        """Whether a stage starts, never will, or still waits."""
        node = self.dag[stage]
        known = [other for other in node.after if other in world.told]
        good = sum(world.states[other] == SUCCEEDED for other in known)
        left = len(node.after) - len(known)
        match node.join:
            case "all":
                if any(world.states[other] != SUCCEEDED and other not in node.optional for other in known):
                    return False
                return None if left else True
            case "settled":
                return None if left else True
            case "any_settled":
                return None if left else good > 0
            case _:
                needed = {"any": 1, "quorum": len(node.after) // 2 + 1, "n_of": node.count}[node.join]
                return True if good >= needed else False if good + left < needed else None

    def reasons(self, world: _World, stage: int) -> frozenset[Cause]:
        """Why a stage will not start: each input that it misses by now is reason enough."""
        node = self.dag[stage]
        needed = set(node.after) - (node.optional if node.join == "all" else set())
        return frozenset[Cause]().union(*(world.causes[other] for other in needed))

    def give(self, world: _World, stage: int) -> None:
        """Fixes what a stage that is going to start will see."""
        here = (other for other in self.dag[stage].after if other in world.told and world.states[other] == SUCCEEDED)
        world.inputs[stage] = frozenset(here)

    def happen(self, world: _World, what: str, stage: int, head: int | None) -> None:
        """Does what a stage's end means for others, between two ticks."""
        kind = next(kind for kind, culprit in world.causes[stage] if culprit == stage)
        if what == "drain":
            pending = (other for other, state in enumerate(world.states) if state == PENDING)
            world.held |= frozenset(pending)
            self.skip(world, range(len(self.dag)), (kind, stage))
        else:
            self.sweep(world, head, kind, stage)
        if what == "cut":
            world.fresh += ((stage, CLEARING),)

    def sweep(self, world: _World, head: int | None, kind: str, culprit: int) -> None:
        """Ends a branch and all below it, unless that has been done."""
        around = {None} if head is None else {None, *self.regions.dominators[head]}
        if world.cut & around:
            return
        world.cut |= {head}
        within = self.regions.within(head)
        for stage in within:
            if world.states[stage] == RUNNING:
                if self.scripts[stage].stubborn:
                    world.doomed |= {stage}
                    continue
                self.settle(world, stage, CANCELLED, frozenset({(kind, culprit)}))
                world.fresh += ((stage, CLEARING),)
            elif stage in world.held:
                world.causes[stage] |= {(kind, culprit)}  # it may not have been written down yet
        world.asleep = frozenset(sleeper for sleeper in world.asleep if world.states[sleeper[1]] == RUNNING)
        self.skip(world, within, (kind, culprit))

    def skip(self, world: _World, stages: Iterable[int], cause: Cause) -> None:
        """Skips what has not begun."""
        travelling = {stage for _, stage in world.news}
        for stage in stages:
            if stage in travelling and world.states[stage] == SKIPPED:
                world.causes[stage] |= {cause}  # it may not have been written down yet
            elif world.states[stage] == PENDING:
                self.settle(world, stage, SKIPPED, frozenset({cause}))
                world.inputs[stage] = None
                world.swept |= {stage}
                world.fresh += ((stage, CLEARING),)
        world.soon = frozenset(stage for stage in world.soon if world.states[stage] in (PENDING, RUNNING))

    def spread(self, world: _World) -> Iterator[_World]:
        """Sends off all news: tries how long each takes."""
        if not world.fresh:
            yield world
            return
        (stage, ticks), *rest = world.fresh
        world.fresh = tuple(rest)
        waiting = any(world.states[follower] == PENDING for follower in self.followers[stage])
        for away in ticks if waiting and not self.prompt else (0,):
            other = world.copy()
            if away:
                other.news |= {(away, stage)}
            else:
                self.tell(other, stage)
            yield from self.spread(other)

    def outcome(self, world: _World) -> Outcome:
        assert not {PENDING, RUNNING}.intersection(world.states), world
        causes = world.causes.copy()
        for stage in sorted(world.swept):
            # Its inputs had ended as well, or were about to: that is as good a reason.
            causes[stage] = causes[stage].union(*(causes[other] for other in self.dag[stage].after))
        if world.verdict is not None:
            status = CANCELLED if world.verdict[0] == "cancel" else FAILED
        else:
            status = SUCCEEDED if set(world.states) == {SUCCEEDED} else "partial"
        return Outcome(
            states=tuple(world.states),
            status=status,
            raised=world.verdict,
            inputs=tuple(world.inputs),
            after_cancel=world.after_cancel,
            causes=tuple(causes),
        )
