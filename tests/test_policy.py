"""Deadlines, priorities, fair shares, cancelling, choice of device: the scheduler in times that a test makes up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tnxctl.protocol.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, TensorNextError, Unavailable
from tnxd.lanes import BACKGROUND, INLINE
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler

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
    return Scheduler(devices or [Device("cpu", "cpu", 1, set(MODELS))], costs, **limits)


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


@pytest.mark.parametrize("others", [7, 8])
def test_what_would_be_done_just_in_time_makes_room_where_enough_others_wait(others: int) -> None:
    costs = CostModel()
    for number in range(200):  # a millisecond, give or take a tenth
        for rows in (1, 8):
            costs.curve("cpu", "mlp").observe(rows, 900.0 if number % 2 else 1100.0)
    scheduler = policy(costs=costs)
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


def test_a_request_that_rides_alone_is_done_just_in_time() -> None:
    costs = CostModel()
    for number in range(200):
        costs.curve("cpu", "mlp").observe(1, 900.0 if number % 2 else 1100.0)
    scheduler = policy(costs=costs)
    one = request(max_batch_size=0, deadline_ns=3 * MS)
    scheduler.add(one, 0)
    assert scheduler.next_batches(int(1.95 * MS))[0][0].requests == [one]


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


def test_one_that_was_added_again_expires_once() -> None:
    scheduler = policy(Device("cuda:0", "cuda", 1, set(MODELS)), Device("cpu", "cpu", 1, set(MODELS)))
    moved = request(deadline_ns=5 * MS)
    scheduler.add(moved, 0)
    assert scheduler.fail_device("cuda:0", "fell off the bus") == [moved]
    scheduler.add(moved, 0)
    assert scheduler.expire(6 * MS) == [moved]


def test_an_answered_request_does_not_expire() -> None:
    scheduler = policy()
    answered = request(deadline_ns=5 * MS)
    scheduler.add(answered, 0)
    run_one(scheduler)
    answered.done = True
    assert scheduler.expire(6 * MS) == []


def test_the_earliest_deadline_goes_first_and_urgent_ones_overtake_patient_ones() -> None:
    scheduler = policy()
    patient = [request(rows=8, client=str(index)) for index in range(3)]
    urgent = [request(rows=8, client=f"u{index}", deadline_ns=(900 - 100 * index) * MS) for index in range(3)]
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


@pytest.mark.parametrize(("came_ns", "says_when"), [(7 * MS, True), (10 * MS, False)], ids=["waited", "came just now"])
def test_a_refusal_says_when_to_come_back_if_the_request_would_be_in_time_had_it_just_come(
    came_ns: int, says_when: bool
) -> None:
    """What stood in its socket for too long is late though nothing waits; else its client would go on sending."""
    scheduler = one_cpu(lane_us=1000.0)
    deadline_ns = 21 * MS // 2
    with pytest.raises(DeadlineExceeded) as refused:
        scheduler.add(request(rows=8, came_ns=came_ns, deadline_ns=deadline_ns), 10 * MS)
    assert (refused.value.retry_after_s is not None) is says_when


def test_a_caller_that_is_behind_promises_less() -> None:
    """What a message needs beyond its batch is learned from answers, and counts where messages wait to be taken in."""
    scheduler = one_cpu(lane_us=1000.0)
    for _ in range(100):
        scheduler.add(request(rows=8), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 1000.0, 5 * MS)
    scheduler.add(request(rows=8, came_ns=10 * MS, deadline_ns=13 * MS), 10 * MS)
    run_one(scheduler)
    with pytest.raises(DeadlineExceeded):
        scheduler.add(request(rows=8, came_ns=9 * MS, deadline_ns=13 * MS), 10 * MS)


def test_work_of_the_caller_between_batches_counts_in_what_waits_behind_them() -> None:
    """A batch runs for two milliseconds, and the next one begins six later, as long as requests wait."""
    scheduler = one_cpu(lane_us=2000.0)
    now_ns = 0
    for _ in range(24):
        scheduler.add(request(rows=8, max_batch_size=8), now_ns)
    for _ in range(60):
        ((batch,), _) = scheduler.next_batches(now_ns)
        scheduler.add(request(rows=8, max_batch_size=8), now_ns)
        scheduler.finished(batch, 2000.0, now_ns + 2 * MS)
        now_ns += 8 * MS
    late = request(rows=8, max_batch_size=8)
    scheduler.add(late, now_ns)
    assert late.wait_us > 24 * 2000 * 3


# --- the caller's own thread ---------------------------------------------------------------------------------


def one_cpu(lane_us: float, inline_us: float = 0.0, threads: int = 1) -> Scheduler:
    """A CPU that runs batches of up to a millisecond on the caller's thread."""
    costs = CostModel()
    costs.curve("cpu", "mlp").observe(8, lane_us)
    if inline_us:
        costs.curve("cpu", "mlp", inline=True).observe(8, inline_us)
    return policy(Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=1000.0, lane_threads=threads), costs=costs)


def run_for(scheduler: Scheduler, micros: float, **options: Any) -> Batch:
    """A batch of eight rows, over after so long."""
    scheduler.add(request(rows=8, **options), 0)
    ((batch,), _) = scheduler.next_batches(0)
    scheduler.finished(batch, micros)
    return batch


def test_until_a_batch_ran_on_the_callers_thread_the_lanes_times_their_threads_count() -> None:
    scheduler = one_cpu(lane_us=100.0, threads=3)
    assert run_for(scheduler, 50.0).lane == INLINE
    first = request(rows=8)
    scheduler.add(first, 0)
    assert first.predicted_us == pytest.approx(300 + 0.1 * (50 - 300))
    assert run_for(one_cpu(lane_us=400.0, threads=3), 50.0).lane == 0


def test_a_dear_batch_is_predicted_by_the_lane_that_it_goes_to() -> None:
    """The caller's thread was slow once, or never tried: neither is what the request has to expect."""
    scheduler = one_cpu(lane_us=1200.0, inline_us=50_000.0)
    one = request(rows=8, deadline_ns=6 * MS)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1200)
    assert run_one(scheduler).lane == 0
    scheduler = one_cpu(lane_us=1200.0)
    one = request(rows=8)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1200)


def test_a_batch_inline_is_held_against_deadlines_as_it_was_decided() -> None:
    scheduler = one_cpu(lane_us=900.0, inline_us=300.0)
    scheduler.add(request(rows=8, deadline_ns=MS * 7 // 10), 0)  # 300 us and a margin of as much
    assert run_one(scheduler).lane == INLINE


@pytest.mark.parametrize(("threads", "lane"), [(1, INLINE), (4, 0)])
def test_a_slow_spell_does_not_keep_a_model_off_the_callers_thread(threads: int, lane: int) -> None:
    scheduler = one_cpu(lane_us=500.0, inline_us=5000.0, threads=threads)
    assert run_for(scheduler, 500.0).lane == 0
    lanes = [run_for(scheduler, 500.0).lane for _ in range(60)]
    assert lanes[-1] == lane


def test_what_is_slow_on_the_callers_thread_leaves_it_however_quick_it_was_on_a_lane() -> None:
    scheduler = one_cpu(lane_us=500.0)
    lanes = [run_for(scheduler, 5000.0).lane for _ in range(4)]
    assert (lanes[0], lanes[-1]) == (INLINE, 0)


# --- what need not wait --------------------------------------------------------------------------------------


def test_a_request_that_comes_alone_is_started_at_once() -> None:
    scheduler = one_cpu(lane_us=100.0)
    one = request(rows=2)
    batch = scheduler.start(one, 0)
    assert batch is not None
    assert (batch.lane, batch.requests, batch.rows) == (INLINE, [one], 2)
    assert (scheduler.queued, scheduler.running, scheduler.outstanding("mlp")) == (0, 1, 1)
    scheduler.finished(batch, 100.0)
    assert (scheduler.queued, scheduler.running, scheduler.outstanding("mlp")) == (0, 0, 0)


@pytest.mark.parametrize(
    "why",
    ["others wait", "it is dear", "it waits for company", "a lane is busy", "its model has its lanes", "any device"],
)
def test_what_has_to_be_weighed_is_not_started_at_once(why: str) -> None:
    costs = CostModel()
    for rows, micros in ((1, 100.0), (8, 1200.0)):
        costs.curve("cpu", "mlp").observe(rows, micros)
    scheduler = policy(Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=1000.0), costs=costs)
    one = request(
        rows=8 if why == "it is dear" else 1,
        max_delay_ns=MS * (why == "it waits for company"),
        wanted="auto" if why == "any device" else "",
    )
    if why == "others wait":
        scheduler.add(request(), 0)
    elif why == "a lane is busy":
        scheduler.add(request(rows=8), 0)
        assert scheduler.next_batches(0)[0][0].lane == 0
    elif why == "its model has its lanes":
        scheduler.set_lane_limit("mlp", 1)
        assert scheduler.start_background("mlp", (), 1, 0) is not None
    assert scheduler.start(one, 0) is None
    scheduler.add(one, 0)
    assert one.waiting


def outcome(scheduler: Scheduler, one: Request, now: int, micros: float, *, at_once: bool) -> list[object]:
    """All that can be seen of a request that comes to a scheduler without work, and of the scheduler after it."""
    try:
        batch = scheduler.start(one, now) if at_once else None
        if batch is None:
            scheduler.add(one, now)
            (batch,), late = scheduler.next_batches(now)
            assert not late
    except TensorNextError as error:
        return [type(error), error.message]
    seen: list[object] = [one.device, one.reason, one.predicted_us, one.waiting, batch.lane, batch.rows, batch.max_rows]
    seen += [scheduler.running, scheduler.outstanding(one.model), batch.device.running_rows]
    scheduler.finished(batch, micros)
    device = batch.device
    return [*seen, scheduler.running, scheduler.outstanding(one.model), list(device.passes), device.global_pass]


_alone = st.tuples(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 12),
    st.integers(0, 3),
    st.sampled_from([NEVER, 300_000, 2 * MS]),
    st.sampled_from(["", "", "", "auto", "cpu", "cuda:0", "tpu"]),
    st.booleans(),
    st.integers(1, 22),
    st.floats(0.0, 3000.0),
)


@given(gpu=st.booleans(), max_bytes=st.sampled_from([20, 1000]), ones=st.lists(_alone, min_size=5, max_size=20))
@example(  # a level that comes after two batches of another
    gpu=False, max_bytes=20, ones=[("mlp", 1, level, NEVER, "", False, 1, 100.0) for level in (0, 0, 1)]
)
def test_to_be_started_at_once_comes_to_the_same_as_to_wait(
    gpu: bool, max_bytes: int, ones: list[tuple[str, int, int, int, str, bool, int, float]]
) -> None:
    def fresh() -> Scheduler:
        costs = CostModel()
        for rows in (1, 8):
            costs.curve("cpu", "mlp").observe(rows, 100.0 * rows)
            costs.curve("cuda:0", "mlp").observe(rows, 200.0)
        devices = [Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=500.0)]
        if gpu:
            devices.append(Device("cuda:0", "cuda", 1, {"mlp"}, 8000.0))
        return policy(*devices, costs=costs, max_bytes=max_bytes)

    quick, plain = fresh(), fresh()
    for number, (model, rows, level, left, wanted, prefer_gpu, nbytes, micros) in enumerate(ones):
        now = number * MS
        deadline = NEVER if left == NEVER else now + left
        options: dict[str, Any] = {"rows": rows, "priority": level, "deadline_ns": deadline, "wanted": wanted}
        options |= {"prefer_gpu": prefer_gpu, "nbytes": nbytes}
        seen = [
            outcome(scheduler, request(model, **options), now, micros, at_once=scheduler is quick)
            for scheduler in (quick, plain)
        ]
        assert seen[0] == seen[1]


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


def test_a_level_that_finds_the_device_idle_does_not_make_up_for_its_past() -> None:
    scheduler = policy()
    for _ in range(100):
        scheduler.add(request(rows=8, priority=1), 0)
        run_one(scheduler)
    for priority in (0, 1):
        for _ in range(60):
            scheduler.add(request(rows=8, priority=priority), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert 8 <= order.count(1) <= 12


def test_a_level_whose_batches_always_fail_does_not_have_the_device_for_nothing() -> None:
    scheduler = policy(costs=CostModel())
    for priority in (0, 1):
        for _ in range(60):
            scheduler.add(request(rows=8, priority=priority), 0)
    order = []
    for _ in range(30):
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 0.0)  # what failed tells nothing about costs
        order.append(batch.requests[0].priority)
    assert 8 <= order.count(1) <= 12


@pytest.mark.parametrize("model", ["mlp", "other"])
def test_a_single_request_does_not_wait_for_the_ten_thousand_of_another_client(model: str) -> None:
    scheduler = policy()
    for _ in range(10_000):
        scheduler.add(request(client="flood"), 0)
    ((running,), _) = scheduler.next_batches(0)
    single = request(model=model, client="single")
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
        scheduler.add(request(client="flood"), 0)
    light, heavy = request(client="light"), request(client="flood")
    scheduler.add(request(client="light"), 0)
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


def test_one_model_may_not_fill_the_memory_of_all() -> None:
    scheduler = policy(max_bytes_per_model=10)
    first = request(nbytes=6)
    scheduler.add(first, 0)
    with pytest.raises(ResourceExhausted, match=r"6 bytes are queued for 'mlp' and 5 more .*, 10; the predicted wait"):
        scheduler.add(request(nbytes=5), 0)
    scheduler.add(request(model="other", nbytes=10), 0)
    scheduler.add(request(nbytes=4), 0)
    assert scheduler.cancel(first)
    scheduler.add(request(nbytes=6), 0)


# --- models that come and go ---------------------------------------------------------------------------------


def test_a_model_is_served_from_when_it_comes_until_it_goes() -> None:
    scheduler = policy()
    (cpu,) = scheduler.devices.values()
    with pytest.raises(Unavailable, match="'new@1'"):
        scheduler.add(request(model="new@1"), 0)
    cpu.models.add("new@1")
    taken = request(model="new@1")
    scheduler.add(taken, 0)
    cpu.models.discard("new@1")
    with pytest.raises(Unavailable, match="'new@1'"):
        scheduler.add(request(model="new@1"), 0)
    assert run_one(scheduler).requests == [taken]


def test_what_is_outstanding_waits_or_runs() -> None:
    scheduler = policy()
    assert scheduler.outstanding("mlp") == 0
    for rows in (8, 1, 1):
        scheduler.add(request(rows=rows), 0)
    scheduler.add(request(model="other"), 0)
    ((batch,), _) = scheduler.next_batches(0)
    assert (scheduler.outstanding("mlp"), scheduler.outstanding("other")) == (3, 1)
    scheduler.finished(batch, 1000.0)
    assert scheduler.outstanding("mlp") == 2
    scheduler.drop_all()
    assert (scheduler.outstanding("mlp"), scheduler.outstanding("other")) == (0, 0)


def test_what_is_forgotten_comes_back_as_new() -> None:
    costs = CostModel()
    scheduler = policy(Device("cpu", "cpu", 2, set(MODELS)), costs=costs)
    (cpu,) = scheduler.devices.values()
    scheduler.set_lane_limit("mlp", 1)
    scheduler.limit_rows("cpu", "mlp", 2)
    for model in ("mlp", "other"):
        scheduler.add(request(model=model), 0)
        run_one(scheduler)
        assert costs.curve("cpu", model).known
    cpu.models.discard("mlp")
    scheduler.forget("mlp")
    assert cpu.queues.keys() == {("other", (), False)}
    assert not costs.curve("cpu", "mlp").known
    assert costs.curve("cpu", "other").known
    cpu.models.add("mlp")
    for _ in range(2):
        scheduler.add(request(rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    assert [(batch.max_rows, batch.requests[0].predicted_us) for batch in batches] == [(0, 0.0)] * 2


def test_a_model_is_not_forgotten_while_something_of_it_is_outstanding() -> None:
    scheduler = policy()
    scheduler.add(request(), 0)
    for device in scheduler.devices.values():
        device.models.clear()
    with pytest.raises(AssertionError):
        scheduler.forget("mlp")


# --- lanes of a model ----------------------------------------------------------------------------------------


def lanes_of(count: int, **options: Any) -> Scheduler:
    costs = CostModel()
    for model in MODELS:
        costs.curve("cpu", model).observe(8, 1000.0)
    return policy(Device("cpu", "cpu", count, set(MODELS), **options), costs=costs)


def models(batches: list[Batch]) -> list[str]:
    return [batch.model for batch in batches]


def test_a_model_runs_on_no_more_lanes_than_it_may_and_others_on_the_rest() -> None:
    scheduler = lanes_of(3)
    scheduler.set_lane_limit("mlp", 1)
    for model in ("mlp", "mlp", "mlp", "other", "other", "other"):
        scheduler.add(request(model=model, rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    assert models(batches) == ["mlp", "other", "other"]
    scheduler.finished(batches[1], 1000.0)
    assert models(scheduler.next_batches(0)[0]) == ["other"]
    scheduler.finished(batches[2], 1000.0)
    assert scheduler.next_batches(0)[0] == []  # a lane is free, for another model
    scheduler.finished(batches[0], 1000.0)
    assert models(scheduler.next_batches(0)[0]) == ["mlp"]


def test_the_callers_thread_counts_as_a_lane() -> None:
    scheduler = lanes_of(2, inline_limit_us=5000.0)
    scheduler.set_lane_limit("mlp", 1)
    for _ in range(2):
        scheduler.add(request(rows=8), 0)
    ((inline,), _) = scheduler.next_batches(0)
    assert inline.lane == INLINE
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(inline, 1000.0)
    assert len(scheduler.next_batches(0)[0]) == 1


def test_a_limit_that_is_lifted_counts_at_once() -> None:
    scheduler = lanes_of(3)
    scheduler.set_lane_limit("mlp", 1)
    for _ in range(3):
        scheduler.add(request(rows=8), 0)
    assert len(scheduler.next_batches(0)[0]) == 1
    scheduler.set_lane_limit("mlp", 2)
    assert len(scheduler.next_batches(0)[0]) == 1
    scheduler.set_lane_limit("mlp", 0)
    assert len(scheduler.next_batches(0)[0]) == 1


def test_a_batch_that_hangs_does_not_keep_its_model_from_other_lanes() -> None:
    scheduler = lanes_of(2)
    scheduler.set_lane_limit("mlp", 1)
    for _ in range(3):
        scheduler.add(request(rows=8), 0)
    ((hangs,), _) = scheduler.next_batches(0)
    assert scheduler.next_batches(0)[0] == []
    for _ in range(2):
        scheduler.mark_hung(hangs)
    assert scheduler.outstanding("mlp") == 3
    ((other,), _) = scheduler.next_batches(0)
    scheduler.finished(hangs, 0.0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(other, 1000.0)
    assert len(run_one(scheduler).requests) == 1
    assert scheduler.outstanding("mlp") == 0


def test_groups_of_a_model_share_its_lanes_by_turns() -> None:
    scheduler = lanes_of(3)
    scheduler.set_lane_limit("mlp", 1)
    for group in (1, 2, 3):
        for _ in range(3):
            scheduler.add(request(rows=8, group=(group,)), 0)
    order = [run_one(scheduler).requests[0].group for _ in range(9)]
    assert order == [(1,), (2,), (3,)] * 3


def test_those_that_wait_for_a_lane_of_their_model_can_leave() -> None:
    scheduler = lanes_of(2)
    scheduler.set_lane_limit("mlp", 1)
    scheduler.add(request(rows=8), 0)
    ((running,), _) = scheduler.next_batches(0)
    cancelled, expiring, stranded = request(group=(1,)), request(deadline_ns=5 * MS), request(group=(2,))
    for one in (cancelled, expiring, stranded):
        scheduler.add(one, 0)
    assert scheduler.next_batches(0)[0] == []
    assert scheduler.cancel(cancelled)
    assert scheduler.expire(5 * MS) == [expiring]
    assert scheduler.fail_device("cpu", "fell off the bus") == [stranded]
    scheduler.finished(running, 1000.0)
    assert scheduler.next_batches(0) == ([], [])
    assert (scheduler.queued, scheduler.outstanding("mlp")) == (0, 0)


def test_a_level_that_waited_for_a_lane_of_its_model_does_not_make_up_for_it() -> None:
    scheduler = lanes_of(2)
    scheduler.set_lane_limit("mlp", 1)
    for _ in range(2):
        scheduler.add(request(rows=8, priority=0), 0)
    ((held,), _) = scheduler.next_batches(0)
    for _ in range(200):
        scheduler.add(request(model="other", rows=8, priority=1), 0)
    for _ in range(100):
        run_one(scheduler)
    scheduler.set_lane_limit("mlp", 0)
    for _ in range(100):
        scheduler.add(request(rows=8, priority=0), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert 8 <= order.count(1) <= 12
    scheduler.finished(held, 1000.0)


def test_predictions_know_of_lanes() -> None:
    scheduler = lanes_of(4)
    scheduler.set_lane_limit("mlp", 1)
    for _ in range(21):
        scheduler.add(request(rows=8), 0)
    scheduler.next_batches(0)
    limited, free = request(rows=8), request(model="other", rows=8)
    scheduler.add(limited, 0)
    scheduler.add(free, 0)
    assert limited.predicted_us == pytest.approx(22_000)
    assert free.predicted_us == pytest.approx(1000 / 4 + 1000)
    scheduler.next_batches(0)
    last = request(model="other", rows=8)
    scheduler.add(last, 0)
    assert last.predicted_us == pytest.approx(2 * 1000 / 4 + 1000)


# --- spare lanes ---------------------------------------------------------------------------------------------


def test_a_spare_batch_leaves_the_lanes_to_others() -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp").observe(8, 1000.0)
    scheduler = policy(Device("cpu", "cpu", 1, set(MODELS)), costs=costs)
    (cpu,) = scheduler.devices.values()
    batch = scheduler.start_background("mlp", (), 8, 0)
    assert batch is not None
    assert (batch.model, batch.requests, batch.rows, batch.device, batch.lane) == ("mlp", [], 8, cpu, BACKGROUND)
    assert (scheduler.running, scheduler.outstanding("mlp"), scheduler.queued) == (1, 1, 0)
    one = request(rows=8)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1000)
    passes = list(cpu.passes)
    scheduler.finished(batch, 5000.0)
    assert cpu.passes == passes
    assert costs.curve("cpu", "mlp").mean(8) == pytest.approx(1000)
    assert run_one(scheduler).requests == [one]
    assert (scheduler.running, scheduler.outstanding("mlp"), cpu.outstanding_rows) == (0, 0, 0)


def test_there_is_no_spare_batch_where_something_waits_or_nothing_is_free() -> None:
    scheduler = lanes_of(1)
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert scheduler.start_background("mlp", (), 1, 0) is None  # it waits for company and not for a lane, all the same
    (batch,), _ = scheduler.next_batches(3 * MS)
    assert scheduler.start_background("mlp", (), 1, 0) is None  # the only lane runs
    scheduler.finished(batch, 1000.0)
    assert scheduler.start_background("mlp@3", (), 1, 0) is None
    spare = scheduler.start_background("mlp", (), 1, 0)
    assert spare is not None
    assert scheduler.start_background("other", (), 1, 0) is None  # one at a time
    scheduler.finished(spare, 0.0)
    scheduler.fail_device("cpu", "fell off the bus")
    assert scheduler.start_background("mlp", (), 1, 0) is None


def test_a_spare_batch_keeps_to_the_lanes_and_rows_of_its_model() -> None:
    scheduler = lanes_of(3)
    scheduler.set_lane_limit("mlp", 1)
    scheduler.limit_rows("cpu", "mlp", 2)
    batch = scheduler.start_background("mlp", (), 8, 0)
    assert batch is not None
    assert batch.max_rows == 2
    assert scheduler.start_background("mlp", (), 8, 0) is None
    one = request()
    scheduler.add(one, 0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(batch, 1000.0)
    assert run_one(scheduler).requests == [one]


# --- memory --------------------------------------------------------------------------------------------------


def test_after_memory_ran_out_batches_are_as_large_as_what_worked() -> None:
    scheduler = policy()
    scheduler.limit_rows("cpu", "mlp", 3)
    for rows in (1, 1, 1, 1, 8, 1):
        scheduler.add(request(rows=rows), 0)
        scheduler.add(request(model="other", rows=rows), 0)
    batches = []
    while scheduler.queued:
        batches.append(run_one(scheduler))
    sizes = {model: [batch.rows for batch in batches if batch.model == model] for model in MODELS}
    assert sizes == {"mlp": [3, 1, 8, 1], "other": [4, 8, 1]}
    assert {batch.model: batch.max_rows for batch in batches} == {"mlp": 3, "other": 0}


def test_nothing_worked_leaves_one_row_at_a_time() -> None:
    scheduler = policy()
    scheduler.limit_rows("cpu", "mlp", 0)
    for _ in range(2):
        scheduler.add(request(), 0)
    assert [run_one(scheduler).rows for _ in range(2)] == [1, 1]


def test_a_late_report_does_not_raise_the_ceiling() -> None:
    scheduler = policy()
    for rows in (2, 4):
        scheduler.limit_rows("cpu", "mlp", rows)
    for _ in range(8):
        scheduler.add(request(), 0)
    assert run_one(scheduler).rows == 2


def test_predictions_and_the_wait_for_company_know_of_the_ceiling() -> None:
    scheduler = policy()
    scheduler.limit_rows("cpu", "mlp", 2)
    for _ in range(8):
        scheduler.add(request(), 0)
    last = request()
    scheduler.add(last, 0)
    assert last.predicted_us == pytest.approx(5000)
    scheduler.drop_all()
    for _ in range(2):
        scheduler.add(request(group=(1,), max_delay_ns=3 * MS), 0)
    assert run_one(scheduler).rows == 2


def test_batches_that_were_formed_before_do_not_raise_the_ceiling() -> None:
    scheduler = lanes_of(300)
    for _ in range(300):
        scheduler.add(request(rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    scheduler.limit_rows("cpu", "mlp", 4)
    for batch in batches:
        scheduler.finished(batch, 1000.0)
    scheduler.add(request(rows=8), 0)
    assert run_one(scheduler).max_rows == 4


def test_the_ceiling_rises_as_batches_work_and_ends_at_the_limit_of_the_model() -> None:
    scheduler = policy()
    scheduler.limit_rows("cpu", "mlp", 3)
    seen = []
    for _ in range(600):
        scheduler.add(request(rows=2), 0)
        scheduler.add(request(rows=2), 0)
        while scheduler.queued:
            seen.append(run_one(scheduler).max_rows)
    assert sorted(set(seen), key=seen.index) == [3, 6, 0]
    assert seen.count(3) == seen.count(6) == 256


def test_batches_that_fail_or_are_small_do_not_raise_the_ceiling() -> None:
    scheduler = policy()
    scheduler.limit_rows("cpu", "mlp", 4)
    for rows, micros in [(2, 1000.0), (4, 0.0)] * 300:
        scheduler.add(request(rows=rows), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, micros)
        assert batch.max_rows == 4


def test_a_request_that_did_not_fit_goes_elsewhere() -> None:
    gpus = [Device(f"cuda:{index}", "cuda", 1, set(MODELS), 8000.0) for index in range(2)]
    scheduler = policy(*gpus, Device("cpu", "cpu", 1, set(MODELS)))
    one = request()
    for device, reason in [
        ("cuda:0", "cuda:0 has 8000 MiB free"),
        ("cuda:1", "cuda:0 had no memory left for it; cuda:1 has 8000 MiB free"),
        ("cpu", "cuda:0 had no memory left for it, cuda:1 had no memory left for it; no other GPU is ready"),
    ]:
        scheduler.add(one, 0)
        assert (one.device, one.reason) == (device, reason)
        assert run_one(scheduler).requests == [one]
        one.excluded |= {one.device}


def test_a_request_for_any_device_that_did_not_fit_goes_elsewhere() -> None:
    scheduler = two_devices()
    one = request(rows=64, wanted="auto", max_batch_size=64, excluded=frozenset({"cuda:0"}))
    scheduler.add(one, 0)
    assert one.device == "cpu"
    assert one.reason.startswith("cuda:0 had no memory left for it; done first there: cpu")
    with pytest.raises(Unavailable):
        scheduler.add(request(wanted="auto", excluded=frozenset({"cuda:0", "cpu"})), 0)


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
    return policy(Device("cuda:0", "cuda", 1, set(MODELS), 8000.0), Device("cpu", "cpu", 1, set(MODELS)), costs=costs)


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


# --- everything at once --------------------------------------------------------------------------------------

_NAMES = ("net@1", "net@2")
_DEVICES = ("cuda:0", "cpu")
_model = st.sampled_from(_NAMES)
_device = st.sampled_from(_DEVICES)

_steps = st.one_of(
    # A burst of requests: their model, rows, priority, shape, device, number.
    st.tuples(
        st.just("add"),
        _model,
        st.integers(0, 12),
        st.integers(0, 3),
        st.integers(0, 1),
        st.sampled_from(["", "auto", "cpu"]),
        st.integers(1, 6),
    ),
    st.tuples(st.just("look"), st.integers(0, 4000)),
    st.tuples(st.just("finish"), st.integers(0, 9), st.sampled_from([0.0, 100.0])),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("spare"), _model, st.integers(1, 12)),
    st.tuples(st.just("lanes"), _model, st.integers(0, 2)),
    st.tuples(st.just("rows"), _model, _device, st.integers(0, 6)),
    st.tuples(st.just("come"), _model, _device),
    st.tuples(st.just("go"), _model),
    st.tuples(st.just("fail")),
    st.tuples(st.just("hang"), st.integers(0, 9)),
)


class Machine:
    """A scheduler that is driven as the daemon does it, and the rules that hold whatever happens."""

    def __init__(self) -> None:
        self.cpu = Device("cpu", "cpu", 3, set(_NAMES), inline_limit_us=150.0)
        self.gpu = Device("cuda:0", "cuda", 2, set(_NAMES), 8000.0)
        self.scheduler = policy(
            self.gpu, self.cpu, costs=CostModel(), max_requests=25, max_per_model=15, max_bytes_per_model=60
        )
        self.now_ns = 0
        self.added: list[Request] = []
        self.ends: Counter[int] = Counter()
        self.running: list[Batch] = []
        self.lanes = dict.fromkeys(_NAMES, 0)
        self.ceilings: dict[tuple[str, str], int] = {}

    def add(self, model: str, rows: int, level: int, group: int, wanted: str, count: int) -> None:
        for client in range(count):
            one = request(model, rows=rows, nbytes=rows, priority=level, group=(group,), wanted=wanted)
            one.client = str(client % 2)
            if self.accepts(one):
                self.added.append(one)

    def accepts(self, one: Request) -> bool:
        try:
            batch = self.scheduler.start(one, self.now_ns)
            if batch is None:
                self.scheduler.add(one, self.now_ns)
            else:
                self.running.append(batch)
                self.finish(len(self.running) - 1, 100.0)
        except Unavailable:
            assert one.model not in self.cpu.models
            assert one.wanted == "cpu" or one.model not in self.gpu.models or self.gpu.error
            return False
        except ResourceExhausted:
            same = [other for other in self.added if other.waiting and other.model == one.model]
            too_many = self.scheduler.queued == 25 or len(same) == 15
            assert too_many or sum(other.nbytes for other in same) + one.nbytes > 60
            return False
        return True

    def look(self, passed_us: int = 0) -> None:
        self.now_ns += 1000 * passed_us
        before = self.alive()
        batches, late = self.scheduler.next_batches(self.now_ns)
        assert not late
        self.running += batches
        for batch in batches:
            assert batch.requests
            assert not batch.device.error
            assert {(one.model, one.device) for one in batch.requests} == {(batch.model, batch.device.name)}
            ceiling = self.ceilings.get((batch.device.name, batch.model), 0)
            assert batch.max_rows == ceiling
            assert len(batch.requests) == 1 or batch.rows <= (ceiling or 8)
        after = self.alive()
        for place in after - before:
            assert not self.lanes[place[1]] or after[place] <= self.lanes[place[1]]
        for device in (self.gpu, self.cpu):
            used = [batch.lane for batch in self.running if batch.device is device and batch.lane >= 0]
            assert sorted([*used, *device.free_lanes]) == list(range(device.lanes))
            for (model, *_), queue in device.queues.items():
                # Nothing waits beside a free lane, but for a lane of its own.
                assert not queue.count or not device.free_lanes or 0 < self.lanes[model] <= after[device.name, model]

    def alive(self) -> Counter[tuple[str, str]]:
        """Batches that run and do not hang, by device and model."""
        return Counter((batch.device.name, batch.model) for batch in self.running if not batch.hung)

    def hang(self, which: int) -> None:
        if self.running:
            self.scheduler.mark_hung(self.running[which % len(self.running)])

    def finish(self, which: int, micros: float) -> None:
        if self.running:
            batch = self.running.pop(which % len(self.running))
            self.scheduler.finished(batch, micros)
            for one in batch.requests:
                assert not one.waiting
                self.end(one)

    def end(self, one: Request) -> None:
        one.done = True
        self.ends[id(one)] += 1

    def cancel(self, which: int) -> None:
        if self.added:
            one = self.added[which % len(self.added)]
            if self.scheduler.cancel(one):
                self.end(one)

    def spare(self, model: str, rows: int) -> None:
        passes = [list(device.passes) for device in (self.gpu, self.cpu)]
        batch = self.scheduler.start_background(model, (0,), rows, self.now_ns)
        assert [list(device.passes) for device in (self.gpu, self.cpu)] == passes
        if batch is not None:
            device = batch.device
            assert batch.lane == BACKGROUND
            assert not device.queued
            assert not device.error
            assert model in device.models
            self.running.append(batch)
            assert not self.lanes[model] or self.alive()[device.name, model] <= self.lanes[model]

    def limit_lanes(self, model: str, lanes: int) -> None:
        self.lanes[model] = lanes
        self.scheduler.set_lane_limit(model, lanes)

    def limit_rows(self, model: str, device: str, rows: int) -> None:
        self.scheduler.limit_rows(device, model, rows)
        self.ceilings[device, model] = min(self.ceilings.get((device, model), 8), max(rows, 1))

    def come(self, model: str, device: str) -> None:
        self.scheduler.devices[device].models.add(model)

    def go(self, model: str) -> None:
        for device in (self.gpu, self.cpu):
            device.models.discard(model)
        if not self.scheduler.outstanding(model):
            self.scheduler.forget(model)
            self.lanes[model] = 0
            self.ceilings = {key: rows for key, rows in self.ceilings.items() if key[1] != model}
            assert not any(key[0] == model for device in (self.gpu, self.cpu) for key in device.queues)

    def fail(self) -> None:
        for one in self.scheduler.fail_device("cuda:0", "fell off the bus"):
            if not self.accepts(one):
                self.end(one)

    def count(self) -> None:
        for model in _NAMES:
            alive = sum(one.waiting for one in self.added if one.model == model)
            alive += sum(len(batch.requests) or 1 for batch in self.running if batch.model == model)
            assert self.scheduler.outstanding(model) == alive
            waiting = [one.nbytes for one in self.added if one.model == model and one.waiting]
            assert len(waiting) <= 15
            assert sum(waiting) <= 60
        assert self.scheduler.queued <= 25


@given(st.lists(_steps, min_size=20, max_size=60))
def test_whatever_comes_and_goes_nothing_is_lost_and_every_limit_is_kept(steps: list[tuple[Any, ...]]) -> None:
    """Models come and go, lanes and rows are limited, spare batches run: requests end once, and none waits in vain."""
    machine = Machine()
    does = {
        "add": machine.add,
        "look": machine.look,
        "finish": machine.finish,
        "cancel": machine.cancel,
        "spare": machine.spare,
        "lanes": machine.limit_lanes,
        "rows": machine.limit_rows,
        "come": machine.come,
        "go": machine.go,
        "fail": machine.fail,
        "hang": machine.hang,
    }
    for name, *arguments in steps:
        does[name](*arguments)
        machine.count()
    scheduler = machine.scheduler
    while scheduler.queued or machine.running:
        machine.look()
        while machine.running:
            machine.finish(0, 0.0)
    assert machine.ends == Counter(id(one) for one in machine.added)
    assert (scheduler.queued, scheduler.queued_bytes, scheduler.running) == (0, 0, 0)
    for device in (machine.gpu, machine.cpu):
        assert (device.outstanding_rows, device.queued, device.counts) == (0, 0, [0, 0, 0, 0])
        assert not any(turns.members for turns in device.turns)
        assert not device.held
        for placement in device.placements.values():
            assert placement.lanes == []
            assert placement.backlog_us == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("leaves", ["run", "cancel"])
def test_what_has_left_before_its_delay_is_over_wakes_nobody(leaves: str) -> None:
    scheduler = policy()
    waiting = [request(max_batch_size=2, max_delay_ns=3 * MS) for _ in range(2)]
    for one in waiting if leaves == "run" else waiting[:1]:
        scheduler.add(one, 0)
    if leaves == "run":
        assert run_one(scheduler).requests == waiting
    else:
        assert scheduler.cancel(waiting[0])
    assert scheduler.next_event_ns() == NEVER


def test_each_has_a_delay_of_its_own() -> None:
    scheduler = policy()
    for _ in range(2):
        scheduler.add(request(max_batch_size=2, max_delay_ns=3 * MS), 0)
    run_one(scheduler)
    later = request(max_batch_size=2, max_delay_ns=3 * MS)
    scheduler.add(later, 2 * MS)
    assert scheduler.next_batches(3 * MS) == ([], [])
    assert scheduler.next_batches(5 * MS)[0][0].requests == [later]


def test_new_shapes_are_as_quick_to_take_in_however_many_wait() -> None:
    """Empty queues are swept out, but not looked for at every new one."""
    scheduler = policy()
    device = scheduler.devices["cpu"]
    rebuilt = 0
    for length in range(4096):
        before = device.queues
        scheduler.add(request(group=(length,)), 0)
        rebuilt += device.queues is not before
    assert rebuilt < 8
    while scheduler.queued:
        run_one(scheduler)
    for length in range(4096, 20_000):
        scheduler.add(request(group=(length,)), 0)
        run_one(scheduler)
    assert len(device.queues) < 10_000
