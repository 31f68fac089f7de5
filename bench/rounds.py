"""Rounds: targets that take turns, the schedule of an open loop, one measurement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from loadgen import Connection, Context, closed_loop, open_loop
from measurement import Measurement, call_client, evaluate
from processes import cpu_ns
from report import CLIENT, ECHO, PLAIN, Case
from targets import Target
from tnxctl import Client
from workload import Workload

T = TypeVar("T")

WARM_UP_SECONDS = 0.1
"""Of load before a measurement, if that is not shorter itself."""


def in_turns(targets: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """The number of the round, and who is next in it.

    Each round begins with another target, because the state of the machine drifts.
    """
    for number in range(rounds):
        first = number % len(targets)
        for target in (*targets[first:], *targets[:first]):
            yield number, target


def measure_rounds(
    context: Context,
    case: Case,
    targets: Sequence[Target],
    workload: Workload,
    rounds: int,
    seconds: float,
    arrivals: str = "exponential",
) -> dict[str, list[Measurement]]:
    """All rounds of one case, by the names of the targets.

    Args:
        seconds: of one measurement. arrivals: of an open loop, see `offsets_ns`.

    Raises:
        BenchError: a server stopped answering.
    """
    measured: dict[str, list[Measurement]] = {target.name: [] for target in targets}
    for number, target in in_turns(targets, rounds):
        due = offsets_ns(case.rate, seconds, arrivals, seed=number) if case.rate else []
        measured[target.name].append(measure(context, case, target, workload, seconds, due))
    return measured


def offsets_ns(rate: float, seconds: float, arrivals: str, seed: int) -> list[int]:
    """Times at which the requests of an open loop are due, from its start.

    Args:
        rate: requests per second.
        arrivals: "exponential", with random gaps as of independent clients, the same for a seed; or "constant".
    """
    count = max(int(rate * seconds), 1)
    if arrivals == "constant":
        gaps = np.full(count, 1 / rate)
    else:
        gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    offsets: list[int] = (np.cumsum(gaps) * 1e9).astype(np.int64).tolist()
    return offsets


def measure(
    context: Context, case: Case, target: Target, workload: Workload, seconds: float, due_ns: Sequence[int] = ()
) -> Measurement:
    """One case, one target, one round, on a connection of its own, after a warm-up.

    Args:
        due_ns: of an open loop, where the case is one.

    Raises:
        BenchError: the server stopped answering.
    """
    warm_up = min(WARM_UP_SECONDS, seconds)
    if target.name == CLIENT:
        with Client(target.endpoint) as client:
            call_client(client, workload, warm_up)
            with _cpu_times(target.pid) as cpu:
                result = call_client(client, workload, seconds)
    else:
        with Connection(context, target.endpoint, workload) as connection:
            closed_loop(connection, case.outstanding or 1, warm_up)
            with _cpu_times(target.pid) as cpu:
                if case.rate:
                    recording = open_loop(connection, due_ns)
                else:
                    recording = closed_loop(connection, case.outstanding, seconds)
        result = evaluate(recording, workload, check=target.name not in (ECHO, PLAIN))
    result.server_cpu_ns, result.client_cpu_ns = cpu
    return result


@contextlib.contextmanager
def _cpu_times(server: int | None) -> Iterator[list[int | None]]:
    """Yields a list; after the block it holds the CPU nanoseconds that the server and this process used in it."""
    pids = (server, os.getpid())
    before = [cpu_ns(pid) for pid in pids]
    used: list[int | None] = []
    yield used
    for pid, then in zip(pids, before, strict=True):
        now = cpu_ns(pid)
        used.append(None if now is None or then is None else now - then)
