"""Width of batches: whether a batch runs on one core or on several, as measured batch by batch. Pure policy.

On a CPU, several narrow batches side by side, one core each, do more than one wide batch on all cores. A wide batch is
done sooner, with some models. So a batch is wide where nothing else waits, cores enough are idle, and it was found to
gain enough; else each free lane gets a narrow one.

Measured on two cores (images or texts per second, relative to one narrow batch at a time): ResNet-50 makes 1.33 wide
and 1.92 by two narrow batches, MobileNetV3 0.86 and 1.84. Where another process keeps one of the two cores busy, or a
quota does not allow what the cores could do, a wide batch takes two to ten times as long as a narrow one: a team waits
for its slowest thread at every layer. That nobody tells; it shows in what batches take.
"""

from __future__ import annotations

from tnxd.scheduling.costs import CostCurve

# By so much a wide batch has to be faster to be chosen, and to be kept. Whether cores that are idle now are wanted in a
# moment shows in what wide batches take. Where 1.1 was asked, MobileNetV3 and an LSTM, which gain that much, mostly
# stayed narrow.
_ENTER = 1.05
_KEEP = 1.0

# Weight of the newest observation in the moving averages, and of a try of what was given up: it has to tell by itself.
_WEIGHT = 0.2
_TRY_WEIGHT = 0.7

# An observation counts for at most so many times what was expected. Where another process takes a core for a moment,
# two threads share the other one, and a batch of 10 ms takes 50.
_OUTLIER = 2.5

# Narrow batches until the next try of a wide one, after the first one that was too slow. From one failed try to the
# next they double, so that one stall costs little, and a busy neighbour costs hardly more: up to _LONGEST with a model
# that has gained by it, else up to _HOPELESS. There the next try is far, so a slow one is repeated before it counts.
_FIRST = 2
_LONGEST = 64
_HOPELESS = 1024

# Wide batches until the next narrow one shows how long those take now. Fewer would show in the 99th percentile.
_CHECK_NARROW = 200

# As in `tnxd.scheduling.costs`: deviations above the mean that a promise leaves room for.
_DEVIATIONS = 4.0


class Width:
    """Times of narrow and wide batches of one model on one device, as far as they are known.

    All times are relative to what is expected on a lane (`BatchCosts.lane`), so that batches of all sizes and shapes
    that take about as long, within a factor of two, are known together.

    Args:
        threads: that each batch has, as its model says; 0: chosen for each batch.
    """

    __slots__ = ("_gains", "threads")

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        self._gains: dict[int, _Gain] = {}

    def seed(self, lane_us: float, narrow_us: float, wide_us: float) -> None:
        """Note what a batch took both ways before it served. Args: lane_us: expected of it on a lane."""
        if lane_us > 0.0 < wide_us:
            self._gains[_bucket(lane_us)] = _Gain(narrow_us / lane_us, wide_us / lane_us)

    def goes_wide(self, lane_us: float) -> bool:
        """Whether a batch that is expected to take so long on a lane is to be wide, if nothing else is to be done."""
        return self.threads != 1 and lane_us > 0.0 and self._gain(lane_us).goes_wide

    def observe(self, lane_us: float, micros: float, *, wide: bool) -> None:
        """Record what a batch took that began while cores enough were idle, whatever has begun since.

        Others that come meanwhile belong to the traffic that the choice is made for.

        Args:
            lane_us: expected of it on a lane.
        """
        if lane_us > 0.0:
            gain = self._gain(lane_us)
            (gain.observe_wide if wide else gain.observe_narrow)(micros / lane_us)

    def of_wide(self, lane_us: float) -> tuple[float, float, float]:
        """Times of wide batches as parts of what is expected on a lane: expected, mean deviation, and the shortest."""
        gain = self._gain(lane_us)
        return gain.wide, gain.deviation, gain.least

    def doubt(self) -> None:
        """Halve what wide batches are above the shortest ones, and the deviations: the slow spell may be over."""
        for gain in self._gains.values():
            gain.wide = (gain.wide + gain.least) / 2
            gain.deviation /= 2

    def _gain(self, lane_us: float) -> _Gain:
        bucket = _bucket(lane_us)
        gain = self._gains.get(bucket)
        if gain is None:
            nearest = min(self._gains, key=lambda known: abs(known - bucket), default=None)
            known = _Gain(1.0, 1.0) if nearest is None else self._gains[nearest]
            gain = self._gains[bucket] = _Gain(known.narrow, known.wide)
        return gain


def _bucket(micros: float) -> int:
    return int(micros).bit_length()


class _Gain:
    """Times of narrow and of wide batches of about the same size, relative to what is expected on a lane.

    Attributes:
        narrow, wide: moving averages. deviation, least: mean deviation of the wide ones, and the shortest one.
        goes_wide: whether the next batch that may be wide is to be.
    """

    __slots__ = (
        "_since_narrow",
        "_until_try",
        "_wait",
        "_was_slow",
        "deviation",
        "has_gained",
        "is_wide",
        "least",
        "narrow",
        "wide",
    )

    def __init__(self, narrow: float, wide: float) -> None:
        self.narrow = narrow
        self.wide = self.least = wide
        self.deviation = wide / 4
        self.is_wide = self.has_gained = narrow >= _ENTER * wide
        self._wait = _FIRST if self.is_wide else _LONGEST
        self._until_try = 0 if self.is_wide else self._wait
        self._since_narrow = 0
        self._was_slow = False

    @property
    def goes_wide(self) -> bool:
        return self._since_narrow < _CHECK_NARROW if self.is_wide else self._until_try <= 0

    def observe_narrow(self, ratio: float) -> None:
        self._since_narrow = 0
        self._until_try -= 1
        self.narrow += _WEIGHT * (min(ratio, _OUTLIER * self.narrow) - self.narrow)

    def observe_wide(self, ratio: float) -> None:
        off = min(ratio, _OUTLIER * self.wide) - self.wide
        self.wide += (_WEIGHT if self.is_wide else _TRY_WEIGHT) * off
        self.deviation += _WEIGHT * (abs(off) - self.deviation)
        self.least = min(self.least, ratio)
        self._since_narrow += 1
        if self.is_wide:
            if self.narrow < _KEEP * self.wide:
                self.is_wide = False
                self._until_try = self._wait
            elif ratio < self.narrow:
                self._wait = max(self._wait - 1, _FIRST)
            return
        was_slow, self._was_slow = self._was_slow, False
        if self.narrow >= _ENTER * self.wide:
            self.is_wide = self.has_gained = True
        elif self.narrow >= _ENTER * ratio:
            self._until_try = 0  # fast again: the next batches tell whether the slow spell is over
        elif self.narrow >= _KEEP * ratio:
            self._until_try = self._wait  # it has cost nothing
        elif not (was_slow or self.has_gained):
            self._was_slow = True
            self._until_try = _FIRST
        else:
            self._wait = min(2 * self._wait, _LONGEST if self.has_gained else _HOPELESS)
            # The more a try has cost, the later comes the next one.
            self._until_try = int(self._wait * max(ratio / self.narrow, 1.0))


class WideCurve(CostCurve):
    """Curve of the time of wide batches: that of a lane times what was learned about wide ones."""

    __slots__ = ("_lane", "_width")

    def __init__(self, lane: CostCurve, width: Width) -> None:
        super().__init__()
        self._lane = lane
        self._width = width

    def mean(self, rows: int) -> float:
        lane_us = self._lane.mean(rows)
        return lane_us * self._width.of_wide(lane_us)[0]

    def least(self, rows: int) -> float:
        lane_us = self._lane.mean(rows)
        return lane_us * self._width.of_wide(lane_us)[2]

    def doubt(self) -> None:
        self._lane.doubt()
        self._width.doubt()

    def spread(self, rows: int) -> float:
        lane_us = self._lane.mean(rows)
        return _DEVIATIONS * lane_us * self._width.of_wide(lane_us)[1]
