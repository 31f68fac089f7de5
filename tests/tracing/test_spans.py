"""Spans that are made of notes, and the thread that sends them, without a daemon."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tnxctl.protocol.timings import StepTiming
from tnxd.tracing.exporter import SpanThread, url_of
from tnxd.tracing.notes import Note, Notes, Stages

pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

TRACEPARENT = f"00-{TRACE}-{PARENT}-01"

OFFSET_NS = 1_000_000_000_000

STAGES = Stages(4_000, 1.0, 0.0, 5.0, 0.0, 10_000)


def note(**fields: Any) -> Note:
    """Note of a request that was received at 1,000 ns and answered at 12,000."""
    return Note(**{"traceparent": TRACEPARENT, "attributes": {}, "received_ns": 1000, "ended_ns": 12_000, **fields})


def spans_of(one: Note) -> list[ReadableSpan]:
    from tnxd.tracing.spans import SpanMaker

    return SpanMaker().spans(one, OFFSET_NS)


def times(span: ReadableSpan) -> tuple[str, int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.name, span.start_time - OFFSET_NS, span.end_time - OFFSET_NS


def test_span_is_below_that_of_the_caller() -> None:
    [whole] = spans_of(note(attributes={"tnx.model": "net"}))
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent is not None
    assert (f"{whole.parent.span_id:016x}", whole.parent.is_remote) == (PARENT, True)
    assert (whole.name, whole.kind, dict(whole.attributes or {})) == ("predict", SpanKind.SERVER, {"tnx.model": "net"})
    assert times(whole) == ("predict", 1000, 12_000)


def test_stages_follow_one_another_without_gaps() -> None:
    whole, *stages = spans_of(note(queued_ns=2000, stages=STAGES))
    assert [times(stage) for stage in stages] == [
        ("receive", 1000, 2000),
        ("queue", 2000, 4000),
        ("gather", 4000, 5000),
        ("compute", 5000, 10_000),
        ("reply", 10_000, 12_000),
    ]
    assert {stage.parent.span_id for stage in stages if stage.parent} == {whole.context.span_id}
    assert len({span.context.span_id for span in (whole, *stages)}) == 6


def test_stages_of_a_gpu_end_with_the_batch() -> None:
    stages = Stages(4_000, 1.0, 0.5, 3.0, 1.4999, 10_000)
    names = [times(span) for span in spans_of(note(queued_ns=2000, stages=stages))]
    assert names[3:7] == [("gather", 4000, 5000), ("h2d", 5000, 5500), ("compute", 5500, 8500), ("d2h", 8500, 10_000)]


def test_error_has_its_code_and_no_reply() -> None:
    failed = note(queued_ns=2000, stages=STAGES, code="INTERNAL", message="it raised")
    whole, *stages = spans_of(failed)
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "it raised")
    assert (whole.attributes or {})["error.type"] == "INTERNAL"
    assert [stage.name for stage in stages] == ["receive", "queue", "gather", "compute"]


def test_refused_request_has_one_span() -> None:
    assert [span.name for span in spans_of(note(code="NOT_FOUND", message="no model"))] == ["predict"]


def test_steps_of_a_pipeline_have_their_stages_below_them() -> None:
    def step(name: str, start_us: float) -> StepTiming:
        shown = {"name": name, "model": "net", "version": "2", "device": "cpu", "batch_size": 8}
        took = {"queue_us": 0.5, "gather_us": 0.0, "h2d_us": 0.0, "compute_us": 2.0, "d2h_us": 0.0}
        return StepTiming(**shown, start_us=start_us, **took)  # type: ignore[arg-type]

    whole, *rest = spans_of(note(queued_ns=2000, steps=(step("a", 1.0), step("b", 4.0))))
    assert [times(span) for span in rest] == [
        ("receive", 1000, 2000),
        ("step a", 2000, 4500),
        ("queue", 2000, 2500),
        ("compute", 2500, 4500),
        ("step b", 5000, 7500),
        ("queue", 5000, 5500),
        ("compute", 5500, 7500),
        ("reply", 7500, 12_000),
    ]
    parents = [span.parent.span_id for span in rest if span.parent]
    top = whole.context.span_id
    a, b = rest[1].context.span_id, rest[4].context.span_id
    assert parents == [top, top, a, a, top, b, b, top]


def test_variables_of_opentelemetry_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spans_of(note())[0].resource.attributes["service.name"] == "tensornext"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vision")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=night")
    attributes = spans_of(note())[0].resource.attributes
    assert (attributes["service.name"], attributes["deployment.environment"]) == ("vision", "night")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://tempo.example/otlp/v1/traces", "https://tempo.example/otlp/v1/traces"),
    ],
)
def test_endpoint_without_a_path_gets_that_of_otlp(endpoint: str, url: str) -> None:
    assert url_of(endpoint) == url


# --- the thread ----------------------------------------------------------------------------------------------


class Sender:
    """Receiver of spans in the same process, which takes them once it may."""

    def __init__(self, *, open: bool = True, fails: bool = False) -> None:
        self.spans: list[ReadableSpan] = []
        self.asked, self.may_go_on = threading.Event(), threading.Event()
        self.closed = False
        self._fails = fails
        if open:
            self.may_go_on.set()

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.asked.set()
        self.may_go_on.wait()
        if self._fails:
            raise OSError("no route to host")
        self.spans += spans
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.closed = True


def test_all_that_is_noted_is_sent_before_the_end() -> None:
    notes, sender = Notes(), Sender()
    for _ in range(100):
        notes.put(note())
    thread = SpanThread(notes, lambda: sender)
    thread.close(20)
    assert len(sender.spans) == 100
    assert (thread.dropped, sender.closed, len(notes)) == (0, True, 0)


def test_slow_receiver_holds_nobody_up_and_what_is_dropped_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    notes, sender = Notes(most=10), Sender(open=False)
    thread = SpanThread(notes, lambda: sender)
    notes.put(note())
    assert sender.asked.wait(60)
    for _ in range(100):  # none of which waits
        notes.put(note())
    assert (len(notes), notes.dropped) == (10, 90)
    thread.close(0.05)  # nor does the end
    assert [record.getMessage() for record in caplog.records if record.name == "tnxd.tracing.exporter"] == [
        "the spans of 101 requests were dropped: the receiver does not take them"
    ]
    sender.may_go_on.set()
    thread.close(20)
    assert (len(sender.spans), thread.dropped) == (11, 90)


def test_receiver_that_fails_loses_its_spans_and_the_thread_goes_on() -> None:
    notes, sender = Notes(), Sender(fails=True)
    thread = SpanThread(notes, lambda: sender)
    for _ in range(40):
        notes.put(note())
    thread.close(20)
    assert (sender.spans, thread.dropped, sender.closed) == ([], 40, True)


def test_note_of_which_no_span_can_be_made_costs_no_others() -> None:
    notes, sender = Notes(), Sender()
    notes.put(note(traceparent="none"))
    for _ in range(40):
        notes.put(note())
    thread = SpanThread(notes, lambda: sender)
    thread.close(20)
    assert len(sender.spans) + thread.dropped == 41
    assert 0 < thread.dropped < 41
