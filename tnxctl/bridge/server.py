"""Worker of the bridge: an event loop with uvicorn in it, from its start to its end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn

from tnxctl.bridge.app import App
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.interfaces import routes_of
from tnxctl.bridge.settings import Settings


def run(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Serve on listening sockets until SIGTERM or SIGINT."""
    asyncio.run(_serve(settings, sockets))


async def _serve(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    bridge = Bridge(settings, routes_of(settings))
    config = uvicorn.Config(
        App(bridge),
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        ssl_certfile=settings.certfile,
        ssl_keyfile=settings.keyfile,
    )
    try:
        await uvicorn.Server(config).serve([*sockets])
    finally:
        await bridge.close()
