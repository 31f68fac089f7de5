"""Trace context of a call: what OpenTelemetry's current span, or a caller, gives to a request."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from sessions import header, new_session, predict
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.traceparent import sampled
from tnxctl.tracing import traceparent_of

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "garbage",
        GOOD[:-1],
        GOOD + "0",
        GOOD + "-00",  # version 00 ends there
        GOOD.upper(),
        GOOD.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        GOOD.replace("b7ad6b7169203331", "0" * 16),
        "ff" + GOOD[2:],
        GOOD.replace("-", "_"),
        GOOD + "\n",
        "\ud800" * 55,
        GOOD[:-2] + "00",  # not sampled
        GOOD[:-2] + "02",
    ],
)
def test_malformed_or_unsampled_one_counts_as_none(malformed: str) -> None:
    assert sampled(malformed) == ""
    assert traceparent_of(malformed) == ""


@pytest.mark.parametrize("given", [GOOD, GOOD[:-2] + "03", GOOD[:-2] + "ff"])
def test_sampled_one_goes_with_the_request(given: str) -> None:
    assert traceparent_of(given) == given
    assert header(predict(new_session(), traceparent=given)).traceparent == given


def test_later_version_is_read_as_far_as_it_is_known() -> None:
    later = "cc" + GOOD[2:]
    assert sampled(later) == sampled(later + "-what-else") == later
    assert sampled(later + ".") == ""


def test_without_one_nothing_is_sent() -> None:
    assert "traceparent" not in msgspec.msgpack.decode(predict(new_session()).frames[0])


@pytest.mark.parametrize("given", [7, b"00", GOOD.split("-")])
def test_what_is_no_string_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgument, match="traceparent"):
        traceparent_of(given)


def test_client_does_not_import_opentelemetry() -> None:
    code = (
        "import sys, tnxctl.client, tnxctl.aio; from tnxctl.tracing import traceparent_of;"
        "print(traceparent_of(None) == '', [name for name in sys.modules if 'telemetry' in name])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "True []"


def test_current_span_goes_with_the_request() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    assert traceparent_of(None) == ""
    with sdk.TracerProvider().get_tracer("test").start_as_current_span("call") as span:
        context = span.get_span_context()
        expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert traceparent_of(None) == sampled(expected) == expected
        assert traceparent_of("") == ""
        assert traceparent_of(GOOD) == GOOD
    with sdk.TracerProvider(sampler=ALWAYS_OFF).get_tracer("test").start_as_current_span("call"):
        assert trace.get_current_span().get_span_context().is_valid
        assert traceparent_of(None) == ""
