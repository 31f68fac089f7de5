"""Traces of a real daemon: spans of sampled requests arrive at a receiver of OTLP, below those of the callers."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from daemons import PATIENT, Running, running
from dealer import Dealer
from python_models import DOUBLES, put, rows
from tnxctl import AsyncClient, Client
from tnxctl.protocol.errors import DeadlineExceeded, Internal, NotFound
from tnxd.tracing.exporter import is_installed

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="opentelemetry-exporter-otlp-proto-http is not installed: the extra otel has it"
)

FAILS = """
class Model:
    def predict(self, x):
        if (x == 7).any(): raise ValueError("seven")
        return {"y": x * 2}
"""

PIPELINE = """
inputs = ["x"]
[[steps]]
name = "first"
model = "doubles"
inputs = { x = "x" }
[[steps]]
name = "second"
model = "fails"
inputs = { x = "first.y" }
[outputs]
y = "second.y"
"""

SETTINGS = "max_batch_size = 8\nwarm_up = [1]\naudit = 0\n"

ALLOWANCE_NS = 50_000_000
"""Two clocks of one machine, of which one is converted to the other now and then."""


class Span(NamedTuple):
    """Span as it arrived. Ids in hexadecimal digits, times in nanoseconds since the epoch."""

    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    message: str
    service: str


class Receiver(http.server.ThreadingHTTPServer):
    """Receiver of OTLP over HTTP, which keeps what arrives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Span] = []
        self.arrived = threading.Condition()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def below(self, parent: str) -> list[Span]:
        return [span for span in self.spans if span.parent == parent]

    def of(self, traceparent: str) -> Span:
        """The span of the request that had this traceparent, once it has arrived."""
        _, trace, parent, _ = traceparent.split("-")
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.below(parent), 60), "no span arrived"
            [span] = self.below(parent)
        assert (span.name, span.trace) == ("predict", trace)
        return span

    def ended(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Decodes requests for a `Receiver`."""

    server: Receiver

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        with self.server.arrived:
            for resource in request.resource_spans:
                service = attributes(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.server.spans += [span_of(span, service) for span in scope.spans]
            self.server.arrived.notify_all()
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def span_of(span: Any, service: str) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        attributes(span.attributes),
        span.status.code == 2,
        span.status.message,
        service,
    )


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.ended()


@pytest.fixture(scope="module")
def daemon(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("traces")
    models = folder / "models"
    put(models, DOUBLES, name="doubles", settings=SETTINGS)
    put(models, FAILS, name="fails", settings=SETTINGS)
    (models / "both" / "1").mkdir(parents=True)
    (models / "both" / "1" / "pipeline.toml").write_text(PIPELINE)
    arguments = ("--model-repository", str(models), "--devices", "cpu", "--otel", receiver.endpoint)
    with running(folder, *arguments) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            dealer.await_health(status="ready")
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture
def client(daemon: Running) -> Iterator[Client]:
    with Client(daemon.endpoint, timeout=60) as client:
        yield client


def new_traceparent(name: str, flags: str = "01") -> str:
    """A traceparent of its own for each test."""
    text = name.encode().hex()
    return f"00-{text[:32]:a<32}-{text[-16:]:b>16}-{flags}"


def check_below(span: Span, stages: list[Span]) -> None:
    """Check that stages are below a span, within its time, and none before the one before it has ended."""
    at = span.begin
    for stage in sorted(stages, key=lambda stage: (stage.begin, stage.end)):
        assert (stage.parent, stage.trace) == (span.id, span.trace)
        assert at <= stage.begin <= stage.end <= span.end
        at = stage.end


def test_request_is_a_span_below_that_of_its_caller_with_its_stages(client: Client, receiver: Receiver) -> None:
    traceparent = new_traceparent("request")
    began = time.time_ns()
    result = client.predict(rows(1, 2), model="doubles", traceparent=traceparent)
    ended = time.time_ns()
    span = receiver.of(traceparent)
    assert began - ALLOWANCE_NS <= span.begin <= span.end <= ended + ALLOWANCE_NS
    shown = {name: span.attributes[f"tnx.{name}"] for name in ("model", "version", "device", "batch_size", "rows")}
    assert shown == {"model": "doubles", "version": "1", "device": "cpu", "batch_size": 2, "rows": 2}
    assert (span.failed, span.service, span.attributes["tnx.reason"]) == (False, "tensornext", result.reason)
    stages = receiver.below(span.id)
    assert {"receive", "queue", "compute", "reply"} <= {stage.name for stage in stages}
    check_below(span, stages)
    assert sum(stage.end - stage.begin for stage in stages) == span.end - span.begin
    [compute] = [stage for stage in stages if stage.name == "compute"]
    assert (compute.end - compute.begin) / 1e3 == pytest.approx(result.timing.compute_us, abs=2)


def test_span_of_the_application_is_the_parent(client: Client, daemon: Running, receiver: Receiver) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")

    async def ask() -> None:
        async with AsyncClient(daemon.endpoint, timeout=60) as other:
            await other.predict(rows(1), model="doubles")

    expected = []
    with tracer.start_as_current_span("call") as span:
        client.predict(rows(1), model="doubles")
        expected.append(span.get_span_context())
    with tracer.start_as_current_span("call") as span:
        client.submit(rows(1), model="doubles").result()
        expected.append(span.get_span_context())
    with tracer.start_as_current_span("call") as span:
        asyncio.run(ask())
        expected.append(span.get_span_context())
    for context in expected:
        receiver.of(f"00-{context.trace_id:032x}-{context.span_id:016x}-01")


def test_unsampled_and_malformed_ones_are_answered_and_not_recorded(daemon: Running, receiver: Receiver) -> None:
    unsampled, good = new_traceparent("unsampled", "00"), new_traceparent("good")
    with Dealer(daemon.endpoint) as dealer:
        for traceparent in (unsampled, "", "garbage", good[:-1], unsampled.upper(), good):
            dealer.predict(rows(1), names=["x"], model="doubles", traceparent=traceparent)
            dealer.result()
        dealer.predict(rows(1), names=["x"], model="doubles", traceparent="x" * 300)
        assert dealer.error().code == "INVALID_ARGUMENT"
    receiver.of(good)  # which came last
    assert not receiver.below(unsampled.split("-")[2])
    assert {span.trace for span in receiver.spans}.isdisjoint({unsampled.split("-")[1]})


def test_errors_are_recorded_with_their_code(client: Client, receiver: Receiver) -> None:
    raised, refused, late = new_traceparent("raised"), new_traceparent("refused"), new_traceparent("late")
    with pytest.raises(Internal):
        client.predict(rows(7), model="fails", traceparent=raised)
    with pytest.raises(NotFound):
        client.predict(rows(7), model="nowhere", traceparent=refused)
    with pytest.raises(DeadlineExceeded):
        client.predict(rows(7), model="fails", deadline=1e-6, traceparent=late)
    span = receiver.of(raised)
    assert (span.failed, span.attributes["error.type"]) == (True, "INTERNAL")
    assert "seven" in span.message
    stages = receiver.below(span.id)
    assert {"receive", "queue", "compute"} <= {stage.name for stage in stages}
    check_below(span, stages)
    span = receiver.of(refused)
    assert (span.attributes["error.type"], span.attributes["tnx.model"]) == ("NOT_FOUND", "nowhere")
    assert receiver.below(span.id) == []


def test_steps_of_a_pipeline_are_below_it(client: Client, receiver: Receiver) -> None:
    traceparent, failed = new_traceparent("pipeline"), new_traceparent("broken pipe")
    client.predict(rows(1), model="both", traceparent=traceparent)
    with pytest.raises(Internal):
        client.predict(rows(3.5), model="both", traceparent=failed)
    span = receiver.of(traceparent)
    assert (span.attributes["tnx.model"], span.attributes["tnx.device"]) == ("both", "cpu")
    stages = receiver.below(span.id)
    check_below(span, stages)
    assert [stage.name for stage in stages] == ["receive", "step first", "step second", "reply"]
    for step, model in zip(stages[1:3], ("doubles", "fails"), strict=True):
        assert (step.attributes["tnx.model"], step.attributes["tnx.batch_size"]) == (model, 1)
        check_below(step, receiver.below(step.id))
        assert {"queue", "compute"} <= {stage.name for stage in receiver.below(step.id)}
    span = receiver.of(failed)
    assert [stage.name for stage in receiver.below(span.id)] == ["receive", "step first"]
    assert span.attributes["error.type"] == "INTERNAL"


def answer_garbage(listening: socket.socket) -> None:
    """Answer whatever comes with what is no HTTP, until the socket is closed."""
    with contextlib.suppress(OSError):
        while True:
            with listening.accept()[0] as peer:
                peer.recv(1 << 16)
                peer.sendall(b"\x00\xff garbage\r\n" * 1000)


@pytest.mark.parametrize("answers", [False, True], ids=["silent", "garbage"])
def test_bad_receiver_costs_no_answer_and_what_is_dropped_is_told(tmp_path: Path, answers: bool) -> None:
    """It takes connections and answers none, which is worse than one that refuses them; or it answers nonsense."""
    put(tmp_path / "models", DOUBLES, name="doubles", settings=SETTINGS)
    with socket.create_server(("127.0.0.1", 0)) as bad:
        if answers:
            threading.Thread(target=answer_garbage, args=(bad,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{bad.getsockname()[1]}"
        arguments = ("--model-repository", str(tmp_path / "models"), "--devices", "cpu", "--otel", endpoint)
        surroundings = {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.2"}
        config = 'log_format = "json"\n'
        with running(tmp_path, *arguments, program=PATIENT, config=config, environment=surroundings) as daemon:
            with Client(daemon.endpoint, timeout=60) as client, Dealer(daemon.endpoint) as dealer:
                dealer.await_health(status="ready")  # else what is refused until then is recorded, too
                for _ in range(50):
                    client.predict(rows(1), model="doubles", traceparent=new_traceparent("bad"))
                while client.stats().spans_dropped < 50:  # the test's own time limit ends this
                    time.sleep(0.02)
                assert client.stats().spans_dropped == 50
            assert daemon.stop() == 0
            told = [json.loads(line) for line in daemon.log.splitlines()]
    assert sum(event["count"] for event in told if event["event"] == "spans_dropped") == 50


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")  # hides the packages of that name
    assert importlib.util.find_spec("opentelemetry") is not None
    surroundings = {"PYTHONPATH": str(tmp_path)}
    with running(tmp_path, "--model", "mlp", "--otel", environment=surroundings, binds=False) as daemon:
        assert daemon.process.wait(60) == 1
        assert "opentelemetry-sdk" in daemon.log
        assert daemon.log.count("\n") == 1
