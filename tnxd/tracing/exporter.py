"""Thread that makes spans of notes, and sends them to a receiver of OTLP over HTTP: an OpenTelemetry Collector, say."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from tnxd.events import event
from tnxd.tracing.notes import Note, Notes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from tnxd.tracing.spans import SpanMaker

log = logging.getLogger(__name__)

PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")

PATH = "/v1/traces"
"""Path of an endpoint that has none."""

# Often enough that spans are there when somebody looks for them.
_PERIOD_S = 0.5

# Requests whose spans go in one message: to encode them holds the GIL for a millisecond. Twice as many would take a
# quarter less time each.
_BATCH = 8

# The thread takes one part of this many of its time, and leaves the others to those that serve.
_SHARE = 10

_LONGEST_PAUSE_S = 1.0

_TOLD_EVERY_S = 10.0


class Sender(Protocol):
    """Sender of spans; as `SpanExporter` of OpenTelemetry's SDK, as far as it is used."""

    def export(self, spans: Sequence[ReadableSpan]) -> object:
        """Send spans. The name of the result is SUCCESS if they were taken."""

    def shutdown(self) -> None:
        """Close the connection."""


def is_installed() -> bool:
    """Whether what this needs is installed."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def url_of(endpoint: str) -> str:
    """The address that spans are sent to: an endpoint without a path has OTLP's own."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH


class SpanThread:
    """Thread that turns notes into spans.

    It takes at most a tenth of a core, so that it never has the GIL for long: where there is more to record than that,
    or than the receiver takes, notes are dropped and counted.

    Args:
        notes: of requests that are over. connect: makes the sender, on the thread.
    """

    def __init__(self, notes: Notes, connect: Callable[[], Sender]) -> None:
        self._notes = notes
        self._connect = connect
        self._sent = 0
        self._told = 0
        self._next_told_s = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Send what is noted, within so many seconds. What is left then is dropped."""
        self._ends.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(self._notes.noted - self._sent - self._told)

    def _run(self) -> None:
        try:
            from tnxd.tracing.spans import SpanMaker  # imports OpenTelemetry, which takes a while

            maker, sender = SpanMaker(), self._connect()
        except Exception:
            log.exception("no spans are recorded", extra=event("spans_failed"))
            return
        ends = False
        while not ends:
            ends = self._ends.wait(_PERIOD_S)
            while notes := self._notes.take(_BATCH):
                began_s = time.thread_time()
                self._send(maker, sender, notes)
                pause_s = (time.thread_time() - began_s) * (_SHARE - 1)
                self._tell_dropped()
                self._ends.wait(min(pause_s, _LONGEST_PAUSE_S))
            self._tell_dropped(at_once=ends)
        sender.shutdown()

    def _send(self, maker: SpanMaker, sender: Sender, notes: Sequence[Note]) -> None:
        offset_ns = time.time_ns() - time.perf_counter_ns()
        try:
            spans = [span for note in notes for span in maker.spans(note, offset_ns)]
            taken = getattr(sender.export(spans), "name", "") == "SUCCESS"
        except Exception as error:  # whatever it is, the notes to come are none the worse
            log.warning("spans cannot be sent: %s", error, extra=event("spans_failed"))
            taken = False
        if taken:
            self._sent += len(notes)
        else:
            self._notes.lost += len(notes)

    @property
    def dropped(self) -> int:
        """Number of requests whose spans went nowhere."""
        return self._notes.dropped + self._notes.lost

    def _tell_dropped(self, *, at_once: bool = False) -> None:
        count, now = self.dropped - self._told, time.monotonic()
        if count and (at_once or now >= self._next_told_s):
            self._tell(count)
            self._next_told_s = now + _TOLD_EVERY_S

    def _tell(self, count: int) -> None:
        if count > 0:
            self._told += count
            about = event("spans_dropped", count=count)
            log.warning("the spans of %d requests were dropped: the receiver does not take them", count, extra=about)


def otlp_sender(endpoint: str) -> Sender:
    """A sender to an address; what else OTEL_EXPORTER_OTLP_* variables say holds, too: headers, certificates, time."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    sender: Sender = OTLPSpanExporter(url_of(endpoint))
    return sender
