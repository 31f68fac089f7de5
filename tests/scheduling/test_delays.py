"""Batching delays: small batches wait for company."""

from __future__ import annotations

import pytest

from scheduling_helpers import MS, make_scheduler, request, run_one
from tnxd.scheduling.request import NEVER


def test_small_batch_waits_for_company_if_the_model_asks_for_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert scheduler.next_batches(MS) == ([], [])
    assert scheduler.next_event_ns() == 3 * MS
    scheduler.add(request(max_delay_ns=3 * MS), MS)
    ((batch,), _) = scheduler.next_batches(3 * MS)
    assert len(batch.requests) == 2


def test_full_batch_does_not_wait() -> None:
    scheduler = make_scheduler()
    for _ in range(8):
        scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert len(run_one(scheduler).requests) == 8


def test_wait_for_company_begins_anew_after_a_batch() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    run_one(scheduler, 3 * MS)
    scheduler.add(request(max_delay_ns=3 * MS), 4 * MS)
    assert scheduler.next_batches(6 * MS) == ([], [])
    assert len(run_one(scheduler, 7 * MS).requests) == 1


@pytest.mark.parametrize("leaves", ["run", "cancel"])
def test_delay_of_requests_that_have_left_wakes_nobody(leaves: str) -> None:
    scheduler = make_scheduler()
    waiting = [request(max_batch_size=2, max_delay_ns=3 * MS) for _ in range(2)]
    for one in waiting if leaves == "run" else waiting[:1]:
        scheduler.add(one, 0)
    if leaves == "run":
        assert run_one(scheduler).requests == waiting
    else:
        assert scheduler.cancel(waiting[0])
    assert scheduler.next_event_ns() == NEVER


def test_each_batch_has_a_delay_of_its_own() -> None:
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add(request(max_batch_size=2, max_delay_ns=3 * MS), 0)
    run_one(scheduler)
    later = request(max_batch_size=2, max_delay_ns=3 * MS)
    scheduler.add(later, 2 * MS)
    assert scheduler.next_batches(3 * MS) == ([], [])
    assert scheduler.next_batches(5 * MS)[0][0].requests == [later]
