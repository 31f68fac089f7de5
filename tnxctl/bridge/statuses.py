"""Errors of `tnxctl` as HTTP tells them. Of the codes of gRPC, each has a status of its own here."""

from __future__ import annotations

import math

from tnxctl.bridge.http import Headers, Response, error_response
from tnxctl.protocol.errors import TensorNextError

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""Name of a gRPC code -> HTTP status; those of https://cloud.google.com/apis/design/errors, but for 409."""

_COMES_BACK = (429, 503)


def headers_of(error: TensorNextError, status: int) -> Headers:
    """Header with the whole seconds after which to come back: at least one, since it can say no less."""
    if status not in _COMES_BACK:
        return ()
    seconds = max(1, math.ceil(error.retry_after_s or 0.0))
    return ((b"retry-after", b"%d" % seconds),)


def response_of(error: TensorNextError) -> Response:
    """The response that tells an error of `tnxctl`."""
    status = STATUSES.get(error.code, 500)
    return error_response(status, error.message, headers_of(error, status))
