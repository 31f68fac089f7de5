"""Service `grpc.health.v1.Health`, which Kubernetes and other tools of gRPC ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnxctl.bridge.grpc.calls import Call, Method
from tnxctl.bridge.grpc.messages import HEALTH, INFERENCE
from tnxctl.protocol.errors import NotFound
from tnxctl.protocol.limits import excerpt

_Response = HEALTH.message("HealthCheckResponse")
_SERVICES = ("", *(service.full_name for service in INFERENCE.services))


async def _check(call: Call, request: Any) -> Any:
    if request.service not in _SERVICES:
        raise NotFound(f"there is no service {excerpt(request.service)}")
    return _Response(status="SERVING" if await call.bridge.is_ready() else "NOT_SERVING")


METHODS: Mapping[str, Method] = {"Check": Method(_check, None)}
"""Methods of the service, by name."""
