"""Row ceilings of a model on a device where memory ran out."""

from __future__ import annotations

import pytest

from scheduling_helpers import MODELS, MS, affine_costs, cpu, make_scheduler, request, run_one, scheduler_with_lanes
from tnxd.scheduling.device import Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler


def test_batches_after_memory_ran_out_are_as_large_as_what_worked() -> None:
    scheduler = make_scheduler()
    scheduler.models.limit_rows("cpu", "mlp", 3)
    for rows in (1, 1, 1, 1, 8, 1):
        scheduler.add(request(rows=rows), 0)
        scheduler.add(request(model="other", rows=rows), 0)
    batches = []
    while scheduler.queued:
        batches.append(run_one(scheduler))
    sizes = {model: [batch.rows for batch in batches if batch.model == model] for model in MODELS}
    assert sizes == {"mlp": [3, 1, 8, 1], "other": [4, 8, 1]}
    assert {batch.model: batch.max_rows for batch in batches} == {"mlp": 3, "other": 0}


def test_ceiling_is_one_row_where_nothing_worked() -> None:
    scheduler = make_scheduler()
    scheduler.models.limit_rows("cpu", "mlp", 0)
    for _ in range(2):
        scheduler.add(request(), 0)
    assert [run_one(scheduler).rows for _ in range(2)] == [1, 1]


def test_ceiling_is_not_raised_by_a_late_report() -> None:
    scheduler = make_scheduler()
    for rows in (2, 4):
        scheduler.models.limit_rows("cpu", "mlp", rows)
    for _ in range(8):
        scheduler.add(request(), 0)
    assert run_one(scheduler).rows == 2


def test_ceiling_counts_in_predictions_and_in_batching_delays() -> None:
    scheduler = make_scheduler()
    scheduler.models.limit_rows("cpu", "mlp", 2)
    for _ in range(8):
        scheduler.add(request(), 0)
    last = request()
    scheduler.add(last, 0)
    assert last.predicted_us == pytest.approx(5000)
    scheduler.drop_all()
    for _ in range(2):
        scheduler.add(request(group=(1,), max_delay_ns=3 * MS), 0)
    assert run_one(scheduler).rows == 2


def test_ceiling_is_not_raised_by_batches_formed_before() -> None:
    scheduler = scheduler_with_lanes(300)
    for _ in range(300):
        scheduler.add(request(rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    scheduler.models.limit_rows("cpu", "mlp", 4)
    for batch in batches:
        scheduler.finished(batch, 1000.0)
    scheduler.add(request(rows=8), 0)
    assert run_one(scheduler).max_rows == 4


def test_ceiling_rises_as_batches_work_and_ends_at_the_limit_of_the_model() -> None:
    scheduler = make_scheduler()
    scheduler.models.limit_rows("cpu", "mlp", 3)
    seen = []
    for _ in range(600):
        scheduler.add(request(rows=2), 0)
        scheduler.add(request(rows=2), 0)
        while scheduler.queued:
            seen.append(run_one(scheduler).max_rows)
    assert sorted(set(seen), key=seen.index) == [3, 6, 0]
    assert seen.count(3) == seen.count(6) == 256


def test_ceiling_is_not_raised_by_batches_that_fail_or_are_small() -> None:
    scheduler = make_scheduler()
    scheduler.models.limit_rows("cpu", "mlp", 4)
    for rows, micros in [(2, 1000.0), (4, 0.0)] * 300:
        scheduler.add(request(rows=rows), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, micros)
        assert batch.max_rows == 4


def crowded_scheduler() -> Scheduler:
    """Two lanes that share a chip."""
    device = Device("cuda:0", "cuda", 2, set(MODELS), 8000.0, shares_chip=True)
    return make_scheduler(device, cpu(), costs=affine_costs(900.0, 25.0, "cuda:0"))


def crowd(scheduler: Scheduler, now: int) -> list[Request]:
    """A batch of eight rows runs out of memory beside another, which goes on."""
    requests = [request(rows=4) for _ in range(2)]
    for one in requests:
        scheduler.add(one, now)
    (batch,), _ = scheduler.next_batches(now)
    assert batch.requests == requests
    scheduler.finished(batch, 0.0, now)
    scheduler.run_alone(batch, requests)
    return requests


def test_requests_that_find_no_memory_beside_others_have_the_device_alone() -> None:
    scheduler = crowded_scheduler()
    scheduler.add(request("other"), 0)
    (beside,), _ = scheduler.next_batches(0)
    again = crowd(scheduler, 0)
    assert scheduler.next_batches(0) == ([], [])
    scheduler.add(request("other"), 0)
    scheduler.add(request("other", wanted="auto"), 0)
    assert scheduler.start_background("mlp", (), 1, 0) is None
    assert [batch.device.name for batch in scheduler.next_batches(0)[0]] == ["cpu"]
    scheduler.finished(beside, 1000.0, MS)
    (alone,), _ = scheduler.next_batches(MS)
    assert (alone.requests, alone.alone) == (again, True)
    scheduler.add(request("other"), 2 * MS)
    assert scheduler.next_batches(2 * MS) == ([], [])
    scheduler.finished(alone, 1000.0, 3 * MS)
    scheduler.add(request("other"), 3 * MS)
    assert scheduler.next_batches(3 * MS)[0]
    assert scheduler.devices["cuda:0"].placements["mlp"].max_rows == 0


def test_memory_that_runs_out_beside_others_again_and_again_lowers_the_ceiling() -> None:
    for worked, ceiling in ((15, 4), (16, 0)):
        scheduler = crowded_scheduler()
        for _ in range(2):
            scheduler.add(request("other"), 0)
            (beside,), _ = scheduler.next_batches(0)
            again = crowd(scheduler, 0)
            scheduler.finished(beside, 1000.0, 0)
            left = len(again)
            while left:
                (alone,), _ = scheduler.next_batches(0)
                assert alone.alone
                left -= len(alone.requests)
                scheduler.finished(alone, 0.0, 0)
            assert alone.max_rows in (0, ceiling)
            for _ in range(worked):
                scheduler.add(request(rows=8), 0)
                run_one(scheduler)
        assert scheduler.devices["cuda:0"].placements["mlp"].max_rows == ceiling


def test_requests_that_are_to_run_alone_can_be_withdrawn_and_are_late_like_others() -> None:
    scheduler = crowded_scheduler()
    scheduler.add(request("other"), 0)
    (beside,), _ = scheduler.next_batches(0)
    first, second = crowd(scheduler, 0)
    assert scheduler.models.outstanding("mlp") == 2
    assert scheduler.cancel(first)
    assert scheduler.fail_device("cuda:0", "gone") == [second]
    scheduler.add(second, 0)
    assert second.device == "cpu"
    (batch,), _ = scheduler.next_batches(0)
    assert not batch.alone
    for ended in (beside, batch):
        scheduler.finished(ended, 0.0, 0)
    assert scheduler.models.outstanding("mlp") == 0
