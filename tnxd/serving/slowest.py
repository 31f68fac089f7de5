"""The slowest requests of the last minute, to be explained."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from heapq import heappush, heapreplace
from itertools import count

from tnxctl.protocol.statistics import SlowRequest

KEPT_S = 60.0
"""Seconds for which a slow request is kept."""

SLOT_S = 15.0
"""The slowest are told apart by when they came: so long is each slot."""

MOST = 8
"""Requests of a slot that are kept."""

_Kept = tuple[float, int, float, SlowRequest, str]  # total, a number, when by the monotonic clock, request, client

_numbers = count()


class Slowest:
    """Slowest requests of one version: of each slot of time the worst ones.

    A request costs one comparison with `floor_us`, unless it is one of the slowest.

    Attributes:
        floor_us: only requests that took longer are taken.
    """

    __slots__ = ("_past", "_slot", "floor_us")

    def __init__(self) -> None:
        self.floor_us = -1.0
        self._slot: list[_Kept] = []
        self._past: deque[list[_Kept]] = deque(maxlen=int(KEPT_S / SLOT_S))

    def add(self, request: SlowRequest, client: str) -> None:
        """Keep a request that took longer than `floor_us`. Args: client: its name, which not everybody is told."""
        kept = request.timing.total_us, next(_numbers), time.monotonic(), request, client
        if len(self._slot) < MOST:
            heappush(self._slot, kept)
        else:
            heapreplace(self._slot, kept)
        if len(self._slot) == MOST:
            self.floor_us = self._slot[0][0]

    def end_slot(self) -> None:
        """Begin a new slot of time. To be called every `SLOT_S` seconds."""
        if self._slot or self._past:
            self._past.appendleft(self._slot)
            self._slot = []
            self.floor_us = -1.0
            if not any(self._past):
                self._past.clear()

    def kept(self) -> Iterator[tuple[SlowRequest, str, float]]:
        """Requests of the last `KEPT_S` seconds, in no order, with the names of their clients and their ages."""
        now = time.monotonic()
        for slot in (self._slot, *self._past):
            for _, _, at, request, client in slot:
                if now - at <= KEPT_S:
                    yield request, client, now - at
