"""Memory of the traffic: its limit, and its return from the C library after an attack."""

from __future__ import annotations

import math
import threading

from tnxctl import malloc
from tnxctl.protocol.wire import MIB
from tnxd.process import resident as memory
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router

# Memory beyond what a quiet daemon had: from so much on it is worth to give it back.
_TRIM_BYTES = 48 * MIB
_QUIET_BYTES = 16 * MIB
_TRIM_EVERY_S = 1.0

# Times that it is sought: what traffic had is freed late on a busy machine. Where there was no traffic to speak of, the
# memory is that of forwards: they take it again, page by page, and are slower for each time that it was given back.
_TRIMS = 10
_TRIMS_OF_FORWARDS = 2

# And then once in a while: on a busy machine the last of a flood may be freed later than anybody waits for.
_LATE_TRIM_EVERY_S = 30.0

# A daemon that has had less for so many looks is quiet with less.
_LOOKS = 30

# Connections that end before memory is given back: libzmq takes 23 KiB for each, which glibc keeps, in ever new places.
_TRIM_AFTER_CONNECTIONS = 256


class TrafficMemory:
    """The memory that messages, queues and replies take, looked after by the serving loop."""

    def __init__(self, router: Router, admission: Admission) -> None:
        self._router = router
        self._admission = admission
        self._quiet_bytes = 0
        self._settled_bytes = 0
        self._trims_left = _TRIMS_OF_FORWARDS
        self._last_trim = -math.inf
        self._most_lately = 0
        self._looks_below = 0
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
        resident = memory.resident_bytes()
        if admission.traffic_bytes > admission.max_traffic_bytes and router.cut_worst():
            return
        if not settled or not self._quiet_bytes:
            self._quiet_bytes = self._settled_bytes = resident
            return
        self._fall(resident)
        if (
            resident - self._quiet_bytes > admission.max_traffic_bytes
            or admission.traffic_bytes > admission.max_traffic_bytes
        ):
            router.measure_unread(everywhere=True)
            if router.cut_worst():
                return
        if router.dropped != self._dropped or admission.traffic_bytes >= _QUIET_BYTES:
            # What connections that were cut off had sent is freed as the router drops it: until all is dropped, on a
            # busy machine for a minute, the process has what traffic took.
            self._dropped = router.dropped
            self._trims_left = _TRIMS
        if resident <= self._quiet_bytes + _TRIM_BYTES:
            self._trims_left = min(self._trims_left, _TRIMS_OF_FORWARDS)
            if resident <= self._settled_bytes + _TRIM_BYTES or now < self._last_trim + _LATE_TRIM_EVERY_S:
                return
        elif now < self._last_trim + _TRIM_EVERY_S:
            return
        if admission.traffic_bytes < _QUIET_BYTES:
            self._last_trim = now
            _trim()
            self._trims_left -= 1
            if self._trims_left <= 0:
                self._quiet_bytes = max(resident, self._quiet_bytes)  # whatever has it, it is no traffic
                self._trims_left = _TRIMS_OF_FORWARDS

    def _fall(self, resident: int) -> None:
        """Lower what a quiet daemon has to the most that it has had lately, once that is less."""
        if resident >= self._quiet_bytes:
            self._looks_below = self._most_lately = 0
            return
        self._most_lately = max(self._most_lately, resident)
        self._looks_below += 1
        if self._looks_below == _LOOKS:
            self._quiet_bytes = self._most_lately
            self._looks_below = self._most_lately = 0

    def look_at_connections(self) -> None:
        """Give memory back where many connections have ended."""
        if self._router.closed - self._closed >= _TRIM_AFTER_CONNECTIONS:
            self._closed = self._router.closed
            _trim()


def _trim() -> None:
    threading.Thread(target=malloc.trim, name="trim", daemon=True).start()
