"""Deadlines of requests, in the order in which they come."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from tnxd.scheduling.request import NEVER, Request

# Entries of requests that are done are swept out once the heap has more than so many, and more than so many times
# as many as there are requests.
_MIN_SWEPT = 64
_SWEEP_FACTOR = 4


class Deadlines:
    """Heap of the deadlines of requests that wait or run.

    Attributes:
        first_ns: the earliest deadline; NEVER if there is none.
    """

    __slots__ = ("_heap", "first_ns")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self.first_ns = NEVER

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request, outstanding: int) -> None:
        """Insert a request with a deadline.

        Args:
            outstanding: requests that wait or run.
        """
        heap = self._heap
        if len(heap) > _MIN_SWEPT and len(heap) > _SWEEP_FACTOR * outstanding:
            heap = self._heap = [entry for entry in heap if not entry[2].done]
            heapify(heap)
        heappush(heap, (request.deadline_ns, request.serial, request))
        self.first_ns = heap[0][0]

    def expire(self, now_ns: int) -> list[Request]:
        """Take out the requests whose deadline has come. Returns those that are not done."""
        heap, expired = self._heap, []
        while heap and heap[0][0] <= now_ns:
            _, serial, request = heappop(heap)
            if not request.done and serial == request.serial:  # one that was added again has a second entry
                expired.append(request)
        self.first_ns = heap[0][0] if heap else NEVER
        return expired
