"""`python bench/schedule.py`: how many deadlines the scheduler meets, in simulated time. --help says more."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import decisions
import lengths
import loops
import options
import oracle
import recorded_trace
import schedule_plot
import traces
from decisions import Decision
from policies import Policy, Scheduled, Threshold
from simulation import Noise, Outcome, replay
from traces import CPU, GPU, Machine, Table, Trace

SCHEDULER, ALWAYS_CPU, ALWAYS_GPU, THRESHOLD = "scheduler", "always CPU", "always GPU", "best threshold"

_THRESHOLDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, math.inf)
_WITHIN = 0.95  # of the upper bound: the goal
_ROUNDING = 0.0005  # of what is met; the table has three digits
_QUEUES = (0, 100, 1_000, 10_000)
_CLIENTS = (1, 100)


class PolicyReport(msgspec.Struct, frozen=True):
    """One policy on one trace.

    Attributes:
        met: share of the requests done within their deadlines; met_by_priority, met_by_model: of parts of them.
        refused: share turned away on arrival. computed_late: share computed for nothing.
        busy: share of the time that the lanes of each device were in use.
        threshold_rows: of the best threshold; None for infinity and for other policies.
    """

    met: float
    met_by_priority: dict[int, float]
    met_by_model: dict[str, float]
    refused: float
    computed_late: float
    busy: dict[str, float]
    rows_per_batch: float
    threshold_rows: int | None = None


class _TraceName(click.ParamType):  # type: ignore[type-arg]  # old versions of click have no argument for it
    """Name of a trace, or a file that `tnxctl record` had written."""

    name = "trace"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        if isinstance(value, Path):
            return value
        name = str(value)
        if name in traces.NAMES:
            return name
        if not Path(name).is_file():
            self.fail(f"{name!r} is neither a file nor one of {', '.join(traces.NAMES)}.", param, ctx)
        return Path(name)


class TraceReport(msgspec.Struct, frozen=True):
    """All policies on one trace, and what none can exceed."""

    trace: str
    says: str
    requests: int
    milliseconds: float
    policies: dict[str, PolicyReport]
    upper_bound: float


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    command: str
    seed: int
    mlp_cpu_us: dict[int, float]
    traces: list[TraceReport]
    decisions: list[Decision]


class RaggedReport(msgspec.Struct, frozen=True):
    """The document that --json writes with --ragged."""

    command: str
    seed: int
    texts: list[lengths.Fared]


class LoopReport(msgspec.Struct, frozen=True):
    """The document that --json writes with --loop."""

    command: str
    seed: int
    loads: list[loops.Load]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--requests",
    "count",
    type=click.IntRange(10, 1_000_000),
    default=20_000,
    show_default=True,
    help="Requests per trace.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the traces and of the noise.")
@click.option(
    "--trace",
    "names",
    type=_TraceName(),
    metavar="NAME|FILE",
    multiple=True,
    help=f"Only this one, of {', '.join(traces.NAMES)}; or the requests of FILE, which tnxctl record had written. "
    "May be given several times.",
)
@click.option("--measure", is_flag=True, help="Take the CPU costs of the model mlp from this machine, not as given.")
@click.option(
    "--loop",
    "with_loop",
    is_flag=True,
    help="Instead of traces, replay rising loads through a serving loop whose work takes time.",
)
@click.option(
    "--ragged",
    "with_lengths",
    is_flag=True,
    help="Instead of traces, keep texts of all lengths outstanding, and compare how they share batches.",
)
@click.option("--no-decisions", is_flag=True, help="Do not measure what a decision costs.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results to this file."
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the deadlines met to this PNG (needs matplotlib).",
)
def main(
    count: int,
    seed: int,
    names: tuple[str | Path, ...],
    measure: bool,
    with_loop: bool,
    with_lengths: bool,
    no_decisions: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Replay traces through the daemon's scheduler, and compare how many deadlines it meets.

    Nothing is computed and nobody waits: time is simulated, and batches take what a table says, a few per cent more or
    less. The scheduler is the daemon's own and learns the costs as there. The machine has two CPU lanes and a GPU.

    \b
    scheduler       the daemon's, for requests that ask for device="auto"
    always CPU      first come, first served, in batches; nothing is refused or given up
    always GPU      the same on the GPU
    best threshold  the same, up to so many rows on the CPU and more on the GPU: the number that is best for this trace
    upper bound     no scheduler meets more, not even one that knows the future

    With --loop the thread that takes requests in, asks the scheduler and answers needs time for that, as measured of a
    daemon: the table shows how many deadlines are met the more is offered, two seconds of each load.

    With --ragged texts of all lengths go to a model on a CPU, as measured of all-MiniLM-L6-v2 on one thread, and on an
    assumed GPU, to which all batches of up to 2,000 tokens are the same.

    A recording is replayed as it arrived: versions, rows, deadlines (a second for requests without one), priorities and
    clients, with the lanes that its daemon had and the costs that it had learned. What devices requests asked for does
    not count: the scheduler chooses. Models whose costs depend on the lengths of their inputs are left out.

    Everything but the cost of a decision is the same in every run with the same --seed.
    """
    alone = with_loop + with_lengths
    if alone and (alone > 1 or names or measure or plot_path is not None):
        raise click.UsageError(
            "--loop and --ragged have traces and costs of their own: no --trace, --measure or --plot"
        )
    if with_lengths:
        texts = _texts(seed)
        if json_path is not None:
            _write(RaggedReport(" ".join(sys.argv), seed, texts), json_path)
        return
    if with_loop:
        loads = _loads(seed)
        if json_path is not None:
            _write(LoopReport(" ".join(sys.argv), seed, loads), json_path)
        return
    if plot_path is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise click.UsageError("--plot needs the package matplotlib, which is not installed") from None
    mlp_cpu = _measured_mlp() if measure else traces.MLP_CPU
    machine = traces.machine(mlp_cpu)
    with options.measuring():
        recorded = {name: recorded_trace.read(name, count) for name in names if isinstance(name, Path)}
    click.echo(_heading())
    reports = []
    for name in names or traces.NAMES:
        trace = recorded[name][0] if isinstance(name, Path) else traces.make(name, machine, count, seed)
        reports.append(examine(trace, seed))
        click.echo(_line(reports[-1]))
    remarks = [remark for _, found in recorded.values() for remark in found]
    click.echo("\n".join(["", _verdict(reports), *remarks]))
    measured = [] if no_decisions else _decisions(machine)
    if json_path is not None:
        _write(Report(" ".join(sys.argv), seed, dict(mlp_cpu), reports, measured), json_path)
    if plot_path is not None:
        shares = {
            policy: [report.policies[policy].met if policy in report.policies else 0.0 for report in reports]
            for policy in (SCHEDULER, ALWAYS_CPU, ALWAYS_GPU, THRESHOLD)
        }
        schedule_plot.draw(
            shares,
            [report.upper_bound for report in reports],
            [report.trace for report in reports],
            f"simulated: {'' if recorded else 'two CPU lanes and a GPU, '}{count:,} requests per trace, seed {seed}",
            plot_path,
        )


def examine(trace: Trace, seed: int) -> TraceReport:
    """Replay a trace through every policy."""
    machine, jobs = trace.machine, trace.jobs

    def run(make: Callable[[Noise], Policy]) -> Outcome:
        noise = Noise(machine, seed)  # every policy meets the same luck
        return replay(trace, make(noise), noise)

    def threshold(rows: float) -> Outcome:
        return run(lambda _: Threshold(machine, jobs, rows))

    # A daemon whose traffic was recorded may have had one of the two alone.
    has_cpu, has_gpu = CPU in machine.lanes, GPU in machine.lanes
    thresholds = [rows for rows in _THRESHOLDS if (has_cpu or rows == 0) and (has_gpu or math.isinf(rows))]
    simple = {rows: threshold(rows) for rows in thresholds}
    best = max(simple, key=lambda rows: simple[rows].share)
    policies = {
        SCHEDULER: _policy(trace, run(lambda noise: Scheduled(machine, jobs, noise))),
        THRESHOLD: _policy(trace, simple[best], best),
    }
    if has_cpu:
        policies[ALWAYS_CPU] = _policy(trace, simple[math.inf])
    if has_gpu:
        policies[ALWAYS_GPU] = _policy(trace, simple[0])
    bound = oracle.upper_bound(trace)
    return TraceReport(trace.name, trace.says, len(jobs), jobs[-1].arrival_us / 1e3, policies, bound)


def _policy(trace: Trace, outcome: Outcome, threshold: float = math.inf) -> PolicyReport:
    priorities = np.array([job.priority for job in trace.jobs])
    models = np.array([job.model for job in trace.jobs])
    met = outcome.in_time
    return PolicyReport(
        met=outcome.share,
        met_by_priority={int(level): float(met[priorities == level].mean()) for level in np.unique(priorities)},
        met_by_model={str(model): float(met[models == model].mean()) for model in np.unique(models)},
        refused=outcome.refused / len(trace.jobs),
        computed_late=outcome.computed_late / len(trace.jobs),
        busy=outcome.busy,
        rows_per_batch=outcome.rows_per_batch,
        threshold_rows=None if math.isinf(threshold) else int(threshold),
    )


def _heading() -> str:
    return (
        "Requests done within their deadlines, in %\n\n"
        f"{'trace':<13}{SCHEDULER:>10}{ALWAYS_CPU:>12}{ALWAYS_GPU:>12}{THRESHOLD:>22}{'upper bound':>13}"
        f"{'of the bound':>14}{'refused':>9}{'late':>7}"
    )


def _line(report: TraceReport) -> str:
    mine, best = report.policies[SCHEDULER], report.policies[THRESHOLD]
    rows = "all" if best.threshold_rows is None else f"{best.threshold_rows}"
    return (
        f"{report.trace:<13}{100 * mine.met:>10.1f}{_met(report, ALWAYS_CPU):>12}"
        f"{_met(report, ALWAYS_GPU):>12}{f'{100 * best.met:.1f} (<= {rows:>3} rows)':>22}"
        f"{100 * report.upper_bound:>13.1f}{100 * mine.met / report.upper_bound:>14.1f}"
        f"{100 * mine.refused:>9.1f}{100 * mine.computed_late:>7.1f}"
    )


def _met(report: TraceReport, policy: str) -> str:
    return f"{100 * report.policies[policy].met:.1f}" if policy in report.policies else "-"


def _verdict(reports: list[TraceReport]) -> str:
    behind = [r.trace for r in reports if r.policies[SCHEDULER].met < r.policies[THRESHOLD].met - _ROUNDING]
    far = [r.trace for r in reports if r.policies[SCHEDULER].met < _WITHIN * r.upper_bound]
    return (
        f"At least as good as the best simple policy: {_all_but(behind)}.\n"
        f"Within 5 % of the upper bound: {_all_but(far)}."
    )


def _all_but(missed: list[str]) -> str:
    return f"all but {', '.join(missed)}" if missed else "all"


def _write(report: Report | LoopReport | RaggedReport, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _texts(seed: int) -> list[lengths.Fared]:
    """Run, and print, the closed loops of texts of all lengths."""
    click.echo(lengths.heading())
    texts = []
    for machine in lengths.MACHINES:
        for outstanding in lengths.OUTSTANDING:
            fared = [lengths.measure(machine, way, outstanding, seed) for way in lengths.WAYS]
            for one in fared:
                click.echo(lengths.line(one, fared[0]))
            texts += fared
    return texts


def _loads(seed: int) -> list[loops.Load]:
    """Replay, and print, all loads through all loops."""
    click.echo(loops.heading())
    loads = []
    for name in loops.LOOPS:
        for multiple in loops.MULTIPLES:
            loads.append(loops.measure(name, multiple, seed))
            click.echo(loops.line(loads[-1]))
    return loads


def _decisions(machine: Machine) -> list[Decision]:
    """Measure, and print, what a decision costs."""
    click.echo("\nOne decision, in us: two devices to choose from, a deadline, one of 1 or 100 clients")
    click.echo(f"\n{'queued':>8}{'clients':>9}{'add':>8}{'start':>8}{'both':>8}")
    measured = []
    for queued in _QUEUES:
        for clients in _CLIENTS:
            one = decisions.measure(machine, queued, clients, rounds=100)
            measured.append(one)
            click.echo(f"{queued:>8,}{clients:>9}{one.add_us:>8.1f}{one.start_us:>8.1f}{one.total_us:>8.1f}")
    return measured


def _measured_mlp() -> Table:
    """Microseconds of the model mlp on one thread here, per batch size: medians."""
    from workload import torch_forward

    forward = torch_forward()
    table: dict[int, float] = {}
    for rows in traces.MLP_CPU:
        array = np.zeros((rows, 256), np.float32)
        times = []
        for _ in range(200):
            begin = time.perf_counter_ns()
            forward(array)
            times.append(time.perf_counter_ns() - begin)
        table[rows] = float(np.median(times[20:])) / 1e3
    click.echo("mlp on this CPU, us: " + ", ".join(f"{rows} rows {micros:.0f}" for rows, micros in table.items()))
    return table


if __name__ == "__main__":
    main()
