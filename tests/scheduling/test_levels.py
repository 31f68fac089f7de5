"""Levels share a device by stride scheduling."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduling_helpers import make_scheduler, request, run_one
from tnxd.scheduling.costs import CostModel


def test_higher_level_goes_first() -> None:
    scheduler = make_scheduler()
    for priority in (3, 2, 1, 0):
        scheduler.add(request(rows=8, priority=priority), 0)
    assert [run_one(scheduler).requests[0].priority for _ in range(4)] == [0, 1, 2, 3]


def test_levels_share_by_their_tickets_and_none_starves() -> None:
    scheduler = make_scheduler()
    for priority in range(4):
        for _ in range(200):
            scheduler.add(request(rows=8, priority=priority), 0)
    counts = Counter(run_one(scheduler).requests[0].priority for _ in range(150))
    assert counts[0] == pytest.approx(80, abs=3)
    assert counts[1] == pytest.approx(40, abs=3)
    assert counts[2] == pytest.approx(20, abs=3)
    assert counts[3] == pytest.approx(10, abs=3)


def test_level_that_was_idle_does_not_make_up_for_it() -> None:
    scheduler = make_scheduler()
    for _ in range(300):
        scheduler.add(request(rows=8, priority=1), 0)
    for _ in range(100):
        run_one(scheduler)
    for _ in range(100):
        scheduler.add(request(rows=8, priority=0), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert order[0] == 0
    assert 8 <= order.count(1) <= 12


def test_level_that_finds_the_device_idle_does_not_make_up_for_its_past() -> None:
    scheduler = make_scheduler()
    for _ in range(100):
        scheduler.add(request(rows=8, priority=1), 0)
        run_one(scheduler)
    for priority in (0, 1):
        for _ in range(60):
            scheduler.add(request(rows=8, priority=priority), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert 8 <= order.count(1) <= 12


def test_level_whose_batches_always_fail_does_not_have_the_device_for_nothing() -> None:
    scheduler = make_scheduler(costs=CostModel())
    for priority in (0, 1):
        for _ in range(60):
            scheduler.add(request(rows=8, priority=priority), 0)
    order = []
    for _ in range(30):
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 0.0)  # what failed tells nothing about costs
        order.append(batch.requests[0].priority)
    assert 8 <= order.count(1) <= 12
