"""More requests than can be served: what a real daemon does with deadlines, and who learns what when."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from conftest import Daemon
from daemons import freeze
from dealer import LIMITS, Dealer, rows
from headers import pack, predict_header
from tnxctl.protocol import wire
from zmtp import Peer, message

ONE_ROW = bytes(1024)


def clock_us() -> float:
    return time.monotonic() * 1e6


@pytest.fixture
def stopped(run_daemon: Callable[..., Daemon]) -> Iterator[tuple[Daemon, Dealer]]:
    """A daemon that does not run, as on a machine that is busy with something else, and one who has asked it before."""
    daemon = run_daemon("--model", "mlp")
    with Dealer(daemon.endpoint) as dealer:
        for _ in range(20):
            dealer.predict(rows(1), deadline_us=60e6, sent_us=clock_us())
            dealer.result()
        freeze(daemon.process)
        yield daemon, dealer


def test_a_deadline_counts_from_when_the_message_came(stopped: tuple[Daemon, Dealer]) -> None:
    """It cannot have come before the socket was last seen empty; which may be when libzmq's thread goes on as last."""
    daemon, dealer = stopped
    until = time.monotonic() + 60.0
    error: object = None
    while not isinstance(error, wire.ErrorReply):
        assert time.monotonic() < until, error
        freeze(daemon.process)
        late = dealer.predict(rows(1), deadline_us=200_000.0, sent_us=clock_us())
        in_time = dealer.predict(rows(1), deadline_us=60e6, sent_us=clock_us())
        assert not dealer.socket.poll(400), "a process that is stopped has answered"
        daemon.process.send_signal(signal.SIGCONT)
        answers = {reply.id: reply for reply, _ in (dealer.receive(), dealer.receive())}
        error = answers[late]
        assert isinstance(answers[in_time], wire.Result)
    assert error.code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("stamp", [0.0, 1.0, 1e15], ids=["0", "long ago", "in years"])
def test_a_stamp_that_lies_harms_nobody(stopped: tuple[Daemon, Dealer], stamp: float) -> None:
    daemon, dealer = stopped
    daemon.process.send_signal(signal.SIGCONT)
    with Dealer(daemon.endpoint) as liar:
        for _ in range(20):
            liar.predict(rows(1), deadline_us=60e6, sent_us=stamp)
            liar.predict(rows(1), deadline_us=60e6, sent_us=clock_us())
            assert {type(liar.receive()[0]), type(liar.receive()[0])} <= {wire.Result, wire.ErrorReply}
            dealer.predict(rows(1), deadline_us=60e6, sent_us=clock_us())
            dealer.result()


@pytest.mark.parametrize("stamp", [-1.0, float("nan"), float("inf"), 1e300, "now"])
def test_a_stamp_that_is_none_is_refused_by_name(daemon: Daemon, stamp: object) -> None:
    with Dealer(daemon.endpoint) as dealer:
        dealer.socket.send_multipart([pack(predict_header(sent_us=stamp)), ONE_ROW])
        error = dealer.error()
        assert error.code == "INVALID_ARGUMENT"
        assert "sent_us" in error.message


@pytest.mark.parametrize("stamped", [True, False])
def test_who_asks_for_more_than_can_be_done_in_time_gets_an_answer_to_each(
    run_daemon: Callable[..., Daemon], stamped: bool
) -> None:
    """One that is refused for want of time does no wrong: it is not cut off, however many there are."""
    daemon = run_daemon("--model", "mlp")
    stamp = {"sent_us": 1e9} if stamped else {}
    count, part = 40_000, 2000
    parts = [
        b"".join(
            message(pack(predict_header(id=number, deadline_us=100.0, **stamp)), ONE_ROW)
            for number in range(first, first + part)
        )
        for first in range(0, count, part)
    ]
    room = threading.Semaphore(8)
    answers: Counter[str] = Counter()
    ids = set()
    with Peer(daemon.endpoint, timeout=60) as peer:
        peer.greet()

        def send() -> None:
            for data in parts:
                room.acquire()
                peer.write(data)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        for number in range(1, count + 1):
            reply = wire.decode_reply(peer.read_message()[0], LIMITS)
            assert isinstance(reply, wire.Result | wire.ErrorReply)
            ids.add(reply.id)
            answers[reply.code if isinstance(reply, wire.ErrorReply) else "result"] += 1
            if not number % part:
                room.release()
        sender.join()
    assert ids == set(range(count))
    assert set(answers) <= {"result", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert answers["DEADLINE_EXCEEDED"]
    with Dealer(daemon.endpoint) as dealer:
        report = dealer.health()
        assert report.connections_cut == 0
        assert sum(report.errors.values()) == count - answers["result"]
        dealer.predict(rows(1), deadline_us=60e6)
        dealer.result()


def test_only_a_refusal_that_waiting_would_have_spared_says_when_to_come_back(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(64), deadline_us=1.0)
        assert dealer.error().retry_after_us is None


def test_a_flood_is_no_reason_to_refuse_another_client_that_does_not_say_when_it_sent(
    run_daemon: Callable[..., Daemon],
) -> None:
    """A connection that sends one request at a time waits for a turn: all that waits is the flood's.

    Some of them may be late where the machine has stalled, but not most, as if they had waited behind the flood.
    """
    daemon = run_daemon("--model", "mlp")
    part, parts, ahead = 4000, 5, 2
    flood = message(pack(predict_header(deadline_us=1.0)), ONE_ROW) * part
    over = threading.Event()
    answers: Counter[str] = Counter()

    def send() -> None:
        try:
            flooder.write(flood * ahead)
            for left in range(parts, 0, -1):
                for _ in range(part):
                    flooder.read_message()
                if left > ahead:
                    flooder.write(flood)
        finally:
            over.set()

    with Peer(daemon.endpoint, timeout=60).greet() as flooder, Dealer(daemon.endpoint) as honest:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            while not over.is_set():
                honest.predict(rows(1), deadline_us=200_000.0)
                reply, _ = honest.receive()
                answers[reply.code if isinstance(reply, wire.ErrorReply) else "result"] += 1
        finally:
            over.wait()
            sender.join()
    assert set(answers) <= {"result", "DEADLINE_EXCEEDED"}
    assert answers["result"] > answers["DEADLINE_EXCEEDED"]
