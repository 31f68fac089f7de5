"""Shared memory of a real daemon with real clients, and with peers that tell it lies about it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import START_SECONDS, Daemon, serving_daemon
from daemons import ODD
from dealer import Dealer, rows
from tnxctl import AsyncClient, Client
from tnxctl.protocol import errors, wire
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.recordings import RecordingReader
from tnxctl.protocol.wire import MIB, Span
from tnxd.config import Clients
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection
from tnxd.transport.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files in memory")

PLENTY = "[clients]\nshared_memory_mb = 1024\n"

BIG = np.random.default_rng(7).standard_normal((256, 256)).astype(np.float32)
"""256 KiB for `mlp`, which gives 128 KiB."""

TEXTS = """
class Model:
    def predict(self, texts):
        return {"same": texts}
"""
TEXTS_TOML = """
inputs = [{name = "texts", datatype = "BYTES", shape = [-1]}]
outputs = [{name = "same", datatype = "BYTES", shape = [-1]}]
"""

PIPED = """
inputs = ["x"]
[[steps]]
name = "only"
model = "mlp"
inputs = {input = "x"}
[outputs]
y = "only.output"
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that shares memory."""
    folder = tmp_path_factory.mktemp("shared")
    for name, text in (
        ("tnxd.toml", PLENTY),
        ("models/texts/1/model.py", TEXTS),
        ("models/texts/model.toml", TEXTS_TOML),
        ("models/piped/1/pipeline.toml", PIPED),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    arguments = ("--config", str(folder / "tnxd.toml"), "--bind", f"ipc://{folder}/tnx", "--model", "mlp")
    arguments += ("--model-repository", str(folder / "models"))
    with serving_daemon(folder / "log", *arguments) as daemon:
        yield daemon


def settle(tnx: Client) -> Client:
    """The client, once it shares memory: the daemon answers before it answers the second call."""
    for _ in range(3):
        tnx.health()
    assert tnx.shares_memory
    return tnx


def segments(pid: int) -> int:
    """Number of segments that a process has mapped; those of which it has but a descriptor count as well."""
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one of this very loop
            if os.readlink(link).startswith("/memfd:tnxd-shared"):
                held.add(link.stat().st_ino)
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return len(held | {int(line.split()[4]) for line in lines if "/memfd:tnxd-shared" in line})


def await_segments(daemon: Daemon, expected: int) -> None:
    """Ask the daemon something until it has so many segments. The test's own time limit ends the asking."""
    with Client(daemon.endpoint, timeout=60) as tnx:
        while segments(daemon.process.pid) != expected:
            tnx.health()


def places(tnx: Client) -> list[list[int]]:
    """Free room of a client's segment."""
    segment: Any = tnx._session.sharing._segment  # type: ignore[union-attr]
    segment.allocate(0)  # looks at what was freed
    gaps: list[list[int]] = segment._gaps
    return gaps


# --- clients -------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_socket(shared: Daemon) -> None:
    with Client(shared.endpoint, timeout=60) as plain, Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        assert not plain.shares_memory
        for count in (1, 64, 256, 500, 0):
            x = np.resize(BIG, (count, 256))
            for _ in range(2):  # with a guess at the size of the outputs, and with knowledge
                assert np.array_equal(tnx.predict(x, model="mlp").output, plain.predict(x, model="mlp").output)
        expected = plain.predict(BIG, model="mlp").output
        assert np.array_equal(tnx.predict(BIG, model="piped").output, expected)
        assert np.array_equal(tnx.predict(BIG, model="piped").output, expected)
        x = np.array([b"a" * 100_000, b"", b"\0b"], object)
        assert [*tnx.predict(x, model="texts").output] == [*plain.predict(x, model="texts").output] == [*x]


def test_large_tensors_go_through_the_memory_alone(shared: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        frames = []
        sharing: Any = tnx._session.sharing
        incoming = sharing.incoming

        def look(reply: wire.Reply, received: list[Any]) -> Any:
            frames.append(received[1:])
            return incoming(reply, received)

        monkeypatch.setattr(sharing, "incoming", look)
        tnx.predict(BIG, model="mlp")
        assert frames == [[]]


def test_several_threads_and_futures(shared: Daemon) -> None:
    with Client(shared.endpoint, timeout=60) as plain, Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        inputs = [BIG + number for number in range(8)]
        expected = [plain.predict(x, model="mlp").output for x in inputs]
        futures = [tnx.submit(x, model="mlp", timeout=START_SECONDS) for x in inputs * 4]
        for number, future in enumerate(futures):
            assert np.array_equal(future.result().output, expected[number % 8])


def test_asyncio(shared: Daemon) -> None:
    async def ask() -> None:
        async with AsyncClient(shared.endpoint, shared_memory=True, timeout=60) as tnx:
            for _ in range(3):
                await tnx.health()
            assert tnx.shares_memory
            results = await asyncio.gather(*(tnx.predict(BIG, model="mlp") for _ in range(16)))
            assert all(np.array_equal(result.output, results[0].output) for result in results)

    asyncio.run(ask())


def test_outputs_stay_as_they_are_for_as_long_as_they_are_held(shared: Daemon) -> None:
    with Client(shared.endpoint, timeout=60) as plain:
        expected = [plain.predict(BIG + number, model="mlp").output for number in range(4)]
    tnx = settle(Client(shared.endpoint, shared_memory=True, timeout=60))
    held = [tnx.predict(BIG + number, model="mlp").output[::2] for number in range(4)]
    for number in range(10):
        tnx.predict(BIG - number, model="mlp")
    tnx.close()
    del tnx
    gc.collect()
    with Client(shared.endpoint, timeout=60) as plain:
        plain.predict(BIG, model="mlp")
    for output, right in zip(held, expected, strict=True):
        assert np.array_equal(output, right[::2])
        output += 1  # nobody else's
    assert segments(os.getpid()) == 1
    del held, output
    assert segments(os.getpid()) == 0
    await_segments(shared, 0)


def test_places_are_free_again(shared: Daemon) -> None:
    with Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        held = [tnx.predict(BIG, model="mlp") for _ in range(3)]
        for _ in range(30):
            tnx.predict(BIG, model="mlp")
        with pytest.raises(errors.NotFound):
            tnx.predict(BIG, model="none")
        del held
        assert places(tnx) == [[0, 64 * MIB]]


def test_without_room_tensors_go_over_the_socket(shared: Daemon) -> None:
    with Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        expected = tnx.predict(BIG, model="mlp").output
        segment: Any = tnx._session.sharing._segment  # type: ignore[union-attr]
        free = segment.nbytes - expected.nbytes
        for left in (BIG.nbytes + 64, BIG.nbytes, expected.nbytes, 64, 0):
            places(tnx)
            taken = segment.allocate(free - left)
            assert np.array_equal(tnx.predict(BIG, model="mlp").output, expected)
            segment.freed.append(taken)


def test_a_call_that_timed_out_keeps_its_place_until_the_daemon_is_done_with_it(shared: Daemon) -> None:
    with Client(shared.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        under_way: list[Any] = []
        while not under_way:  # where this process was held up, the call was not even sent in time
            with pytest.raises(errors.DeadlineExceeded):
                tnx.predict(np.resize(BIG, (4096, 256)), model="mlp", timeout=0.001)
            under_way = [*tnx._session.sharing._under_way.values()]  # type: ignore[union-attr]
        assert all(call.place is not None for call in under_way)
        while tnx._session.sharing._under_way:  # type: ignore[union-attr]
            tnx.health()
        assert places(tnx) == [[0, 64 * MIB]]


def test_a_new_daemon_is_asked_anew(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    (tmp_path / "tnxd.toml").write_text(PLENTY)
    arguments = ("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx")
    first = run_daemon(*arguments)
    with Client(first.endpoint, shared_memory=True, timeout=START_SECONDS) as tnx:
        expected = settle(tnx).predict(BIG).output
        first.process.kill()
        first.process.wait()
        future = tnx.submit(BIG)  # with the segment of the first, if that has not been missed yet
        run_daemon(*arguments)
        assert np.array_equal(future.result().output, expected)
        assert np.array_equal(settle(tnx).predict(BIG).output, expected)


def test_a_daemon_that_shares_none(tmp_path: Path, run_daemon: Callable[..., Daemon], caplog: Any) -> None:
    running = run_daemon("--bind", f"ipc://{tmp_path}/tnx")
    with Client(running.endpoint, shared_memory=True, timeout=60) as tnx, caplog.at_level(logging.WARNING, "tnxctl"):
        assert tnx.predict(BIG).output.shape == (256, 128)
        assert tnx.predict(BIG).output.shape == (256, 128)
        assert not tnx.shares_memory
    assert [record.message for record in caplog.records] == [
        f"{running.endpoint}: tensors go over the socket, and not through shared memory: this daemon shares no memory, "
        "clients.shared_memory_mb is 0"
    ]


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.InvalidArgument, match=r"tcp://127.0.0.1:5555 is no address of this host alone"):
            kind(["ipc:///run/tnx", "127.0.0.1"], shared_memory=True)
        with monkeypatch.context() as patch:
            patch.delattr(os, "memfd_create")
            patch.setattr("platform.system", lambda: "Windows")
            with pytest.raises(errors.InvalidArgument, match="not available on Windows, only on Linux"):
                kind("ipc:///run/tnx", shared_memory=True)


def test_recordings_hold_the_tensors(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    (tmp_path / "recordings").mkdir(mode=0o700)
    (tmp_path / "tnxd.toml").write_text(f'record_directory = "{tmp_path}/recordings"\n{PLENTY}')
    daemon = run_daemon("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx")
    with Client(daemon.endpoint, shared_memory=True, timeout=60) as tnx:
        settle(tnx)
        tnx.record("one.mcap")
        for number in range(3):
            tnx.predict(BIG + number)
        tnx.stop_recording()
    with (tmp_path / "recordings/one.mcap").open("rb") as file:
        requests = list(RecordingReader(file))
    assert len(requests) == 3
    for number, recorded in enumerate(requests):
        assert type(recorded.request) is wire.Predict
        (array,) = view_tensors(recorded.request.inputs, recorded.frames, wire.Limits())
        assert np.array_equal(array, BIG + number)


FORKED = """
import asyncio, os, sys
from tnxctl import AsyncClient, Client

async def main():
    async with AsyncClient(sys.argv[1], shared_memory=True, timeout=60) as aio:
        with Client(sys.argv[1], shared_memory=True, timeout=60) as tnx:
            for _ in range(3):
                tnx.health()
                await aio.health()
            assert tnx.shares_memory and aio.shares_memory
            child = os.fork()
            if not child:
                sys.stdin.read()
                os._exit(0)
    return child

child = asyncio.run(main())
print("closed", flush=True)
os.waitpid(child, 0)
"""


def test_a_forked_process_keeps_no_memory_of_its_parents(shared: Daemon) -> None:
    command = [sys.executable, "-c", FORKED, shared.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"closed\n"
        await_segments(shared, 0)  # while the child is there
    assert process.returncode == 0


# --- processes that die --------------------------------------------------------------------------------------

MORTAL = """
import os, sys
import numpy as np
from tnxctl import Client

endpoint, count = sys.argv[1], int(sys.argv[2])
for _ in range(count):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with Client(endpoint, shared_memory=True, timeout=60) as tnx:
            x = np.ones((256, 256), np.float32)
            for _ in range(3):
                tnx.health()
            assert tnx.shares_memory
            held = tnx.predict(x, model="mlp")
            futures = [tnx.submit(x, model="mlp") for _ in range(8)]
            os.write(writer, b".")
            while True:
                tnx.predict(x, model="mlp")
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_clients_that_are_killed_leave_nothing_behind(shared: Daemon, count: int) -> None:
    await_segments(shared, 0)
    descriptors = len(os.listdir(f"/proc/{shared.process.pid}/fd"))
    subprocess.run([sys.executable, "-c", MORTAL, shared.endpoint, str(count)], check=True)
    await_segments(shared, 0)
    with Client(shared.endpoint, timeout=60) as tnx:
        while len(os.listdir(f"/proc/{shared.process.pid}/fd")) > descriptors + 2:  # and this connection's
            tnx.health()


# --- hostile peers -------------------------------------------------------------------------------------------


class Peer(Dealer):
    """A peer that shares memory, and does with it what it likes.

    Attributes:
        memory: the segment. descriptor: of it. lifeline: the connection of the daemon.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("")
            listener.listen()
            self.ask("@" + listener.getsockname()[1:].decode())
            reply, _ = self.receive()
            if not isinstance(reply, wire.Shared):
                self.context.destroy(linger=0)
            assert isinstance(reply, wire.Shared), reply
            self.lifeline, _ = listener.accept()
        token, (self.descriptor,), _, _ = socket.recv_fds(self.lifeline, 64, 1)
        assert token == b"0" * 16
        self.memory = mmap.mmap(self.descriptor, reply.nbytes)

    def receive(self, seconds: float = 60.0) -> tuple[wire.Reply, tuple[Array, ...]]:
        """The next reply, without its tensors."""
        assert self.socket.poll(int(seconds * 1000)), "no reply came"
        return wire.decode_reply(self.socket.recv_multipart()[0], wire.Limits()), ()

    def ask(self, address: str) -> None:
        self.socket.send(wire.encode(wire.Share(v=1, id=99, address=address, token="0" * 16)))

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self.lifeline.close()
        os.close(self.descriptor)

    def send_shared(self, *frames: bytes, **fields: Any) -> None:
        """Send a request for one row of `mlp` with inputs in the memory, or whatever the fields say."""
        header = {"type": "predict_shared", "v": 1, "id": 7, "model": "mlp", "inputs": [["", "FP32", [1, 256]]]}
        self.socket.send_multipart([msgspec.msgpack.encode({**header, "shared": [[0, 1024]], **fields}), *frames])


@pytest.fixture
def peer(shared: Daemon) -> Iterator[Peer]:
    with Peer(shared.endpoint) as peer:
        yield peer


END = 64 * MIB

LIES = {
    "beyond the end": ({"shared": [[END - 1020, 1024]]}, "1024 bytes from 67107844 on are not within the 67108864"),
    "far beyond": ({"shared": [[2**62, 1024]]}, "are not within"),
    "a huge size": ({"shared": [[0, 2**62]]}, "more than the limit of"),
    "a negative offset": ({"shared": [[-64, 1024]]}, "Expected `int` >= 0"),
    "a negative size": ({"shared": [[0, -1]]}, "Expected `int` >= 0"),
    "no size": ({"shared": [[0]]}, "at least length 2"),
    "another size than the shape has": ({"shared": [[0, 1020]]}, r"takes 1024 bytes, its frame has 1020"),
    "too many spans": ({"shared": [[0, 1024], [0, 1024]]}, "announces 1 tensors, 2 are in shared memory"),
    "no spans": ({"shared": []}, "announces 1 tensors, 0 are in shared memory"),
    "space beyond the end": ({"space": [END - 8, 16]}, "are not within"),
    "many times all of it": (
        {"inputs": [["", "FP32", [1, 256]]] * 8, "shared": [[0, END]] * 8},
        "the inputs have 536870912 bytes, more than the limit",
    ),
}


@pytest.mark.parametrize(("fields", "message"), LIES.values(), ids=LIES)
def test_lies_about_places(peer: Peer, fields: dict[str, Any], message: str) -> None:
    peer.send_shared(**fields)
    error = peer.error()
    assert error.code == "INVALID_ARGUMENT"
    assert message in error.message
    peer.send_shared()
    assert isinstance(peer.receive()[0], wire.Result)


def test_frames_beside_the_memory(peer: Peer) -> None:
    peer.send_shared(bytes(1024))
    assert "1 tensor frames came with inputs in shared memory" in peer.error().message
    peer.send_shared(bytes(1024), shared=None, space=[0, 512])
    reply, _ = peer.receive()
    assert isinstance(reply, wire.Result)
    assert reply.shared == (Span(0, 512),)


def test_overlapping_and_crooked_places(peer: Peer, shared: Daemon) -> None:
    x = rows(1)
    peer.memory[3 : 3 + 1024] = x.tobytes()
    with Client(shared.endpoint, timeout=60) as plain:
        expected = plain.predict(x, model="mlp").output
    peer.send_shared(shared=[[3, 1024]], space=[5, 512])  # the outputs go over the inputs
    reply, _ = peer.receive()
    assert isinstance(reply, wire.Result)
    assert reply.shared == (Span(5, 512),)
    assert np.array_equal(np.frombuffer(peer.memory, np.float32, 128, 5), expected[0])


def test_outputs_without_room_come_as_frames(peer: Peer) -> None:
    peer.send_shared(space=[0, 448])
    header, frame = peer.socket.recv_multipart()
    assert wire.decode_reply(header, wire.Limits()).shared is msgspec.UNSET  # type: ignore[union-attr]
    assert len(frame) == 512


def test_memory_that_is_not_shared(shared: Daemon) -> None:
    with Dealer(shared.endpoint) as dealer:
        Peer.send_shared(dealer, space=[0, 512])  # type: ignore[arg-type]
        assert dealer.error().message == "this connection shares no memory with the daemon"


def test_nobody_can_shorten_it(peer: Peer) -> None:
    for length in (0, END + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(peer.descriptor, length)


def test_memory_that_the_daemon_has_not(tmp_path: Path) -> None:
    """A daemon that has served others may have kept as much memory as that, so this one is new."""
    (tmp_path / "tnxd.toml").write_text(PLENTY)
    arguments = ("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx", "--model", "mlp")
    with serving_daemon(tmp_path / "log", *arguments) as daemon, Peer(daemon.endpoint) as peer:
        pid = daemon.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_AS)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * mmap.PAGESIZE + 16 * MIB, before[1]))
        try:
            peer.send_shared(inputs=[["", "FP32", [65536, 256]]], shared=[[0, END]])
            error = peer.error()
        finally:
            resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert error.code == "RESOURCE_EXHAUSTED"
    assert error.message == "there is no memory for a copy of 67108864 bytes"


def test_holes_are_zeros(peer: Peer) -> None:
    peer.memory.madvise(mmap.MADV_REMOVE)
    peer.send_shared(space=[END // 2, 512])
    assert isinstance(peer.receive()[0], wire.Result)


def test_bytes_that_change_change_nothing_but_the_answer(peer: Peer, shared: Daemon) -> None:
    """Lengths of strings are rewritten while the daemon reads them: each request gets its answer or its error."""
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            peer.memory[0:4] = b"\xff\xff\xff\xff"
            peer.memory[0:4] = (1020).to_bytes(4, "little")

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        codes = set()
        for number in range(300):
            peer.send_shared(id=number, model="texts", inputs=[["", "BYTES", [1]]], space=[4096, 2048])
            reply, _ = peer.receive()
            assert reply.id == number
            codes.add(reply.code if isinstance(reply, wire.ErrorReply) else "")
    finally:
        stop.set()
        thread.join()
    assert codes <= {"", "INVALID_ARGUMENT"}


def test_what_runs_cannot_be_changed_any_more(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    (tmp_path / "tnxd.toml").write_text(PLENTY)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    arguments = ("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx", "--model", "wait")
    daemon = run_daemon(*arguments, program=ODD, environment={**os.environ, "RUN_FIFO": str(fifo)})
    x = np.array([[1, 2, 3, 4]], np.float32)
    with Peer(daemon.endpoint) as peer:
        peer.memory[:16] = x.tobytes()
        peer.send_shared(model="wait", inputs=[["", "FP32", [1, 4]]], shared=[[0, 16]], space=[64, 64])
        with fifo.open("wb"):  # which the model waits for, in the middle of its forward
            peer.memory[:16] = bytes(16)
        reply, _ = peer.receive()
        assert isinstance(reply, wire.Result)
        assert reply.shared == (Span(64, 16),), reply
        # Before this peer lets go: then the daemon frees the memory, and it is zeros for whoever still looks.
        assert np.array_equal(np.frombuffer(peer.memory, np.float32, 4, 64), 2 * x[0]), (reply, daemon.log.read_text())


def test_a_second_segment_of_one_connection(peer: Peer) -> None:
    peer.ask("@0")
    assert peer.error().code == "ALREADY_EXISTS"


@pytest.mark.parametrize("address", ["@" + "0" * 20, "/run/dbus", "@../x", "", "@org/x"])
def test_addresses_where_nobody_listens(shared: Daemon, address: str) -> None:
    with Dealer(shared.endpoint) as dealer:
        message = {"type": "share", "v": 1, "id": 99, "address": address, "token": "0" * 16}
        dealer.socket.send(msgspec.msgpack.encode(message))
        assert dealer.error().code in ("FAILED_PRECONDITION", "INVALID_ARGUMENT")
        dealer.health()


LISTENER = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind("")
    listener.listen()
    print(listener.getsockname()[1:].decode(), flush=True)
    connection, _ = listener.accept()
    print(len(connection.recv(100)), flush=True)
"""


def test_the_memory_goes_to_no_other_process(shared: Daemon) -> None:
    with (
        Dealer(shared.endpoint) as dealer,
        subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout is not None
        address = "@" + other.stdout.readline().strip()
        dealer.socket.send(wire.encode(wire.Share(v=1, id=99, address=address, token="0" * 16)))
        assert dealer.error().message == f"another process than this client listens at {address}"
        assert other.stdout.read() == "0\n"


def test_the_end_of_a_connection_is_not_the_end_of_the_memory(shared: Daemon) -> None:
    """Results may be held. But once the lifeline is cut, the memory is free, whoever has the descriptor."""
    await_segments(shared, 0)
    with Peer(shared.endpoint) as peer:
        peer.send_shared(space=[0, 512])
        peer.receive()
        peer.context.destroy(linger=0)
        with Client(shared.endpoint, timeout=60) as tnx:
            tnx.health()
        assert segments(shared.process.pid) == 1
        assert os.fstat(peer.descriptor).st_blocks
        peer.lifeline.close()
        await_segments(shared, 0)
        assert not os.fstat(peer.descriptor).st_blocks


def test_a_cut_lifeline_ends_the_sharing_alone(shared: Daemon) -> None:
    await_segments(shared, 0)
    with Peer(shared.endpoint) as peer:
        peer.lifeline.shutdown(socket.SHUT_RDWR)
        await_segments(shared, 0)
        peer.send_shared()
        assert peer.error().code == "FAILED_PRECONDITION"
        assert peer.health().status


def test_one_client_gets_three_quarters(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    (tmp_path / "tnxd.toml").write_text("[clients]\nshared_memory_mb = 8\n")
    daemon = run_daemon("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx")
    peers = [Peer(daemon.endpoint) for _ in range(3)]
    assert {len(peer.memory) for peer in peers} == {2 * MIB}
    with pytest.raises(
        AssertionError, match=r"RESOURCE_EXHAUSTED.*shares 6291456 bytes of memory, the limit is 6291456"
    ):
        Peer(daemon.endpoint)
    with Client(daemon.endpoint, shared_memory=True, timeout=60) as tnx:
        assert tnx.predict(BIG).output.shape == (256, 128)
        assert not tnx.shares_memory
    peers.pop().__exit__(None, None, None)
    await_segments(daemon, 2)
    with Client(daemon.endpoint, shared_memory=True, timeout=60) as tnx:
        assert settle(tnx).predict(BIG).output.shape == (256, 128)
    for peer in peers:
        peer.__exit__(None, None, None)
    assert daemon.stop(signal.SIGTERM) == 0


class Sharers:
    """The daemon's own part, without the rest of it: this process connects, and shares memory with itself.

    Attributes:
        admission: that counts. memory: all segments, 8 MiB at most, 2 of which a connection gets.
    """

    def __init__(self) -> None:
        self.admission = Admission(Clients(shared_memory_mb=8), max_requests=64, max_bytes=MIB)
        self.memory = SharedMemory(self.admission.max_shared_bytes)

    def share(self) -> socket.socket:
        """Connect, get a segment, and end the connection. Returns the lifeline."""
        address = f"localhost:{os.geteuid()}:{os.getegid()}:{os.getpid()}"
        connection = Connection(b"", -1, self.admission.client(address), address)
        self.admission.connected(connection.client)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind("")
                listener.listen()
                self.memory.share(connection, "@" + listener.getsockname()[1:].decode(), "0" * 16)
                return listener.accept()[0]
        finally:
            self.admission.disconnected(connection.client)


def test_segments_count_for_a_client_that_has_no_connection_any_more() -> None:
    sharers = Sharers()
    lifelines = [sharers.share() for _ in range(3)]
    sharers.admission.sweep()  # forgets who has left
    with pytest.raises(errors.ResourceExhausted, match="shares 6291456 bytes of memory, the limit is 6291456"):
        sharers.share()
    for lifeline in lifelines:
        lifeline.close()
    sharers.memory.release()
    assert not sharers.memory.nbytes
    sharers.admission.sweep()
    assert not [*sharers.admission]


def test_what_was_let_go_is_free_at_once() -> None:
    sharers = Sharers()
    for _ in range(12):
        sharers.share().close()
    sharers.memory.release()
    assert not sharers.memory.nbytes


def test_recordings_have_what_was_served(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    """Inputs change all the time, and are read once: the recording and the answer tell of the same."""
    (tmp_path / "recordings").mkdir(mode=0o700)
    (tmp_path / "tnxd.toml").write_text(f'record_directory = "{tmp_path}/recordings"\n{PLENTY}')
    daemon = run_daemon("--config", str(tmp_path / "tnxd.toml"), "--bind", f"ipc://{tmp_path}/tnx", "--model", "mlp")
    stop = threading.Event()
    outputs = []
    with Client(daemon.endpoint, timeout=60) as tnx, Peer(daemon.endpoint) as peer:
        x: Array = np.frombuffer(peer.memory, np.float32, 256)

        def rewrite() -> None:
            while not stop.is_set():
                x[0] += 1

        tnx.record("one.mcap")
        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            for number in range(50):
                peer.send_shared(id=number, space=[4096, 512])
                assert isinstance(peer.receive()[0], wire.Result)
                outputs.append(peer.memory[4096 : 4096 + 512])
        finally:
            stop.set()
            thread.join()
        tnx.stop_recording()
        with (tmp_path / "recordings/one.mcap").open("rb") as file:
            inputs = [np.frombuffer(each.frames[0], np.float32).reshape(1, 256) for each in RecordingReader(file)]
        assert [tnx.predict(each).output.tobytes() for each in inputs] == outputs


def test_a_client_that_dies_in_the_middle_of_its_request(shared: Daemon) -> None:
    for _ in range(20):
        with Peer(shared.endpoint) as peer:
            x: Array = np.resize(BIG, (1024, 256))
            peer.memory[: x.nbytes] = x.tobytes()
            spec = [["", "FP32", [1024, 256]]]
            peer.send_shared(inputs=spec, shared=[[0, x.nbytes]], space=[x.nbytes, 1024 * 512])
    await_segments(shared, 0)
    with Client(shared.endpoint, timeout=60) as tnx:
        assert tnx.predict(BIG, model="mlp").output.shape == (256, 128)
