"""Requests of one connection that wait, the most urgent first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from tnxd.scheduling.request import Request

Entry = tuple[int, int, Request]
"""Request behind its sort keys: due time in nanoseconds, serial."""

MAX_PASSED_OVER = 16
"""Requests of one queue, and connections of one level, that work stealing looks at in vain before it stops."""


class ConnectionQueue:
    """Sorted list of the requests of one connection of a client on one level.

    A list, and not a heap: work stealing takes requests out of its middle.

    Attributes:
        entries: in order of due time and serial. Those before the index `start` have left.
        removed: entries from `start` on whose requests wait no more.
    """

    __slots__ = ("client", "entries", "peer", "removed", "start")

    def __init__(self, client: str, peer: bytes) -> None:
        self.client = client
        self.peer = peer
        self.entries: list[Entry] = []
        self.start = 0
        self.removed = 0

    def __len__(self) -> int:
        return len(self.entries) - self.start

    def add(self, entry: Entry) -> bool:
        """Insert a request. True if it is the new head."""
        entries = self.entries
        if not entries or entry > entries[-1]:
            entries.append(entry)
        else:
            insort(entries, entry, self.start)
        return entries[self.start] is entry

    def remove(self) -> None:
        """Count a request that waits no more. Once these are the greater part, all of them are swept out."""
        self.removed += 1
        if 2 * self.removed > len(self):
            self._sweep()

    def _sweep(self) -> None:
        self.entries = [entry for entry in self.entries[self.start :] if entry[2].waiting]
        self.start = self.removed = 0

    def head(self) -> Entry | None:
        """First request that still waits."""
        while self.start < len(self.entries):
            entry = self.entries[self.start]
            if entry[2].waiting:
                return entry
            self.pop()
            self.removed -= 1
        return None

    def pop(self) -> None:
        """Take out the first entry."""
        self.start += 1
        if 2 * self.start > len(self.entries):  # so each entry is moved once, on average, and none is kept for long
            del self.entries[: self.start]
            self.start = 0

    def steal(self, rows: int, now_ns: int, ends_ns: int, eligible: Callable[[Request], bool]) -> list[Request]:
        """Take out requests for another device, see `RequestQueue.steal`. The queue must have a head."""
        entries = self.entries
        first = last = bisect_left(entries, (ends_ns,), self.start)
        if entries[self.start][0] < now_ns:  # it is worth something for longer, else it would not wait any more
            first = last = self.start
        stolen: list[Request] = []
        left: list[Entry] = []
        while last < len(entries) and rows > 0 and len(left) < MAX_PASSED_OVER:
            request = entries[last][2]
            if not request.waiting:
                self.removed -= 1
            elif request.rows <= rows and request.deadline_ns >= ends_ns and eligible(request):
                rows -= request.rows
                stolen.append(request)
            else:
                left.append(entries[last])
            last += 1
        entries[first:last] = left
        if 2 * (self.start + self.removed) > len(entries):  # less is left now beside those that have left
            self._sweep()
        return stolen
