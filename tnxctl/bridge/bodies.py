"""Bodies of requests: read into one buffer, within limits of size, and of memory for all together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import numpy as np

from tnxctl.bridge.http import Buffer, HttpError
from tnxctl.bridge.settings import HttpLimits
from tnxctl.protocol.errors import Unavailable
from tnxctl.protocol.limits import MIB

_LONG_BYTES = 64 * 1024  # that are still to come: from here on it pays to have them written to where they stay


class Connection(Protocol):
    """Connection that a body comes by."""

    async def fill(self, room: memoryview, hold: Callable[[int], None], /) -> None:
        """Have the rest of the body written there, and count it as it comes. Raises Unavailable if `hold` does."""
        ...


class ClientGone(Exception):
    """The client has gone before its request was complete: nobody is there to be answered."""


_LARGE_BYTES = 64 * MIB  # held at once, after which it pays to give memory back


class Budget:
    """Memory of all requests that are being read or answered.

    Args:
        most_bytes: of all together.
        on_quiet: called when none is held any more, and it was much.

    Attributes:
        held_bytes: of all together, now.
    """

    def __init__(self, most_bytes: int, on_quiet: Callable[[], None] = lambda: None) -> None:
        self._most_bytes = most_bytes
        self._on_quiet = on_quiet
        self._was_large = False
        self.held_bytes = 0

    def hold(self, nbytes: int) -> None:
        """Count bytes of a request. Raises Unavailable if they are too many with all others."""
        if self.held_bytes + nbytes > self._most_bytes:
            why = f"the bodies of the requests under way fill the {self._most_bytes} bytes that they may have together"
            raise Unavailable(why, retry_after_s=1.0)
        self.held_bytes += nbytes
        if self.held_bytes >= _LARGE_BYTES:
            self._was_large = True

    def release(self, nbytes: int) -> None:
        """Count bytes no more."""
        self.held_bytes -= nbytes
        if self._was_large and not self.held_bytes:
            self._was_large = False
            self._on_quiet()


class BodyReader:
    """Reader of the body of one request. It holds what has come: a length that is only claimed costs nothing.

    Args:
        receive: of ASGI.
        connection: that it comes by, if it can write a body to where it stays.

    Attributes:
        complete: whether all of it has come.
    """

    __slots__ = ("_budget", "_came", "_connection", "_headers", "_held_bytes", "_limits", "_receive", "complete")

    def __init__(
        self,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        headers: Mapping[bytes, str],
        limits: HttpLimits,
        budget: Budget,
        connection: Connection | None,
    ) -> None:
        self._receive = receive
        self._headers = headers
        self._limits = limits
        self._budget = budget
        self._connection = connection
        self._held_bytes = 0
        self._came = 0  # bytes of the body
        self.complete = b"content-length" not in headers and b"transfer-encoding" not in headers

    async def read(self) -> Buffer:
        """The body, in one buffer.

        Raises:
            HttpError: it is longer than it may be (413).
            Unavailable: there is no memory for it now.
            ClientGone: it ends too early; one that is too slow, `Connection` ends.
        """
        if self.complete:
            return b""
        length = int(self._headers.get(b"content-length", 0))  # the parser takes digits alone
        if length > self._limits.body_bytes:
            raise self._too_long(length)
        part, more = await self._next()
        if not more:
            return part
        if self._connection is not None and length - len(part) >= _LONG_BYTES:
            return await self._fill(part, length, self._connection)
        body = bytearray(part)
        while more:
            part, more = await self._next()
            body += part
        return body

    async def _fill(self, first: bytes, length: int, connection: Connection) -> Buffer:
        """The body that begins like this, the rest of it written by the kernel."""
        try:
            body = np.empty(length, np.uint8).data  # of which the system gives no page before it is written to
        except MemoryError:
            raise Unavailable(f"there is no memory for a body of {length} bytes", retry_after_s=1.0) from None
        body[: len(first)] = first
        await connection.fill(body[len(first) :], self.hold)
        self.complete = True
        return body

    def release(self) -> None:
        """Hold the memory no more."""
        self._budget.release(self._held_bytes)
        self._held_bytes = 0

    async def _next(self) -> tuple[bytes, bool]:
        """A part, which is held from now on, and whether there is more. Raises as `read` does."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, more = message["body"], message["more_body"]
        self.complete = not more
        self._came += len(part)
        if self._came > self._limits.body_bytes:  # it comes in chunks, and does not say how many
            raise self._too_long(self._came)
        self.hold(len(part))
        return part, more

    def hold(self, nbytes: int) -> None:
        """Count further bytes until `release`. Raises Unavailable, as `Budget.hold` does."""
        self._budget.hold(nbytes)
        self._held_bytes += nbytes

    def _too_long(self, length: int) -> HttpError:
        return HttpError(413, f"the body has {length} bytes or more, and may have {self._limits.body_bytes}")
