"""Errors of `tnxctl` as gRPC tells them. Their codes are gRPC's own names."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc

from tnxctl.protocol.errors import TensorNextError

_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata that tells a client with a retry policy when to come back: gRFC A6,
https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback."""


MOST_DETAILS = 2000
"""Most bytes of a sentence: it travels in a trailer, percent-encoded, and clients take 8 kB of those in all."""


async def abort(context: Any, error: TensorNextError) -> NoReturn:
    """End an RPC with an error: its code, its sentence, and when the same request may succeed, if that is known."""
    metadata: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s is not None:
        metadata = ((_PUSHBACK, str(math.ceil(error.retry_after_s * 1000))),)
    details = error.message.encode(errors="replace")[:MOST_DETAILS].decode(errors="ignore")
    await context.abort(grpc.StatusCode[error.code], details, metadata)
    raise AssertionError("abort raises")
