"""Traceparent: the span that a request belongs to, in text (W3C Trace Context, https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re

LENGTH = 55
"""Characters of a traceparent of version 00. Later versions begin so, and may go on behind a dash."""

# The last bit of the flags says that the caller records the trace.
_SAMPLED = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][13579bdf]")


def sampled(traceparent: str) -> str:
    """The 55 characters of a traceparent whose trace is recorded; "" of another one, and of what is none."""
    head = traceparent[:LENGTH]
    if _SAMPLED.fullmatch(head) is None:
        return ""
    ends = len(traceparent) == LENGTH or (not head.startswith("00") and traceparent[LENGTH] == "-")
    return head if ends else ""
