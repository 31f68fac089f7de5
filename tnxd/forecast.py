"""Forecasts of when requests are done, corrected by how those before them fared."""

from __future__ import annotations

# Weight of the newest batch in the moving averages.
_WEIGHT = 0.05
_LEAST_FACTOR, _MOST_FACTOR = 0.7, 4.0

# Shorter waits than this tell of chance, and not of what was wrong with the prediction. A single one counts for so many
# times what was predicted at most: a stall of the machine says nothing about the next request.
_FROM_US = 500.0
_OUTLIER = 8.0

# After a batch with requests that were late, so much more of a deadline is kept free, and so much less after one in
# time: where it stands still, one batch in four hundred has late requests (Robbins and Monro, 1951).
_MORE = 0.03
_LESS = _MORE / 400
_MOST_RESERVE = 0.5


class Forecast:
    """Corrections of what is predicted for one model on one device.

    A prediction adds up what batches take. It knows nothing of what else the process does meanwhile: to take requests
    in, to refuse others, to send answers; nor of neighbours on the machine. All of that shows in how long requests
    waited in the end.

    Attributes:
        factor: by how much longer requests wait than predicted.
        reserve: part of a deadline that is kept free for what no average foretells, from 0 to 0.5.
    """

    __slots__ = ("_actual_us", "_predicted_us", "factor", "reserve")

    def __init__(self) -> None:
        self.factor = 1.0
        self.reserve = 0.0
        self._predicted_us = self._actual_us = _FROM_US

    def observe(self, predicted_us: float, actual_us: float) -> None:
        """Requests of a batch waited for `actual_us`, after `predicted_us` had been predicted without correction."""
        if predicted_us < _FROM_US:
            return
        actual_us = min(actual_us, _OUTLIER * predicted_us)
        self._predicted_us += _WEIGHT * (predicted_us - self._predicted_us)
        self._actual_us += _WEIGHT * (actual_us - self._actual_us)
        self.factor = min(max(self._actual_us / self._predicted_us, _LEAST_FACTOR), _MOST_FACTOR)

    def was_late(self) -> None:
        """A promise was not kept, or those of a batch were not."""
        self.reserve = min(self.reserve + _MORE, _MOST_RESERVE)

    def was_in_time(self) -> None:
        """The promises of a batch were kept."""
        self.reserve = max(self.reserve - _LESS, 0.0)
