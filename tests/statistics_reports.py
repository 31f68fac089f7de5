"""Counts of a daemon that never was, and reports of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tnxctl.protocol.histograms import BUCKETS, Histogram, bucket_of, trimmed
from tnxctl.protocol.statistics import STAGES, StatsReport, VersionStats

Title = tuple[str, str]


class _Growing:
    """Histogram that takes values."""

    def __init__(self) -> None:
        self._dense = [0] * BUCKETS
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._dense[bucket_of(value)] += count
        self._sum += value * count

    def state(self) -> Histogram:
        return trimmed(self._dense, self._sum)


class _Version:
    def __init__(self) -> None:
        self.counters: dict[str, int] = defaultdict(int)
        self.errors: dict[str, int] = defaultdict(int)
        self.stages = {stage: _Growing() for stage in STAGES}
        self.batch_rows = _Growing()


class Counts:
    """Counts that grow with what happens.

    Args:
        started_s: start of the daemon, as its reports say.
    """

    def __init__(self, started_s: float = 1000.0) -> None:
        self._started_s = started_s
        self._uptime_us = 0.0
        self._versions: dict[Title, _Version] = defaultdict(_Version)
        self._loop_turns = _Growing()

    def passed(self, us: float) -> None:
        """Time passed."""
        self._uptime_us += us

    def turned(self, us: float) -> None:
        """The loop turned once."""
        self._loop_turns.add(us)

    def replied(self, title: Title, stages_us: Sequence[float], count: int = 1) -> None:
        """Requests got their results after these times, by `STAGES` without the total."""
        version = self._versions[title]
        for name in ("requests", "replies"):
            version.counters[name] += count
        for stage, us in zip(STAGES, (*stages_us, sum(stages_us)), strict=True):
            version.stages[stage].add(us, count)

    def failed(self, title: Title, code: str) -> None:
        """A request got an error."""
        version = self._versions[title]
        version.counters["requests"] += 1
        version.errors[code] += 1

    def ran(self, title: Title, rows: int, count: int = 1) -> None:
        """Batches with so many rows ran."""
        version = self._versions[title]
        version.counters["rows"] += rows * count
        version.counters["batches"] += count
        version.batch_rows.add(rows, count)

    def report(self, **others: Any) -> StatsReport:
        """The report of now. Args: others: fields of `StatsReport` in place of what they would be."""
        errors: dict[str, int] = defaultdict(int)
        for version in self._versions.values():
            for code, count in version.errors.items():
                errors[code] += count
        counted = {
            name: sum(version.counters[name] for version in self._versions.values()) for name in ("requests", "replies")
        }
        models = tuple(
            VersionStats(
                name=name,
                version=number,
                errors=dict(version.errors),
                stages={stage: times.state() for stage, times in version.stages.items()},
                batch_rows=version.batch_rows.state(),
                **version.counters,
            )
            for (name, number), version in self._versions.items()
        )
        fields: dict[str, Any] = {
            "started_s": self._started_s,
            "uptime_us": self._uptime_us,
            "models": models,
            "errors": dict(errors),
            "loop_turns": self._loop_turns.state(),
            **counted,
        }
        return report(**(fields | others))


def report(**fields: Any) -> StatsReport:
    """A report with these fields, and nothing else in it."""
    return StatsReport(**({"v": 1, "id": 0, "status": "ready", "version": "0.1.0", "started_s": 1000.0} | fields))
