"""The ROUTER against real peers that are slow, gone or strange."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zmq

from tnxctl.protocol.wire import Limits
from tnxd.config import Clients
from tnxd.transport import outbox
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Message, Router
from tnxd.transport.wakeup import Wakeup
from zmtp import GREETING
from zmtp import Peer as RawPeer


def new_router(limits: Limits = Limits(), **clients: float) -> Router:  # noqa: B008 - frozen
    return Router(limits, Admission(Clients(**clients), max_requests=1000, max_bytes=1 << 30))  # type: ignore[arg-type]


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    one = Wakeup()
    yield one
    one.close()


@pytest.fixture
def router(wakeup: Wakeup) -> Iterator[Router]:
    one = new_router(Limits(tensors=3))
    one.bind("tcp://127.0.0.1:*")
    one.watch(wakeup)
    yield one
    one.close(0)


class Peer:
    """A DEALER (or another kind) whose receiving side can be made narrow."""

    def __init__(self, router: Router, kind: int = zmq.DEALER, narrow: bool = False) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        if narrow:
            self.socket.setsockopt(zmq.RCVHWM, 1)
            self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.connect(router.endpoints[0])

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)


def next_message(router: Router, seconds: float = 60.0) -> Message:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        router.wait(1000)
        message = router.receive()
        if message is not None:
            return message
    raise AssertionError("no message came")


def test_receive_and_send_keep_the_frames_of_a_message(router: Router) -> None:
    with Peer(router) as peer:
        peer.socket.send_multipart([b"header", b"one", b""])
        message = next_message(router)
        assert (message.delimited, bytes(message.header or b"")) == (False, b"header")
        assert [bytes(tensor) for tensor in message.tensors] == [b"one", b""]
        router.send(message.peer, message.delimited, (b"answer", (np.arange(3, dtype=np.uint8), np.empty(0))))
        assert peer.socket.recv_multipart() == [b"answer", b"\0\1\2", b""]


def test_send_returns_the_delimiter_of_a_req_socket(router: Router) -> None:
    with Peer(router, zmq.REQ) as peer:
        for _ in range(2):
            peer.socket.send_multipart([b"header", b"tensor"])
            message = next_message(router)
            assert message.delimited
            assert bytes(message.header or b"") == b"header"
            router.send(message.peer, message.delimited, (b"answer", ()))
            assert peer.socket.recv_multipart() == [b"answer"]


@pytest.mark.parametrize("frames", [[b""], [b"", b""]])
def test_receive_takes_a_message_without_a_header(router: Router, frames: list[bytes]) -> None:
    with Peer(router) as peer:
        peer.socket.send_multipart(frames)
        assert next_message(router).header is None


def test_receive_keeps_no_more_frames_than_the_limit(router: Router) -> None:
    with Peer(router) as peer:
        peer.socket.send_multipart([b"header", *[b"tensor"] * 1000])
        message = next_message(router)
        assert (message.tensor_count, len(message.tensors)) == (1000, 3)
        peer.socket.send_multipart([b"header", *[b"tensor"] * 3])
        assert next_message(router).tensor_count == 3


def test_send_counts_a_reply_to_a_peer_that_is_gone(router: Router) -> None:
    with Peer(router) as peer:
        peer.socket.send(b"header")
        gone = next_message(router).peer
    while not router.undeliverable:  # until the ROUTER has noticed
        router.send(gone, False, (b"answer", ()))
        router.wait(1)
        assert router.receive() is None


def test_backlog_of_a_slow_peer_is_sent_in_order_and_others_do_not_wait(router: Router) -> None:
    count = 800
    with Peer(router, narrow=True) as slow, Peer(router) as other:
        slow.socket.send(b"slow")
        slow_id = next_message(router).peer
        payload = np.zeros(50_000, np.uint8)
        for index in range(count):
            router.send(slow_id, False, (b"%d" % index, (payload,)))
        assert not router.flush()
        other.socket.send(b"other")
        router.send(next_message(router).peer, False, (b"answer", ()))
        assert other.socket.recv() == b"answer"
        got = []
        while len(got) < count:
            router.flush()
            if slow.socket.poll(1):
                got.append(int(slow.socket.recv_multipart()[0]))
        assert got == list(range(count))
        assert router.flush()
        assert router.undeliverable == 0


@pytest.fixture
def strict_admission() -> Admission:
    """A low limit of unsent replies."""
    return Admission(Clients(max_owed_mb=8.0), max_requests=1000, max_bytes=1 << 30)


@pytest.fixture
def strict_router(wakeup: Wakeup, strict_admission: Admission) -> Iterator[Router]:
    one = Router(Limits(tensors=3), strict_admission)
    one.bind("tcp://127.0.0.1:*")
    one.watch(wakeup)
    yield one
    one.close(0)


def test_backlog_of_a_peer_that_never_reads_is_given_up(
    strict_router: Router, strict_admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = strict_router
    monkeypatch.setattr(outbox, "_BACKLOG_SECONDS", 0.2)
    with Peer(router, narrow=True) as peer:
        peer.socket.send(b"header")
        peer_id = next_message(router).peer
        payload = np.zeros(200_000, np.uint8)
        taken = sum(router.send(peer_id, False, (b"answer", (payload,))) for _ in range(800))
        assert 10 < taken < 800
        assert router.undeliverable == 0
        while not router.flush() or peer_id not in [connection.peer for connection in router.take_disconnected()]:
            router.wait(5)  # given up, and then cut off
        assert 0 < router.undeliverable <= taken + 1
        assert strict_admission.unsent == 0


def _connect_narrow_peers(endpoint: str, peers: list[RawPeer], stack: contextlib.ExitStack) -> None:
    """Connect 300 peers that take little, each of which sends a request. Each greets at once: the router waits 10 s."""
    for _ in range(300):
        peer = stack.enter_context(RawPeer(endpoint, receive_buffer=4096, timeout=60))
        peers.append(peer.greet())
        peer.write(b"\0\1x")


@pytest.mark.slow
def test_close_ends_while_peers_disconnect_that_have_unsent_replies(wakeup: Wakeup) -> None:
    """It ends. Which of them go at a bad moment is chance: with libzmq's own linger every third round or so hung."""
    payload = np.zeros(400_000, np.uint8)
    for _ in range(15):
        router = new_router()
        router._socket.setsockopt(zmq.SNDBUF, 4096)  # what it holds of many peers is no longer on its way
        router.bind("tcp://127.0.0.1:*")
        router.watch(wakeup)
        with contextlib.ExitStack() as stack:
            peers: list[RawPeer] = []
            arguments = (router.endpoints[0], peers, stack)
            greeting = threading.Thread(target=_connect_narrow_peers, args=arguments)
            greeting.start()
            for _ in range(300):
                peer_id = next_message(router).peer
                for _ in range(3):
                    assert router.send(peer_id, False, (b"answer", (payload,)))
            greeting.join()
            vanishing = threading.Thread(target=lambda peers=peers: [peer.reset() for peer in peers])
            vanishing.start()
            router.close(0)
            vanishing.join()


def test_zero_copy_frames_of_a_peer_that_never_reads_are_bounded_in_bytes(strict_router: Router) -> None:
    """Far fewer messages than libzmq's own limit, but large ones."""
    router = strict_router
    with Peer(router, narrow=True) as slow, Peer(router) as other:
        slow.socket.send(b"slow")
        slow_id = next_message(router).peer
        released: list[int] = []
        accepted = 0
        for _ in range(60):
            payload = np.zeros(1_000_000, np.uint8)
            weakref.finalize(payload, released.append, 1)
            accepted += router.send(slow_id, False, (b"answer", (payload,)))
            del payload
        assert 2 < accepted < 30
        assert len(released) >= 60 - accepted
        other.socket.send(b"other")
        payload = np.ones(1_000_000, np.uint8)
        router.send(next_message(router).peer, False, (b"answer", (payload,)))
        assert other.socket.recv_multipart() == [b"answer", payload.tobytes()]
        taken = 0
        while taken < accepted:
            router.flush()
            if slow.socket.poll(10):
                slow.socket.recv_multipart()
                taken += 1
        assert router.flush()


def test_wait_ends_with_a_wake_up(router: Router, wakeup: Wakeup) -> None:
    """And it is told apart from a message, so that the loop clears it even if it finds nothing to do."""
    wakeup.set()
    assert router.wait(60_000)
    assert router.wait(60_000)  # until it is cleared
    wakeup.clear()
    assert not router.wait(0)
    waits = threading.Event()

    def wake() -> None:
        waits.wait()
        wakeup.set()

    with ThreadPoolExecutor() as pool:
        waking = pool.submit(wake)
        waits.set()
        assert router.wait(60_000)  # it blocks until then
        waking.result()
    wakeup.clear()
    with Peer(router) as peer:
        peer.socket.send(b"header")
        while not router.readable():  # an event of the connection ends a wait, too
            assert not router.wait(60_000)
        assert router.receive() is not None


def test_close_removes_the_socket_of_an_ipc_endpoint_and_keeps_its_lock(tmp_path: Path) -> None:
    one = new_router()
    one.bind(f"ipc://{tmp_path}/tnx")
    assert (tmp_path / "tnx").exists()
    one.close(0)
    assert [path.name for path in tmp_path.iterdir()] == ["tnx.lock"]


_ONE_AFTER_THE_OTHER = """
import sys, zmq
context = zmq.Context()
silent = context.socket(zmq.DEALER)
monitor = silent.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
silent.connect(sys.argv[1])
monitor.recv_multipart()
silent.disable_monitor()
silent.close(0)
sys.stdin.readline()
alive = context.socket(zmq.DEALER)
alive.connect(sys.argv[1])
alive.send(b"header")
print(alive.recv().decode(), flush=True)
sys.stdin.readline()
"""


def test_one_that_asks_to_come_in_is_counted_already(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks while the one before is let in."""
    counts: list[int] = []
    zap = router._connections._zap
    decide = zap._decide
    with contextlib.ExitStack() as stack:

        def ask() -> None:
            stack.enter_context(RawPeer(router.endpoints[0])).write(GREETING)
            assert zap.socket.poll(60_000)

        def decide_while_another_asks(request: list[bytes]) -> None:
            counts.append(router._connections._admission.client("127.0.0.1").connections)
            if len(counts) < 5:
                ask()
            decide(request)

        monkeypatch.setattr(zap, "_decide", decide_while_another_asks)
        ask()
        router.poll_monitor()
    assert counts == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_end_of_a_silent_connection_is_not_taken_for_that_of_the_next_with_its_descriptor(router: Router) -> None:
    """A client that connects and leaves without a word frees a descriptor, which the next one gets."""
    command = [sys.executable, "-c", _ONE_AFTER_THE_OTHER, router.endpoints[0]]
    before = len(os.listdir("/proc/self/fd"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        assert router._monitor.socket.poll(60_000)  # of the silent one; nobody looks at it yet
        end = time.monotonic() + 60
        while len(os.listdir("/proc/self/fd")) > before + 2:  # both pipes are here, its connection is not yet closed
            assert time.monotonic() < end
        print(file=clients.stdin, flush=True)
        peer = next_message(router).peer
        router.poll_monitor()
        gone = router.take_disconnected()
        router.send(peer, False, (b"answer", ()))
        assert peer not in [connection.peer for connection in gone]
        assert clients.stdout.readline() == "answer\n"
        clients.communicate("\n")
    while peer not in [connection.peer for connection in router.take_disconnected()]:
        router.wait(1000)
