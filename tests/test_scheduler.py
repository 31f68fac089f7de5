"""The policy alone: no torch, no socket, no clock."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from tnxd.lanes import INLINE
from tnxd.scheduling.costs import BatchCosts, CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.placement import ModelLoad, Placement
from tnxd.scheduling.request import LEVELS, NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.scheduler import Scheduler

MODELS = frozenset({"mlp", "other"})


def cpu(lanes: int = 1, inline_limit_us: float = 0.0) -> Device:
    return Device("cpu", "cpu", lanes, set(MODELS), inline_limit_us=inline_limit_us)


def gpu(index: int = 0, free_mb: float = 8000.0, lanes: int = 1, models: frozenset[str] = MODELS) -> Device:
    return Device(f"cuda:{index}", "cuda", lanes, set(models), free_mb)


def request(rows: int = 1, **options: object) -> Request:
    options.setdefault("max_batch_size", 8)
    return Request("mlp", rows=rows, nbytes=rows * 4, **options)  # type: ignore[arg-type]


def scheduler(*devices: Device, costs: CostModel | None = None, **limits: int) -> Scheduler:
    limits.setdefault("max_requests", 1000)
    limits.setdefault("max_bytes", 1_000_000)
    return Scheduler(devices or [cpu()], costs or CostModel(), **limits)


def test_a_free_lane_takes_a_single_request_at_once() -> None:
    policy = scheduler()
    only = request()
    policy.add(only, 0)
    (batch,) = policy.next_batches(0)[0]
    assert batch.requests == [only]
    assert (batch.device.name, batch.lane, batch.rows) == ("cpu", 0, 1)


def test_what_waits_while_the_lane_is_busy_becomes_one_batch() -> None:
    policy = scheduler()
    policy.add(request(), 0)
    (running,) = policy.next_batches(0)[0]
    waiting = [request() for _ in range(5)]
    for one in waiting:
        policy.add(one, 0)
    assert policy.next_batches(0)[0] == []
    policy.finished(running, 0.0)
    (batch,) = policy.next_batches(0)[0]
    assert batch.requests == waiting


def test_a_batch_keeps_the_row_limit_and_the_order() -> None:
    policy = scheduler()
    requests = [request(rows) for rows in (3, 4, 2, 8, 1)]
    for one in requests:
        policy.add(one, 0)
    sizes = []
    while batches := policy.next_batches(0)[0]:
        sizes.append([one.rows for one in batches[0].requests])
        policy.finished(batches[0], 0.0)
    assert sizes == [[3, 4], [2], [8], [1]]


def test_a_request_beyond_the_limit_rides_alone() -> None:
    policy = scheduler()
    for rows in (20, 1):
        policy.add(request(rows), 0)
    (batch,) = policy.next_batches(0)[0]
    assert [one.rows for one in batch.requests] == [20]


def test_groups_and_unbatchable_models_never_share_a_batch() -> None:
    policy = scheduler(cpu(lanes=9))
    for group in ((1,), (2,), (1,)):
        policy.add(request(group=group), 0)
    policy.add(request(max_batch_size=0), 0)
    policy.add(request(max_batch_size=0), 0)
    batches = policy.next_batches(0)[0]
    assert sorted(len(batch.requests) for batch in batches) == [1, 1, 1, 2]
    assert all(len({one.group for one in batch.requests}) == 1 for batch in batches)


def test_models_take_turns_on_one_lane() -> None:
    policy = scheduler()
    for _ in range(3):
        policy.add(request(8), 0)
        policy.add(Request("other", max_batch_size=8, rows=8), 0)
    order = []
    while batches := policy.next_batches(0)[0]:
        order.append(batches[0].model)
        policy.finished(batches[0], 0.0)
    assert order == ["mlp", "other"] * 3


def test_a_model_that_got_no_lane_keeps_its_turn() -> None:
    policy = scheduler()
    policy.add(request(8), 0)
    (running,) = policy.next_batches(0)[0]
    policy.add(Request("other", max_batch_size=8), 0)
    policy.add(request(), 0)
    assert policy.next_batches(0)[0] == []
    policy.finished(running, 0.0)
    assert policy.next_batches(0)[0][0].model == "other"


def test_cheap_batches_run_inline_and_only_one_at_a_time() -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp", inline=True).observe(8, 50.0)
    costs.curve("cpu", "other", inline=True).observe(8, 5000.0)
    policy = scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    policy.add(Request("other", max_batch_size=8), 0)
    for _ in range(2):
        policy.add(request(8), 0)
    lanes = {batch.model: batch.lane for batch in policy.next_batches(0)[0]}
    assert lanes == {"other": 0, "mlp": INLINE}
    assert policy.queued == 1


def busy_with(flood: int, inline_us: float) -> Scheduler:
    """One lane, which is busy, and so many requests of one client that wait. Eight rows inline take so long."""
    costs = CostModel()
    for rows in (4, 8):
        costs.curve("cpu", "mlp", inline=True).observe(rows, inline_us * rows / 8)
    policy = scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    for _ in range(8 + flood):
        policy.add(request(client="many"), 0)
    assert [batch.lane for batch in policy.next_batches(0)[0]] == [0]
    return policy


def test_who_asks_for_little_need_not_wait_for_a_lane_that_others_keep_busy() -> None:
    policy = busy_with(flood=100, inline_us=200.0)
    assert policy.next_batches(0)[0] == []
    for _ in range(5):  # and comes back at once, each time
        few = request(client="few")
        policy.add(few, 0)
        for _turn in range(2):
            ((batch,), _) = policy.next_batches(0)
            assert (batch.lane, batch.rows) == (INLINE, 4)  # as many as take half as long
            policy.finished(batch, 0.0)
            if few in batch.requests:
                break
        else:
            pytest.fail("it still waits after two batches")
    assert policy.next_batches(0)[0] == []


@pytest.mark.parametrize(("flood", "inline_us"), [(6, 200.0), (100, 900.0)], ids=["few wait", "dear"])
def test_a_batch_for_a_lane_is_not_cut_for_nothing(flood: int, inline_us: float) -> None:
    policy = busy_with(flood, inline_us)
    policy.add(request(client="few"), 0)
    assert policy.next_batches(0)[0] == []


def test_what_was_never_measured_does_not_run_inline() -> None:
    policy = scheduler(cpu(inline_limit_us=100.0))
    policy.add(request(), 0)
    assert policy.next_batches(0)[0][0].lane == 0


@pytest.mark.parametrize(
    ("devices", "options", "device", "reason"),
    [
        ([gpu(), cpu()], {}, "cuda:0", "8000 MiB free"),
        ([gpu(), cpu()], {"prefer_gpu": False}, "cpu", "did not prefer a GPU"),
        ([gpu(), cpu()], {"min_gpu_memory_mb": 8000.0}, "cuda:0", "free"),
        ([gpu(), cpu()], {"min_gpu_memory_mb": 10000.0}, "cpu", "no GPU has 10000 MiB free: cuda:0 has 8000"),
        ([gpu(models=frozenset()), cpu()], {}, "cpu", "has not loaded 'mlp'"),
        ([cpu()], {}, "cpu", "no GPU is ready"),
        ([gpu(0, 2000.0), gpu(1), cpu()], {"min_gpu_memory_mb": 4000.0}, "cuda:1", "cuda:1"),
    ],
)
def test_routing(devices: list[Device], options: dict[str, object], device: str, reason: str) -> None:
    one = request(**options)
    scheduler(*devices).add(one, 0)
    assert one.device == device
    assert reason in one.reason


def test_equal_gpus_share_by_outstanding_rows() -> None:
    policy = scheduler(gpu(0), gpu(1), cpu())
    devices = []
    for rows in (4, 1, 1, 1, 1, 1):
        one = request(rows)
        policy.add(one, 0)
        devices.append(one.device)
    assert devices == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]


def test_full_queues_refuse_by_requests_and_by_bytes() -> None:
    policy = scheduler(max_requests=2)
    policy.add(request(), 0)
    policy.add(request(), 0)
    with pytest.raises(ResourceExhausted, match="2 requests"):
        policy.add(request(), 0)
    policy = scheduler(max_bytes=10)
    policy.add(request(2), 0)
    with pytest.raises(ResourceExhausted, match="limit, 10"):
        policy.add(request(1), 0)


def test_a_failed_device_hands_back_what_waited_and_is_avoided() -> None:
    device = gpu()
    policy = scheduler(device, cpu())
    policy.add(request(), 0)
    policy.next_batches(0)[0]
    stranded = request()
    policy.add(stranded, 0)
    assert policy.fail_device("cuda:0", "fell off the bus") == [stranded]
    policy.add(stranded, 0)
    assert stranded.device == "cpu"
    assert "cuda:0 failed" in stranded.reason
    assert policy.queued == 1


def test_no_device_for_the_model_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="'mlp'"):
        scheduler(gpu(free_mb=10.0)).add(request(min_gpu_memory_mb=20.0), 0)
    with pytest.raises(Unavailable):
        scheduler(gpu()).add(request(prefer_gpu=False), 0)


MS = 1_000_000


def affine(fixed_us: float, per_row_us: float, *devices: str) -> CostModel:
    """Costs of "mlp" that are known exactly: a fixed part and one per row."""
    costs = CostModel()
    for device in devices or ("cpu",):
        for rows in (1, 2, 4, 8):
            for _ in range(200):  # until hardly any spread is left
                costs.curve(device, "mlp").observe(rows, fixed_us + per_row_us * rows)
    return costs


def test_an_urgent_request_is_not_refused_for_what_is_due_later() -> None:
    policy = scheduler(costs=affine(1000, 100))
    for _ in range(80):
        policy.add(request(deadline_ns=500 * MS), 0)
    urgent = request(deadline_ns=4 * MS)
    policy.add(urgent, 0)
    assert urgent.predicted_us == pytest.approx(1100, rel=0.01)
    assert policy.next_batches(0)[0][0].requests[0] is urgent


def test_a_request_is_refused_for_what_is_due_before_it() -> None:
    policy = scheduler(costs=affine(1000, 100))
    for _ in range(80):  # ten batches of 1.8 ms
        policy.add(request(deadline_ns=19 * MS), 0)
    with pytest.raises(DeadlineExceeded, match="predicted wait is 18 ms"):
        policy.add(request(deadline_ns=19 * MS + 1), 0)
    policy.add(request(deadline_ns=18 * MS), 0)


def with_a_free_lane(waiting: list[Request], costs: CostModel) -> Scheduler:
    """A scheduler whose one lane has become free after these requests came."""
    policy = scheduler(costs=costs)
    policy.add(request(), 0)
    (running,) = policy.next_batches(0)[0]
    for one in waiting:
        policy.add(one, 0)
    policy.finished(running, 0.0)
    return policy


def test_those_that_a_batch_is_too_late_for_give_their_room_to_others() -> None:
    hopeless = [request(deadline_ns=10 * MS) for _ in range(3)]
    others = [request(deadline_ns=50 * MS) for _ in range(8)]
    policy = with_a_free_lane([*hopeless, *others], affine(1000, 100))
    (batch,), late = policy.next_batches(9 * MS)  # a batch takes at least 1.1 ms
    assert batch.requests == others
    assert late == hopeless
    assert (policy.queued, policy.queued_bytes) == (0, 0)


def test_a_batch_is_made_smaller_where_that_saves_the_most_urgent() -> None:
    urgent = request(deadline_ns=10 * MS)
    others = [request(deadline_ns=50 * MS) for _ in range(3)]
    policy = with_a_free_lane([urgent, *others], affine(1000, 100))
    (batch,), late = policy.next_batches(10 * MS - 1_250_000)  # enough for two rows, not for four
    assert batch.requests == [urgent, others[0]]
    assert late == []


def test_a_full_batch_is_not_cut_for_one_where_that_costs_more_than_it_saves() -> None:
    urgent = request(deadline_ns=20 * MS)
    others = [request(deadline_ns=100 * MS) for _ in range(16)]
    policy = with_a_free_lane([urgent, *others], affine(5000, 100))
    (batch,), late = policy.next_batches(20 * MS - 5_250_000)  # enough for two rows, not for eight
    assert batch.rows == 8
    assert late == [urgent]


@given(st.lists(st.tuples(st.integers(0, 900_000_000), st.integers(0, 9)), max_size=40), st.integers(0, 1_000_000_000))
def test_rows_due_are_counted_up_to_a_bucket(entries: list[tuple[int, int]], asked_ns: int) -> None:
    for in_line in (False, True):
        queue = RequestQueue(("mlp", (), False), BatchCosts(), Placement(ModelLoad()))
        for serial, (due_ns, rows) in enumerate(sorted(entries) if in_line else entries):
            one = request(1) if in_line else request(rows, client=b"%d" % (serial % 2))
            one.due_ns, one.serial, one.waiting = due_ns, serial, True
            queue.add(one)
        sizes = [(due_ns, 1 if in_line else rows) for due_ns, rows in entries]
        exact = sum(rows for due_ns, rows in sizes if due_ns <= asked_ns)
        bucket = sum(rows for due_ns, rows in sizes if due_ns >> 17 == asked_ns >> 17)
        assert exact <= queue.rows_due(1, asked_ns) <= exact + bucket


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 3), st.sampled_from([None, 1, 2, 5, 20, 90])),
            st.tuples(st.just("pass"), st.integers(0, 4000), st.just(0), st.none()),
            st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0), st.none()),
            st.tuples(st.just("finish"), st.integers(0, 5), st.just(0), st.none()),
        ),
        max_size=60,
    )
)
def test_whatever_happens_each_request_ends_once_and_none_is_started_late(
    steps: list[tuple[str, int, int, int | None]],
) -> None:
    """Deadlines, priorities, clients, cancelled and expired requests: each ends in exactly one way."""
    policy = scheduler(gpu(lanes=1), cpu(lanes=2), costs=affine(300, 50, "cpu", "cuda:0"), max_requests=40)
    ends: Counter[int] = Counter()
    added: list[Request] = []
    running: list[Batch] = []
    now_ns = 0

    def end(one: Request) -> None:
        assert not one.waiting
        one.done = True
        ends[id(one)] += 1

    def look() -> None:
        batches, late = policy.next_batches(now_ns)
        running.extend(batches)
        for one in [*late, *policy.expire(now_ns)]:
            assert one.deadline_ns != NEVER
            end(one)
        for batch in batches:
            assert batch.rows == sum(one.rows for one in batch.requests)
            assert len(batch.requests) == 1 or batch.rows <= 8
            for one in batch.requests:
                assert not one.done
                assert one.deadline_ns >= now_ns + int(batch.costs.lane.mean(batch.rows) * 1e3)
        assert policy.next_event_ns() > now_ns

    for action, size, level, patience_ms in steps:
        if action == "add":
            deadline_ns = NEVER if patience_ms is None else now_ns + patience_ms * MS
            one = request(size, wanted="auto", priority=level, client=b"%d" % (size % 3), deadline_ns=deadline_ns)
            try:
                policy.add(one, now_ns)
            except DeadlineExceeded:
                assert patience_ms is not None
            except ResourceExhausted:
                assert policy.queued == 40
            else:
                added.append(one)
        elif action == "pass":
            now_ns += size * 1000
        elif action == "cancel" and added:
            one = added[size % len(added)]
            if policy.cancel(one):
                end(one)
        elif action == "finish" and running:
            batch = running.pop(size % len(running))
            policy.finished(batch, 0.0)
            for one in batch.requests:
                if not one.done:
                    end(one)
        look()
    while policy.queued or running:
        look()
        while running:
            batch = running.pop()
            policy.finished(batch, 0.0)
            for one in batch.requests:
                if not one.done:
                    end(one)
    assert ends == Counter(id(one) for one in added)
    assert (policy.queued, policy.queued_bytes, policy.running) == (0, 0, 0)
    for device in policy.devices.values():
        assert (device.outstanding_rows, device.queued, device.counts) == (0, 0, [0] * LEVELS)
        assert sorted(device.free_lanes) == list(range(device.lanes))


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 8))
def test_one_of_many_clients_waits_for_a_turn_of_each_and_no_more(flood: int, others: int, rows: int) -> None:
    policy = scheduler(max_requests=10_000, max_bytes=1 << 30)
    for _ in range(flood):
        policy.add(request(rows, client=b"flood"), 0)
    for number in range(others):
        policy.add(request(rows, client=b"%d" % number), 0)
    last = request(rows, client=b"last")
    policy.add(last, 0)
    before = 0
    while True:
        (batch,) = policy.next_batches(0)[0]
        policy.finished(batch, 0.0)
        if last in batch.requests:
            break
        before += batch.rows
    turn = 16 + rows  # a turn ends with the request that fills it
    assert before <= (others + 2) * turn


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 2), st.booleans()),
            st.tuples(st.just("run"), st.just(0), st.just(0), st.just(False)),
            st.tuples(st.just("finish"), st.integers(0, 5), st.just(0), st.just(False)),
        )
    )
)
def test_nothing_is_lost_nothing_runs_twice_limits_hold(steps: list[tuple[str, int, int, bool]]) -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp", (0,), inline=True).observe(4, 10.0)
    policy = scheduler(gpu(lanes=2), cpu(lanes=2, inline_limit_us=20.0), costs=costs, max_requests=20, max_bytes=400)
    added: list[Request] = []
    seen: Counter[int] = Counter()
    running: list[Batch] = []
    latest: dict[tuple[str, tuple[int, ...]], int] = {}

    def start() -> None:
        for batch in policy.next_batches(0)[0]:
            running.append(batch)
            rows = sum(one.rows for one in batch.requests)
            assert rows == batch.rows
            assert len(batch.requests) == 1 or rows <= 8
            assert len({(one.model, one.group, one.device) for one in batch.requests}) == 1
            for one in batch.requests:
                seen[id(one)] += 1
                key = (one.device, one.group)
                position = next(index for index, other in enumerate(added) if other is one)
                assert position > latest.get(key, -1)  # first come, first served within a group
                latest[key] = position
        lanes = [(batch.device.name, batch.lane) for batch in running if batch.lane != INLINE]
        assert len(lanes) == len(set(lanes))

    for action, size, group, prefer_gpu in steps:
        if action == "add":
            one = request(size, group=(group,), prefer_gpu=prefer_gpu)
            try:
                policy.add(one, 0)
            except ResourceExhausted:
                assert policy.queued == 20 or policy.queued_bytes + one.nbytes > 400
            else:
                added.append(one)
        elif action == "run":
            start()
        elif running:
            policy.finished(running.pop(size % len(running)), 0.0)
    while policy.queued or running:
        start()
        while running:
            policy.finished(running.pop(), 0.0)
    assert seen == Counter(id(one) for one in added)
    assert (policy.queued, policy.queued_bytes, policy.running) == (0, 0, 0)
    assert all(device.outstanding_rows == 0 for device in policy.devices.values())
    assert all(sorted(device.free_lanes) == [0, 1] for device in policy.devices.values())
