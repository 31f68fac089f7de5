"""Batches on one core or on several: chosen batch by batch, by what they were measured to take."""

from __future__ import annotations

from itertools import pairwise

import pytest

from scheduling_helpers import MS, make_scheduler, request
from tnxctl.protocol.errors import DeadlineExceeded
from tnxd.lanes import INLINE, Teams
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.scheduler import Scheduler

TWO = Teams(lanes=1, threads=2, cores=2)
SIXTEEN = Teams(lanes=2, threads=8, cores=16)


def scheduler_with_teams(
    gain: float,
    teams: Teams = TWO,
    *,
    narrow_us: float = 100_000.0,
    row_us: float = 0.0,
    threads: int = 0,
    inline_limit_us: float = 0.0,
) -> Scheduler:
    """A CPU with a lane for each core. A batch takes so long on one core, and that divided by `gain` with a team."""
    device = Device("cpu", "cpu", teams.cores, {"mlp", "other"}, teams=teams, inline_limit_us=inline_limit_us)
    scheduler = make_scheduler(device, costs=CostModel())
    for model in ("mlp", "other"):
        sizes = [(rows, narrow_us + row_us * rows) for rows in (1, 2, 4, 8)]
        scheduler.models.add(
            "cpu",
            model,
            costs=sizes * 100,
            widths=[(rows, micros, micros / gain) for rows, micros in sizes],
            threads=threads,
        )
    return scheduler


def start(scheduler: Scheduler, *requests: str, now: int = 0) -> list[Batch]:
    for model in requests:
        scheduler.add(request(model), now)
    batches, late = scheduler.next_batches(now)
    assert not late
    return batches


def run(scheduler: Scheduler, narrow_us: float, wide_us: float) -> int:
    """The threads of the next batch of one request, which takes so long."""
    (batch,) = start(scheduler, "mlp")
    scheduler.finished(batch, wide_us if batch.threads > 1 else narrow_us)
    return batch.threads


def test_batch_is_wide_where_nothing_else_is_to_be_done_and_it_gains_enough() -> None:
    (alone,) = start(scheduler_with_teams(1.3), "mlp")
    assert (alone.lane, alone.threads) == (0, 2)
    (little,) = start(scheduler_with_teams(1.06), "mlp")
    assert little.threads == 2
    (slow,) = start(scheduler_with_teams(1.04), "mlp")
    assert slow.threads == 1


def test_batches_run_side_by_side_on_one_core_each_where_others_wait_or_run() -> None:
    scheduler = scheduler_with_teams(1.5)
    first, second = start(scheduler, "mlp", "other")
    assert {first.threads, second.threads} == {1}
    assert {first.lane, second.lane} == {0, 1}
    scheduler.finished(first, 1e5)
    (third,) = start(scheduler, "mlp")
    assert third.threads == 1


def test_lane_beside_a_wide_batch_runs_a_narrow_one() -> None:
    scheduler = scheduler_with_teams(1.5)
    (wide,) = start(scheduler, "mlp")
    (narrow,) = start(scheduler, "mlp", now=MS)
    assert (wide.threads, narrow.threads, narrow.lane) == (2, 1, 1)
    scheduler.finished(narrow, 1e5)
    scheduler.finished(wide, 1e5)
    (again,) = start(scheduler, "mlp")
    assert (again.lane, again.threads) == (0, 2)


def test_more_requests_than_a_batch_takes_run_narrow() -> None:
    scheduler = scheduler_with_teams(1.5)
    batches = start(scheduler, *["mlp"] * 9)
    assert [batch.threads for batch in batches] == [1, 1]


def test_teams_together_have_no_more_threads_than_cores() -> None:
    scheduler = scheduler_with_teams(4.0, SIXTEEN)
    batches = [start(scheduler, "mlp")[0] for _ in range(4)]
    assert [(batch.lane, batch.threads) for batch in batches[:2]] == [(0, 8), (1, 8)]
    assert [batch.threads for batch in batches[2:]] == [1, 1]


def test_narrow_batches_leave_the_lanes_with_teams_to_the_last() -> None:
    scheduler = scheduler_with_teams(1.0, SIXTEEN)
    batches = [start(scheduler, "mlp")[0] for _ in range(14)]
    assert {batch.lane for batch in batches} == set(range(2, 16))
    scheduler.finished(batches[0], 1e5)
    assert start(scheduler, "mlp")[0].lane == batches[0].lane


def test_wide_batches_end_where_they_measure_badly_and_are_tried_again_later() -> None:
    """As beside a process that keeps a core busy."""
    scheduler = scheduler_with_teams(1.4)
    widths = [run(scheduler, 1e5, 3e5) for _ in range(400)]
    assert widths[:5] == [2, 2, 1, 1, 2], "a stall is forgotten soon"
    tries = [number for number, threads in enumerate(widths) if threads == 2]
    pauses = [after - before - 1 for before, after in pairwise(tries)]
    assert pauses == sorted(pauses)
    assert 64 <= pauses[-1] <= 64 * 3
    assert sum(threads == 2 for threads in widths) < 14


def test_one_stall_does_not_end_wide_batches() -> None:
    scheduler = scheduler_with_teams(1.4)
    run(scheduler, 1e5, 5e6)
    assert [run(scheduler, 1e5, 7e4) for _ in range(50)] == [2] * 50


def test_batches_that_others_come_to_end_wide_ones_where_that_is_common() -> None:
    scheduler = scheduler_with_teams(1.4)

    def run_in_company() -> int:
        (first,) = start(scheduler, "mlp")
        (second,) = start(scheduler, "mlp", now=MS)
        scheduler.finished(first, 3e5 if first.threads > 1 else 1e5)
        scheduler.finished(second, 1e5)
        return first.threads

    for _ in range(10):
        assert run_in_company() == 2
        assert [run(scheduler, 1e5, 7e4) for _ in range(10)] == [2] * 10
    assert [run_in_company() for _ in range(100)][-50:].count(1) > 40


def test_a_worse_try_is_repeated_later() -> None:
    scheduler = scheduler_with_teams(1.4)
    widths = [run(scheduler, 1e5, 2e6) for _ in range(2000)]
    assert widths[:3] == [2, 2, 1]
    assert sum(threads == 2 for threads in widths) < 10


def test_wide_batches_come_back_when_the_neighbour_has_gone() -> None:
    scheduler = scheduler_with_teams(1.4)
    for _ in range(200):
        run(scheduler, 1e5, 3e5)
    widths = [run(scheduler, 1e5, 7e4) for _ in range(600)]
    assert widths[-100:].count(2) > 95


def test_fast_try_after_slow_ones_is_repeated_at_once() -> None:
    scheduler = scheduler_with_teams(1.5)
    threads = [run(scheduler, 100_000, 400_000) for _ in range(300)]  # beside a busy neighbour
    assert threads.count(2) < 12
    while run(scheduler, 100_000, 70_000) == 1:
        pass
    assert [run(scheduler, 100_000, 70_000) for _ in range(20)] == [2] * 20


def test_two_stalls_of_tries_in_a_row_are_needed_to_put_them_off() -> None:
    scheduler = scheduler_with_teams(1.0)
    took = iter((4e5, *[7e4] * 100))  # the first try meets a stall
    widths = []
    for _ in range(100):
        (batch,) = start(scheduler, "mlp")
        widths.append(batch.threads)
        scheduler.finished(batch, next(took) if batch.threads > 1 else 1e5)
    assert widths[-20:] == [2] * 20


def test_what_has_gained_returns_after_a_slow_spell_as_soon_as_it_gains_enough() -> None:
    scheduler = scheduler_with_teams(1.3)
    assert [run(scheduler, 1e5, 3e5) for _ in range(3)] == [2, 2, 1]  # two stalls, one after the other
    assert [run(scheduler, 1e5, 9.3e4) for _ in range(40)][-30:] == [2] * 30
    never = scheduler_with_teams(1.3)
    assert [run(never, 1e5, 3e5) for _ in range(3)] == [2, 2, 1]
    widths = [run(never, 1e5, 9.7e4) for _ in range(300)]
    assert widths[-100:].count(2) < 50, "it gains too little to be more than tried"


def test_tries_that_cost_nothing_are_not_put_off_further_and_further() -> None:
    scheduler = scheduler_with_teams(1.3)
    for _ in range(3):
        run(scheduler, 1e5, 3e5)
    assert [run(scheduler, 1e5, 9.8e4) for _ in range(60)].count(2) > 10


def test_slower_machine_does_not_end_wide_batches_for_long() -> None:
    """All takes twice as long from some moment on."""
    scheduler = scheduler_with_teams(1.4)
    widths = [run(scheduler, 2e5, 1.43e5) for _ in range(60)]
    assert widths[-20:].count(2) >= 19


def test_narrow_batches_are_measured_now_and_then() -> None:
    scheduler = scheduler_with_teams(1.4)
    widths = [run(scheduler, 6e4, 7.1e4) for _ in range(2000)]
    assert 1 in widths
    assert widths[-100:].count(1) > 90, "one core has become the faster way"


def test_gain_that_warm_up_has_missed_is_found() -> None:
    scheduler = scheduler_with_teams(1.0)
    widths = [run(scheduler, 1e5, 6e4) for _ in range(200)]
    assert widths[:64] == [1] * 64
    assert widths[-50:] == [2] * 50


def test_model_that_gains_nothing_is_hardly_ever_tried() -> None:
    scheduler = scheduler_with_teams(0.8)
    assert [run(scheduler, 1e5, 1.2e5) for _ in range(5000)].count(2) < 16


def test_gain_of_shapes_that_never_ran_wide_is_that_of_batches_about_as_long() -> None:
    scheduler = scheduler_with_teams(1.5)
    for number in range(2):
        scheduler.add(request("mlp", group=(7,)), 0)
        ((batch,), _) = scheduler.next_batches(0)
        scheduler.finished(batch, 9e4)
        assert batch.threads == 1 + number, "of which nothing is known runs on one core, once"


# --- predictions -------------------------------------------------------------------------------------------------


def test_prediction_knows_that_a_batch_goes_wide() -> None:
    scheduler = scheduler_with_teams(2.0)
    one, other = request("mlp"), request("mlp")
    scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(50_000)
    (batch,), _ = scheduler.next_batches(0)
    assert batch.run_us == pytest.approx(50_000)
    scheduler.add(other, 0)
    assert other.wait_us == pytest.approx(50_000), "both cores are at work, and not one of them half the time"
    assert other.predicted_us == pytest.approx(150_000)


def test_request_does_not_wait_where_a_core_is_free() -> None:
    scheduler = scheduler_with_teams(1.0)
    start(scheduler, "mlp")
    one = request("mlp")
    scheduler.add(one, 0)
    assert (one.wait_us, one.predicted_us) == (0.0, pytest.approx(100_000))


def test_deadline_that_only_a_wide_batch_meets_is_promised_where_it_goes_wide() -> None:
    scheduler = scheduler_with_teams(2.0)
    for _ in range(60):
        assert run(scheduler, 1e5, 5e4) == 2
    scheduler.add(request("mlp", deadline_ns=60 * MS), 0)
    (batch,), late = scheduler.next_batches(0)
    assert (batch.threads, late) == (2, [])
    with pytest.raises(DeadlineExceeded):
        scheduler.add(request("mlp", deadline_ns=60 * MS), 0)


def test_cheap_batch_runs_inline_and_not_wide() -> None:
    scheduler = scheduler_with_teams(2.0, narrow_us=500.0, inline_limit_us=1000.0)
    (batch,) = start(scheduler, "mlp")
    assert (batch.lane, batch.threads) == (INLINE, 1)


def test_forecast_counts_all_cores_that_a_wide_batch_used() -> None:
    scheduler = scheduler_with_teams(2.0)
    now = 0
    for _ in range(100):
        (batch,) = start(scheduler, "mlp", now=now)
        scheduler.add(request("mlp"), now)  # so that the next one begins as this one ends
        now += 50 * MS
        scheduler.finished(batch, 50_000.0, now)
    placement = scheduler.devices["cpu"].placements["mlp"]
    assert placement.forecast.factor == pytest.approx(1.0, abs=0.1)


# --- sharing out -------------------------------------------------------------------------------------------------


def test_what_waits_is_shared_out_among_free_lanes() -> None:
    scheduler = scheduler_with_teams(0.8, narrow_us=0.0, row_us=10_000.0)
    assert [batch.rows for batch in start(scheduler, *["mlp"] * 7)] == [4, 3]


@pytest.mark.parametrize(("fixed_us", "row_us"), [(100_000.0, 0.0), (0.0, 200.0)], ids=["dear to begin", "short"])
def test_batch_is_not_shared_out_where_that_saves_nothing(fixed_us: float, row_us: float) -> None:
    scheduler = scheduler_with_teams(0.8, narrow_us=fixed_us, row_us=row_us)
    assert [batch.rows for batch in start(scheduler, *["mlp"] * 8)] == [8]


def test_requests_are_shared_out_or_run_wide_as_is_sooner_done() -> None:
    (batch,) = start(scheduler_with_teams(1.9, narrow_us=40_000.0, row_us=10_000.0), *["mlp"] * 8)
    assert (batch.rows, batch.threads) == (8, 2)
    batches = start(scheduler_with_teams(1.5, narrow_us=0.0, row_us=10_000.0), *["mlp"] * 8)
    assert [(batch.rows, batch.threads) for batch in batches] == [(4, 1), (4, 1)]


def test_model_shares_out_no_more_than_its_lanes_allow() -> None:
    scheduler = scheduler_with_teams(0.8, narrow_us=0.0, row_us=10_000.0)
    scheduler.models.set_lane_limit("mlp", 1)
    assert [batch.rows for batch in start(scheduler, *["mlp"] * 8)] == [8]


# --- models that say it themselves -------------------------------------------------------------------------------


def test_model_that_asks_for_one_thread_never_runs_wide() -> None:
    scheduler = scheduler_with_teams(1.9, threads=1)
    assert {run(scheduler, 1e5, 5e4) for _ in range(2000)} == {1}


def test_model_that_asks_for_a_team_waits_for_one() -> None:
    scheduler = scheduler_with_teams(0.5, narrow_us=500.0, threads=2, inline_limit_us=1000.0)
    batches = start(scheduler, *["mlp"] * 9)
    assert [(batch.lane, batch.threads) for batch in batches] == [(0, 2)]
    assert scheduler.next_batches(0) == ([], [])
    scheduler.finished(batches[0], 1000.0)
    assert [batch.lane for batch in scheduler.next_batches(0)[0]] == [0]


def test_models_that_ask_for_no_team_run_beside_one_that_does() -> None:
    scheduler = scheduler_with_teams(1.5)
    scheduler.devices["cpu"].placements["other"].width.threads = 2  # type: ignore[union-attr]
    batches = start(scheduler, "other", "other", "mlp")
    assert {(batch.model, batch.lane, batch.threads) for batch in batches} == {("other", 0, 2), ("mlp", 1, 1)}


def test_one_core_knows_no_width() -> None:
    device = Device("cpu", "cpu", 1, {"mlp"})
    scheduler = make_scheduler(device, costs=CostModel())
    scheduler.models.add("cpu", "mlp", costs=[(1, 1e5)], widths=[(1, 1e5, 1e4)], threads=4)
    (batch,) = start(scheduler, "mlp")
    assert batch.threads == 1


def test_slow_spell_of_wide_batches_does_not_refuse_deadlines_for_good() -> None:
    scheduler = scheduler_with_teams(2.0)
    for _ in range(60):
        run(scheduler, 1e5, 5e4)
    for _ in range(6):
        run(scheduler, 1e5, 8e4)
    for second in range(20):
        try:
            scheduler.add(request("mlp", deadline_ns=(1000 * second + 60) * MS), 1000 * second * MS)
        except DeadlineExceeded:
            continue
        assert second > 0, "else there was no slow spell"
        return
    pytest.fail("it is refused for good")
