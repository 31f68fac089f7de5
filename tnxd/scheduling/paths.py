"""Paths: predictions for requests that wait for each other, and what of their deadline is left for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import NamedTuple


class Outlook(NamedTuple):
    """Prediction for one request, in microseconds.

    Attributes:
        wait_us: until its batch starts. run_us: of that batch. spread_us: above that, what is rarely exceeded.
        reserve: part of the time that is kept free where it has to wait, see `Forecast`.
    """

    wait_us: float
    run_us: float
    spread_us: float
    reserve: float


class PathPrediction(NamedTuple):
    """Prediction for several requests, the longest path through them.

    Attributes:
        total_us: until the last one is done. margin_us: above that, what a promise needs.
        after_us: for each of them, the least that those behind it take: if nothing waits.
    """

    total_us: float
    margin_us: float
    after_us: list[float]


def predict_path(
    order: Sequence[int], before: Sequence[Sequence[int]], behind: Sequence[Sequence[int]], outlooks: Sequence[Outlook]
) -> PathPrediction:
    """Predict requests of which each starts when all before it are done.

    The waits are those of now: what waits today in the queue of a later one will be gone when its turn comes, and as
    much will have come. Deviations are independent of each other, and add up as squares do.

    Args:
        order: places of the requests, each behind those that it waits for.
        before, behind: for each of them, places of those that it waits for, and that wait for it.
        outlooks: for each of them.
    """
    done = [(0.0, 0.0, 0.0)] * len(outlooks)  # until it is done, with deviations, and what is kept free
    for place in order:
        wait_us, run_us, spread_us, reserve = outlooks[place]
        begin_us, deviation_us, kept_us = max([done[other] for other in before[place]], default=(0.0, 0.0, 0.0))
        if wait_us:
            kept_us += (wait_us + run_us) * reserve / (1.0 - reserve)
        done[place] = begin_us + wait_us + run_us, hypot(deviation_us, spread_us), kept_us
    after_us = [0.0] * len(outlooks)
    for place in reversed(order):
        after_us[place] = max([outlooks[other].run_us + after_us[other] for other in behind[place]], default=0.0)
    total_us, deviation_us, kept_us = max(done)
    return PathPrediction(total_us, deviation_us + kept_us, after_us)
