"""Application of the bridge, in ASGI: admits a request, reads its body, has a handler answer, and sends the answer.

https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tnxctl.bridge.bodies import BodyReader, ClientGone
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import HttpError, Request, Response, error_response
from tnxctl.bridge.statuses import response_of
from tnxctl.protocol.errors import TensorNextError, Unauthenticated

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_CLOSE = (b"connection", b"close")
_CHALLENGE = (b"www-authenticate", b'Bearer realm="tensornext"')
_SHORT_BYTES = 16 * 1024  # of a body: up to here a copy costs less than another message to the server
_LONG_BYTES = 64 * 1024  # of an answer: what is shorter fits into the buffers that each connection has
_HEADER_OVERHEAD = 4  # ": " and the end of the line

_log = logging.getLogger("tnxctl.bridge")


class App:
    """ASGI application of one worker.

    A server that puts a `tnxctl.bridge.connections.Connection` into the extensions of a scope has it cancel the task of
    a request whose client has gone, which withdraws the request at the daemon.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._limits = bridge.settings.limits
        self._budget = bridge.budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"the bridge speaks HTTP alone, not {scope['type']}")
        connection = scope.get("extensions", {}).get("tnxctl")
        if connection is not None:
            connection.task = asyncio.current_task()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        body = BodyReader(receive, headers, self._limits, self._budget, connection)
        response: Response | None = None
        try:
            response = await self._answer(scope, headers, body)
            if not body.complete and b"expect" in headers:  # whether the body will come is the client's choice now
                response.headers = (*response.headers, _CLOSE)
            await _send(send, response)
            if connection is not None:
                await connection.drained()
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if response is None and (connection is None or not connection.gone):
                await _send(send, error_response(503, "the bridge ends", ((b"retry-after", b"1"), _CLOSE)))
        finally:
            body.release()

    async def _answer(self, scope: Scope, headers: Mapping[bytes, str], body: BodyReader) -> Response:
        try:
            self._check_headers(scope)
            method: str = scope["method"]
            path: str = scope["raw_path"].decode("ascii")
            route, params = self._bridge.routes.match("GET" if method == "HEAD" else method, path)
            client = _admit(self._bridge, scope, headers, route.verb, params)
            request = Request(
                route.method,
                path,
                params,
                scope["query_string"].decode("latin-1"),
                headers,
                await body.read(),
                client,
                body.hold,
            )
            response = await route.handler(self._bridge, request)
            nbytes = sum(map(len, response.chunks))
            if nbytes > _LONG_BYTES:
                body.hold(nbytes)  # until the client has read it
            return response
        except HttpError as error:
            return error_response(error.status, error.message, error.headers)
        except TensorNextError as error:
            return response_of(error)
        except ClientGone:
            raise
        except Exception:
            _log.exception("a handler failed")
            return error_response(500, "the bridge failed; its log says how")

    def _check_headers(self, scope: Scope) -> None:
        """Check the size of what came in one piece; `Connection` has seen to what did not."""
        nbytes = len(scope["raw_path"]) + len(scope["query_string"])
        for name, value in scope["headers"]:
            nbytes += len(name) + len(value) + _HEADER_OVERHEAD
        if nbytes > self._limits.header_bytes:
            raise HttpError(431, f"the headers have more than {self._limits.header_bytes} bytes", (_CLOSE,))


def _admit(bridge: Bridge, scope: Scope, headers: Mapping[bytes, str], verb: Any, params: Mapping[str, str]) -> str:
    """Check that a request may be asked. Returns who asks.

    Raises:
        HttpError: its token is not known (401), or it comes from a page of another site (403).
        PermissionDenied: its role does not do.
    """
    bridge.pages.check(headers)
    client = scope["client"]
    address = f"{client[0]}:{client[1]}" if client else "a socket"
    try:
        return bridge.access.admit(headers.get(b"authorization", ""), verb, address, params.get("model", ""))
    except Unauthenticated as error:
        raise HttpError(401, error.message, (_CHALLENGE,)) from None


async def _send(send: Send, response: Response) -> None:
    chunks = response.chunks
    nbytes = sum(map(len, chunks))
    if len(chunks) > 1 and nbytes <= _SHORT_BYTES:
        chunks = (b"".join(chunks),)
    headers = [*response.headers, (b"content-length", b"%d" % nbytes)]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    last = len(chunks) - 1
    for place, chunk in enumerate(chunks):
        await send({"type": "http.response.body", "body": chunk, "more_body": place < last})
    if last < 0:
        await send({"type": "http.response.body", "body": b""})
