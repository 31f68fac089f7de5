"""Limits of clients: when a request that finds no room may come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tnxctl.errors import ResourceExhausted
from tnxd import admission
from tnxd.admission import Admission, Connection
from tnxd.config import Clients


class Clock:
    """A clock that the test holds in its hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(admission.time, "monotonic", lambda: self.now)


def test_a_client_is_told_how_long_it_took_until_there_was_room(monkeypatch: pytest.MonkeyPatch) -> None:
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
