"""Many requests to one daemon: one after the other, or a fixed number of them outstanding."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from tnxctl.errors import DeadlineExceeded, TensorNextError, Unavailable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tnxctl.client import Client
    from tnxctl.frames import Array
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


def run(client: Client, call: Call, count: int, concurrency: int, timeout: float) -> Iterator[Answer]:
    """Send `count` requests and give the answers as they come, at most `concurrency` of them outstanding.

    The run ends early when the daemon cannot be reached, or when as many requests in a row as are outstanding, and
    three at least, have run into `--timeout`: what is left of it would only wait and fail as well. A deadline that was
    missed is an answer, be it this call's or the model's own.

    Args:
        timeout: of the client, in seconds.
    """
    silent = 0
    answers = _one_by_one(client, call, count) if concurrency == 1 else _several(client, call, count, concurrency)
    for answer in answers:
        yield answer
        late = isinstance(answer.outcome, DeadlineExceeded) and call.options["deadline"] is None
        silent = silent + 1 if late and answer.round_trip_ms >= timeout * 1e3 else 0
        if isinstance(answer.outcome, Unavailable) or silent >= max(3, concurrency):
            return


def _one_by_one(client: Client, call: Call, count: int) -> Iterator[Answer]:
    outcome: Result | TensorNextError
    for index in range(1, count + 1):
        started = time.perf_counter()
        try:
            outcome = client.predict(call.inputs, **call.options)
        except TensorNextError as error:
            outcome = error
        yield Answer(index, _since(started), outcome)


def _several(client: Client, call: Call, count: int, concurrency: int) -> Iterator[Answer]:
    done: _Done = queue.SimpleQueue()

    def submit(index: int) -> None:
        started = time.perf_counter()
        future = client.submit(call.inputs, **call.options)
        # The callback runs in the client's thread: the time is that of the arrival, not of our turn to look.
        future.add_done_callback(lambda future: done.put((index, _since(started), future)))

    sent = min(concurrency, count)
    for index in range(1, sent + 1):
        submit(index)
    for _ in range(count):
        index, round_trip_ms, future = _next(done)
        if sent < count:
            sent += 1
            submit(sent)
        yield Answer(index, round_trip_ms, _outcome(future))


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
