"""A client that offers more than can be served: `python bench/flood.py`, told what to do by lines, see `openload`.

Like `zmtpload` it writes ZMTP to a TCP socket itself: one thread, bytes made beforehand, what is due is written
together, what has come is read together, and nothing is decoded while the clock runs. So one process can offer some
hundred thousand requests of a kilobyte per second. It answers no PING; the daemon sends none.
"""

from __future__ import annotations

import select
import struct
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import repeat

import msgspec
import numpy as np

import openload
import zmtpsocket
from loadgen import PATIENCE_SECONDS
from openload import CHECKED_EVERY, STDIN, TICK_NS, Record
from outcomes import Outcomes
from throttle import Throttle
from tnxctl.protocol.wire import DEFAULT_PRIORITY
from workload import FIRST_ID, STAMP, Workload
from zmtpsocket import MORE, READ_BYTES, Messages, frame

_BATCH_BYTES = 1 << 18


class Setting(msgspec.Struct, frozen=True):
    """Settings that all loads of a client have in common.

    Attributes:
        samples: an .npz file: `inputs` [K, rows, ...], which take turns, and the `outputs` that they must give.
        tolerance: of these. input: the name of the model's input.
        deadline_us: of every request, None for none. urgent: share of the requests with priority 0; the others leave
            it to the model.
        heeds: whether requests say when they are sent, and are held back where the daemon would refuse them.
    """

    endpoint: str
    samples: str
    model: str
    input: str
    tolerance: float
    deadline_us: float | None
    urgent: float = 0.0
    heeds: bool = False

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
            stamped=self.heeds,
        )


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

    def bytes_of(self, numbers: Iterable[int], urgent: Sequence[bool], now_ns: int) -> bytes:
        """The requests of these numbers, sent now."""
        before, after, variants = self._before, self._after, self._variants
        leaving: list[bytes] = []
        for number in numbers:
            kind = urgent[number]
            leaving += (
                before[kind],
                (FIRST_ID + number).to_bytes(8, "big"),
                after[kind][number % variants],
            )
        # Only those that are stamped hold that number; a tensor by chance would differ in its last digits.
        return b"".join(leaving).replace(STAMP, struct.pack(">d", now_ns / 1e3))


def _parts(workload: Workload, number: int) -> tuple[bytes, bytes]:
    """The bytes before the id of a request, and those behind it."""
    header, tensor = workload.request(number)
    head = frame(header, MORE)
    at = len(head) - len(header) + header.index((FIRST_ID + number).to_bytes(8, "big"))
    return head[:at], head[at + 8 :] + frame(tensor)


class Flood:
    """One load of one client. A connection that the server ends is made anew at once.

    Args:
        workload: knows the right answers.
        heeds, deadline_s: whether it heeds refusals, and the deadline of all requests.
    """

    def __init__(self, endpoint: str, messenger: Messenger, workload: Workload, heeds: bool, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._messenger = messenger
        self._workload = workload
        self._heeds = heeds
        self._deadline_s = deadline_s
        self._throttle: Throttle | None = None
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self.record = Record()
        # One for each connection: the number of the first request that it sent, and what was read of it, when.
        self._lives: list[tuple[int, list[tuple[int, bytes]]]] = []
        self._connect()

    def _connect(self) -> None:
        self._socket, received = zmtpsocket.connect(self._endpoint)
        self._socket.setblocking(False)
        self._parts: list[tuple[int, bytes]] = []
        if received:
            self._parts.append((time.perf_counter_ns(), received))
        self._lives.append((len(self.record.sent), self._parts))

    def _connect_again(self) -> None:
        while self._read() > 0:  # what had come before the end
            pass
        self._socket.close()
        self.record.cut += 1
        self._connect()
        if self._throttle is not None:
            self._throttle.reset()

    def send(self, due: Sequence[int], end: int, urgent: Sequence[bool]) -> None:
        """See `openload.Client`."""
        clock, messenger = time.perf_counter_ns, self._messenger
        tried, sent = self.record.tried, self.record.sent
        size, batch, count = messenger.size, messenger.batch, len(due)
        leaving = memoryview(b"")  # of these requests, the last ones up to number `stop`
        numbers: Sequence[int] = ()
        stop = 0
        if self._heeds:
            self._throttle = Throttle(self._deadline_s, urgent)
        while (now := clock()) < end:
            reached = bisect_right(due, now, len(tried))
            tried.extend(repeat(now, reached - len(tried)))
            if not leaving and stop < reached:
                first, stop = stop, min(reached, stop + batch)
                numbers = range(first, stop)
                if self._throttle is not None:
                    numbers = self._throttle.admit(first, stop, now / 1e9)
                leaving = memoryview(messenger.bytes_of(numbers, urgent, now))
                if not numbers:
                    sent.extend(repeat(now, stop - len(sent)))
            blocked = False
            try:
                if leaving:
                    now = clock()
                    leaving = leaving[self._socket.send(leaving) :]
                    gone = len(numbers) - -(-len(leaving) // size)
                    reached = stop if not leaving else numbers[gone - 1] + 1 if gone else 0
                    sent.extend(repeat(now, reached - len(sent)))
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
        now, part = time.perf_counter_ns(), bytes(self._view[:size])
        self._parts.append((now, part))
        if self._throttle is not None:
            self._throttle.receive(part, now / 1e9)
        return size

    def listen(self, stop: int) -> None:
        """See `openload.Client`. A connection that is ended now is not made anew."""
        connection = self._socket.fileno()
        watched = [stop, connection]
        while True:
            readable, _, _ = select.select(watched, [], [])
            if connection in readable and self._read() < 0:
                watched.remove(connection)
            if stop in readable:
                return

    def finish(self, outcomes: Outcomes) -> None:
        """See `openload.Client`."""
        until = time.perf_counter() + PATIENCE_SECONDS
        lives, sent = self._lives, len(self.record.sent)
        held = np.array(self._throttle.held if self._throttle is not None else [], np.int64)
        outcomes.hold(held)
        for place, (first, parts) in enumerate(lives):
            last = place == len(lives) - 1
            stop = sent if last else lives[place + 1][0]
            missing = stop - first - int(((held >= first) & (held < stop)).sum())
            messages, come, taken = Messages(), 0, 0
            gone = not last
            while True:
                for arrived_ns, part in parts[taken:]:
                    for header, tensor in messages.take(part):
                        checked = None if come % CHECKED_EVERY else tensor
                        missing -= outcomes.answer(arrived_ns, header, checked, self._workload)
                        come += 1
                taken = len(parts)
                if not missing or gone or (left := until - time.perf_counter()) <= 0:
                    break
                select.select([self._socket], [], [], left)
                gone = self._read() < 0
            if gone:
                outcomes.lose(first, stop)
                self.record.cut += last

    def close(self) -> None:
        """See `openload.Client`."""
        self._socket.close()


def main() -> None:
    setting = msgspec.json.decode(openload.first_line(STDIN), type=Setting)
    workload = setting.workload()
    kinds = [setting.workload(DEFAULT_PRIORITY), setting.workload(0)] if setting.urgent else [workload]
    messenger = Messenger(kinds)
    print("ready", flush=True)
    deadline_s = (setting.deadline_us or 0.0) / 1e6
    openload.obey(
        lambda: Flood(setting.endpoint, messenger, workload, setting.heeds, deadline_s), STDIN, setting.urgent
    )


if __name__ == "__main__":
    main()
