"""Traffic of versions, as the serving loop sees it: how their inputs are bound, and what became of their requests."""

from __future__ import annotations

from collections.abc import Iterator, Set

from tnxd.deployment.version import Version
from tnxd.serving.input_binding import InputBinder
from tnxd.serving.version_counts import RecentError, VersionCounts

MOST_GONE = 256
"""Versions that are there no more whose counts are kept."""


class VersionTraffic:
    """Traffic of one version. Attributes: binder: of its inputs. counts: of what has the same title, `NAME@VERSION`."""

    __slots__ = ("binder", "counts")

    def __init__(self, counts: VersionCounts) -> None:
        self.binder = InputBinder()
        self.counts = counts


class TrafficByVersion(dict[Version, VersionTraffic]):
    """Traffic of all versions. That of a version is made when it is first asked for: `traffic[version]`.

    One lookup for each request: binder and counts stand together. Counts only grow, so they belong to the title of a
    version, whatever files it is made of, and outlive it: those of the last `MOST_GONE` versions to go are kept.

    Attributes:
        recent_error: of the predictions for all versions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recent_error = RecentError()
        self._counts: dict[str, VersionCounts] = {}
        self._gone: dict[str, None] = {}  # in the order in which they went

    def __missing__(self, version: Version) -> VersionTraffic:
        counts = self._counts.get(version.title)
        if counts is None:
            counts = self._counts[version.title] = VersionCounts(self.recent_error)
        made = self[version] = VersionTraffic(counts)
        return made

    def requests(self, version: Version) -> int:
        """Requests taken in for a version."""
        counts = self._counts.get(version.title)
        return counts.requests if counts is not None else 0

    def counts(self) -> Iterator[tuple[str, VersionCounts]]:
        """Counts of all versions that were ever asked, by title."""
        return iter(self._counts.items())

    def fold(self) -> None:
        """Put all that has been counted into histograms."""
        for counts in self._counts.values():
            counts.fold()

    def end_slot(self) -> None:
        """Begin a new slot of time for the slowest requests, see `Slowest`."""
        for counts in self._counts.values():
            counts.slowest.end_slot()

    def keep(self, versions: Set[Version]) -> None:
        """Forget all versions but these, and of the others the counts of those that went long ago."""
        for version in self.keys() - versions:
            del self[version]
        titles = {version.title for version in versions}
        self._gone = {title: None for title in self._gone if title not in titles}
        for title in self._counts:
            if title not in titles:
                self._gone.setdefault(title)
        for title in list(self._gone)[:-MOST_GONE]:
            del self._gone[title], self._counts[title]
