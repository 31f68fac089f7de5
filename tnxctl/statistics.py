"""Differences of two reports of a daemon's counts: rates, percentiles and shares of the time between them.

Pure: the two reports say all, the time between them included, by the daemon's own steady clock. Where the daemon was
restarted in between, what it did before is lost, and the time begins with its start: no rate is ever negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.statistics import STAGES, ClientStats, DeviceStats, StatsReport, VersionStats

ON_A_LANE = ("gather", "h2d", "compute", "d2h")
"""Stages in which a request is on a lane, in `STAGES`."""

GREW_BY = 1.25
"""Factor from which on a percentile counts as grown. The buckets of a histogram are an eighth apart."""

_TOLD_BY = ((200, 0.99), (20, 0.9), (4, 0.5))
"""Fewest requests, and the highest percentile that so many tell: two are above it."""


class _VersionCounts:
    """Counts of a version that only grow, as in `VersionStats`."""

    requests: int
    replies: int
    abandoned: int
    rows: int
    batches: int
    deadlines_met: int
    deadlines_missed: int
    steals: int
    splits: int
    evictions: int


class _DaemonCounts:
    """Counts of a daemon that only grow, as in `StatsReport`."""

    requests: int
    replies: int
    resent: int
    undeliverable: int
    abandoned: int
    connections_refused: int
    connections_cut: int
    log_lines_dropped: int
    spans_dropped: int


_VERSION_COUNTERS = tuple(_VersionCounts.__annotations__)
_DAEMON_COUNTERS = tuple(_DaemonCounts.__annotations__)


class VersionInterval(_VersionCounts):
    """Counts of one version of a model in an interval, and what follows from them.

    Attributes:
        after: its counts at the end; queued rows and the predicted wait are of that moment.
        seconds: length of the interval.
        errors: by code, in the interval, as are all `_VersionCounts`.
    """

    def __init__(self, before: VersionStats | None, after: VersionStats, seconds: float) -> None:
        if before is None or _fell(before, after, _VERSION_COUNTERS) or _lost(before.errors, after.errors):
            before = VersionStats(name=after.name, version=after.version)
        self._before = before
        self.after = after
        self.seconds = seconds
        _subtract(self, before, after, _VERSION_COUNTERS)
        self.errors = _minus(after.errors, before.errors)
        self._stages: dict[str, Histogram] = {}
        self._quantiles_us: dict[tuple[str, float], float] = {}

    @property
    def title(self) -> str:
        """NAME@VERSION."""
        return f"{self.after.name}@{self.after.version}"

    def per_second(self, count: float) -> float:
        """A count of this interval as a rate per second."""
        return _per_second(count, self.seconds)

    @property
    def error_count(self) -> int:
        """Error replies of any code."""
        return sum(self.errors.values())

    def stage(self, name: str) -> Histogram:
        """Times in µs that the requests with results spent in one of `STAGES`."""
        found = self._stages.get(name)
        if found is None:
            empty = Histogram()
            found = _since(self._before.stages.get(name, empty), self.after.stages.get(name, empty))
            self._stages[name] = found
        return found

    def mean_us(self, stage: str) -> float:
        """Mean time in µs in one of `STAGES`; NaN where no request had a result."""
        return self.stage(stage).mean()

    def quantile_us(self, stage: str, share: float) -> float:
        """Time in µs below which that share, 0 to 1, of the requests with results stayed in a stage; NaN for none."""
        found = self._quantiles_us.get((stage, share))
        if found is None:
            found = self._quantiles_us[stage, share] = self.stage(stage).quantile(share)
        return found

    @cached_property
    def batch_rows(self) -> Histogram:
        """Rows per batch."""
        return _since(self._before.batch_rows, self.after.batch_rows)

    @cached_property
    def prediction_error(self) -> Histogram:
        """Distances in µs between predicted and actual time, queue to d2h."""
        return _since(self._before.prediction_error, self.after.prediction_error)

    @property
    def rows_per_batch(self) -> float:
        """Mean rows per batch; NaN without batches."""
        return self.rows / self.batches if self.batches > 0 else math.nan

    @property
    def missed_share(self) -> float:
        """Part of the requests with a deadline that missed it, 0 to 1; NaN where none had one."""
        both = self.deadlines_met + self.deadlines_missed
        return self.deadlines_missed / both if both else math.nan

    @property
    def lanes(self) -> float:
        """Number of lanes that its batches kept busy on average: batches times the mean time of a request on a lane.

        An estimate: requests in large batches count as often as they are, and the serving thread's batches are in it.
        """
        on_a_lane = sum(self.mean_us(stage) for stage in ON_A_LANE if self.stage(stage).counts)
        return self.per_second(self.batches) * on_a_lane / 1e6


class DeviceInterval:
    """Use of one device in an interval.

    Attributes:
        after: its counts at the end; status, lanes, queued rows and memory are of that moment.
        busy_us: time that its lanes ran batches, summed over them. inline_us: time that batches for it ran on the
            serving thread.
    """

    def __init__(self, before: DeviceStats | None, after: DeviceStats, seconds: float) -> None:
        if before is None:
            before = DeviceStats(name=after.name, status=after.status)
        self.after = after
        # Devices do not begin anew: times that fell are those of a batch that was counted while it ran, and given up.
        self.busy_us = max(after.busy_us - before.busy_us, 0.0)
        self.inline_us = max(after.inline_us - before.inline_us, 0.0)
        self._us = seconds * 1e6

    @property
    def busy_share(self) -> float:
        """Part of its lanes' time in which they ran batches, 0 to 1."""
        return _share(self.busy_us, self.after.lanes * self._us)

    @property
    def inline_share(self) -> float:
        """Part of the serving thread's time in which that ran batches for it, 0 to 1."""
        return _share(self.inline_us, self._us)


class ClientInterval:
    """Requests of one client in an interval.

    Attributes:
        after: its counts at the end; what is in flight and owed is of that moment.
        requests, refused: in the interval; None where that is not known, since it had no entry of its own before.
    """

    def __init__(self, before: ClientStats | None, after: ClientStats, seconds: float, is_known: bool) -> None:
        self.after = after
        self._seconds = seconds
        self.requests: int | None = None
        self.refused: int | None = None
        if before is not None and not _fell(before, after, ("requests", "refused")):
            self.requests, self.refused = after.requests - before.requests, after.refused - before.refused
        elif is_known:
            self.requests, self.refused = after.requests, after.refused

    def per_second(self, count: int | None) -> float:
        """A count of this interval as a rate per second; NaN where it is not known."""
        return math.nan if count is None else _per_second(count, self._seconds)


class Interval(_DaemonCounts):
    """The time between two reports of one daemon, and what it did in it.

    Two intervals side by side have the counts of the whole, where nothing began anew: counts of a version that fell
    are counts since it came back.

    Args:
        before: None: the daemon's start.
        after: a later report.

    Attributes:
        after: the later report; what is queued, running and connected is of that moment.
        restarted: whether the daemon was restarted in between: then the interval begins with its start.
        seconds: length of the interval.
        versions, devices, clients: those of `after`, in its order. gone: titles of versions that only `before` has.
        errors: by code, in the interval, as are all `_DaemonCounts`.
    """

    def __init__(self, before: StatsReport | None, after: StatsReport) -> None:
        self.restarted = before is not None and restarted(before, after)
        if before is None or self.restarted:
            before = StatsReport(v=after.v, id=0, status="", version="", started_s=after.started_s, uptime_us=0.0)
        self._before = before
        self.after = after
        self.seconds = (after.uptime_us - before.uptime_us) / 1e6
        _subtract(self, before, after, _DAEMON_COUNTERS)
        self.errors = _minus(after.errors, before.errors)
        versions = {(model.name, model.version): model for model in before.models}
        self.versions = tuple(
            VersionInterval(versions.pop((model.name, model.version), None), model, self.seconds)
            for model in after.models
        )
        self.gone = tuple(f"{name}@{version}" for name, version in versions)
        devices = {device.name: device for device in before.devices}
        self.devices = tuple(DeviceInterval(devices.get(device.name), device, self.seconds) for device in after.devices)
        clients = {client.name: client for client in before.clients}
        self.clients = tuple(
            ClientInterval(clients.get(client.name), client, self.seconds, is_known="" not in clients)
            for client in after.clients
        )

    def per_second(self, count: float) -> float:
        """A count of this interval as a rate per second."""
        return _per_second(count, self.seconds)

    @property
    def error_count(self) -> int:
        """Error replies of any code."""
        return sum(self.errors.values())

    @cached_property
    def loop_turns(self) -> Histogram:
        """Lengths in µs of the serving loop's busy turns."""
        return _since(self._before.loop_turns, self.after.loop_turns)

    def version(self, title: str) -> VersionInterval | None:
        """The version with this title, NAME@VERSION; None if there is none."""
        return next((version for version in self.versions if version.title == title), None)


class Growth(NamedTuple):
    """A stage that takes longer than before.

    Attributes:
        share: 0.99 where its p99 is meant. before_us, now_us: this percentile, in µs.
    """

    stage: str
    share: float
    before_us: float
    now_us: float

    @property
    def added_us(self) -> float:
        """The µs by which it grew."""
        return self.now_us - self.before_us


def growth(before: VersionInterval | None, now: VersionInterval) -> Growth | None:
    """The stage that grew by most µs, where the whole grew by a quarter or more, both by their p99, p90 or p50.

    The highest of these that grew counts. A lower one tells where there are too few requests for a higher one, or where
    the slow ones have been coming for so long that they are the p99 of the time before as well.

    Returns:
        None: nothing grew so much, or there were too few requests for any of them.
    """
    if before is None:
        return None
    fewest = min(now.stage("total").count, before.stage("total").count)
    for least, share in _TOLD_BY:
        if fewest >= least and now.quantile_us("total", share) >= GREW_BY * before.quantile_us("total", share):
            return _grown(before, now, share)
    return None


def _grown(before: VersionInterval, now: VersionInterval, share: float) -> Growth | None:
    found = [
        Growth(stage, share, before.quantile_us(stage, share), now.quantile_us(stage, share))
        for stage in STAGES
        if stage != "total" and now.stage(stage).counts and before.stage(stage).counts
    ]
    grown = max(found, key=lambda each: each.added_us, default=None)
    return grown if grown is not None and grown.now_us >= GREW_BY * grown.before_us else None


def restarted(before: StatsReport, after: StatsReport) -> bool:
    """Whether two reports are of two lives of a daemon: with another start, or with counts that fell."""
    return (
        after.started_s != before.started_s
        or _fell(before, after, ("uptime_us", *_DAEMON_COUNTERS))
        or _lost(before.errors, after.errors)
    )


def _subtract(interval: object, before: object, after: object, counters: Iterable[str]) -> None:
    """Give an interval the counts that came in it."""
    for name in counters:
        setattr(interval, name, getattr(after, name) - getattr(before, name))


def _fell(before: object, after: object, counters: Iterable[str]) -> bool:
    return any(getattr(after, name) < getattr(before, name) for name in counters)


def _lost(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether a count by code fell, or is gone."""
    return any(after.get(code, 0) < count for code, count in before.items())


def _minus(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Counts by code that came in between."""
    return {code: more for code, count in after.items() if (more := count - before.get(code, 0))}


def _since(before: Histogram, after: Histogram) -> Histogram:
    """The values that came between two states of a histogram; all of the later one if it began anew in between."""
    if not before.counts:
        return after
    try:
        return after - before
    except ValueError:
        return after


def _per_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _share(part_us: float, whole_us: float) -> float:
    return min(part_us / whole_us, 1.0) if whole_us > 0 else 0.0
