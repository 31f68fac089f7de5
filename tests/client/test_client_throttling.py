"""Client-side throttling: windows of calls that a daemon refused for want of time. No socket, no clock."""

from __future__ import annotations

from typing import Any

import pytest

from sessions import (
    connected_session,
    new_session,
    predict,
    result,
    started,
)
from tnxctl.call import Call
from tnxctl.protocol import errors, wire
from tnxctl.session import Session


@pytest.fixture
def idle() -> Session:
    return new_session()


@pytest.fixture
def connected() -> Session:
    return connected_session()


def refused(call: Call[Any], *, retry_after_us: float | None = 2000.0, code: str = "DEADLINE_EXCEEDED") -> list[bytes]:
    reply = wire.ErrorReply(v=1, id=call.id, code=code, message="it cannot be done", retry_after_us=retry_after_us)
    return [wire.encode(reply)]


def test_refusals_for_want_of_time_shrink_the_window(connected: Session) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(20)]
    for call in calls[10:]:
        connected.receive(refused(call), 0.0)
    outcomes = []
    for _ in range(20):
        call = predict(connected, deadline=1.0)
        connected.start(call)
        outcomes.append(call.error)
    assert outcomes[-1] is not None
    assert isinstance(outcomes[-1], errors.DeadlineExceeded)
    assert "not sent" in str(outcomes[-1])
    assert "it cannot be done" in str(outcomes[-1])
    assert outcomes[-1].retry_after_s == 0.002
    for call in calls[:10]:
        connected.receive(result(call), 0.0)
    started(connected, deadline=1.0)


def test_one_late_answer_holds_no_handful_of_callers_back(connected: Session) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(8)]
    connected.receive(refused(calls[0]), 0.0)
    started(connected, deadline=1.0)


@pytest.mark.parametrize("arguments", [{}, {"deadline": 0.01}, {"deadline": 1.0, "priority": 0}])
def test_calls_unlike_the_refused_ones_are_sent(connected: Session, arguments: dict[str, Any]) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(20)]
    for call in calls[2:]:
        connected.receive(refused(call), 0.0)
    for _ in range(100):
        started(connected, **arguments)


@pytest.mark.parametrize(
    "reply",
    [{"retry_after_us": None}, {"code": "INVALID_ARGUMENT"}, {"code": "UNAVAILABLE", "retry_after_us": None}],
)
def test_a_refusal_that_is_not_for_want_of_time_holds_up_nobody(connected: Session, reply: dict[str, Any]) -> None:
    for _ in range(20):
        connected.receive(refused(started(connected, deadline=1.0), **reply), 0.0)
    for _ in range(100):
        started(connected, deadline=1.0)


def test_calls_that_end_otherwise_leave_the_window(connected: Session) -> None:
    for _ in range(50):
        first, second = started(connected, deadline=1.0), started(connected, deadline=1.0)
        connected.receive(refused(first), 0.0)
        connected.forget(second)
    for at in range(1, 50):
        call = started(connected, deadline=1.0, now=2.0 * at)
        connected.expire(call.expires)
    started(connected, deadline=1.0, now=101.0)
