"""A client that offers more than can be served, in an open loop: `python bench/flood.py`, told what to do by lines.

Like `zmtpload` it writes ZMTP to a TCP socket itself: one thread, bytes made beforehand, what is due is written
together, what has come is read together, and nothing is decoded while the clock runs. So one process can offer some
hundred thousand requests of a kilobyte per second.

Its first line is a `Setting`. Then there are three lines for each load, and a line from it after the first and the
last: a `Load`, for which it gets ready; when that is to begin, in nanoseconds of the monotonic clock, which all
processes of a machine share; and a path. When the load is over it goes on reading, so that nothing waits for it, until
the path is there. Then it waits for the answers that are missing, writes what became of the requests to that path (see
`outcomes`), and says how many connections it lost. It ends with stdin.
"""

from __future__ import annotations

import os
import select
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

import zmtpsocket
from loadgen import PATIENCE_SECONDS, fine_sleep, no_collector
from outcomes import Outcomes
from rounds import offsets_ns
from tnxctl.wire import DEFAULT_PRIORITY
from workload import FIRST_ID, Workload
from zmtpsocket import MORE, READ_BYTES, Messages, frame

TICK_NS = 100_000
"""Requests that are due within this time may leave together: a client that wakes up for each costs the server a core
where both share few."""

_BATCH_BYTES = 1 << 18

_CHECKED_EVERY = 256  # answers: to compare all with what they should be would take longer than the load


class Setting(msgspec.Struct, frozen=True):
    """What all loads of a client have in common.

    Attributes:
        samples: an .npz file: `inputs` [K, rows, ...], which take turns, and the `outputs` that they must give.
        tolerance: of these. input: the name of the model's input.
        deadline_us: of every request, None for none. urgent: share of the requests with priority 0; the others leave
            it to the model.
    """

    endpoint: str
    samples: str
    model: str
    input: str
    tolerance: float
    deadline_us: float | None
    urgent: float = 0.0

    def workload(self, priority: int | None = None) -> Workload:
        """Its requests."""
        with np.load(self.samples) as samples:
            inputs, outputs = list(samples["inputs"]), list(samples["outputs"])
        return Workload(
            self.model,
            self.input,
            inputs,
            outputs,
            tolerance=self.tolerance,
            deadline_us=self.deadline_us,
            priority=priority,
        )


class Load(msgspec.Struct, frozen=True):
    """One load: requests at random times, as of independent users, at this rate for so long."""

    rate: float
    seconds: float
    seed: int

    def offsets_ns(self) -> list[int]:
        """When each request is due, from the start."""
        # Some more than are due on average, since how many there are is a matter of chance, too.
        found = offsets_ns(self.rate, 1.2 * self.seconds + 10 / self.rate, "exponential", self.seed)
        return found[: bisect_left(found, int(self.seconds * 1e9))]


class Messenger:
    """Requests as they go over the wire. All have the same length.

    Args:
        workloads: requests that are not urgent, and those that are.

    Attributes:
        size: of one request, in bytes. batch: most of them that are written together.
    """

    def __init__(self, workloads: Sequence[Workload]) -> None:
        self._before: list[bytes] = []
        self._after: list[list[bytes]] = []
        for workload in workloads:
            parts = [_parts(workload, number) for number in range(workload.variants)]
            self._before.append(parts[0][0])
            self._after.append([after for _, after in parts])
        self._variants = workloads[0].variants
        self.size = len(self._before[0]) + 8 + len(self._after[0][0])
        self.batch = max(_BATCH_BYTES // self.size, 1)

    def bytes_of(self, first: int, stop: int, urgent: Sequence[bool]) -> bytes:
        """The requests from one number up to another."""
        before, after, variants = self._before, self._after, self._variants
        leaving: list[bytes] = []
        for number in range(first, stop):
            kind = urgent[number]
            leaving += (
                before[kind],
                (FIRST_ID + number).to_bytes(8, "big"),
                after[kind][number % variants],
            )
        return b"".join(leaving)


def _parts(workload: Workload, number: int) -> tuple[bytes, bytes]:
    """What goes before the id of a request, and what goes behind it."""
    header, tensor = workload.request(number)
    head = frame(header, MORE)
    at = len(head) - len(header) + header.index((FIRST_ID + number).to_bytes(8, "big"))
    return head[:at], head[at + 8 :] + frame(tensor)


@dataclass
class Recorded:
    """A record of one load.

    Attributes:
        tried, sent: see `Outcomes`, for as many of the first requests as came so far.
        lives: one for each connection: the number of the first request that it sent, and what was read of it, when.
    """

    tried: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    lives: list[tuple[int, list[tuple[int, bytes]]]] = field(default_factory=list)


class Flood:
    """One load of one client. A connection that the server ends is made anew at once.

    Attributes:
        cut: how often that happened, and once more if it was so after the load.
    """

    def __init__(self, endpoint: str, messenger: Messenger) -> None:
        self._endpoint = endpoint
        self._messenger = messenger
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self.recorded = Recorded()
        self.cut = 0
        self._connect()

    def _connect(self) -> None:
        self._socket, received = zmtpsocket.connect(self._endpoint)
        self._socket.setblocking(False)
        self._parts: list[tuple[int, bytes]] = []
        if received:
            self._parts.append((time.perf_counter_ns(), received))
        self.recorded.lives.append((len(self.recorded.sent), self._parts))

    def _connect_again(self) -> None:
        while self._read() > 0:  # what had come before the end
            pass
        self._socket.close()
        self.cut += 1
        self._connect()

    def send(self, due: Sequence[int], end: int, urgent: Sequence[bool]) -> None:
        """Send each request when it is due, or as soon after as the socket has room, and read what comes.

        Args:
            end: when it is over. What could not be sent by then is not sent any more.
        """
        clock, messenger = time.perf_counter_ns, self._messenger
        tried, sent = self.recorded.tried, self.recorded.sent
        size, batch, count = messenger.size, messenger.batch, len(due)
        leaving = memoryview(b"")  # of requests up to number `stop`
        stop = 0
        while (now := clock()) < end:
            reached = bisect_right(due, now, len(tried))
            tried.extend(repeat(now, reached - len(tried)))
            if not leaving and stop < reached:
                first, stop = stop, min(reached, stop + batch)
                leaving = memoryview(messenger.bytes_of(first, stop, urgent))
            blocked = False
            try:
                if leaving:
                    now = clock()
                    leaving = leaving[self._socket.send(leaving) :]
                    sent.extend(repeat(now, stop - -(-len(leaving) // size) - len(sent)))
                    blocked = bool(leaving)
            except BlockingIOError:
                blocked = True
            except OSError:
                leaving, stop = memoryview(b""), len(sent)
                self._connect_again()
                continue
            read = self._read()
            if read < 0:
                leaving, stop = memoryview(b""), len(sent)
                self._connect_again()
            elif read < READ_BYTES and (blocked or stop == len(tried)):
                self._rest(now, min(due[len(tried)] if len(tried) < count else end, end), blocked)

    def _rest(self, began: int, until: int, blocked: bool) -> None:
        """Sleep until an answer is here, the socket has room, or it is time. Never shorter than a tick."""
        early = began + TICK_NS - time.perf_counter_ns()
        if early > 0:
            time.sleep(early / 1e9)
        left = until - time.perf_counter_ns()
        if left > 0 or blocked:
            select.select([self._socket], [self._socket] if blocked else [], [], max(left, 0) / 1e9)

    def _read(self) -> int:
        """Take what has come. Returns how many bytes; -1: the server has ended the connection."""
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            return 0
        except OSError:
            return -1
        if not size:
            return -1
        self._parts.append((time.perf_counter_ns(), bytes(self._view[:size])))
        return size

    def listen(self, stop: int) -> None:
        """Read what comes until this descriptor has something to read, too."""
        connection = self._socket.fileno()
        watched = [stop, connection]
        while True:
            readable, _, _ = select.select(watched, [], [])
            if connection in readable and self._read() < 0:
                watched.remove(connection)
            if stop in readable:
                return

    def finish(self, outcomes: Outcomes, workload: Workload) -> None:
        """Wait for the answers that are missing, but not for ever, and put all in their places."""
        until = time.perf_counter() + PATIENCE_SECONDS
        lives, sent = self.recorded.lives, len(self.recorded.sent)
        for place, (first, parts) in enumerate(lives):
            last = place == len(lives) - 1
            stop = sent if last else lives[place + 1][0]
            missing = stop - first
            messages, come, taken = Messages(), 0, 0
            gone = not last
            while True:
                for arrived_ns, part in parts[taken:]:
                    for header, tensor in messages.take(part):
                        checked = None if come % _CHECKED_EVERY else tensor
                        missing -= outcomes.answer(arrived_ns, header, checked, workload)
                        come += 1
                taken = len(parts)
                if not missing or gone or (left := until - time.perf_counter()) <= 0:
                    break
                select.select([self._socket], [], [], left)
                gone = self._read() < 0
            if gone:
                outcomes.lose(first, stop)
                self.cut += last

    def close(self) -> None:
        self._socket.close()


def main() -> None:
    with os.fdopen(0, "rb", buffering=0) as stdin:  # a buffer would hide from `select` what it holds
        setting = msgspec.json.decode(stdin.readline(), type=Setting)
        workload = setting.workload()
        kinds = [setting.workload(DEFAULT_PRIORITY), setting.workload(0)] if setting.urgent else [workload]
        messenger = Messenger(kinds)
        print("ready", flush=True)
        while line := stdin.readline():
            load = msgspec.json.decode(line, type=Load)
            offsets = load.offsets_ns()
            urgent: NDArray[np.bool_] = np.random.default_rng(load.seed).random(len(offsets)) < setting.urgent
            choice = urgent.tolist()
            flood = Flood(setting.endpoint, messenger)
            print("set", flush=True)
            start = int(stdin.readline() or 0)
            due = [start + offset for offset in offsets]
            with no_collector(), fine_sleep():
                flood.send(due, start + int(load.seconds * 1e9), choice)
                flood.listen(stdin.fileno())
            path = stdin.readline().decode().strip()
            if not path:
                break
            outcomes = Outcomes.of(due, flood.recorded.tried, flood.recorded.sent, urgent)
            flood.finish(outcomes, workload)
            flood.close()
            outcomes.save(Path(path))
            print(flood.cut, flush=True)


if __name__ == "__main__":
    main()
