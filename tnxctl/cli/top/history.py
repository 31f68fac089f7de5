"""Reports of the last minute or so, and the two times that are held against each other: now, and before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tnxctl.cli import intervals
from tnxctl.protocol.statistics import StatsReport
from tnxctl.statistics import Interval, restarted

NOW_S = 5.0
"""Length of what counts as now: long enough for percentiles, short enough to see a change."""

BEFORE_S = 60.0
"""Length of the time before it that a minute has."""

_STEP_US = 1e6  # between two reports that are kept: a daemon with many models has large ones
_SHORTEST_S = 10.0


class Look(NamedTuple):
    """A look at a daemon.

    Attributes:
        now: the last seconds; of the first report, all since the daemon's start.
        before: the time that it is held against, and `against` in words. None: there is none yet.
        restarted: whether a restart was seen. slower: versions that became slower, the one by most first.
    """

    now: Interval
    before: Interval | None
    against: str
    restarted: bool
    slower: Sequence[intervals.Slower] = ()


class History:
    """Reports of one daemon as they come. After a restart, those of its last life are forgotten."""

    def __init__(self) -> None:
        self._kept: deque[StatsReport] = deque()
        self._restarted = False
        self._before: tuple[StatsReport | None, StatsReport, Interval] | None = None

    def add(self, report: StatsReport) -> None:
        kept = self._kept
        if kept and restarted(kept[-1], report):
            kept.clear()
            self._restarted = True
        if len(kept) > 1 and report.uptime_us - kept[-2].uptime_us < _STEP_US:
            kept[-1] = report
        else:
            kept.append(report)
        while len(kept) > 2 and kept[1].uptime_us <= report.uptime_us - (NOW_S + BEFORE_S) * 1e6:
            kept.popleft()

    def look(self, since_start: bool) -> Look | None:
        """Look at the daemon as it is now; None before the first report.

        Args:
            since_start: hold it against all since the daemon's start, else against the minute before, as soon as that
                was watched for ten seconds.
        """
        if not self._kept:
            return None
        newest = self._kept[-1]
        if len(self._kept) == 1:
            return Look(Interval(None, newest), None, "", self._restarted)
        base = self._kept[0]
        for report in self._kept:
            if report.uptime_us > newest.uptime_us - NOW_S * 1e6:
                break
            base = report
        oldest = self._kept[0]
        is_watched = base.uptime_us - oldest.uptime_us >= _SHORTEST_S * 1e6
        start = oldest if is_watched and not since_start else None
        against = "the start" if start is None else "the last minute"
        now, before = Interval(base, newest), self._interval_before(start, base)
        return Look(now, before, against, self._restarted, intervals.slower(now, before))

    def _interval_before(self, start: StatsReport | None, base: StatsReport) -> Interval:
        """The interval up to now, whose percentiles are worked out once while its ends stay."""
        if self._before is None or self._before[0] is not start or self._before[1] is not base:
            self._before = (start, base, Interval(start, base))
        return self._before[2]
