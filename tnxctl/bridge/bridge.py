"""Bridge: what all handlers of a worker share."""

from __future__ import annotations

from tnxctl.aio import AsyncClient
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings


class Bridge:
    """A worker's connection to the daemon, its settings and its routes.

    Made within the event loop that it is used in.

    Attributes:
        settings: as given.
        client: asks the daemon. The bridge is one client for it, whoever asks the bridge.
        routes: those of all interfaces.
    """

    def __init__(self, settings: Settings, routes: Routes) -> None:
        self.settings = settings
        self.routes = routes
        endpoints = settings.endpoints
        self.client = AsyncClient(
            endpoints[0] if len(endpoints) == 1 else list(endpoints),
            timeout=settings.timeout,
            limits=settings.message,
        )

    async def close(self) -> None:
        """Close the connection to the daemon."""
        await self.client.close()
