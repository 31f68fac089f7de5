"""Resends of a client: which calls go out again, how many at a time, and what they say. No socket, no clock."""

from __future__ import annotations

import math

import pytest

from sessions import connected_session, header, put_off, result, started
from tnxctl import backoff, session
from tnxctl.protocol import errors, wire
from tnxctl.resending import FIRST_TOKENS, MOST_TOKENS, TOKENS_PER_SUCCESS, Budget, Resends
from tnxctl.session import MAX_LOSSES, Session

WINDOW = int(FIRST_TOKENS)


@pytest.fixture
def connected() -> Session:
    return connected_session()


def reconnect(session: Session, now: float = 1.0) -> list[int]:
    """The ids of the calls that go out at once on a new connection."""
    session.connection.connecting(now)
    return [call.id for call in session.connected(now)]


def lost_under(session: Session, count: int) -> list[int]:
    """A connection that breaks under so many calls: their ids."""
    calls = [started(session, timeout=1e6) for _ in range(count)]
    assert session.lost() == []
    return [call.id for call in calls]


def began(budget: Budget) -> int:
    """Resends that go out until there is no room for another one."""
    count = 0
    while budget.has_room and count < 10_000:
        budget.began()
        count += 1
    return count


# --- the budget ----------------------------------------------------------------------------------------------


def test_a_budget_begins_with_a_few_resends() -> None:
    assert began(Budget()) == WINDOW


def test_one_resend_is_always_possible_and_no_more_without_a_success() -> None:
    budget = Budget()
    for _ in range(began(budget)):
        budget.ended()
    for _ in range(100):
        assert began(budget) == 1
        budget.ended()


def test_a_tenth_of_the_successes_can_be_sent_again() -> None:
    budget = Budget()
    for _ in range(began(budget)):
        budget.ended()
    for _ in range(500):
        budget.succeeded()
    assert began(budget) == pytest.approx(500 * TOKENS_PER_SUCCESS, abs=1)


def test_tokens_of_good_times_are_not_hoarded() -> None:
    budget = Budget()
    for _ in range(100_000):
        budget.succeeded()
    assert began(budget) == MOST_TOKENS


def test_a_refund_is_the_token_of_one_resend() -> None:
    budget = Budget()
    count = began(budget)
    budget.ended()
    budget.refund()
    assert began(budget) == 1
    for _ in range(count):
        budget.ended()


def test_those_wait_in_the_order_of_their_times() -> None:
    resends = Resends(Budget())
    assert resends.next_at == math.inf
    for call_id, at in ((1, 3.0), (2, 1.0), (3, 2.0)):
        resends.wait(call_id, at)
    assert resends.next_at == 1.0
    assert [resends.take(2.5) for _ in range(3)] == [2, 3, None]
    resends.wait(4, 9.0)
    resends.hasten(2.6)
    assert [resends.take(2.6) for _ in range(3)] == [1, 4, None]
    resends.wait(5, 1.0)
    resends.clear()
    assert resends.next_at == math.inf


# --- the calls of a session ----------------------------------------------------------------------------------


def test_after_a_restart_as_many_go_out_again_as_there_are_tokens_and_the_others_follow(connected: Session) -> None:
    ids = lost_under(connected, 5 * WINDOW)
    flying = reconnect(connected)
    assert flying == ids[:WINDOW]
    answered: list[int] = []
    while flying:
        answered.append(flying.pop(0))
        assert connected.receive(result(connected._pending[answered[-1]]), 1.0) is not None
        assert connected.next_timer <= 1.0 or len(answered) + len(flying) == len(ids)
        flying += [call.id for call in connected.take_retries(1.0)]
        assert len(flying) <= WINDOW + len(answered) * TOKENS_PER_SUCCESS
    assert answered == ids


def test_new_calls_do_not_wait_for_tokens(connected: Session) -> None:
    ids = lost_under(connected, 2 * WINDOW)
    fresh = started(connected)
    assert reconnect(connected) == [*ids[:WINDOW], fresh.id]
    assert connected.start(started(connected)) is True


def test_connections_that_go_on_to_break_use_the_tokens_up(connected: Session) -> None:
    sent = 0
    for _ in range(20):
        lost_under(connected, 4 * WINDOW)
        sent += len(reconnect(connected))
        for call in list(connected._pending.values()):
            if not call.in_flight:
                connected.forget(call)
        connected.lost()
        for call in list(connected._pending.values()):
            connected.forget(call)
        connected.connection.connecting(1.0)
        connected.connected(1.0)
    assert sent == WINDOW + 19, "the tokens, and then one at a time"


@pytest.mark.parametrize("served", [0, 5, 20])
def test_resends_in_vain_are_a_tenth_of_the_successes(connected: Session, served: int) -> None:
    """A daemon that breaks down under each burst of 40 calls, after it has answered some, those sent again first."""
    connections, in_vain, successes = 200, 0, 0
    for number in range(connections):
        fresh = [started(connected, timeout=1e6) for _ in range(40)]
        again = [call for call in connected._pending.values() if call.in_flight and call.attempts > 1]
        for call in [*again, *fresh][:served]:
            successes += connected.receive(result(call), float(number)) is not None
        in_vain += sum(not call.done for call in again)
        connected.lost()
        reconnect(connected, float(number))
        while len(connected._pending) > 1000:  # callers lose patience
            connected.forget(next(iter(connected._pending.values())))
    assert successes == served * connections
    assert 0 < in_vain <= WINDOW + TOKENS_PER_SUCCESS * successes + connections


def test_a_refusal_takes_no_token(connected: Session) -> None:
    ids = lost_under(connected, WINDOW)
    assert reconnect(connected) == ids
    now = 1.0
    for _ in range(5):
        for call_id in ids:
            assert connected.receive(put_off(connected._pending[call_id], 1000.0), now) is None
        now += 1.0
        assert {call.id for call in connected.take_retries(now)} == set(ids)


def test_a_call_that_is_withdrawn_makes_room(connected: Session) -> None:
    ids = lost_under(connected, WINDOW + 1)
    flying = reconnect(connected)
    for call_id in flying:
        connected.forget(connected._pending[call_id])
    assert [call.id for call in connected.take_retries(1.0)] == ids[WINDOW:]


def test_a_call_that_had_no_turn_says_so(connected: Session) -> None:
    for _ in range(WINDOW):
        started(connected, timeout=1e6)
    late = started(connected, timeout=4.0)
    connected.lost()
    reconnect(connected)
    assert connected.expire(4.0) == [late]
    with pytest.raises(errors.Unavailable, match="broke while predict was under way, and it was not sent again within"):
        late.take()


def test_only_calls_in_flight_are_to_blame_for_a_connection_that_breaks(connected: Session) -> None:
    waiting = started(connected, timeout=1e6)
    for _ in range(MAX_LOSSES):
        assert connected.receive(put_off(waiting), 1.0) is None
        assert connected.lost() == []
        assert reconnect(connected) == [waiting.id]
    assert waiting.losses == 0


def test_an_answer_to_an_earlier_attempt_is_taken_once(connected: Session) -> None:
    call = started(connected)
    assert connected.receive(put_off(call), 1.0) is None
    assert connected.receive(result(call), 1.1) is call
    assert connected.take_retries(2.0) == []
    assert connected.receive(result(call), 2.1) is None


def test_a_call_that_is_refused_twice_is_sent_once(connected: Session) -> None:
    call = started(connected)
    for _ in range(2):
        assert connected.receive(put_off(call), 1.0) is None
    assert connected.take_retries(2.0) == [call]
    assert connected.take_retries(4.0) == []


def test_a_header_says_which_attempt_it_is(connected: Session) -> None:
    call, question = started(connected, timeout=1e6), connected.encoder.models(timeout=1e6, now=0.0)
    connected.start(question)
    asked = question.frames[0]
    assert header(call).attempt == 1
    assert "attempt" not in str(call.frames[0]), "the first one pays nothing for it"
    connected.lost()
    reconnect(connected)
    assert header(call).attempt == 2
    assert connected.receive(put_off(call), 1.0) is None
    assert connected.take_retries(9.0) == [call]
    assert header(call).attempt == 3
    assert question.frames[0] is asked


# --- backoff -------------------------------------------------------------------------------------------------


def test_refusals_are_followed_by_growing_waits_and_never_by_shorter_ones_than_they_name(
    connected: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 0.0)
    call = started(connected, timeout=1e6)
    waits = []
    for _ in range(6):
        assert connected.receive(put_off(call, 60_000.0), 10.0) is None
        waits.append(connected._resends.next_at - 10.0)
        assert connected.take_retries(11.0) == [call]
    assert connected.receive(put_off(call, 2e6), 10.0) is None
    assert waits == pytest.approx([0.06, 0.1, 0.2, 0.3, 0.3, session.LAST_DEFERRAL_S])
    assert connected._resends.next_at == pytest.approx(12.0)


def test_two_clients_do_not_come_back_at_the_same_time() -> None:
    waits = [backoff.spread(1.0) for _ in range(100)]
    assert len(set(waits)) > 50
    assert 1.0 <= min(waits) < max(waits) <= 1.5


def test_jitter_costs_no_call_its_last_attempt(connected: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 1.0)
    call = started(connected, timeout=1.0)
    assert connected.receive(put_off(call, 100_000.0), 0.88) is None
    assert connected.take_retries(0.99) == [call]
    assert isinstance(header(call), wire.Predict)
