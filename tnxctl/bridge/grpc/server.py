"""Server of gRPC in a worker of the bridge, beside the one of HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tnxctl.bridge import addresses
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.grpc import health, inference
from tnxctl.bridge.grpc.calls import Budget, Calls
from tnxctl.bridge.grpc.messages import HEALTH, INFERENCE
from tnxctl.protocol.errors import Unavailable
from tnxctl.protocol.limits import MIB

_MOST_BYTES = 2**31 - 1  # of a message: gRPC counts in 32 bits, protobuf too
_NAMES_BYTES = MIB
"""Bytes of a message beside the tensors: names, shapes, parameters."""

_KEEPALIVE_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000


class GrpcServer:
    """Server of one worker.

    Attributes:
        address: host and port that it listens on, once it is started.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._settings = settings = bridge.settings
        limits = settings.limits
        budget = Budget(limits.bodies_bytes)
        services = [(INFERENCE, inference.METHODS), (HEALTH, health.METHODS)]
        self._server = grpc.aio.server(
            handlers=[
                Calls(bridge, budget, service, methods) for schema, methods in services for service in schema.services
            ],
            options=[
                ("grpc.max_receive_message_length", min(limits.body_bytes + _NAMES_BYTES, _MOST_BYTES)),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.so_reuseport", int(settings.workers > 1)),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ],
            maximum_concurrent_rpcs=limits.connections,
        )
        self.address = settings.grpc or ("127.0.0.1", 0)

    async def start(self) -> None:
        """Begin to serve. Raises Unavailable: the address cannot be had."""
        address = addresses.spell(self.address)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise Unavailable(f"gRPC cannot listen on {address}: {error}") from None
        self.address = (self.address[0], port)
        await self._server.start()

    async def stop(self) -> None:
        """Take no more requests, and let those that run finish within the time for that."""
        await self._server.stop(self._settings.limits.drain_timeout_s)

    @property
    def _credentials(self) -> Any:
        settings = self._settings
        if settings.certfile is None or settings.keyfile is None:
            return None
        pair = (Path(settings.keyfile).read_bytes(), Path(settings.certfile).read_bytes())
        return grpc.ssl_server_credentials([pair])
