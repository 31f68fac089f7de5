"""`python bench/latency.py`: what the daemon adds to a forward, and where the time goes. --help says more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import zmq

import plot
import report
from loadgen import Connection, closed_loop, open_loop
from measurement import Measurement, call_client, evaluate
from processes import BenchError, cpu_ns
from report import CLIENT, DAEMON, ECHO, Case, CaseReport
from targets import Context, Target, is_here, probe, start_daemon, start_floors
from tnxctl import Client
from tnxctl.endpoint import parse_endpoint
from tnxctl.errors import InvalidArgument
from workload import Workload, torch_forward

_WARM_UP_SECONDS = 0.1
_DEFAULT_RATE = 1000.0


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line. `rates` are of the open loop; the rest is as in --help."""

    host: str | None
    pid: int | None
    device: str
    batch_sizes: tuple[int, ...]
    outstanding: tuple[int, ...]
    rates: tuple[float, ...]
    arrivals: str
    rounds: int
    seconds: float

    @property
    def cases(self) -> list[Case]:
        """Closed loops of every size, open loops of the first."""
        closed = [Case(rows, outstanding=count) for rows in self.batch_sizes for count in self.outstanding]
        return closed + [Case(self.batch_sizes[0], rate=rate) for rate in self.rates]


def _numbers(kind: type[int] | type[float]) -> Callable[..., tuple[float, ...] | None]:
    """Callback of an option that takes positive numbers with commas between."""

    def convert(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            numbers = tuple(kind(item) for item in text.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a list of numbers, as in 1,8,64") from None
        for number in numbers:
            if not 0 < number < 1e7:
                raise click.BadParameter(f"{number:g} is not between 0 and 10,000,000")
        return numbers

    return convert


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--host", help="Measure this running daemon, as in `tnxctl --host`, instead of starting one.")
@click.option("--pid", type=int, help="With --host: the process id of that daemon, to count its CPU time.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the model runs."
)
@click.option(
    "--batch-sizes",
    metavar="N,N,...",
    callback=_numbers(int),
    default="1,8,64",
    show_default=True,
    help="Rows per request, each measured.",
)
@click.option(
    "--outstanding",
    metavar="N,N,...",
    callback=_numbers(int),
    default="1,64",
    show_default=True,
    help="Requests in flight, each measured.",
)
@click.option(
    "--rate",
    "rates",
    metavar="N,N,...",
    callback=_numbers(float),
    help="Requests per second of the open loop, with the first of the batch sizes.  [default: 1000]",
)
@click.option("--no-rate", is_flag=True, help="No open loop.")
@click.option(
    "--arrivals",
    type=click.Choice(["exponential", "constant"]),
    default="exponential",
    show_default=True,
    help="Gaps of the open loop: random as of independent clients, or even.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), help="Rounds of each measurement.  [default: 7; quick: 3]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.001, 600),
    help="Length of one measurement of one round.  [default: 1.0; quick: 0.2]",
)
@click.option("--quick", is_flag=True, help="Short rounds and few: to see that it works, not to rely on.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results to this file."
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the percentiles to this PNG (needs matplotlib).",
)
def main(
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
    no_rate: bool,
    rates: tuple[float, ...] | None,
    rounds: int | None,
    seconds: float | None,
    pid: int | None,
    **options: Any,
) -> None:
    """Measure the daemon's latency, beside two floors in the same run.

    The model is the daemon's default, mlp: 256-512-512-128, float32. The load generator is one lean thread in a
    process of its own. Latencies are in microseconds.

    \b
    daemon         tnxd on a free port of 127.0.0.1, or the one at --host
    tnxctl.Client  the daemon through the public Python client, one call after the other
    forward floor  a bare blocking loop around a ROUTER socket: receive, forward, send
    echo floor     the same without the forward: the same bytes in and out

    All targets take turns within a round, in an order that changes from round to round, because the state of the
    machine drifts. A ratio is taken in each round; its median is what counts.

    A closed loop keeps N requests outstanding. An open loop sends at a rate, whatever the server does, and counts
    latency from the time at which a request was due: a pause of the server costs all requests that were due in it.

    Server CPU is the CPU time of all threads of the server per request (on Linux).
    """
    if pid is not None and options["host"] is None:
        raise click.UsageError("--pid says which process the daemon at --host is: it needs --host")
    if no_rate and rates:
        raise click.UsageError("--rate and --no-rate exclude each other")
    settings = Settings(
        pid=pid,
        rates=() if no_rate else _open_loop_rates(rates),
        rounds=rounds or (3 if quick else 7),
        seconds=seconds or (0.2 if quick else 1.0),
        **options,
    )
    if plot_path is not None:
        _require("matplotlib", "--plot")
    for option, path in (("--json", json_path), ("--plot", plot_path)):
        if path is not None and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise click.BadParameter(f"{path} cannot be written", param_hint=option)  # before minutes of measuring
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        _run(settings, json_path, plot_path)
    except (BenchError, InvalidArgument) as error:
        click.echo(f"latency.py: {error}", err=True)
        sys.exit(1)


def _exit_on_signal(number: int, _: object) -> None:
    sys.exit(128 + number)  # by way of every `finally`: the servers are stopped


def _open_loop_rates(asked: tuple[float, ...] | None) -> tuple[float, ...]:
    if asked:
        _require("hdrhistogram", "--rate", module="hdrh")
        return asked
    try:
        import hdrh.histogram  # noqa: F401
    except ImportError:
        click.echo("latency.py: no open loop, because hdrhistogram is not installed", err=True)
        return ()
    return (_DEFAULT_RATE,)


def _require(package: str, option: str, module: str = "") -> None:
    try:
        __import__(module or package)
    except ImportError:
        raise click.UsageError(f"{option} needs the package {package}, which is not installed") from None


def _run(settings: Settings, json_path: Path | None, plot_path: Path | None) -> None:
    machine = report.environment()
    reports: list[CaseReport] = []
    samples: list[tuple[Case, plot.Samples]] = []
    with contextlib.ExitStack() as stack:
        context: Context = stack.enter_context(zmq.Context())
        model = torch_forward()
        workloads = {rows: Workload(rows, settings.device == "cuda", model) for rows in settings.batch_sizes}
        targets = _targets(stack, context, settings, list(workloads.values()))
        click.echo(_heading(machine, settings))
        for case in settings.cases:
            measured = _measure(context, case, targets, workloads[case.rows], settings)
            summaries = {
                target.name: report.summarise(case, measured[target.name], is_daemon=target.name in (DAEMON, CLIENT))
                for target in targets
                if target.name in measured
            }
            reports.append(CaseReport(case, summaries, report.compare(summaries)))
            samples.append(
                (case, {name: np.concatenate([m.latency_us for m in rounds]) for name, rounds in measured.items()})
            )
            click.echo("\n" + report.table(reports[-1]))
    if json_path is not None:
        whole = report.Report(machine, msgspec.to_builtins(settings), reports)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")
    if plot_path is not None:
        subtitle = f"{machine['cpu']}, {machine['cores']} cores, {settings.rounds} rounds of {settings.seconds:g} s"
        plot.draw(samples, subtitle, plot_path)


def _targets(
    stack: contextlib.ExitStack, context: Context, settings: Settings, workloads: Sequence[Workload]
) -> list[Target]:
    pid = settings.pid
    if settings.host is None:
        endpoint, pid = start_daemon(stack, settings.device)
    else:
        endpoint = parse_endpoint(settings.host)
    answers = [probe(context, endpoint, workload) for workload in workloads]
    targets = [Target(DAEMON, endpoint, pid), Target(CLIENT, endpoint, pid)]
    if not is_here(endpoint):
        click.echo("No floors: they run on this machine, over loopback, and would say nothing about a distant daemon.")
        return targets
    return targets + start_floors(stack, endpoint.partition(":")[0], settings.device, answers)


def _heading(machine: dict[str, Any], settings: Settings) -> str:
    load = machine["load_average"]
    warning = f"\nThe machine is not quiet: its load average is {load}." if load > machine["cores"] / 4 else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {settings.device}; {settings.rounds} rounds of "
        f"{settings.seconds:g} s; torch {machine['torch']}, pyzmq {machine['pyzmq']}, Python {machine['python']}"
    ) + warning


def _measure(
    context: Context, case: Case, targets: Sequence[Target], workload: Workload, settings: Settings
) -> dict[str, list[Measurement]]:
    """All rounds of one case."""
    taking_part = [target for target in targets if target.name != CLIENT or case.outstanding == 1]
    measured: dict[str, list[Measurement]] = {target.name: [] for target in taking_part}
    for number in range(settings.rounds):
        first = number % len(taking_part)
        offsets_ns = _offsets_ns(case.rate, settings, seed=number)
        for target in taking_part[first:] + taking_part[:first]:
            measured[target.name].append(_measure_once(context, case, target, workload, settings.seconds, offsets_ns))
    return measured


def _measure_once(
    context: Context, case: Case, target: Target, workload: Workload, seconds: float, offsets_ns: Sequence[int]
) -> Measurement:
    """One case, one target, one round, on a connection of its own, after a warm-up."""
    if target.name == CLIENT:
        with Client(target.endpoint) as client:
            call_client(client, workload, _WARM_UP_SECONDS)
            with _cpu_times(target.pid) as cpu:
                result = call_client(client, workload, seconds)
    else:
        with Connection(context, target.endpoint, workload) as connection:
            closed_loop(connection, case.outstanding or 1, _WARM_UP_SECONDS)
            with _cpu_times(target.pid) as cpu:
                if case.rate:
                    recording = open_loop(connection, offsets_ns)
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


def _offsets_ns(rate: float, settings: Settings, seed: int) -> list[int]:
    """When the requests of an open loop are due: the same for every target of a round."""
    if not rate:
        return []
    count = max(int(rate * settings.seconds), 1)
    if settings.arrivals == "constant":
        gaps = np.full(count, 1 / rate)
    else:
        gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    offsets: list[int] = (np.cumsum(gaps) * 1e9).astype(np.int64).tolist()
    return offsets


if __name__ == "__main__":
    main()
