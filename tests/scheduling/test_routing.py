"""Routing: which device a request goes to, and why."""

from __future__ import annotations

import pytest

from scheduling_helpers import (
    MODELS,
    MS,
    affine_costs,
    cpu,
    gpu,
    make_scheduler,
    request,
    run_one,
    scheduler_of_two_devices,
    scheduler_with_inline,
    untried_scheduler,
)
from tnxctl.protocol.errors import InvalidArgument, Unavailable
from tnxd.scheduling.device import Device


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
def test_route_follows_what_the_request_asks_for_and_what_devices_have(
    devices: list[Device], options: dict[str, object], device: str, reason: str
) -> None:
    one = request(**options)
    untried_scheduler(*devices).add(one, 0)
    assert one.device == device
    assert reason in one.reason


def test_equal_gpus_share_by_outstanding_rows() -> None:
    scheduler = untried_scheduler(gpu(0), gpu(1), cpu())
    devices = []
    for rows in (4, 1, 1, 1, 1, 1):
        one = request(rows=rows)
        scheduler.add(one, 0)
        devices.append(one.device)
    assert devices == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]


def test_a_request_that_prefers_gpus_goes_to_the_one_that_is_done_first() -> None:
    costs = affine_costs(1000.0, 100.0, "cuda:0")
    for rows in (1, 2, 4, 8):
        costs.curve("cuda:1", "mlp").observe(rows, 4 * (1000.0 + 100.0 * rows))
    scheduler = make_scheduler(gpu(0), gpu(1), cpu(), costs=costs)
    devices = []
    for _ in range(24):
        one = request(rows=8)
        scheduler.add(one, 0)
        devices.append(one.device)
    # Of five batches, the one that is four times as fast does four, whatever the number of rows that wait for it.
    assert devices.count("cuda:0") == pytest.approx(0.8 * 24, abs=1)
    assert devices[:3] == ["cuda:0", "cuda:0", "cuda:0"]


def test_a_gpu_that_is_lost_is_left_out_at_once_and_one_that_comes_late_is_used() -> None:
    scheduler = untried_scheduler(gpu(0), gpu(1), cpu())
    first, second = request(), request()
    for one in (first, second):
        scheduler.add(one, 0)
    assert [first.device, second.device] == ["cuda:0", "cuda:1"]
    assert scheduler.fail_device("cuda:0", "fell out") == [first]
    scheduler.add(first, 0)
    assert first.device == "cuda:1"
    with pytest.raises(Unavailable, match="cuda:0 failed: fell out"):
        scheduler.add(request(wanted="cuda:0"), 0)
    scheduler.fail_device("cuda:1", "fell out, too")
    last = request()
    scheduler.add(last, 0)
    assert (last.device, last.reason) == ("cpu", "no GPU is ready: cuda:0 failed, cuda:1 failed")
    scheduler.add_device(gpu(2))
    late = request()
    scheduler.add(late, 0)
    assert late.device == "cuda:2"


def test_model_without_a_device_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="'mlp'"):
        untried_scheduler(gpu(free_mb=10.0)).add(request(min_gpu_memory_mb=20.0), 0)
    with pytest.raises(Unavailable):
        untried_scheduler(gpu()).add(request(prefer_gpu=False), 0)


def test_predicted_wait_counts_the_work_of_the_caller_between_batches() -> None:
    """A batch runs for two milliseconds, and the next one begins six later, as long as requests wait."""
    scheduler = scheduler_with_inline(lane_us=2000.0)
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


def test_idle_time_after_a_withdrawn_backlog_is_no_work_of_the_caller() -> None:
    """The only request that waits is cancelled; the next one comes a minute later."""
    scheduler = scheduler_with_inline(lane_us=2000.0)
    waiting = [request(rows=8, max_batch_size=8) for _ in range(2)]
    for each in waiting:
        scheduler.add(each, 0)
    ((batch,), _) = scheduler.next_batches(0)
    scheduler.finished(batch, 2000.0, 2 * MS)
    assert scheduler.cancel(waiting[1])
    minute_ns = 60_000 * MS
    scheduler.add(request(rows=8, max_batch_size=8), minute_ns)
    ((batch,), _) = scheduler.next_batches(minute_ns)
    scheduler.finished(batch, 2000.0, minute_ns + 2 * MS)
    assert batch.device.placements["mlp"].forecast.factor == pytest.approx(1.0)


def test_request_that_did_not_fit_goes_to_another_device() -> None:
    gpus = [Device(f"cuda:{index}", "cuda", 1, set(MODELS), 8000.0) for index in range(2)]
    scheduler = make_scheduler(*gpus, Device("cpu", "cpu", 1, set(MODELS)))
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


def test_request_for_any_device_that_did_not_fit_goes_to_another() -> None:
    scheduler = scheduler_of_two_devices()
    one = request(rows=64, wanted="auto", max_batch_size=64, excluded=frozenset({"cuda:0"}))
    scheduler.add(one, 0)
    assert one.device == "cpu"
    assert one.reason.startswith("cuda:0 had no memory left for it; done first there: cpu")
    with pytest.raises(Unavailable):
        scheduler.add(request(wanted="auto", excluded=frozenset({"cuda:0", "cpu"})), 0)


def test_auto_takes_the_device_that_is_done_first() -> None:
    scheduler = scheduler_of_two_devices()
    small, large = (request(rows=rows, wanted="auto", max_batch_size=64) for rows in (1, 64))
    scheduler.add(small, 0)
    scheduler.add(large, 0)
    assert (small.device, large.device) == ("cpu", "cuda:0")
    assert "done first there: cpu 0.1 ms, cuda:0 0.402 ms" in small.reason


def test_auto_counts_what_waits() -> None:
    scheduler = scheduler_of_two_devices()
    devices = []
    for _ in range(20):
        one = request(rows=8, wanted="auto")
        scheduler.add(one, 0)
        devices.append(one.device)
    assert devices[0] == "cuda:0"
    assert set(devices) == {"cpu", "cuda:0"}


def test_named_device_is_taken_at_its_word() -> None:
    scheduler = scheduler_of_two_devices()
    one = request(rows=64, wanted="cpu", max_batch_size=64)
    scheduler.add(one, 0)
    assert (one.device, one.reason) == ("cpu", "the request asked for cpu")
    with pytest.raises(InvalidArgument, match="'cuda:1': there are cuda:0, cpu, and auto"):
        scheduler.add(request(wanted="cuda:1"), 0)
    scheduler.fail_device("cuda:0", "fell off the bus")
    with pytest.raises(Unavailable, match="fell off the bus"):
        scheduler.add(request(wanted="cuda:0"), 0)


def test_empty_queues_are_swept_but_not_looked_for_at_every_new_shape() -> None:
    """Empty queues are swept out, but not looked for at every new one."""
    scheduler = make_scheduler()
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


def test_a_model_in_a_process_runs_there_for_whoever_asks_for_the_cpu_too() -> None:
    processes = Device("process", "process", 8, {"isolated"})
    scheduler = untried_scheduler(gpu(models=frozenset()), cpu(), processes)
    for wanted in ("", "auto", "cpu", "process"):
        one = request("isolated", wanted=wanted)
        scheduler.add(one, 0)
        assert one.device == "process"
    with pytest.raises(Unavailable, match="cuda:0 has not loaded 'isolated'"):
        scheduler.add(request("isolated", wanted="cuda:0"), 0)
    with pytest.raises(Unavailable, match="process has not loaded 'mlp'"):
        scheduler.add(request("mlp", wanted="process"), 0)
