"""ZMTP 3, the protocol of ZeroMQ: the side of a DEALER, by the mechanism NULL, as bytes that come and go. No socket.

https://rfc.zeromq.org/spec/37/ is the protocol. What is told of a handshake are the numbers of libzmq's monitors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import zmq

from tnxctl.channels.channel import MISMATCH, Event

_MORE, _LONG, _COMMAND = 1, 2, 4
_FLAGS = _MORE | _LONG | _COMMAND

_SHORT_HEAD, _LONG_HEAD = 2, 9
_MAX_SHORT = 255
_pack_long = struct.Struct(">BQ").pack

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = b"\x03\x01"
_MECHANISM = b"NULL".ljust(20, b"\0")
_REST_BYTES = 32  # as-server, and filler
_GREETING_BYTES = 64
_READY = b"\x05READY"
_ERROR = b"\x05ERROR"
_PING, _PONG = b"\x04PING", b"\x04PONG"
_TTL_BYTES = 2  # of a PING, before what a PONG gives back
_MAX_CONTEXT = 16  # which is so much at most
_PARTNERS = (b"ROUTER", b"DEALER", b"REP")  # of a DEALER

_NOT_ZMTP = int(zmq.PROTOCOL_ERROR_ZMTP_UNSPECIFIED)

BUFFER_BYTES = 64 * 1024
"""Bytes read at a time. A frame that has more goes straight to where it stays."""


class ProtocolError(Exception):
    """The other side does not speak ZMTP, or not so. Attributes: event: what to tell of it."""

    def __init__(self, event: int, value: int) -> None:
        super().__init__(f"event {event}, value {value}")
        self.event: Event = (int(event), value)


class Handshake:
    """Handshake of a DEALER without keys.

    The mechanism of the other side is waited for before this one is told. A listener that asks for keys would end the
    connection at once, often before it has said that it does.

    Attributes:
        is_done: whether messages may go.
    """

    first = _SIGNATURE + _VERSION
    """Bytes that this side says unasked."""

    def __init__(self) -> None:
        self.is_done = False
        self._received = b""
        self._has_greeted = False

    def take(self, part: bytes) -> tuple[bytes, bytes]:
        """Take what came. Returns what is to be sent, and what is left of the part once the handshake is done.

        Raises:
            ProtocolError: it is no handshake, or one that lets nobody in.
        """
        self._received += part
        answer = b""
        if not self._has_greeted:
            if self._is_other(self._received):
                raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, _NOT_ZMTP)
            if len(self._received) < _GREETING_BYTES:
                return b"", b""
            greeting, self._received = self._received[:_GREETING_BYTES], self._received[_GREETING_BYTES:]
            if greeting[12:32] != _MECHANISM:
                raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH)
            self._has_greeted = True
            answer = _MECHANISM + bytes(_REST_BYTES) + _frame(_ready(), _COMMAND)
        received = self._received
        if len(received) < _SHORT_HEAD:
            return answer, b""
        if received[0] == _COMMAND:
            start, size = _SHORT_HEAD, received[1]
        elif received[0] == _COMMAND | _LONG:
            if len(received) < _LONG_HEAD:
                return answer, b""
            start, size = _LONG_HEAD, int.from_bytes(received[1:_LONG_HEAD], "big")
        else:
            raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, _NOT_ZMTP)
        if size > BUFFER_BYTES:
            raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, _NOT_ZMTP)
        if len(received) < start + size:
            return answer, b""
        self._command(received[start : start + size])
        self.is_done = True
        self._received = b""
        return answer, received[start + size :]

    @staticmethod
    def _is_other(greeting: bytes) -> bool:
        """Whether a greeting, as far as it has come, is that of another protocol or of an older version."""
        signature, version = greeting[: len(_SIGNATURE)], greeting[len(_SIGNATURE) : len(_SIGNATURE) + 1]
        return (
            signature[:1] != _SIGNATURE[:1]
            or (len(signature) == len(_SIGNATURE) and signature[-1] & 1 == 0)
            or (version != b"" and version < _VERSION[:1])
        )

    def _command(self, body: bytes) -> None:
        if body.startswith(_READY) and _socket_type(body[len(_READY) :]) in _PARTNERS:
            return
        reason = body[len(_ERROR) + 1 :]
        if body.startswith(_ERROR) and len(reason) == 3 and reason.isdigit():
            raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_AUTH, int(reason))
        raise ProtocolError(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, _NOT_ZMTP)


def _ready() -> bytes:
    name, value = b"Socket-Type", b"DEALER"
    return b"".join((_READY, bytes((len(name),)), name, struct.pack(">I", len(value)), value))


def _socket_type(properties: bytes) -> bytes | None:
    """The socket type among the properties of a READY, which are names and values; None: it is not told."""
    while properties:
        name_end = 1 + properties[0]
        name, value_start = properties[1:name_end].lower(), name_end + 4
        value_end = value_start + int.from_bytes(properties[name_end:value_start], "big")
        if value_end > len(properties):
            return None
        if name == b"socket-type":
            return properties[value_start:value_end]
        properties = properties[value_end:]
    return None


def _frame(body: bytes, flags: int) -> bytes:
    return _head(len(body), flags) + body


def _head(size: int, flags: int) -> bytes:
    return bytes((flags, size)) if size <= _MAX_SHORT else _pack_long(flags | _LONG, size)


def parts_of(frames: Sequence[Any]) -> list[bytes | memoryview]:
    """A message as buffers, one behind the other: the heads of its frames and what they hold, which is not copied."""
    parts: list[bytes | memoryview] = []
    last = len(frames) - 1
    for place, frame in enumerate(frames):
        held: bytes | memoryview
        if type(frame) is bytes:
            held, size = frame, len(frame)
        else:
            held = memoryview(frame)  # which also keeps a bytearray from getting another size than the head tells
            size = held.nbytes
        parts.append(_head(size, _MORE if place < last else 0))
        if size:
            parts.append(held)
    return parts


class Inbox:
    """Bytes of a connection, taken apart into messages.

    Args:
        max_frame_bytes: most bytes that a frame may have.
        max_frames: most frames of a message that are kept.

    Attributes:
        pongs: what is to be sent, since the other side asked for it.
    """

    def __init__(self, max_frame_bytes: int, max_frames: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._max_frames = max_frames
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what is in the buffer and was not looked at
        self._frames: list[Any] = []  # of a message that is not whole
        self._long: memoryview | None = None  # a frame that goes where it stays
        self._long_end = 0
        self._long_flags = 0
        self._whole: list[Any] | None = None  # a message that ended with a long frame
        self.pongs = b""

    @property
    def is_in_long_frame(self) -> bool:
        """Whether more of a frame is to come that goes where it stays."""
        return self._long is not None

    def space(self) -> memoryview:
        """Where the next bytes go. Never empty, if `take` has given all messages away."""
        if self._long is not None:
            return self._long[self._long_end :]
        return self._view[self._end :]

    def filled(self, nbytes: int) -> None:
        """Note that so many bytes are in `space` now."""
        if self._long is None:
            self._end += nbytes
            return
        self._long_end += nbytes
        if self._long_end == len(self._long):
            frame, self._long = self._long, None
            if self._long_flags & _COMMAND:
                return
            if len(self._frames) < self._max_frames:
                self._frames.append(frame if self._frames else bytes(frame))
            if not self._long_flags & _MORE:
                self._whole, self._frames = self._frames, []

    def put(self, received: bytes) -> None:
        """Add bytes that were read otherwise, `BUFFER_BYTES` at most, while nothing is in here."""
        self._view[: len(received)] = received
        self._start, self._end = 0, len(received)

    def take(self) -> list[Any] | None:
        """The frames of the next message, if it is whole: the first as bytes, the others as memory that can be written.

        Raises:
            ProtocolError: the other side has sent what is no frame, or one that is too long.
        """
        if self._whole is not None:
            whole, self._whole = self._whole, None
            return whole
        if self._long is not None:
            return None
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        while end - start >= _SHORT_HEAD:
            flags = buffer[start]
            if flags & _LONG:
                body = start + _LONG_HEAD
                if body > end:
                    break
                size = int.from_bytes(view[start + 1 : body], "big")
            else:
                body = start + _SHORT_HEAD
                size = buffer[start + 1]
            if flags & ~_FLAGS or size > self._max_frame_bytes:
                raise ProtocolError(zmq.Event.DISCONNECTED, 0)
            stop = body + size
            if stop > end:
                if size > BUFFER_BYTES - _LONG_HEAD:
                    self._begin_long(size, flags, view[body:end])
                    start = end
                break
            start = stop
            if flags & _COMMAND:
                self._command(view[body:stop])
                continue
            frames = self._frames
            if not frames:
                frames.append(bytes(view[body:stop]))
            elif len(frames) < self._max_frames:
                frames.append(bytearray(view[body:stop]))
            if not flags & _MORE:
                self._start = start
                self._frames = []
                return frames
        left = end - start
        if left and start:  # what follows needs the room
            view[:left] = bytes(view[start:end])
        self._start, self._end = 0, left
        return None

    def _begin_long(self, size: int, flags: int, first: memoryview) -> None:
        import numpy  # late: it takes long to import, and who gets such frames needs it anyway

        self._long = numpy.empty(size, numpy.uint8).data  # unlike a bytearray, not cleared first
        self._long[: len(first)] = first
        self._long_end = len(first)
        self._long_flags = flags

    def _command(self, body: memoryview) -> None:
        if body[: len(_PING)] == _PING:
            start = len(_PING) + _TTL_BYTES
            self.pongs += _frame(_PONG + bytes(body[start : start + _MAX_CONTEXT]), _COMMAND)
