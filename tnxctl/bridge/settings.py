"""Settings of the bridge: what an operator chooses, and the limits that keep its clients apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from tnxctl.busypoll import DEFAULT_BUSY_POLL_S
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import MIB, Limits, excerpt

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of HTTP, and of gRPC where it has the same.

    Attributes:
        connections: open at a time, of each worker; one more is closed at once.
        header_bytes: of the request line and all headers together.
        body_bytes: of one body, after it was unpacked if it came compressed.
        json_bytes: of a JSON document: its values take many times as much memory. Over gRPC, of a request without its
            raw contents.
        bodies_bytes: that have come of all bodies that are being read or answered, and of answers that are being sent,
            of each worker.
        header_timeout_s: seconds for a request line and headers to come, whole.
        body_timeout_s: seconds for a body to come, and one more for each `body_rate` bytes of it.
        message_timeout_s: seconds for a request over gRPC to come whole: how much of it has come is not told there. As
            many for an answer to be taken, and one more for each `body_rate` bytes that its connection is to take
            meanwhile.
        idle_timeout_s: seconds that a connection, or a stream of gRPC, may stay open without a request.
        drain_timeout_s: seconds that running requests get when the bridge ends.
    """

    connections: _Count = 1024
    header_bytes: _Count = 32 * 1024
    body_bytes: _Count = 256 * MIB
    json_bytes: _Count = 16 * MIB
    bodies_bytes: _Count = 1024 * MIB
    header_timeout_s: _Seconds = 10.0
    body_timeout_s: _Seconds = 10.0
    body_rate: _Count = 256 * 1024
    message_timeout_s: _Seconds = 60.0
    idle_timeout_s: _Seconds = 75.0
    drain_timeout_s: _Seconds = 30.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a bridge.

    Attributes:
        endpoints: of the daemon, or of several that serve the same models.
        timeout: seconds for an answer of the daemon's, unless a request says otherwise.
        listen: host and port for HTTP. grpc: for gRPC; None: not at all.
        workers: processes that share the addresses.
        busy_poll_s: see `tnxctl.AsyncClient`.
        certfile, keyfile: PEM files for TLS; None: none.
        insecure: whether it may listen on other addresses than loopback without TLS.
        tokens: TOML file with bearer tokens; None: everybody may do what the bridge's own client may.
        triton_names: whether /metrics has the names of Triton's metrics as well.
        shared_memory: what the names of files in shared memory begin with that may be registered; None: none may.
        limits: of HTTP. message: of what is sent to the daemon.
    """

    endpoints: tuple[str, ...]
    timeout: float = 5.0
    listen: tuple[str, int] = ("127.0.0.1", 8000)
    grpc: tuple[str, int] | None = None
    workers: int = 1
    busy_poll_s: float = DEFAULT_BUSY_POLL_S
    certfile: str | None = None
    keyfile: str | None = None
    insecure: bool = False
    tokens: str | None = None
    triton_names: bool = False
    shared_memory: str | None = None
    limits: HttpLimits = HttpLimits()
    message: Limits = Limits()


def limits_of(texts: Iterable[str]) -> HttpLimits:
    """Limits of which some are given as "NAME=NUMBER". Raises InvalidArgument: there is none of that name, or such."""
    given: dict[str, str] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in HttpLimits.__struct_fields__:
            raise InvalidArgument(f"limit {excerpt(name)}: there are {', '.join(HttpLimits.__struct_fields__)}")
        given[name] = number
    try:
        return msgspec.convert(given, HttpLimits, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"limit: {error}") from None
