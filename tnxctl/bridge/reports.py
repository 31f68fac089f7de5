"""Reports of a daemon about itself: GET /metrics for Prometheus, GET /stats, /daemons and /models as JSON."""

from __future__ import annotations

import asyncio
import math
from typing import TypeVar

import msgspec

from tnxctl.aio import AsyncClient
from tnxctl.bridge import metrics
from tnxctl.bridge.bridge import Bridge, Question
from tnxctl.bridge.exposition import CONTENT_TYPE
from tnxctl.bridge.http import HttpError, Request, Response, json_response
from tnxctl.bridge.routes import Routes
from tnxctl.protocol import wire
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.protocol.limits import excerpt
from tnxctl.protocol.wire import ModelInfo, StatsReport

T = TypeVar("T")

_SCRAPE_TIMEOUT_S = 2.0
"""Most seconds that /metrics waits for a daemon."""

_SCRAPE_SHARE = 0.8
"""Share of the time that Prometheus waits for /metrics, which it says: the rest is for the answer."""


class ModelList(msgspec.Struct, frozen=True):
    """Every version of every model that a daemon knows."""

    models: tuple[ModelInfo, ...]


class Daemons(msgspec.Struct, frozen=True):
    """Daemons behind the bridge, by their addresses."""

    daemons: list[str]


def add_to(routes: Routes) -> None:
    """Add the routes of the reports."""
    routes.add("GET", "/metrics", prometheus, wire.Stats, gives=CONTENT_TYPE)
    routes.add("GET", "/daemons", daemons, wire.Stats, gives=Daemons)
    for of in ("", "/{daemon}"):
        routes.add("GET", f"/stats{of}", stats, wire.Stats, gives=StatsReport)
        routes.add("GET", f"/models{of}", models, wire.Models, gives=ModelList)


async def prometheus(bridge: Bridge, request: Request) -> Response:
    """Counts of the daemon since its start, as Prometheus reads them.

    Without an answer of the daemon's, `tnx_up` is 0, and there is nothing else: an alert can say so, and a scrape that
    fails tells of the bridge alone. Of several daemons, each has its address as a label.
    """
    timeout = min(bridge.settings.timeout, _SCRAPE_TIMEOUT_S, _SCRAPE_SHARE * _allowed_s(request))
    reports = await asyncio.gather(*(_answer(bridge, client, timeout) for client in bridge.daemons))
    addresses = (client.endpoint for client in bridge.daemons)
    text = metrics.render(dict(zip(addresses, reports, strict=True)), triton_names=bridge.settings.triton_names)
    return Response((text,), headers=((b"content-type", CONTENT_TYPE.encode()),))


def _allowed_s(request: Request) -> float:
    """Seconds that Prometheus waits for the answer; infinity if it does not say, or says nonsense."""
    try:
        allowed = float(request.headers.get(b"x-prometheus-scrape-timeout-seconds", "inf"))
    except ValueError:
        return math.inf
    return allowed if allowed > 0 else math.inf


async def _answer(bridge: Bridge, client: AsyncClient, timeout: float) -> StatsReport | None:
    """The counts of a daemon; None if it does not answer."""
    try:
        return await _ask(bridge, client, AsyncClient.stats, timeout)
    except (Unavailable, DeadlineExceeded):
        return None


async def daemons(bridge: Bridge, request: Request) -> Response:
    """The addresses of the daemons behind the bridge."""
    return json_response(Daemons([client.endpoint for client in bridge.daemons]))


async def stats(bridge: Bridge, request: Request) -> Response:
    """The raw counts of the daemon since its start; of several daemons, those of the first, or of the one by number.

    A histogram is [number of the first bucket, [counts], sum].
    """
    return json_response(await _ask(bridge, _daemon(bridge, request), AsyncClient.stats))


async def models(bridge: Bridge, request: Request) -> Response:
    """Every version of every model, loaded or not; of several daemons, those of the first, or of the one by number.

    A tensor is [name, datatype, shape].
    """
    return json_response(ModelList(await _ask(bridge, _daemon(bridge, request), AsyncClient.models)))


async def _ask(bridge: Bridge, client: AsyncClient, ask: Question[T], timeout: float | None = None) -> T:
    """The answer of one daemon, shared by those who ask it the same meanwhile."""
    return await bridge.questions.share((ask, client, timeout), lambda: ask(client, timeout=timeout))


def _daemon(bridge: Bridge, request: Request) -> AsyncClient:
    """The daemon whose number is in the path; without one, the first. Raises HttpError: there is none."""
    number = request.params.get("daemon", "0")
    if number not in map(str, range(len(bridge.daemons))):
        raise HttpError(404, f"of the {len(bridge.daemons)} daemons here, none is number {excerpt(number)}")
    return bridge.daemons[int(number)]
