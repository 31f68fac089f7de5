"""Spans of a request: one for the whole, below the caller's, and one below it for each stage.

They are made when all is over, with explicit times: OpenTelemetry's own way, a tracer that is asked while things
happen, takes 60 to 80 µs a span.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from tnxctl import __version__
from tnxctl.protocol.timings import StepTiming
from tnxd.tracing.notes import Note, Stages

WHOLE = "predict"
"""Name of the span of a request."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SpanMaker:
    """Maker of spans. What they are from (the resource), OTEL_* variables of the environment may say."""

    def __init__(self) -> None:
        own = Resource.create({"service.name": "tensornext", "service.version": __version__})
        self._resource = own.merge(OTELResourceDetector().detect())
        self._scope = InstrumentationScope("tensornext", __version__)

    def spans(self, note: Note, offset_ns: int) -> list[ReadableSpan]:
        """The spans of a request. Args: offset_ns: of the wall clock's nanoseconds to `time.perf_counter_ns`."""
        _, trace, parent, _ = note.traceparent.split("-")
        caller = SpanContext(int(trace, 16), int(parent, 16), is_remote=True, trace_flags=_SAMPLED)
        status = Status(StatusCode.ERROR, note.message) if note.code else Status()
        attributes: dict[str, str | int | float] = {**note.attributes}
        if note.code:
            attributes["error.type"] = note.code
        begin, end = note.received_ns + offset_ns, note.ended_ns + offset_ns
        whole = self._span(WHOLE, caller, begin, end, attributes, SpanKind.SERVER, status)
        return [whole, *self._below(note, whole, offset_ns)]

    def _below(self, note: Note, whole: ReadableSpan, offset_ns: int) -> Iterator[ReadableSpan]:
        context = whole.context
        if note.queued_ns:
            yield self._span("receive", context, note.received_ns + offset_ns, note.queued_ns + offset_ns)
        finished_ns = 0
        if note.stages is not None:
            finished_ns = note.stages.finished_ns
            yield from self._stages(context, note.queued_ns + offset_ns, note.stages, offset_ns)
        for step in note.steps:
            queued_ns = note.received_ns + int(step.start_us * 1e3)
            stages = _stages_of(step, queued_ns)
            attributes: dict[str, str | int | float] = {
                "tnx.step": step.name,
                "tnx.model": step.model,
                "tnx.version": step.version,
                "tnx.device": step.device,
                "tnx.batch_size": step.batch_size,
            }
            begin, end = queued_ns + offset_ns, stages.finished_ns + offset_ns
            span = self._span(f"step {step.name}", context, begin, end, attributes)
            yield span
            yield from self._stages(span.context, begin, stages, offset_ns)
            finished_ns = max(finished_ns, stages.finished_ns)
        if finished_ns and not note.code:
            yield self._span("reply", context, finished_ns + offset_ns, note.ended_ns + offset_ns)

    def _stages(self, parent: SpanContext, queued_ns: int, stages: Stages, offset_ns: int) -> Iterator[ReadableSpan]:
        """Spans of what a batch went through, one behind the other; those that took no time are left out."""
        begin, end = stages.started_ns + offset_ns, stages.finished_ns + offset_ns
        yield self._span("queue", parent, queued_ns, begin)
        took_us = (stages.gather_us, stages.h2d_us, stages.compute_us)
        edges = [begin]
        for micros in took_us:
            edges.append(min(edges[-1] + int(micros * 1e3), end))
        edges.append(end)
        if not stages.d2h_us:  # all that rounding has left
            edges[-2] = end
        for name, (since, until) in zip(("gather", "h2d", "compute", "d2h"), pairwise(edges), strict=True):
            if until > since:
                yield self._span(name, parent, since, until)

    def _span(
        self,
        name: str,
        parent: SpanContext,
        begin_ns: int,
        end_ns: int,
        attributes: dict[str, str | int | float] | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
    ) -> ReadableSpan:
        span_id = random.getrandbits(64) or 1  # 0 is no id
        return ReadableSpan(
            name,
            SpanContext(parent.trace_id, span_id, is_remote=False, trace_flags=_SAMPLED),
            parent,
            self._resource,
            attributes,
            kind=kind,
            status=status or Status(),
            start_time=begin_ns,
            end_time=max(begin_ns, end_ns),
            instrumentation_scope=self._scope,
        )


def _stages_of(step: StepTiming, queued_ns: int) -> Stages:
    started_ns = queued_ns + int(step.queue_us * 1e3)
    took_us = step.gather_us + step.h2d_us + step.compute_us + step.d2h_us
    finished_ns = started_ns + int(took_us * 1e3)
    return Stages(started_ns, step.gather_us, step.h2d_us, step.compute_us, step.d2h_us, finished_ns)
