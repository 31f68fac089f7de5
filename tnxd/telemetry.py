"""Counts what the daemon did. Written by the serving thread alone."""

from __future__ import annotations

import time
from collections import Counter


class Telemetry:
    """Totals since the start.

    Attributes:
        requests: predict requests that came in. replies: results sent.
        errors: error replies by code.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.requests = 0
        self.replies = 0
        self.errors: Counter[str] = Counter()

    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
