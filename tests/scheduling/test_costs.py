from __future__ import annotations

import pytest

from scheduling_helpers import memory_kept
from tnxd.scheduling.costs import BatchCosts, CostCurve, CostModel


def curve(*points: tuple[int, float]) -> CostCurve:
    made = CostCurve()
    for rows, micros in points:
        made.observe(rows, micros)
    return made


def test_curve_knows_nothing_before_the_first_observation() -> None:
    made = CostCurve()
    assert not made.known
    assert (made.mean(3), made.spread(3)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "micros"),
    [(0, 80.0), (1, 80.0), (8, 100.0), (12, 125.0), (16, 150.0), (64, 450.0), (40, 300.0), (128, 900.0)],
)
def test_curve_is_straight_between_points_and_in_proportion_beyond(rows: int, micros: float) -> None:
    # in any order: warm-up and traffic fill the points as they come
    assert curve((16, 150.0), (64, 450.0), (1, 80.0), (8, 100.0)).mean(rows) == micros


@pytest.mark.parametrize(
    ("micros", "most", "rows"),
    [(79.0, 64, 0), (80.0, 64, 1), (100.0, 64, 8), (299.0, 64, 39), (300.0, 64, 40), (1e9, 64, 64), (300.0, 9, 9)],
)
def test_largest_batch_within_a_time(micros: float, most: int, rows: int) -> None:
    assert curve((1, 80.0), (8, 100.0), (16, 150.0), (64, 450.0)).rows_within(micros, most) == rows


def test_mean_follows_a_change() -> None:
    made = curve((1, 100.0))
    for _ in range(200):
        made.observe(1, 500.0)
    assert made.mean(1) == pytest.approx(500.0, rel=0.01)


def test_mean_hardly_follows_one_stall() -> None:
    made = curve((1, 100.0))
    made.observe(1, 1_000_000.0)
    assert made.mean(1) < 200.0


def test_spread_tells_steady_from_erratic() -> None:
    steady, erratic = curve((1, 100.0)), curve((1, 100.0))
    for index in range(200):
        steady.observe(1, 100.0)
        erratic.observe(1, 50.0 if index % 2 else 150.0)
    assert steady.spread(1) < 5.0
    assert erratic.spread(1) > 100.0


def test_bound_lowers_the_mean_and_never_raises_it() -> None:
    made = curve((8, 100.0))
    for _ in range(200):
        made.bound(8, 300.0)
    assert made.mean(8) == 100.0
    for _ in range(200):
        made.bound(8, 50.0)
    assert made.mean(8) == pytest.approx(50.0, rel=0.01)
    new = CostCurve()
    new.bound(8, 300.0)
    assert new.mean(8) == 300.0


def test_borrowed_curve_is_a_copy() -> None:
    lane = curve((1, 10.0), (8, 100.0))
    made = CostCurve()
    made.borrow(lane)
    assert (made.mean(1), made.mean(8), made.spread(8)) == (10.0, 100.0, lane.spread(8))
    made.observe(8, 30.0)
    made.observe(64, 30.0)
    assert (lane.mean(8), lane.mean(16)) == (100.0, 200.0)


def test_batches_known_to_be_cheap_alone_are_meant_to_run_inline() -> None:
    costs = BatchCosts(inline_limit_us=150.0)
    assert not costs.fits_inline(1)
    costs.observe_lane(1, 100.0)
    assert costs.fits_inline(1)
    assert not costs.fits_inline(2)
    assert (costs.mean(1), costs.mean(2)) == (100.0, 200.0)
    costs.inline.observe(1, 50.0)
    assert (costs.mean(1), costs.lane.mean(1)) == (95.0, 100.0)
    assert costs.curve(1) is costs.inline
    assert costs.curve(2) is costs.lane
    lanes_only = BatchCosts(curve((1, 100.0)))
    assert not lanes_only.fits_inline(1)
    assert lanes_only.curve(1) is lanes_only.lane


def half_a_millisecond() -> BatchCosts:
    """Costs of batches that take half of what may run inline."""
    costs = CostModel()
    lane = costs.curve("cpu", "mlp")
    lane.observe(1, 500.0)
    return BatchCosts(lane, costs.curve("cpu", "mlp", inline=True), inline_limit_us=1000.0)


@pytest.mark.parametrize("every", [10, 6])
def test_batches_stay_inline_where_the_kernel_takes_the_core_away_now_and_then(every: int) -> None:
    """As beside busy lanes, for a slice of the kernel's of four milliseconds."""
    made = half_a_millisecond()
    for number in range(500):
        made.inline.observe(1, 500.0 if number % every else 4500.0)
        assert made.fits_inline(1)


@pytest.mark.parametrize("every", [10, 6])
def test_batches_that_take_long_themselves_now_and_then_move_to_lanes(every: int) -> None:
    """No slice of the kernel's is as long as 100 ms: some inputs are dear, and nobody else is served meanwhile."""
    made = half_a_millisecond()
    numbers = iter(range(1, 500))
    while made.fits_inline(1):
        made.inline.observe(1, 500.0 if next(numbers) % every else 100_000.0)


def test_cost_model_has_a_curve_per_device_and_model() -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp").observe(1, 100.0)
    assert costs.curve("cpu", "mlp").known
    assert not costs.curve("cuda:0", "mlp").known
    assert not costs.curve("cpu", "other").known
    assert not costs.curve("cpu", "mlp", (128,)).known
    assert not costs.curve("cpu", "mlp", inline=True).known


def test_model_is_forgotten_on_all_devices_with_all_its_shapes() -> None:
    costs = CostModel()
    for device in ("cpu", "cuda:0"):
        for model in ("mlp", "other"):
            for group in ((), (128,)):
                costs.curve(device, model, group).observe(1, 100.0)
    costs.forget("mlp")
    assert not any(costs.curve(device, "mlp", group).known for device in ("cpu", "cuda:0") for group in ((), (128,)))
    assert all(costs.curve(device, "other", group).known for device in ("cpu", "cuda:0") for group in ((), (128,)))


def test_curves_that_are_in_use_stay() -> None:
    costs = CostModel(max_curves=2)
    costs.curve("cpu", "mlp").observe(1, 100.0)
    for length in range(5):
        costs.curve("cpu", "mlp", (length,)).observe(1, 100.0)
        assert costs.curve("cpu", "mlp").known


def test_oldest_curves_go_first() -> None:
    costs = CostModel(max_curves=2)
    for length in (1, 2, 3):
        costs.curve("cpu", "mlp", (length,)).observe(1, 100.0)
    assert costs.curve("cpu", "mlp", (3,)).known
    assert not costs.curve("cpu", "mlp", (1,)).known


def test_means_kept_are_bounded_however_many_sizes_are_asked() -> None:
    """Requests may have any number of rows, also where nothing is learned meanwhile."""
    asked = curve((1, 100.0), (8, 200.0))
    assert memory_kept(lambda: all(asked.mean(rows) > 0 for rows in range(1, 10_000))) < 300_000


def test_means_that_were_looked_up_follow_the_curve() -> None:
    """Means are remembered until the curve has moved by 2 %."""
    slow = curve((1, 100.0), (8, 200.0))
    for rows in (1, 3, 8):
        slow.mean(rows)
    for micros in (104.0, 108.0, 112.0, 300.0, 300.0, 300.0):
        slow.observe(1, micros)
        fresh = CostCurve()
        fresh.borrow(slow)
        assert all(abs(slow.mean(rows) / fresh.mean(rows) - 1.0) <= 0.021 for rows in (1, 3, 8))
    assert slow.mean(1) > 140.0
