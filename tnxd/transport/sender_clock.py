"""Ages of messages: how long ago one came, since it may have waited in ZeroMQ's queues before it was taken up."""

from __future__ import annotations

# A minimum counts for so long, and up to twice that: clocks drift, and routes change.
_WINDOW_NS = 5_000_000_000

# Of a sender that was silent for so long nothing is known any more: it may have slept, and its clock with it.
_SILENCE_NS = 1_000_000_000


class SenderClock:
    """The clock of one sender, and by how much it differs from the daemon's.

    Two clocks differ by an amount that nobody knows, and a message takes a time that nobody knows. But the smallest
    difference between both times that was seen lately belongs to a message that did not wait: what others differ by
    more, they have waited. LEDBAT measures queues so (RFC 6817, section 4.2, "base delay").
    """

    __slots__ = ("_heard_ns", "_least_ns", "_next_ns", "_until_ns")

    def __init__(self) -> None:
        self._least_ns = self._next_ns = 0  # the smallest difference, of this window and the last; of this one
        self._until_ns = 0
        self._heard_ns = -_SILENCE_NS

    def waited_ns(self, sent_us: float, now_ns: int) -> int:
        """Nanoseconds that a message has waited that was sent then, by its sender's clock, and is taken up now.

        Whatever a sender says, it says about its own messages alone. The caller knows how long one can have waited.
        """
        difference = now_ns - int(sent_us * 1e3)
        if now_ns - self._heard_ns >= _SILENCE_NS:
            self._least_ns = self._next_ns = difference
            self._until_ns = now_ns + _WINDOW_NS
        elif now_ns >= self._until_ns:
            self._least_ns, self._next_ns = self._next_ns, difference
            self._until_ns = now_ns + _WINDOW_NS
        self._heard_ns = now_ns
        if difference < self._next_ns:
            self._next_ns = difference
        if difference < self._least_ns:
            self._least_ns = difference
        return difference - self._least_ns
