"""Predictions that are corrected by how they came true."""

from __future__ import annotations

import random

from tnxd.forecast import Forecast


def test_waits_that_are_longer_than_predicted_are_expected_to_be() -> None:
    forecast = Forecast()
    for _ in range(200):
        forecast.observe(2000.0, 5000.0)
    assert 2.4 < forecast.factor < 2.6


def test_one_stall_of_the_machine_is_not_the_new_normal() -> None:
    forecast = Forecast()
    for _ in range(100):
        forecast.observe(1000.0, 1000.0)
    forecast.observe(1000.0, 1e6)
    assert forecast.factor < 1.5


def test_short_waits_say_nothing() -> None:
    forecast = Forecast()
    for _ in range(100):
        forecast.observe(10.0, 5000.0)
    assert forecast.factor == 1.0


def test_where_batches_are_late_at_random_few_are_in_the_end() -> None:
    """A batch is late unless the reserve covers what chance adds to it; without any, one in three would be."""
    chance = random.Random(1)
    forecast = Forecast()
    late = 0
    for number in range(40_000):
        if chance.expovariate(1 / 0.1) > 0.11 + forecast.reserve:
            forecast.was_late()
            late += number >= 20_000
        else:
            forecast.was_in_time()
    assert 0.0005 < late / 20_000 < 0.01


def test_the_reserve_is_bounded_and_goes_when_it_is_not_needed() -> None:
    forecast = Forecast()
    for _ in range(1000):
        forecast.was_late()
    assert forecast.reserve <= 0.5
    for _ in range(10_000):
        forecast.was_in_time()
    assert forecast.reserve == 0.0
