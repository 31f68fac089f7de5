"""Resending: the calls that wait to be sent again, and how many may be under way at a time. No socket, no clock.

    Resends.wait(call_id, at)       it is to be sent again, not before that time
    Resends.next_at                 when the next one may go; infinite while none waits or none may go
    Resends.take(now)               its id, if one may go now
    Budget.began() / ended()        one goes out / is answered, refused, lost or given up
    Budget.refund() / succeeded()   the daemon has refused it for now / has answered any call with a result

A resend is work that a daemon may have done already. Where answers fail to come because there is too much to do, each
client that sends again what it misses makes it worse. So resends have a **budget**, as those of Finagle and of gRPC do:
each takes a token, and each success of any call earns a tenth of one. Who waits for a token is late, not lost.

- A resend that succeeds gives its token back, as does one that the daemon refuses for now: it names the time to come
  back itself, and a refusal is little work. What keeps a token is a resend that was lost in its turn, or failed.
- One resend may be under way in any case. Else a client that waits for nothing but resends would never earn a token.

After a restart, which costs each call one connection, the tokens therefore are a window: so many resends are under way
at a time, until all have been answered. While connections go on to break, they run out, and what goes out again is a
tenth of what succeeds.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

FIRST_TOKENS = 10.0
MOST_TOKENS = 100.0
TOKENS_PER_SUCCESS = 0.1


class Resends:
    """Resends of one client that wait, in the order of their times.

    Args:
        budget: says how many may go.
    """

    __slots__ = ("_waiting", "budget")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waiting: list[tuple[float, int]] = []  # a heap of times and ids

    @property
    def next_at(self) -> float:
        """Time from which on `take` has something; infinite while none waits, or while none may go."""
        return self._waiting[0][0] if self._waiting and self.budget.has_room else math.inf

    def wait(self, call_id: int, at: float) -> None:
        """Let a call wait for its turn, which is not before a time."""
        heappush(self._waiting, (at, call_id))

    def take(self, now: float) -> int | None:
        """The call whose turn it is; None if there is none yet. It may have ended meanwhile."""
        return heappop(self._waiting)[1] if self.next_at <= now else None

    def hasten(self, now: float) -> None:
        """Let the turn of all that wait come now."""
        self._waiting = [(now, call_id) for _, call_id in sorted(self._waiting)]

    def clear(self) -> None:
        """Let none wait any more."""
        self._waiting.clear()


class Budget:
    """Budget of resends, for all daemons of one client."""

    __slots__ = ("_tokens", "_under_way")

    def __init__(self) -> None:
        self._tokens = FIRST_TOKENS
        self._under_way = 0

    @property
    def has_room(self) -> bool:
        """Whether one more may be under way."""
        return self._tokens >= 1.0 or not self._under_way

    @property
    def has_token(self) -> bool:
        """Whether one more may be under way that nobody waits for: without it, there would be an answer or an error."""
        return self._tokens >= 1.0

    def began(self) -> None:
        """Note that a resend goes out."""
        self._under_way += 1
        self._tokens = max(self._tokens - 1.0, 0.0)

    def ended(self) -> None:
        """Note that a resend is not under way any more, for whatever reason."""
        self._under_way = max(self._under_way - 1, 0)  # Ctrl-C may have come before it had begun

    def refund(self) -> None:
        """Give back the token of a resend."""
        self._tokens = min(self._tokens + 1.0, MOST_TOKENS)

    def succeeded(self) -> None:
        """Note that a call of any kind got its result."""
        if self._tokens < MOST_TOKENS:
            self._tokens = min(self._tokens + TOKENS_PER_SUCCESS, MOST_TOKENS)
