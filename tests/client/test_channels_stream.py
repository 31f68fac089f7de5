"""`StreamChannel`, and the clients over it: peers that are slow, silent, gone, or send without end."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import resource
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import uvloop
import zmq

import zmtp as peer
from peers import FakeDaemon, X, echo, equal, error, free_endpoint
from shells import call_until_it_says
from tnxctl import AsyncClient, Client, link
from tnxctl.channels import names, opening
from tnxctl.channels.channel import POLLIN, Target
from tnxctl.channels.stream import _READS, StreamChannel
from tnxctl.channels.zmtp import BUFFER_BYTES
from tnxctl.loop_driver import REPLIES_PER_TURN
from tnxctl.protocol import errors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

PATIENCE_S = 60.0
READY = peer.frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER", command=True)
WELCOME = peer.GREETING + READY
TOLD_BEFORE = 10 + 2  # the signature and the version that a client says unasked

OVER = (zmq.Event.CLOSED, zmq.Event.CONNECT_RETRIED, zmq.Event.DISCONNECTED)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE_S)
        yield listening


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def endpoint_of(server: socket.socket) -> str:
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


class Driven:
    """A channel, polled by hand. Attributes: messages, events: all that came."""

    def __init__(self, endpoint: str) -> None:
        self.channel = StreamChannel(Target(endpoint, None, 1 << 28, 100), None)
        self.messages: list[list[bytes]] = []
        self.events: list[int] = []

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def look(self) -> None:
        while (frames := self.channel.receive()) is not None:
            self.messages.append([bytes(frame) for frame in frames])
        if self.channel.has_events:
            self.events += [event for event, _ in self.channel.events()]

    def until(self, is_done: Callable[[], object]) -> None:
        """Poll until that is so. Nothing but a source wakes this."""
        self.look()
        while not is_done():
            ready = zmq.zmq_poll(self.channel.sources, int(PATIENCE_S * 1e3))
            assert ready, "no source tells"
            for _, mask in ready:
                if mask != POLLIN:
                    self.channel.on_room()
            self.look()

    def until_event(self, *events: int) -> None:
        self.until(lambda: {*events} & {*self.events})


def welcome(server: socket.socket) -> socket.socket:
    """A connection, after the handshake."""
    held, _ = server.accept()
    held.settimeout(PATIENCE_S)
    held.sendall(WELCOME)
    read_exactly(held, len(peer.GREETING) + len(READY))  # ROUTER and DEALER have the same length
    return held


def read_exactly(held: socket.socket, nbytes: int, at_most: int = 1 << 20) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = held.recv(min(nbytes - len(data), at_most))
        assert part
        data += part
    return bytes(data)


@contextmanager
def connected(server: socket.socket) -> Iterator[tuple[Driven, socket.socket]]:
    with ThreadPoolExecutor(1) as pool, Driven(endpoint_of(server)) as driven:
        accepted = pool.submit(welcome, server)
        driven.until_event(zmq.Event.HANDSHAKE_SUCCEEDED)
        with accepted.result(PATIENCE_S) as held:
            yield driven, held


def reset(held: socket.socket) -> None:
    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    held.close()


def descriptors() -> int:
    gc.collect()  # else it may close later what tests before have left
    return len(os.listdir("/proc/self/fd"))


# --- to send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("nbytes", [1 << 20, 64 << 20])
def test_a_slow_reader_gets_every_byte(
    server: socket.socket, elsewhere: ThreadPoolExecutor, nbytes: int, copy: bool
) -> None:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    rows = np.frombuffer(np.random.default_rng(0).bytes(nbytes), "f8").reshape(-1, 1)
    sent = [
        [b"one", rows, bytearray(b"two"), np.float32(1.5), np.empty((0, 3))],
        [b"x" * 300],
        *([b"small", np.arange(n, dtype="i2")] for n in range(300)),
    ]
    expected = b"".join(peer.message(*(memoryview(frame).tobytes() for frame in frames)) for frames in sent)
    with connected(server) as (driven, held):
        for frames in sent:
            driven.channel.send(frames, copy)
        got = elsewhere.submit(read_exactly, held, len(expected), 30_011 if nbytes < 1 << 21 else 1 << 20)
        driven.until(lambda: not driven.channel._queue)
        assert got.result(PATIENCE_S) == expected
        assert driven.channel.sources[0][1] == POLLIN


def test_what_is_held_goes_out_in_order_with_the_flush(server: socket.socket) -> None:
    with connected(server) as (driven, held):
        driven.channel.hold()
        for number in range(600):
            driven.channel.send([b"%d" % number], True)
        held.setblocking(False)
        with pytest.raises(BlockingIOError):
            held.recv(1)
        held.settimeout(PATIENCE_S)
        driven.channel.flush()
        driven.channel.send([b"after"], True)
        driven.until(lambda: not driven.channel._queue)
        expected = b"".join(peer.message(b"%d" % number) for number in range(600)) + peer.message(b"after")
        assert read_exactly(held, len(expected)) == expected


def test_an_error_in_the_middle_of_a_message_ends_the_connection(server: socket.socket) -> None:
    class Failing:
        def __init__(self, held: socket.socket) -> None:
            self._held = held

        def send(self, data: Any, flags: int) -> int:
            self._held.send(bytes(data)[:3], flags)
            raise OSError(errno.ENOBUFS, "no buffers")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._held, name)

    with connected(server) as (driven, held):
        held.sendall(peer.message(b"before"))
        driven.channel._socket = Failing(driven.channel._socket)  # type: ignore[arg-type, assignment]
        driven.channel.send([b"a message"], True)
        driven.until_event(zmq.Event.DISCONNECTED)
        assert driven.messages == [[b"before"]]
        assert read_exactly(held, 3) == peer.message(b"a message")[:3]
        assert held.recv(1) == b"", "no other message may follow"


ARRAYS = {
    "0-d": np.float32(2.5),
    "no rows": np.zeros((0, 4), "f4"),
    "Fortran order": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every other": np.arange(20, dtype="i8")[::2],
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16),
    "float16": np.arange(6, dtype="f2"),
    "bool": np.array([True, False]),
    "large": np.arange(3 << 20, dtype="u4"),
    "large bfloat16": np.ones((1 << 20, 2), ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_an_array_goes_there_and_back(array: Any) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        output = tnx.predict({"a": array, "b": X}).outputs["a"]
    assert output.dtype == array.dtype
    assert output.shape == array.shape
    assert np.array_equal(output, array)
    assert output.flags.writeable


# --- to receive ----------------------------------------------------------------------------------------------


def test_a_message_in_pieces_takes_one_poll_for_each(server: socket.socket) -> None:
    body = np.random.default_rng(1).bytes(300_000)
    data = peer.message(b"header", body)
    with connected(server) as (driven, held):
        for start in range(0, len(data), 60_000):
            held.sendall(data[start : start + 60_000])
            assert zmq.zmq_poll(driven.channel.sources, int(PATIENCE_S * 1e3))
            while zmq.zmq_poll(driven.channel.sources, 0):
                driven.look()
            assert not driven.channel._is_dry, "the next look would read nothing"
        while not driven.messages:  # the kernel may hand on a piece in several
            assert zmq.zmq_poll(driven.channel.sources, int(PATIENCE_S * 1e3))
            driven.look()
        assert driven.messages == [[b"header", body]]


def test_what_came_before_a_reset_still_counts(server: socket.socket) -> None:
    with connected(server) as (driven, held):
        held.sendall(peer.message(b"whole", b"tensor") + peer.message(b"half", bytes(100_000))[:50_000])
        driven.until(lambda: driven.messages)
        reset(held)
        driven.until_event(zmq.Event.DISCONNECTED)
        assert driven.messages == [[b"whole", b"tensor"]]
        assert driven.channel.sources == []
        driven.channel.send([b"into nowhere"], True)
        driven.look()
        assert driven.events.count(zmq.Event.DISCONNECTED) == 1


def test_a_look_takes_no_more_than_a_turn_and_the_source_tells_of_the_rest(
    server: socket.socket, elsewhere: ThreadPoolExecutor
) -> None:
    """A driver has to come to its timers, also where somebody sends without end."""
    body = bytes(1000)
    count = 4 * _READS * BUFFER_BYTES // len(body)
    with connected(server) as (driven, held):
        sending = elsewhere.submit(held.sendall, peer.message(body) * count)
        while len(driven.messages) < count:
            before = len(driven.messages)
            assert zmq.zmq_poll(driven.channel.sources, int(PATIENCE_S * 1e3)), "no source tells"
            driven.look()
            assert (len(driven.messages) - before) * len(body) <= _READS * BUFFER_BYTES
        sending.result(PATIENCE_S)
        assert driven.messages == [[body]] * count


def test_a_ping_is_answered(server: socket.socket) -> None:
    with connected(server) as (driven, held):
        pong = peer.frame(b"\x04PONGcontext", command=True)
        for around in (b"", peer.message(b"a message")):
            held.sendall(around + peer.frame(b"\x04PING\x00\x64context", command=True))
            assert zmq.zmq_poll(driven.channel.sources, int(PATIENCE_S * 1e3))
            driven.look()
            assert read_exactly(held, len(pong)) == pong


def test_memory_that_a_frame_does_not_get_ends_the_connection(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    with connected(server) as (driven, held):
        held.sendall(peer.message(b"before") + peer.frame(b"", announce=1 << 27))
        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", no_memory)
            driven.until_event(zmq.Event.DISCONNECTED)
        assert driven.messages == [[b"before"]]


def flood(server: socket.socket, stop: threading.Event) -> None:
    """Empty messages without end, from a process of their own: they come faster than they are taken."""
    with welcome(server) as held:
        held.setblocking(True)
        with subprocess.Popen(["cat", "/dev/zero"], stdout=held.fileno()) as flooding:
            assert stop.wait(PATIENCE_S)
            flooding.kill()


def count_messages(session: Any) -> Callable[[], int]:
    """Count the messages that a session takes from now on. Returns what tells how many there were."""
    count = 0
    receive = session.receive

    def counted(frames: Any, now: float) -> Any:
        nonlocal count
        count += 1
        return receive(frames, now)

    session.receive = counted
    return lambda: count


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_flood_keeps_no_other_task_from_its_turn(
    server: socket.socket, elsewhere: ThreadPoolExecutor, new_loop: Any
) -> None:
    async def main() -> tuple[int, int]:
        turns = 0
        async with AsyncClient(endpoint_of(server), timeout=PATIENCE_S) as tnx:
            session: Any = tnx._session
            handled = count_messages(session)
            while not handled():
                call = asyncio.create_task(tnx.predict(X, timeout=1.0))
                while not call.done():
                    await asyncio.sleep(0)
                    turns += 1
                with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)):  # the latter before it has begun
                    call.result()
        stop.set()
        return handled(), turns

    stop = threading.Event()
    flooding = elsewhere.submit(flood, server, stop)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        handled, turns = runner.run(main())
    assert handled <= 2 * REPLIES_PER_TURN * (turns + 2)  # a source that is ready, messages that are left; a timer
    flooding.result(PATIENCE_S)


# --- to connect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [lambda driver, _: driver._on_time(), lambda driver, source: driver._go_on(source)])
def test_a_flood_that_has_come_meanwhile_is_not_taken_at_once(
    server: socket.socket, elsewhere: ThreadPoolExecutor, look: Callable[[Any, int], None]
) -> None:
    """As where the loop was held up: before a connection is given up for its silence, or as there is room to send."""
    count = 20 * REPLIES_PER_TURN

    async def main() -> None:
        async with AsyncClient(endpoint_of(server), timeout=PATIENCE_S) as tnx:
            call = asyncio.create_task(tnx.predict(X))
            session: Any = tnx._session
            handled = count_messages(session)
            while not session.connection.is_open:
                await asyncio.sleep(0)
            driver: Any = tnx._driver
            with accepting.result() as held:
                held.sendall(bytes(2) * count)
                source, _ = driver._link.channel.descriptor()
                await_bytes(source, 2 * count)
                session.connection.half_open_at = -1.0
                look(driver, source)
                assert 0 < handled() <= 2 * REPLIES_PER_TURN
                while handled() < count:
                    await asyncio.sleep(0)
                assert session.connection.is_open
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

    accepting = elsewhere.submit(welcome, server)
    asyncio.run(main())


def test_a_flood_of_one_of_several_daemons_is_not_taken_at_once(
    server: socket.socket, elsewhere: ThreadPoolExecutor
) -> None:
    count = 20 * REPLIES_PER_TURN

    async def main() -> None:
        async with AsyncClient([endpoint_of(server), free_endpoint()], timeout=PATIENCE_S) as tnx:
            call = asyncio.create_task(tnx.predict(X))
            balancer: Any = tnx._session
            session = balancer.sessions[0]
            while not session.connection.is_open:
                await asyncio.sleep(0)
            driver: Any = tnx._driver
            handled = count_messages(session)
            with accepting.result() as held:
                held.sendall(bytes(2) * count)
                source, _ = driver._link._links[0].channel.descriptor()
                await_bytes(source, 2 * count)
                for _ in range(3):  # as for the sources of others, that are ready as well
                    driver._turn()
                assert handled() == REPLIES_PER_TURN
                while handled() < count:
                    await asyncio.sleep(0)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

    accepting = elsewhere.submit(welcome, server)
    asyncio.run(main())


def await_bytes(descriptor: int, nbytes: int) -> None:
    """Wait until so much has come that nobody has read."""
    waiting = array("i", [0])
    until = time.monotonic() + PATIENCE_S
    while waiting[0] < nbytes:
        assert time.monotonic() < until
        fcntl.ioctl(descriptor, termios.FIONREAD, waiting)


@pytest.fixture
def is_full(server: socket.socket) -> Iterator[socket.socket]:
    """A listener that accepts nobody, with so many who wait that another one has no answer."""
    server.listen(0)
    with ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server


def test_readiness_of_another_is_no_connection(is_full: socket.socket) -> None:
    with Driven(endpoint_of(is_full)) as driven:
        driven.channel.on_room()
        driven.look()
        assert driven.events == [zmq.Event.CONNECT_DELAYED]
        driven.channel.time_out()
        driven.look()
        assert driven.events[1:] == [zmq.Event.CLOSED]


def test_an_attempt_without_an_answer_is_ended_and_made_again(
    is_full: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    open_channel = link.open_channel
    monkeypatch.setattr(link, "open_channel", lambda *given: opened.append(given) or open_channel(*given))
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.05)
    with Client(endpoint_of(is_full), timeout=PATIENCE_S) as tnx:
        while len(opened) < 3:
            call_until_it_says(tnx, r"nobody listens there|nothing answers")


def test_a_handshake_without_an_answer_is_ended_and_made_again(
    server: socket.socket, elsewhere: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.1)

    def accept() -> None:
        for _ in range(3):
            held, _ = server.accept()
            with held:
                held.settimeout(PATIENCE_S)
                while held.recv(100):
                    pass

    accepting = elsewhere.submit(accept)
    with Client(endpoint_of(server), timeout=PATIENCE_S) as tnx:
        call_until_it_says(tnx, "did not finish the ZeroMQ handshake")
        while not accepting.done():
            call_until_it_says(tnx, "did not finish the ZeroMQ handshake")
    accepting.result()


def test_a_peer_may_hang_up_at_each_byte_of_the_handshake(server: socket.socket, elsewhere: ThreadPoolExecutor) -> None:
    def hang_up(nbytes: int, ends: Callable[[socket.socket], None]) -> None:
        held, _ = server.accept()
        held.settimeout(PATIENCE_S)
        if nbytes:  # to have it all read first, so that no reset comes in between
            read_exactly(held, TOLD_BEFORE)
            held.sendall(WELCOME[:nbytes])
            if nbytes >= len(peer.GREETING):
                read_exactly(held, len(WELCOME) - TOLD_BEFORE)
        ends(held)

    for ends in (socket.socket.close, reset):
        for nbytes in range(len(WELCOME)):
            hanging = elsewhere.submit(hang_up, nbytes, ends)
            with Driven(endpoint_of(server)) as driven:
                driven.until_event(*OVER)
                assert zmq.Event.HANDSHAKE_SUCCEEDED not in driven.events
                assert driven.channel.sources == []
            hanging.result(PATIENCE_S)


@pytest.mark.parametrize("which", range(3), ids=["path", "abstract path", "IPv6"])
def test_every_kind_of_address(tmp_path: Path, which: int) -> None:
    endpoint = (f"ipc://{tmp_path}/socket", f"ipc://@tnx-test-{os.getpid()}", "tcp://[::1]:*")[which]
    with FakeDaemon(echo, endpoint) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        assert equal(tnx.predict(X), X)
        assert isinstance(tnx._driver._link.channel, StreamChannel)  # type: ignore[union-attr]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Opens host names, which stay unknown until then, as where a server of names is slow."""
    opened = threading.Event()
    getaddrinfo = socket.getaddrinfo

    def lookup(*given: Any) -> Any:
        assert opened.wait(PATIENCE_S)
        return getaddrinfo(*given)

    monkeypatch.setattr(names.socket, "getaddrinfo", lookup)
    yield opened
    opened.set()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_name_that_is_looked_up_slowly_keeps_no_other_daemon_waiting(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", PATIENCE_S)  # else another attempt may be due

    async def main() -> None:
        async with AsyncClient([named, quick.endpoint], timeout=PATIENCE_S) as tnx:
            for number in range(10):
                assert equal(await tnx.predict(X + number), X + number)
            assert tnx._session.sessions[0].connection.is_connecting  # type: ignore[union-attr]
            gate.set()
            while slow.received.empty():
                await tnx.predict(X)

    with FakeDaemon(echo) as slow, FakeDaemon(echo) as quick:
        named = slow.endpoint.replace("127.0.0.1", "localhost")
        if is_async:
            asyncio.run(main())
            return
        with Client([named, quick.endpoint], timeout=PATIENCE_S) as tnx:
            for number in range(10):
                assert equal(tnx.predict(X + number), X + number)
            assert tnx._session.sessions[0].connection.is_connecting  # type: ignore[union-attr]
            gate.set()
            while slow.received.empty():
                tnx.predict(X)


def test_a_lookup_may_take_longer_than_an_attempt(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.05)
    with (
        FakeDaemon(echo) as daemon,
        Client(daemon.endpoint.replace("127.0.0.1", "localhost"), timeout=PATIENCE_S) as tnx,
    ):
        with pytest.raises(errors.Unavailable, match="still under way"):
            tnx.predict(X, timeout=0.3)
        gate.set()
        assert equal(tnx.predict(X), X)


def test_a_fork_hides_the_end_of_a_lookup_from_nobody(gate: threading.Event) -> None:
    lookup = names.Lookup("tcp://localhost:1")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)  # has a copy of all descriptors, until the parent closes this one
        os._exit(0)
    os.close(reader)
    try:
        gate.set()
        assert zmq.zmq_poll([(lookup.fd, POLLIN)], int(PATIENCE_S * 1e3))
        assert lookup.is_over
        assert lookup.found == [(socket.AF_INET, ("127.0.0.1", 1))]
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        lookup.close()


def test_a_name_that_does_not_resolve_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(names.socket, "getaddrinfo", unknown)
    before = descriptors()
    with Client("no-such-host.invalid:5555", timeout=PATIENCE_S) as tnx:
        for _ in range(5):
            call_until_it_says(tnx, "the host name does not resolve")
    for thread in threading.enumerate():
        if thread.name == "tnxctl-lookup":
            thread.join(PATIENCE_S)
    assert descriptors() == before


@contextmanager
def named(monkeypatch: pytest.MonkeyPatch, *ports: tuple[str, int]) -> Iterator[str]:
    """An endpoint whose host name has several addresses."""
    told = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", each) for each in ports]
    with monkeypatch.context() as patched:
        patched.setattr(names.socket, "getaddrinfo", lambda *_: told)
        yield "several.invalid:5555"


UNREACHABLE = ("255.255.255.255", 1)  # which fails at once
DEAD = ("127.0.0.1", 1)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_name_leads_to_the_first_of_its_addresses_that_accepts(
    is_full: socket.socket, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            assert equal(await tnx.predict(X), X)

    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.1)
    with FakeDaemon(echo) as daemon:
        alive = ("127.0.0.1", int(daemon.endpoint.rpartition(":")[2]))
        addresses = [UNREACHABLE] * 2000 + [DEAD, is_full.getsockname(), UNREACHABLE, alive, DEAD]
        with named(monkeypatch, *addresses) as endpoint:
            if is_async:
                asyncio.run(main(endpoint))
            else:
                with Client(endpoint, timeout=PATIENCE_S) as tnx:
                    assert equal(tnx.predict(X), X)
        assert client_sockets(daemon) == 0


def test_a_name_of_which_no_address_accepts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    with (
        named(monkeypatch, UNREACHABLE, DEAD, UNREACHABLE) as endpoint,
        Client(endpoint, timeout=PATIENCE_S) as tnx,
    ):
        call_until_it_says(tnx, "nobody listens there, or it cannot be reached")
    assert descriptors() == before


def test_a_lookup_that_finds_no_memory_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(names.socket, "getaddrinfo", lookup)
    with Client("any.invalid:5555", timeout=PATIENCE_S) as tnx:
        call_until_it_says(tnx, "the host name does not resolve")


def test_no_descriptor_left_is_told_and_ends_with_the_shortage() -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        with Client(daemon.endpoint, timeout=PATIENCE_S) as before:
            assert equal(before.predict(X), X)  # the first call of a process imports modules, which takes descriptors
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            call_until_it_says(tnx, os.strerror(errno.EMFILE))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert equal(tnx.predict(X), X)


# --- clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_clients_that_come_and_go_leave_no_descriptor(new_loop: Any) -> None:
    async def main(endpoint: str) -> None:
        for _ in range(20):
            async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
                assert equal(await tnx.predict(X), X)

    with FakeDaemon(echo) as daemon, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main(daemon.endpoint))
        before = client_sockets(daemon)
        for _ in range(20):
            with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
                assert equal(tnx.predict(X), X)
        runner.run(main(daemon.endpoint))
        assert client_sockets(daemon) == before == 0


def client_sockets(daemon: FakeDaemon) -> int:
    """Open sockets of this process that lead to a daemon."""
    found, port = 0, int(daemon.endpoint.rpartition(":")[2])
    for name in os.listdir("/proc/self/fd"):
        copy = -1
        try:
            copy = os.dup(int(name))
            with socket.socket(fileno=copy) as held:
                copy = -1  # it is closed with the socket
                found += held.getpeername()[1:2] == (port,)
        except OSError:  # not connected, no socket, or closed meanwhile
            if copy >= 0:
                os.close(copy)
    return found


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_loop_may_be_closed_before_its_client(new_loop: Any) -> None:
    with FakeDaemon(echo) as daemon:
        loop = new_loop()
        tnx = AsyncClient(daemon.endpoint, timeout=PATIENCE_S)
        assert equal(loop.run_until_complete(tnx.predict(X)), X)
        loop.close()
        del tnx
        assert client_sockets(daemon) == 0


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_large_and_small_calls_of_three_clients_at_once(new_loop: Any) -> None:
    large = np.arange(1 << 20, dtype="f4")

    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as one, AsyncClient(endpoint, timeout=PATIENCE_S) as two:
            calls = [each.predict(array) for each in (one, two) for array in (large, X) * 6]
            for result, array in zip(await asyncio.gather(*calls), (large, X) * 12, strict=True):
                assert equal(result, array)

    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as third:
        futures = [third.submit(array) for array in (large, X) * 6]
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main(daemon.endpoint))
        for future, array in zip(futures, (large, X) * 6, strict=True):
            assert equal(future.result(PATIENCE_S), array)


def test_an_idle_client_of_several_daemons_notices_that_one_has_gone() -> None:
    """A change is not sent twice: one that goes to a daemon that has gone would fail."""
    with (
        FakeDaemon(echo) as first,
        FakeDaemon(echo) as second,
        Client([first.endpoint, second.endpoint], timeout=PATIENCE_S) as tnx,
    ):
        while first.received.empty() or second.received.empty():
            tnx.predict(X)
        first.stop()
        links = tnx._driver._link._links  # type: ignore[union-attr]
        assert zmq.zmq_poll(links[0].sources, int(PATIENCE_S * 1e3))
        assert tnx._session.sessions[0].connection.is_open  # type: ignore[union-attr]
        tnx.predict(X)
        assert not tnx._session.sessions[0].connection.is_open  # type: ignore[union-attr]
        assert tnx.traffic is not None
        assert not tnx.traffic.moved


@pytest.mark.parametrize("has_streams", [False, True])
def test_a_change_after_a_restart_goes_to_the_new_daemon(has_streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not sent twice, so the end of the old connection has to be noticed before."""
    monkeypatch.setattr(opening, "HAS_STREAMS", has_streams)
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        tnx.predict(X)
        daemon.stop()
        assert zmq.zmq_poll(tnx._driver._link.sources, int(PATIENCE_S * 1e3))
        daemon.start(error("NOT_FOUND", "the new one"))
        with pytest.raises(errors.NotFound, match="the new one"):
            tnx.unload("some")


def test_a_program_in_which_sigpipe_kills_outlives_its_daemon() -> None:
    code = """
import signal, sys
import numpy as np
from peers import FakeDaemon, X, echo, equal
from tnxctl import Client

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=60) as tnx:
    for _ in range(5):
        assert equal(tnx.predict(X), X)
        daemon.stop()
        channel = tnx._driver._link.channel
        for _ in range(5):
            channel.send([b"into nowhere"], True)
        daemon.start()
print("alive")
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
