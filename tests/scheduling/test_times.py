"""Times in sentences."""

from __future__ import annotations

import math

import pytest

from tnxd.scheduling.times import milliseconds


@pytest.mark.parametrize(
    ("micros", "told"),
    [
        (0.0, "0 ms"),
        (0.04, "0 ms"),
        (523.4, "0.523 ms"),
        (12_345.0, "12.3 ms"),
        (999_400.0, "999 ms"),
        (999_600.0, "1000 ms"),
        (1_250_000.0, "1250 ms"),
        (math.inf, "inf ms"),
    ],
)
def test_milliseconds_have_no_exponents(micros: float, told: str) -> None:
    assert milliseconds(micros) == told
