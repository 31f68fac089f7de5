"""Load: requests encoded beforehand, the connection that they go out on, and a closed and an open loop of them.

The loops are lean so that the daemon is what is measured: one thread and one socket, with the headers of all requests
made of one. Connecting, encoding and decoding are those of `tnxctl.Client`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import select
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

import msgspec
import zmq

from tnxctl.call import Call
from tnxctl.channels.channel import POLLOUT, Channel
from tnxctl.cli.bench.recording import LOST, UNSENT, Recording, clock_ns
from tnxctl.durations import spell
from tnxctl.keys import lookup
from tnxctl.link import ZERO_COPY_BYTES, Link
from tnxctl.protocol import wire
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.session import MAX_PENDING_BYTES, MAX_PENDING_CALLS, Session

if TYPE_CHECKING:
    from tnxctl.results import Result

T = TypeVar("T")

FIRST_ID = 1 << 32  # msgpack writes whole numbers from here on in nine bytes: all headers have the same length
_STAMP = 314159265.35897932  # stands for the time at which a request is sent

_CHECK_MS = 500  # between two checks that the connection still stands; no wait is longer, as Ctrl-C needs on Windows
_CHECK_NS = _CHECK_MS * 1_000_000
_GRACE_NS = 1_000_000_000  # after the end of an open loop, to send what was due in a pause of this machine
_BURST = 64  # requests or answers in a row
_CHUNK = 4096  # random numbers drawn at a time


class Outgoing(NamedTuple):
    """Request that goes out now. Attributes: number: its id. nbytes: of its tensors."""

    number: int
    header: bytes
    tensors: Sequence[Any]
    nbytes: int


class Source(Protocol):
    """Requests to be sent, one after the other. Attributes: nbytes: of the tensors of one, or of the largest so far."""

    nbytes: int

    def next(self, now_ns: int) -> Outgoing:
        """The next request."""


class Answers(Protocol):
    """Whoever wants to see the answers."""

    def keep(self, number: int, result: wire.Result, frames: Sequence[bytes]) -> None:
        """Keep a result, or not. Args: number: id of the request. frames: of its outputs."""


class Requests:
    """Requests that differ in their ids and, if they have a deadline, in the time at which they are sent.

    Args:
        call: one of them, as the session encodes it.

    Attributes:
        sent: how many went out. nbytes: of the tensors of one.
    """

    def __init__(self, call: Call[Result]) -> None:
        self.sent = 0
        self.nbytes = call.nbytes
        header, *tensors = call.frames
        copied = call.nbytes < ZERO_COPY_BYTES
        self.tensors: list[Any] = [tensor.tobytes() if copied else tensor for tensor in tensors]
        request = wire.decode_request(header, wire.Limits())
        assert isinstance(request, wire.Predict)
        self.deadline_ns = math.inf if request.deadline_us is None else request.deadline_us * 1e3
        stamp = None if request.deadline_us is None else _STAMP
        header = wire.encode(msgspec.structs.replace(request, id=FIRST_ID, sent_us=stamp))
        self._before, after = header.split(FIRST_ID.to_bytes(8, "big"), 1)
        self._between, self._stamped, self._after = after.rpartition(struct.pack(">d", _STAMP))

    def next(self, now_ns: int) -> Outgoing:
        """The next request."""
        number = FIRST_ID + self.sent
        self.sent += 1
        stamp = struct.pack(">d", now_ns / 1e3) if self._stamped else b""
        header = b"".join((self._before, number.to_bytes(8, "big"), self._between, stamp, self._after))
        return Outgoing(number, header, self.tensors, self.nbytes)


class Connection:
    """The connection of a benchmark: a session makes it and asks on it, then its socket is used as it is.

    Args:
        timeout: in seconds, of what is asked.
    """

    def __init__(self, endpoint: str, timeout: float) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self.session = Session(endpoint, timeout, wire.Limits(), lookup.find(endpoint))
        self._link = Link(self.session)
        self._channel: Channel  # once it is open

    def __enter__(self) -> Self:
        """Connect. Raises the error of a health request that is not answered."""
        try:
            self.ask(self.session.encoder.health(timeout=None, now=time.monotonic()))
        except BaseException:
            self._link.close()
            raise
        assert self._link.channel is not None
        self._channel = self._link.channel
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def ask(self, call: Call[T]) -> T:
        """The answer to a call of the session, which connects for it if it has to."""
        link = self._link
        link.start(call)
        while not call.done:
            now = time.monotonic()
            wait_s = self.session.next_timer - now
            if wait_s <= 0:
                link.on_timer(now)
                continue
            for source, mask in zmq.zmq_poll(link.sources, math.ceil(min(wait_s * 1e3, _CHECK_MS))):
                link.handle(source, mask)
        return call.take()

    def send(self, requests: Source, recording: Recording, due_ns: int, now_ns: int) -> None:
        """Send the next request."""
        number, header, tensors, nbytes = requests.next(now_ns)
        recording.send(number, due_ns, now_ns)
        self._channel.send([header, *tensors], nbytes < ZERO_COPY_BYTES)

    def take(self, frames: list[Any] | None = None) -> bytes | None:
        """The header of an answer that is here; None: none is.

        Args:
            frames: gets its tensors.
        """
        found = self._channel.receive()
        if found is None:
            if self._channel.has_events:
                self.check()
            return None
        if frames is not None:
            frames += found[1:]
        header: bytes = found[0]
        return header

    def receive(self) -> bytes | None:
        """The header of the next answer; None if none came for a while."""
        header = self.take()
        if header is None:
            self.wait(clock_ns() + _CHECK_NS)
            header = self.take()
        return header

    def wait(self, until_ns: int) -> None:
        """Sleep until an answer may be there, or until then. Only directly after `take` found none."""
        seconds = min(until_ns - clock_ns(), _CHECK_NS) / 1e9  # zmq's own poll counts in milliseconds
        if seconds <= 0:
            return
        fd, mask = self._channel.descriptor()
        if fd < 0:  # it is over, as the next `take` tells
            return
        _, room, _ = select.select([fd], [fd] if mask & POLLOUT else [], [], seconds)
        if room:
            self._channel.on_room()

    def check(self) -> None:
        """Raise Unavailable if the connection is gone."""
        self._link.poll_events()
        if self._link.channel is None:
            raise Unavailable(f"{self.endpoint}: the connection broke while predict was under way")


def closed_loop(
    connection: Connection, requests: Requests, recording: Recording, concurrency: int, seconds: float
) -> None:
    """Closed loop: keep so many requests outstanding for so long. Each answer sends the next request.

    Raises:
        Unavailable: the connection broke, or the daemon takes no more requests.
        DeadlineExceeded: it answered nothing.
    """
    timeout_ns = int(connection.timeout * 1e9)
    outstanding = recording.outstanding
    with _steady(), recording.running():
        end = recording.began_ns + int(seconds * 1e9)
        last = now = recording.began_ns
        while True:
            while now < end and len(outstanding) < concurrency and not recording.unavailable:
                connection.send(requests, recording, now, now)
                now = clock_ns()
            if not outstanding or now >= min(end, last) + timeout_ns:
                break
            header = connection.receive()
            now = clock_ns()
            if header is None:
                connection.check()
            else:
                last = now
                recording.take(header, now)
    _finish(connection, recording)


def open_loop(
    connection: Connection, requests: Requests, recording: Recording, rate: float, seconds: float, seed: int
) -> None:
    """Open loop: send requests at random times, as of independent clients, whatever became of those before.

    A request that this client was too late to send is due at its time all the same, and its latency counts from there.

    Raises:
        Unavailable, DeadlineExceeded: see `closed_loop`.
    """
    with _steady(), recording.running():
        dues = _dues(recording.began_ns, rate, seconds, seed)
        end_ns = recording.began_ns + int(seconds * 1e9)
        _send_when_due(connection, requests, recording, dues, end_ns=end_ns)
    _finish(connection, recording)


def paced_loop(
    connection: Connection,
    requests: Source,
    recording: Recording,
    offsets_ns: Iterator[int],
    answers: Answers | None = None,
) -> None:
    """Open loop: send each request at its time, whatever became of those before, and all of them.

    Args:
        offsets_ns: times of the requests, from the beginning; each is asked for when the one before has been sent.
        answers: sees the results.

    Raises:
        Unavailable, DeadlineExceeded: see `closed_loop`.
    """
    with _steady(), recording.running():
        dues = (recording.began_ns + offset_ns for offset_ns in offsets_ns)
        _send_when_due(connection, requests, recording, dues, answers=answers)
    _finish(connection, recording)


def _send_when_due(
    connection: Connection,
    requests: Source,
    recording: Recording,
    dues: Iterator[int],
    *,
    end_ns: int | None = None,
    answers: Answers | None = None,
) -> None:
    """Send requests when they are due, and take the answers.

    Args:
        end_ns: when the loop is over: what could not be sent by then, and a little later, is not; None: when all is
            sent. The answers have the timeout, from then on.
    """
    outstanding = recording.outstanding
    timeout_ns = int(connection.timeout * 1e9)
    due = next(dues, None)
    now = last = recording.began_ns
    check_ns = now + _CHECK_NS
    while due is not None or outstanding:
        most = max(min(MAX_PENDING_CALLS, MAX_PENDING_BYTES // max(requests.nbytes, 1)), 1)
        for _ in range(_BURST):
            now = clock_ns()
            if due is None or due > now or len(outstanding) >= most:
                break
            if end_ns is not None and now > end_ns + _GRACE_NS:
                _give_up(recording, dues)
                due = None
                break
            connection.send(requests, recording, due, now)
            last = now
            due = next(dues, None)
        if recording.unavailable:
            due = None
        is_waiting = due is None or len(outstanding) >= most  # for answers alone
        limit = (last if end_ns is None else end_ns) + timeout_ns
        for _ in range(_BURST):
            if due is None and not outstanding:
                break
            frames: list[Any] | None = None if answers is None else []
            header = connection.take(frames)
            if header is None:
                connection.wait(limit if due is None or len(outstanding) >= most else due)
                break
            last = clock_ns()
            result = recording.take(header, last)
            if result is not None and answers is not None:
                answers.keep(result.id, result, frames or ())
        if now >= check_ns:
            connection.check()
            check_ns = now + _CHECK_NS
        if now >= limit and (is_waiting or end_ns is not None):
            break
    if due is not None:
        _give_up(recording, dues)


def _give_up(recording: Recording, dues: Iterator[int]) -> None:
    """Give up the request that is due next, and those behind it."""
    recording.give_up(1 + sum(1 for _ in dues), UNSENT, "this client had not come to send it when the step was over")


def _finish(connection: Connection, recording: Recording) -> None:
    within = spell(connection.timeout)
    recording.give_up(len(recording.outstanding), LOST, f"no answer came within {within}")
    recording.outstanding.clear()
    if recording.unavailable:
        raise Unavailable(recording.unavailable)
    if LOST in recording.errors and not recording.has_answers:
        raise DeadlineExceeded(f"{connection.endpoint} did not answer predict within {within}")


def _dues(began_ns: int, rate: float, seconds: float, seed: int) -> Iterator[int]:
    """Times at which the requests of an open loop are due: one at least."""
    import numpy as np

    generator = np.random.default_rng(seed)
    at = 0.0
    while True:
        for offset in (at + np.cumsum(generator.exponential(1 / rate, _CHUNK))).tolist():
            if offset >= seconds and at:
                return
            at = min(offset, seconds)
            yield began_ns + int(at * 1e9)


@contextmanager
def _steady() -> Iterator[None]:
    """Keep Python's collector from pausing the block, and have its sleeps end on time.

    Linux lets sleeps run over by 50 µs otherwise, to save power.
    """
    prctl: Any = None
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        set_slack, get_slack = 29, 30  # PR_SET_TIMERSLACK, PR_GET_TIMERSLACK
        before = prctl(get_slack, 0, 0, 0, 0)
        prctl(set_slack, ctypes.c_ulong(1), 0, 0, 0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if prctl is not None:
            prctl(set_slack, ctypes.c_ulong(before), 0, 0, 0)
