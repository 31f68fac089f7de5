"""Waiting: the calls of a client of several daemons that wait to be sent. No socket, no clock.

    Waiting.wait(call_id, at, ...)  it may be sent from that time on; if that is infinite, once there is a connection
    Waiting.next_at                 when the next one may go
    Waiting.take(now)               its id, if one may go now
    Waiting.hasten(now)             all may go now: there is one more daemon to go to

What was sent before waits for a token of the budget as well, see `tnxctl.resending`.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from tnxctl.resending import Budget, Resends


class Waiting:
    """Calls that wait, by id. A call that has ended meanwhile may still be taken."""

    __slots__ = ("_first_sends", "_parked", "_resends")

    def __init__(self, budget: Budget) -> None:
        self._resends = Resends(budget)
        self._first_sends: list[tuple[float, int]] = []  # a heap of times and ids
        self._parked: dict[int, bool] = {}  # id -> whether it was sent before

    @property
    def has_parked(self) -> bool:
        """Whether one waits for a connection."""
        return bool(self._parked)

    @property
    def next_at(self) -> float:
        """Time from which on `take` has something; infinite while there is nothing but what waits for a connection."""
        return min(self._resends.next_at, self._first_sends[0][0] if self._first_sends else math.inf)

    def wait(self, call_id: int, at: float, *, was_sent: bool) -> None:
        """Let a call wait until a time; if it is infinite, for a connection."""
        if at == math.inf:
            self._parked[call_id] = was_sent
        elif was_sent:
            self._resends.wait(call_id, at)
        else:
            heappush(self._first_sends, (at, call_id))

    def take(self, now: float) -> int | None:
        """The call whose turn it is; None if there is none yet. One that waits for a connection is passed over."""
        while True:
            if self._first_sends and self._first_sends[0][0] <= now:
                call_id: int | None = heappop(self._first_sends)[1]
            else:
                call_id = self._resends.take(now)
            if call_id not in self._parked:
                return call_id

    def hasten(self, now: float) -> None:
        """Let the turn of all that wait come now."""
        self._resends.hasten(now)
        self._first_sends = [(now, call_id) for _, call_id in sorted(self._first_sends)]
        parked, self._parked = self._parked, {}
        for call_id, was_sent in parked.items():
            self.wait(call_id, now, was_sent=was_sent)

    def drop(self, call_id: int) -> None:
        """Let a call wait for a connection no more."""
        self._parked.pop(call_id, None)
