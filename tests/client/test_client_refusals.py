"""Sessions that are not let in: what fails, when, and what is tried again. No socket, no clock."""

from __future__ import annotations

import errno

import pytest
import zmq

from sessions import CHANGES, change, connected_session, new_session, nobody_listens, predict, started
from tnxctl import connection, handshakes
from tnxctl.keys.credentials import Credentials
from tnxctl.protocol.errors import DeadlineExceeded, Unauthenticated, Unavailable
from tnxctl.session import Session

SHOWN = Credentials("alice", "PUBLIC", "SECRET", "SERVER", "known_hosts.toml")


@pytest.fixture
def idle() -> Session:
    return new_session()


def handshake_fails(session: Session, *, refused: bool = False) -> int:
    """An attempt meets somebody who does not finish the handshake. Returns how many calls have failed."""
    session.connection.connecting(0.0)
    session.connection.handshake_begun(0.0)
    session.connection.note_trouble("no key will do")
    session.connection.handshake_failed(refused=refused)
    return len(session.lost())


def test_a_refusal_fails_all_that_is_under_way(idle: Session) -> None:
    calls = [started(idle) for _ in range(3)]
    assert handshake_fails(idle, refused=True) == 3
    assert idle.idle
    for call in calls:
        with pytest.raises(Unauthenticated, match=r"^tcp://10\.0\.0\.1:5555: no key will do$"):
            call.take()


@pytest.mark.parametrize("verb", CHANGES)
def test_a_refusal_fails_what_would_have_changed_the_daemon(verb: str) -> None:
    session = connected_session()
    session.lost()
    session.start(change(session, verb))
    assert handshake_fails(session, refused=True) == 1


def test_a_later_call_tries_anew_and_at_once(idle: Session) -> None:
    started(idle)
    handshake_fails(idle, refused=True)
    assert not idle.must_connect(0.0)
    call = started(idle)
    assert idle.must_connect(0.0)
    idle.connection.connecting(0.0)
    assert idle.connected(0.0) == [call]
    assert not idle.lost()


def test_handshakes_may_fail_for_another_reason_but_not_again_and_again(idle: Session) -> None:
    started(idle, timeout=1e9)
    for _ in range(connection.MAX_FAILED_HANDSHAKES - 1):
        assert not handshake_fails(idle)
    assert handshake_fails(idle) == 1
    started(idle, timeout=1e9)
    assert handshake_fails(idle) == 1  # nothing has changed since


def test_a_daemon_that_is_gone_for_a_while_may_fail_as_often_again(idle: Session) -> None:
    started(idle, timeout=1e9)
    for _ in range(3):
        for _ in range(connection.MAX_FAILED_HANDSHAKES - 1):
            assert not handshake_fails(idle)
        nobody_listens(idle)
    for _ in range(connection.MAX_FAILED_HANDSHAKES - 1):
        assert not handshake_fails(idle)
    idle.connection.connecting(0.0)
    idle.connected(0.0)
    assert not idle.lost()
    assert not handshake_fails(idle)


def test_time_that_is_over_tells_of_the_silence(idle: Session) -> None:
    call, other = started(idle, timeout=5.0), started(idle, deadline=5.0)
    idle.connection.connecting(0.0)
    idle.connection.handshake_begun(0.5)
    idle.connection.note_trouble("silence")
    assert idle.expire(5.0) == [call, other]
    with pytest.raises(Unauthenticated, match="silence"):
        call.take()
    with pytest.raises(DeadlineExceeded, match="silence"):
        other.take()


def test_a_short_wait_is_no_silence(idle: Session) -> None:
    call = started(idle, timeout=0.2)
    idle.connection.connecting(0.0)
    idle.connection.handshake_begun(0.1)
    assert idle.expire(0.2) == [call]
    with pytest.raises(Unavailable):
        call.take()
    assert predict(idle) is not call


MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
OTHER_PROTOCOL = int(zmq.PROTOCOL_ERROR_ZMTP_UNSPECIFIED)


@pytest.mark.parametrize(
    ("event", "value", "shown", "failure", "refusal"),
    [
        (zmq.Event.HANDSHAKE_FAILED_AUTH, 400, SHOWN, True, True),
        (zmq.Event.HANDSHAKE_FAILED_AUTH, 400, None, True, True),
        (zmq.Event.HANDSHAKE_FAILED_AUTH, 500, SHOWN, False, False),
        (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH, SHOWN, True, True),
        (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH, None, True, True),
        (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, OTHER_PROTOCOL, SHOWN, False, False),
        (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE, SHOWN, True, False),
        (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, errno.EAGAIN, SHOWN, True, False),
        (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE, None, False, False),
        (zmq.Event.DISCONNECTED, 20, SHOWN, False, False),
    ],
)
def test_what_an_event_says(event: int, value: int, shown: Credentials | None, failure: bool, refusal: bool) -> None:
    assert handshakes.is_failure(event, value, shown) is failure
    assert handshakes.is_refusal(event, value) is refusal
    assert "SECRET" not in str(handshakes.trouble(event, value, shown))


def test_silence_is_told_by_its_length() -> None:
    """With a handshake that takes too long, libzmq tells whatever number was last in errno."""
    event = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    for value in (errno.EAGAIN, errno.EPIPE):
        assert "did not finish the handshake with keys" in str(handshakes.trouble(event, value, SHOWN, timed_out=True))
        assert "did not finish the ZeroMQ handshake" in str(handshakes.trouble(event, value, None, timed_out=True))
        assert "expects there, SERVER, or uses none" in str(handshakes.trouble(event, value, SHOWN))
