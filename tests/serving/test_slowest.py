"""The slowest requests: which are kept, for how long, at the cost of one comparison for all others."""

from __future__ import annotations

from typing import Any

import pytest

from tnxctl.protocol.statistics import SlowRequest
from tnxctl.protocol.wire import Timing
from tnxd.serving import slowest
from tnxd.serving.slowest import KEPT_S, MOST, SLOT_S, Slowest


class Clock:
    """Clock that a test sets. Attributes: now: in seconds."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(slowest, "time", made)
    return made


def slow(total_us: float) -> SlowRequest:
    stages: Any = dict.fromkeys(Timing.__struct_fields__, 0.0) | {"total_us": total_us}
    others: Any = dict.fromkeys(SlowRequest.__struct_fields__, 0) | {"id": int(total_us), "timing": Timing(**stages)}
    return SlowRequest(**others)


def offer(kept: Slowest, total_us: float) -> bool:
    """Offer a request as the loop does. Returns whether it was taken."""
    if total_us <= kept.floor_us:
        return False
    kept.add(slow(total_us), "somebody")
    return True


def totals(kept: Slowest) -> list[int]:
    return sorted(request.id for request, _, _ in kept.kept())


def test_the_worst_of_a_slot_are_kept(clock: Clock) -> None:
    kept = Slowest()
    taken = [offer(kept, float(total)) for total in [*range(1, 101), *range(1, 90)]]
    assert totals(kept) == list(range(101 - MOST, 101))
    assert kept.floor_us == 101 - MOST
    assert not any(taken[100:])
    assert offer(kept, 0.5) is False


def test_a_slow_minute_does_not_hide_what_is_slow_later(clock: Clock) -> None:
    kept = Slowest()
    for total in range(1000, 1100):
        offer(kept, float(total))
    ages = []
    for _ in range(6):
        clock.now += SLOT_S
        kept.end_slot()
        assert offer(kept, 7.0)
        ages.append(max(age for _, _, age in kept.kept()))
    assert totals(kept) == [7] * 5
    assert max(ages) <= KEPT_S


def test_nothing_is_left_of_a_version_that_nobody_asks(clock: Clock) -> None:
    kept = Slowest()
    offer(kept, 5.0)
    clock.now += KEPT_S + 0.1
    assert totals(kept) == []
    for _ in range(10):
        kept.end_slot()
    assert not kept._past
    assert offer(kept, 0.0)  # of a request that took no time at all, the first one of a slot is the slowest


def test_requests_of_one_length_can_be_kept(clock: Clock) -> None:
    """Structs have no order: those of equal length must not be compared."""
    kept = Slowest()
    for _ in range(2 * MOST):
        kept.add(slow(5.0), "")
    assert totals(kept) == [5] * MOST
