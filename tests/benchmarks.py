"""Helpers for the tests of the benchmarks: their modules on the path, a stand-in for the model, the programs run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tnxctl.protocol import wire

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]  # as `python bench/compare.py` has it

import proctree  # noqa: E402
from zmtpsocket import GREETING, READY, frame  # noqa: E402

Array = np.ndarray[Any, Any]

Listen = Callable[[Callable[[socket.socket], None]], int]

SECONDS = 60.0
"""Longest wait of a fake server; nothing takes so long."""


def first_half(array: Array) -> Array:
    """Stands for the model: float32 [N, 256] -> float32 [N, 128]."""
    return np.ascontiguousarray(array[:, :128])


def result_header(id_: int, rows: int = 1) -> bytes:
    return wire.encode(
        wire.Result(
            v=1,
            id=id_,
            model="mlp",
            version="1",
            outputs=(wire.TensorSpec("output", "FP32", (rows, 128)),),
            device="cpu",
            reason="only device",
            batch_size=rows,
            latency_ms=0.1,
            gpu_memory_mb=0.0,
            timing=wire.Timing(1.0, 2.0, 3.0, 0.0, 100.0, 0.0, 4.0, 110.0),
        )
    )


# --- fake servers ------------------------------------------------------------------------------------------------


class Listener:
    """A TCP server: each connection is handed to `talk` in a thread of its own."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._talk = talk
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(SECONDS)
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self._talk(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._accepting.join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def listening() -> Iterator[Listen]:
    """Within the block: start a `Listener`, which gives its port."""
    started: list[Listener] = []

    def start(talk: Callable[[socket.socket], None]) -> int:
        started.append(Listener(talk))
        return started[-1].port

    try:
        yield start
    finally:
        for listener in started:
            listener.close()


def read_request(connection: socket.socket) -> bytes:
    """The body of the next POST; nothing if the other side hung up."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(4096)
        if not part:
            return b""
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /predict HTTP/1.1\r\n")
    assert b"\r\nHost: 127.0.0.1:" in head
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
    while len(body) < length:
        body += connection.recv(4096)
    return body


def http(answer: Callable[[bytes], list[bytes]]) -> Callable[[socket.socket], None]:
    """Talk HTTP: `answer` gives what is sent for a body, piece by piece. Hangs up after an empty list."""

    def talk(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while body := read_request(connection):
            pieces = answer(body)
            if not pieces:
                return
            for piece in pieces:
                connection.sendall(piece)

    return talk


def raw_answer(body: bytes) -> bytes:
    output = first_half(np.frombuffer(body, np.float32).reshape(1, 256)).tobytes()
    return b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-length: %d\r\nX-Last: 1\r\n\r\n" % len(output) + output


def read_message(stream: Any) -> tuple[bytes, bytes]:
    """Header and tensor of the next request; empty at the end."""
    frames = []
    while True:
        flags = stream.read(1)
        if not flags:
            return b"", b""
        size = struct.unpack(">Q", stream.read(8))[0] if flags[0] & 2 else stream.read(1)[0]
        body = stream.read(size)
        if flags[0] & 4:
            assert body == b"\x04PONGmark"
            continue
        frames.append(body)
        if not flags[0] & 1:
            return frames[0], frames[1]


def zmtp(reply: Callable[[socket.socket, bytes, bytes], None]) -> Callable[[socket.socket], None]:
    """Talk ZMTP as a ROUTER does: `reply` is called with each request."""

    def talk(connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            connection.sendall(GREETING + frame(READY.replace(b"DEALER", b"ROUTER"), 4))
            stream.read(len(GREETING))
            stream.read(2 + len(READY))
            while True:
                header, tensor = read_message(stream)
                if not header:
                    return
                reply(connection, header, tensor)

    return talk


def answer_of(header: bytes, tensor: bytes) -> bytes:
    request = wire.decode_request(header, wire.Limits())
    output = first_half(np.frombuffer(tensor, np.float32).reshape(1, 256)).tobytes()
    return frame(result_header(request.id), 1) + frame(output)


# --- programs ----------------------------------------------------------------------------------------------------


def run(program: str, *arguments: str, seconds: float = 50) -> str:
    """Run a program of `bench/` to its end, which must be good. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCH / program), *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def refusal(program: click.Command, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of a command line that makes no sense."""
    done = CliRunner().invoke(program, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def check_that_it_stops_what_it_started(
    program: str,
    *arguments: str,
    number: signal.Signals,
    children: int,
    lengths: tuple[str, ...] = ("--rounds", "1000", "--seconds", "0.1"),
) -> None:
    """Signal a program of `bench/` once it measures, when it has so many servers and clients.

    Args:
        lengths: options with which it does not end by itself.
    """
    restore: Callable[[], Any] = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        [sys.executable, str(BENCH / program), *lengths, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,  # shells start background jobs with SIGINT ignored
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline()  # its heading: everything runs
        started = set(proctree.members(bench.pid)) - {bench.pid}
        assert len(started) == children
        bench.send_signal(number)
        _, stderr = bench.communicate(timeout=60)
    assert bench.returncode not in (0, -number)
    assert "Traceback" not in stderr
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
