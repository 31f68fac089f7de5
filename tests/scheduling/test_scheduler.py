"""The scheduler: models that come and go, cancelled requests, failed devices."""

from __future__ import annotations

import pytest

from scheduling_helpers import MODELS, cpu, gpu, make_scheduler, request, run_one, untried_scheduler
from tnxctl.protocol.errors import Unavailable
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device


def test_failed_device_hands_back_what_waited_and_is_avoided() -> None:
    device = gpu()
    scheduler = untried_scheduler(device, cpu())
    scheduler.add(request(), 0)
    scheduler.next_batches(0)[0]
    stranded = request()
    scheduler.add(stranded, 0)
    assert scheduler.fail_device("cuda:0", "fell off the bus") == [stranded]
    scheduler.add(stranded, 0)
    assert stranded.device == "cpu"
    assert "cuda:0 failed" in stranded.reason
    assert scheduler.queued == 1


def test_model_is_served_from_when_it_comes_until_it_goes() -> None:
    scheduler = make_scheduler()
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


def test_outstanding_requests_wait_or_run() -> None:
    scheduler = make_scheduler()
    assert scheduler.models.outstanding("mlp") == 0
    for rows in (8, 1, 1):
        scheduler.add(request(rows=rows), 0)
    scheduler.add(request(model="other"), 0)
    ((batch,), _) = scheduler.next_batches(0)
    assert (scheduler.models.outstanding("mlp"), scheduler.models.outstanding("other")) == (3, 1)
    scheduler.finished(batch, 1000.0)
    assert scheduler.models.outstanding("mlp") == 2
    scheduler.drop_all()
    assert (scheduler.models.outstanding("mlp"), scheduler.models.outstanding("other")) == (0, 0)


def test_forgotten_model_comes_back_as_new() -> None:
    costs = CostModel()
    scheduler = make_scheduler(Device("cpu", "cpu", 2, set(MODELS)), costs=costs)
    (cpu,) = scheduler.devices.values()
    scheduler.models.set_lane_limit("mlp", 1)
    scheduler.models.limit_rows("cpu", "mlp", 2)
    for model in ("mlp", "other"):
        scheduler.add(request(model=model), 0)
        run_one(scheduler)
        assert costs.curve("cpu", model).known
    cpu.models.discard("mlp")
    scheduler.models.forget("mlp")
    assert cpu.queues.keys() == {("other", (), False)}
    assert not costs.curve("cpu", "mlp").known
    assert costs.curve("cpu", "other").known
    cpu.models.add("mlp")
    for _ in range(2):
        scheduler.add(request(rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    assert [(batch.max_rows, batch.requests[0].predicted_us) for batch in batches] == [(0, 0.0)] * 2


def test_model_is_not_forgotten_while_something_of_it_is_outstanding() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(), 0)
    for device in scheduler.devices.values():
        device.models.clear()
    with pytest.raises(AssertionError):
        scheduler.models.forget("mlp")


def test_cancelled_request_leaves_the_queue() -> None:
    scheduler = make_scheduler()
    kept, cancelled = request(nbytes=5), request(nbytes=7)
    for one in (kept, cancelled):
        scheduler.add(one, 0)
    assert scheduler.cancel(cancelled)
    assert not scheduler.cancel(cancelled)
    assert (scheduler.queued, scheduler.queued_bytes) == (1, 5)
    assert run_one(scheduler).requests == [kept]
    assert not scheduler.cancel(kept)


def test_cancelling_the_last_request_leaves_nothing_behind() -> None:
    scheduler = make_scheduler()
    only = request()
    scheduler.add(only, 0)
    assert scheduler.cancel(only)
    (cpu,) = scheduler.devices.values()
    assert cpu.queued == 0
    assert sum(cpu.backlog_us) == 0
    assert scheduler.next_batches(0) == ([], [])
