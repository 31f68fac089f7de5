"""`python bench/overload.py`: deadlines when more is offered than can be served. --help says more."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import options
import overload_servers
import pictures
import report
from contenders import ENVIRONMENTS
from crowd import FLOOD, LIGHT
from outcomes import Outcomes, joined
from overload_figures import Figures, figures, waiting
from overload_models import MODELS
from overload_report import REST, URGENT, Calm, Overload, Row, ServerReport, capacity_text, heading, row_text
from overload_servers import Asked, Server
from processes import BenchError, machine_cpu_ns
from report import DAEMON
from targets import Target

_RECOVERY_SECONDS = 0.1

_QUIET_CORES = 0.25
_LOOK_SECONDS, _LOOKS = 1.0, 60


@dataclass(frozen=True)
class Settings:
    """Options that were given on the command line, as in --help. deadline: None for none."""

    model: str
    rows: int
    deadline: float | None
    clients: int
    multiples: tuple[float, ...]
    light: float
    urgent: float
    heedless: bool
    seconds: float
    seed: int
    tries: int
    peers: tuple[str, ...]
    connections: int
    environments: Path


_SHARE = click.FloatRange(0, 1, max_open=True)


@options.command()
@click.option("--endpoint", metavar="tcp://HOST:PORT", help="Load this running daemon instead of starting one.")
@click.option("--pid", type=int, help="With --endpoint: the process id of that daemon, to count its CPU time.")
@click.option(
    "--config",
    "configuration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings of the daemon that is started, as for tnxd.",
)
@click.option("--model", type=click.Choice(list(MODELS)), default="wide", show_default=True, help="What is asked.")
@click.option("--rows", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rows per request.")
@click.option(
    "--deadline",
    type=click.FloatRange(0, 60_000, min_open=True),
    metavar="MS",
    help="Of every request, in milliseconds.  [default: 50]",
)
@click.option("--no-deadline", is_flag=True, help="Requests without one: how they wait, and how many find no room.")
@click.option(
    "--clients", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that the load is split over."
)
@options.listed(
    "--multiples", "0.3,0.6,0.8,1,2,4,8", "How much is offered, in multiples of capacity.", float, "X,X,..."
)
@click.option(
    "--light",
    type=_SHARE,
    default=0.0,
    metavar="SHARE",
    help="One more client, which asks for this share of capacity beside the others, say 0.1.",
)
@click.option(
    "--urgent", type=_SHARE, default=0.0, metavar="SHARE", help="This share of the load has priority 0, say 0.1."
)
@click.option(
    "--heedless",
    is_flag=True,
    help="Clients of the daemon go on sending what it refuses, and do not say when they send.  [default: they do as "
    "tnxctl's client]",
)
@click.option(
    "--seconds", type=click.FloatRange(0.05, 600), default=2.0, show_default=True, help="Length of each load."
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the random times of requests.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(list(overload_servers.PEERS)),
    help="Beside the daemon, load this server; may be given several times. `make bench-peers` builds them.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 10_000),
    default=1024,
    show_default=True,
    help="Of each client process to a peer: most requests that are under way.",
)
@click.option(
    "--environments",
    type=click.Path(file_okay=False, path_type=Path),
    default=ENVIRONMENTS,
    help="Where the environments of the peers are.  [default: build/peers]",
)
@click.option(
    "--tries",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help=f"Wait for other programs to end, and load again, up to so often, where they kept more than {_QUIET_CORES:g} "
    "cores busy meanwhile. The quietest counts.",
)
@options.outputs("Draw what was offered against what was in time to")
def main(
    json_path: Path | None,
    plot_path: Path | None,
    endpoint: str | None,
    pid: int | None,
    configuration: Path | None,
    deadline: float | None,
    no_deadline: bool,
    **rest: Any,
) -> None:
    """Measure what happens to deadlines when more is offered than can be served.

    Capacity is measured first, in a closed loop. Then multiples of it are offered in open loops: requests are due at
    random times, whatever became of those before them. Clients are processes of their own, in Python, on raw sockets.
    What a socket has no room for is kept and sent as soon as it has; what is left when the load is over is dropped.

    \b
    in time    results that were here within the deadline, by the client's clock, from when a request was due
    of sent    the same, from when it was sent: that the client itself was late is not the server's fault
    admitted   share of those that were taken in that were in time: from when they were due, from when they were sent
    refused    turned away on arrival, since they cannot be done within the deadline; full: since there is no room
    held       not sent, since the daemon had refused others like it: what tnxctl's client does
    late       results that were not in time; expired: taken in, and given up when the deadline had passed
    lost       no answer within 10 s after the load
    sent late  p99 of how late the client came to send, in ms
    CPU us     CPU time of the server per request that was sent
    others     cores that other programs here kept busy meanwhile: near 0, or the row says little
    calm       p50 in us of a closed loop with one request at a time, before the load and from 100 ms after it on

    Peers get multiples of their own capacity, by clients of the same kind over HTTP. They are not told of deadlines,
    but for mosec, which has the deadline as its time limit for any request.
    """
    if pid is not None and endpoint is None:
        raise click.UsageError("--pid says which process the daemon at --endpoint is: it needs --endpoint")
    if endpoint is not None and configuration is not None:
        raise click.UsageError("--config is for a daemon that is started, and --endpoint for one that runs already")
    if endpoint is not None and not endpoint.startswith("tcp://"):
        raise click.BadParameter(f"{endpoint} is not tcp://HOST:PORT", param_hint="--endpoint")
    if deadline is not None and no_deadline:
        raise click.UsageError("--deadline and --no-deadline exclude each other")
    model, rows = rest["model"], rest["rows"]
    if rest["peers"] and (model not in overload_servers.PEER_MODELS or rows != 1):
        raise click.UsageError(f"peers serve {' and '.join(overload_servers.PEER_MODELS)}, with one row per request")
    if rest["peers"] and sys.platform != "linux":
        raise click.UsageError("--peer works on Linux only: it counts CPU time by way of /proc")
    settings = Settings(deadline=None if no_deadline else deadline or 50.0, **rest)
    with options.measuring():
        result = _run(settings, Target(DAEMON, endpoint, pid) if endpoint else None, configuration)
    if json_path is not None:
        report.write_json(result, json_path)
    if plot_path is not None:
        pictures.draw_overload(result, plot_path)


def _run(settings: Settings, running: Target | None, configuration: Path | None) -> Overload:
    machine = report.environment()
    reports: dict[str, ServerReport] = {}
    with contextlib.ExitStack() as stack:
        starting = running or overload_servers.start(stack, settings.model, configuration)
        samples = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx"))) / "samples.npz"
        inputs, outputs = MODELS[settings.model].samples(settings.rows)
        np.savez(samples, inputs=inputs, outputs=outputs)
        asked = Asked(
            model=settings.model,
            rows=settings.rows,
            deadline_ms=settings.deadline,
            clients=settings.clients,
            urgent=settings.urgent,
            light=settings.light > 0,
            heeds=not settings.heedless,
            connections=settings.connections,
            samples=samples,
        )
        servers = [overload_servers.daemon(stack, starting, asked)]
        missing: dict[str, str] = {}
        for name in settings.peers:
            try:
                servers.append(overload_servers.peer(stack, name, settings.environments, asked))
            except BenchError as error:
                missing[name] = str(error)
        click.echo(report.heading(machine, f"{settings.seconds:g} s for each load"))
        for server in servers:
            server.measure_capacity()
        click.echo("\n" + heading(settings.model, settings.rows, settings.deadline, settings.clients))
        for server in servers:
            click.echo(capacity_text(server.name, server.capacity))
            found = [
                _quietest(server, settings, multiple, settings.seed + number)
                for number, multiple in enumerate(settings.multiples)
            ]
            reports[server.name] = ServerReport(server.capacity, found)
        for name, reason in missing.items():
            click.echo(f"{name}: not measured, {reason}")
    return Overload(machine, _builtins(settings), reports, missing)


def _builtins(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=str)
    return found


def _quietest(server: Server, settings: Settings, multiple: float, seed: int) -> Row:
    """One load, again if others kept the machine busy meanwhile. It is printed."""
    rows: list[Row] = []
    for _ in range(settings.tries):
        if settings.tries > 1:
            _wait_for_others()
        rows.append(_row(server, settings, multiple, seed))
        if (rows[-1].others_cores or 0.0) <= _QUIET_CORES:
            break
    quietest = min(rows, key=lambda row: row.others_cores or 0.0)
    click.echo(row_text(quietest))
    return quietest


def _wait_for_others() -> None:
    """Wait until this machine is quiet, but not for ever."""
    for _ in range(_LOOKS):
        before = machine_cpu_ns()
        time.sleep(_LOOK_SECONDS)
        after = machine_cpu_ns()
        if before is None or after is None or after - before <= _QUIET_CORES * _LOOK_SECONDS * 1e9:
            return


def _row(server: Server, settings: Settings, multiple: float, seed: int) -> Row:
    """One load, and calm before and after it."""
    capacity = server.capacity.requests_per_s
    rates = {FLOOD: multiple * capacity}
    if settings.light:
        rates[LIGHT] = settings.light * capacity
    before = server.calm()
    calm_after: list[Calm] = []

    def after(end_ns: int) -> None:
        time.sleep(max(end_ns + int(_RECOVERY_SECONDS * 1e9) - time.perf_counter_ns(), 0) / 1e9)
        calm_after.append(server.calm())

    left = server.load(rates, settings.seconds, seed, after)
    sent = sum(int(np.count_nonzero(one.sent)) for found in left.outcomes.values() for one in found)
    return Row(
        multiple=multiple,
        rate=round(rates[FLOOD], 1),
        groups=_groups(left.outcomes, settings),
        waiting=waiting(left.outcomes[FLOOD]),
        cut=left.cut,
        server_cpu_us=None if left.server_cpu_ns is None or not sent else round(left.server_cpu_ns / 1e3 / sent, 1),
        others_cores=None if left.others_cpu_ns is None else round(left.others_cpu_ns / 1e9 / settings.seconds, 2),
        calm_before=before,
        calm_after=calm_after[0],
    )


def _groups(outcomes: Mapping[str, list[Outcomes]], settings: Settings) -> dict[str, Figures]:
    """Figures by who asks; of the flood also by how urgent it is, if that differs: HTTP has no such thing."""
    found = {kind: joined(parts) for kind, parts in outcomes.items()}
    flood = found[FLOOD]
    if flood.urgent.any():
        found |= {URGENT: flood.where(flood.urgent), REST: flood.where(~flood.urgent)}
    return {name: figures(one, settings.seconds, settings.deadline) for name, one in found.items()}


if __name__ == "__main__":
    main()
