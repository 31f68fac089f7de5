"""What the benchmarks share: options, signals, the schedule of an open loop, one round of load on one server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import click
import numpy as np

from loadgen import Connection, closed_loop, open_loop
from measurement import Measurement, evaluate
from processes import cpu_ns
from report import ECHO, Case
from targets import Context, Target
from workload import Workload

_WARM_UP_SECONDS = 0.1


def numbers(kind: type[int] | type[float]) -> Callable[..., tuple[float, ...] | None]:
    """Callback of an option that takes positive numbers with commas between."""

    def convert(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            found = tuple(kind(item) for item in text.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a list of numbers, as in 1,8,64") from None
        for number in found:
            if not 0 < number < 1e7:
                raise click.BadParameter(f"{number:g} is not between 0 and 10,000,000")
        return found

    return convert


def require(package: str, option: str, module: str = "") -> None:
    """Refuse an option whose package is not installed.

    Raises:
        click.UsageError: so it is.
    """
    try:
        __import__(module or package)
    except ImportError:
        raise click.UsageError(f"{option} needs the package {package}, which is not installed") from None


def exit_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this program by way of every `finally`: what it started is stopped."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def offsets_ns(rate: float, seconds: float, seed: int) -> list[int]:
    """When the requests of an open loop are due, from its start: with random gaps, as of independent clients."""
    count = max(int(rate * seconds), 1)
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    offsets: list[int] = (np.cumsum(gaps) * 1e9).astype(np.int64).tolist()
    return offsets


def measure(
    context: Context, case: Case, target: Target, workload: Workload, seconds: float, offsets: Sequence[int] = ()
) -> Measurement:
    """One case, one target, one round, on a connection of its own, after a warm-up.

    Args:
        offsets: of an open loop, where the case is one.

    Raises:
        BenchError: the server stopped answering.
    """
    with Connection(context, target.endpoint, workload) as connection:
        closed_loop(connection, case.outstanding or 1, _WARM_UP_SECONDS)
        with _cpu_times(target.pid) as cpu:
            if case.rate:
                recording = open_loop(connection, offsets)
            else:
                recording = closed_loop(connection, case.outstanding, seconds)
    result = evaluate(recording, workload, check=target.name != ECHO)
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
