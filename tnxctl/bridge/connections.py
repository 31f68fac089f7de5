"""Connections of HTTP: those of uvicorn, within limits of size and time. One that breaks withdraws what it asked for.

uvicorn bounds neither a request line and its headers, nor the time that they take, nor how many requests may wait on
one connection. It answers what is no HTTP at once, before the responses that are due. A client that goes away is told
to whoever asks, at the cost of a task for each request. A body passes through its hands piece by piece. All that is
different here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tnxctl.bridge.receiving import LongBody, Receiver
from tnxctl.bridge.settings import HttpLimits

_LONG_BYTES = 16 * 1024  # of a body: from here on a copy costs more than a system call

_MOST_WAITING = 64
"""Most requests that may wait on a connection for the response to another."""


class _Joining:
    """Transport that sends the head of a response together with a short body: one system call, one packet."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.abort = transport.abort

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep what looks like the head of a response for the next call."""
        if self._head:
            head, self._head = self._head, b""
            if len(data) > _LONG_BYTES:
                self._transport.write(head)
            else:
                data = head + data
        elif data[:9] == b"HTTP/1.1 " and data[9:12] != b"100":
            self._head = bytes(data)
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Send what was kept."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Send what was kept, and close."""
        if not self._transport.is_closing():
            self.flush()
        self._transport.close()


class Config(uvicorn.Config):
    """Configuration of uvicorn. Attributes: http_limits: of its connections."""

    http_limits: HttpLimits


class Connection(HttpToolsProtocol):
    """One connection.

    Attributes:
        task: of the request that is being answered, for `connection_lost` to cancel; set by the application.
        gone: whether the connection is no more.
        long_body: the one that is written past the parser, if any.
    """

    config: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task: asyncio.Task[Any] | None = None
        self.gone = False
        self.long_body: LongBody | None = None
        self._limits = self.config.http_limits
        self._due: deque[RequestResponseCycle] = deque()  # requests without a whole response, the oldest first
        self._messages = 0
        self._between = True  # from the end of a request to the end of the next one's headers
        self._header_bytes = 0
        self._body_bytes = 0
        self._body_began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._abort: asyncio.TimerHandle | None = None
        self._fault: tuple[int, str] | None = None  # what ends the connection, once all that came before is answered
        self._why = ""

    # --- events of the connection ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.transport = self._joining = _Joining(transport)  # type: ignore[assignment]  # as far as uvicorn uses it
        if len(self.connections) > self._limits.connections:
            self._fail(503, f"the bridge has {self._limits.connections} connections already")
        else:
            self._set_timer(self._limits.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        messages = self._messages
        super().data_received(data)
        if self._fault is not None or self.transport.is_closing():
            return
        if not self._between:
            self._body_bytes += len(data)
            if self._timer is None:
                self._body_began = self.loop.time()
                self._set_timer(self._limits.body_timeout_s)
            return
        if self._messages == messages:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.header_bytes:
                self._fail(431, f"the headers have more than {self._limits.header_bytes} bytes")
                return
        if self._due or self._timer is None or self._messages != messages:
            self._await_headers()

    async def fill(self, room: memoryview, hold: Callable[[int], None]) -> None:
        """Have the rest of the body that is under way written there. It has that length, and none of it has come.

        Args:
            hold: counts bytes that have come; may raise Unavailable, which is raised here.
        """
        filled: asyncio.Future[None] = self.loop.create_future()
        self.long_body = body = LongBody(room, hold, filled)
        try:
            await filled
        finally:
            body.drop()

    def long_body_received(self, nbytes: int) -> None:
        """Note that so many bytes of the long body have been written."""
        body = self.long_body
        if body is None or self._fault is not None:
            return
        self._unset_keepalive_if_required()
        self._body_bytes += nbytes
        body.add(nbytes)
        if body.left:
            return
        self.long_body = None
        self.parser = httptools.HttpRequestParser(self)  # the old one waits for bytes that it has not seen
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.on_message_complete()
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        super().connection_lost(exc)
        self._cancel_timer()
        if self._abort is not None:
            self._abort.cancel()
        for cycle in self._due:
            cycle.disconnected = True
        self.pipeline.clear()
        if self.task is not None:
            self.task.cancel()

    async def drained(self) -> None:
        """Wait until the client has read nearly all that was sent, or the connection is no more."""
        if self.flow.write_paused:
            await self.flow.drain()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_after(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._abort is not None:
            self._abort.cancel()
            self._abort = None

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that has been idle for long."""
        self._close()

    # --- events of the parser ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"tnxctl": self}  # type: ignore[dict-item]  # for `App`

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MOST_WAITING:
            self._why = f"more than {_MOST_WAITING} requests wait on this connection"
            raise ValueError(self._why)
        self._between = False
        self._header_bytes = self._body_bytes = 0
        self._cancel_timer()
        super().on_headers_complete()
        self._due.append(self.cycle)

    def on_message_complete(self) -> None:
        self._between = True
        self._messages += 1
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._due:
            self._due.popleft()
        if not self.transport.is_closing():
            self._joining.flush()
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
            return
        if self._fault is not None:
            if not self._due:
                self._end(*self._fault)
        elif not self._between:
            # The body of the next request, which is read only now. Or the rest of one that nobody wants: many clients
            # read no response before they have sent all of a request, and would find the connection broken instead.
            self._body_began = self.loop.time()
            self._set_timer(self._limits.body_timeout_s)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._fail(400, self._why or "this is not HTTP/1.1 as it should be")

    # --- ends --------------------------------------------------------------------------------------------------

    def _fail(self, status: int, sentence: str) -> None:
        """End the connection with an error, after the responses that are due before it."""
        self._fault = status, sentence
        self._cancel_timer()
        if self._due and self._due[-1].more_body:  # the newest one, whose body will not come
            broken = self._due.pop()
            if not self._due and broken.response_started:
                self._close()
                return
            if self._due:
                self.pipeline.popleft()
        if not self._due:
            self._end(status, sentence)

    def _end(self, status: int, sentence: str) -> None:
        body = msgspec.json.encode({"error": sentence})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        """Close the connection, even if the client does not read what was sent."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._abort_after(self.transport.get_write_buffer_size())

    def _abort_after(self, nbytes: int) -> None:
        """Break the connection unless the client reads so many bytes in time."""
        seconds = self._limits.body_timeout_s + nbytes / self._limits.body_rate
        if self._abort is None:
            self._abort = self.loop.call_later(seconds, self.transport.abort)

    def _on_timer(self) -> None:
        self._timer = None
        if self._between:
            if self._header_bytes:
                self._fail(408, "the headers did not come in time")
            else:
                self._close()
        elif not self._due:
            self._close()
        elif (left_s := self._body_time_left()) > 0:
            self._set_timer(left_s)
        else:
            self._fail(408, "the body did not come in time")

    def _body_time_left(self) -> float:
        """Seconds that the body that is under way still has."""
        limits = self._limits
        if len(self._due) > 1:  # it waits for the response to another request, and is not read meanwhile
            self._body_began = self.loop.time()
        allowed_s = limits.body_timeout_s + self._body_bytes / limits.body_rate
        return self._body_began + allowed_s - self.loop.time()

    def _await_headers(self) -> None:
        """Give the next request its time, unless the response to another one comes before it."""
        if self._due:
            self._cancel_timer()
        else:
            self._set_timer(self._limits.header_timeout_s)

    def _set_timer(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection(*args: Any, **kwargs: Any) -> Receiver:
    """Protocol of one transport, as uvicorn makes one for each."""
    return Receiver(Connection(*args, **kwargs))
