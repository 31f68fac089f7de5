"""Calls of a client of several daemons: where their attempts go, without sockets, by a clock that the test holds."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from peers import health_report
from sessions import header, predict, put_off, result
from tnxctl import backoff, balancer
from tnxctl.balancer import Balancer
from tnxctl.call import Call
from tnxctl.hedging import Hedging
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.resending import FIRST_TOKENS, MOST_TOKENS, Budget
from tnxctl.results import Result
from tnxctl.session import LARGE_BYTES, MAX_LOSSES, Session
from tnxctl.sessions import session_of

ADDRESSES = ("tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555", "tcp://10.0.0.3:5555")


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 0.0)


class Daemons:
    """A balancer, with the sockets and the daemons played by the test.

    Attributes:
        sent: attempts that went out, with the index of their daemon. withdrawn: those that were cancelled there.
        finished: calls that are over.
    """

    def __init__(self, count: int = 2, hedging: Hedging | None = None, is_open: bool = True) -> None:
        budget = Budget()
        self.balancer = Balancer(
            [Session(address, 5.0, Limits(), None, budget) for address in ADDRESSES[:count]], budget, hedging
        )
        self.sent: list[tuple[int, Call[Any]]] = []
        self.withdrawn: list[tuple[int, Call[Any]]] = []
        self.finished: list[Call[Any]] = []
        for index in range(count if is_open else 0):
            self.open(index)

    def open(self, index: int, now: float = 0.0) -> None:
        session = self.balancer.sessions[index]
        session.connection.connecting(now)
        assert session.connected(now) == []
        self.tick(now)

    def lose(self, index: int, now: float = 0.0) -> None:
        self._over(index, self.balancer.sessions[index].lost(), now)

    def ask(self, now: float = 0.0, **options: Any) -> Call[Result]:
        call = predict(self.balancer, now=now, **options)  # type: ignore[arg-type]  # it has an encoder, too
        self.balancer.begin(call, now)
        if not call.done:
            placement = self.balancer.place(call, now)
            if placement is not None:
                self._start(placement, now)
        return call

    def tick(self, now: float) -> None:
        for index, session in enumerate(self.balancer.sessions):
            self._over(index, session.expire(now), now)
        self.finished += self.balancer.expire(now)
        while placement := self.balancer.due(now):
            self._start(placement, now)

    def answer(self, index: int, attempt: Call[Any], now: float = 0.0, **changes: Any) -> None:
        self._receive(index, result(attempt, **changes), now)

    def refuse(
        self, index: int, attempt: Call[Any], code: str, after_us: float | None = None, now: float = 0.0
    ) -> None:
        self._receive(index, put_off(attempt, after_us, code), now)

    def where(self, call: Call[Any]) -> list[int]:
        """The daemons that the attempts of a call went to, in order."""
        return [index for index, attempt in self.sent if attempt.id == call.id]

    def _receive(self, index: int, frames: list[bytes], now: float) -> None:
        finished = self.balancer.sessions[index].receive(frames, now)
        self._over(index, [] if finished is None else [finished], now)

    def _over(self, index: int, attempts: list[Call[Any]], now: float) -> None:
        for attempt in attempts:
            call = self.balancer.finished(index, attempt, now)
            if call is not None:
                for other, left in self.balancer.withdrawn(attempt):
                    assert self.balancer.sessions[other].forget(left)
                    self.withdrawn.append((other, left))
                self.finished.append(call)
        while placement := self.balancer.due(now):
            self._start(placement, now)

    def _start(self, placement: tuple[int, Call[Any]], now: float) -> None:
        index, attempt = placement
        assert self.balancer.sessions[index].start(attempt) or attempt.done
        if attempt.done:
            self._over(index, [attempt], now)
        else:
            self.sent.append(placement)
            self.balancer.started(index, attempt, now)


def other(index: int) -> int:
    return 1 - index


def learned() -> Hedging:
    """Answers take 10 ms, and copies are allowed for the next twenty requests and more."""
    hedging = Hedging(0.95)
    for _ in range(100):
        hedging.took("", 0.010)
    hedging.requests = 100
    return hedging


# --- the way of a call ---------------------------------------------------------------------------------------


def test_calls_are_spread_over_the_daemons() -> None:
    daemons = Daemons(3)
    for _ in range(9):
        daemons.ask()
    assert sorted(index for index, _ in daemons.sent) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_call_gets_the_result_of_its_attempt() -> None:
    daemons = Daemons()
    call = daemons.ask()
    ((index, attempt),) = daemons.sent
    assert (attempt.id, attempt.frames, attempt.expires) == (call.id, call.frames, call.expires)
    daemons.answer(index, attempt)
    assert daemons.finished == [call]
    assert (call.take().device, call.frames) == ("cpu", [])
    assert daemons.balancer.idle


def test_a_call_waits_for_the_first_connection() -> None:
    daemons = Daemons(is_open=False)
    call = daemons.ask(deadline=4.0, now=10.0)
    assert daemons.sent == []
    assert daemons.balancer.reconnects(10.0) == [0, 1]
    assert daemons.balancer.next_timer == -math.inf
    daemons.open(1, 11.0)
    ((index, attempt),) = daemons.sent
    assert index == 1
    assert (header(attempt).deadline_us, header(attempt).attempt) == (3e6, 1)
    daemons.answer(1, attempt, 11.0)
    assert call.done


def test_what_waited_is_spread_as_well() -> None:
    daemons = Daemons(is_open=False)
    for _ in range(20):
        daemons.ask()
    for session in daemons.balancer.sessions:
        session.connection.connecting(0.1)
        session.connected(0.1)
    daemons.tick(0.1)
    assert sorted(index for index, _ in daemons.sent) == [0] * 10 + [1] * 10


def test_the_first_connection_does_not_get_all_while_others_are_about_to_stand() -> None:
    daemons = Daemons(3, is_open=False)
    for _ in range(100):
        daemons.ask()
    for session in daemons.balancer.sessions:
        session.connection.connecting(0.0)
    daemons.balancer.sessions[0].connected(0.01)
    daemons.tick(0.01)
    assert len(daemons.sent) == 16
    assert daemons.balancer.next_timer == balancer.PATIENCE_S
    daemons.balancer.sessions[1].connected(0.02)
    daemons.tick(0.02)
    assert len(daemons.sent) == 32
    daemons.tick(balancer.PATIENCE_S)
    assert sorted(index for index, _ in daemons.sent) == [0] * 50 + [1] * 50


def test_it_is_not_waited_for_what_cannot_be_reached() -> None:
    daemons = Daemons(is_open=False)
    for _ in range(20):
        daemons.ask()
    for session in daemons.balancer.sessions:
        session.connection.connecting(0.0)
    daemons.balancer.sessions[0].connected(0.01)
    daemons.tick(0.01)
    daemons.lose(1, 0.02)
    assert [index for index, _ in daemons.sent] == [0] * 20


def test_it_fails_when_its_time_is_over_with_all_reasons() -> None:
    daemons = Daemons(is_open=False)
    for session, trouble in zip(
        daemons.balancer.sessions, ("nobody listens there", "the host is on fire"), strict=True
    ):
        session.connection.trouble = trouble
    plain, urgent = daemons.ask(), daemons.ask(deadline=1.0)
    daemons.tick(0.5)
    assert daemons.finished == []
    daemons.tick(1.0)
    assert daemons.finished == [urgent]
    daemons.tick(5.0)
    assert daemons.finished == [urgent, plain]
    with pytest.raises(errors.DeadlineExceeded, match="within its deadline of 1 s"):
        urgent.take()
    with pytest.raises(errors.Unavailable) as caught:
        plain.take()
    assert caught.value.message == (
        "none of 2 daemons answered predict within 5 s: tcp://10.0.0.1:5555: nobody listens there; "
        "tcp://10.0.0.2:5555: the host is on fire"
    )
    assert daemons.balancer.idle
    assert daemons.balancer.next_timer == math.inf


def test_one_that_no_daemon_answers_in_time_fails_as_with_one_daemon() -> None:
    daemons = Daemons()
    call = daemons.ask()
    daemons.tick(5.0)
    with pytest.raises(errors.DeadlineExceeded, match="did not answer predict within 5 s"):
        call.take()


@pytest.mark.parametrize("verb", ["health", "models"])
def test_what_is_about_one_daemon_is_refused(verb: str) -> None:
    daemons = Daemons()
    call: Call[Any] = getattr(daemons.balancer.encoder, verb)(timeout=None, now=0.0)
    daemons.balancer.begin(call, 0.0)
    with pytest.raises(errors.InvalidArgument, match=rf"{verb} is about one daemon, and this client is of 2: make one"):
        call.take()


def test_what_is_closed_takes_nothing_any_more() -> None:
    daemons = Daemons()
    under_way, waits = daemons.ask(), daemons.ask()
    daemons.refuse(*daemons.sent[1], "UNAVAILABLE", 1e6)
    assert set(daemons.balancer.close()) == {under_way, waits}
    for call, kind in (
        (under_way, errors.Cancelled),
        (waits, errors.Cancelled),
        (daemons.ask(), errors.FailedPrecondition),
    ):
        with pytest.raises(kind, match="closed"):
            call.take()
    assert all(session.idle for session in daemons.balancer.sessions)


def test_no_more_calls_wait_than_with_one_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "MAX_PENDING_CALLS", 10)
    daemons = Daemons(is_open=False)
    for _ in range(10):
        daemons.ask()
    with pytest.raises(errors.ResourceExhausted, match="10 calls with 240 bytes"):
        daemons.ask().take()


# --- moves ---------------------------------------------------------------------------------------------------


def test_a_lost_connection_moves_what_it_had() -> None:
    daemons = Daemons()
    calls = [daemons.ask(deadline=4.0) for _ in range(4)]
    daemons.lose(0, 1.0)
    assert sorted(index for index, _ in daemons.sent) == [0, 0, 1, 1, 1, 1]
    for index, attempt in daemons.sent[4:]:
        assert index == 1
        assert (header(attempt).deadline_us, header(attempt).attempt) == (3e6, 2)
    for _, attempt in [each for each in daemons.sent if each[0] == 1]:
        daemons.answer(1, attempt, 1.0)
    assert all(call.take().device == "cpu" for call in calls)
    assert daemons.balancer.traffic.moved == 2


def test_what_breaks_three_connections_is_given_up() -> None:
    daemons = Daemons()
    call = daemons.ask()
    for _ in range(MAX_LOSSES - 1):
        index = daemons.sent[-1][0]
        daemons.lose(index)
        daemons.open(index)
    assert not call.done
    daemons.lose(daemons.sent[-1][0])
    assert len(daemons.sent) == MAX_LOSSES
    with pytest.raises(errors.Unavailable, match=r"5555: the connection broke 3 times while predict was under way"):
        call.take()


LARGE = np.zeros(LARGE_BYTES, "u1")


def test_large_inputs_that_broke_a_connection_go_where_they_are_taken() -> None:
    daemons = Daemons(3, is_open=False)
    daemons.open(0)
    large, small = daemons.ask(inputs=LARGE), daemons.ask()
    daemons.open(1)
    daemons.lose(0)
    daemons.open(0)
    assert (daemons.where(large), daemons.where(small)) == ([0], [0, 1])
    sessions = daemons.balancer.sessions
    for index, limit in ((1, LARGE_BYTES - 1), (0, LARGE_BYTES)):
        probe = sessions[index].probe_message()
        assert probe is not None
        assert sessions[index].probe_message() is None, "it is asked once"
        assert not large.done
        report = msgspec.structs.replace(health_report(wire.request_id(probe, Limits())), max_message_bytes=limit)
        sessions[index].receive([wire.encode(report)], 0.0)
        daemons.tick(0.0)
    assert daemons.where(large) == [0, 0]


def test_large_inputs_that_no_daemon_takes_are_refused_in_words() -> None:
    daemons = Daemons(1 + 1)
    large = daemons.ask(inputs=LARGE)
    broken = daemons.sent[0][0]
    daemons.lose(broken)
    daemons.open(broken)
    for session in daemons.balancer.sessions:
        probe = session.probe_message()
        assert probe is not None
        report = msgspec.structs.replace(health_report(wire.request_id(probe, Limits())), max_message_bytes=1000)
        session.receive([wire.encode(report)], 0.0)
        daemons.tick(0.0)
    daemons.tick(0.0)
    with pytest.raises(errors.InvalidArgument, match=r"the inputs have 65536 bytes, and tcp://10.* takes 1000"):
        large.take()
    assert len(daemons.sent) == 1


def test_a_daemon_that_drains_is_passed_over_and_tried_again_later() -> None:
    daemons = Daemons()
    first = daemons.ask()
    away = daemons.sent[0][0]
    daemons.refuse(*daemons.sent[0], "UNAVAILABLE", 200_000.0)
    others = [daemons.ask(0.1) for _ in range(5)]
    assert [daemons.where(call) for call in (first, *others)] == [[away, other(away)], *[[other(away)]] * 5]
    later = [daemons.ask(0.3) for _ in range(2)]
    assert [daemons.where(call) for call in later] == [[away], [other(away)]]  # one request tries
    daemons.answer(*daemons.sent[-2], 0.31)
    assert daemons.where(daemons.ask(0.31)) == [away]


def test_all_drain_and_the_call_waits_within_its_time() -> None:
    daemons = Daemons()
    call = daemons.ask()
    for after_us in (100_000.0, 300_000.0):
        daemons.refuse(*daemons.sent[-1], "UNAVAILABLE", after_us)
    assert len(daemons.sent) == 2
    assert daemons.balancer.next_timer == pytest.approx(0.1)
    daemons.tick(0.09)
    assert len(daemons.sent) == 2
    daemons.tick(0.11)
    assert daemons.sent[2][0] == daemons.sent[0][0]
    daemons.answer(*daemons.sent[2], 0.12)
    assert call.done


def test_all_drain_until_its_time_is_over() -> None:
    daemons = Daemons()
    call = daemons.ask()
    for _ in range(2):
        daemons.refuse(*daemons.sent[-1], "UNAVAILABLE", 9e6)
    daemons.tick(5.0)
    with pytest.raises(
        errors.Unavailable, match=r"0\.1:5555: the daemon is starting; tcp://10\.0\.0\.2:5555: the daemon"
    ):
        call.take()


def test_what_waits_for_one_daemon_goes_to_another_as_soon_as_it_is_there() -> None:
    daemons = Daemons(is_open=False)
    daemons.open(0)
    call = daemons.ask()
    daemons.refuse(0, daemons.sent[0][1], "UNAVAILABLE", 4e6)
    daemons.open(1, 0.5)
    assert daemons.where(call) == [0, 1]


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "NOT_FOUND", "FAILED_PRECONDITION"])
def test_a_daemon_without_room_or_model_is_tried_once_and_then_the_last_choice(code: str) -> None:
    daemons = Daemons(3)
    call = daemons.ask()
    for number in range(3):
        assert not call.done
        daemons.refuse(*daemons.sent[number], code)
    assert sorted(daemons.where(call)) == [0, 1, 2]
    with pytest.raises(errors.from_code(code, "").__class__, match="the daemon is starting"):
        call.take()
    second = daemons.ask()
    daemons.answer(*daemons.sent[-1])
    assert second.done
    served = daemons.sent[-1][0]
    assert {daemons.where(daemons.ask())[0] for _ in range(5)} == {served}


def test_a_missing_model_is_waited_for_at_a_daemon_that_is_away() -> None:
    daemons = Daemons(is_open=False)
    daemons.open(0)
    call = daemons.ask(model="m")
    daemons.refuse(0, daemons.sent[0][1], "NOT_FOUND")
    assert not call.done
    daemons.open(1, 1.0)
    daemons.answer(*daemons.sent[-1], 1.0)
    assert daemons.where(call) == [0, 1]
    assert call.done


def test_a_refusal_for_want_of_room_is_not_waited_out() -> None:
    daemons = Daemons(is_open=False)
    daemons.open(0)
    call = daemons.ask()
    daemons.refuse(0, daemons.sent[0][1], "RESOURCE_EXHAUSTED", 1000.0)
    with pytest.raises(errors.ResourceExhausted):
        call.take()


def test_it_is_waited_for_a_daemon_that_is_about_to_be_there() -> None:
    daemons = Daemons(is_open=False)
    daemons.balancer.sessions[1].connection.connecting(0.0)
    daemons.open(0)
    refused = daemons.ask(), daemons.ask()
    for number in range(2):
        daemons.refuse(*daemons.sent[number], "RESOURCE_EXHAUSTED", 1000.0)
    assert not any(call.done for call in refused)
    assert daemons.balancer.forget(refused[0])
    daemons.lose(1, 0.1)
    daemons.tick(0.1)
    with pytest.raises(errors.ResourceExhausted):
        refused[1].take()
    assert daemons.balancer.idle


def test_a_deadline_that_others_stand_in_the_way_of_may_be_met_elsewhere() -> None:
    daemons = Daemons()
    call = daemons.ask(deadline=1.0)
    daemons.refuse(*daemons.sent[0], "DEADLINE_EXCEEDED", 1e6)
    assert len(daemons.sent) == 2
    daemons.refuse(*daemons.sent[1], "DEADLINE_EXCEEDED", 1e6)
    with pytest.raises(errors.DeadlineExceeded):
        call.take()
    hopeless = daemons.ask(deadline=1.0)
    daemons.refuse(*daemons.sent[2], "DEADLINE_EXCEEDED")
    assert hopeless.done


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "INTERNAL", "UNIMPLEMENTED", "PERMISSION_DENIED"])
def test_an_error_that_another_daemon_would_repeat_does_not_move(code: str) -> None:
    daemons = Daemons()
    call = daemons.ask()
    daemons.refuse(*daemons.sent[0], code)
    assert call.done
    assert len(daemons.sent) == 1


def test_a_daemon_whose_device_failed_is_not_asked_again() -> None:
    daemons = Daemons()
    call = daemons.ask()
    for number in range(2):
        daemons.refuse(*daemons.sent[number], "UNAVAILABLE")
    assert sorted(daemons.where(call)) == [0, 1]
    with pytest.raises(errors.Unavailable, match="starting"):
        call.take()


def test_what_is_withheld_by_one_session_goes_to_the_next_unsent() -> None:
    daemons = Daemons()
    calls = [daemons.ask(deadline=1.0) for _ in range(40)]
    for index, attempt in [each for each in daemons.sent if each[0] == 0][:12]:
        daemons.refuse(index, attempt, "DEADLINE_EXCEEDED", 1e6)  # a window of few stands now
    assert sum(call.done for call in calls) <= 12
    before = len(daemons.sent)
    more = [daemons.ask(deadline=1.0) for _ in range(10)]
    assert {index for index, _ in daemons.sent[before:]} == {1}
    assert not any(call.done for call in more)


def test_a_connection_in_doubt_gets_nothing_until_it_is_heard_of() -> None:
    daemons = Daemons()
    silent = daemons.balancer.sessions[0]
    silent.connection.suspect(0.0, 1.0, 0, 0.0)
    probe = silent.probe_message()
    assert probe is not None
    calls = [daemons.ask() for _ in range(4)]
    assert [daemons.where(call) for call in calls] == [[1]] * 4
    probe_id = wire.request_id(probe, Limits())
    assert probe_id not in {call.id for call in calls}
    silent.receive([wire.encode(wire.ErrorReply(v=1, id=probe_id, code="INTERNAL", message="here"))], 0.1)
    assert daemons.where(daemons.ask()) == [0]


def test_all_daemons_do_not_let_this_client_in() -> None:
    daemons = Daemons(is_open=False)
    sessions = daemons.balancer.sessions

    def refuse(index: int, now: float) -> None:
        sessions[index].connection.connecting(now)
        sessions[index].connection.trouble = f"not {index}"
        sessions[index].connection.handshake_failed(refused=True)
        daemons.lose(index, now)
        daemons.tick(now)

    for now in (0.0, 1.0):  # each time, they are asked again
        call = daemons.ask(now)
        refuse(0, now)
        assert not call.done
        refuse(1, now)
        with pytest.raises(errors.Unauthenticated) as caught:
            call.take()
        assert caught.value.message == (
            "none of 2 daemons lets this client in: tcp://10.0.0.1:5555: not 0; tcp://10.0.0.2:5555: not 1"
        )
    call = daemons.ask(2.0)
    refuse(0, 2.0)
    daemons.open(1, 2.0)
    assert daemons.where(call) == [1]


# --- the budget ----------------------------------------------------------------------------------------------


def test_all_daemons_share_one_budget_of_resends() -> None:
    daemons = Daemons()
    calls = [daemons.ask() for _ in range(60)]
    daemons.lose(0)
    moved = daemons.sent[60:]
    assert len(moved) == FIRST_TOKENS
    for index, attempt in moved:  # each that is answered lets another one go, ten of them one more
        daemons.answer(index, attempt)
    assert len(daemons.sent) == 60 + 10 + 10 + 1
    while left := [(index, attempt) for index, attempt in daemons.sent if index == 1 and not attempt.done]:
        daemons.answer(*left[0])
    assert all(call.done for call in calls)
    assert len(daemons.sent) == 60 + 30


def test_an_overload_is_not_doubled() -> None:
    daemons = Daemons()
    calls = []
    for number in range(500):
        calls.append(daemons.ask(number * 0.001))
        daemons.refuse(*daemons.sent[-1], "RESOURCE_EXHAUSTED", 1000.0, number * 0.001)
        if not calls[-1].done:
            daemons.refuse(*daemons.sent[-1], "RESOURCE_EXHAUSTED", 1000.0, number * 0.001)
    assert all(call.done for call in calls)
    assert len(daemons.sent) == 500 + FIRST_TOKENS


# --- copies --------------------------------------------------------------------------------------------------


def test_a_slow_request_gets_a_copy_at_another_daemon() -> None:
    daemons = Daemons(3, learned())
    call = daemons.ask()
    (first,) = daemons.sent
    assert daemons.balancer.next_timer == pytest.approx(0.010)
    daemons.tick(0.009)
    assert len(daemons.sent) == 1
    daemons.tick(0.011)
    second = daemons.sent[1]
    assert second[0] != first[0]
    assert (second[1].id, header(second[1]).attempt) == (call.id, 2)
    daemons.answer(*second, 0.012)
    assert daemons.finished == [call]
    assert daemons.withdrawn == [first]
    assert (daemons.balancer.traffic.hedged, daemons.balancer.traffic.hedges_won) == (1, 1)
    daemons.tick(1.0)
    assert len(daemons.sent) == 2


def test_the_first_daemon_may_still_be_the_earlier_one() -> None:
    daemons = Daemons(2, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    daemons.answer(*daemons.sent[0], 0.012)
    assert daemons.withdrawn == [daemons.sent[1]]
    assert call.done
    assert (daemons.balancer.traffic.hedged, daemons.balancer.traffic.hedges_won) == (1, 0)


def test_a_refused_copy_leaves_the_request_where_it_is() -> None:
    daemons = Daemons(2, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    daemons.refuse(*daemons.sent[1], "RESOURCE_EXHAUSTED", now=0.012)
    assert not call.done
    daemons.answer(*daemons.sent[0], 0.020)
    assert call.done


def test_a_copy_outlives_the_request_that_it_was_made_of() -> None:
    daemons = Daemons(2, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    daemons.lose(daemons.sent[0][0], 0.012)
    assert len(daemons.sent) == 2
    daemons.answer(*daemons.sent[1], 0.020)
    assert call.done


def test_both_are_lost_and_the_call_goes_on() -> None:
    daemons = Daemons(3, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    for index, _ in daemons.sent[:2]:
        daemons.lose(index, 0.012)
    assert len(daemons.sent) == 3
    daemons.answer(*daemons.sent[2], 0.020)
    assert call.done


def test_both_run_out_of_time_and_the_call_fails_once() -> None:
    daemons = Daemons(2, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    daemons.tick(5.0)
    assert daemons.finished == [call]
    assert daemons.balancer.idle
    assert all(session.idle for session in daemons.balancer.sessions)


def test_there_is_no_copy_without_another_daemon() -> None:
    daemons = Daemons(2, learned())
    daemons.lose(0)
    daemons.ask()
    daemons.tick(0.011)
    assert len(daemons.sent) == 1


def test_copies_are_one_in_twenty_at_most() -> None:
    daemons = Daemons(2, Hedging(0.5))
    for number in range(400):
        now = float(number)
        daemons.ask(now)
        daemons.tick(now + 0.01 * (number % 5))  # two of five are slower than half of all
        for index, attempt in daemons.sent[-2:]:
            if not attempt.done:
                daemons.answer(index, attempt, now + 0.01 * (number % 5))
    assert daemons.balancer.traffic.hedged == 20
    assert sum(daemons.balancer.traffic.endpoints.values()) == 420


def test_many_that_are_slow_at_once_get_no_more_copies() -> None:
    daemons = Daemons(2, learned())
    daemons.balancer._budget._tokens = MOST_TOKENS
    for _ in range(100):
        daemons.ask()
    daemons.tick(1.0)
    assert daemons.balancer.traffic.hedged == 0.05 * 200  # 100 of them before these


def test_one_that_could_have_no_copy_at_first_gets_one_later() -> None:
    daemons = Daemons(2, learned())
    daemons.lose(0)
    call = daemons.ask()
    daemons.tick(0.011)
    assert daemons.where(call) == [1]
    daemons.open(0, 0.015)
    daemons.tick(0.022)
    assert daemons.where(call) == [1, 0]


# --- withdrawal ----------------------------------------------------------------------------------------------


def test_a_call_that_is_forgotten_leaves_nothing_behind() -> None:
    daemons = Daemons(2, learned())
    call = daemons.ask()
    daemons.tick(0.011)
    assert len(daemons.balancer.attempts_of(call)) == 2
    assert daemons.balancer.forget(call)
    assert not daemons.balancer.forget(call)
    assert daemons.balancer.idle
    assert all(session.idle for session in daemons.balancer.sessions)
    daemons.answer(*daemons.sent[0], 0.02)
    assert daemons.finished == []


# --- all together --------------------------------------------------------------------------------------------

REFUSALS = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "NOT_FOUND", "DEADLINE_EXCEEDED", "INTERNAL")


@pytest.mark.parametrize("seed", range(30))
def test_every_call_has_one_outcome_whatever_happens(seed: int) -> None:
    chance = Random(seed)
    daemons = Daemons(3, Hedging(0.5), is_open=chance.random() < 0.5)
    sessions = daemons.balancer.sessions
    calls: list[Call[Any]] = []
    forgotten: list[Call[Any]] = []
    now = 0.0
    for _ in range(400):
        now += chance.choice((0.0, 0.001, 0.01, 0.2))
        under_way = [(index, attempt) for index, attempt in daemons.sent if attempt.id in sessions[index]._pending]
        event, index = chance.random(), chance.randrange(3)
        if event < 0.4:
            calls.append(daemons.ask(now, deadline=chance.choice((None, 0.5)), model=chance.choice(("", "m"))))
        elif event < 0.6 and under_way:
            daemons.answer(*chance.choice(under_way), now)
        elif event < 0.75 and under_way:
            after_us = chance.choice((None, 1e3, 1e5))
            daemons.refuse(*chance.choice(under_way), chance.choice(REFUSALS), after_us, now)
        elif event < 0.85:
            if sessions[index].connection.is_open:
                daemons.lose(index, now)
            else:
                daemons.open(index, now)
        elif event < 0.9 and calls:
            call = chance.choice(calls)
            if daemons.balancer.forget(call):
                forgotten.append(call)
        else:
            daemons.tick(now)
    for later in (0.0, 10.0, 20.0):
        daemons.tick(now + later)
    assert all(call.done != (call in forgotten) for call in calls)
    assert len(daemons.finished) == len(set(map(id, daemons.finished)))
    assert daemons.balancer.idle
    assert all(session.idle for session in sessions)
    assert daemons.balancer._budget._under_way == 0
    assert daemons.balancer._bytes == 0
    traffic = daemons.balancer.traffic
    assert sum(traffic.endpoints.values()) == len(daemons.sent)
    assert traffic.hedged <= len(calls) / 20


# --- arguments -----------------------------------------------------------------------------------------------


def test_one_endpoint_needs_no_balancer() -> None:
    for endpoint in ("gpu-box", ["gpu-box"]):
        session = session_of(endpoint, 5.0)
        assert isinstance(session, Session)
        assert session.endpoint == "tcp://gpu-box:5555"


@pytest.mark.parametrize(
    ("endpoint", "hedge", "why"),
    [
        ([], False, "got an empty list"),
        (["a", "a:5555"], False, "'tcp://a:5555' comes twice"),
        (["a", 7], False, "expected a string, got int"),
        (7, False, "expected a string, got int"),
        ("a", True, "there is one endpoint"),
        (["a", "b"], 0.0, "hedge=0.0: expected"),
        (["a", "b"], 1, "hedge=1: expected"),
        (["a", "b"], math.nan, "hedge=nan: expected"),
        (["a", "b"], "yes", "hedge='yes': expected"),
    ],
)
def test_arguments_that_can_never_work(endpoint: Any, hedge: Any, why: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=why):
        session_of(endpoint, 5.0, hedge=hedge)
