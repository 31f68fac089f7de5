"""The statistics of a soak, with series whose growth is known."""

from __future__ import annotations

import numpy as np
import pytest

from slopes import _student, slope

SECONDS = [float(second) for second in range(0, 3600, 10)]


def noisy(per_hour: float, seed: int) -> list[float]:
    """Load that comes and goes on top of a floor that grows."""
    generator = np.random.default_rng(seed)
    return [
        500.0 + per_hour * second / 3600 + float(generator.exponential(20.0)) + float(generator.normal(0.0, 0.5))
        for second in SECONDS
    ]


def test_growth_is_found_with_about_the_confidence_that_is_claimed() -> None:
    found = [slope(SECONDS, noisy(4.0, seed)) for seed in range(200)]
    assert sum(one.low <= 4.0 <= one.high for one in found) > 180
    assert np.mean([one.per_hour for one in found]) == pytest.approx(4.0, abs=0.5)


def test_what_comes_and_goes_is_no_growth() -> None:
    assert sum(slope(SECONDS, noisy(0.0, seed)).grows_by(1.0) for seed in range(200)) < 20
    assert all(slope(SECONDS, noisy(20.0, seed)).grows_by(8.0) for seed in range(200))


def test_what_stays_as_it_is() -> None:
    assert not slope(SECONDS, [7.0] * len(SECONDS)).grows_by(0.0)


def test_quantiles() -> None:
    assert _student(0.975, 14) == pytest.approx(2.145, abs=0.01)
