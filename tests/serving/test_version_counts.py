"""Counts of a version: what waits to become histograms is bounded, whatever the daemon is asked."""

from __future__ import annotations

import sys

from tnxd.serving.version_counts import RecentError, VersionCounts


def test_batches_whose_results_nobody_may_be_sent_pile_up_nowhere() -> None:
    counts = VersionCounts(RecentError())
    sizes = set()
    for _ in range(10_000):
        counts.add_batch(3)
        sizes.add(sys.getsizeof(counts._rows_of_batches))
    assert max(sizes) < 4096
    report = counts.report("net", "1", 0, 0, 0.0)
    assert (report.batches, report.rows, report.stages) == (10_000, 30_000, {})


def test_the_recent_error_forgets() -> None:
    one_by_one, at_once = RecentError(), RecentError()
    for _ in range(64):
        one_by_one.observe(100.0, 1)
    at_once.observe(100.0, 64)
    assert abs(one_by_one.mean_us - at_once.mean_us) < 1e-6
    at_once.observe(5.0, 256)
    assert 5.0 <= at_once.mean_us < 5.1
