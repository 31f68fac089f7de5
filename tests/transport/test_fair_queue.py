"""Bounds of what a message has waited, from the turns that connections take."""

from __future__ import annotations

from tnxd.transport.clients import Client, Connection
from tnxd.transport.fair_queue import FairQueue

MANY = 1000


def connection(name: str) -> Connection:
    return Connection(name.encode(), -1, Client(name, local=True))


def test_a_connection_that_was_silent_for_a_round_had_nothing_to_be_read() -> None:
    queue, flood, other = FairQueue(), connection("flood"), connection("other")
    bounds = []
    for turn in range(1, 6):
        taken = turn * MANY
        queue.went_on(taken, now_ns=taken, connections=2)
        bounds.append((queue.filled_ns(other, taken), queue.filled_ns(flood, taken + 1)))
        for number in range(taken + 2, taken + MANY):
            assert queue.filled_ns(flood, number) == bounds[0][1]
    assert [bound for bound, _ in bounds] == [0, MANY, 2 * MANY, 3 * MANY, 4 * MANY]  # the begin of the last round
    assert {bound for _, bound in bounds} == {0}  # of what comes without a pause, nothing is known


def test_a_round_takes_one_message_from_each_connection() -> None:
    queue, one = FairQueue(), connection("one")
    queue.went_on(MANY, now_ns=1, connections=MANY)
    queue.went_on(3 * MANY, now_ns=2, connections=MANY)
    queue.filled_ns(one, 3 * MANY)
    queue.went_on(5 * MANY, now_ns=3, connections=MANY)
    assert queue.filled_ns(one, 4 * MANY) == 0  # it may have waited since its turn before this
    assert queue.filled_ns(one, 5 * MANY + 1) == 2
