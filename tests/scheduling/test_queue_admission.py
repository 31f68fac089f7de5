"""Admission control: deadlines and limits."""

from __future__ import annotations

import pytest

from scheduling_helpers import (
    MS,
    affine_costs,
    make_scheduler,
    request,
    run_one,
    scheduler_with_inline,
    untried_scheduler,
)
from tnxctl.protocol.errors import DeadlineExceeded, ResourceExhausted


def test_full_queue_refuses_by_requests_and_by_bytes() -> None:
    scheduler = untried_scheduler(max_requests=2)
    scheduler.add(request(), 0)
    scheduler.add(request(), 0)
    with pytest.raises(ResourceExhausted, match="2 requests"):
        scheduler.add(request(), 0)
    scheduler = untried_scheduler(max_bytes=10)
    scheduler.add(request(nbytes=8), 0)
    with pytest.raises(ResourceExhausted, match="limit, 10"):
        scheduler.add(request(nbytes=4), 0)


def test_urgent_request_is_not_refused_for_what_is_due_later() -> None:
    scheduler = untried_scheduler(costs=affine_costs(1000, 100))
    for _ in range(80):
        scheduler.add(request(deadline_ns=500 * MS), 0)
    urgent = request(deadline_ns=4 * MS)
    scheduler.add(urgent, 0)
    assert urgent.predicted_us == pytest.approx(1100, rel=0.01)
    assert scheduler.next_batches(0)[0][0].requests[0] is urgent


def test_request_is_refused_for_what_is_due_before_it() -> None:
    scheduler = untried_scheduler(costs=affine_costs(1000, 100))
    for _ in range(80):  # ten batches of 1.8 ms
        scheduler.add(request(deadline_ns=19 * MS), 0)
    with pytest.raises(DeadlineExceeded, match="predicted wait is 18 ms"):
        scheduler.add(request(deadline_ns=19 * MS + 1), 0)
    scheduler.add(request(deadline_ns=18 * MS), 0)


def test_request_that_can_be_done_in_time_is_admitted() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(deadline_ns=2 * MS), 0)
    assert len(run_one(scheduler).requests) == 1


def test_request_that_would_be_late_is_refused_with_the_predicted_wait() -> None:
    scheduler = make_scheduler()
    for deadline_us in (1500, 2500, 3500):
        for _ in range(8):
            scheduler.add(request(deadline_ns=deadline_us * 1000), 0)
    with pytest.raises(DeadlineExceeded, match="predicted wait is 3 ms and then 1 ms"):
        scheduler.add(request(deadline_ns=3700 * 1000), 0)
    scheduler.add(request(deadline_ns=4700 * 1000), 0)
    assert scheduler.queued == 25


def test_urgent_request_is_not_refused_for_what_it_overtakes() -> None:
    scheduler = make_scheduler()
    for _ in range(1000):
        scheduler.add(request(), 0)
    urgent = request(deadline_ns=3 * MS)
    scheduler.add(urgent, 0)
    assert urgent in run_one(scheduler).requests


def test_running_batch_counts_with_what_is_left_of_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(), 0)
    scheduler.next_batches(0)
    with pytest.raises(DeadlineExceeded):
        scheduler.add(request(deadline_ns=MS + MS // 2), 0)
    scheduler.add(request(deadline_ns=MS + MS // 2 + 9 * MS // 10), 9 * MS // 10)


@pytest.mark.parametrize(("came_ns", "says_when"), [(7 * MS, True), (10 * MS, False)], ids=["waited", "came just now"])
def test_refusal_says_when_to_come_back_if_the_request_would_be_in_time_had_it_just_come(
    came_ns: int, says_when: bool
) -> None:
    """A message that stood in its socket for too long is late though nothing waits; its client must hear of it."""
    scheduler = scheduler_with_inline(lane_us=1000.0)
    deadline_ns = 21 * MS // 2
    with pytest.raises(DeadlineExceeded) as refused:
        scheduler.add(request(rows=8, came_ns=came_ns, deadline_ns=deadline_ns), 10 * MS)
    assert (refused.value.retry_after_s is not None) is says_when


def test_caller_that_is_behind_promises_less() -> None:
    """The time beyond a batch is learned from answers, and counts where messages wait to be taken in."""
    scheduler = scheduler_with_inline(lane_us=1000.0)
    for _ in range(100):
        scheduler.add(request(rows=8), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 1000.0, 5 * MS)
    scheduler.add(request(rows=8, came_ns=10 * MS, deadline_ns=13 * MS), 10 * MS)
    run_one(scheduler)
    with pytest.raises(DeadlineExceeded):
        scheduler.add(request(rows=8, came_ns=9 * MS, deadline_ns=13 * MS), 10 * MS)


def test_model_may_not_fill_the_queue_of_all() -> None:
    scheduler = make_scheduler(max_per_model=2)
    scheduler.add(request(), 0)
    scheduler.add(request(), 0)
    with pytest.raises(ResourceExhausted, match=r"2 requests for 'mlp'.*predicted wait is"):
        scheduler.add(request(), 0)
    scheduler.add(request(model="other"), 0)
    run_one(scheduler)
    scheduler.add(request(), 0)


def test_model_may_not_fill_the_memory_of_all() -> None:
    scheduler = make_scheduler(max_bytes_per_model=10)
    first = request(nbytes=6)
    scheduler.add(first, 0)
    with pytest.raises(ResourceExhausted, match=r"6 bytes are queued for 'mlp' and 5 more .*, 10; the predicted wait"):
        scheduler.add(request(nbytes=5), 0)
    scheduler.add(request(model="other", nbytes=10), 0)
    scheduler.add(request(nbytes=4), 0)
    assert scheduler.cancel(first)
    scheduler.add(request(nbytes=6), 0)
