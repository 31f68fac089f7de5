"""Predictions that are corrected by how they came true."""

from __future__ import annotations

import random

from tnxd.scheduling.forecast import Forecast


def test_factor_follows_lanes_that_are_taken_for_longer_than_predicted() -> None:
    forecast = Forecast()
    for _ in range(200):
        forecast.observe(2000.0, 5000.0)
    assert 2.4 < forecast.factor < 2.6


def test_factor_hardly_follows_one_stall() -> None:
    forecast = Forecast()
    for _ in range(100):
        forecast.observe(1000.0, 1000.0)
    forecast.observe(1000.0, 1e6)
    assert forecast.factor < 1.5


def test_factor_follows_long_batches_more_than_short_ones() -> None:
    forecast = Forecast()
    for _ in range(200):
        forecast.observe(10.0, 100.0)
        forecast.observe(10_000.0, 10_000.0)
    assert forecast.factor < 1.1


def test_extra_time_until_an_answer_leaves_is_learned_beside_what_batches_take() -> None:
    forecast = Forecast()
    for _ in range(200):
        forecast.answered(1000.0, 3500.0)
    assert 2400.0 < forecast.extra_us < 2600.0
    forecast.answered(1000.0, 1e9)  # a stall
    assert forecast.extra_us < 5000.0
    for _ in range(200):
        forecast.answered(1000.0, 500.0)
    assert forecast.extra_us == 0.0


def test_reserve_leaves_few_requests_late_that_are_late_at_random() -> None:
    """A request is late unless the reserve covers what chance adds to it; without any, one in 33 would be."""
    chance = random.Random(1)
    forecast = Forecast()
    late = 0
    for number in range(40_000):
        is_late = chance.expovariate(1 / 0.1) > 0.35 + forecast.reserve
        forecast.fared(is_late, not is_late)
        late += is_late and number >= 20_000
    assert 0.0005 < late / 20_000 < 0.01


def test_reserve_is_bounded_and_goes_when_it_is_not_needed() -> None:
    forecast = Forecast()
    forecast.fared(1000, 0)
    assert forecast.reserve <= 0.4
    for _ in range(1000):
        forecast.fared(0, 64)
    assert forecast.reserve == 0.0
