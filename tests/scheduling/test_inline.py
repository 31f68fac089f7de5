"""Inline batches, on the caller's own thread."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduling_helpers import (
    MODELS,
    MS,
    cpu,
    make_scheduler,
    request,
    run_one,
    scheduler_with_inline,
    untried_scheduler,
)
from tnxctl.protocol.errors import TensorNextError
from tnxd.lanes import INLINE
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler


def test_cheap_batches_run_inline_and_only_one_at_a_time() -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp", inline=True).observe(8, 50.0)
    costs.curve("cpu", "other", inline=True).observe(8, 5000.0)
    scheduler = untried_scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    scheduler.add(Request("other", max_batch_size=8), 0)
    for _ in range(2):
        scheduler.add(request(rows=8), 0)
    lanes = {batch.model: batch.lane for batch in scheduler.next_batches(0)[0]}
    assert lanes == {"other": 0, "mlp": INLINE}
    assert scheduler.queued == 1


def test_a_model_that_is_kept_off_the_caller_goes_to_a_lane_however_cheap_it_is() -> None:
    costs = CostModel()
    for model in MODELS:
        costs.curve("cpu", model).observe(1, 5.0)
        costs.curve("cpu", model, inline=True).observe(1, 5.0)
    scheduler = untried_scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    scheduler.models.keep_off_caller("other")
    assert scheduler.start(Request("other", max_batch_size=8), 0) is None
    for model in ("other", "mlp"):
        scheduler.add(Request(model, max_batch_size=8), 0)
    lanes = {batch.model: batch.lane for batch in scheduler.next_batches(0)[0]}
    assert lanes == {"other": 0, "mlp": INLINE}


def busy_with(flood: int, inline_us: float) -> Scheduler:
    """One lane, which is busy, and so many requests of one client that wait. Eight rows inline take so long."""
    costs = CostModel()
    for rows in (4, 8):
        costs.curve("cpu", "mlp", inline=True).observe(rows, inline_us * rows / 8)
    scheduler = untried_scheduler(cpu(lanes=1, inline_limit_us=100.0), costs=costs)
    for _ in range(8 + flood):
        scheduler.add(request(client="many"), 0)
    assert [batch.lane for batch in scheduler.next_batches(0)[0]] == [0]
    return scheduler


def test_light_client_need_not_wait_for_a_lane_that_others_keep_busy() -> None:
    scheduler = busy_with(flood=100, inline_us=200.0)
    assert scheduler.next_batches(0)[0] == []
    for _ in range(5):  # and comes back at once, each time
        few = request(client="few")
        scheduler.add(few, 0)
        for _turn in range(2):
            ((batch,), _) = scheduler.next_batches(0)
            assert (batch.lane, batch.rows) == (INLINE, 4)  # as many as take half as long
            scheduler.finished(batch, 0.0)
            if few in batch.requests:
                break
        else:
            pytest.fail("it still waits after two batches")
    assert scheduler.next_batches(0)[0] == []


@pytest.mark.parametrize(("flood", "inline_us"), [(6, 200.0), (100, 900.0)], ids=["few wait", "dear"])
def test_batch_for_a_lane_is_not_cut_for_nothing(flood: int, inline_us: float) -> None:
    scheduler = busy_with(flood, inline_us)
    scheduler.add(request(client="few"), 0)
    assert scheduler.next_batches(0)[0] == []


def test_model_that_was_never_measured_does_not_run_inline() -> None:
    scheduler = untried_scheduler(cpu(inline_limit_us=100.0))
    scheduler.add(request(), 0)
    assert scheduler.next_batches(0)[0][0].lane == 0


def run_for(scheduler: Scheduler, micros: float, **options: Any) -> Batch:
    """A batch of eight rows, over after so long."""
    scheduler.add(request(rows=8, **options), 0)
    ((batch,), _) = scheduler.next_batches(0)
    scheduler.finished(batch, micros)
    return batch


def test_inline_costs_are_those_of_lanes_until_a_batch_ran_inline() -> None:
    scheduler = scheduler_with_inline(lane_us=300.0)
    assert run_for(scheduler, 50.0).lane == INLINE
    first = request(rows=8)
    scheduler.add(first, 0)
    assert first.predicted_us == pytest.approx(300 + 0.1 * (50 - 300))
    assert run_for(scheduler_with_inline(lane_us=1200.0), 50.0).lane == 0


def test_dear_batch_is_predicted_by_the_lane_that_it_goes_to() -> None:
    """The inline lane was slow once, or never tried: neither is what the request has to expect."""
    scheduler = scheduler_with_inline(lane_us=1200.0, inline_us=50_000.0)
    one = request(rows=8, deadline_ns=6 * MS)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1200)
    assert run_one(scheduler).lane == 0
    scheduler = scheduler_with_inline(lane_us=1200.0)
    one = request(rows=8)
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1200)


def test_inline_batch_is_held_against_deadlines_as_it_was_decided() -> None:
    scheduler = scheduler_with_inline(lane_us=900.0, inline_us=300.0)
    scheduler.add(request(rows=8, deadline_ns=MS * 7 // 10), 0)  # 300 us and a margin of as much
    assert run_one(scheduler).lane == INLINE


@pytest.mark.parametrize(("micros", "lane"), [(500.0, INLINE), (2000.0, 0)])
def test_slow_spell_does_not_keep_a_model_from_running_inline(micros: float, lane: int) -> None:
    scheduler = scheduler_with_inline(lane_us=micros, inline_us=5000.0)
    assert run_for(scheduler, micros).lane == 0
    lanes = [run_for(scheduler, micros).lane for _ in range(60)]
    assert lanes[-1] == lane


def test_model_that_is_slow_inline_moves_to_a_lane_however_quick_it_was_there() -> None:
    scheduler = scheduler_with_inline(lane_us=500.0)
    lanes = [run_for(scheduler, 5000.0).lane for _ in range(4)]
    assert (lanes[0], lanes[-1]) == (INLINE, 0)


def test_start_runs_a_request_that_comes_alone() -> None:
    scheduler = scheduler_with_inline(lane_us=100.0)
    one = request(rows=2)
    batch = scheduler.start(one, 0)
    assert batch is not None
    assert (batch.lane, batch.requests, batch.rows) == (INLINE, [one], 2)
    assert (scheduler.queued, scheduler.running, scheduler.models.outstanding("mlp")) == (0, 1, 1)
    scheduler.finished(batch, 100.0)
    assert (scheduler.queued, scheduler.running, scheduler.models.outstanding("mlp")) == (0, 0, 0)


@pytest.mark.parametrize(
    "why",
    ["others wait", "it is dear", "it waits for company", "a lane is busy", "its model has its lanes", "any device"],
)
def test_start_leaves_requests_that_have_to_be_weighed(why: str) -> None:
    costs = CostModel()
    for rows, micros in ((1, 100.0), (8, 1200.0)):
        costs.curve("cpu", "mlp").observe(rows, micros)
    scheduler = make_scheduler(Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=1000.0), costs=costs)
    one = request(
        rows=8 if why == "it is dear" else 1,
        max_delay_ns=MS * (why == "it waits for company"),
        wanted="auto" if why == "any device" else "",
    )
    if why == "others wait":
        scheduler.add(request(), 0)
    elif why == "a lane is busy":
        scheduler.add(request(rows=8), 0)
        assert scheduler.next_batches(0)[0][0].lane == 0
    elif why == "its model has its lanes":
        scheduler.models.set_lane_limit("mlp", 1)
        assert scheduler.start_background("mlp", (), 1, 0) is not None
    assert scheduler.start(one, 0) is None
    scheduler.add(one, 0)
    assert one.waiting


def outcome(scheduler: Scheduler, one: Request, now: int, micros: float, *, at_once: bool) -> list[object]:
    """All that can be seen of a request that comes to a scheduler without work, and of the scheduler after it."""
    try:
        batch = scheduler.start(one, now) if at_once else None
        if batch is None:
            scheduler.add(one, now)
            (batch,), late = scheduler.next_batches(now)
            assert not late
    except TensorNextError as error:
        return [type(error), error.message]
    seen: list[object] = [one.device, one.reason, one.predicted_us, one.waiting, batch.lane, batch.rows, batch.max_rows]
    seen += [scheduler.running, scheduler.models.outstanding(one.model), batch.device.running_rows]
    scheduler.finished(batch, micros)
    device = batch.device
    return [*seen, scheduler.running, scheduler.models.outstanding(one.model), list(device.passes), device.global_pass]


_alone = st.tuples(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 12),
    st.integers(0, 3),
    st.sampled_from([NEVER, 300_000, 2 * MS]),
    st.sampled_from(["", "", "", "auto", "cpu", "cuda:0", "tpu"]),
    st.booleans(),
    st.integers(1, 22),
    st.floats(0.0, 3000.0),
)


@given(gpu=st.booleans(), max_bytes=st.sampled_from([20, 1000]), ones=st.lists(_alone, min_size=5, max_size=20))
@example(  # a level that comes after two batches of another
    gpu=False, max_bytes=20, ones=[("mlp", 1, level, NEVER, "", False, 1, 100.0) for level in (0, 0, 1)]
)
def test_start_comes_to_the_same_as_add_and_next_batches(
    gpu: bool, max_bytes: int, ones: list[tuple[str, int, int, int, str, bool, int, float]]
) -> None:
    def fresh() -> Scheduler:
        costs = CostModel()
        for rows in (1, 8):
            costs.curve("cpu", "mlp").observe(rows, 100.0 * rows)
            costs.curve("cuda:0", "mlp").observe(rows, 200.0)
        devices = [Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=500.0)]
        if gpu:
            devices.append(Device("cuda:0", "cuda", 1, {"mlp"}, 8000.0))
        return make_scheduler(*devices, costs=costs, max_bytes=max_bytes)

    quick, plain = fresh(), fresh()
    for number, (model, rows, level, left, wanted, prefer_gpu, nbytes, micros) in enumerate(ones):
        now = number * MS
        deadline = NEVER if left == NEVER else now + left
        options: dict[str, Any] = {"rows": rows, "priority": level, "deadline_ns": deadline, "wanted": wanted}
        options |= {"prefer_gpu": prefer_gpu, "nbytes": nbytes}
        seen = [
            outcome(scheduler, request(model, **options), now, micros, at_once=scheduler is quick)
            for scheduler in (quick, plain)
        ]
        assert seen[0] == seen[1]
