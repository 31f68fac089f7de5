"""Statistics: the raw counts since the start, and the slowest requests of the last minute."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from tnxctl import __version__
from tnxctl.protocol.statistics import ClientStats, DeviceStats, Explanation, SlowRequest, StatsReport, VersionStats
from tnxctl.protocol.wire import MIB, VERSION, Explain, Role, Stats, split_title
from tnxd.deployment.version import DRAINING, READY
from tnxd.lanes import BACKGROUND
from tnxd.process import logs
from tnxd.scheduling.device import Device
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import reports
from tnxd.serving.replies import encoded
from tnxd.serving.reports import Inventory
from tnxd.serving.shared_reports import SharedReport
from tnxd.serving.slowest import KEPT_S
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.version_counts import RecentError, VersionCounts
from tnxd.tracing.notes import Notes
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Client, Connection

_MOST_CLIENTS = 20
_MOST_SLOW = 1000


class Statistics:
    """Statistics of a daemon, as anybody who may ask for them is told.

    With hundreds of busy versions a report takes tens of milliseconds of the loop's time. So it is a
    `SharedReport`, the models in the form in which they are sent.

    Args:
        undeliverable: number of messages that could not be delivered, so far.
        notes: of sampled requests, if there are any.
    """

    def __init__(
        self,
        inventory: Inventory,
        scheduler: Scheduler,
        telemetry: Telemetry,
        admission: Admission,
        undeliverable: Callable[[], int],
        notes: Notes | None = None,
        share: Callable[[Callable[[], Any]], SharedReport[Any]] = SharedReport,
    ) -> None:
        self._inventory = inventory
        self._scheduler = scheduler
        self._telemetry = telemetry
        self._admission = admission
        self._undeliverable = undeliverable
        self._notes = notes
        self._report: SharedReport[StatsReport] = share(self._count)
        self._slow: SharedReport[list[_Slow]] = share(self._gather_slow)

    def stats(self, request: Stats, state: str, asking: Connection) -> StatsReport:
        """The counts of the daemon, its models and its devices; those of its clients, for an admin."""
        report = self._report.get()
        clients = report.clients if asking.role >= Role.ADMIN else ()
        return msgspec.structs.replace(report, id=request.id, status=state, clients=clients)

    def explain(self, request: Explain, asking: Connection) -> Explanation:
        """The slowest requests, the slowest first.

        Raises:
            NotFound, InvalidArgument, FailedPrecondition: there is no such model.
        """
        wanted = _titles(request.model, self._inventory) if request.model else None
        now, is_admin = time.monotonic(), asking.role >= Role.ADMIN
        found = (
            slow
            for slow in self._slow.get()
            if request.request in (None, slow.request.id) and (wanted is None or slow.title in wanted)
        )
        told = [
            msgspec.structs.replace(slow.request, age_s=now - slow.at, client=slow.client if is_admin else "")
            for slow in islice(found, _MOST_SLOW)
        ]
        return Explanation(v=VERSION, id=request.id, requests=tuple(told), kept_s=KEPT_S)

    def _count(self) -> StatsReport:
        """All counts as they are now."""
        inventory, scheduler, telemetry, admission = self._inventory, self._scheduler, self._telemetry, self._admission
        models: Any = encoded(tuple(_versions(inventory, scheduler)))
        return StatsReport(
            v=VERSION,
            id=0,
            status="",
            version=__version__,
            started_s=telemetry.started,
            uptime_us=telemetry.uptime_s() * 1e6,
            models=models,
            devices=tuple(_devices(inventory, scheduler)),
            clients=tuple(_clients(admission)),
            requests=telemetry.requests,
            replies=telemetry.replies,
            errors=dict(telemetry.errors),
            resent=telemetry.resent,
            undeliverable=self._undeliverable(),
            abandoned=telemetry.abandoned,
            queued=scheduler.queued,
            running=scheduler.running - scheduler.background,
            connections=sum(client.connections for client in admission),
            connections_refused=admission.refused,
            connections_cut=admission.cut,
            traffic_mb=admission.traffic_bytes / MIB,
            traffic_owed_mb=admission.unsent / MIB,
            traffic_limit_mb=admission.max_traffic_bytes / MIB,
            loop_turns=telemetry.turns(),
            log_lines_dropped=logs.dropped(),
            spans_dropped=0 if self._notes is None else self._notes.dropped + self._notes.lost,
        )

    def _gather_slow(self) -> list[_Slow]:
        """The slow requests of all models, the slowest first."""
        now = time.monotonic()
        found = [
            _Slow(title, request, client, now - age_s)
            for title, counts in self._inventory.traffic.counts()
            for request, client, age_s in counts.slowest.kept()
        ]
        found.sort(key=lambda slow: slow.request.timing.total_us, reverse=True)
        return found


class _Slow(NamedTuple):
    """Slow request. Attributes: title: of its version. client: its name. at: when it came, by the monotonic clock."""

    title: str
    request: SlowRequest
    client: str
    at: float


def _titles(model: str, inventory: Inventory) -> set[str]:
    """Titles of the versions that NAME or NAME@VERSION stands for. Raises as `Registry.describe` does."""
    name, number = split_title(model)
    if number:
        return {inventory.registry.describe(model)[1].title}
    return {f"{name}@{known}" for known in inventory.registry.deployment(name).versions}


def _versions(inventory: Inventory, scheduler: Scheduler) -> Iterator[VersionStats]:
    registry = inventory.registry
    loaded = {
        version.title: version.model
        for _, version in registry
        if version.model is not None and version.state in (READY, DRAINING)
    }
    limits = {model.key: model.max_units for model in loaded.values()}
    prospects = scheduler.prospects(limits, time.perf_counter_ns())
    counts = dict(inventory.traffic.counts())
    for title in dict.fromkeys([*loaded, *counts, *registry.evictions]):
        name, _, number = title.partition("@")
        known = counts.get(title) or VersionCounts(RecentError())
        model = loaded.get(title)
        rows, wait_us = prospects.get(model.key, (0, 0.0)) if model is not None else (0, 0.0)
        yield known.report(name, number, registry.evictions[title], rows, wait_us)


def _devices(inventory: Inventory, scheduler: Scheduler) -> Iterator[DeviceStats]:
    running_ns = _running_ns(inventory)
    for info in reports.device_infos(inventory, scheduler):
        device = scheduler.devices.get(info.name)
        yield DeviceStats(
            name=info.name,
            status=info.status,
            lanes=info.lanes,
            busy_us=_busy_ns(device, running_ns) / 1e3 if device else 0.0,
            inline_us=device.inline_ns / 1e3 if device else 0.0,
            queued_rows=info.queued_rows,
            memory_free_mb=info.memory_free_mb,
            memory_total_mb=info.memory_total_mb,
        )


def _busy_ns(device: Device, running_ns: Counter[str]) -> int:
    """Time that the lanes of a device were busy, summed over them. Those that share a chip are while it has work."""
    if device.chip is not None:
        return device.chip.busy_ns(time.perf_counter_ns()) * device.lanes
    return device.busy_ns + running_ns[device.name]


def _running_ns(inventory: Inventory) -> Counter[str]:
    """Time for which the batches on lanes have run so far, by device. That of copies, which take what is left, is not.

    It never takes back what it has told: once a batch is over, its time is no shorter.
    """
    now_ns = time.perf_counter_ns()
    running: Counter[str] = Counter()
    for execution, batch in inventory.on_lanes.items():
        if batch.lane != BACKGROUND and execution.started_ns:  # lanes write these times
            until_ns = min(execution.finished_ns or now_ns, now_ns)
            running[batch.device.name] += max(until_ns - execution.started_ns, 0) * batch.threads
    return running


def _clients(admission: Admission) -> Iterator[ClientStats]:
    known = sorted(admission, key=lambda client: client.taken, reverse=True)
    for client in known[:_MOST_CLIENTS]:
        yield _client(client.name, [client])
    rest = _client("", known[_MOST_CLIENTS:])
    if known[_MOST_CLIENTS:] or admission.gone_taken or admission.gone_refused:
        yield msgspec.structs.replace(
            rest, requests=rest.requests + admission.gone_taken, refused=rest.refused + admission.gone_refused
        )


def _client(name: str, clients: list[Client]) -> ClientStats:
    return ClientStats(
        name=name,
        requests=sum(client.taken for client in clients),
        refused=sum(client.refused for client in clients),
        in_flight=sum(client.requests for client in clients),
        owed_bytes=sum(client.unsent for client in clients),
    )
