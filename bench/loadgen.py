"""Load generators: requests sent to a server in a closed or an open loop, and when what came back.

They are lean so that the server is what is measured: one thread, one raw DEALER socket, bytes made beforehand, and
no decoding while the clock runs. `measurement.evaluate` reads the recordings afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import zmq

from processes import BenchError
from workload import Workload

Context = zmq.Context[zmq.Socket[bytes]]

PATIENCE_SECONDS = 10.0
"""A closed loop gives a server up that says nothing for so long; an open loop waits so long after the last request."""

_LEAD_NS = 10_000_000  # from the call of an open loop to its start: time to get ready

CHECKED = 8
"""Answers per recording whose tensors are kept, to be compared with the model's own output."""

_MORE = int(zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)


@dataclass
class Recording:
    """A record of what a load generator did and saw. Times are in nanoseconds of the monotonic clock.

    Attributes:
        first: number of the first request.
        due_ns: when each request was to be sent, from the first on. A closed loop sends when it can: then that is due.
        sent_ns: when it was sent.
        answers: when each answer was here and its header, in order of arrival.
        tensors: those of the last few answers.
        seconds: from the first request to the last answer.
    """

    first: int
    due_ns: Sequence[int] = field(default_factory=list)
    sent_ns: list[int] = field(default_factory=list)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    tensors: deque[bytes] = field(default_factory=lambda: deque(maxlen=CHECKED))
    seconds: float = 0.0


class Connection:
    """A raw DEALER socket that sends the requests of a workload in turn, numbered from 0."""

    def __init__(self, context: Context, endpoint: str, workload: Workload) -> None:
        self._endpoint = endpoint
        self._request = workload.request
        self._socket = socket = context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.linger = 0
        socket.rcvtimeo = int(PATIENCE_SECONDS * 1e3)
        socket.connect(endpoint)
        self._send, self._recv = socket.send, socket.recv
        self._get: Any = socket.get
        self._fd: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self.sent = 0

    def send(self) -> None:
        """Send the next request. Never blocks."""
        header, tensor = self._request(self.sent)
        self.sent += 1
        self._send(header, _MORE)
        self._send(tensor)

    def receive(self) -> tuple[bytes, bytes]:
        """Wait for the next answer: its header and its tensor, empty if it has none.

        Raises:
            BenchError: none came in PATIENCE_SECONDS.
        """
        try:
            header = self._recv()
        except zmq.Again:
            raise BenchError(f"{self._endpoint} has not answered for {PATIENCE_SECONDS:g} s") from None
        return header, self._recv() if self._get(zmq.RCVMORE) else b""

    def has_answer(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(self._get(zmq.EVENTS) & _POLLIN)

    def wait(self, seconds: float) -> None:
        """Sleep until an answer may be there, or for so long. Only directly after `has_answer` said no."""
        select.select([self._fd], [], [], seconds)  # zmq's own poll counts in milliseconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def closed_loop(connection: Connection, outstanding: int, seconds: float) -> Recording:
    """Keep so many requests in flight for so long: every answer sends the next request.

    Raises:
        BenchError: the server stopped answering.
    """
    clock, send, receive = time.perf_counter_ns, connection.send, connection.receive
    recording = Recording(connection.sent)
    sent, answers, tensors = recording.sent_ns, recording.answers, recording.tensors
    recording.due_ns = sent
    with no_collector():
        begin = clock()
        end = begin + int(seconds * 1e9)
        for _ in range(outstanding):
            sent.append(clock())
            send()
        while len(answers) < len(sent):
            header, tensor = receive()
            now = clock()
            answers.append((now, header))
            tensors.append(tensor)
            if now < end:
                sent.append(clock())
                send()
    recording.seconds = (answers[-1][0] - begin) / 1e9
    return recording


def open_loop(connection: Connection, offsets_ns: Sequence[int]) -> Recording:
    """Send each request at its own time, whatever became of those before it.

    A request that this program was too late to send is still due at its time, and its latency counts from there: a
    pause, of the server or of this machine, costs every request that was due in it.

    Args:
        offsets_ns: when each is due, ascending, from the start of the loop.
    """
    clock, send, receive, has_answer = time.perf_counter_ns, connection.send, connection.receive, connection.has_answer
    recording = Recording(connection.sent)
    sent, answers, tensors = recording.sent_ns, recording.answers, recording.tensors
    count = len(offsets_ns)
    with no_collector(), fine_sleep():
        begin = last_answer = clock() + _LEAD_NS
        due = recording.due_ns = [begin + offset for offset in offsets_ns]
        end = due[-1] + int(PATIENCE_SECONDS * 1e9)
        while len(answers) < count:
            now = clock()
            while len(sent) < count and due[len(sent)] <= now:
                sent.append(clock())
                send()
            if len(sent) == count and now >= end:
                break  # what has no answer by now is lost
            if has_answer():
                header, tensor = receive()
                last_answer = clock()
                answers.append((last_answer, header))
                tensors.append(tensor)
            else:
                until = due[len(sent)] if len(sent) < count else end
                connection.wait(max(until - clock(), 0) / 1e9)
    recording.seconds = max(last_answer - begin, 1) / 1e9
    return recording


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's collector from pausing the block."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def fine_sleep() -> Iterator[None]:
    """Have this thread's sleeps end on time: Linux lets them run over by 50 us otherwise, to save power."""
    if sys.platform != "linux":
        yield
        return
    set_slack, get_slack = 29, 30  # PR_SET_TIMERSLACK, PR_GET_TIMERSLACK
    prctl = ctypes.CDLL(None).prctl
    before = prctl(get_slack, 0, 0, 0, 0)
    prctl(set_slack, ctypes.c_ulong(1), 0, 0, 0)
    try:
        yield
    finally:
        prctl(set_slack, ctypes.c_ulong(before), 0, 0, 0)
