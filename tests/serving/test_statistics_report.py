"""Statistics of a daemon with hundreds of versions, most of which nobody asks."""

from __future__ import annotations

from typing import Any

from reconciling import Bench
from tnxctl.protocol.wire import Explain, Role, Stats, encode
from tnxd import config
from tnxd.scheduling.request import Request
from tnxd.serving import statistics
from tnxd.serving.reports import Inventory
from tnxd.serving.telemetry import Telemetry
from tnxd.transport.client_limits import Admission, Connection

VERSIONS = 300


def test_hundreds_of_versions() -> None:
    bench = Bench()
    for number in range(VERSIONS):
        bench.add(f"net-{number}", "1")
    bench.run(bench.reconciler.start)
    executors: Any = bench.executors
    inventory = Inventory(bench.registry, {}, executors)
    for executor in executors.values():
        executor.memory_mb = lambda: (1.0, 2.0)
    admission = Admission(config.Clients(), max_requests=100, max_bytes=1 << 30)
    for number in range(50):
        client = admission.client(f"10.0.0.{number}")
        client.taken, client.refused, client.unsent = number, 2 * number, 1
    admission.gone_taken, admission.gone_refused = 1000, 2000
    asking = Connection(b"", -1, admission.client("10.0.0.7"), role=Role.ADMIN)

    for version in [version for _, version in bench.registry][:3]:
        inventory.traffic[version].counts.requests += 1
    waiting = bench.registry.find("net-5", b"", "")
    for _ in range(4):
        bench.scheduler.add(Request(waiting.key, 4, rows=2), 0)

    report = statistics.stats(Stats(v=1, id=1), "ready", inventory, bench.scheduler, Telemetry(), 7, admission, asking)
    assert sorted(model.name for model in report.models) == sorted(f"net-{number}" for number in range(VERSIONS))
    assert [model.name for model in report.models if model.requests] == ["net-0", "net-1", "net-2"]
    (busy,) = [model for model in report.models if model.queued_rows]
    assert (busy.name, busy.queued_rows) == ("net-5", 8)
    assert busy.predicted_wait_us > 0
    assert len(encode(report)) < 500 * VERSIONS
    assert len(inventory.traffic) == 3  # a report makes no entries

    assert [client.requests for client in report.clients[:20]] == list(range(49, 29, -1))
    (rest,) = report.clients[20:]
    assert (rest.name, rest.requests, rest.refused) == ("", 1000 + sum(range(30)), 2000 + 2 * sum(range(30)))
    assert rest.owed_bytes == 30
    asking.role = Role.PREDICT
    assert not statistics.stats(
        Stats(v=1, id=1), "ready", inventory, bench.scheduler, Telemetry(), 7, admission, asking
    ).clients
    assert statistics.explain(Explain(v=1, id=1), inventory, asking).requests == ()
