"""HTTP as the handlers of the bridge see it: requests, responses and errors. No socket, no server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

Buffer = bytes | bytearray | memoryview
"""Bytes that are sent as they are. A memoryview is one of bytes: contiguous, of format B."""

Headers = tuple[tuple[bytes, bytes], ...]
"""Names, in lower case, and values of headers of a response."""

JSON: Final = (b"content-type", b"application/json")


class Request:
    """One request, its body read.

    Attributes:
        method: GET, POST, ...; in upper case. A HEAD comes as GET.
        path: as it was sent, percent-encoded.
        params: of the segments of the route, decoded.
        query: what stood after the "?", not decoded.
        headers: by their names in lower case; of several with one name, the last.
        body: the whole of it, in one buffer that is the handler's own; b"" without one.
        client: who asks, for messages: an address, or the name of a token.
        hold: counts further bytes as held until it is answered; raises Unavailable if they are too many.
    """

    __slots__ = ("body", "client", "headers", "hold", "method", "params", "path", "query")

    def __init__(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        query: str = "",
        headers: Mapping[bytes, str] | None = None,
        body: Buffer = b"",
        client: str = "",
        hold: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.method = method
        self.path = path
        self.params = params or {}
        self.query = query
        self.headers = headers or {}
        self.body = body
        self.client = client
        self.hold = hold


class Response:
    """One response.

    Attributes:
        chunks: of the body, sent one after the other without being joined.
        status: an HTTP status code.
        headers: without Content-Length, which the application adds.
    """

    __slots__ = ("chunks", "headers", "status")

    def __init__(self, chunks: Sequence[Buffer] = (), status: int = 200, headers: Headers = ()) -> None:
        self.chunks = chunks
        self.status = status
        self.headers = headers


class HttpError(Exception):
    """Error that answers a request.

    Attributes:
        status: an HTTP status code, 400 or above.
        message: one sentence for whoever asked.
        headers: further ones of the response.
    """

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers

    def __reduce__(self) -> tuple[type[HttpError], tuple[int, str, Headers]]:
        return HttpError, (self.status, self.message, self.headers)


_encode_json = msgspec.json.Encoder().encode


def json_response(document: Any, status: int = 200, headers: Headers = ()) -> Response:
    """A response with a JSON document. NaN and infinities become null, which is all that JSON has for them."""
    return Response((_encode_json(document),), status, (JSON, *headers))


def error_response(status: int, message: str, headers: Headers = ()) -> Response:
    """A response that tells an error: {"error": message}."""
    return json_response({"error": message}, status, headers)
