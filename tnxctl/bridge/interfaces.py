"""Interfaces of the bridge, put together: each adds its routes."""

from __future__ import annotations

from tnxctl.bridge import first_wire
from tnxctl.bridge.oip import handlers as oip
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings


def routes_of(settings: Settings) -> Routes:
    """The routes of all interfaces."""
    routes = Routes()
    first_wire.add_to(routes)
    oip.add_to(routes)
    return routes
