"""Calls from other threads into the serving loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tnxd.transport.wakeup import Wakeup


class CallQueue:
    """Functions that wait until the serving loop runs them.

    Args:
        wakeup: wakes the loop.
    """

    def __init__(self, wakeup: Wakeup) -> None:
        self._wakeup = wakeup
        self._calls: deque[Callable[[], None]] = deque()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Have the loop run a function. Any thread."""
        self._calls.append(call)
        self._wakeup.set()

    def run(self) -> None:
        """Run what waits. The loop's thread."""
        while self._calls:
            self._calls.popleft()()
