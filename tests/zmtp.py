"""A ZeroMQ peer without libzmq: it writes ZMTP 3.1 byte by byte, so that a test can break off at any of them.

https://rfc.zeromq.org/spec/37/ is the specification; the part that a client needs is in docs/protocol.md.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)

MORE, LONG, COMMAND = 1, 2, 4


def frame(body: bytes, *, more: bool = False, command: bool = False, announce: int | None = None) -> bytes:
    """One frame. `announce` puts another length than the body's into its head."""
    size = len(body) if announce is None else announce
    flags = (MORE if more else 0) | (COMMAND if command else 0)
    if size < 256:
        return bytes([flags, size]) + body
    return bytes([flags | LONG]) + struct.pack(">Q", size) + body


def message(*bodies: bytes) -> bytes:
    """A whole multipart message."""
    return b"".join(frame(body, more=i < len(bodies) - 1) for i, body in enumerate(bodies))


class Peer:
    """A DEALER over one connection. Every read ends with `TimeoutError` after `timeout` seconds.

    Args:
        endpoint: tcp://host:port or ipc://path.
        receive_buffer: bytes that the kernel keeps for a peer that does not read; None is the system's default.
    """

    def __init__(self, endpoint: str, *, timeout: float = 60.0, receive_buffer: int | None = None) -> None:
        address = urlsplit(endpoint)
        is_path = address.scheme == "ipc"
        self._socket = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET)
        self._socket.settimeout(timeout)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self._socket.connect(address.path if is_path else (address.hostname, address.port))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def greet(self, identity: bytes | None = None, **claims: bytes) -> Self:
        """Do the whole handshake: greeting and READY, both ways.

        Args:
            identity: a routing id to claim. claims: more properties, with _ for - in their names.
        """
        self.write(GREETING)
        greeting = self._read(64)
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
            raise ConnectionError(f"not a ZMTP 3 greeting: {greeting.hex(' ')}")
        properties = b"\x0bSocket-Type\x00\x00\x00\x06DEALER"
        if identity is not None:
            properties += b"\x08Identity" + struct.pack(">I", len(identity)) + identity
        for name, value in claims.items():
            properties += bytes([len(name)]) + name.replace("_", "-").encode() + struct.pack(">I", len(value)) + value
        self.write(frame(b"\x05READY" + properties, command=True))
        ready, flags = self._read_frame()
        if not flags & COMMAND or not ready.startswith(b"\x05READY"):
            raise ConnectionError(f"expected READY, got {ready!r}")
        return self

    def write(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_message(self) -> list[bytes]:
        """The frames of the next message; answers the other side's PINGs on the way."""
        frames = []
        while True:
            body, flags = self._read_frame()
            if flags & COMMAND:
                if body.startswith(b"\x04PING"):
                    self.write(frame(b"\x04PONG" + body[7:], command=True))
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def read_end(self) -> None:
        """Wait until the other side closes the connection, reading whatever comes before that.

        Raises:
            TimeoutError: it does not.
        """
        try:
            while self._socket.recv(65536):
                pass
        except ConnectionResetError:
            pass

    def close(self) -> None:
        """Hang up in order."""
        self._socket.close()

    def reset(self) -> None:
        """Vanish: an RST instead of an orderly end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _read_frame(self) -> tuple[bytes, int]:
        flags = self._read(1)[0]
        size = struct.unpack(">Q", self._read(8))[0] if flags & LONG else self._read(1)[0]
        return self._read(size), flags

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
            data += part
        return bytes(data)
