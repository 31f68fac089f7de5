"""Server of gRPC in a worker of the bridge, beside the one of HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tnxctl.bridge import addresses
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.grpc import health, inference
from tnxctl.bridge.grpc.calls import Calls, Readers
from tnxctl.bridge.grpc.closing import Closer
from tnxctl.bridge.grpc.deliveries import Deliveries
from tnxctl.bridge.grpc.messages import HEALTH, INFERENCE
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.limits import MIB

_MOST_BYTES = 2**31 - 1  # of a message: gRPC counts in 32 bits, protobuf too
_NAMES_BYTES = MIB
"""Bytes of a message beside the tensors: names, shapes, parameters."""

_STREAMS = 256
"""RPCs under way on one connection; clients keep further ones until there is room. With such a limit, those that are
begun and reset faster than they are forgotten (CVE-2023-44487) count as well; without, all other RPCs are cancelled."""

_KEEPALIVE_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000

# It tells of exceptions in handlers. Ours are told by `calls`; those of gRPC are clients that have gone.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)


class GrpcServer:
    """Server of one worker, on the address of the settings, which has a port."""

    def __init__(self, bridge: Bridge) -> None:
        self._settings = settings = bridge.settings
        self._changed: Any = None
        self._readers: Readers = set()
        assert settings.grpc is not None
        limits = settings.limits
        deliveries = Deliveries(Closer(settings.grpc[1]), limits)
        services = [(INFERENCE, inference.METHODS), (HEALTH, health.METHODS)]
        self._server = grpc.aio.server(
            handlers=[
                Calls(bridge, service, methods, self._readers, deliveries)
                for schema, methods in services
                for service in schema.services
            ],
            options=[
                ("grpc.max_receive_message_length", min(limits.body_bytes + _NAMES_BYTES, _MOST_BYTES)),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.so_reuseport", 1),  # with other workers, and with whoever keeps the address for them
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ],
            maximum_concurrent_rpcs=limits.connections,
        )

    async def start(self) -> None:
        """Begin to serve. Raises FailedPrecondition: the address cannot be had."""
        settings = self._settings
        assert settings.grpc is not None
        address = addresses.spell(settings.grpc)
        try:
            if settings.certfile is None or settings.keyfile is None:
                self._server.add_insecure_port(address)
            else:
                credentials = grpc.dynamic_ssl_server_credentials(self._certificate(), self._changed_certificate)
                self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise FailedPrecondition(f"gRPC cannot listen on {address}: {error}") from None
        await self._server.start()

    def reload(self) -> None:
        """Use the certificate as its files are now, for connections to come. They have been found to be right."""
        self._changed = self._certificate()

    def _certificate(self) -> Any:
        settings = self._settings
        assert settings.keyfile is not None
        assert settings.certfile is not None
        return grpc.ssl_server_certificate_configuration(
            [(Path(settings.keyfile).read_bytes(), Path(settings.certfile).read_bytes())]
        )

    def _changed_certificate(self) -> Any:
        """The certificate, if it has changed since the last connection, which gRPC asks at each; None: it has not."""
        changed, self._changed = self._changed, None
        return changed

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more requests, also of streams, and wait until all are answered; a second call may shorten that.

        Args:
            grace_s: seconds that they get; None: as the settings say.
        """
        for reader in [*self._readers]:
            reader.cancel()
        await self._server.stop(self._settings.limits.drain_timeout_s if grace_s is None else grace_s)
