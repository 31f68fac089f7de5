"""Limits of the lanes that run a model."""

from __future__ import annotations

import pytest

from scheduling_helpers import MS, request, run_one, scheduler_with_lanes
from tnxd.lanes import INLINE
from tnxd.scheduling.device import Batch


def models(batches: list[Batch]) -> list[str]:
    return [batch.model for batch in batches]


def test_model_runs_on_no_more_lanes_than_it_may_and_others_on_the_rest() -> None:
    scheduler = scheduler_with_lanes(3)
    scheduler.models.set_lane_limit("mlp", 1)
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


def test_inline_lane_counts_as_a_lane_of_the_model() -> None:
    scheduler = scheduler_with_lanes(2, inline_limit_us=5000.0)
    scheduler.models.set_lane_limit("mlp", 1)
    for _ in range(2):
        scheduler.add(request(rows=8), 0)
    ((inline,), _) = scheduler.next_batches(0)
    assert inline.lane == INLINE
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(inline, 1000.0)
    assert len(scheduler.next_batches(0)[0]) == 1


def test_lane_limit_that_is_lifted_counts_at_once() -> None:
    scheduler = scheduler_with_lanes(3)
    scheduler.models.set_lane_limit("mlp", 1)
    for _ in range(3):
        scheduler.add(request(rows=8), 0)
    assert len(scheduler.next_batches(0)[0]) == 1
    scheduler.models.set_lane_limit("mlp", 2)
    assert len(scheduler.next_batches(0)[0]) == 1
    scheduler.models.set_lane_limit("mlp", 0)
    assert len(scheduler.next_batches(0)[0]) == 1


def test_hung_batch_does_not_keep_its_model_from_other_lanes() -> None:
    scheduler = scheduler_with_lanes(2)
    scheduler.models.set_lane_limit("mlp", 1)
    for _ in range(3):
        scheduler.add(request(rows=8), 0)
    ((hangs,), _) = scheduler.next_batches(0)
    assert scheduler.next_batches(0)[0] == []
    for _ in range(2):
        scheduler.mark_hung(hangs)
    assert scheduler.models.outstanding("mlp") == 3
    ((other,), _) = scheduler.next_batches(0)
    scheduler.finished(hangs, 0.0)
    assert scheduler.next_batches(0)[0] == []
    scheduler.finished(other, 1000.0)
    assert len(run_one(scheduler).requests) == 1
    assert scheduler.models.outstanding("mlp") == 0


def test_groups_of_a_model_share_its_lanes_by_turns() -> None:
    scheduler = scheduler_with_lanes(3)
    scheduler.models.set_lane_limit("mlp", 1)
    for group in (1, 2, 3):
        for _ in range(3):
            scheduler.add(request(rows=8, group=(group,)), 0)
    order = [run_one(scheduler).requests[0].group for _ in range(9)]
    assert order == [(1,), (2,), (3,)] * 3


def test_requests_held_for_a_lane_of_their_model_can_leave() -> None:
    scheduler = scheduler_with_lanes(2)
    scheduler.models.set_lane_limit("mlp", 1)
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
    assert (scheduler.queued, scheduler.models.outstanding("mlp")) == (0, 0)


def test_level_held_for_a_lane_of_its_model_does_not_make_up_for_it() -> None:
    scheduler = scheduler_with_lanes(2)
    scheduler.models.set_lane_limit("mlp", 1)
    for _ in range(2):
        scheduler.add(request(rows=8, priority=0), 0)
    ((held,), _) = scheduler.next_batches(0)
    for _ in range(200):
        scheduler.add(request(model="other", rows=8, priority=1), 0)
    for _ in range(100):
        run_one(scheduler)
    scheduler.models.set_lane_limit("mlp", 0)
    for _ in range(100):
        scheduler.add(request(rows=8, priority=0), 0)
    order = [run_one(scheduler).requests[0].priority for _ in range(30)]
    assert 8 <= order.count(1) <= 12
    scheduler.finished(held, 1000.0)


def test_predictions_know_of_lane_limits() -> None:
    scheduler = scheduler_with_lanes(4)
    scheduler.models.set_lane_limit("mlp", 1)
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
