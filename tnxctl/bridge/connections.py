"""Connections of HTTP: those of uvicorn, within limits of size and time. One that breaks withdraws what it asked for.

uvicorn bounds neither a request line and its headers, nor the time that they take, nor how many requests may wait on
one connection. It answers what is no HTTP at once, before the responses that are due. A client that goes away is told
to whoever asks, at the cost of a task for each request. All that is different here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tnxctl.bridge.settings import HttpLimits

_MOST_WAITING = 64
"""Most requests that may wait on a connection for the response to another."""

_LINGER_S = 5.0
"""Seconds for the rest of a body that nobody wants: a client reads no response before it has sent all of its request,
and would find the connection broken instead."""


class Config(uvicorn.Config):
    """Configuration of uvicorn. Attributes: http_limits: of its connections."""

    http_limits: HttpLimits


class Connection(HttpToolsProtocol):
    """One connection.

    Attributes:
        task: of the request that is being answered, for `connection_lost` to cancel; set by the application.
        gone: whether the connection is no more.
    """

    config: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task: asyncio.Task[Any] | None = None
        self.gone = False
        self._limits = self.config.http_limits
        self._messages = 0
        self._between = True  # from the end of a request to the end of the next one's headers
        self._header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._fault: tuple[int, str] | None = None  # what ends the connection, once all that came before is answered
        self._why = ""

    # --- events of the connection ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
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
            if self._timer is not None and not self._is_answered:
                self._cancel_timer()
            return
        if self._messages == messages:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.header_bytes:
                self._fail(431, f"the headers have more than {self._limits.header_bytes} bytes")
                return
        if not self._is_answered:
            self._cancel_timer()
        elif self._timer is None or self._messages != messages:
            self._set_timer(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        super().connection_lost(exc)
        self._cancel_timer()
        self.pipeline.clear()
        if self.task is not None:
            self.task.cancel()

    # --- events of the parser ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"tnxctl": self}  # type: ignore[dict-item]  # for `App`

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MOST_WAITING:
            self._why = f"more than {_MOST_WAITING} requests wait on this connection"
            raise ValueError(self._why)
        self._between = False
        self._header_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._between = True
        self._messages += 1
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._fault is not None:
            if is_last:
                self._end(*self._fault)
        elif not self._between and self._is_answered:
            self._set_timer(_LINGER_S)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._fail(400, self._why or "this is not HTTP/1.1 as it should be")

    # --- ends --------------------------------------------------------------------------------------------------

    @property
    def _is_answered(self) -> bool:
        """Whether no response is due."""
        return self.cycle is None or self.cycle.response_complete

    def _fail(self, status: int, sentence: str) -> None:
        """End the connection with an error, after the responses that are due before it."""
        self._fault = status, sentence
        self._cancel_timer()
        if self.pipeline:
            if self.pipeline[0][0].more_body:  # the newest one, whose body will not come
                self.pipeline.popleft()
        elif self._is_answered:
            self._end(status, sentence)
        elif self.cycle.more_body:  # it is about this one
            if self.cycle.response_started:
                self.transport.close()
            else:
                self._end(status, sentence)

    def _end(self, status: int, sentence: str) -> None:
        body = msgspec.json.encode({"error": sentence})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _on_timer(self) -> None:
        self._timer = None
        if self._header_bytes:
            self._fail(408, "the headers did not come in time")
        else:
            self.transport.close()

    def _set_timer(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
