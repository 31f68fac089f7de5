"""`python bench/throughput.py`: rate against latency up to saturation, large tensors, idle peers. --help says more."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import zmq

import options
import pictures
import report
from goals import Goal, goals_text
from loadgen import Context
from measurement import Measurement
from processes import ChildProcess
from report import BATCHING, DAEMON, ECHO, PLAIN, Case, CaseReport, Ratio, ratio
from rounds import measure, measure_rounds
from targets import Target, daemon_target, floor_targets, probe, start_daemon, start_floors
from workload import Workload, mlp, torch_forward

_HERE = Path(__file__).parent

PARTS = ("curve", "mebibyte", "idle")

_MEBIBYTE_OUTSTANDING = (1, 4, 16)
_IDLE_OUTSTANDING = (1, 64)

_CLOSE_SECONDS = 0.05  # between two looks at open files

_HALF = 0.5  # of the peak: where p99 is held against p50


@dataclass(frozen=True)
class Settings:
    """Options that were given on the command line, as in --help."""

    outstanding: tuple[int, ...]
    fractions: tuple[float, ...]
    parts: tuple[str, ...]
    idle: int
    rounds: int
    seconds: float


class IdleReport(msgspec.Struct, frozen=True):
    """Connections that say nothing, and what they do to the daemon.

    Attributes:
        asked, held: how many there were to be, and how many the daemon held, as the median of the rounds.
        rss_mib_before, rss_mib_with: memory of the daemon before the first of them, and with all of them in each
            round. They come anew in every round.
        loads: with them beside without them.
    """

    asked: int
    held: int
    rss_mib_before: float
    rss_mib_with: list[float]
    loads: list[IdleLoad]


class IdleLoad(msgspec.Struct, frozen=True):
    """One load on the daemon without and with idle connections: medians of the rounds, and the ratios within them."""

    outstanding: int
    p50_us_without: float
    p50_us_with: float
    p50_ratio: Ratio
    requests_per_s_ratio: Ratio


class Throughput(msgspec.Struct, frozen=True):
    """The document that --json writes.

    Attributes:
        curve: closed loops by number outstanding, then open loops by rate. mebibyte: closed loops.
        peak_per_s: the best rate of a closed loop of the curve; the rates of the open loops are fractions of it.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    curve: list[CaseReport]
    peak_per_s: float | None
    mebibyte: list[CaseReport]
    idle: IdleReport | None
    goals: list[Goal]


@options.command()
@options.listed("--outstanding", "1,2,4,8,16,32,64,128,256", "Requests in flight of the closed loops.")
@options.listed(
    "--fractions",
    "0.1,0.25,0.5,0.7,0.85,1",
    "Rates of the open loops, of the best rate of a closed loop.",
    float,
    "X,X,...",
)
@options.parts(PARTS)
@click.option("--idle", type=click.IntRange(1, 100_000), default=10_000, show_default=True, help="Idle connections.")
@options.lengths(rounds=(5, 2), seconds=(1.0, 0.2))
@options.outputs("Draw the curve to")
def main(json_path: Path | None, plot_path: Path | None, **rest: Any) -> None:
    """Measure how many requests the daemon takes, beside a bare echo of the same bytes.

    \b
    curve     latency against rate, one row per request: closed loops with more and more outstanding, then open
              loops at fractions of the best rate, with random gaps, latency counted from when a request was due
    mebibyte  1 MiB in and out through a model that gives back what it gets
    idle      latency and memory without and with many connections that say nothing

    Daemon and floors take turns within a round. A ratio is taken in each round; their median is what counts.
    Latencies are in microseconds. The load generator is one lean thread in this process, with pyzmq's DEALER; at high
    rates it is part of what is measured, and how late it sent is printed.
    """
    settings = Settings(**rest)
    if "curve" in settings.parts:
        options.require("hdrhistogram", "the open loop", module="hdrh")
    if "idle" in settings.parts and sys.platform != "linux":
        raise click.UsageError("the part idle works on Linux only: it reads /proc")
    if plot_path is not None and "curve" not in settings.parts:
        raise click.UsageError("--plot draws the curve, which --parts leaves out")
    with options.measuring():
        result = _run(settings)
    if json_path is not None:
        report.write_json(result, json_path)
    if plot_path is not None:
        about = report.about(result.environment, settings.rounds, settings.seconds)
        pictures.draw_curve(result.curve, about, plot_path)


def _run(settings: Settings) -> Throughput:
    machine = report.environment()
    click.echo(report.heading(machine, f"{settings.rounds} rounds of {settings.seconds:g} s"))
    curve: list[CaseReport] = []
    mebibyte: list[CaseReport] = []
    peak, idle = None, None
    with zmq.Context() as context:
        if "curve" in settings.parts:
            curve, peak = _curve(context, settings)
        if "mebibyte" in settings.parts:
            mebibyte = _mebibyte(context, settings)
        if "idle" in settings.parts:
            idle = _idle(context, settings)
    found = goals(settings, curve, mebibyte, idle)
    click.echo("\n" + goals_text(found))
    return Throughput(machine, msgspec.to_builtins(settings), curve, peak, mebibyte, idle, found)


def _curve(context: Context, settings: Settings) -> tuple[list[CaseReport], float]:
    with contextlib.ExitStack() as stack:
        daemon, floors = start_daemon(stack), start_floors(stack, names=[ECHO, PLAIN, BATCHING])
        workload = mlp(1, False, torch_forward())
        targets = _ready(context, daemon, floors, workload)
        click.echo("\nOne row per request\n" + _table_heading())
        found = [
            _case(context, Case(1, outstanding=count), targets, workload, settings) for count in settings.outstanding
        ]
        peak = max(case.targets[DAEMON].requests_per_s for case in found)
        for fraction in settings.fractions:
            rate = max(round(fraction * peak, 1), 1.0)
            found.append(_case(context, Case(1, rate=rate), targets, workload, settings, f"{fraction:.0%} of the peak"))
    return found, peak


def _mebibyte(context: Context, settings: Settings) -> list[CaseReport]:
    import passing

    with contextlib.ExitStack() as stack:
        daemon = start_daemon(stack, program=[str(_HERE / "passing.py")], model=passing.MODEL)
        floors = start_floors(stack, names=[ECHO])
        workload = passing.mebibyte()
        targets = _ready(context, daemon, floors, workload)
        click.echo("\n1 MiB in and out, a model that does next to nothing\n" + _table_heading())
        return [
            _case(context, Case(1, outstanding=count), targets, workload, settings) for count in _MEBIBYTE_OUTSTANDING
        ]


def _ready(context: Context, daemon: ChildProcess, floors: Sequence[ChildProcess], workload: Workload) -> list[Target]:
    target = daemon_target(daemon)
    return [target, *floor_targets(floors, [probe(context, target.endpoint, workload)])]


def _case(
    context: Context,
    case: Case,
    targets: Sequence[Target],
    workload: Workload,
    settings: Settings,
    note: str = "",
) -> CaseReport:
    """All rounds of one case, and its line of the table."""
    measured = measure_rounds(context, case, targets, workload, settings.rounds, settings.seconds)
    found = report.case_report(case, measured)
    click.echo(_table_line(found, note))
    return found


def _table_heading() -> str:
    return (
        f"  {'':<36}{'daemon p50':>11}{'p99':>9}{'requests/s':>12}{'server CPU':>12}{'client CPU':>12}"
        f"{'echo p50':>10}{'p99':>9}{'requests/s':>12}   daemon / echo, requests/s "
        f"{'daemon / plain echo':<26}daemon / batching floor"
    )


def _table_line(found: CaseReport, note: str) -> str:
    case, mine, its = found.case, found.targets[DAEMON], found.targets[ECHO]
    load = f"{case.rate:,.0f}/s open loop, {note}" if case.rate else f"{case.outstanding} outstanding"
    errors = [f"{name} {n} {code}" for name, summary in found.targets.items() for code, n in summary.errors.items()]
    return (
        f"  {load:<36}{mine.latency_us['p50']:>11.0f}{mine.latency_us['p99']:>9.0f}{mine.requests_per_s:>12.0f}"
        f"{mine.server_cpu_us or float('nan'):>12.1f}{mine.client_cpu_us or float('nan'):>12.1f}"
        f"{its.latency_us['p50']:>10.0f}{its.latency_us['p99']:>9.0f}{its.requests_per_s:>12.0f}"
        f"   {found.ratios[f'{DAEMON} / {ECHO}']['requests_per_s']!s:<26}"
        + "".join(
            f"{found.ratios[f'{DAEMON} / {floor}']['requests_per_s']!s:<26}"
            for floor in (PLAIN, BATCHING)
            if floor in found.targets
        )
        + (f"  sent late by p99 {mine.late_us['p99']:.0f}" if mine.late_us else "")
        + (f"  errors: {', '.join(errors)}" if errors else "")
    )


def _idle(context: Context, settings: Settings) -> IdleReport:
    loads = [Case(1, outstanding=count) for count in _IDLE_OUTSTANDING]
    without: dict[Case, list[Measurement]] = {case: [] for case in loads}
    beside: dict[Case, list[Measurement]] = {case: [] for case in loads}
    held: list[int] = []
    rss_with: list[float] = []
    with contextlib.ExitStack() as stack:
        starting = start_daemon(stack)
        workload = mlp(1, False, torch_forward())
        daemon = daemon_target(starting)
        pid = starting.pid
        for case in loads:
            measure(context, case, daemon, workload, settings.seconds)
        rss_before = _rss_mib(pid)
        for _ in range(settings.rounds):
            for case in loads:
                without[case].append(measure(context, case, daemon, workload, settings.seconds))
            files = _open_files(pid)
            arguments = [str(_HERE / "idle.py"), daemon.endpoint, str(settings.idle)]
            with ChildProcess("idle.py", arguments) as peers:
                peers.ready()
                for case in loads:
                    beside[case].append(measure(context, case, daemon, workload, settings.seconds))
                held.append(_open_files(pid) - files)
                rss_with.append(round(_rss_mib(pid), 1))
    found = IdleReport(
        asked=settings.idle,
        held=int(np.median(held)),
        rss_mib_before=round(rss_before, 1),
        rss_mib_with=rss_with,
        loads=[_idle_load(case, without[case], beside[case]) for case in loads],
    )
    click.echo(_idle_text(found))
    return found


def _idle_load(case: Case, without: Sequence[Measurement], beside: Sequence[Measurement]) -> IdleLoad:
    one, other = (report.summarise(case, rounds, is_daemon=True) for rounds in (without, beside))
    p50s = [[round_.latency_us["p50"] for round_ in summary.rounds] for summary in (one, other)]
    rates = [[round_.requests_per_s for round_ in summary.rounds] for summary in (one, other)]
    return IdleLoad(
        outstanding=case.outstanding,
        p50_us_without=round(float(np.median(p50s[0])), 1),
        p50_us_with=round(float(np.median(p50s[1])), 1),
        p50_ratio=ratio(p50s[1], p50s[0]),
        requests_per_s_ratio=ratio(rates[1], rates[0]),
    )


def _idle_text(found: IdleReport) -> str:
    lines = [
        f"\n{found.asked:,} idle connections, {found.held:,} held by the daemon; its memory: "
        f"{found.rss_mib_before:.0f} MiB before, "
        f"{', '.join(f'{rss:.0f}' for rss in found.rss_mib_with)} MiB with them, by round"
    ]
    lines += [
        f"  {load.outstanding} outstanding: p50 {load.p50_us_without:.0f} us without, {load.p50_us_with:.0f} us with; "
        f"with / without: p50 {load.p50_ratio}, requests/s {load.requests_per_s_ratio}"
        for load in found.loads
    ]
    return "\n".join(lines)


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _open_files(pid: int) -> int:
    """The number of files that a process has open, once it has closed those of connections that ended just before."""
    found, before = len(os.listdir(f"/proc/{pid}/fd")), -1
    while found != before:
        time.sleep(_CLOSE_SECONDS)
        found, before = len(os.listdir(f"/proc/{pid}/fd")), found
    return found


def goals(
    settings: Settings, curve: Sequence[CaseReport], mebibyte: Sequence[CaseReport], idle: IdleReport | None
) -> list[Goal]:
    """The promises of the project that this program can show."""
    echo = f"{DAEMON} / {ECHO}"
    found = [
        Goal("64 outstanding, requests/s", over, 0.65, False, case.ratios[f"{DAEMON} / {name}"]["requests_per_s"])
        for case in curve
        if case.case.outstanding == 64
        for name, over in ((PLAIN, "a plain echo"), (ECHO, "the echo floor"))
    ]
    opened = [case for case in curve if case.case.rate]
    for fraction, case in zip(settings.fractions, opened, strict=False):
        if fraction == _HALF:
            rounds = case.targets[DAEMON].rounds
            p99, p50 = ([round_.latency_us[name] for round_ in rounds] for name in ("p99", "p50"))
            found.append(Goal("half the peak rate, p99", "its own p50", 3.0, True, ratio(p99, p50)))
    found += [
        Goal(
            f"1 MiB, {case.case.outstanding} outstanding, req/s",
            "the echo floor",
            0.8,
            False,
            case.ratios[echo]["requests_per_s"],
        )
        for case in mebibyte
    ]
    if idle is not None:
        grown = max(idle.rss_mib_with) - idle.rss_mib_before
        found.append(Goal(f"{idle.held:,} idle peers, memory", "300 MiB", 1.0, True, ratio([grown], [300.0])))
    return found


if __name__ == "__main__":
    main()
