"""Slopes: whether a series of samples grows, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

BLOCKS = 16
"""Parts of a series. Of each the smallest value counts: what comes and goes is no leak, what stays is one."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slope:
    """Growth per hour, with the ends of its confidence interval, over so many hours."""

    per_hour: float
    low: float
    high: float
    hours: float

    def grows_by(self, amount: float) -> bool:
        """True if it surely grew by more than that in its time."""
        return self.low * self.hours > amount

    def __str__(self) -> str:
        return f"{self.per_hour:+.2f} per hour ({self.low:+.2f} to {self.high:+.2f})"


def slope(seconds: Sequence[float], values: Sequence[float], blocks: int = BLOCKS) -> Slope:
    """The least-squares slope of the smallest values of equally long parts of a series, of `blocks` samples or more."""
    parts = np.array_split(np.arange(len(values)), blocks)
    lowest = [min(part, key=lambda index: values[index]) for part in parts]
    x = np.array([seconds[index] for index in lowest]) / 3600
    y = np.array([values[index] for index in lowest], float)
    x0 = x - x.mean()
    per_hour = float((x0 * (y - y.mean())).sum() / (x0**2).sum())
    left = y - y.mean() - per_hour * x0
    error = sqrt(float((left**2).sum()) / (blocks - 2) / float((x0**2).sum()))
    reach = _student(0.5 + CONFIDENCE / 2, blocks - 2) * error
    return Slope(per_hour, per_hour - reach, per_hour + reach, (seconds[-1] - seconds[0]) / 3600)


def _student(p: float, df: int) -> float:
    """A quantile of Student's t: the first terms of its expansion (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
