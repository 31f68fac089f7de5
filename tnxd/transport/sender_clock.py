"""One-way queueing delay of messages: the time that each waited in ZeroMQ's queues, from its sender's timestamps."""

from __future__ import annotations

# A base delay counts for so long, and up to twice that: clocks drift, and routes change.
_WINDOW_NS = 5_000_000_000

# After a silence of this length the base delay is forgotten: the sender may have slept, and its clock with it.
_SILENCE_NS = 1_000_000_000


class SenderClock:
    """Clock offset of one sender, as the base delay of its messages (LEDBAT, RFC 6817, section 4.2).

    Two clocks differ by an unknown amount, and a message travels for an unknown time. But the smallest difference
    between both times that was seen lately, the base delay, belongs to a message that did not wait. A message has
    waited for as long as its difference exceeds that.
    """

    __slots__ = ("_heard_ns", "_least_ns", "_next_ns", "_until_ns")

    def __init__(self) -> None:
        self._least_ns = self._next_ns = 0  # the smallest difference, of this window and the last; of this one
        self._until_ns = 0
        self._heard_ns = -_SILENCE_NS

    def waited_ns(self, sent_us: float, now_ns: int) -> int:
        """Nanoseconds that a message has waited, never negative.

        A false `sent_us` distorts the waits of that sender alone. The caller bounds them by what is possible.

        Args:
            sent_us: when it was sent, by its sender's clock, in microseconds.
            now_ns: when it is received, by the daemon's clock, in nanoseconds.
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
