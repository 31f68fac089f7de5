"""Errors of `tnxctl` as gRPC tells them. Their codes are gRPC's own names."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc

from tnxctl.protocol.errors import TensorNextError

_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata that tells a client with a retry policy when to come back: gRFC A6,
https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback."""


async def abort(context: Any, error: TensorNextError) -> NoReturn:
    """End an RPC with an error: its code, its sentence, and when the same request may succeed, if that is known."""
    metadata: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s is not None:
        metadata = ((_PUSHBACK, str(math.ceil(error.retry_after_s * 1000))),)
    await context.abort(grpc.StatusCode[error.code], error.message, metadata)
    raise AssertionError("abort raises")
