"""An attacker with a key of the role predict, beside an honest client: what it can do is bounded as for anybody.

What it can do by single bytes, below ZeroMQ, it can do before it has shown a key: the other files here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import zmq

from conftest import Daemon
from dealer import Dealer, rows
from headers import pack, predict_header
from invariants import needs_proc, unharmed
from keyed import Keyed, ask, keyed_daemon, next_event, whoami
from tnxctl.protocol import wire

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), needs_proc]

V = wire.VERSION
LIMITED = "predict\nmax_requests = 64\nmax_mb = 4"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    config = "[clients]\nmax_connections = 50\n"
    people = {"insider": LIMITED, "bob": "predict"}
    with keyed_daemon(tmp_path_factory.mktemp("keyed"), people, "--model", "mlp", config=config) as running:
        yield running


def send_until_cut(peer: Dealer, *frames: bytes) -> None:
    """Send a message again and again, until the connection has been ended."""
    monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    with contextlib.suppress(zmq.Again):
        for _ in range(10_000):
            if monitor.poll(0):
                break
            for _ in range(500):
                peer.socket.send_multipart(frames, zmq.NOBLOCK)
    assert monitor.poll(20_000), "it was not cut off"
    peer.socket.disable_monitor()
    monitor.close(0)


def nonsense(keyed: Keyed) -> None:
    with keyed.dealer("insider") as peer:
        send_until_cut(peer, b"nonsense")


def orders(keyed: Keyed) -> None:
    """Each is refused, and counts against who gives it."""
    with keyed.dealer("insider") as peer:
        send_until_cut(peer, wire.encode(wire.Reload(v=V, id=1)))


def many_parts(keyed: Keyed) -> None:
    with keyed.dealer("insider") as peer:
        monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.socket.send_multipart([pack(predict_header()), *[b""] * 50_000])
        next_event(monitor, zmq.EVENT_DISCONNECTED)
        peer.socket.disable_monitor()
        monitor.close(0)


def good_requests(keyed: Keyed) -> None:
    """Over four connections; what is over the limits of the name is refused."""
    count = 3_000
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(keyed.dealer("insider")) for _ in range(4)]
        for number in range(count):
            for peer in peers:
                peer.socket.send_multipart([pack(predict_header(id=number)), bytes(1024)])
        refused = 0
        for peer in peers:
            for _ in range(count):
                answer, _ = peer.receive(30)
                if isinstance(answer, wire.ErrorReply):
                    assert answer.code == "RESOURCE_EXHAUSTED", answer
                    refused += 1
        assert 0 < refused < 4 * count


def large_requests(keyed: Keyed) -> None:
    """A MiB each, and half of one back; more than a few at a time are refused by the limit of the name."""
    with keyed.dealer("insider") as peer:
        count = 300
        for _ in range(count):
            peer.predict(rows(1024))
        answers = [peer.receive(30)[0] for _ in range(count)]
        assert any(isinstance(answer, wire.ErrorReply) for answer in answers)


def connections(keyed: Keyed) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(keyed.dealer("insider")) for _ in range(100)]
        for peer in peers:
            with contextlib.suppress(zmq.Again):  # it was refused already, and has no connection to send on
                peer.socket.send(wire.encode(wire.WhoAmI(v=V, id=1)), zmq.NOBLOCK)
        assert whoami(peers[0]).connections <= 50


def storm(keyed: Keyed) -> None:
    for _ in range(300):
        with keyed.dealer("insider") as peer:
            peer.predict(rows(1))


@pytest.mark.parametrize("attack", [nonsense, orders, many_parts, good_requests, large_requests, connections, storm])
def test_an_insider_harms_nobody(keyed: Keyed, attack: Callable[[Keyed], None]) -> None:
    honest = Daemon(keyed.local, keyed.daemon.process, keyed.daemon.log)
    with unharmed(honest, name=f"insider: {attack.__name__}"):
        attack(keyed)
    with keyed.dealer("bob") as bob:
        assert ask(bob, wire.Reload(v=V, id=1)).code == "PERMISSION_DENIED"  # type: ignore[union-attr]
