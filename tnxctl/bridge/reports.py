"""What a daemon says of itself: GET /metrics for Prometheus, GET /stats and /models as JSON."""

from __future__ import annotations

import msgspec

from tnxctl.bridge import metrics
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import Request, Response, json_response
from tnxctl.bridge.routes import Routes
from tnxctl.protocol import wire
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.protocol.wire import ModelInfo, StatsReport

SCRAPE_TIMEOUT_S = 2.0
"""Most seconds that /metrics waits for the daemon: less than Prometheus waits for /metrics."""


class ModelList(msgspec.Struct, frozen=True):
    """Every version of every model that a daemon knows."""

    models: tuple[ModelInfo, ...]


def add_to(routes: Routes) -> None:
    """Add the routes of the reports."""
    routes.add("GET", "/metrics", prometheus, wire.Stats, gives=metrics.CONTENT_TYPE)
    routes.add("GET", "/stats", stats, wire.Stats, gives=StatsReport)
    routes.add("GET", "/models", models, wire.Models, gives=ModelList)


async def prometheus(bridge: Bridge, request: Request) -> Response:
    """Counts of the daemon since its start, as Prometheus reads them.

    Without an answer of the daemon's, `tnx_up` is 0, and there is nothing else: an alert can say so, and a scrape that
    fails tells of the bridge alone.
    """
    try:
        report = await bridge.client.stats(timeout=min(bridge.settings.timeout, SCRAPE_TIMEOUT_S))
    except (Unavailable, DeadlineExceeded):
        report = None
    text = metrics.render(report, triton_names=bridge.settings.triton_names)
    return Response((text,), headers=((b"content-type", metrics.CONTENT_TYPE.encode()),))


async def stats(bridge: Bridge, request: Request) -> Response:
    """The raw counts of the daemon since its start. A histogram is [number of the first bucket, [counts], sum]."""
    return json_response(await bridge.client.stats())


async def models(bridge: Bridge, request: Request) -> Response:
    """Every version of every model, loaded or not: its signature, where it is loaded, how it is.

    A tensor is [name, datatype, shape].
    """
    return json_response(ModelList(await bridge.client.models()))
