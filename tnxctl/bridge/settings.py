"""Settings of the bridge: what an operator chooses, and the limits that keep its clients apart."""

from __future__ import annotations

import msgspec

from tnxctl.protocol.limits import MIB, Limits


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of HTTP.

    Attributes:
        connections: open at a time, of each worker; one more is closed at once.
        header_bytes: of the request line and all headers together.
        body_bytes: of one body, after it was unpacked if it came compressed.
        bodies_bytes: of all bodies that are being read or answered, of each worker.
        header_timeout_s: seconds for a request line and headers to come, whole.
        body_timeout_s: seconds for a body to come, and one more for each `body_rate` bytes of it.
        idle_timeout_s: seconds that a connection may stay open without a request.
        drain_timeout_s: seconds that running requests get when the bridge ends.
    """

    connections: int = 1024
    header_bytes: int = 32 * 1024
    body_bytes: int = 256 * MIB
    bodies_bytes: int = 1024 * MIB
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    body_rate: int = 256 * 1024
    idle_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a bridge.

    Attributes:
        endpoints: of the daemon, or of several that serve the same models.
        timeout: seconds for an answer of the daemon's, unless a request says otherwise.
        listen: host and port for HTTP. grpc: for gRPC; None: not at all.
        workers: processes that share the addresses.
        certfile, keyfile: PEM files for TLS; None: none.
        insecure: whether it may listen on other addresses than loopback without TLS.
        tokens: TOML file with bearer tokens; None: everybody may do what the bridge's own client may.
        triton_names: whether /metrics has the names of Triton's metrics as well.
        limits: of HTTP. message: of what is sent to the daemon.
    """

    endpoints: tuple[str, ...]
    timeout: float = 5.0
    listen: tuple[str, int] = ("127.0.0.1", 8000)
    grpc: tuple[str, int] | None = None
    workers: int = 1
    certfile: str | None = None
    keyfile: str | None = None
    insecure: bool = False
    tokens: str | None = None
    triton_names: bool = False
    limits: HttpLimits = HttpLimits()
    message: Limits = Limits()
