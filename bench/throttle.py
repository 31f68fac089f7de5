"""Client-side throttling as in tnxctl's own client: requests that the daemon would refuse are held back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tnxctl.request_windows import Window
from workload import FIRST_ID
from zmtpsocket import Messages


class _Answer(msgspec.Struct, gc=False):
    """The part of a reply's header that throttling needs."""

    type: str
    id: int
    code: str = ""
    retry_after_us: float | None = None


_decode = msgspec.msgpack.Decoder(_Answer).decode

# The daemon had no time for these, or no room.
_CODES = ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class Throttle:
    """The windows of one connection, one for what is urgent and one for the rest: all has the same deadline.

    Args:
        urgent: of each request, by number.

    Attributes:
        held: numbers of the requests that were held back.
    """

    def __init__(self, deadline_s: float, urgent: Sequence[bool]) -> None:
        self.held: list[int] = []
        self._deadline_s = deadline_s
        self._urgent = urgent
        self._windows: list[Window | None] = [None, None]
        self.reset()

    def reset(self) -> None:
        """Begin with a new connection: nothing is outstanding there."""
        self._outstanding = [0, 0]
        self._messages = Messages()

    def admit(self, first: int, stop: int, now_s: float) -> list[int]:
        """The requests, of those from one number up to another, that are to be sent. The others are held back."""
        room: list[float] = []
        for kind, window in enumerate(self._windows):
            if window is not None and window.is_over(now_s):
                window = self._windows[kind] = None
            room.append(float("inf") if window is None else window.size - self._outstanding[kind])
        sent = []
        for number in range(first, stop):
            kind = self._urgent[number]
            if room[kind] >= 1:
                room[kind] -= 1
                self._outstanding[kind] += 1
                sent.append(number)
            else:
                self.held.append(number)
        return sent

    def receive(self, part: bytes, now_s: float) -> None:
        """Learn from answers that have just been read."""
        for header, _ in self._messages.take(part):
            answer = _decode(header)
            kind = self._urgent[answer.id - FIRST_ID]
            self._outstanding[kind] -= 1
            window = self._windows[kind]
            if answer.type == "result":
                if window is not None:
                    window.served(now_s)
            elif answer.retry_after_us is not None and answer.code in _CODES:
                if window is None:
                    window = self._windows[kind] = Window(self._outstanding[kind] + 1)
                window.refused(self._deadline_s, now_s)
