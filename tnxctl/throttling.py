"""Client-side throttling: calls that the daemon would refuse for want of time fail here, unsent.

No socket, no thread, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tnxctl import failures
from tnxctl.call import Call
from tnxctl.request_windows import Windows


class Throttle:
    """The windows of one client, and the calls in them. False while there is no window: all calls are admitted."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._windows = Windows()

    def __bool__(self) -> bool:
        return bool(self._windows)

    def admit(self, call: Call[Any]) -> bool:
        """Let a call into the window of its kind, if there is one. False: that is full, and the call has failed."""
        kind = call.kind
        window = None if kind is None else self._windows.find(kind, call.expires - call.timeout)
        if window is not None:
            if window.outstanding >= window.size:
                call.fail(failures.window_full(window, self._endpoint))
                return False
            window.outstanding += 1
            call.window = window
        return True

    def refused(
        self, call: Call[Any], pending: Iterable[Call[Any]], message: str, retry_after_s: float | None, now: float
    ) -> None:
        """Shrink the window of a call's kind, or make one: the daemon had no time for that call.

        Args:
            pending: the calls under way.
            message: the daemon's reason, for the errors of calls like it.
            retry_after_s: seconds until the daemon expects to have time for them; None: not told.
        """
        kind = call.kind
        if kind is None:
            return
        window = self._windows.find(kind, now)
        if window is None:
            alike = [other for other in pending if other.kind == kind]
            window = self._windows.make(kind, len(alike) + 1)
            window.outstanding -= 1  # that call is over
            for other in alike:
                other.window = window
        window.message, window.retry_after_s = message, retry_after_s
        window.refused(call.timeout, now)
