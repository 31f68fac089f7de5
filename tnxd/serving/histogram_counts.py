"""Counts of histograms in arrays of integers, many values at a time."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnxctl.protocol.histograms import BUCKETS, Histogram

# Exponent and first three bits of the mantissa of a float64: from 1.0 on, that counts the buckets one by one.
_SHIFT = np.int64(52 - 3)
_BELOW_ONE = (np.ones(1).view(np.int64)[0] >> _SHIFT) - 1


def as_array(numbers: Sequence[float], columns: int) -> NDArray[np.float64]:
    """Array `[count, columns]` of numbers, which cannot be written to. Takes a quarter of the time of `np.array`."""
    return np.frombuffer(struct.pack(f"{len(numbers)}d", *numbers)).reshape(-1, columns)


class HistogramCounts:
    """Counts of several histograms. Args: histograms: their number."""

    __slots__ = ("_counts", "_offsets", "_sums")

    def __init__(self, histograms: int) -> None:
        self._counts: NDArray[np.int64] = np.zeros((histograms, BUCKETS), np.int64)
        self._sums: NDArray[np.float64] = np.zeros(histograms)
        self._offsets = np.arange(histograms) * BUCKETS

    def add(self, values: NDArray[np.float64]) -> None:
        """Count values. Args: values: `[count, histograms]`, finite."""
        buckets = (values.view(np.int64) >> _SHIFT) - _BELOW_ONE
        buckets = np.minimum(np.maximum(buckets, 0), BUCKETS - 1) + self._offsets  # half the time of np.clip
        self._counts += np.bincount(buckets.ravel(), minlength=self._counts.size).reshape(self._counts.shape)
        self._sums += values.sum(axis=0)

    def histogram(self, place: int) -> Histogram:
        """One of the histograms, as it is told."""
        counts = self._counts[place]
        filled = counts.nonzero()[0]
        if not filled.size:
            return Histogram()
        first, last = int(filled[0]), int(filled[-1])
        return Histogram(first, tuple(counts[first : last + 1].tolist()), float(self._sums[place]))
