"""A client that offers more than can be served to a server that speaks HTTP: `flood`, with many connections.

`python bench/httpflood.py`, told what to do by lines, see `openload`. A connection carries one request at a time, as
HTTP clients have it. A request that finds none free waits in the client until one is, and that is time since it was
due, but not since it was sent.
"""

from __future__ import annotations

import select
import socket
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import repeat
from urllib.parse import urlsplit

import msgspec
import numpy as np

import httpload
import openload
from loadgen import PATIENCE_SECONDS
from openload import CHECKED_EVERY, STDIN, TICK_NS, Record
from outcomes import Outcome, Outcomes
from processes import BenchError
from workload import Workload

HEADERS = {"Content-Type": "application/octet-stream"}

_READ_BYTES = 1 << 16

_OUTCOMES = {
    b"200": Outcome.RESULT,
    b"408": Outcome.EXPIRED,
    b"429": Outcome.FULL,
    b"503": Outcome.UNAVAILABLE,
    b"504": Outcome.EXPIRED,
}
"""By status. A server that has no deadlines gives none of the errors; mosec gives 408 where it has a time limit."""


class HttpSetting(msgspec.Struct, frozen=True):
    """Settings that all loads of a client share. Bodies are the bytes of the array and nothing else, both ways.

    Attributes:
        samples: an .npz file: `inputs` [K, rows, columns], which take turns, and the `outputs` that they must give.
        tolerance: of these.
        connections: most requests that are under way at a time.
    """

    url: str
    samples: str
    tolerance: float
    connections: int

    def workload(self) -> Workload:
        """Its requests, of which the arrays alone count."""
        with np.load(self.samples) as samples:
            inputs, outputs = list(samples["inputs"]), list(samples["outputs"])
        return Workload("", "", inputs, outputs, tolerance=self.tolerance)


class _Connection:
    """One connection. number: of its request; -1 if it has none. wanted: bytes of the answer, once that is known."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.number = -1
        self.leaving = memoryview(b"")
        self.received = b""
        self.wanted = 0


class HttpFlood:
    """One load of one client. A connection that the server ends is made anew when it is needed.

    Args:
        requests: as they go over the wire; they take turns. workload: knows the right answers.
    """

    def __init__(self, setting: HttpSetting, requests: Sequence[bytes], workload: Workload) -> None:
        parts = urlsplit(setting.url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._address = parts.hostname, parts.port
        self._setting = setting
        self._requests = requests
        self._workload = workload
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._free: list[_Connection] = []
        self.record = Record()
        self._answers: list[tuple[int, int, bytes]] = []  # number, when it was here, all of it
        self._ended: list[int] = []  # numbers whose connection was
        for _ in range(setting.connections):
            self._connect()

    def _connect(self) -> None:
        connection = _Connection(self._address)
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        self._free.append(connection)

    def send(self, due: Sequence[int], end: int, urgent: Sequence[bool]) -> None:
        """See `openload.Client`. None is urgent."""
        clock, free, count = time.perf_counter_ns, self._free, len(due)
        tried, sent = self.record.tried, self.record.sent
        while (now := clock()) < end:
            reached = bisect_right(due, now, len(tried))
            tried.extend(repeat(now, reached - len(tried)))
            while free and len(sent) < reached:
                connection = free.pop()
                connection.number = len(sent)
                connection.leaving = memoryview(self._requests[connection.number % len(self._requests)])
                sent.append(clock())
                self._push(connection)
            early = now + TICK_NS - clock()
            if early > 0:
                time.sleep(early / 1e9)
            until = end if len(tried) == count else min(due[len(tried)], end)
            self._take(max(until - clock(), 0) / 1e9)

    def _push(self, connection: _Connection) -> None:
        """Send what its socket has room for, and have what is left sent later."""
        before = len(connection.leaving)
        try:
            connection.leaving = connection.leaving[connection.socket.send(connection.leaving) :]
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)
            return
        if connection.leaving:
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)
        elif before:
            self._epoll.modify(connection.socket, select.EPOLLIN)

    def _take(self, seconds: float, *others: int) -> bool:
        """Take what has come, waiting for so long for anything. Whether one of the other descriptors has something."""
        found = False
        for descriptor, events in self._epoll.poll(seconds):
            connection = self._connections.get(descriptor)
            if connection is None:
                found = found or descriptor in others
                continue
            if events & select.EPOLLOUT:
                self._push(connection)
            if events & ~select.EPOLLOUT and descriptor in self._connections:
                self._read(connection)
        return found

    def _read(self, connection: _Connection) -> None:
        try:
            part = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._end(connection)
            return
        received = connection.received = connection.received + part if connection.received else part
        if not connection.wanted:
            stop = received.find(b"\r\n\r\n")
            if stop < 0:
                return
            connection.wanted = stop + 4 + httpload.content_length(self._setting.url, received[:stop])
        if len(received) >= connection.wanted:
            self._answers.append((connection.number, time.perf_counter_ns(), received))
            connection.number, connection.received, connection.wanted = -1, b"", 0
            self._free.append(connection)

    def _end(self, connection: _Connection) -> None:
        """The server has ended it: have another in its place."""
        if connection.number >= 0:
            self._ended.append(connection.number)
            self.record.cut += 1
        else:
            self._free.remove(connection)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        try:
            self._connect()
        except OSError as error:
            raise BenchError(f"{self._setting.url}: {error}") from None

    def listen(self, stop: int) -> None:
        """See `openload.Client`."""
        self._epoll.register(stop, select.EPOLLIN)
        while not self._take(-1, stop):
            pass
        self._epoll.unregister(stop)

    def finish(self, outcomes: Outcomes) -> None:
        """See `openload.Client`."""
        until = time.perf_counter() + PATIENCE_SECONDS
        while len(self._free) < len(self._connections) and (left := until - time.perf_counter()) > 0:
            self._take(left)
        for number in self._ended:
            outcomes.lose(number, number + 1)
        for place, (number, arrived_ns, received) in enumerate(self._answers):
            outcomes.answered[number] = arrived_ns
            outcomes.outcome[number] = _OUTCOMES.get(received[9:12], Outcome.FAILED)
            looked_at = place % CHECKED_EVERY == 0 and outcomes.outcome[number] == Outcome.RESULT
            if looked_at and not self._workload.is_right(number, None, received.partition(b"\r\n\r\n")[2]):
                outcomes.outcome[number] = Outcome.WRONG

    def close(self) -> None:
        """See `openload.Client`."""
        self._epoll.close()
        for connection in self._connections.values():
            connection.socket.close()


def requests_of(url: str, workload: Workload) -> list[bytes]:
    """The requests of a workload, as they go over the wire."""
    return [
        httpload.request_bytes(url, HEADERS, workload.input(number).tobytes()) for number in range(workload.variants)
    ]


def main() -> None:
    setting = msgspec.json.decode(openload.first_line(STDIN), type=HttpSetting)
    workload = setting.workload()
    requests = requests_of(setting.url, workload)
    print("ready", flush=True)
    openload.obey(lambda: HttpFlood(setting, requests, workload), STDIN)


if __name__ == "__main__":
    main()
