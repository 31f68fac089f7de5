"""`python bench/overload.py`: deadlines when more is offered than can be served. --help says more."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import options
import overload_models
import report
from crowd import FLOOD, Crowd
from flood import Setting
from measurement import Measurement, evaluate
from outcomes import figures
from overload_models import INPUT, MODELS
from overload_report import Calm, Capacity, Overload, Row, heading, row_text
from processes import BenchError, cpu_ns
from targets import Target, daemon_target, start_daemon
from workload import Workload
from zmtpload import ZmtpConnection

_OUTSTANDING = (16, 64, 256)
"""Of the closed loops that capacity is the best of."""

_CAPACITY_SECONDS = 0.5
_CALM_SECONDS = 0.3
_RECOVERY_SECONDS = 0.1


@dataclass(frozen=True)
class Settings:
    """Options that were given on the command line, as in --help."""

    model: str
    rows: int
    deadline: float
    clients: int
    multiples: tuple[float, ...]
    seconds: float
    seed: int

    @property
    def deadline_ms(self) -> float | None:
        return self.deadline


@options.command()
@click.option("--endpoint", metavar="tcp://HOST:PORT", help="Load this running daemon instead of starting one.")
@click.option("--pid", type=int, help="With --endpoint: the process id of that daemon, to count its CPU time.")
@click.option("--model", type=click.Choice(list(MODELS)), default="wide", show_default=True, help="What is asked.")
@click.option("--rows", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rows per request.")
@click.option(
    "--deadline",
    type=click.FloatRange(0, 60_000, min_open=True),
    default=50.0,
    show_default=True,
    metavar="MS",
    help="Of every request, in milliseconds.",
)
@click.option(
    "--clients", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that the load is split over."
)
@options.listed(
    "--multiples", "0.3,0.6,0.8,1,2,4,8", "How much is offered, in multiples of capacity.", float, "X,X,..."
)
@click.option(
    "--seconds", type=click.FloatRange(0.05, 600), default=2.0, show_default=True, help="Length of each load."
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the random times of requests.")
@options.outputs("Draw what was offered against what was in time to")
def main(json_path: Path | None, plot_path: Path | None, endpoint: str | None, pid: int | None, **rest: Any) -> None:
    """Measure what happens to deadlines when more is offered than can be served.

    Capacity is measured first, in a closed loop. Then multiples of it are offered in open loops: requests are due at
    random times, whatever became of those before them. Clients are processes of their own, in Python, on raw sockets.
    What a socket has no room for is kept and sent as soon as it has; what is left when the load is over is dropped.

    A request is in time if its result is here within the deadline, by the client's clock. That counts from when it was
    due, and, in a second figure, from when it was sent: that the client itself was late is not the server's fault.

    After each load there are 100 ms of nothing, and then a calm closed loop with one request at a time, whose p50 is
    compared with that of one before.
    """
    if pid is not None and endpoint is None:
        raise click.UsageError("--pid says which process the daemon at --endpoint is: it needs --endpoint")
    if endpoint is not None and not endpoint.startswith("tcp://"):
        raise click.BadParameter(f"{endpoint} is not tcp://HOST:PORT", param_hint="--endpoint")
    settings = Settings(**rest)
    with options.measuring():
        result = _run(settings, endpoint, pid)
    if json_path is not None:
        report.write_json(result, json_path)


def _run(settings: Settings, endpoint: str | None, pid: int | None) -> Overload:
    machine = report.environment()
    with contextlib.ExitStack() as stack:
        starting = None
        if endpoint is None:
            program = [str(Path(overload_models.__file__))]
            starting = start_daemon(stack, program=program, model=settings.model)
        served = MODELS[settings.model]
        inputs, outputs = served.samples(settings.rows)
        samples = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx"))) / "samples.npz"
        np.savez(samples, inputs=inputs, outputs=outputs)
        target = Target(report.DAEMON, endpoint or "", pid) if starting is None else daemon_target(starting)
        deadline_us = None if settings.deadline_ms is None else settings.deadline_ms * 1e3
        setting = Setting(target.endpoint, str(samples), settings.model, INPUT, served.tolerance, deadline_us)
        crowd = Crowd(stack, {FLOOD: (setting, settings.clients)})
        click.echo(report.heading(machine, f"{settings.seconds:g} s for each load"))
        capacity = _capacity(target.endpoint, msgspec.structs.replace(setting, deadline_us=None).workload())
        click.echo("\n" + heading(settings.model, settings.rows, settings.deadline_ms, settings.clients, capacity))
        rows = []
        for number, multiple in enumerate(settings.multiples):
            rows.append(_row(crowd, target, setting, settings, capacity, multiple, number))
            click.echo(row_text(rows[-1]))
    return Overload(machine, msgspec.to_builtins(settings), capacity, rows)


def _capacity(endpoint: str, workload: Workload) -> Capacity:
    """The best rate of a closed loop, without deadlines. Raises BenchError."""
    found: dict[int, float] = {}
    for outstanding in _OUTSTANDING:
        measured = _closed_loop(endpoint, workload, outstanding, _CAPACITY_SECONDS)
        if measured.errors:
            raise BenchError(f"{endpoint} with {outstanding} outstanding: {dict(measured.errors)}")
        found[outstanding] = round(len(measured.latency_us) / measured.seconds, 1)
    best = max(found, key=lambda outstanding: found[outstanding])
    return Capacity(found[best], best, found)


def _closed_loop(endpoint: str, workload: Workload, outstanding: int, seconds: float) -> Measurement:
    with ZmtpConnection(endpoint, workload) as connection:
        return evaluate(connection.closed_loop(outstanding, seconds), workload, check=True)


def _calm(endpoint: str, workload: Workload) -> Calm:
    """How it is without a load."""
    try:
        found = _closed_loop(endpoint, workload, 1, _CALM_SECONDS)
    except BenchError as error:
        return Calm(None, 0, {str(error): 1})
    p50 = round(float(np.median(found.latency_us)), 1) if len(found.latency_us) else None
    return Calm(p50, len(found.latency_us), dict(found.errors))


def _row(
    crowd: Crowd,
    target: Target,
    setting: Setting,
    settings: Settings,
    capacity: Capacity,
    multiple: float,
    number: int,
) -> Row:
    workload = setting.workload()
    rate = multiple * capacity.requests_per_s
    before = _calm(target.endpoint, workload)
    calm_after: list[Calm] = []

    def after(end_ns: int) -> None:
        time.sleep(max(end_ns + int(_RECOVERY_SECONDS * 1e9) - time.perf_counter_ns(), 0) / 1e9)
        calm_after.append(_calm(target.endpoint, workload))

    left = crowd.load({FLOOD: rate}, settings.seconds, settings.seed + number, after, lambda: cpu_ns(target.pid))
    groups = {kind: figures(found, settings.seconds, settings.deadline_ms) for kind, found in left.outcomes.items()}
    sent = sum(int(np.count_nonzero(found.sent)) for found in left.outcomes.values())
    return Row(
        multiple=multiple,
        rate=round(rate, 1),
        groups=groups,
        cut=left.cut,
        server_cpu_us=None if left.server_cpu_ns is None or not sent else round(left.server_cpu_ns / 1e3 / sent, 1),
        others_cores=None if left.others_cpu_ns is None else round(left.others_cpu_ns / 1e9 / settings.seconds, 2),
        calm_before=before,
        calm_after=calm_after[0],
    )


if __name__ == "__main__":
    main()
