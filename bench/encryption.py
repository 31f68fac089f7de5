"""`python bench/encryption.py`: what keys cost, that is CURVE in place of NULL.

Two daemons with the same models, one of which asks for keys, take turns in each round. The built-in MLP gets 1 KiB; a
model that hands its input through gets 1 MiB.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import zmq

import passing
from loadgen import Context
from processes import ChildProcess
from report import DAEMON, Case
from rounds import in_turns, measure
from targets import Target
from tnxctl.keys import authorized, pairs
from workload import Workload, mlp, torch_forward

NULL, CURVE = "NULL", "CURVE"


class Contender(NamedTuple):
    """Daemon that is asked. Attributes: context: makes sockets that have the keys for it, if it asks for any."""

    mechanism: str
    context: Context
    target: Target


def start(stack: contextlib.ExitStack, *arguments: str) -> ChildProcess:
    """Start a daemon, which the stack stops."""
    models = ["--model", "mlp", "--model", passing.MODEL, "--bind", "tcp://127.0.0.1:*", "--log-level", "warning"]
    program = Path(passing.__file__)
    return stack.enter_context(ChildProcess("tnxd", [str(program), *models, *arguments]))


def keys(folder: Path) -> tuple[Path, pairs.Pair, pairs.Pair]:
    """Configuration of a daemon that asks for keys, its pair, and that of a client who may connect."""
    daemon, client = pairs.new("daemon"), pairs.new("client")
    pairs.write(folder / "tnxd.key", daemon)
    authorized.allow(folder / "authorized_keys.toml", pairs.client_line(client), "predict")
    config = folder / "tnxd.toml"
    config.write_text(f'[keys]\nauthorized = "{folder}/authorized_keys.toml"\nsecret = "{folder}/tnxd.key"\n')
    return config, daemon, client


def contenders(stack: contextlib.ExitStack) -> list[Contender]:
    """Both daemons, when they are ready."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="encryption-")))
    config, daemon, client = keys(folder)
    started = {NULL: start(stack), CURVE: start(stack, "--config", str(config))}
    found = []
    for mechanism, child in started.items():
        context: Context = stack.enter_context(zmq.Context())
        if mechanism == CURVE:  # defaults of all its sockets
            context.setsockopt(zmq.CURVE_SERVERKEY, daemon.public.encode())
            context.setsockopt(zmq.CURVE_PUBLICKEY, client.public.encode())
            context.setsockopt(zmq.CURVE_SECRETKEY, client.secret.encode())
        endpoint = child.ready().split("ready on ", 1)[1].split(";")[0]
        found.append(Contender(mechanism, context, Target(DAEMON, endpoint, child.pid)))
    return found


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one measurement.")
@click.option("--outstanding", type=int, multiple=True, default=(1, 64), show_default=True)
def main(rounds: int, seconds: float, outstanding: Sequence[int]) -> None:
    workloads: dict[str, Workload] = {"1 KiB": mlp(1, False, torch_forward()), "1 MiB": passing.mebibyte()}
    with contextlib.ExitStack() as stack:
        asked = contenders(stack)
        click.echo("| request | outstanding | mechanism | p50, µs | ratio | requests/s | ratio | daemon's CPU, µs |")
        click.echo("|---|---|---|---|---|---|---|---|")
        for size, workload in workloads.items():
            for count in outstanding:
                p50: dict[str, list[float]] = {NULL: [], CURVE: []}
                rates: dict[str, list[float]] = {NULL: [], CURVE: []}
                cpu: dict[str, list[float]] = {NULL: [], CURVE: []}
                for _, each in in_turns(asked, rounds):
                    found = measure(each.context, Case(1, outstanding=count), each.target, workload, seconds)
                    assert not found.errors, (each.mechanism, found.errors)
                    p50[each.mechanism].append(float(np.median(found.latency_us)))
                    rates[each.mechanism].append(len(found.latency_us) / found.seconds)
                    cpu[each.mechanism].append((found.server_cpu_ns or 0) / 1e3 / len(found.latency_us))
                for name in (NULL, CURVE):
                    click.echo(
                        f"| {size} | {count} | {name} | {np.median(p50[name]):.0f} "
                        f"| {np.median(np.divide(p50[name], p50[NULL])):.2f} | {np.median(rates[name]):,.0f} "
                        f"| {np.median(np.divide(rates[name], rates[NULL])):.2f} | {np.median(cpu[name]):.0f} |"
                    )


if __name__ == "__main__":
    main()
