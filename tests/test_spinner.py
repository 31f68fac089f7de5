"""The spinner decides by durations: here a fake clock moves them."""

from __future__ import annotations

import time

import pytest

from tnxd.transport.busy_poller import Spinner


class Clock:
    """Advances by a microsecond at every look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", fake)
    return fake


def polls(spinner: Spinner) -> int:
    """The number of looks in a spin that finds nothing."""
    looks = 0

    def never() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not spinner.spin(never)
    return looks


def test_finds_what_comes_within_the_limit(clock: Clock) -> None:
    answers = iter([False, False, True])
    assert Spinner(100).spin(lambda: next(answers))


def test_gives_up_after_the_limit(clock: Clock) -> None:
    assert polls(Spinner(100)) == pytest.approx(100, abs=2)


def idle(clock: Clock) -> Spinner:
    """A spinner whose last waits were long."""
    spinner = Spinner(100)
    for _ in range(20):
        polls(spinner)
        clock.now += 1_000_000_000
        spinner.blocked()
    return spinner


def test_an_idle_daemon_stops_polling(clock: Clock) -> None:
    assert polls(idle(clock)) == 0


def test_a_short_wait_brings_polling_back(clock: Clock) -> None:
    spinner = idle(clock)
    polls(spinner)
    clock.now += 120_000
    spinner.blocked()
    assert polls(spinner) == pytest.approx(100, abs=2)


def test_zero_never_polls(clock: Clock) -> None:
    assert polls(Spinner(0)) == 0
