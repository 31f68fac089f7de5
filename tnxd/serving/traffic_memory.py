"""Memory of the traffic: its limit, and its return from the C library after an attack."""

from __future__ import annotations

import threading

from tnxctl.protocol.wire import MIB
from tnxd.process import malloc
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router

# Memory beyond what a quiet daemon had: from so much on it is worth to give it back.
_TRIM_BYTES = 48 * MIB
_QUIET_BYTES = 16 * MIB
_TRIM_EVERY_S = 1.0
_TRIMS = 10

# Connections that end before memory is given back: libzmq takes 23 KiB for each, which glibc keeps, in ever new places.
_TRIM_AFTER_CONNECTIONS = 256


class TrafficMemory:
    """The memory that messages, queues and replies take, looked after by the serving loop."""

    def __init__(self, router: Router, admission: Admission) -> None:
        self._router = router
        self._admission = admission
        self._quiet_bytes = 0
        self._trims = 0
        self._next_trim = 0.0
        self._closed = 0
        self._dropped = 0

    def look(self, now: float, *, settled: bool) -> None:
        """Cut off connections while the traffic takes more than its limit, and give back memory that nobody uses.

        Args:
            now: in seconds of the monotonic clock.
            settled: whether no model comes or goes: else the memory of the process says nothing about traffic.
        """
        router, admission = self._router, self._admission
        admission.sweep()
        resident = malloc.resident_bytes()
        if admission.traffic_bytes > admission.max_traffic_bytes and router.cut_worst():
            return
        if not settled or not self._quiet_bytes:
            self._quiet_bytes = resident
            return
        if (
            resident - self._quiet_bytes > admission.max_traffic_bytes
            or admission.traffic_bytes > admission.max_traffic_bytes
        ):
            router.measure_unread(everywhere=True)
            if router.cut_worst():
                return
        if resident <= self._quiet_bytes + _TRIM_BYTES:
            self._quiet_bytes = min(self._quiet_bytes, resident)
            self._trims = 0
        elif admission.traffic_bytes >= _QUIET_BYTES:
            self._trims = 0
        elif now >= self._next_trim:
            self._next_trim = now + _TRIM_EVERY_S
            _trim()
            # What connections that were cut off had sent is freed as the router drops it: until all is dropped, on a
            # busy machine for a minute, the process has what traffic took.
            self._trims = self._trims + 1 if router.dropped == self._dropped else 0
            self._dropped = router.dropped
            if self._trims == _TRIMS:
                self._quiet_bytes = resident  # whatever has it, it is no traffic

    def look_at_connections(self) -> None:
        """Give memory back where many connections have ended."""
        if self._router.closed - self._closed >= _TRIM_AFTER_CONNECTIONS:
            self._closed = self._router.closed
            _trim()


def _trim() -> None:
    threading.Thread(target=malloc.trim, name="trim", daemon=True).start()
