"""GET /metrics, /stats and /models of a real bridge, and the description of all its routes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the bridge needs tensornext[http]")

import fake_daemon
from bridges import SECONDS, Bridge, running_bridge, until
from conftest import Daemon
from fake_daemon import FakeDaemon
from prometheus_text import Family, buckets, read
from tnxctl import Client
from tnxctl.aio import AsyncClient
from tnxctl.bridge import bridge as of_worker
from tnxctl.bridge import openapi, reports, server_timing
from tnxctl.bridge.http import Request
from tnxctl.bridge.interfaces import routes_of
from tnxctl.bridge.page import reference
from tnxctl.bridge.settings import Settings
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument, Unavailable
from tnxctl.results import Result, Timing

ROUTES = routes_of(Settings(endpoints=("127.0.0.1",)))
MLP = {"model": "mlp", "version": "1"}


def scrape(bridge: Bridge, up: bool = True) -> dict[str, Family]:
    """Metrics, once all daemons have answered; they have little time for it. Args: up: else once none has."""

    def look() -> dict[str, Family]:
        response = bridge.ask("GET", "/metrics")
        assert response.status == 200
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return read(response.body)

    return until(look, lambda found: {*found["tnx_up"].samples.values()} == {float(up)})


def test_metrics_count_what_was_asked(daemon: Daemon, bridge: Bridge) -> None:
    with Client(daemon.endpoint, timeout=SECONDS) as tnx:
        tnx.predict(np.zeros((1, 256), np.float32), model="mlp")
        before = scrape(bridge)
        for _ in range(5):
            tnx.predict(np.zeros((2, 256), np.float32), model="mlp")
        with pytest.raises(InvalidArgument):
            tnx.predict(np.zeros((2, 3), np.float32), model="mlp")
    # A daemon that took long for its report tells it once more for a while.
    asked = before["tnx_requests_total"][MLP] + 6
    after = until(lambda: scrape(bridge), lambda found: found["tnx_requests_total"][MLP] >= asked)

    def grown(name: str, labels: dict[str, str]) -> float:
        return after[name][labels] - before[name][labels]

    assert grown("tnx_replies_total", MLP) == 5
    assert grown("tnx_requests_total", MLP) == 6
    assert grown("tnx_rows_total", MLP) == 10
    assert grown("tnx_errors_total", MLP | {"code": "INVALID_ARGUMENT"}) == 1
    assert grown("tnx_daemon_errors_total", {"code": "INVALID_ARGUMENT"}) == 1
    rows = [buckets(families["tnx_batch_rows"], MLP) for families in (before, after)]
    assert rows[1]["2"] - rows[0]["2"] == 5
    times = [buckets(families["tnx_request_duration_seconds"], MLP)["+Inf"] for families in (before, after)]
    assert times[1] - times[0] == 5
    assert after["tnx_device_memory_size_bytes"][{"device": "cpu"}] > 2**20
    for name, family in before.items():
        if family.kind != "gauge":
            assert all(after[name].samples[key] >= value for key, value in family.samples.items()), name


def test_triton_names_are_there_when_asked_for(daemon: Daemon, bridge: Bridge, tmp_path: Path) -> None:
    assert "nv_inference_count" not in scrape(bridge)
    with running_bridge(tmp_path, daemon.endpoint, "--triton-names") as other:
        assert "nv_inference_count" in scrape(other)


def test_metrics_tell_of_a_daemon_that_is_gone(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/tnx"
    with running_bridge(tmp_path, endpoint, "--timeout", "300ms") as bridge:
        assert scrape(bridge, up=False).keys() == {"tnx_up"}
        with FakeDaemon(endpoint):
            assert scrape(bridge)["tnx_up"][{}] == 1
        families = scrape(bridge, up=False)
        assert families.keys() == {"tnx_up"}
        assert families["tnx_up"][{}] == 0


@pytest.mark.parametrize(
    ("said", "waited"), [("1", 0.8), ("0.5", 0.4), ("10", 2.0), ("inf", 2.0), ("nan", 2.0), ("-1", 2.0), ("x", 2.0)]
)
def test_metrics_wait_for_the_daemon_less_long_than_prometheus_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, said: str, waited: float
) -> None:
    """Else a daemon that is gone would look like a bridge that is."""

    async def stats(client: AsyncClient, *, timeout: float) -> wire.StatsReport:
        assert timeout == pytest.approx(waited)
        raise Unavailable("nobody listens")

    async def scraped() -> bytes:
        bridge = of_worker.Bridge(Settings(endpoints=("tcp://127.0.0.1:5555",)), ROUTES)
        response = await reports.prometheus(bridge, asked)
        await bridge.close()
        return bytes(response.chunks[0])

    asked = Request("GET", "/metrics", headers={b"x-prometheus-scrape-timeout-seconds": said})
    monkeypatch.setattr(AsyncClient, "stats", stats)
    assert read(asyncio.run(scraped()))["tnx_up"][{}] == 0


def test_several_daemons_are_told_apart(tmp_path: Path) -> None:
    versions = [msgspec.structs.replace(fake_daemon.STATS, version=f"0.{number}.0") for number in (1, 2)]
    first, second = (FakeDaemon(stats=lambda _, told=told: told) for told in versions)
    with first, second, running_bridge(tmp_path, f"{first.endpoint},{second.endpoint}") as bridge:
        families = scrape(bridge)
        for fake, version in zip((first, second), ("0.1.0", "0.2.0"), strict=True):
            assert families["tnx_build_info"][{"daemon": fake.endpoint, "version": version}] == 1
        assert bridge.ask("GET", "/daemons").document == {"daemons": [first.endpoint, second.endpoint]}
        assert bridge.ask("GET", "/stats").document["version"] == "0.1.0"
        assert bridge.ask("GET", "/stats/0").document["version"] == "0.1.0"
        assert bridge.ask("GET", "/stats/1").document["version"] == "0.2.0"
        for number in ("2", "-1", "x", "%C2%B2"):
            assert bridge.ask("GET", f"/stats/{number}").status == 404, number
        assert bridge.ask("GET", "/models").document == bridge.ask("GET", "/models/1").document


ABOUT_ONE = (
    "/health",
    "/v2",
    "/v2/health/ready",
    "/v2/models/mlp",
    "/v2/models/mlp/ready",
    "/v2/models/mlp/config",
    "/v2/models/mlp/stats",
    "/v2/models/stats",
)
"""Paths for which one daemon is asked, and not whichever of several is least busy."""


def test_what_is_about_one_daemon_is_asked_of_one_that_answers(tmp_path: Path) -> None:
    counts = (wire.VersionStats(name="mlp", version="1"),)
    stats = msgspec.structs.replace(fake_daemon.STATS, models=counts)
    gone = f"ipc://{tmp_path}/gone"
    with FakeDaemon(stats=lambda _: stats) as fake:
        for endpoints, options in (
            (f"{fake.endpoint},{gone}", ()),
            (f"{gone},{fake.endpoint}", ("--timeout", "100ms")),  # half of it for each
        ):
            with running_bridge(tmp_path, endpoints, *options) as bridge:
                for path in ABOUT_ONE:
                    answered = until(lambda path=path: bridge.ask("GET", path), lambda answer: answer.status != 503)
                    assert answered.status == 200


def test_a_daemon_that_is_gone_costs_one_question_its_time_and_not_each() -> None:
    """All of them together get the time that one question may take: probes give up after a second."""
    asked: list[tuple[str, float | None]] = []

    async def ask(client: AsyncClient, /, *, timeout: float | None) -> str:
        asked.append((client.endpoint, timeout))
        if client.endpoint != "ipc://c":
            raise Unavailable("gone")
        return "here"

    async def answers() -> list[str]:
        bridge = of_worker.Bridge(Settings(endpoints=("ipc://a", "ipc://b", "ipc://c")), ROUTES)
        try:
            return [await bridge.ask_one(ask, 60.0) for _ in range(2)]
        finally:
            await bridge.close()

    assert asyncio.run(answers()) == ["here", "here"]
    assert [endpoint for endpoint, _ in asked] == ["ipc://a", "ipc://b", "ipc://c", "ipc://c"]
    assert [round(seconds or 0.0) for _, seconds in asked] == [20, 30, 60, 20]


def test_stats_and_models_are_those_of_the_daemon(daemon: Daemon, bridge: Bridge) -> None:
    with Client(daemon.endpoint, timeout=SECONDS) as tnx:
        models = {(model.name, model.version) for model in tnx.models()}
        started_s = tnx.stats().started_s
    stats = bridge.ask("GET", "/stats").document
    assert stats["started_s"] == started_s
    assert {(model["name"], model["version"]) for model in stats["models"]} <= models
    listed = bridge.ask("GET", "/models").document["models"]
    assert {(model["name"], model["version"]) for model in listed} == models
    [mlp] = [model for model in listed if model["name"] == "mlp"]
    assert mlp["inputs"] == [["input", "FP32", [-1, 256]]]


# --- Server-Timing ----------------------------------------------------------------------------------------------


def test_an_answer_tells_its_stages(bridge: Bridge) -> None:
    inputs = [{"name": "input", "shape": [1, 256], "datatype": "FP32", "data": [0.5] * 256}]
    body = msgspec.json.encode({"inputs": inputs})
    for path, asked in (
        ("/v2/models/mlp/infer", body),
        ("/predict", msgspec.json.encode({"input_data": [[0.5] * 256], "model": "mlp"})),
    ):
        response = bridge.ask("POST", path, asked)
        assert response.status == 200, response
        told = response.headers["server-timing"]
        times = {name: float(time) for name, time in re.findall(r"(\w+);dur=([0-9.]+)", told)}
        parts = ("receive", "queue", "gather", "h2d", "compute", "d2h", "reply")
        assert times["total"] == pytest.approx(sum(times[part] for part in parts), abs=0.01)
        assert times["compute"] > 0
        assert 'device;desc="cpu"' in told


def test_what_the_daemon_says_stays_within_the_quotes_of_a_header() -> None:
    timing = Timing(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 28.0)
    result = Result(
        outputs={},
        model="m",
        version="1",
        device="cpu",
        reason='no "GPU"\r\nSet-Cookie: a=\\ü',
        batch_size=3,
        latency_ms=1.0,
        gpu_memory_mb=0.0,
        timing=timing,
        predicted_us=20.0,
    )
    name, value = server_timing.header(result)
    assert name == b"server-timing"
    assert value.endswith(b'device;desc="cpu", reason;desc="no ?GPU???Set-Cookie: a=??", batch;desc="3"')
    assert value.startswith(b"receive;dur=0.001, queue;dur=0.002, ")


# --- the description --------------------------------------------------------------------------------------------


def references(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        if "$ref" in document:
            yield document["$ref"]
        for value in document.values():
            yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


def test_every_route_is_described(bridge: Bridge) -> None:
    told = bridge.ask("GET", "/openapi.json").document
    assert told["openapi"] == "3.1.0"
    routes = [route for route in ROUTES if not route.pattern.startswith("/page/")]
    assert {(path, method.upper()) for path, methods in told["paths"].items() for method in methods} == {
        (route.pattern, route.method) for route in routes
    }
    for route in routes:
        operation = told["paths"][route.pattern][route.method.lower()]
        assert operation["summary"].endswith("."), route.pattern
        names = [parameter["name"] for parameter in operation.get("parameters", ())]
        assert names == re.findall(r"\{(\w+)\}", route.pattern)
        assert ("x-role" in operation) == (route.verb is not None)
    identifiers = [each["operationId"] for path in told["paths"].values() for each in path.values()]
    assert len({*identifiers}) == len(identifiers)
    for name in references(told):
        assert name.rpartition("/")[2] in told["components"]["schemas"]


def test_tokens_are_asked_for_where_a_role_is_needed() -> None:
    paths = openapi.document(ROUTES, tokens=True)["paths"]
    assert paths["/metrics"]["get"]["security"] == [{"token": []}]
    assert "security" not in paths["/"]["get"]
    assert "security" not in openapi.document(ROUTES, tokens=False)["paths"]["/metrics"]["get"]


class Reader(HTMLParser):
    """Reader of a page. Attributes: text: what a user sees. links, targets: where links lead, and may lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.links: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "href" and value:
                self.links.add(value)
            if name == "id" and value:
                self.targets.add(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_description_is_a_page(bridge: Bridge) -> None:
    response = bridge.ask("GET", "/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Reader(response.body.decode())
    for route in ROUTES:
        assert route.pattern in page.text or route.pattern.startswith("/page/")
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.targets
    assert not {link for link in page.links if "//" in link}
    assert "script" not in page.tags


def test_the_description_is_text() -> None:
    document = openapi.document(ROUTES, tokens=False)
    before = Reader(reference.page(document)).tags
    document["paths"]["/metrics"]["get"]["summary"] = "<script>alert(1)</script>"
    page = Reader(reference.page(document))
    assert page.tags == before
    assert "<script>alert(1)</script>" in page.text


# --- the files of the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs", "/page/page.js", "/page/page.css", "/page/icon.svg"])
def test_pages_forbid_what_they_do_not_need(bridge: Bridge, path: str) -> None:
    headers = bridge.ask("GET", path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
