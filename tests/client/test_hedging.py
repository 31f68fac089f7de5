"""When a request is worth a copy to another daemon, and how many copies there are."""

from __future__ import annotations

from random import Random

from tnxctl.hedging import MAX_SHARE, Hedging


def learned(percentile: float, times: list[float]) -> Hedging:
    hedging = Hedging(percentile)
    for seconds in times:
        hedging.took("m", seconds)
    return hedging


def test_nothing_is_known_at_first() -> None:
    assert learned(0.95, [0.1] * 39).delay_s("m") is None
    assert learned(0.95, [0.1] * 40).delay_s("m") == 0.1
    assert learned(0.95, [0.1] * 40).delay_s("other") is None


def test_it_is_the_percentile_of_the_last_times() -> None:
    times = [float(number) for number in range(1000)]
    Random(1).shuffle(times)
    last = sorted(times[-400:])
    for percentile in (0.5, 0.95, 0.99):
        assert learned(percentile, times).delay_s("m") == last[int(percentile * 400)]


def test_equal_times_are_forgotten_one_by_one() -> None:
    hedging = learned(0.5, [1.0] * 400 + [2.0] * 199)
    assert hedging.delay_s("m") == 1.0
    for _ in range(2):
        hedging.took("m", 2.0)
    assert hedging.delay_s("m") == 2.0


def test_copies_are_one_in_twenty_at_most() -> None:
    hedging = Hedging(0.5)
    for _ in range(10_000):
        hedging.requests += 1
        if hedging.has_room(2.0, 1.0):
            hedging.copies += 1
    assert hedging.copies == MAX_SHARE * hedging.requests == 500


def test_some_are_kept_for_those_that_wait_longest() -> None:
    hedging = Hedging(0.95)
    for _ in range(1000):
        hedging.requests += 1
        if hedging.has_room(1.9, 1.0):
            hedging.copies += 1
    assert hedging.copies == 40
    assert hedging.has_room(2.0, 1.0)


def test_many_models_are_not_remembered_for_ever() -> None:
    hedging = Hedging(0.95)
    for number in range(1000):
        hedging.took(f"model-{number}", 0.1)
    assert len(hedging._times) <= 256
