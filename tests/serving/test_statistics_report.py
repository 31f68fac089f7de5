"""Statistics of a daemon with hundreds of versions, most of which nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from reconciling import Bench
from tnxctl.protocol.statistics import StatsReport
from tnxctl.protocol.wire import Explain, Role, Stats, encode
from tnxd import config
from tnxd.scheduling.request import Request
from tnxd.serving.reports import Inventory
from tnxd.serving.shared_reports import SharedReport
from tnxd.serving.statistics import Statistics
from tnxd.serving.telemetry import Telemetry
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection

VERSIONS = 300


def sent(report: StatsReport) -> StatsReport:
    """A report as it arrives."""
    return msgspec.msgpack.decode(encode(report), type=StatsReport)


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

    told = Statistics(inventory, bench.scheduler, Telemetry(), admission, lambda: 7)
    report = sent(told.stats(Stats(v=1, id=1), "ready", asking))
    assert report.undeliverable == 7
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
    assert not sent(told.stats(Stats(v=1, id=1), "ready", asking)).clients
    assert told.explain(Explain(v=1, id=1), asking).requests == ()


class Clocks:
    """Clocks that stand still unless a report is made: that takes `cost_ms`."""

    def __init__(self) -> None:
        self.now_ns = self.cpu_ns = self.made = 0
        self.cost_ms = 0.0

    def share(self, make: Callable[[], Any]) -> SharedReport[Any]:
        """Something shared by these clocks."""

        def costly() -> Any:
            self.made += 1
            self.pass_ms(self.cost_ms)
            self.cpu_ns += int(self.cost_ms * 1e6)
            return make()

        return SharedReport(costly, lambda: self.now_ns, lambda: self.cpu_ns)

    def pass_ms(self, ms: float) -> None:
        """Let time pass."""
        self.now_ns += int(ms * 1e6)


def test_what_takes_long_is_made_for_all_who_ask_meanwhile() -> None:
    bench = Bench()
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    inventory = Inventory(bench.registry, {}, {})
    admission, clocks = Admission(config.Clients(), max_requests=100, max_bytes=1 << 30), Clocks()
    admin = Connection(b"a", -1, admission.client("10.0.0.1"), role=Role.ADMIN)
    observer = Connection(b"b", -1, admission.client("10.0.0.2"), role=Role.OBSERVE)
    told = Statistics(inventory, bench.scheduler, Telemetry(), admission, lambda: 0, share=clocks.share)
    (version,) = [version for _, version in bench.registry]

    def count(asking: Connection, id_: int = 1, state: str = "ready") -> StatsReport:
        report = sent(told.stats(Stats(v=1, id=id_), state, asking))
        assert (report.id, report.status, bool(report.clients)) == (id_, state, asking is admin)
        return report

    clocks.cost_ms = 40
    first = count(admin, 1)
    inventory.traffic[version].counts.refuse("NOT_FOUND")
    for id_ in range(2, 100):
        assert count(observer, id_, "draining").models == first.models
        told.explain(Explain(v=1, id=1, request=id_), observer)
        clocks.pass_ms(3)
    assert clocks.made == 2  # in 294 ms, one of each
    clocks.pass_ms(9 * 40)
    assert count(observer).models[0].errors == {"NOT_FOUND": 1}

    clocks.pass_ms(9 * 40)
    clocks.cost_ms = 0.5
    for refused in range(2, 5):
        inventory.traffic[version].counts.refuse("NOT_FOUND")
        assert count(observer).models[0].errors == {"NOT_FOUND": refused}
