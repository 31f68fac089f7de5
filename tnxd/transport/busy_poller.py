"""The time to poll before blocking."""

from __future__ import annotations

import time
from collections.abc import Callable


class Spinner:
    """Polls for a bounded time where that has been worth it lately, and not at all where it has not.

    To wake a sleeping thread costs more than to serve a small request (measured: docs/performance.md), so after a
    request the next one is polled for, up to the limit. Every wait that outlasts its polling halves the time of the
    next; one that would have been caught within the limit sets it back. An idle daemon blocks and uses no CPU.

    Args:
        limit_us: longest time in microseconds to poll for; 0 never polls.
    """

    def __init__(self, limit_us: float) -> None:
        self.limit_ns = int(limit_us * 1e3)
        self._spin_ns = self.limit_ns
        self._began_ns = 0

    def spin(self, is_ready: Callable[[], bool]) -> bool:
        """Poll `is_ready` for as long as it is worth. True if it said yes; otherwise block, then call `blocked`."""
        clock = time.perf_counter_ns
        self._began_ns = now = clock()
        end = now + self._spin_ns
        while now < end:
            if is_ready():
                self._spin_ns = self.limit_ns
                return True
            now = clock()
        return False

    def blocked(self) -> None:
        """The wait that `spin` did not cover is over."""
        waited = time.perf_counter_ns() - self._began_ns
        # A wake-up itself takes some 50 us: a wait up to twice the limit could have been a spin within it.
        self._spin_ns = self.limit_ns if waited <= 2 * self.limit_ns else self._spin_ns // 2
