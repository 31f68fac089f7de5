"""Cost model: expected times of batches, learned from the batches that ran."""

from __future__ import annotations

from bisect import bisect_left

# Weight of the newest observation in the moving averages: about the last twenty batches count.
_WEIGHT = 0.1

# An observation counts for at most so many times what was expected: one stall of the machine is not the new normal.
_OUTLIER = 8.0

# On the caller's thread it counts for fewer times where it may be the kernel's doing: beside busy lanes that takes the
# core away within one batch in ten or so, for some milliseconds. Counted in full, that would have batches of half a
# millisecond wait for a lane instead. What takes longer, or is the third in a row, is no such stall.
_OUTLIER_INLINE = 2.0
_STALL_US = 10_000.0
_IN_A_ROW = 3

# Means are looked up far more often than they change. What was worked out stays until the curve has moved by so much,
# for so many sizes at most.
_STALE = 0.02
_MOST_SIZES = 1024

# Deviations above the mean that a promise leaves room for. Mean and mean deviation in place of a true quantile is how
# TCP sets its timers (Jacobson, Congestion Avoidance and Control, 1988; RFC 6298).
_DEVIATIONS = 4.0


class CostCurve:
    """Curve of execution time over the batch size, of one model on one device, in microseconds.

    Batch sizes share a point per power of two, at their mean size; between points the curve is straight, beyond the
    last it grows in proportion.

    Args:
        stalled: times what was expected, for which an observation counts at most that may be a stall of the kernel's.
    """

    __slots__ = ("_deviations", "_least", "_means", "_moved", "_points", "_rows", "_slow", "_stalled", "_times")

    def __init__(self, stalled: float = _OUTLIER) -> None:
        self._stalled = stalled
        self._slow = 0  # observations beyond that, in a row
        self._points: dict[int, int] = {}  # bucket -> position in the lists, which are ordered by rows
        self._rows: list[float] = []
        self._times: list[float] = []
        self._deviations: list[float] = []
        self._least: list[float] = []  # the shortest times
        self._means: dict[int, float] = {}  # by rows, as they were worked out last
        self._moved = 0.0  # since then, as a share

    def observe(self, rows: int, micros: float) -> None:
        """Record how long a batch of `rows` took, from its gather to its outputs, in microseconds."""
        bucket = rows.bit_length()
        position = self._points.get(bucket)
        if position is None:
            position = sum(known < bucket for known in self._points)
            self._points = {known: at + (at >= position) for known, at in self._points.items()}
            self._points[bucket] = position
            self._rows.insert(position, float(rows))
            self._times.insert(position, micros)
            self._deviations.insert(position, micros / 4)
            self._least.insert(position, micros)
            self._forget_means()
            return
        expected = self._times[position]
        self._slow = self._slow + 1 if micros > self._stalled * expected else 0
        is_stall = self._slow < _IN_A_ROW and micros - expected < _STALL_US
        off = min(micros, (self._stalled if is_stall else _OUTLIER) * expected) - expected
        mean_rows = self._rows[position]
        self._moved += _WEIGHT * (abs(off) / (expected or 1.0) + abs(rows - mean_rows) / (mean_rows or 1.0))
        if self._moved > _STALE:
            self._forget_means()
        self._rows[position] = mean_rows + _WEIGHT * (rows - mean_rows)
        self._times[position] = expected + _WEIGHT * off
        self._deviations[position] += _WEIGHT * (abs(off) - self._deviations[position])
        if micros < self._least[position]:
            self._least[position] = micros

    def bound(self, rows: int, micros: float) -> None:
        """Bound the mean of `rows` from above: it comes down to `micros` by and by, and never rises for it."""
        if not self._rows or self.mean(rows) > micros:
            self.observe(rows, micros)

    def borrow(self, other: CostCurve) -> None:
        """Copy the points of another curve."""
        self._points = dict(other._points)
        self._rows = list(other._rows)
        self._times = list(other._times)
        self._deviations = list(other._deviations)
        self._least = list(other._least)
        self._forget_means()

    def doubt(self) -> None:
        """Halve what the times are above the shortest ones, and the deviations: the slow spell may be over."""
        self._times = [(micros + least) / 2 for micros, least in zip(self._times, self._least, strict=True)]
        self._deviations = [micros / 2 for micros in self._deviations]
        self._forget_means()

    def mean(self, rows: int) -> float:
        """Expected microseconds of a batch of `rows`; 0 as long as nothing was observed."""
        micros = self._means.get(rows)
        if micros is None:
            if len(self._means) == _MOST_SIZES:
                self._forget_means()
            micros = self._means[rows] = self._interpolate(rows)
        return micros

    def _forget_means(self) -> None:
        self._means.clear()
        self._moved = 0.0

    def _interpolate(self, rows: int) -> float:
        known, times = self._rows, self._times
        if not known:
            return 0.0
        position = bisect_left(known, rows)
        if position == len(known):
            return times[-1] * rows / known[-1] if known[-1] else times[-1]
        if position == 0 or known[position] == rows:
            return times[position]
        below, above = known[position - 1], known[position]
        share = (rows - below) / (above - below)
        return times[position - 1] + share * (times[position] - times[position - 1])

    def rows_within(self, micros: float, most: int) -> int:
        """Largest batch, of at most `most` rows, that is expected to take no longer than `micros`; 0 if none is."""
        least = 0
        while least < most:
            middle = (least + most + 1) // 2
            if self.mean(middle) <= micros:
                least = middle
            else:
                most = middle - 1
        return least

    def spread(self, rows: int) -> float:
        """Microseconds above the mean that a batch rarely exceeds."""
        if not self._rows:
            return 0.0
        position = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        return _DEVIATIONS * self._deviations[position]

    def least(self, rows: int) -> float:
        """Microseconds of the fastest batch of about as many rows; 0 if there was none."""
        return self._least[min(bisect_left(self._rows, rows), len(self._rows) - 1)] if self._rows else 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._rows)

    def points(self) -> dict[int, float]:
        """Points that the curve goes through: rows -> microseconds."""
        return {round(rows): micros for rows, micros in zip(self._rows, self._times, strict=True)}


class BatchCosts:
    """Cost curves of one model and shape group on one device: of its lanes, and of the caller's own thread.

    A batch is meant for the caller's thread if it is expected to take no longer than `inline_limit_us` there. What is
    expected there starts with what lanes took on one thread, and learns from the batches that ran there. Lanes go on to
    bound it from above: a slow spell of the machine must not keep batches on lanes for good, where nothing is learned
    about the caller's thread.

    Args:
        lane, inline: what was learned so far.
        inline_limit_us: 0: nothing runs on the caller's thread.
    """

    __slots__ = ("_inline_limit_us", "inline", "lane")

    def __init__(
        self,
        lane: CostCurve | None = None,
        inline: CostCurve | None = None,
        *,
        inline_limit_us: float = 0.0,
    ) -> None:
        self.lane = CostCurve() if lane is None else lane
        self.inline = CostCurve(_OUTLIER_INLINE) if inline is None else inline
        self._inline_limit_us = inline_limit_us
        if inline_limit_us and self.lane.known and not self.inline.known:
            self.inline.borrow(self.lane)

    def fits_inline(self, rows: int) -> bool:
        """Whether a batch of `rows` is meant for the caller's thread. What was never measured is not."""
        return 0.0 < self.inline.mean(rows) <= self._inline_limit_us

    def rows_inline(self, most: int) -> int:
        """Largest batch, of at most `most` rows, that is meant for the caller's thread; 0 if none is."""
        return self.inline.rows_within(self._inline_limit_us, most) if self.inline.known else 0

    def curve(self, rows: int) -> CostCurve:
        """Curve of the place that a batch of `rows` is meant for."""
        return self.inline if self.fits_inline(rows) else self.lane

    def mean(self, rows: int) -> float:
        """Expected microseconds of a batch of `rows`, where it is meant to run; 0 as long as nothing is known."""
        if self._inline_limit_us:
            micros = self.inline.mean(rows)
            if 0.0 < micros <= self._inline_limit_us:
                return micros
        return self.lane.mean(rows)

    def observe_lane(self, rows: int, micros: float) -> None:
        """Record how long a batch of `rows` took on a lane, where it was not wide, in microseconds."""
        self.lane.observe(rows, micros)
        if self._inline_limit_us:
            self.inline.bound(rows, self.lane.mean(rows))


class CostModel:
    """Cost curves by device, model and shape group, with another where batches run on the caller's own thread.

    Rows alone do not tell the cost of a sequence model: what is long is learned apart from what is short. The number of
    curves is bounded; the least recently used is forgotten first.
    """

    def __init__(self, max_curves: int = 4096) -> None:
        self._max_curves = max_curves
        self._curves: dict[tuple[str, str, tuple[int, ...], bool], CostCurve] = {}

    def curve(self, device: str, model: str, group: tuple[int, ...] = (), *, inline: bool = False) -> CostCurve:
        """Cost curve, an empty one at first."""
        key = (device, model, group, inline)
        known = self._curves.pop(key, None)
        if known is None:
            if len(self._curves) >= self._max_curves:
                del self._curves[next(iter(self._curves))]
            known = CostCurve(_OUTLIER_INLINE if inline else _OUTLIER)
        self._curves[key] = known  # last in the dict: most recently used
        return known

    def points(self, model: str) -> dict[str, dict[int, float]]:
        """Known costs of a model on the lanes of each device: rows -> microseconds, of the group that most is of."""
        found: dict[str, dict[int, float]] = {}
        for (device, key, _, inline), curve in self._curves.items():
            points = curve.points()
            if key == model and not inline and len(points) > len(found.get(device, {})):
                found[device] = points
        return found

    def forget(self, model: str) -> None:
        """Drop all curves of a model."""
        self._curves = {key: curve for key, curve in self._curves.items() if key[1] != model}
