"""`python bench/trees.py BEFORE`: what a change costs the daemon, from the working tree BEFORE to this one.

A daemon of each tree runs the whole time, and they take turns under a closed loop of small requests. What counts are
the medians of the ratios within a round: the state of the machine drifts, but is the same for both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import zmq

from processes import ChildProcess
from report import Case
from rounds import in_turns, measure
from targets import Target, daemon_target
from workload import MODEL, mlp, torch_forward

BEFORE, AFTER = "before", "after"


def start(stack: contextlib.ExitStack, name: str, tree: Path) -> Target:
    """Start the daemon of a tree, which the stack stops. Returns it when it is ready."""
    # -P: else the current directory, which is a tree as well, would come before that of the environment.
    arguments = ["-P", "-m", "tnxd", "--model", MODEL, "--bind", "tcp://127.0.0.1:*", "--log-level", "warning"]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    started = daemon_target(stack.enter_context(ChildProcess(name, arguments, environment=environment)))
    return Target(name, started.endpoint, started.pid)


@click.command(help=__doc__)
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=31, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one measurement.")
@click.option("--outstanding", type=int, multiple=True, default=(1, 64), show_default=True)
def main(before: Path, rounds: int, seconds: float, outstanding: Sequence[int]) -> None:
    workload = mlp(1, False, torch_forward())
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        trees = {BEFORE: before, AFTER: Path(__file__).parents[1]}
        targets = [start(stack, name, tree) for name, tree in trees.items()]
        click.echo("| outstanding | tree | p50, µs | p99, µs | daemon's CPU per request, µs |")
        click.echo("|---|---|---|---|---|")
        for count in outstanding:
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trees}
            for _, target in in_turns(targets, rounds):
                got = measure(context, Case(1, outstanding=count), target, workload, seconds)
                assert not got.errors, (target.name, got.errors)
                p50, p99 = np.quantile(got.latency_us, (0.5, 0.99))
                found[target.name].append((p50, p99, (got.server_cpu_ns or 0) / 1e3 / len(got.latency_us)))
            for name in trees:
                p50, p99, cpu = np.median(found[name], axis=0)
                click.echo(f"| {count} | {name} | {p50:.0f} | {p99:.0f} | {cpu:.1f} |")
            ratios = np.median(np.divide(found[AFTER], found[BEFORE]), axis=0)
            click.echo(f"| {count} | ratio | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")


if __name__ == "__main__":
    main()
