"""Reception of HTTP: what comes is written by the kernel to where it is read, a long body to where it stays.

By way of uvicorn and its parser, a body is copied five times, piece by piece, before whoever asked for it has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from tnxctl.protocol.errors import TensorNextError

_SHARED = memoryview(bytearray(64 * 1024))
"""Buffer that all connections of a process read into: event loops ask where to write, have it written and tell of it in
one go, and nothing of it is needed after that."""


class LongBody:
    """Rest of a body of known length, on its way past the parser.

    Args:
        room: of its length.
        hold: counts bytes that have come, of which the memory is used from then on; may refuse them.
        filled: done once all of it is there, or with the error of `hold`.

    Attributes:
        left: bytes to come.
    """

    __slots__ = ("_filled", "_hold", "_room", "left")

    def __init__(self, room: memoryview, hold: Callable[[int], None], filled: asyncio.Future[None]) -> None:
        self._room: memoryview | None = room
        self._hold = hold
        self._filled = filled
        self.left = len(room)

    def next_room(self) -> memoryview:
        """Memory for what comes next."""
        return _SHARED[: self.left] if self._room is None else self._room[-self.left :]

    def add(self, nbytes: int) -> None:
        """Note that so many bytes were written there."""
        self.left -= nbytes
        if self._room is None or self._filled.done():  # whoever waited was cancelled just now
            return
        try:
            self._hold(nbytes)
        except TensorNextError as error:
            self.drop()
            self._filled.set_exception(error)
        else:
            if not self.left:
                self.drop()
                self._filled.set_result(None)

    def drop(self) -> None:
        """Keep nothing of what is still to come: it is read away."""
        self._room = None


class Reading(Protocol):
    """Connection, as far as its `Receiver` knows it. Attributes: long_body: the one that is coming, if any."""

    long_body: LongBody | None

    def connection_made(self, transport: asyncio.Transport, /) -> None: ...
    def data_received(self, data: bytes, /) -> None: ...
    def long_body_received(self, nbytes: int, /) -> None: ...
    def eof_received(self) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None, /) -> None: ...


class Receiver(asyncio.BufferedProtocol):
    """Protocol of a transport: says where to write what comes, and hands on all other events to a connection.

    It is an object of its own since uvloop takes none for a buffered protocol that is another one as well.
    """

    def __init__(self, connection: Reading) -> None:
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connection.connection_made(transport)  # type: ignore[arg-type]  # it reads and writes

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._connection.long_body
        return _SHARED if body is None else body.next_room()

    def buffer_updated(self, nbytes: int) -> None:
        if self._connection.long_body is None:
            self._connection.data_received(_SHARED[:nbytes])  # type: ignore[arg-type]  # the parser takes any buffer
        else:
            self._connection.long_body_received(nbytes)

    def eof_received(self) -> None:
        self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
