"""Servers that `overload.py` puts under load, each with the clients that ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

import httpload
import overload_models
import proctree
from contenders import CONTENDERS, PeerServer
from crowd import FLOOD, LIGHT, Aftermath, Crowd
from flood import Setting
from httpflood import HEADERS, HttpSetting, requests_of
from measurement import evaluate
from overload_models import INPUT, MODELS
from overload_report import Calm, Capacity
from processes import BenchError, ChildProcess, cpu_ns
from report import DAEMON
from targets import Target, daemon_target, start_daemon
from zmtpload import ZmtpConnection

OUTSTANDING = (16, 64, 256)
"""Numbers outstanding of the closed loops that capacity is the best of."""

_CAPACITY_SECONDS = 0.5
_CALM_SECONDS = 0.3


@dataclass(frozen=True)
class Asked:
    """The questions that all servers get.

    Attributes:
        model: of `overload_models`. rows: per request. deadline_ms: None for none.
        clients: processes that the load is split over. urgent: share of their requests with priority 0.
        light: whether there is one process more, which asks for little.
        heeds: whether clients of the daemon hold back what it would refuse.
        connections: of each process, over HTTP.
        samples: the file with inputs and outputs.
    """

    model: str
    rows: int
    deadline_ms: float | None
    clients: int
    urgent: float
    light: bool
    heeds: bool
    connections: int
    samples: Path


@dataclass(frozen=True)
class Found:
    """The findings of a closed loop: latencies of the results, how long it took, and what else came."""

    latency_us: Sequence[float]
    seconds: float
    errors: Mapping[str, int]


class Server:
    """A server under load.

    Args:
        closed_loop: runs one, with so many outstanding, for so many seconds, with or without the deadline.
        cpu_ns: CPU time that it has used so far, None if that is not known.

    Attributes:
        name: in tables. capacity: what it can do, once it has been measured.
    """

    def __init__(
        self,
        name: str,
        crowd: Crowd,
        closed_loop: Callable[[int, float, bool], Found],
        cpu_ns: Callable[[], int | None],
    ) -> None:
        self.name = name
        self._crowd = crowd
        self._closed_loop = closed_loop
        self._cpu_ns = cpu_ns
        self.capacity = Capacity(0.0, 0, {})

    def measure_capacity(self) -> None:
        """Find the best rate of a closed loop, without deadlines. One that gets errors, too, does not count.

        Raises:
            BenchError: all got errors.
        """
        found: dict[int, float] = {}
        for outstanding in OUTSTANDING:
            loop = self._closed_loop(outstanding, _CAPACITY_SECONDS, False)
            if not loop.errors:
                found[outstanding] = round(len(loop.latency_us) / loop.seconds, 1)
        if not found:
            raise BenchError(f"{self.name} with {outstanding} outstanding: {dict(loop.errors)}")
        best = max(found, key=lambda outstanding: found[outstanding])
        self.capacity = Capacity(found[best], best, found)

    def calm(self) -> Calm:
        """See how it is without a load."""
        try:
            loop = self._closed_loop(1, _CALM_SECONDS, True)
        except BenchError as error:
            return Calm(None, 0, {str(error): 1})
        p50 = round(float(np.median(loop.latency_us)), 1) if len(loop.latency_us) else None
        return Calm(p50, len(loop.latency_us), dict(loop.errors))

    def load(self, rates: Mapping[str, float], seconds: float, seed: int, after: Callable[[int], None]) -> Aftermath:
        """Load it, see `Crowd.load`."""
        return self._crowd.load(rates, seconds, seed, after, self._cpu_ns)


def start(stack: contextlib.ExitStack, model: str, configuration: Path | None) -> ChildProcess:
    """Start a daemon, which the stack stops, for `daemon` to wait for.

    Args:
        configuration: its settings, if not those that it has by itself.
    """
    program = [str(Path(overload_models.__file__))]
    if configuration is not None:
        program += ["--config", str(configuration)]
    return start_daemon(stack, program=program, model=model)


def daemon(stack: contextlib.ExitStack, starting: ChildProcess | Target, asked: Asked) -> Server:
    """The daemon, when it is ready, and its clients, which the stack stops.

    Args:
        starting: what `start` returned, or where a daemon runs already.

    Raises:
        BenchError: it does not become ready.
    """
    target = starting if isinstance(starting, Target) else daemon_target(starting)
    setting = Setting(
        endpoint=target.endpoint,
        samples=str(asked.samples),
        model=asked.model,
        input=INPUT,
        tolerance=MODELS[asked.model].tolerance,
        deadline_us=None if asked.deadline_ms is None else asked.deadline_ms * 1e3,
        urgent=asked.urgent,
        heeds=asked.heeds and asked.deadline_ms is not None,
    )
    settings: dict[str, tuple[msgspec.Struct, int]] = {FLOOD: (setting, asked.clients)}
    if asked.light:
        settings[LIGHT] = (msgspec.structs.replace(setting, urgent=0.0), 1)
    workloads = {
        True: setting.workload(),
        False: msgspec.structs.replace(setting, deadline_us=None).workload(),
    }

    def closed_loop(outstanding: int, seconds: float, with_deadline: bool) -> Found:
        workload = workloads[with_deadline]
        with ZmtpConnection(target.endpoint, workload) as connection:
            found = evaluate(connection.closed_loop(outstanding, seconds), workload, check=True)
        return Found(found.latency_us.tolist(), found.seconds, found.errors)

    return Server(DAEMON, Crowd(stack, "flood.py", settings), closed_loop, lambda: cpu_ns(target.pid))


PEERS = {"mosec": "mosec, batching", "fastapi": "FastAPI, raw bytes"}
"""Other servers, and which of their configurations in `contenders` is the one for overload."""

PEER_MODELS = ("mlp", "wide")
"""The models that they serve, with one row per request."""


def peer(stack: contextlib.ExitStack, name: str, environments: Path, asked: Asked) -> Server:
    """Another server, when it is ready, and its clients, which the stack stops.

    It is not told of deadlines, but for mosec, which has a limit for the time of every request.

    Args:
        name: of `PEERS`. environments: where theirs are.

    Raises:
        BenchError: it is not built, or does not become ready.
    """
    contender = next(one for one in CONTENDERS if one.name == PEERS[name])
    python = contender.python(environments)
    if python is None:
        raise BenchError(f"{environments / contender.peer} is not built: make bench-peers")
    environment = {"BENCH_MODEL": asked.model}
    if asked.deadline_ms is not None:
        environment["MOSEC_TIMEOUT"] = str(max(round(asked.deadline_ms), 1))
    setting = HttpSetting("", str(asked.samples), MODELS[asked.model].tolerance, asked.connections)
    workload = setting.workload()
    server = stack.enter_context(PeerServer(contender, python, HEADERS, workload.input(0).tobytes(), environment))
    setting = msgspec.structs.replace(setting, url=server.url)
    requests = requests_of(server.url, workload)
    settings: dict[str, tuple[msgspec.Struct, int]] = {FLOOD: (setting, asked.clients)}
    if asked.light:
        settings[LIGHT] = (setting, 1)

    def closed_loop(outstanding: int, seconds: float, with_deadline: bool) -> Found:
        found = httpload.closed_loop(server.url, requests, outstanding, seconds)
        return Found(found.latency_us, found.seconds, found.errors)

    meter = proctree.CpuMeter(server.pid)
    return Server(contender.name, Crowd(stack, "httpflood.py", settings), closed_loop, meter.used_ns)
