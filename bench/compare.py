"""`python bench/compare.py`: the daemon beside the servers that one would pick instead. --help says more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import zmq

import comparison
import httpload
import options
import pictures
import proctree
import report
from bridging import mebibyte_goal
from comparison import BRIDGE, LEAN, NATURAL, TENSORNEXT, C, Comparison, Measured, Round
from contenders import CONTENDERS, ENVIRONMENTS, PEERS, Contender, NaturalClient, PeerServer, versions
from goals import goals_text
from loadgen import Connection, Context, Recording, closed_loop
from measurement import evaluate
from processes import BenchError, ChildProcess
from rounds import in_turns
from targets import daemon_target, start_daemon
from workload import VARIANTS, Array, Workload, mlp, torch_forward
from zmtpload import ZmtpConnection

sys.path.insert(0, str(PEERS))
import formats

_WARM_UP_SECONDS = 0.2
_SETTLE_SECONDS = 0.5
_IDLE_SECONDS = 1.0
_BUSY_PERCENT = 5.0  # of a core, while nobody asks


@dataclass(frozen=True)
class Settings:
    """Options that were given on the command line."""

    outstanding: tuple[int, ...]
    rounds: int
    seconds: float
    environments: Path


class Target:
    """A server under load.

    Attributes:
        name: in tables. pid: at the root of its process tree. has_c_client: whether there is one here.
        idle_cpu_percent: CPU time while nobody asks, in percent of one core; measured by `settle`.
    """

    def __init__(self, name: str, pid: int, natural: NaturalClient) -> None:
        self.name = name
        self.pid = pid
        self._natural = natural
        self.has_c_client = True
        self.idle_cpu_percent = 0.0

    def settle(self, seconds: float) -> None:
        """See what it does when nobody asks. Who is busy then stands still between turns, out of the others' way.

        Args:
            seconds: of a measurement: to look for longer says no more.
        """
        time.sleep(min(_SETTLE_SECONDS, seconds))
        meter = proctree.CpuMeter(self.pid)
        began = time.perf_counter_ns()
        time.sleep(min(_IDLE_SECONDS, seconds))
        self.idle_cpu_percent = round(100 * meter.used_ns() / (time.perf_counter_ns() - began), 2)
        self._pause()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Running within the block, in any case."""
        proctree.send(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self._pause()

    def _pause(self) -> None:
        if self.idle_cpu_percent > _BUSY_PERCENT:
            proctree.send(self.pid, signal.SIGSTOP)

    def measure(self, client: str, outstanding: int, seconds: float) -> Round:
        """One round of one load, after a warm-up. Raises BenchError."""
        ask = {NATURAL: self.by_natural_client, LEAN: self.by_lean_client, C: self.by_c_client}[client]
        (self.by_lean_client if client == C else ask)(outstanding, min(_WARM_UP_SECONDS, seconds))
        return ask(outstanding, seconds)

    def by_natural_client(self, outstanding: int, seconds: float) -> Round:
        meter = proctree.CpuMeter(self.pid)
        said = self._natural.call(outstanding, seconds)
        cpu_ns = meter.used_ns()
        return comparison.make_round(
            said["latency_us"], said["seconds"], cpu_ns, said["cpu_us"], Counter(said["errors"])
        )

    def by_lean_client(self, outstanding: int, seconds: float) -> Round:
        raise NotImplementedError

    def by_c_client(self, outstanding: int, seconds: float) -> Round:
        raise NotImplementedError


class TensorNextTarget(Target):
    """The daemon."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        daemon: ChildProcess,
        context: Context,
        workload: Workload,
        samples: Path,
    ) -> None:
        self._endpoint = daemon_target(daemon).endpoint
        stack.callback(proctree.send, daemon.pid, signal.SIGCONT)  # who stands still does not end when asked to
        arguments = [str(samples), self._endpoint]
        root = str(PEERS.parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        natural = NaturalClient(Path(sys.executable), "tensornext_client.py", arguments, environment)
        stack.enter_context(natural).ready()
        super().__init__(TENSORNEXT, daemon.pid, natural)
        self._context, self._workload = context, workload

    def by_lean_client(self, outstanding: int, seconds: float) -> Round:
        with Connection(self._context, self._endpoint, self._workload) as connection:
            return self._record(lambda: closed_loop(connection, outstanding, seconds))

    def by_c_client(self, outstanding: int, seconds: float) -> Round:
        """There is none for ZeroMQ. This comes near to it: no thread but one, no library in between."""
        with ZmtpConnection(self._endpoint, self._workload) as connection:
            return self._record(lambda: connection.closed_loop(outstanding, seconds))

    def _record(self, load: Callable[[], Recording]) -> Round:
        meter, client = proctree.CpuMeter(self.pid), time.process_time_ns()
        recording = load()
        server_ns, client_ns = meter.used_ns(), time.process_time_ns() - client
        result = evaluate(recording, self._workload, check=True)
        return comparison.make_round(
            result.latency_us.tolist(), result.seconds, server_ns, client_ns / 1e3, result.errors
        )


class PeerTarget(Target):
    """A contender, run by the interpreter of its environment."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        contender: Contender,
        python: Path,
        workload: Workload,
        samples: Path,
        *,
        has_wrk: bool,
    ) -> None:
        self._workload, self._format = workload, contender.format
        self._headers, self._body = formats.encode(contender.format, workload.input(0))
        server = stack.enter_context(PeerServer(contender, python, self._headers, self._body))
        self._url = server.url
        address = [server.grpc] if contender.format == "triton" else [server.url, contender.format]
        arguments = [str(samples), *address]
        natural = NaturalClient(python, contender.client, arguments, {**os.environ, **contender.environment})
        stack.enter_context(natural).ready()
        super().__init__(contender.name, server.pid, natural)
        self.has_c_client = has_wrk
        encoded = (formats.encode(contender.format, workload.input(number)) for number in range(VARIANTS))
        self._requests = [httpload.request_bytes(server.url, headers, body) for headers, body in encoded]

    def by_lean_client(self, outstanding: int, seconds: float) -> Round:
        meter, client = proctree.CpuMeter(self.pid), time.process_time_ns()
        answers = httpload.closed_loop(self._url, self._requests, outstanding, seconds)
        server_ns, client_ns = meter.used_ns(), time.process_time_ns() - client
        for number, headers, body in answers.kept:
            if not self._is_right(number, headers, body):
                answers.errors["WRONG"] += 1
        return comparison.make_round(answers.latency_us, answers.seconds, server_ns, client_ns / 1e3, answers.errors)

    def _is_right(self, number: int, headers: dict[str, str], body: bytes) -> bool:
        try:
            output = formats.decode(self._format, headers, body)
        except (KeyError, ValueError):
            return False
        return self._workload.is_right(number, output.shape, output.tobytes())

    def by_c_client(self, outstanding: int, seconds: float) -> Round:
        meter = proctree.CpuMeter(self.pid)
        said = httpload.wrk(self._url, self._headers, self._body, outstanding, seconds)
        server_ns = meter.used_ns()
        p50, p99 = said.latency_us["p50"], said.latency_us["p99"]
        return comparison.finish_round(said.requests, said.seconds, p50, p99, server_ns, said.cpu_us, said.errors)


@options.command()
@options.listed("--outstanding", "1,64", "Requests in flight, each measured.")
@click.option("--peers", metavar="NAME,NAME,...", help="Only these, by the names of their files in bench/peers.")
@options.lengths(rounds=(5, 2), seconds=(1.0, 0.3), longest=60, note="; wrk takes whole seconds")
@click.option("--no-wrk", is_flag=True, help="Leave out wrk even if it is installed.")
@click.option(
    "--environments",
    type=click.Path(file_okay=False, path_type=Path),
    default=ENVIRONMENTS,
    help="Where the environments of the peers are.  [default: build/peers]",
)
@options.outputs("Draw a picture to")
def main(peers: str | None, no_wrk: bool, json_path: Path | None, plot_path: Path | None, **rest: Any) -> None:
    """Measure the daemon beside the servers that one would pick instead, on this machine, in the same run.

    The model is mlp (256-512-512-128, float32, the same weights everywhere), one row per request, on the CPU. `make
    bench-peers` builds the environments of the peers; what is not built is left out, and the report says so. The bridge
    (`tnxctl bridge`) with a daemon behind it is one of them, "bridge", in the environment of this program: its CPU time
    is that of both. At the end it is sent 1 MiB, too.

    Three kinds of clients, each one process: the Python client that comes to mind first; a lean one in Python that
    works with ready-made bytes; and wrk, in C, if it is installed. As wrk speaks HTTP only, the daemon is asked by a
    Python loop that writes ZeroMQ's protocol to a TCP socket itself.

    All servers run from beginning to end and take turns within a round, in an order that changes from round to round.
    One that is busy even when nobody asks stands still (SIGSTOP) until its turn. Server CPU is that of the whole
    process tree, per request. Ratios are taken in each round; their median is what counts.
    """
    if sys.platform != "linux":
        raise click.UsageError("this works on Linux only: it counts CPU time by way of /proc")
    names = None if peers is None else peers.split(",")
    for name in names or ():
        if name not in {contender.peer for contender in CONTENDERS}:
            raise click.UsageError(f"no peer {name!r}; there are {', '.join(sorted({c.peer for c in CONTENDERS}))}")
    wanted = [contender for contender in CONTENDERS if names is None or contender.peer in names]
    with options.measuring():
        result = _run(Settings(**rest), wanted, with_wrk=not no_wrk)
    if json_path is not None:
        report.write_json(result, json_path)
    if plot_path is not None:
        pictures.draw_comparison(result, plot_path)


def _run(settings: Settings, wanted: Sequence[Contender], *, with_wrk: bool) -> Comparison:
    machine = report.environment()
    missing: dict[str, str] = {}
    found_versions: dict[str, dict[str, str]] = {}
    wrk_version = httpload.wrk_version() if with_wrk else None
    machine["wrk"] = wrk_version or "not used"
    with contextlib.ExitStack() as stack:
        context: Context = stack.enter_context(zmq.Context())
        daemon = start_daemon(stack)
        forward = torch_forward()
        workload = mlp(1, False, forward)
        samples = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx"))) / "samples.npz"
        _write_samples(workload, forward, samples)
        targets: list[Target] = [TensorNextTarget(stack, daemon, context, workload, samples)]
        targets[0].settle(settings.seconds)
        for contender in wanted:
            python = contender.python(settings.environments)
            if python is None:
                missing[contender.name] = f"{settings.environments / contender.peer} is not built: make bench-peers"
                continue
            try:
                peer = PeerTarget(stack, contender, python, workload, samples, has_wrk=wrk_version is not None)
            except BenchError as error:
                missing[contender.name] = str(error)
                continue
            peer.settle(settings.seconds)
            targets.append(peer)
            found_versions[contender.name] = versions(contender, python)
        packages = sorted({f"{name} {version}" for found in found_versions.values() for name, version in found.items()})
        lengths = f"{settings.rounds} rounds of {settings.seconds:g} s"
        click.echo(report.heading(machine, lengths, f"Peers: {', '.join(packages) or '-'}"))
        measured = _measure(targets, settings, missing)
    goals = comparison.goals(measured)
    if any(target.name == BRIDGE for target in targets) and BRIDGE not in missing:
        goals.append(mebibyte_goal(settings.rounds, settings.seconds, has_wrk=wrk_version is not None))
    result = Comparison(
        environment=machine,
        settings={"outstanding": settings.outstanding, "rounds": settings.rounds, "seconds": settings.seconds},
        versions=found_versions,
        missing=missing,
        idle_cpu_percent={target.name: target.idle_cpu_percent for target in targets},
        tables=comparison.tables(measured, [target.name for target in targets]),
        goals=goals,
    )
    for table in result.tables:
        click.echo("\n" + comparison.table_text(table))
    click.echo("\n" + goals_text(result.goals))
    click.echo(
        "\nCPU while idle, in % of a core: "
        + ", ".join(f"{target.name} {target.idle_cpu_percent:g}" for target in targets)
    )
    for name, reason in missing.items():
        click.echo(f"{name}: not measured, {reason}")
    if with_wrk and wrk_version is None:
        click.echo("wrk: not measured, it is not installed (on Debian and Ubuntu: apt install wrk)")
    return result


def _write_samples(workload: Workload, forward: Callable[[Array], Array], path: Path) -> None:
    """The same inputs, and the same answers to check, for clients in other environments."""
    inputs = [workload.input(number) for number in range(VARIANTS)]
    np.savez(path, inputs=np.stack(inputs), outputs=np.stack([forward(array) for array in inputs]))


def _measure(targets: Sequence[Target], settings: Settings, missing: dict[str, str]) -> Measured:
    """All rounds of all loads. A server that fails is out, and `missing` says why."""
    measured: Measured = {}
    for number, target in in_turns(targets, settings.rounds):
        if target.name in missing:
            continue
        try:
            with target.turn():
                for outstanding in settings.outstanding:
                    for client in (NATURAL, LEAN, C) if target.has_c_client else (NATURAL, LEAN):
                        round_ = target.measure(client, outstanding, settings.seconds)
                        measured.setdefault((target.name, outstanding, client), []).append(round_)
        except BenchError as error:
            if target.name == TENSORNEXT:
                raise
            missing[target.name] = f"failed in round {number + 1}: {error}"
    return {key: rounds for key, rounds in measured.items() if key[0] not in missing}


if __name__ == "__main__":
    main()
