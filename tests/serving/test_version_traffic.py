"""Traffic of versions: made when it is first asked for, and forgotten with them."""

from __future__ import annotations

from tnxd.deployment.version import Version
from tnxd.models.builtin import STANDARD, builtin_entries
from tnxd.serving.version_traffic import TrafficByVersion


def test_traffic_is_kept_for_the_versions_that_are_there() -> None:
    traffic = TrafficByVersion()
    entry = builtin_entries(STANDARD)[STANDARD[0]]
    old, new = (Version(entry.sources[entry.wanted[0]]) for _ in range(2))
    traffic[old].requests += 1
    traffic[new].requests += 2
    assert traffic[old].binder is not traffic[new].binder
    traffic.keep({new})
    assert (traffic.requests(old), traffic.requests(new)) == (0, 2)
    assert list(traffic) == [new]
