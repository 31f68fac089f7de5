"""Times in sentences about requests."""

from __future__ import annotations


def milliseconds(micros: float) -> str:
    """Microseconds as milliseconds: "0.523 ms", "12.3 ms", "1250 ms"."""
    ms = round(micros / 1e3, 3)  # what is shorter than a microsecond is none
    return f"{ms:.3g} ms" if abs(ms) < 999.5 else f"{ms:.0f} ms"
