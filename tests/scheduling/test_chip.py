"""Lanes that share a chip: what batches beside others teach, and what is predicted for them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling_helpers import MODELS, MS, affine_costs, make_scheduler, request
from simulated_chip import SimulatedChip, drive
from tnxctl.protocol.errors import DeadlineExceeded
from tnxd.lanes import BACKGROUND
from tnxd.scheduling.chip import Chip
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.scheduler import Scheduler

_FIXED_US, _ROW_US = 1000.0, 20.0
_SHAPES = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]


def chip(streams: int, depth: int = 1) -> Device:
    """A GPU whose streams take so many batches at a time."""
    return Device("cuda:0", "cuda", streams * depth, set(MODELS), 8000.0, shares_chip=True, streams=streams)


def scheduler_of(device: Device, fixed_us: float = _FIXED_US, row_us: float = _ROW_US) -> Scheduler:
    """A scheduler that knows what batches of "mlp" take alone; "other" takes ten times as long, which it knows too."""
    costs = affine_costs(fixed_us, row_us, "cuda:0")
    for rows in (1, 2, 4, 8):
        for _ in range(200):
            costs.curve("cuda:0", "other").observe(rows, 10 * (fixed_us + row_us * rows))
    return make_scheduler(device, costs=costs)


def work_us(model: str, rows: int) -> float:
    return (_FIXED_US + _ROW_US * rows) * (10 if model == "other" else 1)


def start(scheduler: Scheduler, model: str = "mlp", now_us: float = 0.0) -> Batch:
    scheduler.add(request(model, wanted="cuda:0"), int(now_us * 1e3))
    (batch,), late = scheduler.next_batches(int(now_us * 1e3))
    assert not late
    return batch


@pytest.mark.parametrize(("streams", "depth"), _SHAPES)
def test_costs_and_predictions_are_true_where_lanes_share_a_chip(streams: int, depth: int) -> None:
    """Under load that comes and goes. Taken for lanes that do not, they were wrong by half of what batches take."""
    scheduler, generator = scheduler_of(chip(streams, depth)), random.Random(7)
    now_us, arrivals = 0.0, []
    for number in range(1500):
        now_us += generator.expovariate((0.9 if number // 250 % 2 else 0.2) * 8 / work_us("mlp", 8))
        arrivals.append((now_us, "mlp", 1))
    outcomes = drive(scheduler, SimulatedChip(streams, work_us), arrivals)
    learned = scheduler.models.known_costs("mlp")["cuda:0"]
    assert {rows: us / work_us("mlp", rows) for rows, us in learned.items()} == pytest.approx(
        dict.fromkeys(learned, 1.0), abs=0.01
    )
    took_us = sum(outcome.took_us for outcome in outcomes)
    assert sum(outcome.predicted_us for outcome in outcomes) == pytest.approx(took_us, rel=0.06)
    assert sum(abs(outcome.predicted_us - outcome.took_us) for outcome in outcomes) < 0.16 * took_us


@pytest.mark.parametrize(("streams", "depth"), _SHAPES)
def test_the_factor_of_a_forecast_is_one_where_the_chip_is_never_idle(streams: int, depth: int) -> None:
    device = chip(streams, depth)
    scheduler = scheduler_of(device)
    drive(scheduler, SimulatedChip(streams, work_us), [(0.0, model, 1) for model in ("mlp", "mlp", "other") * 300])
    for model in MODELS:
        assert device.placements[model].forecast.factor == pytest.approx(1.0, abs=0.02)


def test_a_short_batch_shares_the_chip_with_a_long_one_and_does_not_wait_for_it() -> None:
    scheduler = scheduler_of(chip(2))
    start(scheduler, "other")
    short = request(wanted="cuda:0")
    scheduler.add(short, 0)
    assert short.predicted_us == pytest.approx(2 * work_us("mlp", 1), rel=0.01)
    one_stream = scheduler_of(chip(1, 2))
    start(one_stream, "other")
    behind = request(wanted="cuda:0")
    one_stream.add(behind, 0)
    assert behind.predicted_us == pytest.approx(work_us("other", 1) + work_us("mlp", 1), rel=0.01)


def test_what_runs_beside_a_request_counts_for_its_deadline() -> None:
    for streams, depth in ((2, 1), (1, 2)):
        scheduler = scheduler_of(chip(streams, depth))
        start(scheduler)
        alone_us = work_us("mlp", 1)
        with pytest.raises(DeadlineExceeded):
            scheduler.add(request(wanted="cuda:0", deadline_ns=int(1.9e3 * alone_us)), 0)
        scheduler.add(request(wanted="cuda:0", deadline_ns=int(2.2e3 * alone_us)), 0)


def test_a_batch_that_sharing_makes_late_is_made_smaller() -> None:
    scheduler = scheduler_of(chip(2), fixed_us=100.0, row_us=1000.0)
    scheduler.add(request(rows=2, wanted="cuda:0"), 0)
    ((first,), _) = scheduler.next_batches(0)
    assert first.rows == 2
    for deadline_ms in (5, 60, 60, 60):
        scheduler.add(request(wanted="cuda:0", deadline_ns=deadline_ms * MS), 0)
    (second,), late = scheduler.next_batches(0)
    assert (second.rows, late) == (2, [])  # alone, four rows would take 4.1 ms


def test_a_batch_takes_a_lane_of_the_stream_with_the_fewest() -> None:
    scheduler = scheduler_of(chip(2, 2))
    lanes = [start(scheduler).lane % 2 for _ in range(4)]
    assert sorted(lanes[:2]) == sorted(lanes[2:]) == [0, 1]


def test_background_batches_share_the_chip() -> None:
    scheduler = scheduler_of(chip(2))
    background = scheduler.start_background("mlp", (), 1, 0)
    assert background is not None
    assert background.lane == BACKGROUND
    batch = start(scheduler)
    now_ns = int(2e3 * work_us("mlp", 1))
    scheduler.finished(batch, 2 * work_us("mlp", 1), now_ns)
    scheduler.finished(background, 2 * work_us("mlp", 1), now_ns)
    assert scheduler.models.known_costs("mlp")["cuda:0"][1] == pytest.approx(work_us("mlp", 1), rel=0.01)


def test_a_batch_that_hangs_takes_nothing_of_the_chip_from_others() -> None:
    scheduler = scheduler_of(chip(2))
    hung, batch = start(scheduler), start(scheduler)
    scheduler.mark_hung(hung)
    scheduler.finished(batch, work_us("mlp", 1), int(1e3 * work_us("mlp", 1)))
    assert scheduler.models.known_costs("mlp")["cuda:0"][1] == pytest.approx(work_us("mlp", 1), rel=0.01)
    scheduler.finished(hung, 0.0, 60_000 * MS)
    assert scheduler.devices["cuda:0"].chip.is_idle  # type: ignore[union-attr]


_event = st.tuples(st.integers(0, 5), st.integers(0, 50_000))


@given(st.sampled_from(_SHAPES), st.lists(_event, max_size=60))
def test_what_batches_had_of_the_chip_is_the_time_that_it_was_busy(
    shape: tuple[int, int], events: list[tuple[int, int]]
) -> None:
    streams, depth = shape
    lanes = streams * depth
    shared, running, now_ns = Chip(streams), dict[int, int](), 1
    busy_ns, had_us = 0, 0.0
    for lane, passed_ns in [*events, *((lane, 1000) for lane in range(lanes))]:
        lane %= lanes
        busy_ns += passed_ns if running else 0
        now_ns += passed_ns
        if lane in running:
            part, taken_us = shared.end(lane, now_ns)
            assert 0.0 <= part <= 1.0
            assert taken_us <= (now_ns - running.pop(lane)) / 1e3 + 1e-6
            had_us += taken_us
        elif passed_ns != 1000:
            shared.begin(lane, 10.0, now_ns)
            running[lane] = now_ns
        left = shared.left_us(now_ns)
        assert len(left) == streams
        assert min(left) >= 0.0
        assert shared.delay_us(0.0, 5.0, now_ns) <= shared.delay_us(1.0, 5.0, now_ns) + 1e-6
        assert shared.is_idle == (not running)
        assert shared.busy_ns(now_ns) == busy_ns
    for lane in list(running):
        had_us += shared.end(lane, now_ns)[1]
    assert had_us <= busy_ns / 1e3 + 1e-3  # what is over before those of its stream before it had nothing
    if depth == 1:
        assert had_us == pytest.approx(busy_ns / 1e3, abs=1e-3)
