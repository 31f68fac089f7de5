"""Backoff: the intervals between attempts, which grow, and differ from one client to the next. No clock."""

from __future__ import annotations

from random import random

_JITTER = 0.5


def spread(seconds: float) -> float:
    """A random interval, from that one to half as long again.

    What ends many connections at once, a restart for one, would else bring all clients back at once, time after time.
    It is never shorter, since a daemon may have named it.
    """
    return seconds * (1.0 + _JITTER * random())


def growing(first: float, last: float, attempts: int) -> float:
    """The interval after so many attempts, one or more: doubles from the first one to the last."""
    return min(first * 2.0 ** min(attempts - 1, 64), last)
