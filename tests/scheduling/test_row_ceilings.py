"""Row ceilings of a model on a device where memory ran out."""

from __future__ import annotations

import pytest

from scheduling_helpers import MODELS, MS, make_scheduler, request, run_one, scheduler_with_lanes


def test_batches_after_memory_ran_out_are_as_large_as_what_worked() -> None:
    scheduler = make_scheduler()
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


def test_ceiling_is_one_row_where_nothing_worked() -> None:
    scheduler = make_scheduler()
    scheduler.limit_rows("cpu", "mlp", 0)
    for _ in range(2):
        scheduler.add(request(), 0)
    assert [run_one(scheduler).rows for _ in range(2)] == [1, 1]


def test_ceiling_is_not_raised_by_a_late_report() -> None:
    scheduler = make_scheduler()
    for rows in (2, 4):
        scheduler.limit_rows("cpu", "mlp", rows)
    for _ in range(8):
        scheduler.add(request(), 0)
    assert run_one(scheduler).rows == 2


def test_ceiling_counts_in_predictions_and_in_batching_delays() -> None:
    scheduler = make_scheduler()
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


def test_ceiling_is_not_raised_by_batches_formed_before() -> None:
    scheduler = scheduler_with_lanes(300)
    for _ in range(300):
        scheduler.add(request(rows=8), 0)
    batches, _ = scheduler.next_batches(0)
    scheduler.limit_rows("cpu", "mlp", 4)
    for batch in batches:
        scheduler.finished(batch, 1000.0)
    scheduler.add(request(rows=8), 0)
    assert run_one(scheduler).max_rows == 4


def test_ceiling_rises_as_batches_work_and_ends_at_the_limit_of_the_model() -> None:
    scheduler = make_scheduler()
    scheduler.limit_rows("cpu", "mlp", 3)
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
    scheduler.limit_rows("cpu", "mlp", 4)
    for rows, micros in [(2, 1000.0), (4, 0.0)] * 300:
        scheduler.add(request(rows=rows), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, micros)
        assert batch.max_rows == 4
