"""Traffic of versions, as the serving loop sees it: how their inputs are bound, and how many requests there were."""

from __future__ import annotations

from collections.abc import Set

from tnxd.deployment.version import Version
from tnxd.serving.input_binding import InputBinder


class VersionTraffic:
    """Traffic of one version. Attributes: binder: of its inputs. requests: taken in for it."""

    __slots__ = ("binder", "requests")

    def __init__(self) -> None:
        self.binder = InputBinder()
        self.requests = 0


class TrafficByVersion(dict[Version, VersionTraffic]):
    """Traffic of all versions. That of a version is made when it is first asked for: `traffic[version]`.

    One lookup for each request: binder and count stand together.
    """

    def __missing__(self, version: Version) -> VersionTraffic:
        made = self[version] = VersionTraffic()
        return made

    def requests(self, version: Version) -> int:
        """Requests taken in for a version."""
        return self[version].requests if version in self else 0

    def keep(self, versions: Set[Version]) -> None:
        """Forget all versions but these."""
        for version in self.keys() - versions:
            del self[version]
