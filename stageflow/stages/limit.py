"""`Limit`: how many stages may use a thing at once, and who of those that wait is next."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import TYPE_CHECKING, TypeAlias, cast, final

import trio
from trio.lowlevel import (
    Abort,
    Task,
    checkpoint_if_cancelled,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

from stageflow.errors import DefinitionError
from stageflow.stages.policy import check_count

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Limit", "instead_of"]


_numbers = itertools.count()


def instead_of(limit: Limit, lent: Mapping[Limit, Limit]) -> Limit:
    """Gives what a run takes a token of: what was lent to it instead of a limit, as long as the loan lasts."""
    loan = lent.get(limit, limit)
    while loan.lender is not None:
        loan = loan.lender
    return loan


class _Waiter:
    __slots__ = ("parked", "served", "task")

    def __init__(self, task: Task) -> None:
        self.task: Task | None = task  # None once it has given up
        self.parked = False
        self.served = False


_Entry: TypeAlias = tuple[float, int, int, _Waiter]
"""The least one is next: by rank, then by place, then who came first. Two waiters are never compared themselves."""


@final
class Limit:
    """A number of tokens that stages take while they run. Whoever finds none waits; it is never an error.

    ``Pipeline(limits={"gpu": 2})`` gives each run two of its own. To bound several runs, or several pipelines,
    together, make a `Limit` and give it to all of them; they have to be of one `trio.run`.

    Those that wait are served by priority, the greater first, and among equals who came first. A waiter gets older:
    each `ageing` seconds of waiting are worth one step of priority, so that nobody waits for ever. (Since all that wait
    age alike, who goes before whom is known when a waiter comes, and a queue ordered by that is enough.)

    Args:
        tokens: How many there are.
        ageing: Seconds of waiting that make up for one step of priority, on Trio's clock. `math.inf` for a strict order
            of priorities, in which low ones may wait for ever.

    Raises:
        DefinitionError: `tokens` is no whole number of at least 1, or `ageing` is not positive.
    """

    __slots__ = ("_ageing", "_free", "_gone", "_sharing", "_turns", "_waiting", "lender", "number", "tokens")

    def __init__(self, tokens: int, *, ageing: float = 1.0) -> None:
        self.tokens: int = check_count(tokens, "Limit()")
        if not isinstance(cast("object", ageing), (int, float)) or not ageing > 0:
            raise DefinitionError(f"Limit(ageing=...) takes seconds of more than zero, not {ageing!r}")
        self._ageing = float(ageing)
        self._free = tokens
        self._waiting: list[_Entry] = []
        self._gone = 0  # how many of them have given up
        self._sharing = False  # whether what is free will be handed out at the end of this tick
        self._turns = itertools.count()
        self.number: int = next(_numbers)  # the order in which stages take what they use
        self.lender: Limit | None = None  # of a loan, whose token goes back there, once its stage has ended

    @property
    def waiting(self) -> int:
        """How many are waiting."""
        return len(self._waiting) - self._gone

    def take_nowait(self) -> bool:
        """Takes a token if there is one, and tells whether there was."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def take(self, priority: int = 0, place: int = 0) -> None:
        """Takes a token, and waits for one if there is none.

        If there is one, it is handed out at the end of the scheduler tick, to whoever is first of those who came in it;
        so it does not depend on the order in which Trio happens to run them.

        Args:
            priority: Who goes first among those that wait: the greater.
            place: Who goes first among those of one priority that have waited equally long: the lesser.

        Raises:
            trio.Cancelled: Nothing was taken then.
        """
        await checkpoint_if_cancelled()
        aged = 0.0 if self._ageing == math.inf else trio.current_time() / self._ageing
        waiter = _Waiter(current_task())
        heapq.heappush(self._waiting, (aged - priority, place, next(self._turns), waiter))
        if self._free and not self._sharing:
            await self._share()
        if not waiter.served:
            waiter.parked = True
            await wait_task_rescheduled(lambda _: self._give_up(waiter))

    async def _share(self) -> None:
        """Hands out the free tokens, as soon as all tasks that are ready now have had their turn.

        Trio looks at deadlines between two batches of ready tasks, and calls this function then. Shielded, for no time.
        """

        def hand_out(_: object) -> Abort:
            if self._sharing:
                self._sharing = False
                while self._free and self._serve():
                    self._free -= 1
            return Abort.SUCCEEDED

        self._sharing = True
        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time()
            await wait_task_rescheduled(hand_out)

    def _serve(self) -> bool:
        """Gives a token to whoever is next, and tells whether there is anybody."""
        while self._waiting:
            *_, waiter = heapq.heappop(self._waiting)
            if waiter.task is not None:
                waiter.served = True
                if waiter.parked:
                    reschedule(waiter.task)
                return True
            self._gone -= 1
        return False

    def _give_up(self, waiter: _Waiter) -> Abort:
        waiter.task = None
        self._gone += 1
        if self._gone > len(self._waiting) // 2:  # so that those who gave up are never more than those who wait
            self._waiting = [entry for entry in self._waiting if entry[-1].task is not None]
            heapq.heapify(self._waiting)
            self._gone = 0
        return Abort.SUCCEEDED

    def give_back(self) -> None:
        """Gives a token back, and with it the turn to whoever is next."""
        if self._sharing or not self._serve():
            if self.lender is None:
                self._free += 1
            else:
                self.lender.give_back()

    def loan(self) -> Limit:
        """A limit of one token, in the place of one of these that somebody holds, and lends."""
        loan = Limit(1, ageing=self._ageing)
        loan.number = self.number
        return loan

    def outlive(self, lender: Limit) -> bool:
        """Has a loan that is in use give its token back to where it came from when it is not any more.

        Tells whether it is in use; otherwise whoever has lent it gives the token back.
        """
        in_use = not self._free
        self._free, self.lender = 0, lender
        return in_use

    def __repr__(self) -> str:
        return f"<Limit {self._free} of {self.tokens} free, {self.waiting} waiting>"
