"""Deliveries of answers on a clock of the test's own: which connections are ended, and when."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("grpc")

from tnxctl.bridge.grpc import deliveries
from tnxctl.bridge.grpc.deliveries import Deliveries
from tnxctl.bridge.settings import HttpLimits

ALLOWED_S = 10.0
RATE = 1000
LIMITS = HttpLimits(message_timeout_s=ALLOWED_S, body_rate=RATE)


class Timer:
    """A timer. Attributes: function: None once it is cancelled."""

    def __init__(self, due: float, function: Callable[[], None]) -> None:
        self.due = due
        self.function: Callable[[], None] | None = function

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        self.function = None


class Loop:
    """A loop that has timers alone. Attributes: ended: addresses whose connections are to end, and when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ended: list[tuple[str, float]] = []
        self._timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, function: Callable[[], None]) -> Timer:
        timer = Timer(due, function)
        heapq.heappush(self._timers, timer)
        return timer

    def end(self, address: str) -> None:
        self.ended.append((address, self.now))

    def pass_until(self, now: float) -> None:
        while self._timers and self._timers[0].due <= now:
            timer = heapq.heappop(self._timers)
            self.now = max(self.now, timer.due)
            if timer.function is not None:
                timer.function()
        self.now = now


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    made = Loop()
    monkeypatch.setattr(deliveries.asyncio, "get_running_loop", lambda: made)
    yield made
    made.pass_until(1e9)


@pytest.fixture
def served(loop: Any) -> Deliveries:
    return Deliveries(loop, LIMITS)


def test_an_answer_has_the_time_that_its_bytes_take(served: Deliveries, loop: Loop) -> None:
    with served.begin("a:1", 5 * RATE):
        loop.pass_until(ALLOWED_S + 4.9)
        assert not loop.ended
        loop.pass_until(ALLOWED_S + 5.1)
    assert loop.ended == [("a:1", ALLOWED_S + 5)]


def test_answer_that_was_taken_ends_nothing_later(served: Deliveries, loop: Loop) -> None:
    with served.begin("a:1", RATE):
        loop.pass_until(ALLOWED_S)
    loop.pass_until(100 * ALLOWED_S)
    assert not loop.ended


def test_calls_that_share_a_connection_have_the_time_of_all(served: Deliveries, loop: Loop) -> None:
    """They go out by turns: all are over at about the same time. Half have begun before the others."""
    count, each = 20, 2 * RATE
    first = [served.begin("a:1", each) for _ in range(count // 2)]
    loop.pass_until(ALLOWED_S)
    second = [served.begin("a:1", each) for _ in range(count // 2)]
    loop.pass_until(count * each / RATE)
    assert not loop.ended
    for delivery in (*first, *second):
        delivery.__exit__()


def test_connection_is_ended_on_which_nothing_is_taken(served: Deliveries, loop: Loop) -> None:
    """Also where another one has answers under way."""
    others = [served.begin("b:1", 100 * RATE) for _ in range(20)]
    for _ in range(2):
        served.begin("a:1", RATE)
    loop.pass_until(ALLOWED_S + 2.1)
    assert {address for address, _ in loop.ended} == {"a:1"}
    for other in others:
        other.__exit__()


def test_what_was_taken_before_gives_no_time_later(served: Deliveries, loop: Loop) -> None:
    """Answers overlap, so that the connection always has one; each is taken in time."""
    taken = served.begin("a:1", RATE)
    for _ in range(1000):
        loop.pass_until(loop.now + 0.001)
        following = served.begin("a:1", RATE)
        taken.__exit__()
        taken = following
    assert not loop.ended
    begun = loop.now
    loop.pass_until(begun + ALLOWED_S + 2.1)  # the last one, which began while the one before was under way
    assert loop.ended == [("a:1", pytest.approx(begun + ALLOWED_S + 2))]


def test_small_answers_that_are_taken_slowly_and_steadily(served: Deliveries, loop: Loop) -> None:
    """Two calls, each of which has its next answer as soon as one was taken; they overlap."""
    waiting = [served.begin("a:1", 1), served.begin("a:1", 1)]
    for turn in range(100):
        loop.pass_until(loop.now + 0.45 * ALLOWED_S)
        waiting[turn % 2].__exit__()
        waiting[turn % 2] = served.begin("a:1", 1)
    assert not loop.ended
    for delivery in waiting:
        delivery.__exit__()
