"""Windows of a client: how many requests it lets wait."""

from __future__ import annotations

import random

import pytest

from tnxctl.protocol import wire
from tnxctl.request_windows import Window, Windows, kind_of


def simulated(capacity: int, offered: int, rounds: int, window: Window, now: float = 0.0) -> tuple[float, float]:
    """Rounds in each of which the daemon takes in up to `capacity` and refuses the rest: served, refused per round."""
    served = refused = 0
    for number in range(rounds):
        sent = min(offered, int(window.size))
        for at in range(sent):
            if at < capacity:
                window.served(now)
            else:
                window.refused(0.05, now)
        if number >= rounds // 2:
            served += min(sent, capacity)
            refused += max(sent - capacity, 0)
        now += 0.05
    return served / (rounds - rounds // 2), refused / (rounds - rounds // 2)


@pytest.mark.parametrize("capacity", [20, 50, 500])
def test_nearly_all_that_the_daemon_takes_is_sent_and_little_more(capacity: int) -> None:
    served, refused = simulated(capacity, 100_000, 400, Window(20 * capacity))
    assert served > 0.9 * capacity
    assert refused < 0.15 * capacity + 1


def test_it_grows_when_there_is_more_room() -> None:
    window = Window(10)
    window.refused(0.05, 0.0)
    for number in range(20):
        for _ in range(int(window.size)):
            window.served(0.1 + 0.05 * number)
    assert window.size > 1000


def test_it_is_never_so_small_that_nothing_is_learned() -> None:
    window = Window(10)
    for _ in range(1000):
        window.refused(0.05, 0.0)
    assert window.size >= 8


def test_it_is_forgotten_after_a_while() -> None:
    windows = Windows()
    windows.make(("m", None, 3), 10).refused(0.05, 100.0)
    assert windows.find(("m", None, 3), 100.5) is not None
    assert windows.find(("m", None, 3), 102.0) is None
    assert not windows


def test_there_are_only_so_many() -> None:
    windows = Windows()
    for number in range(1000):
        windows.make((str(number), None, 0), 1)
    assert windows.find(("999", None, 0), 0.0) is not None
    assert sum(windows.find((str(number), None, 0), 0.0) is not None for number in range(1000)) <= 64


def test_requests_without_deadline_have_none() -> None:
    assert kind_of(wire.Health(v=1, id=1)) is None
    assert kind_of(wire.Predict(v=1, id=1, inputs=())) is None


def test_a_refusal_of_a_short_deadline_says_nothing_about_a_long_one() -> None:
    chance = random.Random(1)
    short, long = (wire.Predict(v=1, id=1, inputs=(), model="m", deadline_us=us) for us in (1e3, 1e6))
    assert kind_of(short) != kind_of(long)
    alike = wire.Predict(v=1, id=2, inputs=(), model="m", deadline_us=1e6 + chance.random())
    assert kind_of(long) == kind_of(alike)
