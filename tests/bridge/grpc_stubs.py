"""Plain client of gRPC for tests, with messages of ours."""

from __future__ import annotations

from typing import Any, Self

import grpc

from tnxctl.bridge.grpc.messages import INFERENCE


class Stub:
    """Plain client of a bridge: each RPC of the service by its name, with messages of ours."""

    def __init__(self, address: str, credentials: Any = None) -> None:
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),  # else it may have the connection of a stub that was closed just now
        ]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        (self._service,) = INFERENCE.services

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, name: str, request: Any, **options: Any) -> Any:
        """Call an RPC. Args: request: a message, or the bytes of one. options: of the call."""
        return self._rpc(name)(request, **options)

    def future(self, name: str, request: Any, **options: Any) -> Any:
        """Call an RPC without waiting."""
        return self._rpc(name).future(request, **options)

    def _rpc(self, name: str) -> Any:
        method = self._service.methods_by_name[name]
        return self.channel.unary_unary(
            f"/{self._service.full_name}/{name}",
            request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            response_deserializer=INFERENCE.message(method.output_type.name).FromString,
        )
