"""ZMTP on a plain TCP socket: the handshake of a DEALER, frames made and messages taken apart.

https://rfc.zeromq.org/spec/37/ is the protocol.
"""

from __future__ import annotations

import socket
import struct
from urllib.parse import urlsplit

from loadgen import PATIENCE_SECONDS
from processes import BenchError

MORE = 1
_LONG, _COMMAND = 2, 4

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"

_PING, _PONG = b"\x04PING", b"\x04PONG"
_TTL_BYTES = 2  # of a PING, before what a PONG gives back

READ_BYTES = 1 << 18


def frame(body: bytes, flags: int = 0) -> bytes:
    """One frame: its head and its body."""
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | _LONG]) + struct.pack(">Q", len(body)) + body


HELLO = GREETING + frame(READY, _COMMAND)
"""All that a peer says before its first message. It need not wait for the other side in between."""


def connect(endpoint: str) -> tuple[socket.socket, bytes]:
    """A socket that has shaken hands, and what came after that. It blocks, up to PATIENCE_SECONDS.

    Args:
        endpoint: tcp://HOST:PORT.

    Raises:
        BenchError: nobody there speaks ZMTP 3.
    """
    address = urlsplit(endpoint)
    assert address.hostname is not None
    assert address.port is not None
    try:
        found = socket.create_connection((address.hostname, address.port), PATIENCE_SECONDS)
    except OSError as error:
        raise BenchError(f"{endpoint}: {error}") from None
    try:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.sendall(HELLO)
        received = b""
        while len(received) < len(GREETING):
            received += read(found, endpoint)
        if received[0] != 0xFF or received[10] < 3:
            raise BenchError(f"{endpoint} does not speak ZMTP 3")
        received = received[len(GREETING) :]
        while len(received) < 2 or len(received) < 2 + received[1]:
            received += read(found, endpoint)  # READY: a server that asks who its peers are takes no message before it
        return found, received[2 + received[1] :]
    except OSError as error:
        found.close()
        raise BenchError(f"{endpoint}: {error}") from None
    except BaseException:
        found.close()
        raise


def read(connection: socket.socket, endpoint: str) -> bytes:
    """The next bytes of a socket that blocks.

    Raises:
        BenchError: the server hung up or says nothing.
    """
    try:
        part = connection.recv(READ_BYTES)
    except TimeoutError:
        raise BenchError(f"{endpoint} has not answered for {PATIENCE_SECONDS:g} s") from None
    if not part:
        raise BenchError(f"{endpoint} closed the connection")
    return part


class Messages:
    """Messages that are put together from what is read of one connection.

    Attributes:
        pongs: what is to be sent, since the other side asked for it.
    """

    def __init__(self, received: bytes = b"") -> None:
        self._buffer = received
        self.pongs = b""

    def take(self, part: bytes) -> list[tuple[bytes, bytes]]:
        """The messages that are whole with this part: header and tensor, empty if there is none."""
        buffer = self._buffer = self._buffer + part if self._buffer else part
        size = len(buffer)
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
                if body.startswith(_PING):
                    self.pongs += frame(_PONG + body[len(_PING) + _TTL_BYTES :], _COMMAND)
            else:
                frames.append(body)
                if flags & MORE:
                    continue
                found.append((frames[0], frames[1] if len(frames) > 1 else b""))
                frames = []
            taken = at
        self._buffer = buffer[taken:]
        return found
