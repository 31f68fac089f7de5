"""Background batches, for which nobody waits."""

from __future__ import annotations

import pytest

from scheduling_helpers import MODELS, MS, make_scheduler, request, run_one, scheduler_with_lanes
from tnxd.lanes import BACKGROUND
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device


def test_background_batch_leaves_the_lanes_to_others() -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp").observe(8, 1000.0)
    scheduler = make_scheduler(Device("cpu", "cpu", 1, set(MODELS)), costs=costs)
    (cpu,) = scheduler.devices.values()
    batch = scheduler.start_background("mlp", (), 8, 0)
    assert batch is not None
    assert (batch.model, batch.requests, batch.rows, batch.device, batch.lane) == ("mlp", [], 8, cpu, BACKGROUND)
    assert (scheduler.running, scheduler.models.outstanding("mlp"), scheduler.queued) == (1, 1, 0)
    one = request(rows=8)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1000)
    passes = list(cpu.passes)
    scheduler.finished(batch, 5000.0)
    assert cpu.passes == passes
    assert costs.curve("cpu", "mlp").mean(8) == pytest.approx(1000)
    assert run_one(scheduler).requests == [one]
    assert (scheduler.running, scheduler.models.outstanding("mlp"), cpu.outstanding_rows) == (0, 0, 0)


def test_background_batch_does_not_start_where_something_waits_or_nothing_is_free() -> None:
    scheduler = scheduler_with_lanes(1)
    scheduler.add(request(max_delay_ns=3 * MS), 0)
    assert scheduler.start_background("mlp", (), 1, 0) is None  # it waits for company and not for a lane, all the same
    (batch,), _ = scheduler.next_batches(3 * MS)
    assert scheduler.start_background("mlp", (), 1, 0) is None  # the only lane runs
    scheduler.finished(batch, 1000.0)
    assert scheduler.start_background("mlp@3", (), 1, 0) is None
    background = scheduler.start_background("mlp", (), 1, 0)
    assert background is not None
    assert scheduler.start_background("other", (), 1, 0) is None  # one at a time
    scheduler.finished(background, 0.0)
    scheduler.fail_device("cpu", "fell off the bus")
    assert scheduler.start_background("mlp", (), 1, 0) is None


def test_background_batch_keeps_to_the_lanes_and_rows_of_its_model() -> None:
    scheduler = scheduler_with_lanes(3)
    scheduler.models.set_lane_limit("mlp", 1)
    scheduler.models.limit_rows("cpu", "mlp", 2)
    batch = scheduler.start_background("mlp", (), 8, 0)
    assert batch is not None
    assert batch.max_rows == 2
    assert scheduler.start_background("mlp", (), 8, 0) is None
    one = request()
    scheduler.add(one, 0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(batch, 1000.0)
    assert run_one(scheduler).requests == [one]
