"""`python bench/plain_python.py`: what a model.py costs beside a network, and what its process adds.

One daemon serves all models, which take turns in each round: the built-in MLP, and classes in Python that do next to
nothing, on the serving thread (`isolation = "none"`), on a lane ("thread") and in a process ("process"). They give back
what they get: 1 KiB, 64 KiB or 1 MiB in a row.
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

from loadgen import Context
from processes import ChildProcess
from report import DAEMON, Case
from rounds import in_turns, measure
from targets import Target
from workload import VARIANTS, Workload, mlp, torch_forward

CLASS = """\
class Model:
    def predict(self, x):
        return x * 1
"""

SETTINGS = """\
isolation = "{isolation}"
audit = 0.0
inputs = [{{ name = "x", datatype = "FP32", shape = [-1, {columns}] }}]
outputs = [{{ name = "y", datatype = "FP32", shape = [-1, {columns}] }}]
"""

SIZES = {"1 KiB": 1 << 8, "64 KiB": 1 << 14, "1 MiB": 1 << 18}
ISOLATIONS = ("none", "thread", "process")


class Contender(NamedTuple):
    """Case to measure. Attributes: size: of a row. name: what computes it, and where."""

    size: str
    name: str
    workload: Workload


def contenders(root: Path) -> list[Contender]:
    """Write the models into a repository; return what asks for them, and for the MLP."""
    found = [Contender("1 KiB", "MLP, torch", mlp(1, False, torch_forward()))]
    for size, columns in SIZES.items():
        rows = [np.random.default_rng(seed).random((1, columns), np.float32) for seed in range(VARIANTS)]
        for isolation in ISOLATIONS:
            name = f"{isolation}-{columns}"
            (root / name / "1").mkdir(parents=True)
            (root / name / "1" / "model.py").write_text(CLASS)
            (root / name / "model.toml").write_text(SETTINGS.format(isolation=isolation, columns=columns))
            found.append(Contender(size, f"model.py, {isolation}", Workload(name, "x", rows, rows, tolerance=0.0)))
    return found


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one measurement.")
@click.option("--outstanding", type=int, multiple=True, default=(1, 64), show_default=True)
def main(rounds: int, seconds: float, outstanding: Sequence[int]) -> None:
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plain-python-")))
        asked = contenders(root)
        arguments = ["--bind", "tcp://127.0.0.1:*", "--model", "mlp", "--model-repository", str(root)]
        daemon = stack.enter_context(ChildProcess("tnxd", ["-m", "tnxd", *arguments, "--log-level", "warning"]))
        endpoint = daemon.ready().split("ready on ", 1)[1].split(";")[0]
        context: Context = stack.enter_context(zmq.Context())
        target = Target(DAEMON, endpoint, daemon.pid)
        click.echo("| row | model | outstanding | p50, µs | ratio | requests/s | daemon's CPU, µs |")
        click.echo("|---|---|---|---|---|---|---|")
        for count in outstanding:
            p50: dict[Contender, list[float]] = {each: [] for each in asked}
            rates: dict[Contender, list[float]] = {each: [] for each in asked}
            cpu: dict[Contender, list[float]] = {each: [] for each in asked}
            for _, each in in_turns(asked, rounds):
                found = measure(context, Case(1, outstanding=count), target, each.workload, seconds)
                assert not found.errors, (each, found.errors)
                p50[each].append(float(np.median(found.latency_us)))
                rates[each].append(len(found.latency_us) / found.seconds)
                cpu[each].append((found.server_cpu_ns or 0) / 1e3 / len(found.latency_us))
            first = {each.size: each for each in reversed(asked)}
            for each in asked:
                ratio = np.median(np.divide(p50[each], p50[first[each.size]]))
                click.echo(
                    f"| {each.size} | {each.name} | {count} | {np.median(p50[each]):.0f} | {ratio:.2f} "
                    f"| {np.median(rates[each]):,.0f} | {np.median(cpu[each]):.0f} |"
                )


if __name__ == "__main__":
    main()
