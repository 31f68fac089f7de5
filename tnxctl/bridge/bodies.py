"""Bodies of requests: read into one buffer, within limits of size, and of memory for all together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tnxctl.bridge.http import Buffer, HttpError
from tnxctl.bridge.settings import HttpLimits
from tnxctl.protocol.errors import Unavailable


class ClientGone(Exception):
    """The client has gone before its request was complete: nobody is there to be answered."""


class Budget:
    """Memory of all requests that are being read or answered. Args: most_bytes: of all together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0

    def hold(self, nbytes: int) -> None:
        """Count bytes of a request. Raises Unavailable if they are too many with all others."""
        if self._held_bytes + nbytes > self._most_bytes:
            why = f"the bodies of the requests under way fill the {self._most_bytes} bytes that they may have together"
            raise Unavailable(why, retry_after_s=1.0)
        self._held_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Count bytes no more."""
        self._held_bytes -= nbytes


class BodyReader:
    """Reader of the body of one request.

    Args:
        receive: of ASGI.

    Attributes:
        complete: whether all of it has come.
    """

    __slots__ = ("_budget", "_headers", "_held_bytes", "_limits", "_receive", "complete")

    def __init__(
        self,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        headers: Mapping[bytes, str],
        limits: HttpLimits,
        budget: Budget,
    ) -> None:
        self._receive = receive
        self._headers = headers
        self._limits = limits
        self._budget = budget
        self._held_bytes = 0
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
        self.hold(length)
        part, more = await self._next()
        if not more:
            if len(part) > self._limits.body_bytes:
                raise self._too_long(len(part))
            return part
        buffer = bytearray(length)
        filled = 0
        while True:
            end = filled + len(part)
            if not length:  # it comes in chunks, of which nobody knows how many
                if end > self._limits.body_bytes:
                    raise self._too_long(end)
                self.hold(len(part))
            buffer[filled:end] = part
            filled = end
            if not more:
                return buffer
            part, more = await self._next()

    def release(self) -> None:
        """Hold the memory no more."""
        self._budget.release(self._held_bytes)
        self._held_bytes = 0

    async def _next(self) -> tuple[bytes, bool]:
        """A part, and whether there is more."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.complete = not message["more_body"]
        return message["body"], message["more_body"]

    def hold(self, nbytes: int) -> None:
        """Count further bytes until `release`. Raises Unavailable, as `Budget.hold` does."""
        self._budget.hold(nbytes)
        self._held_bytes += nbytes

    def _too_long(self, length: int) -> HttpError:
        return HttpError(413, f"the body has {length} bytes or more, and may have {self._limits.body_bytes}")
