"""Accounts of what waits and runs: for all devices, and with them for each device, model and placement."""

from __future__ import annotations

from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.ragged import RaggedQueue
from tnxd.scheduling.request import Request
from tnxd.scheduling.request_queue import RequestQueue


class Accounts:
    """Counts over all devices.

    Attributes:
        queued, queued_bytes: requests that wait, and their inputs.
        running: requests in batches that run; a background batch counts as one.
        background: background batches that run.
    """

    def __init__(self) -> None:
        self.queued = 0
        self.queued_bytes = 0
        self.running = 0
        self.background = 0

    def enqueue(self, device: Device, queue: RequestQueue, request: Request) -> None:
        """Count a request that has joined a queue."""
        level, cost_us, placement = request.priority, request.cost_us, queue.placement
        device.enqueue(level, request.rows, cost_us)
        placement.queued += 1
        placement.backlog_us[level] += cost_us
        load = placement.load
        load.queued += 1
        load.queued_bytes += request.nbytes
        self.queued += 1
        self.queued_bytes += request.nbytes

    def dequeue(self, device: Device, queue: RequestQueue, requests: list[Request]) -> None:
        """Count off requests that have left a queue."""
        placement, rows, nbytes, count = queue.placement, 0, 0, len(requests)
        load, counts, backlog_us, own_us = placement.load, device.counts, device.backlog_us, placement.backlog_us
        for request in requests:
            level, cost_us = request.priority, request.cost_us
            counts[level] -= 1
            backlog_us[level] -= cost_us
            own_us[level] -= cost_us
            rows += request.rows
            nbytes += request.nbytes
        device.dequeued(count, rows)
        placement.queued -= count
        load.queued -= count
        load.queued_bytes -= nbytes
        self.queued -= count
        self.queued_bytes -= nbytes

    def start_batch(
        self,
        device: Device,
        lane: int,
        queue: RequestQueue,
        requests: list[Request],
        rows: int,
        now_ns: int,
        run_us: float,
        threads: int = 1,
        *,
        length: int = 0,
    ) -> Batch:
        """Make a batch, and count it as running.

        Args:
            run_us: predicted microseconds that it takes the lane; 0: nobody knows. threads: that work on it.
            length: see `Batch`.
        """
        placement = queue.placement
        batch = Batch(device, lane, queue.key[0], requests, rows, queue.costs, placement.max_rows, now_ns, run_us)
        if length and isinstance(queue, RaggedQueue):
            batch.length, batch.surface = length, queue.surface
        if lane >= 0:
            batch.had_cores = device.has_cores_for_team
            begin_ns = now_ns if device.chip is None else device.chip.begins_ns(run_us, now_ns, lane)
            device.busy_until_ns[lane] = begin_ns + int(run_us * 1e3)
            if threads > 1:
                batch.threads = device.wide[lane] = threads
        if device.chip is not None:
            device.chip.begin(lane, run_us, now_ns, waited=device.backlog_ns > 0)
        device.running_rows += rows
        placement.lanes.append(lane)
        weight = len(requests) or 1
        placement.load.running += weight
        self.running += weight
        return batch
