"""The part of a closed loop that counts, whoever is asked: from a steady state on, in whole turns."""

from __future__ import annotations

from bisect import bisect_right


class Steady:
    """Answers of a closed loop, as they come.

    The first ones, as many as are outstanding, do not count: from nothing at all to full batches takes as long as a
    batch or two. Of those that come in so many seconds after them, as many count as are a multiple of the number
    outstanding, and at least that number. Answers of one batch come together, and everyone who waits gets one before
    anyone gets the next, so that this begins and ends at the same place among batches, which the rate depends on.

    Args:
        outstanding: requests that wait for an answer at a time. seconds: to count for.
    """

    def __init__(self, outstanding: int, seconds: float) -> None:
        self._outstanding = outstanding
        self._ns = int(seconds * 1e9)
        self._times_ns: list[int] = []

    def answered(self, now_ns: int) -> bool:
        """Note that an answer came. Whether another request is to be sent in its place."""
        self._times_ns.append(now_ns)
        count = len(self._times_ns)
        return count < 2 * self._outstanding or now_ns < self._times_ns[self._outstanding - 1] + self._ns

    @property
    def counted(self) -> slice:
        """Which of all answers count, by the order in which they came."""
        first = self._outstanding
        in_time = bisect_right(self._times_ns, self._times_ns[first - 1] + self._ns)
        return slice(first, max(in_time // first, 2) * first)

    @property
    def seconds(self) -> float:
        """Time in which the answers came that count."""
        counted = self.counted
        first: int = counted.start - 1
        last: int = counted.stop - 1
        return (self._times_ns[last] - self._times_ns[first]) / 1e9
