"""The policy alone: no torch, no socket, no clock."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.errors import ResourceExhausted, Unavailable
from tnxd.costs import CostModel
from tnxd.scheduler import INLINE, Batch, Device, Request, Scheduler

MODELS = frozenset({"mlp", "other"})


def cpu(lanes: int = 1, inline_limit_us: float = 0.0) -> Device:
    return Device("cpu", "cpu", lanes, MODELS, inline_limit_us=inline_limit_us)


def gpu(index: int = 0, free_mb: float = 8000.0, lanes: int = 1, models: frozenset[str] = MODELS) -> Device:
    return Device(f"cuda:{index}", "cuda", lanes, models, free_mb)


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
    policy.add(only)
    (batch,) = policy.next_batches()
    assert batch.requests == [only]
    assert (batch.device.name, batch.lane, batch.rows) == ("cpu", 0, 1)


def test_what_waits_while_the_lane_is_busy_becomes_one_batch() -> None:
    policy = scheduler()
    policy.add(request())
    (running,) = policy.next_batches()
    waiting = [request() for _ in range(5)]
    for one in waiting:
        policy.add(one)
    assert policy.next_batches() == []
    policy.finished(running)
    (batch,) = policy.next_batches()
    assert batch.requests == waiting


def test_a_batch_keeps_the_row_limit_and_the_order() -> None:
    policy = scheduler()
    requests = [request(rows) for rows in (3, 4, 2, 8, 1)]
    for one in requests:
        policy.add(one)
    sizes = []
    while batches := policy.next_batches():
        sizes.append([one.rows for one in batches[0].requests])
        policy.finished(batches[0])
    assert sizes == [[3, 4], [2], [8], [1]]


def test_a_request_beyond_the_limit_rides_alone() -> None:
    policy = scheduler()
    for rows in (20, 1):
        policy.add(request(rows))
    (batch,) = policy.next_batches()
    assert [one.rows for one in batch.requests] == [20]


def test_groups_and_unbatchable_models_never_share_a_batch() -> None:
    policy = scheduler(cpu(lanes=9))
    for group in ((1,), (2,), (1,)):
        policy.add(request(group=group))
    policy.add(request(max_batch_size=0))
    policy.add(request(max_batch_size=0))
    batches = policy.next_batches()
    assert sorted(len(batch.requests) for batch in batches) == [1, 1, 1, 2]
    assert all(len({one.group for one in batch.requests}) == 1 for batch in batches)


def test_models_take_turns_on_one_lane() -> None:
    policy = scheduler()
    for _ in range(3):
        policy.add(request(8))
        policy.add(Request("other", max_batch_size=8, rows=8))
    order = []
    while batches := policy.next_batches():
        order.append(batches[0].model)
        policy.finished(batches[0])
    assert order == ["mlp", "other"] * 3


def test_a_model_that_got_no_lane_keeps_its_turn() -> None:
    policy = scheduler()
    policy.add(request(8))
    (running,) = policy.next_batches()
    policy.add(Request("other", max_batch_size=8))
    policy.add(request())
    assert policy.next_batches() == []
    policy.finished(running)
    assert policy.next_batches()[0].model == "other"


def test_cheap_batches_run_inline_and_only_one_at_a_time() -> None:
    costs = CostModel()
    costs.observe("cpu", "mlp", 8, 50.0)
    costs.observe("cpu", "other", 8, 5000.0)
    policy = scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    policy.add(Request("other", max_batch_size=8))
    for _ in range(2):
        policy.add(request(8))
    lanes = {batch.model: batch.lane for batch in policy.next_batches()}
    assert lanes == {"other": 0, "mlp": INLINE}
    assert policy.queued == 1


def test_what_was_never_measured_does_not_run_inline() -> None:
    policy = scheduler(cpu(inline_limit_us=100.0))
    policy.add(request())
    assert policy.next_batches()[0].lane == 0


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
    scheduler(*devices).add(one)
    assert one.device == device
    assert reason in one.reason


def test_equal_gpus_share_by_outstanding_rows() -> None:
    policy = scheduler(gpu(0), gpu(1), cpu())
    devices = []
    for rows in (4, 1, 1, 1, 1, 1):
        one = request(rows)
        policy.add(one)
        devices.append(one.device)
    assert devices == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]


def test_full_queues_refuse_by_requests_and_by_bytes() -> None:
    policy = scheduler(max_requests=2)
    policy.add(request())
    policy.add(request())
    with pytest.raises(ResourceExhausted, match="2 requests"):
        policy.add(request())
    policy = scheduler(max_bytes=10)
    policy.add(request(2))
    with pytest.raises(ResourceExhausted, match="limit of 10"):
        policy.add(request(1))


def test_a_failed_device_hands_back_what_waited_and_is_avoided() -> None:
    device = gpu()
    policy = scheduler(device, cpu())
    policy.add(request())
    policy.next_batches()
    stranded = request()
    policy.add(stranded)
    assert policy.fail_device("cuda:0", "fell off the bus") == [stranded]
    policy.add(stranded)
    assert stranded.device == "cpu"
    assert "cuda:0 failed" in stranded.reason
    assert policy.queued == 1


def test_no_device_for_the_model_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="'mlp'"):
        scheduler(gpu(free_mb=10.0)).add(request(min_gpu_memory_mb=20.0))
    with pytest.raises(Unavailable):
        scheduler(gpu()).add(request(prefer_gpu=False))


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
    costs.observe("cpu", "mlp", 4, 10.0)
    policy = scheduler(gpu(lanes=2), cpu(lanes=2, inline_limit_us=20.0), costs=costs, max_requests=20, max_bytes=400)
    added: list[Request] = []
    seen: Counter[int] = Counter()
    running: list[Batch] = []
    latest: dict[tuple[str, tuple[int, ...]], int] = {}

    def start() -> None:
        for batch in policy.next_batches():
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
                policy.add(one)
            except ResourceExhausted:
                assert policy.queued == 20 or policy.queued_bytes + one.nbytes > 400
            else:
                added.append(one)
        elif action == "run":
            start()
        elif running:
            policy.finished(running.pop(size % len(running)))
    while policy.queued or running:
        start()
        while running:
            policy.finished(running.pop())
    assert seen == Counter(id(one) for one in added)
    assert (policy.queued, policy.queued_bytes, policy.running) == (0, 0, 0)
    assert all(device.outstanding_rows == 0 for device in policy.devices.values())
    assert all(sorted(device.free_lanes) == [0, 1] for device in policy.devices.values())
