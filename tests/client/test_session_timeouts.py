"""Timeouts, deadlines and retries of a session: no socket, and a clock that the test holds in its hand."""

from __future__ import annotations

import math

import msgspec
import pytest

from sessions import (
    ENDPOINT,
    X,
    change,
    connected_session,
    header,
    new_session,
    nobody_listens,
    put_off,
    result,
    started,
)
from tnxctl import backoff
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
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


# --- time ----------------------------------------------------------------------------------------------------


def test_calls_expire_each_in_its_time(connected: Session) -> None:
    late, early = started(connected, timeout=3.0, now=10.0), started(connected, timeout=1.0, now=10.0)
    assert connected.next_timer <= 11.0
    assert connected.expire(10.9) == []
    assert connected.expire(11.0) == [early]
    connected.receive([b""], 11.0)
    assert connected.next_timer == 13.0
    with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within 1 s") as caught:
        early.take()
    assert isinstance(caught.value, TimeoutError)
    assert connected.expire(13.0) == [late]
    connected.receive([b""], 13.0)
    assert connected.next_timer == math.inf
    assert connected.receive(result(late), 0.0) is None


def test_answered_calls_do_not_expire(connected: Session) -> None:
    call, other = started(connected, timeout=1.0), started(connected, timeout=9.0)
    connected.receive(result(call), 0.0)
    assert connected.expire(5.0) == []
    assert connected.next_timer == other.expires


def test_a_timeout_without_a_connection_says_so(idle: Session) -> None:
    call = started(idle, timeout=2.5)
    nobody_listens(idle)
    assert idle.expire(2.5) == [call]
    with pytest.raises(
        errors.Unavailable, match=r"tcp://10.0.0.1:5555: no connection within 2.5 s: nobody listens"
    ) as e:
        call.take()
    assert isinstance(e.value, ConnectionError)


@pytest.mark.parametrize(("verb", "patience"), [("load", 600.0), ("unload", 600.0), ("reload", 600.0), ("route", 5.0)])
def test_slow_changes_have_a_long_timeout(connected: Session, verb: str, patience: float) -> None:
    call = change(connected, verb)
    connected.start(call)
    assert connected.next_timer <= patience
    assert connected.expire(patience - 0.1) == []
    assert connected.expire(patience) == [call]
    with pytest.raises(
        errors.DeadlineExceeded, match=rf"did not answer {verb} within {patience:g} s; it may still be at work on it"
    ):
        call.take()


@pytest.mark.parametrize(("timeout", "patience"), [(3.0, 3.0), (None, 3600.0)])
def test_the_timeout_of_a_slow_change(timeout: float | None, patience: float) -> None:
    patient = Session(ENDPOINT, 3600.0, Limits())
    assert change(patient, "load", timeout=timeout).timeout == patience
    with pytest.raises(errors.InvalidArgument, match="timeout nan"):
        change(patient, "load", timeout=math.nan)


@pytest.mark.parametrize(("timeout", "reach"), [(None, 5.0), (60.0, 5.0), (2.0, 2.0)])
def test_a_slow_change_does_not_wait_long_for_a_connection(idle: Session, timeout: float | None, reach: float) -> None:
    call = change(idle, "load", timeout=timeout)
    idle.start(call)
    nobody_listens(idle)
    assert idle.expire(reach - 0.01) == []
    assert idle.next_timer <= reach
    assert idle.expire(reach) == [call]
    with pytest.raises(errors.Unavailable, match=rf"no connection within {reach:g} s: nobody listens there"):
        call.take()


def test_a_change_that_was_sent_waits_for_its_answer(idle: Session) -> None:
    call = change(idle, "load")
    idle.start(call)
    idle.connection.connecting(4.9)
    assert idle.connected(4.95) == [call]
    assert idle.expire(599.0) == []
    late = change(idle, "load", now=599.0)
    assert idle.start(late)
    assert idle.expire(610.0) == [call]
    assert idle.next_timer == 1199.0


# --- deadlines -----------------------------------------------------------------------------------------------


def test_a_call_fails_at_its_deadline(connected: Session) -> None:
    call = started(connected, deadline=0.05, now=10.0)
    assert connected.next_timer <= 10.05
    assert connected.expire(10.049) == []
    assert connected.expire(10.05) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within its deadline of 50 ms"):
        call.take()


def test_the_earlier_of_deadline_and_timeout_counts(connected: Session) -> None:
    call = started(connected, deadline=3.0, timeout=1.0, now=10.0)
    assert connected.expire(11.0) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"predict within 1 s"):
        call.take()


def test_a_deadline_passes_without_a_connection(idle: Session) -> None:
    call = started(idle, deadline=0.5)
    nobody_listens(idle)
    assert idle.expire(0.5) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"no connection within its deadline of 500 ms: nobody listens"):
        call.take()


def test_a_result_after_the_deadline_is_none(connected: Session) -> None:
    in_time, late = started(connected, deadline=0.05), started(connected, deadline=0.05)
    patient = started(connected, timeout=0.05)
    assert connected.receive(result(in_time), 0.049) is in_time
    assert connected.receive(result(late), 0.051) is late
    assert connected.receive(result(patient), 0.051) is patient
    assert in_time.take().batch_size == patient.take().batch_size == 2
    with pytest.raises(errors.DeadlineExceeded, match="its deadline"):
        late.take()


def test_a_late_error_keeps_its_reason(connected: Session) -> None:
    call = started(connected, deadline=0.05)
    connected.receive([wire.encode(wire.ErrorReply(v=1, id=call.id, code="NOT_FOUND", message="no model"))], 0.06)
    with pytest.raises(errors.NotFound, match="no model"):
        call.take()


def test_the_rest_of_a_deadline_is_sent(connected: Session) -> None:
    call, plain = started(connected, deadline=4.0, device="cpu", now=10.0), started(connected, now=10.0)
    before = header(plain)
    for attempt, now, left_us in ((2, 11.0, 3e6), (3, 13.75, 250_000.0)):
        connected.lost()
        connected.connection.connecting(now)
        assert connected.connected(now) == [call, plain]
        assert (header(call).deadline_us, header(call).attempt) == (left_us, attempt)
        assert header(plain) == msgspec.structs.replace(before, attempt=attempt)
    assert header(call).device == "cpu"
    assert call.frames[1] is X


def test_a_connection_that_took_time_took_it_from_the_deadline(idle: Session) -> None:
    call = started(idle, deadline=1.0)
    idle.connection.connecting(0.0)
    assert idle.connected(0.25) == [call]
    assert header(call).deadline_us == 750_000.0


def test_a_deadline_is_never_sent_longer_than_it_may_be(idle: Session) -> None:
    now = 297_980 / 3
    assert now + 86_400 - now > 86_400, "by rounding"
    call = started(idle, deadline=86_400, timeout=1e6, now=now)
    idle.connection.connecting(now)
    idle.connected(now)
    assert header(call).deadline_us == pytest.approx(wire.MAX_DEADLINE_US)


def test_an_expired_call_is_not_sent_again(connected: Session) -> None:
    late, patient = started(connected, deadline=0.05), started(connected)
    connected.lost()
    connected.connection.connecting(0.01)
    assert connected.connected(0.05) == [patient]
    assert connected.expire(0.05) == [late]


# --- a daemon that says when to ask again --------------------------------------------------------------------


def test_a_deferred_call_is_sent_again_and_answered(connected: Session) -> None:
    call = started(connected)
    assert connected.receive(put_off(call), 1.0) is None
    assert not call.done
    assert connected.next_timer == pytest.approx(1.1)
    assert connected.take_retries(1.05) == []
    assert connected.take_retries(1.1) == [call]
    assert connected.take_retries(1.2) == []
    assert connected.receive(result(call), 1.3) is call
    assert call.take().device == "cpu"


def test_a_call_deferred_until_its_timeout_fails_with_the_refusal(connected: Session) -> None:
    call = started(connected, timeout=1.0)
    assert connected.receive(put_off(call), 0.5) is None
    connected.take_retries(0.6)
    assert connected.receive(put_off(call), 0.95) is call  # no time is left for another try
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        call.take()
    unanswered = started(connected, timeout=1.0)
    assert connected.receive(put_off(unanswered), 0.5) is None
    assert connected.expire(1.0) == [unanswered]
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        unanswered.take()


def test_a_deferred_call_says_how_much_of_its_deadline_is_left(connected: Session) -> None:
    call = started(connected, deadline=2.0)
    connected.receive(put_off(call), 0.5)
    (again,) = connected.take_retries(0.6)
    assert header(again).deadline_us == pytest.approx(1.4e6)


@pytest.mark.parametrize(("after_us", "code"), [(None, "UNAVAILABLE"), (100_000.0, "RESOURCE_EXHAUSTED")])
def test_other_refusals_are_final(connected: Session, after_us: float | None, code: str) -> None:
    call = started(connected)
    assert connected.receive(put_off(call, after_us, code), 0.5) is call
    assert call.error is not None


def test_a_deferred_call_goes_out_on_a_new_connection_at_once(connected: Session) -> None:
    call = started(connected)
    connected.receive(put_off(call), 0.5)
    connected.lost()
    connected.connection.connecting(0.51)
    assert connected.connected(0.52) == [call]
    assert connected.take_retries(9.0) == []


def test_a_deferred_call_is_not_sent_before_there_is_a_new_connection(connected: Session) -> None:
    """Else it would go out twice: again as soon as the connection stands."""
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    connected.lost()
    assert connected.take_retries(9.0) == []
    connected.connection.connecting(9.0)
    assert connected.take_retries(9.1) == []
    assert connected.connected(9.2) == [call]


@pytest.mark.parametrize(("timeout", "reach"), [(None, 5.0), (60.0, 5.0), (2.0, 1.4)])
def test_a_deferred_change_does_not_wait_long_for_a_daemon_that_has_gone(
    connected: Session, timeout: float | None, reach: float
) -> None:
    call = change(connected, "load", timeout=timeout)
    connected.start(call)
    assert connected.receive(put_off(call), 0.5) is None
    connected.lost()
    connected.connection.trouble = "nobody listens there"
    assert connected.expire(0.59 + reach) == []
    assert connected.expire(0.61 + reach) == [call]
    within = 5 if reach == 5 else 2
    with pytest.raises(errors.Unavailable, match=rf"got none again within {within} s: nobody listens there"):
        call.take()


def test_a_change_deferred_until_its_timeout_fails_with_the_refusal(connected: Session) -> None:
    call = change(connected, "load", timeout=3.0)
    connected.start(call)
    assert connected.receive(put_off(call, 1e6), 1.9) is None
    assert connected.expire(2.8) == []
    assert connected.expire(3.0) == [call]
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        call.take()


def test_a_change_deferred_and_then_taken_is_not_refused(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    assert connected.take_retries(0.6) == [call]
    assert connected.expire(599.0) == []
    assert connected.expire(600.0) == [call]
    with pytest.raises(errors.DeadlineExceeded, match="did not answer load within 600 s; it may still be at work"):
        call.take()


def test_a_forgotten_call_is_not_sent_again(connected: Session) -> None:
    call = started(connected)
    connected.receive(put_off(call), 0.5)
    connected.forget(call)
    assert connected.take_retries(1.0) == []


def test_an_attempt_that_has_only_begun_hides_not_why_the_last_one_failed(idle: Session) -> None:
    call = started(idle, timeout=2.5)
    idle.connection.connecting(0.0)
    idle.connection.note_trouble("nothing answers", begun=True)
    idle.connection.note_trouble("nobody listens there")
    idle.lost()
    idle.connection.connecting(2.4)
    idle.connection.note_trouble("nothing answers", begun=True)
    idle.expire(2.5)
    with pytest.raises(errors.Unavailable, match="nobody listens there"):
        call.take()


def test_an_attempt_after_a_connection_was_lost_says_what_it_meets(connected: Session) -> None:
    nobody_listens(connected)
    connected.connection.connecting(0.0)
    connected.connected(0.0)
    connected.connection.note_trouble("it closed the connection")
    call = started(connected, timeout=2.5)
    connected.lost()
    connected.connection.connecting(0.1)
    connected.connection.note_trouble("nothing answers", begun=True)
    connected.expire(2.5)
    with pytest.raises(errors.Unavailable, match="nothing answers"):
        call.take()
