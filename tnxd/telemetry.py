"""Counts what the daemon did. Written by the serving thread alone."""

from __future__ import annotations

import time
from collections import Counter


class Telemetry:
    """Totals since the start.

    Attributes:
        requests: predict requests, and other messages that were refused. replies: results sent.
        errors: error replies by code.
        abandoned: requests taken out of the queue because their client was gone.
        prediction_error_us: moving average of the distance between predicted and actual time, in microseconds.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.requests = 0
        self.replies = 0
        self.errors: Counter[str] = Counter()
        self.abandoned = 0
        self.prediction_error_us = 0.0

    def observe_prediction(self, predicted_us: float, actual_us: float) -> None:
        """A request is done: compare."""
        self.prediction_error_us += 0.05 * (abs(predicted_us - actual_us) - self.prediction_error_us)

    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
