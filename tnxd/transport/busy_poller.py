"""Busy polling before a blocking wait."""

from __future__ import annotations

import time
from collections.abc import Callable


class BusyPoller:
    """Busy polling of an adaptive length: up to a limit where that has paid lately, and none where it has not.

    To wake a sleeping thread costs more than to serve a small request (measured: docs/performance.md), so after a
    request the next one is polled for, up to the limit. Every wait that outlasts its polling halves the time of the
    next; one that would have been caught within the limit sets it back. An idle daemon blocks and uses no CPU.

    Args:
        limit_us: longest time in microseconds to poll for; 0 never polls.
    """

    def __init__(self, limit_us: float) -> None:
        self.limit_ns = int(limit_us * 1e3)
        self._poll_ns = self.limit_ns
        self._began_ns = 0

    def poll(self, is_ready: Callable[[], bool]) -> bool:
        """Poll `is_ready` for the time that pays. True if it said yes; otherwise block, then call `blocked`."""
        clock = time.perf_counter_ns
        self._began_ns = now = clock()
        end = now + self._poll_ns
        while now < end:
            if is_ready():
                self._poll_ns = self.limit_ns
                return True
            now = clock()
        return False

    def blocked(self) -> None:
        """Adapt the length: the blocking wait after `poll` is over."""
        waited = time.perf_counter_ns() - self._began_ns
        # A wake-up itself takes some 50 us: a wait up to twice the limit could have been polled within it.
        self._poll_ns = self.limit_ns if waited <= 2 * self.limit_ns else self._poll_ns // 2
