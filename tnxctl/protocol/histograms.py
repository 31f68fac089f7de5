"""Log-linear histograms: counts of values of any size, at a fixed relative precision.

Each octave has eight buckets of equal width, so a bucket's bounds are at most an eighth apart. That is the scheme of
HdrHistogram (http://hdrhistogram.org) with three bits, without its limit to integers. Bucket 0 holds what is below 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import msgspec

STEPS = 8
"""Buckets in an octave."""

BUCKETS = 40 * STEPS + 1
"""Number of buckets. The last one also holds whatever is larger: in microseconds, 12 days."""


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Histogram, on the wire `[first, [count, ...], sum]`.

    Attributes:
        first: number of the bucket that `counts` begins with; empty buckets before and after are left out.
        counts: values in each bucket.
        sum: of all values.

    Raises:
        ValueError: there are buckets out of range, or counts below 0.
    """

    first: int = 0
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.first + len(self.counts) <= BUCKETS or min(self.counts, default=0) < 0:
            raise ValueError(
                f"no histogram has {len(self.counts)} counts from bucket {self.first} on, or negative ones"
            )

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def __sub__(self, earlier: Histogram) -> Histogram:
        """The histogram of what came after an earlier state of the same one.

        Raises:
            ValueError: that is no earlier state, since it has larger counts.
        """
        if not earlier.counts:
            return self
        skipped = earlier.first - self.first
        if skipped < 0 or skipped + len(earlier.counts) > len(self.counts):
            raise ValueError("an earlier state of a histogram has no buckets that are empty later")
        counts = [*self.counts]
        for at, count in enumerate(earlier.counts, skipped):
            counts[at] -= count
        rest = trimmed(counts, self.sum - earlier.sum)
        return Histogram(self.first + rest.first, rest.counts, rest.sum) if rest.counts else rest

    def quantile(self, share: float) -> float:
        """The value below which that share of all values lies, within its bucket as if they were spread evenly.

        Args:
            share: 0 to 1.

        Returns:
            The value, or NaN for an empty histogram.
        """
        wanted = share * self.count
        below = 0
        for bucket, count in enumerate(self.counts, self.first):
            if count and below + count >= wanted:
                lower, upper = bounds(bucket)
                return lower + (upper - lower) * max(wanted - below, 0.0) / count
            below += count
        return math.nan

    def mean(self) -> float:
        """The mean of all values, or NaN for an empty histogram."""
        count = self.count
        return self.sum / count if count else math.nan  # another daemon's may have empty buckets alone

    def cumulative(self, upper_bounds: Iterable[float]) -> list[int]:
        """Number of values up to each of the bounds, as classic Prometheus buckets count. A bucket counts as a whole.

        Args:
            upper_bounds: ascending.
        """
        totals = [0, *accumulate(self.counts)]
        return [totals[min(max(bucket_of(bound) - self.first, 0), len(self.counts))] for bound in upper_bounds]


def bucket_of(value: float) -> int:
    """Number of the bucket of a value. What is no number, or negative, counts as 0."""
    if not value >= 1.0:
        return 0
    mantissa, exponent = math.frexp(min(value, 1e30))
    return min(STEPS * (exponent - 1) + int(2 * STEPS * mantissa) - STEPS + 1, BUCKETS - 1)


def bounds(bucket: int) -> tuple[float, float]:
    """Least value of a bucket, and that of the next one."""
    return _lower_bound(bucket), _lower_bound(bucket + 1)


def _lower_bound(bucket: int) -> float:
    if bucket == 0:
        return 0.0
    octave, step = divmod(bucket - 1, STEPS)
    return math.ldexp(1.0 + step / STEPS, octave)


def trimmed(dense: Sequence[int], total: float) -> Histogram:
    """Histogram of counts for all buckets. Args: dense: from bucket 0 on. total: sum of all values."""
    filled = [bucket for bucket, count in enumerate(dense) if count]
    if not filled:
        return Histogram()
    return Histogram(filled[0], tuple(dense[filled[0] : filled[-1] + 1]), total)
