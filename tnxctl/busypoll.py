"""Busy poll: an event loop that looks for what comes next again and again, instead of sleeping, while calls are short.

A loop that sleeps has to be woken, on a core that has gone to sleep as well. Both take tens of microseconds, and what
runs next runs slower: together a third of what a short request took through the bridge, one at a time
(docs/performance.md, "The bridge"). The loop goes on serving everybody else meanwhile. It is Linux's busy polling
(https://docs.kernel.org/networking/napi.html#busy-polling), a layer above.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from tnxctl.protocol.errors import InvalidArgument

if TYPE_CHECKING:
    import asyncio

MAX_S = 1.0

DEFAULT_BUSY_POLL_S = 1e-3
"""Default of the bridge: several times what the smallest networks take, and less than those that are not small."""

_WEIGHT = 0.125
"""Weight of the last of the times in what they usually are, as for the round trips of TCP (RFC 6298)."""

_MOST_COUNTED = 4.0
"""Times longer than so many times the longest count as that: a single one shall not end it for long."""


class BusyPoll:
    """Busy polling of one event loop, from a call that is alone to its answer, and from there to the next one.

    It lasts no longer at a time than it may. And it is not begun where the answer, or the next call, is usually not
    there within that time.

    Args:
        longest_s: seconds that it lasts at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, longest_s: float) -> None:
        self._loop = loop
        self._longest_s = longest_s
        self._usual_call_s = 0.0
        self._usual_gap_s = longest_s
        self._answered_at = -math.inf
        self._until = -math.inf
        self._is_on = False

    def sent(self) -> None:
        """Begin: a call was sent just now, while there was no other."""
        now = time.monotonic()
        self._usual_gap_s = self._learn(self._usual_gap_s, now - self._answered_at)
        self._go_on(now, self._usual_call_s)

    def answered(self, seconds: float) -> None:
        """Go on, or end: that call was answered, and took so long."""
        self._answered_at = now = time.monotonic()
        self._usual_call_s = self._learn(self._usual_call_s, seconds)
        self._go_on(now, max(self._usual_call_s, self._usual_gap_s))

    def end(self) -> None:
        """End for good: no call will be sent any more."""
        self._longest_s = 0.0
        self._until = -math.inf

    def _learn(self, usual: float, seconds: float) -> float:
        return usual + _WEIGHT * (min(seconds, _MOST_COUNTED * self._longest_s) - usual)

    def _go_on(self, now: float, usual: float) -> None:
        if usual >= self._longest_s or self._loop.is_closed():  # a closed loop ends the calls that it leaves
            self._until = now
            return
        self._until = now + self._longest_s
        if not self._is_on:
            self._is_on = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Be due again at once, which has the loop look at its sockets without waiting for them."""
        self._is_on = time.monotonic() < self._until
        if self._is_on:
            self._loop.call_soon(self._turn)


def check_busy_poll(seconds: float) -> float:
    """The longest busy poll that `seconds` means. Raises InvalidArgument: it is none from 0 to MAX_S."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_S:
        raise InvalidArgument(f"busy_poll is {seconds!r}: expected seconds from 0 to {MAX_S:g}")
    return float(seconds)
