"""Application of the bridge, in ASGI: reads a body within limits, has a handler answer, and sends what it answers.

https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import Buffer, HttpError, Request, Response, error_response
from tnxctl.bridge.statuses import response_of
from tnxctl.protocol.errors import TensorNextError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_CLOSE = (b"connection", b"close")
_DISCARDED = 64 * 1024  # a body that nobody wants is read all the same up to this, so that the connection stays useful

_log = logging.getLogger("tnxctl.bridge")


class ClientGone(Exception):
    """The client has gone before its request was complete: nobody is there to be answered."""


class App:
    """ASGI application of one worker.

    The server cancels the task of a request whose client has gone, which withdraws it at the daemon.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._limits = bridge.settings.limits
        self._held_bytes = 0  # of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"the bridge speaks HTTP alone, not {scope['type']}")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        reader = _BodyReader(self, receive, headers)
        try:
            response = await self._answer(scope, headers, reader)
            if not reader.complete and not await reader.discard():
                response.headers = (*response.headers, _CLOSE)
        except ClientGone:
            return
        finally:
            self._held_bytes -= reader.held_bytes
        await _send(send, response)

    async def _answer(self, scope: Scope, headers: Mapping[bytes, str], reader: _BodyReader) -> Response:
        try:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            path = scope["raw_path"].decode("ascii")
            route, params = self._bridge.routes.match(method, path)
            client = scope["client"]
            body = await reader.read()
            request = Request(
                method,
                path,
                params,
                scope["query_string"].decode("latin-1"),
                headers,
                body,
                f"{client[0]}:{client[1]}" if client else "",
            )
            return await route.handler(self._bridge, request)
        except HttpError as error:
            return error_response(error.status, error.message, error.headers)
        except TensorNextError as error:
            return response_of(error)
        except ClientGone:
            raise
        except Exception:
            _log.exception("a handler failed")
            return error_response(500, "the bridge failed; its log says how")

    def hold(self, nbytes: int) -> None:
        """Count bytes of a body as held. Raises HttpError if they are too many together with all others."""
        if self._held_bytes + nbytes > self._limits.bodies_bytes:
            raise HttpError(
                503,
                f"the bodies of all requests under way have more than {self._limits.bodies_bytes} bytes",
                ((b"retry-after", b"1"),),
            )
        self._held_bytes += nbytes


class _BodyReader:
    """Reads the body of one request.

    Attributes:
        complete: whether all of it has come.
        held_bytes: counted as held by the application.
    """

    __slots__ = ("_app", "_headers", "_limits", "_receive", "complete", "held_bytes")

    def __init__(self, app: App, receive: Receive, headers: Mapping[bytes, str]) -> None:
        self._app = app
        self._receive = receive
        self._headers = headers
        self._limits = app._limits
        self.complete = False
        self.held_bytes = 0

    async def read(self) -> Buffer:
        """The body, in one buffer.

        Raises:
            HttpError: it is longer than it may be (413), or too slow (408).
            ClientGone: it ends too early.
        """
        declared = self._headers.get(b"content-length")
        length = 0 if declared is None else int(declared)  # the parser has seen to it that it is a number
        if length > self._limits.body_bytes:
            raise self._too_long(length)
        self._hold(length)
        if declared is None and b"transfer-encoding" not in self._headers:
            self.complete = True
            return b""
        message = await self._message_within(self._limits.body_timeout_s)
        body: bytes = message["body"]
        if not message["more_body"]:
            self.complete = True
            return body
        return await self._gather(body, length)

    async def _gather(self, first: bytes, length: int) -> Buffer:
        """The rest: into one buffer of the right size, or, if that is not known, into one that grows."""
        loop = asyncio.get_running_loop()
        limits = self._limits
        began = loop.time()
        buffer = bytearray(length)
        buffer[: len(first)] = first
        filled = len(first)
        try:
            async with asyncio.timeout_at(began + limits.body_timeout_s) as timeout:
                more = True
                while more:
                    timeout.reschedule(began + limits.body_timeout_s + filled / limits.body_rate)
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part, more = message["body"], message["more_body"]
                    end = filled + len(part)
                    if end > len(buffer) or not length:
                        if end > limits.body_bytes:
                            raise self._too_long(end)
                        self._hold(len(part))
                    buffer[filled:end] = part
                    filled = end
        except TimeoutError:
            raise self._too_slow() from None
        self.complete = True
        return buffer

    async def discard(self) -> bool:
        """Read a short rest that nobody wants. False: it is not short, or does not come."""
        if b"expect" in self._headers or b"transfer-encoding" in self._headers:
            return False
        if int(self._headers.get(b"content-length", 0)) > _DISCARDED:
            return False
        try:
            while not self.complete:
                self.complete = not (await self._message_within(1.0))["more_body"]
        except HttpError:
            return False
        return True

    async def _message_within(self, seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                message = await self._receive()
        except TimeoutError:
            raise self._too_slow() from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message

    def _hold(self, nbytes: int) -> None:
        self._app.hold(nbytes)
        self.held_bytes += nbytes

    def _too_long(self, length: int) -> HttpError:
        return HttpError(413, f"the body has {length} bytes or more, and may have {self._limits.body_bytes}")

    def _too_slow(self) -> HttpError:
        return HttpError(408, "the body did not come in time")


async def _send(send: Send, response: Response) -> None:
    chunks = response.chunks
    length = sum(map(len, chunks))
    headers = [*response.headers, (b"content-length", b"%d" % length)]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if not chunks:
        await send({"type": "http.response.body"})
        return
    last = len(chunks) - 1
    for place, chunk in enumerate(chunks):
        await send({"type": "http.response.body", "body": chunk, "more_body": place < last})
