"""Refused messages: their cost, and who pays it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer
from headers import pack, predict_header
from invariants import check_alive, needs_proc, unharmed
from raw import good, reply
from tnxctl.protocol import wire
from zmtp import Peer, frame, message

BROKEN_AT_THE_END = pack(predict_header(inputs=[["input", "FP32", [1, 256]]] * 900 + [["input", "FP32", "x"]]))
MANY_INPUTS = pack(predict_header(inputs=[["", "FP32", [1]]] * 5000))


@needs_proc
def test_long_headers_that_break_at_the_end_are_refused(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon("--model", "mlp")
    with unharmed(daemon):
        for header in (BROKEN_AT_THE_END, MANY_INPUTS):
            left = 200
            while left:
                # Where refusals take much of a slow loop's time, they are a flood, and their sender is cut off.
                with contextlib.suppress(ConnectionError), Peer(daemon.endpoint, timeout=60) as peer:
                    peer.greet().write(message(header) * left)
                    while left:
                        error = reply(peer)
                        assert isinstance(error, wire.ErrorReply)
                        assert (error.code, error.id) == ("INVALID_ARGUMENT", 7)
                        left -= 1


@pytest.mark.slow
@needs_proc
def test_message_of_a_million_parts_is_cut_off(run_daemon: Callable[..., Daemon]) -> None:
    """It is read over many turns, in which others are answered, and its sender is cut off."""
    daemon = run_daemon("--model", "mlp")
    with unharmed(daemon), Peer(daemon.endpoint, timeout=60) as peer:
        peer.greet().write(frame(pack(predict_header()), more=True))
        peer.write(frame(b"", more=True) * 1_000_000 + frame(b""))
        peer.read_end()
    with Dealer(daemon.endpoint) as dealer:
        assert dealer.health().connections_cut == 1


@needs_proc
@pytest.mark.slow
def test_flood_of_refused_messages_is_cut_off(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon("--model", "mlp")
    with unharmed(daemon):
        flood(daemon, message(b"nonsense") * 1000, 2)
    check_alive(daemon)


@needs_proc
@pytest.mark.slow
def test_flood_of_good_requests_leaves_room_for_others(run_daemon: Callable[..., Daemon]) -> None:
    """More than the queue of all holds, from one client; what is over its limit is refused."""
    daemon = run_daemon("--model", "mlp")
    with unharmed(daemon), Dealer(daemon.endpoint) as dealer:
        count = 20_000
        for number in range(count):
            dealer.socket.send_multipart([pack(predict_header(id=number)), bytes(1024)])
        refused = 0
        for _ in range(count):
            answer, _ = dealer.receive(30)
            if isinstance(answer, wire.ErrorReply):
                assert answer.code == "RESOURCE_EXHAUSTED"
                refused += 1
        assert refused < count


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_flood_of_tiny_messages_is_survived(run_daemon: Callable[..., Daemon], tmp_path: Path, kind: str) -> None:
    """ZeroMQ takes in all that comes, and 64 bytes of memory for each of three on the wire."""
    path = tmp_path / "tnxd"
    daemon = run_daemon("--bind", "tcp://127.0.0.1:*", "--bind", f"ipc://{path}", "--model", "mlp")
    with unharmed(daemon):
        flood(daemon, message(b"x") * 20_000, 4, daemon.endpoint if kind == "tcp" else f"ipc://{path}")
    check_alive(daemon)


def flood(daemon: Daemon, data: bytes, connections: int, endpoint: str = "") -> None:
    """Send a message again and again, until each connection has been cut off."""

    def send() -> None:
        with Peer(endpoint or daemon.endpoint, timeout=60) as peer:
            peer.greet()
            threading.Thread(target=_drop, args=(peer,), daemon=True).start()
            try:
                for _ in range(100_000):
                    peer.write(data)
            except OSError:
                return
            raise AssertionError("it was not cut off")

    threads = [threading.Thread(target=send) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _drop(peer: Peer) -> None:
    try:
        while True:
            peer.read_message()
    except (OSError, ConnectionError):
        pass


@pytest.mark.slow
@needs_proc
def test_orders_get_through_a_flood_of_orders(run_daemon: Callable[..., Daemon]) -> None:
    """Reloads that wait are one reload, so it is the next one for everybody."""
    daemon = run_daemon("--model", "mlp")
    order = pack({"type": "reload", "v": 1, "id": 3})
    with unharmed(daemon), Dealer(daemon.endpoint) as operator:
        stop = threading.Event()

        def ask() -> None:
            with Dealer(daemon.endpoint) as dealer:
                while not stop.is_set():
                    for _ in range(32):
                        dealer.socket.send(order)
                    for _ in range(32):
                        dealer.receive(30)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                operator.socket.send(order)
                report, _ = operator.receive(30)
                assert isinstance(report, wire.ReloadReport), report
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_good_request_by_the_tool_of_these_tests_is_served(daemon: Daemon) -> None:
    """The tool of the tests above is sound."""
    with Peer(daemon.endpoint) as peer:
        peer.greet().write(good())
        assert isinstance(reply(peer), wire.Result)
