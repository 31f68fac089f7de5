"""Batching delay: small batches of models that ask for it wait for company."""

from __future__ import annotations

from heapq import heappop, heappush

from tnxd.scheduling.device import Device
from tnxd.scheduling.request import LEVELS, NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue


class Delays:
    """Heap of the queues that wait for company.

    Attributes:
        first_ns: when the first of them is ready; NEVER if none waits.
    """

    __slots__ = ("_heap", "first_ns")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Device, RequestQueue]] = []
        self.first_ns = NEVER

    def holds(self, device: Device, queue: RequestQueue, request: Request, now_ns: int) -> bool:
        """Whether a queue goes on waiting for company, now that it has a new request, which asks for a delay."""
        if queue.rows >= queue.placement.row_limit(request.max_batch_size):
            return False
        if request.length and queue.count >= request.most_rows:  # that limit is in tokens
            return False
        if queue.count == 1:
            queue.ready_ns = now_ns + request.max_delay_ns
            heappush(self._heap, (queue.ready_ns, request.serial, device, queue))
            self.first_ns = self._heap[0][0]
        return now_ns < queue.ready_ns

    def release(self, now_ns: int) -> None:
        """Offer the queues whose delay is over to the round robin of their devices."""
        heap = self._heap
        while heap and heap[0][0] <= now_ns:
            ready_ns, _, device, queue = heappop(heap)
            if ready_ns == queue.ready_ns:  # else it was emptied meanwhile, and waits anew
                for level in range(LEVELS):
                    device.offer(queue, level)
        self._look()

    def drop_empty(self) -> None:
        """Drop queues from the front in which nothing waits: a full batch took it, or it was withdrawn."""
        while self._heap and not self._heap[0][3].count:
            heappop(self._heap)
        self._look()

    def _look(self) -> None:
        self.first_ns = self._heap[0][0] if self._heap else NEVER
