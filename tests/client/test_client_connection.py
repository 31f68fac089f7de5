"""The connection of a session: attempts, losses, and probes where it may be half-open. No socket, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from peers import health_report
from sessions import (
    CHANGES,
    X,
    ask,
    change,
    connected_session,
    new_session,
    predict,
    put_off,
    result,
    started,
)
from tnxctl import backoff, connection, session
from tnxctl.call import Call
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.results import Result
from tnxctl.session import Session


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 0.0)


@pytest.fixture
def idle() -> Session:
    return new_session()


@pytest.fixture
def connected() -> Session:
    return connected_session()


# --- doubts about the daemon ---------------------------------------------------------------------------------


def asked(session: Session) -> int:
    """The id of the question that the session has for the daemon."""
    message = session.probe_message()
    assert message is not None
    question = wire.decode_request(message, Limits())
    assert isinstance(question, wire.Health)
    assert session.probe_message() is None
    return question.id


def report(id_: int, **changes: Any) -> list[bytes]:
    return [wire.encode(msgspec.structs.replace(health_report(id_), **changes))]


def reconnected(session: Session, now: float) -> list[Call[Any]]:
    session.connection.connecting(now)
    return session.connected(now)


def test_a_connection_on_which_nothing_comes_is_given_up(connected: Session) -> None:
    started(connected, timeout=4.0)
    patient = started(connected, timeout=60.0)
    assert connected.probe_message() is None
    assert len(connected.expire(4.0)) == 1
    asked(connected)
    assert not connected.connection.is_half_open(6.0)  # half as long again as the call waited
    assert connected.connection.is_half_open(connected.next_timer)
    assert connected.next_timer == pytest.approx(6.0, abs=1e-3)
    assert connected.give_up() == []
    assert connected.must_connect(6.1)
    assert reconnected(connected, 6.1) == [patient]
    assert patient.losses == 0  # no call is to blame
    assert not connected.connection.is_half_open(9.0)


@pytest.mark.parametrize("message", [[b""], report(10**9), [b"noise"]])
def test_any_message_ends_the_doubt(connected: Session, message: list[bytes]) -> None:
    started(connected, timeout=4.0)
    connected.expire(4.0)
    asked(connected)
    connected.receive(message, 5.0)
    assert not connected.connection.is_half_open(100.0)


def test_the_answer_to_a_probe_finishes_no_call(connected: Session) -> None:
    started(connected, timeout=4.0)
    connected.expire(4.0)
    assert connected.receive(report(asked(connected)), 5.0) is None


def test_a_call_that_times_out_while_others_are_answered_is_no_reason_to_doubt(connected: Session) -> None:
    started(connected, timeout=4.0)
    other = started(connected, timeout=9.0)
    connected.receive(result(other), 3.0)
    connected.expire(4.0)
    assert connected.probe_message() is None
    assert not connected.connection.is_half_open(100.0)


def test_a_call_that_waited_for_the_connection_may_find_it_silent(idle: Session) -> None:
    started(idle, timeout=4.0)
    reconnected(idle, 3.0)
    idle.expire(4.0)
    asked(idle)
    assert idle.connection.is_half_open(6.0)


def test_no_probe_is_sent_without_a_connection(idle: Session) -> None:
    started(idle, timeout=4.0)
    idle.expire(4.0)
    assert idle.probe_message() is None
    assert not idle.connection.is_half_open(100.0)


def test_the_time_to_answer_is_bounded_and_doubles_until_something_comes(connected: Session) -> None:
    waits = []
    for timeout in (0.1, 60.0, 60.0, 60.0):
        started(connected, timeout=timeout)
        connected.expire(timeout)
        waits.append(connected.next_timer - timeout)
        connected.give_up()
        reconnected(connected, 0.0)
    assert waits == pytest.approx([1.0, 10.0, 20.0, 40.0])
    connected.receive([b""], -1.0)
    started(connected, timeout=60.0)
    connected.expire(60.0)
    assert connected.next_timer == 65.0
    for _ in range(20):
        connected.give_up()
        reconnected(connected, 0.0)
    started(connected, timeout=60.0)
    connected.expire(60.0)
    assert connected.next_timer == 60.0 + connection.LAST_PROBE_TIMEOUT_S


def test_a_slow_line_gets_time_for_what_it_carries(connected: Session) -> None:
    started(connected, inputs=np.zeros(30_000_000, "u1"), timeout=900.0)
    started(connected, timeout=2.0)
    connected.expire(2.0)
    assert connected.next_timer == pytest.approx(33.0, abs=0.1)


@pytest.mark.parametrize("verb", ["load", "unload", "route", "reload"])
def test_a_change_keeps_its_connection(connected: Session, verb: str) -> None:
    sent = change(connected, verb, timeout=50.0)
    connected.start(sent)
    started(connected, timeout=4.0)
    connected.expire(4.0)
    assert not connected.connection.is_half_open(49.9)


LARGE = np.zeros(session.LARGE_BYTES, "u1")


def broken_under(session: Session, *inputs: Any) -> list[Call[Result]]:
    calls = [started(session, inputs=array) for array in inputs]
    assert session.lost() == []
    return calls


def test_large_inputs_wait_for_the_limit_of_the_daemon(connected: Session) -> None:
    small, large, larger = broken_under(connected, X, LARGE, np.zeros(2 * LARGE.size, "u1"))
    assert reconnected(connected, 1.0) == [small]
    connected.receive(report(asked(connected), max_message_bytes=LARGE.size), 1.0)
    assert connected.next_timer <= 1.0
    assert connected.expire(1.0) == [larger]
    with pytest.raises(errors.InvalidArgument, match=rf"inputs have {2 * LARGE.size} bytes.*takes {LARGE.size}"):
        larger.take()
    assert connected.take_retries(1.0) == [large]
    assert connected.receive(result(large), 2.0) is large


def refused(id_: int) -> list[bytes]:
    return [wire.encode(wire.ErrorReply(v=1, id=id_, code="UNIMPLEMENTED", message="health?"))]


@pytest.mark.parametrize("answer", [report, refused])
def test_large_inputs_are_sent_again_to_a_daemon_that_names_no_limit(
    connected: Session, answer: Callable[[int], list[bytes]]
) -> None:
    (large,) = broken_under(connected, LARGE)
    assert reconnected(connected, 1.0) == []
    connected.receive(answer(asked(connected)), 1.0)
    assert connected.take_retries(1.0) == [large]


def test_large_inputs_that_wait_may_expire_or_be_withdrawn_or_lose_the_connection_again(connected: Session) -> None:
    late, withdrawn, patient = broken_under(connected, LARGE, LARGE, LARGE)
    assert reconnected(connected, 1.0) == []
    late.next_timeout = 1.5
    connected.forget(withdrawn)
    connected._expiry = 1.5
    assert connected.expire(2.0) == [late]
    assert connected.lost() == []
    assert reconnected(connected, 3.0) == []
    connected.receive(report(asked(connected), max_message_bytes=1 << 30), 3.0)
    assert connected.take_retries(3.0) == [patient]


def test_repeated_losses_name_the_limit_of_an_answer(connected: Session) -> None:
    (call,) = broken_under(connected, X)
    for _ in range(session.MAX_LOSSES - 1):
        reconnected(connected, 1.0)
        connected.lost()
    with pytest.raises(errors.Unavailable, match=r"an answer with a tensor of more than 268435456 bytes would"):
        call.take()


# --- connections ---------------------------------------------------------------------------------------------


def test_no_connection_is_made_before_there_is_a_call(idle: Session) -> None:
    assert not idle.must_connect(100.0)
    assert idle.next_timer == math.inf
    assert not idle.start(predict(idle))
    assert idle.must_connect(0.0)
    assert idle.next_timer == -math.inf


def test_calls_wait_for_the_connection_and_later_ones_do_not(idle: Session) -> None:
    first, second = started(idle), started(idle)
    idle.connection.connecting(0.0)
    assert not idle.must_connect(100.0)
    assert idle.connected(0.0) == [first, second]
    assert idle.start(predict(idle))


def test_unanswered_calls_go_out_again_on_the_next_connection(connected: Session) -> None:
    answered, pending = started(connected), started(connected)
    connected.receive(result(answered), 0.0)
    assert connected.lost() == []
    assert connected.must_connect(1.0)
    connected.connection.connecting(1.0)
    assert connected.connected(1.0) == [pending]
    connected.receive(result(pending), 0.0)
    assert pending.take().batch_size == 2


def test_attempts_come_at_growing_intervals(idle: Session) -> None:
    started(idle, timeout=1e9)
    now, gaps = 0.0, []
    for _ in range(8):
        assert idle.must_connect(now)
        idle.connection.connecting(now)
        idle.lost()
        gaps.append(idle.next_timer - now)
        assert not idle.must_connect(now)
        now = idle.next_timer
    assert gaps == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])


def test_the_first_caller_after_a_pause_does_not_wait_for_a_retry(idle: Session) -> None:
    call = started(idle)
    idle.connection.connecting(0.0)
    idle.lost()
    idle.forget(call)
    assert not idle.must_connect(0.0)
    started(idle)
    assert idle.must_connect(0.0)


def test_a_call_under_which_connections_keep_breaking_is_given_up(connected: Session) -> None:
    call = started(connected, timeout=1e9)
    connected.connection.trouble = "it closed the connection"
    for attempt in range(session.MAX_LOSSES - 1):
        assert connected.lost() == []
        connected.connection.connecting(float(attempt))
        assert connected.lost() == []  # never stood, so took nothing with it
        connected.connection.connecting(float(attempt))
        connected.connected(1.0)
    assert connected.lost() == [call]
    with pytest.raises(errors.Unavailable, match="broke 3 times while predict was under way: it closed"):
        call.take()
    assert connected.idle


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_is_not_sent_again(connected: Session, verb: str) -> None:
    call, harmless = change(connected, verb), started(connected)
    connected.start(call)
    connected.connection.trouble = "it closed the connection"
    assert connected.lost() == [call]
    with pytest.raises(
        errors.Unavailable, match=f"broke while {verb} was under way: it closed.*whether it has changed .* is not known"
    ):
        call.take()
    connected.connection.connecting(0.0)
    assert connected.connected(0.1) == [harmless]


def test_a_query_is_sent_again(connected: Session) -> None:
    calls = [ask(connected, verb) for verb in ("models", "compare")]
    assert connected.lost() == []
    connected.connection.connecting(0.0)
    assert connected.connected(0.1) == calls


def test_a_deferred_change_has_changed_nothing_and_is_sent_again(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    assert connected.receive(put_off(call), 0.5) is None
    assert connected.lost() == [], "the daemon drains, and another takes its place"
    connected.connection.connecting(0.6)
    assert connected.connected(0.7) == [call]
    assert connected.lost() == [call]


def test_a_deferred_change_sent_again_is_under_way(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    assert connected.take_retries(0.6) == [call]
    assert connected.lost() == [call]


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_is_not_cancelled(connected: Session, verb: str) -> None:
    call = change(connected, verb)
    connected.start(call)
    connected.forget(call)
    assert connected.cancel_message(call) is None


def test_closing_the_own_side_blames_no_call(connected: Session) -> None:
    call = started(connected)
    for _ in range(10):
        assert connected.disconnected() == []
        connected.connection.connecting(0.0)
        assert connected.connected(1.0) == [call]


@pytest.mark.parametrize("verb", CHANGES)
def test_no_change_is_sent_again_after_closing_the_own_side(connected: Session, verb: str) -> None:
    call, harmless = change(connected, verb), started(connected)
    connected.start(call)
    connected.connection.trouble = "an error closed it"
    assert connected.disconnected() == [call]
    with pytest.raises(errors.Unavailable, match=f"while {verb} was under way: an error closed it; whether it has"):
        call.take()
    connected.connection.connecting(0.0)
    assert connected.connected(1.0) == [harmless]


def test_closing_the_own_side_keeps_the_changes_that_have_not_been_carried_out(idle: Session) -> None:
    waiting = change(idle, "load")
    idle.start(waiting)
    idle.connection.connecting(0.0)
    assert idle.disconnected() == [], "it was never sent"
    idle.connection.connecting(0.0)
    assert idle.connected(0.1) == [waiting]
    assert idle.receive(put_off(waiting), 0.2) is None
    assert idle.disconnected() == [], "it was refused"
    idle.connection.connecting(0.2)
    assert idle.connected(0.3) == [waiting]
