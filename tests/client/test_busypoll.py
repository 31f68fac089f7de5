"""Busy polling: on a clock and a loop of the test's own, and whether a real loop sleeps."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from patience import longer_each_time
from peers import PATIENCE_S, FakeDaemon, X, echo, equal
from tnxctl import AsyncClient, busypoll
from tnxctl.busypoll import BusyPoll
from tnxctl.protocol.errors import InvalidArgument

LONGEST_S = 1e-3


class Loop:
    """A loop whose turns take a tenth of the longest poll each."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[Callable[[], None]] = []
        self.closed = False

    def call_soon(self, callback: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.due.append(callback)

    def is_closed(self) -> bool:
        return self.closed

    def turns(self) -> int:
        """Number of turns until nothing is due."""
        count = 0
        while self.due:
            callbacks, self.due = self.due, []
            self.now += LONGEST_S / 10
            for callback in callbacks:
                callback()
            count += 1
            assert count < 1000
        return count


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(busypoll.time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def poll(loop: Any) -> BusyPoll:
    return BusyPoll(loop, LONGEST_S)


def call(poll: BusyPoll, loop: Loop, seconds: float, gap: float) -> None:
    """One call that takes so long, and what passes until the next."""
    poll.sent()
    loop.due.clear()
    poll._is_on = False
    loop.now += seconds
    poll.answered(seconds)
    loop.due.clear()
    poll._is_on = False
    loop.now += gap


def test_it_lasts_no_longer_than_it_may(poll: BusyPoll, loop: Loop) -> None:
    poll.sent()
    assert loop.turns() == pytest.approx(10, abs=1)


def test_it_is_due_once_however_often_it_is_begun(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(3):
        poll.sent()
        poll.answered(LONGEST_S / 10)
    assert len(loop.due) == 1


def test_calls_that_take_long_are_not_polled_for(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, 3 * LONGEST_S, 0.0)
    poll.sent()
    assert not loop.due


def test_one_long_call_does_not_end_it(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, LONGEST_S / 4, LONGEST_S / 10)
    call(poll, loop, 1000 * LONGEST_S, LONGEST_S / 10)
    poll.sent()
    assert loop.due


def test_short_calls_are_polled_for_again_after_long_ones(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, 100 * LONGEST_S, 0.0)
    for _ in range(40):
        call(poll, loop, LONGEST_S / 4, 0.0)
    poll.sent()
    assert loop.due


def test_the_next_call_is_polled_for_where_it_comes_soon(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, LONGEST_S / 4, LONGEST_S / 10)
    poll.sent()
    poll.answered(LONGEST_S / 4)
    assert loop.turns() == pytest.approx(10, abs=1)


def test_the_next_call_is_not_polled_for_where_it_comes_late(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, LONGEST_S / 4, 50 * LONGEST_S)
    poll.sent()
    poll.answered(LONGEST_S / 4)
    assert loop.turns() == 1


def test_it_ends_for_good(poll: BusyPoll, loop: Loop) -> None:
    poll.sent()
    poll.end()
    assert loop.turns() == 1
    poll.answered(LONGEST_S / 10)
    assert not loop.due


def test_call_that_a_closed_loop_has_left_ends_without_an_error(poll: BusyPoll, loop: Loop) -> None:
    for _ in range(20):
        call(poll, loop, LONGEST_S / 4, LONGEST_S / 10)
    poll.sent()
    loop.turns()
    loop.closed = True
    poll.answered(LONGEST_S / 4)  # when the garbage collector ends the call


@pytest.mark.parametrize("given", [-1e-9, 1.001, float("nan"), float("inf"), True, "1ms", None])
def test_what_is_no_time_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgument, match="busy_poll"):
        AsyncClient("127.0.0.1:1", busy_poll=given)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no poll end because it has lasted long enough."""
    monkeypatch.setattr(busypoll, "time", SimpleNamespace(monotonic=lambda: 100.0))


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(("busy_poll", "sleeps"), [(0.0, True), (1.0, False)])
def test_a_loop_that_polls_does_not_sleep(busy_poll: float, sleeps: bool) -> None:
    """The daemon answers once the loop has looked many times without waiting, or has waited."""
    waits: list[float | None] = []

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            waits.append(timeout)
            return super().select(timeout)

    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S, busy_poll=busy_poll) as tnx:
            assert equal(await tnx.predict(X), X)
            waits.clear()
            assert equal(await tnx.predict(X), X)

    def slow(*arguments: Any) -> Any:
        before, until = len(waits), time.monotonic() + PATIENCE_S
        while len(waits) < before + 20 and waits[-1:] != [None] and not any(waits[-1:]) and time.monotonic() < until:
            time.sleep(1e-4)
        return echo(*arguments)

    with (
        FakeDaemon(echo) as daemon,
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner,
    ):
        daemon.answer = slow
        runner.run(main(daemon))
    assert any(wait is None or wait > 0 for wait in waits) == sleeps


@pytest.mark.usefixtures("endless")
def test_a_loop_whose_client_is_closed_sleeps_again() -> None:
    polls: list[bool] = []

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            polls.append(timeout == 0)
            return super().select(timeout)

    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S, busy_poll=1.0) as tnx:
            for _ in range(20):  # until the next one is expected soon
                await tnx.predict(X)
        polls.clear()
        for delay_s in longer_each_time(1e-3, most_s=10.0):  # it may be over before the loop comes to its sleep
            await asyncio.sleep(delay_s)
            if not all(polls):
                break

    with (
        FakeDaemon(echo) as daemon,
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner,
    ):
        runner.run(main(daemon))
    assert not all(polls)
