"""Windows: the number of requests with deadlines that a client lets wait at a daemon which refused some.

No socket, no clock.

A daemon refuses what it cannot do in time, but to be told so costs both sides most of what an answer does. A client
that sends ten times what can be served leaves no time to serve anything. So it learns from refusals how many of its
requests the daemon takes in, and refuses what is beyond that itself, which takes a microsecond.
"""

from __future__ import annotations

from math import frexp

from tnxctl.protocol import wire

# In requests, for each that was refused and each that was served: so one in twenty is refused where a window stands
# still. Both are in proportion, unlike TCP's additive increase: when others have gone, a window must grow a
# hundredfold. That clients share fairly is the daemon's affair, not the windows'.
_SHRINK = 1.0
_GROW = 0.05

# Where none was refused for the time of so many deadlines, there is more room: it grows by half in each round trip.
_QUIET = 4.0
_GROW_FAST = 0.5

# It is never smaller: who sends nothing learns nothing, and a few callers shall not be held back for one late answer.
_MIN_SIZE = 8.0

# A window that was not shrunk for so many deadlines, or so many seconds, is forgotten.
_FORGOTTEN_AFTER = 20.0
_FORGOTTEN_AFTER_S = 1.0

_MAX_WINDOWS = 64

Kind = tuple[str, int | None, int]
"""Model, priority, and the order of magnitude of the deadline. A refusal tells about requests that share all three."""


class Window:
    """The window of one kind of requests, like the congestion window of TCP.

    Attributes:
        size: most of them that may be outstanding. outstanding: those that are.
        message: the daemon's reason when it refused one. retry_after_s: seconds that it named then, if any.
    """

    __slots__ = ("_quiet_from", "_until", "message", "outstanding", "retry_after_s", "size")

    def __init__(self, outstanding: int) -> None:
        self.size = float(max(outstanding, 1))
        self.outstanding = outstanding
        self.message = ""
        self.retry_after_s: float | None = None
        self._quiet_from = 0.0
        self._until = 0.0

    def refused(self, deadline_s: float, now: float) -> None:
        """Shrink: the daemon had no time for a request with that deadline, or the answer came too late."""
        self._quiet_from = now + _QUIET * deadline_s
        self._until = now + max(_FORGOTTEN_AFTER * deadline_s, _FORGOTTEN_AFTER_S)
        self.size = max(self.size - _SHRINK, _MIN_SIZE)

    def served(self, now: float) -> None:
        """Grow: the daemon has answered a request in time."""
        self.size += _GROW_FAST if now >= self._quiet_from else _GROW

    def is_over(self, now: float) -> bool:
        """Whether the last refusal is so long ago that the window is forgotten."""
        return now > self._until


class Windows:
    """The windows of one client, by kind. A kind has one once a request of it was refused."""

    def __init__(self) -> None:
        self._windows: dict[Kind, Window] = {}

    def __bool__(self) -> bool:
        return bool(self._windows)

    def find(self, kind: Kind, now: float) -> Window | None:
        """The window of a kind, if it has one."""
        window = self._windows.get(kind)
        if window is not None and window.is_over(now):
            del self._windows[kind]
            return None
        return window

    def make(self, kind: Kind, outstanding: int) -> Window:
        """Make the window of a kind of which so many requests are outstanding."""
        if len(self._windows) >= _MAX_WINDOWS:
            del self._windows[next(iter(self._windows))]
        window = self._windows[kind] = Window(outstanding)
        return window


def kind_of(request: wire.Request) -> Kind | None:
    """The kind of a request; None of one without a deadline."""
    if not isinstance(request, wire.Predict) or request.deadline_us is None:
        return None
    return request.model, request.priority, frexp(request.deadline_us)[1]
