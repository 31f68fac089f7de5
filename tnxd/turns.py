"""Members take turns, and within a round the most urgent goes first."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, TypeVar

M = TypeVar("M")


# A round takes no newcomers after so many turns, or twice as many as there are members: else a stream of them would
# keep those waiting for good that have had theirs.
_ROUND_TURNS = 64


class Turns(Generic[M]):
    """An order of turns: earliest due first, but nobody twice in a round while others wait.

    A member that has had its turn queues for the next round; one that comes new joins the current one, unless that has
    lasted long. So each waits for about two turns of every other at most, however much those others have and however
    many come, and among members of one round the order is that of their due times. Every operation costs at most the
    logarithm of the number of members.

    Attributes:
        members: those that have something to do; to look at, not to change.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, M]] = []
        self.members: dict[M, tuple[int, int, int, M]] = {}
        self._served: set[M] = set()
        self._round = 0

    def offer(self, member: M, due: int, serial: int) -> None:
        """A member has something to do that is due then. Offered again, it moves forward, never back.

        Args:
            serial: unique; the smaller goes first among equally due ones.
        """
        served = self._served
        late = member in served or len(served) >= max(_ROUND_TURNS, 2 * len(self.members))
        entry = (self._round + late, due, serial, member)
        known = self.members.get(member)
        if known is None or entry < known:
            self.members[member] = entry
            heappush(self._heap, entry)

    def withdraw(self, member: M) -> None:
        """The member has nothing to do any more."""
        self.members.pop(member, None)

    def first(self) -> M | None:
        """The member whose turn it is, if any has something to do."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if self.members.get(entry[3]) is entry:
                return entry[3]
            heappop(heap)  # moved forward, or withdrawn
        return None

    def served(self, member: M) -> None:
        """The member, which was `first`, has had its turn; it is out until it is offered again."""
        entry = self.members.pop(member)
        if entry[0] > self._round:
            self._round = entry[0]
            self._served.clear()
        self._served.add(member)
