"""A closed loop through the public client: requests that are futures, with any inputs."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from numpy.typing import NDArray

from processes import BenchError
from steady import Steady
from tnxctl import Client, Result


class ClientLoad(NamedTuple):
    """Answers that count. Attributes: times_ms: of each, from call to answer. per_s: how many came in a second."""

    times_ms: list[float]
    per_s: float


def closed_loop(
    client: Client,
    model: str,
    inputs: Mapping[str, NDArray[Any]],
    outstanding: int,
    seconds: float,
    patience_s: float,
    note: Callable[[Result], object] = lambda _: None,
) -> ClientLoad:
    """Keep so many requests with these inputs outstanding.

    Args:
        patience_s: longest wait for an answer. note: called with every answer, those that do not count, too.

    Raises:
        BenchError: a request failed, or nothing was heard for so long.
    """
    done: queue.SimpleQueue[tuple[int, float, Future[Result]]] = queue.SimpleQueue()
    times_ms: list[float] = []
    steady = Steady(outstanding, seconds)

    def send() -> None:
        began = time.perf_counter_ns()

        def answered(future: Future[Result]) -> None:
            now = time.perf_counter_ns()
            done.put((now, (now - began) / 1e6, future))

        client.submit(inputs, model=model).add_done_callback(answered)

    def receive() -> int:
        try:
            now, millis, future = done.get(timeout=patience_s)
        except queue.Empty:
            raise BenchError(f"a request to {model} has had no answer for {patience_s:g} s") from None
        error = future.exception()
        if error is not None:
            raise BenchError(f"a request to {model} failed: {error}")
        times_ms.append(millis)
        note(future.result())
        return now

    for _ in range(outstanding):
        send()
    while steady.answered(receive()):
        send()
    for _ in range(outstanding - 1):
        receive()
    counted = times_ms[steady.counted]
    return ClientLoad(counted, len(counted) / steady.seconds)
