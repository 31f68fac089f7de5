"""Batch formation: what runs next on a free lane."""

from __future__ import annotations

import pytest

from scheduling_helpers import MS, affine_costs, cpu, make_scheduler, request, untried_scheduler
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler


def test_free_lane_takes_a_single_request_at_once() -> None:
    scheduler = untried_scheduler()
    only = request()
    scheduler.add(only, 0)
    (batch,) = scheduler.next_batches(0)[0]
    assert batch.requests == [only]
    assert (batch.device.name, batch.lane, batch.rows) == ("cpu", 0, 1)


def test_requests_that_wait_for_a_lane_become_one_batch() -> None:
    scheduler = untried_scheduler()
    scheduler.add(request(), 0)
    (running,) = scheduler.next_batches(0)[0]
    waiting = [request() for _ in range(5)]
    for one in waiting:
        scheduler.add(one, 0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(running, 0.0)
    (batch,) = scheduler.next_batches(0)[0]
    assert batch.requests == waiting


def test_batch_keeps_the_row_limit_and_the_order() -> None:
    scheduler = untried_scheduler()
    requests = [request(rows=rows) for rows in (3, 4, 2, 8, 1)]
    for one in requests:
        scheduler.add(one, 0)
    sizes = []
    while batches := scheduler.next_batches(0)[0]:
        sizes.append([one.rows for one in batches[0].requests])
        scheduler.finished(batches[0], 0.0)
    assert sizes == [[3, 4], [2], [8], [1]]


def test_request_beyond_the_limit_rides_alone() -> None:
    scheduler = untried_scheduler()
    for rows in (20, 1):
        scheduler.add(request(rows=rows), 0)
    (batch,) = scheduler.next_batches(0)[0]
    assert [one.rows for one in batch.requests] == [20]


def test_groups_and_unbatchable_models_never_share_a_batch() -> None:
    scheduler = untried_scheduler(cpu(lanes=9))
    for group in ((1,), (2,), (1,)):
        scheduler.add(request(group=group), 0)
    scheduler.add(request(max_batch_size=0), 0)
    scheduler.add(request(max_batch_size=0), 0)
    batches = scheduler.next_batches(0)[0]
    assert sorted(len(batch.requests) for batch in batches) == [1, 1, 1, 2]
    assert all(len({one.group for one in batch.requests}) == 1 for batch in batches)


def test_models_take_turns_on_one_lane() -> None:
    scheduler = untried_scheduler()
    for _ in range(3):
        scheduler.add(request(rows=8), 0)
        scheduler.add(Request("other", max_batch_size=8, rows=8), 0)
    order = []
    while batches := scheduler.next_batches(0)[0]:
        order.append(batches[0].model)
        scheduler.finished(batches[0], 0.0)
    assert order == ["mlp", "other"] * 3


def test_model_that_got_no_lane_keeps_its_turn() -> None:
    scheduler = untried_scheduler()
    scheduler.add(request(rows=8), 0)
    (running,) = scheduler.next_batches(0)[0]
    scheduler.add(Request("other", max_batch_size=8), 0)
    scheduler.add(request(), 0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(running, 0.0)
    assert scheduler.next_batches(0)[0][0].model == "other"


def with_a_free_lane(waiting: list[Request], costs: CostModel) -> Scheduler:
    """A scheduler whose one lane has become free after these requests came."""
    scheduler = untried_scheduler(costs=costs)
    scheduler.add(request(), 0)
    (running,) = scheduler.next_batches(0)[0]
    for one in waiting:
        scheduler.add(one, 0)
    scheduler.finished(running, 0.0)
    return scheduler


def test_requests_that_a_batch_is_too_late_for_give_their_room_to_others() -> None:
    hopeless = [request(deadline_ns=10 * MS) for _ in range(3)]
    others = [request(deadline_ns=50 * MS) for _ in range(8)]
    scheduler = with_a_free_lane([*hopeless, *others], affine_costs(1000, 100))
    (batch,), late = scheduler.next_batches(9 * MS)  # a batch takes at least 1.1 ms
    assert batch.requests == others
    assert late == hopeless
    assert (scheduler.queued, scheduler.queued_bytes) == (0, 0)


def test_batch_is_shrunk_where_that_saves_the_most_urgent() -> None:
    urgent = request(deadline_ns=10 * MS)
    others = [request(deadline_ns=50 * MS) for _ in range(3)]
    scheduler = with_a_free_lane([urgent, *others], affine_costs(1000, 100))
    (batch,), late = scheduler.next_batches(10 * MS - 1_250_000)  # enough for two rows, not for four
    assert batch.requests == [urgent, others[0]]
    assert late == []


def test_full_batch_is_not_shrunk_where_that_costs_more_than_it_saves() -> None:
    urgent = request(deadline_ns=20 * MS)
    others = [request(deadline_ns=100 * MS) for _ in range(16)]
    scheduler = with_a_free_lane([urgent, *others], affine_costs(5000, 100))
    (batch,), late = scheduler.next_batches(20 * MS - 5_250_000)  # enough for two rows, not for eight
    assert batch.rows == 8
    assert late == [urgent]


@pytest.mark.parametrize("others", [7, 8])
def test_batch_leaves_out_what_it_would_finish_just_in_time_where_enough_others_wait(others: int) -> None:
    costs = CostModel()
    for number in range(200):  # a millisecond, give or take a tenth
        for rows in (1, 8):
            costs.curve("cpu", "mlp").observe(rows, 900.0 if number % 2 else 1100.0)
    scheduler = make_scheduler(costs=costs)
    scheduler.add(request(), 0)
    ((running,), _) = scheduler.next_batches(0)
    tight = [request(deadline_ns=3 * MS) for _ in range(8)]
    relaxed = [request(deadline_ns=30 * MS) for _ in range(others)]
    for one in [*tight, *relaxed]:
        scheduler.add(one, 0)
    now = int(1.95 * MS)
    scheduler.finished(running, 0.0)
    (batch,), late = scheduler.next_batches(now)
    assert (batch.requests, late) == ((tight, []) if others < 8 else (relaxed, tight))


def test_batch_of_one_request_may_finish_just_in_time() -> None:
    costs = CostModel()
    for number in range(200):
        costs.curve("cpu", "mlp").observe(1, 900.0 if number % 2 else 1100.0)
    scheduler = make_scheduler(costs=costs)
    one = request(max_batch_size=0, deadline_ns=3 * MS)
    scheduler.add(one, 0)
    assert scheduler.next_batches(int(1.95 * MS))[0][0].requests == [one]
