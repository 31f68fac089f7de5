"""A load generator that writes ZMTP to a TCP socket itself: what wrk is for HTTP, as near as Python comes to it.

A DEALER of libzmq hands every message to a thread of its own and back, which wakes two threads more per round trip and
takes about as much CPU time as a small server does. Here there is one thread and one socket; answers that come together
are read together, and the requests that they set off leave together. https://rfc.zeromq.org/spec/37/ is the protocol.
"""

from __future__ import annotations

import gc
import socket
import struct
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from loadgen import PATIENCE_SECONDS, Recording
from processes import BenchError
from workload import Workload

_MORE, _LONG, _COMMAND = 1, 2, 4

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"

_READ_BYTES = 1 << 18


def frame(body: bytes, flags: int = 0) -> bytes:
    """One frame: its head and its body."""
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | _LONG]) + struct.pack(">Q", len(body)) + body


HELLO = GREETING + frame(READY, _COMMAND)
"""All that a peer says before its first message. It need not wait for the other side in between."""


class ZmtpConnection:
    """A DEALER over one TCP connection that sends the requests of a workload in turn, numbered from 0.

    Args:
        endpoint: tcp://HOST:PORT.

    Raises:
        BenchError: nobody there speaks ZMTP 3.
    """

    def __init__(self, endpoint: str, workload: Workload) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._buffer = b""
        address = urlsplit(endpoint)
        assert address.hostname is not None
        assert address.port is not None
        try:
            self._socket = socket.create_connection((address.hostname, address.port), PATIENCE_SECONDS)
        except OSError as error:
            raise BenchError(f"{endpoint}: {error}") from None
        self.sent = 0
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(HELLO)
            while len(self._buffer) < len(GREETING):
                self._read()
            if self._buffer[0] != 0xFF or self._buffer[10] < 3:
                raise BenchError(f"{endpoint} does not speak ZMTP 3")
            self._buffer = self._buffer[len(GREETING) :]
            while len(self._buffer) < 2 or len(self._buffer) < 2 + self._buffer[1]:
                self._read()  # READY: what comes before it is no message to a server that asks who its peers are
            self._buffer = self._buffer[2 + self._buffer[1] :]
        except BaseException:
            self._socket.close()
            raise

    def closed_loop(self, outstanding: int, seconds: float) -> Recording:
        """Keep so many requests in flight for so long.

        Raises:
            BenchError: the server hung up or stopped answering.
        """
        clock, request = time.perf_counter_ns, self._workload.request
        recording = Recording(self.sent)
        sent, answers, tensors = recording.sent_ns, recording.answers, recording.tensors
        recording.due_ns = sent
        gc.disable()
        try:
            begin = clock()
            end = begin + int(seconds * 1e9)
            wanted = outstanding
            while True:
                if wanted:
                    leaving: list[bytes] = []
                    for _ in range(wanted):
                        header, tensor = request(self.sent)
                        self.sent += 1
                        leaving += (frame(header, _MORE), frame(tensor))
                    sent += [clock()] * wanted
                    self._socket.sendall(b"".join(leaving))
                if len(answers) >= len(sent):
                    break
                self._read()
                now = clock()
                arrived = self._messages()
                for header, tensor in arrived:
                    answers.append((now, header))
                    tensors.append(tensor)
                wanted = len(arrived) if now < end else 0
        except OSError as error:
            raise BenchError(f"{self._endpoint}: {error}") from None
        finally:
            gc.enable()
        recording.seconds = (answers[-1][0] - begin) / 1e9
        return recording

    def _read(self) -> None:
        try:
            part = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            raise BenchError(f"{self._endpoint} has not answered for {PATIENCE_SECONDS:g} s") from None
        if not part:
            raise BenchError(f"{self._endpoint} closed the connection")
        self._buffer += part

    def _messages(self) -> list[tuple[bytes, bytes]]:
        """Take the whole messages out of what has been read: header and tensor, empty if there is none."""
        buffer, size = self._buffer, len(self._buffer)
        found: list[tuple[bytes, bytes]] = []
        at = taken = 0
        frames: list[bytes] = []
        while size - at >= 2:
            flags = buffer[at]
            if flags & _LONG:
                if size - at < 9:
                    break
                start = at + 9
                stop = start + int.from_bytes(buffer[at + 1 : start], "big")
            else:
                start = at + 2
                stop = start + buffer[at + 1]
            if stop > size:
                break
            body = buffer[start:stop]
            at = stop
            if flags & _COMMAND:
                self._obey(body)
            else:
                frames.append(body)
                if flags & _MORE:
                    continue
                found.append((frames[0], frames[1] if len(frames) > 1 else b""))
                frames = []
            taken = at
        self._buffer = buffer[taken:]
        return found

    def _obey(self, command: bytes) -> None:
        if command.startswith(b"\x04PING"):
            self._socket.sendall(frame(b"\x04PONG" + command[7:], _COMMAND))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
