"""Forecasts of when requests are done, corrected by how the predictions for earlier ones came true."""

from __future__ import annotations

# Weight of the newest batch in the moving averages.
_WEIGHT = 0.05
_LEAST_FACTOR, _MOST_FACTOR = 0.5, 32.0

# A batch counts for so many times what was expected at most: a stall of the machine says nothing about the next one.
_OUTLIER = 8.0

# For each request that is late, so much more time is kept free, and so much less for each in time: where it
# stands still, one in two hundred is late (Robbins and Monro, 1951).
_MORE = 0.005
_LESS = _MORE / 200
_MOST_RESERVE = 0.4


class Forecast:
    """Corrections of what is predicted for one model on one device.

    A prediction adds up what batches take. It knows nothing of the other work of the process: to take requests in, to
    refuse others, to send answers. That work shows in the time from one batch on a lane to the next; the rest shows in
    how many promises are broken.

    Attributes:
        factor: by how much longer lanes are taken than their batches run.
        extra_us: from when a request should be done to its answer, where messages wait to be taken in.
        reserve: part of the time for a request that is kept free for what no average foretells, from 0 to 0.4.
    """

    __slots__ = ("_actual_us", "_predicted_us", "extra_us", "factor", "reserve")

    def __init__(self) -> None:
        self.factor = 1.0
        self.extra_us = 0.0
        self.reserve = 0.0
        self._predicted_us = self._actual_us = 0.0

    def observe(self, predicted_us: float, actual_us: float) -> None:
        """Record that a batch predicted to run for `predicted_us` took its lane for `actual_us`."""
        actual_us = min(actual_us, _OUTLIER * self.factor * predicted_us)
        self._predicted_us += _WEIGHT * (predicted_us - self._predicted_us)
        self._actual_us += _WEIGHT * (actual_us - self._actual_us)
        self.factor = min(max(self._actual_us / self._predicted_us, _LEAST_FACTOR), _MOST_FACTOR)

    def answered(self, predicted_us: float, actual_us: float) -> None:
        """Record when the first request of a batch was predicted to be done, and when it was answered."""
        extra_us = min(actual_us - predicted_us, _OUTLIER * max(self.extra_us, predicted_us))
        self.extra_us = max(self.extra_us + _WEIGHT * (extra_us - self.extra_us), 0.0)

    def fared(self, late: int, in_time: int) -> None:
        """Count requests that had to wait: those done late or expired, and those done in time."""
        self.reserve = min(max(self.reserve + late * _MORE - in_time * _LESS, 0.0), _MOST_RESERVE)
