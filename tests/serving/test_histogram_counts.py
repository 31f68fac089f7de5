"""Counts in arrays against the histograms of the protocol, which count one value at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tnxctl.protocol.histograms import BUCKETS, Histogram, bounds, bucket_of
from tnxd.serving.histogram_counts import HistogramCounts, as_array


def edges() -> list[float]:
    """Values at which buckets begin, and those just below."""
    lower = [bounds(bucket)[0] for bucket in range(BUCKETS)]
    return [*lower, *np.nextafter(lower, -np.inf), 0.0, -0.0, -1.0, 1e-300, 1e15, 1e30, 1e300]


def one_by_one(values: list[float]) -> dict[int, int]:
    """Values in each bucket."""
    return dict(Counter(map(bucket_of, values)))


def as_counts(histogram: Histogram) -> dict[int, int]:
    return {bucket: count for bucket, count in enumerate(histogram.counts, histogram.first) if count}


def test_every_value_is_in_the_bucket_that_the_protocol_says() -> None:
    values = edges()
    counts = HistogramCounts(1)
    counts.add(as_array(values, 1))
    assert as_counts(counts.histogram(0)) == one_by_one(values)


def test_several_histograms_grow_side_by_side() -> None:
    chance = np.random.default_rng(3)
    values = 10.0 ** chance.uniform(-2, 9, (2000, 3))
    counts = HistogramCounts(4)
    for start in range(0, 2000, 300):
        numbers = np.hstack([values[start : start + 300], np.full((min(300, 2000 - start), 1), 7.0)])
        counts.add(as_array(numbers.ravel().tolist(), 4))
    for place in range(3):
        histogram = counts.histogram(place)
        assert as_counts(histogram) == one_by_one(values[:, place].tolist())
        assert histogram.sum == pytest.approx(values[:, place].sum())
    assert counts.histogram(3) == Histogram(bucket_of(7.0), (2000,), 14_000.0)


def test_nothing_is_an_empty_histogram() -> None:
    assert HistogramCounts(1).histogram(0) == Histogram()
