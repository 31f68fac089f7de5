"""Traffic of versions: made when it is first asked for, and forgotten with them."""

from __future__ import annotations

from reconciling import FakeSource
from tnxd.deployment.version import Version
from tnxd.models.builtin import STANDARD, builtin_entries
from tnxd.serving.version_traffic import MOST_GONE, TrafficByVersion


def test_traffic_is_kept_for_the_versions_that_are_there() -> None:
    traffic = TrafficByVersion()
    entry = builtin_entries(STANDARD)[STANDARD[0]]
    old, new = (Version(entry.sources[entry.wanted[0]]) for _ in range(2))
    traffic[old].counts.requests += 1
    assert traffic[old].binder is not traffic[new].binder
    traffic.keep({new})
    assert list(traffic) == [new]


def test_counts_belong_to_a_title_and_outlive_its_versions_up_to_a_number() -> None:
    traffic = TrafficByVersion()
    kept, *others = [Version(FakeSource("net", str(number))) for number in range(1, MOST_GONE + 3)]
    for version in (kept, *others):
        traffic[version].counts.requests += 1
    traffic.keep({kept})
    titles = {title for title, _ in traffic.counts()}
    assert titles == {kept.title, *(version.title for version in others[-MOST_GONE:])}
    back = Version(others[1].source, generation=1)
    traffic.keep({back})
    traffic[back].counts.requests += 1
    assert traffic.requests(back) == 2
    for _ in range(3):
        traffic.keep({back})
    assert {title for title, _ in traffic.counts()} == titles
