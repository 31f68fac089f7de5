"""Deadlines, priorities, fair shares, cancelling, choice of device: the scheduler in times that a test makes up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tnxctl.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from tnxd.costs import CostModel
from tnxd.scheduler import Scheduler
from tnxd.work import INLINE, NEVER, Batch, Device, Request

MS = 1_000_000
MODELS = frozenset({"mlp", "other"})


def request(model: str = "mlp", **options: Any) -> Request:
    options.setdefault("max_batch_size", 8)
    return Request(model, **options)


def policy(*devices: Device, costs: CostModel | None = None, **limits: Any) -> Scheduler:
    """One CPU lane by default, on which any batch takes a millisecond."""
    if costs is None:
        costs = CostModel()
        for model in MODELS:
            for rows in (1, 2, 4, 8):
                costs.curve("cpu", model).observe(rows, 1000.0)
                for _ in range(100):  # until the spread is small
                    costs.curve("cpu", model).observe(rows, 1000.0)
    limits.setdefault("max_requests", 100_000)
    limits.setdefault("max_bytes", 1 << 40)
    return Scheduler(devices or [Device("cpu", "cpu", 1, MODELS)], costs, **limits)


def run_one(scheduler: Scheduler, now: int = 0) -> Batch:
    """The next batch, over at once."""
    (batch,), late = scheduler.next_batches(now)
    assert not late
    scheduler.finished(batch, 1000.0)
    return batch


# --- deadlines -----------------------------------------------------------------------------------------------


def test_what_can_be_done_in_time_is_taken() -> None:
    scheduler = policy()
    scheduler.add(request(deadline_ns=2 * MS), 0)
    assert len(run_one(scheduler).requests) == 1


def test_what_cannot_be_done_in_time_is_refused_with_the_predicted_wait() -> None:
    scheduler = policy()
    for deadline_us in (1500, 2500, 3500):
        for _ in range(8):
            scheduler.add(request(deadline_ns=deadline_us * 1000), 0)
    with pytest.raises(DeadlineExceeded, match="predicted wait is 3 ms and then 1 ms"):
        scheduler.add(request(deadline_ns=3700 * 1000), 0)
    scheduler.add(request(deadline_ns=4700 * 1000), 0)
    assert scheduler.queued == 25


def test_an_urgent_request_is_not_refused_for_what_it_overtakes() -> None:
    scheduler = policy()
    for _ in range(1000):
        scheduler.add(request(), 0)
    urgent = request(deadline_ns=3 * MS)
    scheduler.add(urgent, 0)
    assert urgent in run_one(scheduler).requests


def test_a_running_batch_counts_with_what_is_left_of_it() -> None:
    scheduler = policy()
    scheduler.add(request(), 0)
    scheduler.next_batches(0)
    with pytest.raises(DeadlineExceeded):
        scheduler.add(request(deadline_ns=MS + MS // 2), 0)
    scheduler.add(request(deadline_ns=MS + MS // 2 + 9 * MS // 10), 9 * MS // 10)


def test_a_deadline_that_passes_in_the_queue_is_reported_once_and_never_computed() -> None:
    scheduler = policy()
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


def test_one_that_became_hopeless_is_handed_back_instead_of_run() -> None:
    scheduler = policy()
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


def test_a_batch_of_nothing_but_hopeless_ones_leaves_the_lane_free() -> None:
    scheduler = policy()
    hopeless = [request(deadline_ns=5 * MS) for _ in range(3)]
    for one in hopeless:
        scheduler.add(one, 0)
    after = request(model="other")
    scheduler.add(after, 0)
    (batch,), late = scheduler.next_batches(5 * MS - 1)
    assert late == hopeless
    assert batch.requests == [after]


def test_a_running_request_expires_for_its_client() -> None:
    """It cannot be taken off the device, but the client is told in time."""
    scheduler = policy()
    running = request(deadline_ns=5 * MS)
    scheduler.add(running, 0)
    scheduler.next_batches(0)
    assert scheduler.expire(5 * MS) == [running]


def test_an_answered_request_does_not_expire() -> None:
    scheduler = policy()
    answered = request(deadline_ns=5 * MS)
    scheduler.add(answered, 0)
    run_one(scheduler)
    answered.done = True
    assert scheduler.expire(6 * MS) == []


def test_the_earliest_deadline_goes_first_and_urgent_ones_overtake_patient_ones() -> None:
    scheduler = policy()
    patient = [request(rows=8, client=b"%d" % index) for index in range(3)]
    urgent = [request(rows=8, client=b"u%d" % index, deadline_ns=(900 - 100 * index) * MS) for index in range(3)]
    for one in [*patient, *urgent]:
        scheduler.add(one, 0)
    assert [run_one(scheduler).requests[0] for _ in range(6)] == [*urgent[::-1], *patient]


def test_memory_of_deadlines_is_bounded_by_what_is_there() -> None:
    scheduler = policy()
    for index in range(10_000):
        one = request(deadline_ns=10**15 + index)
        scheduler.add(one, 0)
        run_one(scheduler)
        one.done = True
    assert len(scheduler._deadlines) < 200


# --- the caller's own thread ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "lane"), [(1, INLINE), (4, 0)])
def test_a_slow_spell_does_not_keep_a_model_off_the_callers_thread(threads: int, lane: int) -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp", inline=True).observe(8, 5000.0)
    costs.curve("cpu", "mlp").observe(8, 500.0)
    device = Device("cpu", "cpu", 1, MODELS, inline_limit_us=1000.0, lane_threads=threads)
    scheduler = policy(device, costs=costs)
    scheduler.add(request(rows=8), 0)
    assert run_one(scheduler).lane == lane


# --- priorities and fair shares ------------------------------------------------------------------------------


def test_a_higher_level_goes_first() -> None:
    scheduler = policy()
    for priority in (3, 2, 1, 0):
        scheduler.add(request(rows=8, priority=priority), 0)
    assert [run_one(scheduler).requests[0].priority for _ in range(4)] == [0, 1, 2, 3]


def test_no_level_starves_and_higher_ones_get_more() -> None:
    scheduler = policy()
    for priority in range(4):
        for _ in range(200):
            scheduler.add(request(rows=8, priority=priority), 0)
    counts = Counter(run_one(scheduler).requests[0].priority for _ in range(150))
    assert counts[0] == pytest.approx(80, abs=3)
    assert counts[1] == pytest.approx(40, abs=3)
    assert counts[2] == pytest.approx(20, abs=3)
    assert counts[3] == pytest.approx(10, abs=3)


def test_a_level_that_was_idle_does_not_make_up_for_it() -> None:
    scheduler = policy()
    for _ in range(300):
        scheduler.add(request(rows=8, priority=1), 0)
    for _ in range(100):
        run_one(scheduler)
    for _ in range(100):
        scheduler.add(request(rows=8, priority=0), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert order[0] == 0
    assert 8 <= order.count(1) <= 12


@pytest.mark.parametrize("model", ["mlp", "other"])
def test_a_single_request_does_not_wait_for_the_ten_thousand_of_another_client(model: str) -> None:
    scheduler = policy()
    for _ in range(10_000):
        scheduler.add(request(client=b"flood"), 0)
    ((running,), _) = scheduler.next_batches(0)
    single = request(model=model, client=b"single")
    scheduler.add(single, 0)
    scheduler.finished(running, 1000.0)
    batches = 0
    while not single.done:
        batch = run_one(scheduler)
        batches += 1
        for one in batch.requests:
            one.done = True
    assert batches <= 3


def test_the_predicted_wait_of_a_light_client_knows_of_turns() -> None:
    scheduler = policy()
    for _ in range(10_000):
        scheduler.add(request(client=b"flood"), 0)
    light, heavy = request(client=b"light"), request(client=b"flood")
    scheduler.add(request(client=b"light"), 0)
    scheduler.add(light, 0)
    scheduler.add(heavy, 0)
    assert light.predicted_us < 10_000
    assert heavy.predicted_us > 1_000_000


# --- limits --------------------------------------------------------------------------------------------------


def test_one_model_may_not_fill_the_queue_of_all() -> None:
    scheduler = policy(max_per_model=2)
    scheduler.add(request(), 0)
    scheduler.add(request(), 0)
    with pytest.raises(ResourceExhausted, match=r"2 requests for 'mlp'.*predicted wait is"):
        scheduler.add(request(), 0)
    scheduler.add(request(model="other"), 0)
    run_one(scheduler)
    scheduler.add(request(), 0)


# --- cancelling ----------------------------------------------------------------------------------------------


def test_a_cancelled_request_leaves_the_queue() -> None:
    scheduler = policy()
    kept, cancelled = request(nbytes=5), request(nbytes=7)
    for one in (kept, cancelled):
        scheduler.add(one, 0)
    assert scheduler.cancel(cancelled)
    assert not scheduler.cancel(cancelled)
    assert (scheduler.queued, scheduler.queued_bytes) == (1, 5)
    assert run_one(scheduler).requests == [kept]
    assert not scheduler.cancel(kept)


def test_cancelling_the_last_one_leaves_nothing_behind() -> None:
    scheduler = policy()
    only = request()
    scheduler.add(only, 0)
    assert scheduler.cancel(only)
    (cpu,) = scheduler.devices.values()
    assert cpu.queued == 0
    assert sum(cpu.backlog_us) == 0
    assert scheduler.next_batches(0) == ([], [])


# --- which device --------------------------------------------------------------------------------------------


def two_devices() -> Scheduler:
    """A CPU that is quick with little, a GPU that is quick with much."""
    costs = CostModel()
    for rows in (1, 8, 64):
        costs.curve("cpu", "mlp").observe(rows, 50.0 + 50.0 * rows)
        costs.curve("cuda:0", "mlp").observe(rows, 400.0 + 2.0 * rows)
    return policy(Device("cuda:0", "cuda", 1, MODELS, 8000.0), Device("cpu", "cpu", 1, MODELS), costs=costs)


def test_auto_takes_the_device_that_is_done_first() -> None:
    scheduler = two_devices()
    small, large = (request(rows=rows, wanted="auto", max_batch_size=64) for rows in (1, 64))
    scheduler.add(small, 0)
    scheduler.add(large, 0)
    assert (small.device, large.device) == ("cpu", "cuda:0")
    assert "done first there: cpu 0.1 ms, cuda:0 0.402 ms" in small.reason


def test_auto_counts_what_waits() -> None:
    scheduler = two_devices()
    devices = []
    for _ in range(20):
        one = request(rows=8, wanted="auto")
        scheduler.add(one, 0)
        devices.append(one.device)
    assert devices[0] == "cuda:0"
    assert set(devices) == {"cpu", "cuda:0"}


def test_a_named_device_is_taken_at_its_word() -> None:
    scheduler = two_devices()
    one = request(rows=64, wanted="cpu", max_batch_size=64)
    scheduler.add(one, 0)
    assert (one.device, one.reason) == ("cpu", "the request asked for cpu")
    with pytest.raises(InvalidArgument, match="'cuda:1': there are cuda:0, cpu, and auto"):
        scheduler.add(request(wanted="cuda:1"), 0)
    scheduler.fail_device("cuda:0", "fell off the bus")
    with pytest.raises(Unavailable, match="fell off the bus"):
        scheduler.add(request(wanted="cuda:0"), 0)


# --- company -------------------------------------------------------------------------------------------------


def test_a_small_batch_waits_for_company_if_the_model_asks_for_it() -> None:
    scheduler = policy()
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert scheduler.next_batches(MS) == ([], [])
    assert scheduler.next_event_ns() == 3 * MS
    scheduler.add(request(max_delay_ns=3 * MS), MS)
    ((batch,), _) = scheduler.next_batches(3 * MS)
    assert len(batch.requests) == 2


def test_a_full_batch_does_not_wait() -> None:
    scheduler = policy()
    for _ in range(8):
        scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert len(run_one(scheduler).requests) == 8


def test_after_a_batch_the_wait_for_company_begins_anew() -> None:
    scheduler = policy()
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    run_one(scheduler, 3 * MS)
    scheduler.add(request(max_delay_ns=3 * MS), 4 * MS)
    assert scheduler.next_batches(6 * MS) == ([], [])
    assert len(run_one(scheduler, 7 * MS).requests) == 1
