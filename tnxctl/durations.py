"""Spans of time as people write and read them: 500us, 20ms, 2s."""

from __future__ import annotations

import re

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}  # two characters look like "µ"
_DURATION = re.compile(rf"(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*(?P<unit>{'|'.join(_SECONDS)})")


def read(text: str) -> float | None:
    """The seconds that a span has: of a number with its unit, or of a number alone. None: it is neither."""
    found = _DURATION.fullmatch(text.strip())
    return None if found is None else float(found["number"]) * _SECONDS[found["unit"]]


def spell(seconds: float) -> str:
    """A span in the unit that suits it: "2.5 s", "20 ms", "1 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 1e-6:g} us"
