"""The first version's interface: GET /health and POST /predict, in plain JSON."""

from __future__ import annotations

from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import Request, Response, json_response
from tnxctl.bridge.routes import Routes
from tnxctl.protocol import wire


def add_to(routes: Routes) -> None:
    """Add the routes of this interface."""
    routes.add("GET", "/health", health, wire.Health)


async def health(bridge: Bridge, request: Request) -> Response:
    """The state of the daemon, and of the GPU where a request would run now."""
    report = await bridge.client.health()
    return json_response(
        {
            "status": report.status,
            "cuda_available": report.cuda_available,
            "current_device": report.current_device,
            "gpu_memory_free_mb": report.gpu_memory_free_mb,
        }
    )
