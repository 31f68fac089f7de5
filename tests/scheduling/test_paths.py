"""Requests that wait for each other, and models that are held for requests to come."""

from __future__ import annotations

import pytest

from scheduling_helpers import MS, cpu, make_scheduler, request
from tnxctl.protocol.errors import ResourceExhausted, Unavailable
from tnxd.scheduling.paths import Outlook, predict_path


def outlook(wait_us: float, run_us: float, spread_us: float = 0.0, reserve: float = 0.0) -> Outlook:
    return Outlook(wait_us, run_us, spread_us, reserve)


def test_one_after_the_other() -> None:
    outlooks = [outlook(10, 100, 3), outlook(20, 200, 4), outlook(0, 300)]
    path = predict_path([0, 1, 2], [(), (0,), (1,)], [(1,), (2,), ()], outlooks)
    assert path.total_us == 630
    assert path.margin_us == 5  # as squares add up
    assert path.after_us == [500, 300, 0]  # without the waits, which may be over by then


def test_the_longest_way_counts() -> None:
    #  0 -> 1 -> 3 and 0 -> 2 -> 3, in an order of their own
    outlooks = [outlook(0, 5), outlook(0, 10), outlook(0, 100, 7), outlook(0, 1)]
    path = predict_path([0, 2, 1, 3], [(), (0,), (0,), (1, 2)], [(1, 2), (3,), (3,), ()], outlooks)
    assert path.total_us == 106
    assert path.margin_us == 7
    assert path.after_us == [101, 1, 1, 0]


def test_what_is_kept_free_grows_with_what_has_to_wait() -> None:
    path = predict_path([0, 1], [(), (0,)], [(1,), ()], [outlook(100, 100, 0, 0.2), outlook(0, 100, 0, 0.2)])
    assert path.margin_us == pytest.approx(50)  # of the first alone: a fifth of what it needs with it


def test_an_outlook_is_what_would_be_predicted() -> None:
    scheduler = make_scheduler(cpu())
    first = request(rows=8)
    scheduler.add(first, 0)
    scheduler.next_batches(0)
    looked = scheduler.outlook(request(rows=8), 0)
    assert not scheduler.queued
    then = request(rows=8)
    scheduler.add(then, 0)
    assert (looked.wait_us, looked.wait_us + looked.run_us) == (then.wait_us, then.predicted_us)
    with pytest.raises(Unavailable, match="is not loaded on the CPU"):
        scheduler.outlook(request("nowhere"), 0)


def test_what_was_admitted_with_something_else_is_not_refused() -> None:
    scheduler = make_scheduler(cpu(), max_requests=2)
    for _ in range(2):
        scheduler.add(request(), 0)
    with pytest.raises(ResourceExhausted):
        scheduler.add(request(), 0)
    scheduler.add(request(admitted=True, deadline_ns=1), 0)
    assert scheduler.queued == 3
    assert scheduler.room == 0  # not less: a caller counts by it


def test_a_model_that_is_held_is_outstanding() -> None:
    scheduler = make_scheduler(cpu())
    scheduler.models.hold("mlp")
    scheduler.models.hold("mlp")
    assert scheduler.models.outstanding("mlp") == 2
    assert not scheduler.models.is_hung("mlp")
    scheduler.add(request(), 0)
    (batch,), _ = scheduler.next_batches(0)
    scheduler.mark_hung(batch)
    assert scheduler.models.is_hung("mlp")  # nobody else would end it
    scheduler.finished(batch, 0.0, MS)
    scheduler.models.release("mlp")
    assert scheduler.models.outstanding("mlp") == 1
    scheduler.models.release("mlp")
    scheduler.models.release("mlp")  # none is left
    scheduler.models.release("unknown")
    assert scheduler.models.outstanding("mlp") == 0
    scheduler.models.remove("mlp")
    scheduler.models.forget("mlp")
