"""The cost of one decision of the scheduler, by how many requests wait."""

from __future__ import annotations

import time

import msgspec
import numpy as np

from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler
from traces import CPU, Machine

_MODEL = "ranker"
_ROUND = 64  # requests that come between two looks at the lanes
_STEP_NS = 1_000_000


class Decision(msgspec.Struct, frozen=True):
    """Microseconds per request, the median of the rounds.

    Attributes:
        add_us: `Scheduler.add`. start_us: its share of `finished` and `next_batches`.
    """

    queued: int
    clients: int
    add_us: float
    start_us: float

    @property
    def total_us(self) -> float:
        return self.add_us + self.start_us


def measure(machine: Machine, queued: int, clients: int, rounds: int) -> Decision:
    """Keep about so many requests waiting, of so many clients, while as many leave as come.

    Every request may run on any device and has a deadline of its own, so that nothing is simple: each is predicted for
    each device and takes its place among all.
    """
    costs = CostModel()
    for device in machine.lanes:
        for rows in (1, 2, 4, 8, 16, 32, 64):
            costs.curve(device, _MODEL).observe(rows, machine.cost_us(device, _MODEL, rows))
    devices = [
        Device(name, "cpu" if name == CPU else "cuda", lanes, {_MODEL}, memory_free_mb=1e6)
        for name, lanes in machine.lanes.items()
    ]
    scheduler = Scheduler(devices, costs, max_requests=1 << 20, max_bytes=1 << 40)
    chance = np.random.default_rng(queued + clients)
    clock = time.perf_counter_ns
    now_ns = 0
    running: list[Batch] = []

    def come(count: int) -> list[Request]:
        waits = chance.uniform(0.4e9, 0.9e9, count)
        return [
            Request(
                _MODEL,
                max_batch_size=machine.limits[_MODEL],
                client=str(chance.integers(clients)),
                wanted="auto",
                deadline_ns=now_ns + int(wait),
            )
            for wait in waits
        ]

    def leave(requests: int) -> int:
        """Batches end and others start, until so many requests have started. Nanoseconds that it took."""
        used = started = 0
        while started < requests and scheduler.queued:
            ended = running.pop(0) if running else None
            begin = clock()
            if ended is not None:
                scheduler.finished(ended, 0.0)
            batches, _ = scheduler.next_batches(now_ns)
            used += clock() - begin
            if ended is not None:
                for request in ended.requests:
                    request.done = True
            running.extend(batches)
            started += sum([len(batch.requests) for batch in batches])
        return used

    for request in come(queued):
        scheduler.add(request, now_ns)
    add_us, start_us = [], []
    for _ in range(rounds):
        requests = come(_ROUND)
        now_ns += _STEP_NS
        begin = clock()
        for request in requests:
            scheduler.add(request, now_ns)
        add_us.append((clock() - begin) / 1e3 / _ROUND)
        start_us.append(leave(scheduler.queued - queued) / 1e3 / _ROUND)
    return Decision(queued, clients, float(np.median(add_us)), float(np.median(start_us)))
