"""`python bench/latency.py`: what the daemon adds to a forward, and where the time goes. --help says more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import zmq

import options
import pictures
import report
from loadgen import Context
from report import CLIENT, DAEMON, Case, CaseReport
from rounds import measure_rounds
from targets import Target, daemon_target, floor_targets, is_here, probe, start_daemon, start_floors
from tnxctl.endpoint import parse_endpoint
from workload import Workload, mlp, torch_forward

_DEFAULT_RATE = 1000.0


@dataclass(frozen=True)
class Settings:
    """Options that were given on the command line, as in --help.

    Attributes:
        rates: of the open loops.
    """

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


@options.command()
@click.option("--host", help="Measure this running daemon, as in `tnxctl --host`, instead of starting one.")
@click.option("--pid", type=int, help="With --host: the process id of that daemon, to count its CPU time.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the model runs."
)
@options.listed("--batch-sizes", "1,8,64", "Rows per request, each measured.")
@options.listed("--outstanding", "1,64", "Requests in flight, each measured.")
@click.option(
    "--rate",
    "rates",
    metavar="N,N,...",
    callback=options.numbers(float),
    help=f"Requests per second of the open loop, with the first of the batch sizes.  [default: {_DEFAULT_RATE:g}]",
)
@click.option("--no-rate", is_flag=True, help="No open loop.")
@click.option(
    "--arrivals",
    type=click.Choice(["exponential", "constant"]),
    default="exponential",
    show_default=True,
    help="Gaps of the open loop: random as of independent clients, or even.",
)
@options.lengths(rounds=(7, 3), seconds=(1.0, 0.2))
@options.outputs("Draw the percentiles to")
def main(
    json_path: Path | None,
    plot_path: Path | None,
    no_rate: bool,
    rates: tuple[float, ...] | None,
    host: str | None,
    pid: int | None,
    **rest: Any,
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
    if pid is not None and host is None:
        raise click.UsageError("--pid says which process the daemon at --host is: it needs --host")
    if no_rate and rates:
        raise click.UsageError("--rate and --no-rate exclude each other")
    rates = () if no_rate else _open_loop_rates(rates)
    with options.measuring():
        _run(Settings(host=host, pid=pid, rates=rates, **rest), json_path, plot_path)


def _open_loop_rates(asked: tuple[float, ...] | None) -> tuple[float, ...]:
    if asked:
        options.require("hdrhistogram", "--rate", module="hdrh")
        return asked
    try:
        import hdrh.histogram  # noqa: F401
    except ImportError:
        click.echo("latency.py: no open loop, because hdrhistogram is not installed", err=True)
        return ()
    return (_DEFAULT_RATE,)


def _run(settings: Settings, json_path: Path | None, plot_path: Path | None) -> None:
    machine = report.environment()
    cases: list[CaseReport] = []
    samples: list[tuple[Case, pictures.Samples]] = []
    with contextlib.ExitStack() as stack:
        context: Context = stack.enter_context(zmq.Context())
        targets, workloads = _start(stack, context, settings)
        lengths = f"{settings.rounds} rounds of {settings.seconds:g} s"
        click.echo(report.heading(machine, f"{settings.device}; {lengths}"))
        for case in settings.cases:
            taking_part = [target for target in targets if target.name != CLIENT or case.outstanding == 1]
            measured = measure_rounds(
                context, case, taking_part, workloads[case.rows], settings.rounds, settings.seconds, settings.arrivals
            )
            latencies = {name: np.concatenate([one.latency_us for one in found]) for name, found in measured.items()}
            samples.append((case, latencies))
            cases.append(report.case_report(case, measured))
            click.echo("\n" + report.table(cases[-1]))
    if json_path is not None:
        report.write_json(report.Report(machine, msgspec.to_builtins(settings), cases), json_path)
    if plot_path is not None:
        about = report.about(machine, settings.rounds, settings.seconds)
        pictures.draw_percentiles(samples, about, plot_path)


def _start(
    stack: contextlib.ExitStack, context: Context, settings: Settings
) -> tuple[Sequence[Target], dict[int, Workload]]:
    """Start what takes part. Returns it, ready, and the requests by their rows."""
    floors = []
    ready: Callable[[], Target]
    if settings.host is None:
        ready = partial(daemon_target, start_daemon(stack, settings.device))
        floors = start_floors(stack, "tcp", settings.device)
    else:
        endpoint = parse_endpoint(settings.host)
        ready = partial(Target, DAEMON, endpoint, settings.pid)
        if is_here(endpoint):
            floors = start_floors(stack, endpoint.partition(":")[0], settings.device)
        else:
            click.echo("No floors: they run here, over loopback, and would say nothing about a distant daemon.")
    model = torch_forward()
    workloads = {rows: mlp(rows, settings.device == "cuda", model) for rows in settings.batch_sizes}
    daemon = ready()
    answers = [probe(context, daemon.endpoint, workload) for workload in workloads.values()]
    return [daemon, Target(CLIENT, daemon.endpoint, daemon.pid), *floor_targets(floors, answers)], workloads


if __name__ == "__main__":
    main()
