"""Busy poll: an event loop that looks for the answer to a short call again and again, instead of sleeping.

A loop that sleeps has to be woken, on a core that has gone to sleep as well. Both take tens of microseconds, and what
runs next runs slower: together a quarter of what a short request took through the bridge, one at a time
(docs/performance.md, "The bridge"). The loop goes on serving everybody else meanwhile. It is Linux's busy polling
(https://docs.kernel.org/networking/napi.html#busy-polling), a layer above.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from tnxctl.protocol.errors import InvalidArgument

MAX_S = 1.0

DEFAULT_BUSY_POLL_S = 1e-3
"""What the bridge has: several times what the smallest networks take, and less than those that are not small."""

_WEIGHT = 0.125
"""Weight of the last call in what calls take, as for the round trips of TCP (RFC 6298)."""

_MOST_COUNTED = 4.0
"""Calls longer than so many times the longest count as if they took that: a single one shall not end it for long."""


class BusyPoll:
    """Busy polling of one event loop, while one call is under way and such calls are short.

    Args:
        longest_s: seconds that it lasts at most. Calls that take longer on average are not polled for.
        is_waiting: whether the call is still under way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, longest_s: float, is_waiting: Callable[[], bool]) -> None:
        self._loop = loop
        self._longest_s = longest_s
        self._is_waiting = is_waiting
        self._usual_s = 0.0
        self._until = -math.inf
        self._is_on = False

    def begin(self) -> None:
        """Begin, for a call that was sent just now."""
        if self._usual_s < self._longest_s:
            self._until = time.monotonic() + self._longest_s
            if not self._is_on:
                self._is_on = True
                self._loop.call_soon(self._turn)

    def took(self, seconds: float) -> None:
        """Learn how long a call took that had the connection to itself."""
        self._usual_s += _WEIGHT * (min(seconds, _MOST_COUNTED * self._longest_s) - self._usual_s)

    def _turn(self) -> None:
        """Be due again at once, which has the loop look at its sockets without waiting for them."""
        self._is_on = self._is_waiting() and time.monotonic() < self._until
        if self._is_on:
            self._loop.call_soon(self._turn)


def check_busy_poll(seconds: float) -> float:
    """The longest busy poll that `seconds` means. Raises InvalidArgument: it is none from 0 to MAX_S."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_S:
        raise InvalidArgument(f"busy_poll is {seconds!r}: expected seconds from 0 to {MAX_S:g}")
    return float(seconds)
