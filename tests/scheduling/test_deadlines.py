"""Deadlines that come while requests wait or run."""

from __future__ import annotations

import contextlib

import pytest

from scheduling_helpers import MODELS, MS, make_scheduler, memory_kept, request, run_one
from tnxd.lanes import INLINE
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER


def test_request_that_expires_in_the_queue_is_reported_once_and_never_run() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(), 0)
    ((running,), _) = scheduler.next_batches(0)
    scheduler.finished(running, 1000.0)
    scheduler.add(request(), 0)
    ((running,), _) = scheduler.next_batches(0)
    waiting = request(deadline_ns=5 * MS)
    scheduler.add(waiting, 0)
    assert scheduler.next_event_ns() == 5 * MS
    assert scheduler.expire(5 * MS - 1) == []
    assert scheduler.expire(5 * MS) == [waiting]
    assert scheduler.expire(6 * MS) == []
    assert scheduler.next_event_ns() == NEVER
    scheduler.finished(running, 6000.0)
    assert scheduler.next_batches(6 * MS) == ([], [])
    assert scheduler.queued == 0


def test_request_that_became_hopeless_is_handed_back_instead_of_run() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(), 0)
    ((running,), _) = scheduler.next_batches(0)
    hopeless, fine = request(deadline_ns=5 * MS), request()
    scheduler.add(hopeless, 0)
    scheduler.add(fine, 0)
    scheduler.finished(running, 1000.0)
    (batch,), late = scheduler.next_batches(5 * MS - MS // 2)  # half a millisecond is left, it takes a whole one
    assert late == [hopeless]
    assert batch.requests == [fine]
    assert batch.rows == 1


def test_batch_of_hopeless_requests_leaves_the_lane_free() -> None:
    scheduler = make_scheduler()
    hopeless = [request(deadline_ns=5 * MS) for _ in range(3)]
    for one in hopeless:
        scheduler.add(one, 0)
    after = request(model="other")
    scheduler.add(after, 0)
    (batch,), late = scheduler.next_batches(5 * MS - 1)
    assert late == hopeless
    assert batch.requests == [after]


def test_running_request_expires_for_its_client() -> None:
    """It cannot be taken off the device, but the client is told in time."""
    scheduler = make_scheduler()
    running = request(deadline_ns=5 * MS)
    scheduler.add(running, 0)
    scheduler.next_batches(0)
    assert scheduler.expire(5 * MS) == [running]


def test_request_that_was_added_again_expires_once() -> None:
    scheduler = make_scheduler(Device("cuda:0", "cuda", 1, set(MODELS)), Device("cpu", "cpu", 1, set(MODELS)))
    moved = request(deadline_ns=5 * MS)
    scheduler.add(moved, 0)
    assert scheduler.fail_device("cuda:0", "fell off the bus") == [moved]
    scheduler.add(moved, 0)
    assert scheduler.expire(6 * MS) == [moved]


def test_answered_request_does_not_expire() -> None:
    scheduler = make_scheduler()
    answered = request(deadline_ns=5 * MS)
    scheduler.add(answered, 0)
    run_one(scheduler)
    answered.done = True
    assert scheduler.expire(6 * MS) == []


def test_earliest_deadline_goes_first_and_urgent_requests_overtake_patient_ones() -> None:
    scheduler = make_scheduler()
    patient = [request(rows=8, client=str(index)) for index in range(3)]
    urgent = [request(rows=8, client=f"u{index}", deadline_ns=(900 - 100 * index) * MS) for index in range(3)]
    for one in [*patient, *urgent]:
        scheduler.add(one, 0)
    assert [run_one(scheduler).requests[0] for _ in range(6)] == [*urgent[::-1], *patient]


def test_deadlines_are_bounded_by_the_requests_outstanding() -> None:
    scheduler = make_scheduler()

    def work() -> None:
        for index in range(3_000):
            one = request(deadline_ns=10**15 + index)
            scheduler.add(one, 0)
            run_one(scheduler)
            one.done = True

    assert memory_kept(work) < 200_000  # of requests alone, it would be a million


def test_what_was_slow_for_a_while_is_tried_again() -> None:
    """Where all requests are refused nothing runs, and nothing would be learned any more."""
    scheduler = make_scheduler()
    for _ in range(30):  # of a client without deadlines
        scheduler.add(request(), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 200_000.0)
    for second in range(20):
        now_ns = second * 1000 * MS
        asked = request(deadline_ns=now_ns + 50 * MS)
        with contextlib.suppress(TooLate):
            scheduler.add(asked, now_ns)
            break
    (batch,), late = scheduler.next_batches(now_ns)
    assert (batch.requests, late) == ([asked], [])
    scheduler.finished(batch, 1000.0)
    scheduler.add(request(deadline_ns=now_ns + 51 * MS), now_ns + MS)


def test_what_never_was_in_time_is_refused_for_good() -> None:
    scheduler = make_scheduler()
    for second in range(20):
        with pytest.raises(TooLate):
            scheduler.add(request(deadline_ns=second * 1000 * MS + MS // 2), second * 1000 * MS)


def test_a_cheap_request_does_not_wait_for_lanes_that_it_does_not_need() -> None:
    """Every lane is busy for long, and more waits for them; the caller's own thread is free."""
    costs = CostModel()
    for _ in range(100):
        costs.curve("cpu", "other").observe(1, 100_000.0)
        costs.curve("cpu", "mlp").observe(1, 200.0)
        costs.curve("cpu", "mlp", inline=True).observe(1, 200.0)
    scheduler = make_scheduler(Device("cpu", "cpu", 2, set(MODELS), inline_limit_us=1000.0), costs=costs)
    for _ in range(4):
        scheduler.add(request("other", max_batch_size=1), 0)
    assert len(scheduler.next_batches(0)[0]) == 2
    cheap = [request(deadline_ns=20 * MS, max_batch_size=1) for _ in range(3)]
    for one in cheap:
        scheduler.add(one, MS)
    (batch,), late = scheduler.next_batches(MS)
    assert (batch.lane, batch.requests, late) == (INLINE, cheap[:1], [])
    assert cheap[2].predicted_us == pytest.approx(600.0, rel=0.1)
    with pytest.raises(TooLate):  # a batch that is not for the caller's thread does wait
        scheduler.add(request("other", deadline_ns=150 * MS, max_batch_size=1), MS)
