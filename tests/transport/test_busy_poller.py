"""Busy polling decides by durations: here a fake clock moves them."""

from __future__ import annotations

import time

import pytest

from tnxd.transport.busy_poller import BusyPoller


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


def polls(poller: BusyPoller) -> int:
    """Number of looks of a poll that finds nothing."""
    looks = 0

    def never() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not poller.poll(never)
    return looks


def test_poll_finds_what_comes_within_the_limit(clock: Clock) -> None:
    answers = iter([False, False, True])
    assert BusyPoller(100).poll(lambda: next(answers))


def test_poll_gives_up_after_the_limit(clock: Clock) -> None:
    assert polls(BusyPoller(100)) == pytest.approx(100, abs=2)


def idle(clock: Clock) -> BusyPoller:
    """A poller whose last waits were long."""
    poller = BusyPoller(100)
    for _ in range(20):
        polls(poller)
        clock.now += 1_000_000_000
        poller.blocked()
    return poller


def test_poll_is_over_at_once_after_long_waits(clock: Clock) -> None:
    assert polls(idle(clock)) == 0


def test_poll_is_long_again_after_a_short_wait(clock: Clock) -> None:
    poller = idle(clock)
    polls(poller)
    clock.now += 120_000
    poller.blocked()
    assert polls(poller) == pytest.approx(100, abs=2)


def test_poll_with_a_limit_of_zero_never_looks(clock: Clock) -> None:
    assert polls(BusyPoller(0)) == 0
