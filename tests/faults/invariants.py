"""Invariants of a daemon under every kind of fault, and their checks.

    with unharmed(daemon):
        ...  # the fault

An honest client runs beside the fault, in a process of its own: it loses nothing, and its latencies are reported
against its own from just before. Afterwards the process is alive, and its descriptors, threads and memory are what they
were.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer, rows

PATIENCE_S = 60.0
"""Limit in seconds for something that no clock in the daemon bounds, on a busy machine."""

MEMORY_SLACK_MIB = 24.0
"""MiB that a daemon's memory moves by on its own: arenas of the C library, caches of torch that grow once."""

LATENCY_BOUND = 100.0
"""Times its own baseline that the honest client's p50 must stay below: far beyond noise. The figures are reported."""

_BASELINE_REQUESTS = 300

_ROWS_BY_REFERENCE = 1024
"""Rows of a request whose reply is sent by reference: 512 kB from the model `mlp`."""

_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Footprint:
    """Footprint of a process. Attributes: descriptors, threads: how many. rss_mib: memory in MiB."""

    descriptors: int
    threads: int
    rss_mib: float


def footprint(pid: int) -> Footprint:
    """Descriptors, threads and memory that a process holds now."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Footprint(
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    )


@dataclass(frozen=True)
class Latency:
    """Latencies of one phase, in microseconds."""

    count: int
    p50_us: float
    p99_us: float
    max_us: float

    def __str__(self) -> str:
        return f"{self.count} requests, p50 {self.p50_us:.0f} us, p99 {self.p99_us:.0f} us, max {self.max_us:.0f} us"


def latency(values: Sequence[float]) -> Latency:
    """Percentiles of one phase."""
    ordered = sorted(values) or [float("nan")]
    at = len(ordered) - 1
    return Latency(len(values), ordered[at // 2], ordered[int(at * 0.99)], ordered[-1])


class Honest:
    """Honest client in a process of its own, with one request outstanding at a time."""

    def __init__(self, endpoint: str, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("honest.py")), endpoint, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent)])},
        )
        self._expect("going")

    def phase(self, name: str) -> None:
        """Begin a phase. Returns when ten requests of it have been answered."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        self._expect("phase")

    def finish(self) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        """End it. Returns latencies in microseconds, and replies that were no result, by phase."""
        out, _ = self._process.communicate(timeout=PATIENCE_S)
        found = json.loads(out.splitlines()[-1])
        return found["latencies"], found["failures"]

    def kill(self) -> None:
        """End it, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == word + "\n", f"the honest client said {line!r}"


@contextlib.contextmanager
def unharmed(
    daemon: Daemon,
    *,
    model: str = "mlp",
    name: str = "",
    memory_slack_mib: float = MEMORY_SLACK_MIB,
    latency_bound: float = LATENCY_BOUND,
    settled: bool = True,
    patience_s: float = PATIENCE_S,
) -> Iterator[Honest]:
    """Check around a fault in the block that nobody else noticed it.

    Args:
        name: what the report calls the fault; the test's own name by default.
        memory_slack_mib: memory that may stay beyond 10 % of what it was.
        latency_bound: times its own baseline that the honest client's p50 may be meanwhile.
        settled: whether descriptors, threads and memory have to come back.
        patience_s: how long no memory may come back on the way there.
    """
    pid = daemon.process.pid
    make_what_is_made_once(daemon, model)
    before = quiet_footprint(daemon) if settled else footprint(pid)
    honest = Honest(daemon.endpoint, model)
    try:
        honest.phase("baseline")
        _let_it_run(daemon, _BASELINE_REQUESTS)
        honest.phase("fault")
        yield honest
        check_alive(daemon)
        honest.phase("after")
        latencies, failures = honest.finish()
    finally:
        honest.kill()
    base, fault = latency(latencies["baseline"]), latency(latencies["fault"])
    after = quiet_footprint(daemon, before, memory_slack_mib, patience_s) if settled else footprint(pid)
    _report(name, base, fault, before, after)
    assert not failures, failures
    assert fault.p50_us < latency_bound * base.p50_us, f"{fault}; before: {base}"


def make_what_is_made_once(daemon: Daemon, model: str) -> None:
    """Warm up a daemon: it starts the threads and opens the descriptors that it makes once and keeps.

    What is made later would look like something that a fault has left behind. The daemon itself says when it is made,
    since no look from outside can tell that nothing more will come: the first audit runs with the lowest priority, on a
    busy machine seconds after the request that it is about, and only then begins the thread that compares answers.
    """
    with Dealer(daemon.endpoint) as dealer:
        for count in (1, 64):
            for _ in range(32):
                dealer.predict(rows(count), model=model)
            for _ in range(32):
                dealer.result()
        # The first reply that is sent by reference makes pyzmq start a thread and a context of its own, and the first
        # that has left makes it open a socket; which has happened once the next one is here.
        for _ in range(2):
            dealer.predict(rows(_ROWS_BY_REFERENCE), model=model)
            _, (output,) = dealer.result(PATIENCE_S)
            assert output.nbytes >= 256 * 1024, "a reply that is too small to be sent by reference"
        end = time.monotonic() + PATIENCE_S
        while not sum(info.audited for info in dealer.health().models if info.name == model):
            assert time.monotonic() < end, f"no request to {model} was audited"
            time.sleep(0.02)  # between two looks: nothing tells of an audit, and health is work, too


def check_alive(daemon: Daemon, model: str = "mlp") -> None:
    """Check that the process runs, and that a new connection is served."""
    assert daemon.process.poll() is None, f"exit code {daemon.process.returncode}:\n{daemon.log.read_text()[-3000:]}"
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(2), model=model)
        dealer.result(PATIENCE_S)
        assert dealer.health().status == "ready"


def quiet_footprint(
    daemon: Daemon,
    before: Footprint | None = None,
    memory_slack_mib: float = MEMORY_SLACK_MIB,
    patience_s: float = PATIENCE_S,
) -> Footprint:
    """Footprint of a daemon with one connection once it is stable; with `before`, once it has returned to that.

    Args:
        patience_s: how long no memory may come back. All of it may take longer: on a busy machine a flood has sent more
            until it is cut off, and what it has sent is dropped more slowly.

    Raises:
        AssertionError: it does not come back.
    """
    pid = daemon.process.pid
    end = time.monotonic() + patience_s
    with Dealer(daemon.endpoint) as dealer:
        # One that is about to be closed would hide a descriptor that is left behind. ZeroMQ's thread, which sends the
        # answer, has closed those that the answer does not count any more.
        while before is None and dealer.health().connections > 1:
            assert time.monotonic() < end, "connections that have ended are not closed"
            time.sleep(0.02)  # between two looks: nothing tells of an end, and health is work, too
        dealer.health()
        last = least = footprint(pid)
        while True:
            time.sleep(0.1)  # between two looks: /proc has nothing to wait on
            now = footprint(pid)
            if before is None:
                if (now.descriptors, now.threads) == (last.descriptors, last.threads):
                    return now
            elif (
                now.descriptors <= before.descriptors
                and now.threads <= before.threads
                and now.rss_mib <= 1.1 * before.rss_mib + memory_slack_mib
            ):
                return now
            if now.rss_mib <= least.rss_mib - 1.0:
                least, end = now, time.monotonic() + patience_s
            assert time.monotonic() < end, f"{now} does not come back to {before}"
            last = now


def _let_it_run(daemon: Daemon, requests: int) -> None:
    """Wait until so many more requests have been answered."""
    with Dealer(daemon.endpoint) as dealer:
        wanted = dealer.health().replies + requests
        while dealer.health().replies < wanted:
            time.sleep(0.02)  # between two looks: nothing tells of a count that has grown, and health is work, too


def _report(name: str, base: Latency, fault: Latency, before: Footprint, after: Footprint) -> None:
    """Print a line; with TNX_FAULTS_REPORT, also write one of JSON to that file."""
    name = name or os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0].rpartition("::")[2]
    print(f"\n{name}: beside it {fault}; before: {base}; memory {before.rss_mib:.0f} -> {after.rss_mib:.0f} MiB")
    path = os.environ.get("TNX_FAULTS_REPORT")
    if path:
        line = {
            "fault": name,
            "p50_us": [base.p50_us, fault.p50_us],
            "p99_us": [base.p99_us, fault.p99_us],
            "rss_mib": [before.rss_mib, after.rss_mib],
        }
        with open(path, "a", encoding="utf-8") as report:
            print(json.dumps(line), file=report)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
