"""`Client` under Ctrl-C: calls interrupted at each place at which CPython looks for signals, with each channel."""

from __future__ import annotations

import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any

import pytest
import zmq

from peers import (
    PATIENCE_S,
    FakeDaemon,
    Reply,
    Request,
    X,
    echo,
    equal,
    error,
    in_turn,
    silence,
)
from tnxctl import Client, driver, wakeups
from tnxctl.channels.libzmq import LibzmqChannel
from tnxctl.channels.stream import StreamChannel
from tnxctl.channels.zmtp import parts_of
from tnxctl.protocol import errors, wire
from tnxctl.results import Result

pytestmark = pytest.mark.usefixtures("each_channel")


def test_a_call_interrupted_while_it_waits_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def poll(sources: list[tuple[Any, int]], timeout: int) -> list[tuple[Any, int]]:
        if daemon.received.empty():
            return zmq.zmq_poll(sources, 1)
        raise KeyboardInterrupt

    with FakeDaemon(in_turn(silence, echo)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "zmq_poll", poll)
            with pytest.raises(KeyboardInterrupt):
                tnx.predict(X)
        assert tnx._session.idle
        interrupted = daemon.received.get_nowait()
        assert daemon.cancels.get(timeout=PATIENCE_S).id == interrupted.id
        assert equal(tnx.predict(X), X)
        assert daemon.received.get_nowait().identity == interrupted.identity, "the connection goes on"


def test_no_wait_is_so_long_that_an_interrupt_just_before_it_seems_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: list[float] = []

    def poll(sources: list[tuple[Any, int]], timeout: int) -> list[tuple[Any, int]]:
        waits_s.append(timeout / 1e3)
        if daemon.received.empty():
            return zmq.zmq_poll(sources, 1)
        raise KeyboardInterrupt

    class Lock:
        def acquire(self, timeout: float) -> bool:
            waits_s.append(timeout)
            return len(waits_s) > 2

    monkeypatch.setattr(driver, "zmq_poll", poll)
    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        with pytest.raises(KeyboardInterrupt):
            tnx.predict(X)
        monkeypatch.undo()
    assert 0 < max(waits_s) <= 1.0
    waits_s.clear()
    signal = wakeups.Signal()
    signal._lock = Lock()  # type: ignore[assignment]
    assert signal.wait(3600.0)
    assert waits_s == [1.0] * 3


def test_a_call_interrupted_while_another_thread_drives_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        driven = tnx.submit(X)
        other = daemon.received.get(timeout=PATIENCE_S)
        interrupted: list[Request] = []

        def wait(signal: object, timeout: float) -> bool:
            interrupted.append(daemon.received.get(timeout=PATIENCE_S))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(driver.Signal, "wait", wait)
            with pytest.raises(KeyboardInterrupt):
                tnx.predict(X)
        assert daemon.cancels.get(timeout=PATIENCE_S).id == interrupted[0].id != other.id
        assert not driven.done()


class Interrupt:
    """Does something, with Ctrl-C at the n-th of the places at which CPython looks for it.

    Those are the beginnings of functions and the returns of functions in C. It looks at each turn of a loop, too, but
    there is none here that calls nothing.

    Attributes:
        number: n. place: in words; "" if there are fewer.
    """

    def __init__(self, number: int) -> None:
        self.number = self._left = number
        self.place = ""

    def __call__(self, action: Callable[..., object], *args: object, **options: object) -> None:
        try:
            sys.setprofile(self._look)
            action(*args, **options)
        except BaseException:  # not always KeyboardInterrupt: `threading` makes a RuntimeError of some
            if not self.place:
                raise
        finally:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_return") and argument is not sys.setprofile:
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                self.place = f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt


def interrupts() -> Iterator[Interrupt]:
    """One for each place in what is done with it, until that is done without coming to one."""
    for number in itertools.count(1):
        interrupt = Interrupt(number)
        yield interrupt
        if not interrupt.place:
            assert number > 20
            return


may_meet_finalizers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def elsewhere() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """A thread that no interrupt reaches."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool


@may_meet_finalizers
def test_a_lone_call_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            assert equal(tnx.predict(X), X)  # now the connection stands
            interrupt(tnx.predict, X)
            assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place
        assert tnx._session.idle


@may_meet_finalizers
@pytest.mark.parametrize("code", ["", "UNAVAILABLE"])
def test_a_call_to_one_of_several_daemons_may_be_interrupted_anywhere(
    elsewhere: concurrent.futures.ThreadPoolExecutor, code: str
) -> None:
    with (
        FakeDaemon(error(code, "not now") if code else echo) as first,
        FakeDaemon(echo) as second,
        Client([first.endpoint, second.endpoint], timeout=PATIENCE_S) as tnx,
    ):
        for interrupt in interrupts():
            assert equal(tnx.predict(X), X)
            interrupt(tnx.predict, X)
            assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place
        assert tnx._session.idle
        assert all(session.idle for session in tnx._session.sessions)


@may_meet_finalizers
def test_a_call_may_be_interrupted_anywhere_as_it_connects_again(
    elsewhere: concurrent.futures.ThreadPoolExecutor,
) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            assert equal(tnx.predict(X), X)
            daemon.stop()
            daemon.start()
            interrupt(tnx.predict, X)
            assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place


class Holding:
    """Answers requests for the model "held" together with the next for any other model."""

    def __init__(self, on_held: Callable[[], object] = lambda: None) -> None:
        self._on_held = on_held
        self._held: list[Request] = []

    def __call__(self, request: Request) -> list[tuple[bytes, Reply]]:
        self._held.append(request)
        if isinstance(request.header, wire.Predict) and request.header.model == "held":
            self._on_held()
            return []
        held, self._held = self._held, []
        return [message for each in held for message in echo(each)]


@may_meet_finalizers
def test_an_interrupted_call_harms_none_that_was_there(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(Holding()) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            others = [tnx.submit(X + number, model="held") for number in range(3)]
            interrupt(tnx.predict, X)  # with its answer come theirs
            assert equal(elsewhere.submit(tnx.predict, X + 3).result(PATIENCE_S), X + 3), interrupt.place
            for number, other in enumerate(others):
                assert equal(other.result(PATIENCE_S), X + number), interrupt.place


@may_meet_finalizers
def test_an_interrupted_call_harms_none_that_came_later(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    others: list[Future[Result]] = []
    holding = Holding(lambda: others.append(elsewhere.submit(tnx.predict, X + 1)))
    with FakeDaemon(holding) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            interrupt(tnx.predict, X, model="held")
            others.append(elsewhere.submit(tnx.predict, X + 1))
            for other in others:
                assert equal(other.result(PATIENCE_S), X + 1), interrupt.place
        assert len(others) > interrupt.number + 10  # those came while the call was under way
        assert tnx._session.idle


@may_meet_finalizers
def test_submit_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(echo) as daemon:
        for interrupt in interrupts():
            with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
                interrupt(tnx.submit, X)
                assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place
                assert equal(tnx.submit(X + 2).result(PATIENCE_S), X + 2), interrupt.place


@may_meet_finalizers
def test_close_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(silence) as daemon:
        for interrupt in interrupts():
            tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
            other = tnx.submit(X)
            daemon.received.get(timeout=PATIENCE_S)
            interrupt(tnx.close)
            elsewhere.submit(tnx.close).result(PATIENCE_S)
            with pytest.raises(errors.Cancelled):
                other.result(PATIENCE_S)
            with pytest.raises(errors.FailedPrecondition):
                tnx.predict(X)


def test_a_message_half_sent_ends_the_connection() -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        assert equal(tnx.predict(X), X)
        link = tnx._driver._link
        send = link._send

        def interrupted(call: Any) -> None:
            link._send = send  # type: ignore[method-assign]
            channel = link.channel
            if isinstance(channel, LibzmqChannel):
                assert channel.dealer is not None
                channel.dealer.send(call.frames[0], zmq.SNDMORE)
            else:
                assert isinstance(channel, StreamChannel)
                channel._send_bytes(b"".join(parts_of(call.frames)[:2]))
            raise KeyboardInterrupt

        link._send = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            tnx.predict(X)
        assert equal(tnx.predict(X + 1), X + 1)
        assert daemon.received.qsize() == 2
