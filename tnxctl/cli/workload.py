"""Many requests to one daemon: one after the other, or a fixed number of them outstanding."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from tnxctl.protocol.errors import DeadlineExceeded, TensorNextError, Unavailable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tnxctl.client import Client
    from tnxctl.protocol.datatypes import Array
    from tnxctl.results import Result

_Done: TypeAlias = "queue.SimpleQueue[tuple[int, float, Future[Result]]]"

# Waits for a lock cannot be interrupted on Windows: Ctrl-C is seen when the wait ends.
_INTERRUPTIBLE_WAIT_S = 0.5


class Options(TypedDict):
    """Arguments of `Client.predict`."""

    model: str
    prefer_gpu: bool
    min_gpu_memory_mb: float
    device: str
    deadline: float | None
    priority: int | None
    route_key: str


@dataclass(frozen=True, slots=True)
class Call:
    """Parameters that all requests of a run share."""

    inputs: Mapping[str, Array]
    options: Options


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one request.

    Attributes:
        index: number of the request, from 1.
        round_trip_ms: from the call to its answer, seen from here.
    """

    index: int
    round_trip_ms: float
    outcome: Result | TensorNextError


class Run:
    """Many requests of one call, and their answers as they come, when it is iterated over.

    At most `concurrency` of them are outstanding. The run ends early when the daemon cannot be reached, with the
    answers of what is outstanding, which ends soon as well. It ends at once when as many requests in a row as are
    outstanding, and three at least, have run into `--timeout`: the others would only wait and fail, too. A deadline
    that was missed is an answer, be it this call's or the model's own.

    Args:
        timeout: of the client, in seconds.

    Attributes:
        sent: requests that went out so far, answered or not.
    """

    def __init__(self, client: Client, call: Call, count: int, concurrency: int, timeout: float) -> None:
        self.sent = 0
        self._client = client
        self._call = call
        self._count = count
        self._concurrency = concurrency
        self._timeout = timeout

    def __iter__(self) -> Iterator[Answer]:
        silent = 0
        for answer in self._one_by_one() if self._concurrency == 1 else self._several():
            yield answer
            late = isinstance(answer.outcome, DeadlineExceeded) and self._call.options["deadline"] is None
            silent = silent + 1 if late and answer.round_trip_ms >= self._timeout * 1e3 else 0
            if isinstance(answer.outcome, Unavailable):
                self._count = self.sent
            elif silent >= max(3, self._concurrency):
                return

    def _one_by_one(self) -> Iterator[Answer]:
        outcome: Result | TensorNextError
        while self.sent < self._count:
            self.sent += 1
            started = time.perf_counter()
            try:
                outcome = self._client.predict(self._call.inputs, **self._call.options)
            except TensorNextError as error:
                outcome = error
            yield Answer(self.sent, _since(started), outcome)

    def _several(self) -> Iterator[Answer]:
        done: _Done = queue.SimpleQueue()
        outstanding = 0
        while True:
            while outstanding < self._concurrency and self.sent < self._count:
                self._submit(done)
                outstanding += 1
            if not outstanding:
                return
            index, round_trip_ms, future = _next(done)
            outstanding -= 1
            yield Answer(index, round_trip_ms, _outcome(future))

    def _submit(self, done: _Done) -> None:
        self.sent = index = self.sent + 1  # first: an interrupt may come before the next line is through
        started = time.perf_counter()
        future = self._client.submit(self._call.inputs, **self._call.options)
        # The callback runs in the client's thread: the time is that of the arrival, not of our turn to look.
        future.add_done_callback(lambda future: done.put((index, _since(started), future)))


def _next(done: _Done) -> tuple[int, float, Future[Result]]:
    while True:
        try:
            return done.get(timeout=_INTERRUPTIBLE_WAIT_S)
        except queue.Empty:
            continue


def _outcome(future: Future[Result]) -> Result | TensorNextError:
    try:
        return future.result()
    except TensorNextError as error:
        return error


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
