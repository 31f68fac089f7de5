"""Rate limit of one client: a token bucket."""

from __future__ import annotations


class RateLimit:
    """Token bucket that holds a second's worth of requests, and no less than one.

    Args:
        rate: requests a second. now: by any monotonic clock, in seconds.
    """

    __slots__ = ("_most", "_tokens", "_updated", "rate")

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._most = max(rate, 1.0)
        self._tokens = self._most
        self._updated = now

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + (now - self._updated) * self.rate, self._most)
        self._updated = now

    def is_full(self, now: float) -> bool:
        """Whether it is as if nothing had ever been taken."""
        self._fill(now)
        return self._tokens >= self._most

    def take(self, now: float) -> float:
        """Take a token. Returns 0.0; without one left, the seconds until there is one, and takes none."""
        self._fill(now)
        if self._tokens < 1.0:
            return (1.0 - self._tokens) / self.rate
        self._tokens -= 1.0
        return 0.0
