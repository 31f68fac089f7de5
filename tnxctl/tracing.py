"""Trace context of a call: from OpenTelemetry where the application uses it, or as it is given by hand."""

from __future__ import annotations

import sys

from tnxctl.arguments import check_string
from tnxctl.protocol.traceparent import sampled


def traceparent_of(given: str | None) -> str:
    """The traceparent that goes with a request; "" for none.

    Args:
        given: by the caller. One that is malformed, or whose trace is not recorded, counts as none, as W3C Trace
            Context wants it. None: that of OpenTelemetry's current span, where its API has been imported.

    Raises:
        InvalidArgument: it is no string.
    """
    if given is not None:
        return sampled(check_string("traceparent", given))
    api = sys.modules.get("opentelemetry.trace")  # which is not imported here: who has no spans pays nothing
    if api is None:
        return ""
    current = getattr(api, "get_current_span", None)
    if current is None:  # another thread is importing it
        return ""
    context = current().get_span_context()
    if not (context.is_valid and context.trace_flags & 1):
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
