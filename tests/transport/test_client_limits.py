"""Admission control: when a refused request may come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tnxctl.protocol.errors import ResourceExhausted
from tnxd.config import Clients
from tnxd.transport import client_limits
from tnxd.transport.client_limits import Admission, Connection


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
