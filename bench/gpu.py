"""`python bench/gpu.py`: the daemon on a GPU, whether it does the right thing and how fast. --help says more."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch

import gpu_checks
import gpu_figures
import options
import report
from gpu_networks import FULL, MLP, PICTURES, PICTURES_64, SMALL, TEXTS
from gpu_report import ASSERT, LONE, MEMORY, SWITCHES, TESTS, GpuReport, Part, markdown
from gpu_run import ROOT, Budget, Lengths, Run
from processes import BenchError

BUDGET_S = 430.0
"""Seconds of all parts, by default; what is under way then still ends."""

PRETENDED = (str(ROOT / "tests" / "pretended_process.py"),)
"""Runs a program in a process that has a pretended GPU."""


class Plan(NamedTuple):
    """A part of a run.

    Attributes:
        share: of the time, in seconds if everybody takes all of theirs. networks: that are measured.
    """

    do: Callable[[Run], None]
    share: float
    networks: tuple[str, ...] = ()


PARTS = {
    TESTS: Plan(gpu_checks.tests, 100),
    ASSERT: Plan(gpu_checks.device_assert, 60),
    MEMORY: Plan(gpu_checks.memory, 30),
    LONE: Plan(gpu_figures.lone, 50, (MLP, PICTURES_64)),
    PICTURES_64: Plan(
        lambda run: gpu_figures.network(run, PICTURES_64, run.networks[PICTURES_64].rows[-1:]), 20, (PICTURES_64,)
    ),
    SWITCHES: Plan(gpu_figures.switches, 60, (MLP, PICTURES_64)),
    PICTURES: Plan(partial(gpu_figures.network, name=PICTURES), 45, (PICTURES,)),
    MLP: Plan(partial(gpu_figures.network, name=MLP), 45, (MLP,)),
    TEXTS: Plan(partial(gpu_figures.network, name=TEXTS), 40, (TEXTS,)),
}
"""In this order: first whether it is right, then what there is a goal for."""


@options.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: os.environ.get("OUT") or "build/gpu",
    help="Directory for gpu.json, gpu.md and gpu.log.  [default: $OUT, else build/gpu]",
)
@click.option("--budget", type=click.FloatRange(1), default=BUDGET_S, show_default=True, help="Seconds of all parts.")
@options.parts(PARTS)
@click.option("--small", is_flag=True, help="Small networks and few sizes: to see that it works.")
@click.option("--pretended", is_flag=True, help="On a pretended GPU, to see that it works: figures mean nothing.")
@options.lengths(rounds=(3, 1), seconds=(0.6, 0.05))
def main(
    out: Path, budget: float, parts: Sequence[str], small: bool, pretended: bool, rounds: int, seconds: float
) -> None:
    """See on a GPU whether the daemon does the right thing, and measure it.

    \b
    tests        tests of the CUDA lane
    assert       a device assert: an index out of range in an embedding
    memory       memory taken away until a batch has none left, and given back
    lone         one request at a time, beside an echo: what the daemon adds to the GPU's time
    resnet50-64  ResNet-50 in bfloat16, 64 rows, beside a pipeline in a process of its own
    switches     without CUDA graphs, without overlap, without both
    resnet50, mlp, minilm: requests of all sizes

    A part that fails, or whose time is up, does not keep those after it from their turn: all results are there after
    one run. The time that a part did not need is for those after it. What there was no time for is said.

    The exit code is 1 if a part failed or something that has to happen did not. Figures that miss a goal are no
    failure.
    """
    if not pretended and not torch.cuda.is_available():
        raise click.ClickException(
            f"torch {torch.__version__} finds no GPU here; --pretended --small tries the program"
        )
    out.mkdir(parents=True, exist_ok=True)
    found = GpuReport(pretended, SMALL if small else FULL, budget, report.environment())
    click.echo(report.heading(found.environment, f"{budget:g} s for {', '.join(parts)}"))
    time_of = Budget(budget, {part: PARTS[part].share for part in parts})
    names = list(dict.fromkeys(name for part in parts for name in PARTS[part].networks))
    program = PRETENDED if pretended else ()
    with options.measuring(), Run(found, out, time_of, Lengths(rounds, seconds), names, program) as run:
        run.save()
        for part in parts:
            _run_part(run, part)
    click.echo("\n" + markdown(found))
    failed = [part.name for part in found.parts if part.failure]
    missed = [name for name, check in found.checks.items() if not check.ok]
    if failed or missed:
        click.echo(
            f"gpu.py: failed: {', '.join(failed) or '-'}; missed: {', '.join(missed) or '-'}; see {run.log}", err=True
        )
        sys.exit(1)


def _run_part(run: Run, part: str) -> None:
    run.budget.begin(part)
    run.notes, run.left_out, failure = [], [], ""
    began = time.monotonic()
    try:
        PARTS[part].do(run)
    except BenchError as error:
        failure = str(error)
    except Exception as error:  # a defect of this program, maybe: the other parts are paid for, too
        run.heading(f"{part} failed")
        with run.log.open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        failure = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    run.report.parts.append(Part(part, seconds, failure, run.left_out, run.notes))
    run.save()
    said = [*([f"failed: {failure}"] if failure else []), *(f"left out: {each}" for each in run.left_out), *run.notes]
    click.echo("\n".join([f"{part}: {seconds:.1f} s", *(f"  {each}" for each in said)]))


if __name__ == "__main__":
    main()
