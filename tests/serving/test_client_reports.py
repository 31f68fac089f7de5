"""Reports about clients: bounded, the busiest first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tnxctl.protocol.wire import Clients, Role, encode
from tnxd import config
from tnxd.serving import client_reports
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection


def test_report_of_very_many_clients_is_cut_and_says_so() -> None:
    admission = Admission(config.Clients(), max_requests=100, max_bytes=1 << 30)
    connections = []
    for number in range(3000):
        client = admission.client(f"10.0.{number // 250}.{number % 250}")
        client.connections, client.taken = 1, number
        connections.append(Connection(b"%d" % number, number, client, f"10.0.0.{number % 250}", role=Role.PREDICT))
    one = admission.client("10.9.9.9")
    one.connections, one.taken = 500, 100_000
    connections += [Connection(b"x%d" % number, 9, one, f"10.1.{number}.1") for number in range(200)]
    gone = admission.client("10.8.8.8")
    gone.taken = 200_000
    router: Any = SimpleNamespace(connections=lambda: connections)
    report = client_reports.clients(Clients(v=1, id=1), router, admission)
    assert report.total == 3001
    assert [info.requests for info in report.clients] == [100_000, *range(2999, 2000, -1)]
    assert len(report.clients[0].addresses) == 8
    assert len(encode(report)) < 1 << 20
