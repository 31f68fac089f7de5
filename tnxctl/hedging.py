"""Hedging: when a request is worth a copy to another daemon. No socket, no clock.

A few requests take far longer than the others: a daemon that pauses, a connection that lost a packet, a batch that was
long. A copy of such a request, sent to another daemon once it has taken longer than 95 % of those before it, is most
often answered first (J. Dean and L. A. Barroso, The Tail at Scale, 2013). The copies are bounded, whatever the answers
take: at most one for every twenty requests. Where all daemons become slow at once, copies would only make them slower.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

DEFAULT_PERCENTILE = 0.95
MAX_SHARE = 0.05
"""Most copies, in proportion to the requests."""

_LEAST_TIMES = 40  # of which a percentile is worth something
_MOST_TIMES = 400  # the older ones are forgotten
_MAX_MODELS = 256


class _Times:
    """The last times of one model, and a percentile of them."""

    __slots__ = ("_in_order", "_sorted")

    def __init__(self) -> None:
        self._in_order: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        self._in_order.append(seconds)
        insort(self._sorted, seconds)
        if len(self._in_order) > _MOST_TIMES:
            del self._sorted[bisect_left(self._sorted, self._in_order.popleft())]

    def percentile(self, share: float) -> float | None:
        count = len(self._sorted)
        return self._sorted[int(share * count)] if count >= _LEAST_TIMES else None


class Hedging:
    """The times that requests took, by model, and the copies so far.

    Args:
        percentile: share of the requests that get no copy, above 0 and below 1.

    Attributes:
        requests: those that were sent. copies: those of them that were sent to a second daemon as well.
    """

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile
        self._times: dict[str, _Times] = {}
        self.requests = 0
        self.copies = 0

    def has_room(self, waited_s: float, delay_s: float) -> bool:
        """Whether one more copy keeps to their share of the requests.

        The last fifth is for those that have waited twice as long as the others: by what the percentile means, there
        are always some that are a little late, and they shall not use up what the few need that are really stuck.
        """
        share = MAX_SHARE if waited_s >= 2 * delay_s else 0.8 * MAX_SHARE
        return self.copies + 1 <= share * self.requests

    def delay_s(self, model: str) -> float | None:
        """Seconds after which a request to a model is worth a copy; None while too little is known of it."""
        times = self._times.get(model)
        return None if times is None else times.percentile(self._percentile)

    def took(self, model: str, seconds: float) -> None:
        """Note how long a request took, from when it was first sent to the first answer."""
        times = self._times.get(model)
        if times is None:
            if len(self._times) >= _MAX_MODELS:
                del self._times[next(iter(self._times))]
            times = self._times[model] = _Times()
        times.add(seconds)
