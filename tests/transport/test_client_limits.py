"""Admission control: limits of names, rates, and when a refused request may come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tnxctl.protocol.errors import ResourceExhausted
from tnxctl.protocol.wire import Role
from tnxd.config import Clients
from tnxd.transport import client_limits
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection
from tnxd.transport.key_ring import AuthorizedKey


class Clock:
    """A clock that the test holds in its hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(client_limits.time, "monotonic", lambda: self.now)


def test_refusal_says_how_long_it_took_lately_until_there_was_room(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    admitted = Admission(Clients(max_requests=2), max_requests=100, max_bytes=1 << 30)
    client = admitted.client("10.0.0.1")
    client.connections = 1
    connection = Connection(b"peer", 3, client)
    told = []
    requests: list[Any] = []
    for number in range(200):
        request: Any = SimpleNamespace(id=number, nbytes=10, connection=connection)
        try:
            admitted.check(connection, 10)
        except ResourceExhausted as error:
            told.append(error.retry_after_s)
            clock.now += 0.004
            admitted.release(requests.pop(0))
            continue
        admitted.take(connection, request)
        requests.append(request)
    assert told[0] == 0.05  # nothing is known yet
    assert told[-1] == pytest.approx(0.004, rel=0.1)
    # Who does not come back for an hour has not waited for room.
    if len(requests) < 2:
        requests.append(SimpleNamespace(id=999, nbytes=10, connection=connection))
        admitted.take(connection, requests[-1])
    with pytest.raises(ResourceExhausted):
        admitted.check(connection, 10)
    clock.now += 0.004
    for one in requests:
        admitted.release(one)
    clock.now += 3600.0
    requests = [SimpleNamespace(id=number, nbytes=10, connection=connection) for number in (1000, 1001)]
    for one in requests:
        admitted.take(connection, one)
    with pytest.raises(ResourceExhausted) as refused:
        admitted.check(connection, 10)
    assert refused.value.retry_after_s == pytest.approx(0.004, rel=0.1)


def test_clients_with_requests_in_flight_are_counted() -> None:
    admitted = Admission(Clients(), max_requests=100, max_bytes=1 << 30)
    connections = [Connection(b"%d" % number, number, admitted.client(f"10.0.0.{number}")) for number in range(3)]
    requests: list[Any] = [
        SimpleNamespace(id=number, nbytes=10, connection=connection)
        for connection in connections[:2]
        for number in range(2)
    ]
    counts = []
    for request in requests:
        admitted.take(request.connection, request)
        counts.append(admitted.active)
    for request in requests:
        admitted.release(request)
        counts.append(admitted.active)
    assert counts == [1, 1, 2, 2, 2, 1, 1, 0]


def entry(**limits: Any) -> AuthorizedKey:
    return AuthorizedKey("alice", "her key", Role.PREDICT, **limits)


def test_a_rate_is_a_second_of_requests_at_once_and_then_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    admitted = Admission(Clients(), max_requests=100, max_bytes=1 << 30)
    connection = Connection(b"peer", 3, admitted.holder(entry(rate=4.0)))
    for _ in range(4):
        admitted.check(connection, 10)
    for _ in range(3):
        with pytest.raises(ResourceExhausted) as refused:
            admitted.check(connection, 10)
        assert refused.value.retry_after_s == pytest.approx(0.25)
        clock.now += 0.25
        admitted.check(connection, 10)
    clock.now += 3600.0  # an hour saves up no more than a second
    for _ in range(4):
        admitted.check(connection, 10)
    with pytest.raises(ResourceExhausted, match="alice asks more often than it may, the limit is 4 a second"):
        admitted.check(connection, 10)


def test_who_leaves_and_comes_back_has_no_fresh_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    admitted = Admission(Clients(rate=0.01), max_requests=100, max_bytes=1 << 30)
    admitted.check(Connection(b"peer", 3, admitted.client("10.0.0.1")), 10)
    clock.now += 1.0
    admitted.sweep()
    with pytest.raises(ResourceExhausted):
        admitted.check(Connection(b"again", 4, admitted.client("10.0.0.1")), 10)
    clock.now += 100.0
    admitted.sweep()
    assert not [*admitted]


def test_limits_beside_a_key_go_before_those_of_all_and_not_beyond_the_queue() -> None:
    admitted = Admission(Clients(max_requests=10, max_mb=1.0, rate=5.0), max_requests=4000, max_bytes=1 << 30)
    more = admitted.holder(entry(max_requests=50, max_bytes=1 << 22, rate=7.0, share=2.0))
    assert (more.max_requests, more.max_bytes, more.share) == (50, 1 << 22, 2.0)
    assert more.rate is not None
    assert more.rate.rate == 7.0
    same = admitted.holder(entry(max_requests=100_000, max_bytes=1 << 40))
    assert same is more
    assert (same.max_requests, same.max_bytes, same.rate.rate, same.share) == (3000, 3 << 28, 5.0, 1.0)
    none = admitted.holder(entry())
    assert (none.max_requests, none.max_bytes) == (10, 1 << 20)


def test_a_name_that_looks_like_an_address_is_another_client() -> None:
    admitted = Admission(Clients(), max_requests=100, max_bytes=1 << 30)
    assert admitted.holder(entry()) is not admitted.client("alice")
    assert len([*admitted]) == 2


def test_one_refusal_is_no_flood_however_long_the_loop_stood_still_meanwhile() -> None:
    admitted = Admission(Clients(), max_requests=100, max_bytes=1 << 30)
    connection = Connection(b"peer", 3, admitted.client("10.0.0.1"))
    admitted.add_refused(connection, 900_000_000)
    assert admitted.take_flooding(1_000_000_000) == []
    for _ in range(5):
        admitted.add_refused(connection, 90_000_000)
    assert admitted.take_flooding(1_000_000_000) == [connection]
