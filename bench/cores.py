"""`python bench/cores.py`: batches on one core or on several, on machines with up to 64 cores, in simulated time.

A network like ResNet-50 takes 140 ms for a picture on one core, whatever the batch, and a quarter of a batch is serial.
Pictures come at random times, at shares of what all cores together can do one by one. Each way to use the cores meets
the same pictures: one core for each batch; a fixed number of cores, chosen as the daemon once did; and the daemon's
choice for each batch. The table has the median and the 99th percentile of the time to an answer.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click
import msgspec
import numpy as np

from policies import Scheduled
from simulation import Loop, Noise, replay
from tnxd.executors.host import plan_lanes
from tnxd.lanes import NO_TEAMS, Teams
from traces import CPU, Job, Machine, Trace

_MODEL = "picture"
_ROW_US = 140_000.0
_LIMIT = 8
_CORES = (2, 16, 64)
_LOADS = (0.02, 0.2, 0.5, 0.8, 0.95)
_PATIENCE_US = 60e6

NARROW, FIXED, CHOSEN = "one core", "fixed", "chosen"


class Line(msgspec.Struct, frozen=True):
    """One way to use the cores under one load: median and 99th percentile of the time to an answer, milliseconds."""

    cores: int
    load: float
    way: str
    p50_ms: float
    p99_ms: float


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    command: str
    seed: int
    lines: list[Line]


def fixed(cores: int) -> tuple[int, int]:
    """Lanes, and threads of each: all cores but one, up to four threads in a lane."""
    threads = max(min(4, (cores - 1) // 2), 1)
    return max((cores - 1) // threads, 1), threads


def measure(cores: int, load: float, way: str, count: int, seed: int) -> Line:
    """Replay pictures through the daemon's scheduler, on a machine with so many cores."""
    loop = Loop(cores=cores)
    lanes, teams, threads = cores, NO_TEAMS, 0
    if way == FIXED:
        lanes, threads = fixed(cores)
        teams = Teams(lanes, threads, cores) if threads > 1 else NO_TEAMS
    elif way == CHOSEN:
        lanes, teams = plan_lanes(cores)
    machine = Machine({CPU: lanes}, {_MODEL: _LIMIT}, {(CPU, _MODEL): {1: _ROW_US, _LIMIT: _LIMIT * _ROW_US}})
    gaps_us = np.random.default_rng([seed, cores]).exponential(_ROW_US / (cores * load), count)
    jobs = [Job(float(at), float(at) + _PATIENCE_US, _MODEL) for at in np.cumsum(gaps_us)]
    trace = Trace(_MODEL, "", machine, jobs)
    noise = Noise(machine, seed)
    policy = Scheduled(machine, jobs, noise, teams=teams, part=loop.part(teams.threads), threads=threads)
    outcome = replay(trace, policy, noise, loop)
    waits_ms = np.sort((outcome.done_us - np.array([job.arrival_us for job in jobs])) / 1e3)
    half, most = (float(waits_ms[int(share * count)]) for share in (0.5, 0.99))
    return Line(cores, load, way, half, most)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, help=__doc__)
@click.option("--requests", "count", type=click.IntRange(10), default=4_000, show_default=True, help="For each line.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results to this file.")
def main(count: int, seed: int, path: Path | None) -> None:
    """See the module."""
    ways = (NARROW, FIXED, CHOSEN)
    click.echo(f"{'cores':>6}{'load':>7}" + "".join(f"{f'{way}: p50, p99 ms':>28}" for way in ways))
    lines = []
    for cores in _CORES:
        for load in _LOADS:
            found = [measure(cores, load, way, count, seed) for way in ways]
            lines += found
            click.echo(f"{cores:>6}{load:>7.0%}" + "".join(_told(line) for line in found))
    if path is not None:
        report = Report(" ".join(sys.argv), seed, lines)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _told(line: Line) -> str:
    numbers = [f"{millis:,.0f}" if math.isfinite(millis) else "-" for millis in (line.p50_ms, line.p99_ms)]
    return f"{', '.join(numbers):>28}"


if __name__ == "__main__":
    main()
