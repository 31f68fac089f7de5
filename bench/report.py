"""Reports, made from measurements: summaries, ratios, tables, JSON."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from measurement import Measurement
from tnxctl import __version__

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}

DAEMON, CLIENT = "daemon", "tnxctl.Client"
FORWARD, BATCHING, ECHO, PLAIN = "forward floor", "batching floor", "echo floor", "plain echo"

STAGES = ("receive", "queue", "gather", "h2d", "compute", "d2h", "reply", "total")

_LONGEST_NS = 3600 * 10**9
_DIGITS = 3


class Case(msgspec.Struct, frozen=True):
    """One kind of load.

    Attributes:
        rows: per request.
        outstanding: requests in flight in a closed loop; 0 in an open loop.
        rate: requests per second of an open loop; 0 in a closed loop.
    """

    rows: int
    outstanding: int = 0
    rate: float = 0.0

    @property
    def title(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} per request"
        if self.rate:
            return f"{rows}, open loop at {self.rate:g} requests/s"
        return f"{rows}, {self.outstanding} outstanding"


class Round(msgspec.Struct, frozen=True):
    """One round on one target. Latencies in microseconds."""

    requests: int
    latency_us: dict[str, float]
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True):
    """All rounds of one case on one target.

    Attributes:
        requests: results received.
        latency_us: p50, p90, p99, p99.9 and max over the requests of all rounds.
        requests_per_s: median of the rounds.
        server_cpu_us, client_cpu_us: CPU time per request, all threads; None where it is not known.
        errors: by code, see `measurement.Measurement`.
        devices: where results were computed, counted; empty for the floors.
        stages_us: means of the stages that the daemon reports; empty for the floors.
        late_us: open loop: how late the load generator sent; already part of the latency.
        histogram: open loop: all latencies in nanoseconds as an HDR histogram, compressed, base64.
    """

    requests: int
    latency_us: dict[str, float]
    requests_per_s: float
    server_cpu_us: float | None
    client_cpu_us: float | None
    errors: dict[str, int]
    devices: dict[str, int]
    stages_us: dict[str, float]
    late_us: dict[str, float] | None
    histogram: str | None
    rounds: list[Round]


class Ratio(msgspec.Struct, frozen=True):
    """A figure of one target over that of another, taken in each round: the median of the rounds, and the extremes."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"


class CaseReport(msgspec.Struct, frozen=True):
    """Everything about one case.

    Attributes:
        targets: by name.
        ratios: of the daemon and of the client over each floor: "daemon / forward floor" -> figure -> ratio, where
            the figure is p50, p99 or requests_per_s.
    """

    case: Case
    targets: dict[str, Summary]
    ratios: dict[str, dict[str, Ratio]]


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    cases: list[CaseReport]


def environment() -> dict[str, Any]:
    """The machine and the versions that the numbers belong to."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tensornext": __version__,
        "torch": version("torch"),  # without the seconds that it takes to import
        "numpy": np.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def about(machine: Mapping[str, Any], rounds: int, seconds: float) -> str:
    """The machine and the lengths, in a line for pictures."""
    return f"{machine['cpu']}, {machine['cores']} cores, {rounds} rounds of {seconds:g} s"


def heading(machine: Mapping[str, Any], how: str, more: str = "") -> str:
    """The lines that a program prints before it measures.

    Args:
        machine: as `environment` has it. how: it measures. more: a line about something else.
    """
    load = machine["load_average"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; {how}; "
        f"torch {machine['torch']}, pyzmq {machine['pyzmq']}, Python {machine['python']}"
    ]
    if more:
        lines.append(more)
    if load > machine["cores"] / 4:
        lines.append(f"The machine is not quiet: its load average is {load}.")
    return "\n".join(lines)


def write_json(report: msgspec.Struct, path: Path) -> None:
    """Write a whole report for programs to read."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _rounded(value: float) -> float:
    return round(float(value), 3)  # in microseconds: no clock here is finer


def percentiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """p50 ... max of all values, exact; NaN of none."""
    if not len(values):
        return dict.fromkeys(PERCENTILES, float("nan"))
    return {name: _rounded(np.percentile(values, percent)) for name, percent in PERCENTILES.items()}


def summarise(case: Case, rounds: Sequence[Measurement], *, is_daemon: bool) -> Summary:
    """Put the rounds of one target together.

    Args:
        is_daemon: whether what it says about devices and stages means anything.
    """
    latency_us = np.concatenate([round_.latency_us for round_ in rounds])
    late_us = np.concatenate([round_.late_us for round_ in rounds])
    requests = len(latency_us)
    pooled, histogram = _hdr(latency_us) if case.rate else (percentiles(latency_us), None)
    return Summary(
        requests=requests,
        latency_us=pooled,
        requests_per_s=_rounded(np.median([_requests_per_s(round_) for round_ in rounds])),
        server_cpu_us=_per_request([round_.server_cpu_ns for round_ in rounds], requests),
        client_cpu_us=_per_request([round_.client_cpu_ns for round_ in rounds], requests),
        errors=dict(sum((round_.errors for round_ in rounds), Counter[str]())),
        devices=dict(sum((round_.devices for round_ in rounds), Counter[str]())) if is_daemon else {},
        stages_us=_stage_means(rounds) if is_daemon else {},
        late_us=percentiles(late_us) if case.rate else None,
        histogram=histogram,
        rounds=[
            Round(len(round_.latency_us), percentiles(round_.latency_us), _requests_per_s(round_)) for round_ in rounds
        ],
    )


def _hdr(latency_us: np.ndarray[Any, Any]) -> tuple[dict[str, float], str]:
    from hdrh.histogram import HdrHistogram

    histogram = HdrHistogram(1, _LONGEST_NS, _DIGITS)
    for value in latency_us:
        histogram.record_value(round(value * 1e3))
    found = {name: histogram.get_value_at_percentile(percent) / 1e3 for name, percent in PERCENTILES.items()}
    return found, histogram.encode().decode()


def _requests_per_s(round_: Measurement) -> float:
    return _rounded(len(round_.latency_us) / round_.seconds)


def _per_request(cpu_ns: Sequence[int | None], requests: int) -> float | None:
    known = [value for value in cpu_ns if value is not None]
    return _rounded(sum(known) / 1e3 / requests) if len(known) == len(cpu_ns) and requests else None


def _stage_means(rounds: Sequence[Measurement]) -> dict[str, float]:
    timings = [timing for round_ in rounds for timing in round_.timings]
    if not timings:
        return {}
    return {stage: _rounded(np.mean([getattr(timing, f"{stage}_us") for timing in timings])) for stage in STAGES}


def case_report(case: Case, measured: Mapping[str, Sequence[Measurement]]) -> CaseReport:
    """Put the rounds of one case together, which come by the names of the targets."""
    summaries = {name: summarise(case, rounds, is_daemon=name in (DAEMON, CLIENT)) for name, rounds in measured.items()}
    return CaseReport(case, summaries, compare(summaries))


def compare(targets: Mapping[str, Summary]) -> dict[str, dict[str, Ratio]]:
    """The daemon, and the client, over each floor, round by round."""
    ratios: dict[str, dict[str, Ratio]] = {}
    for name in (DAEMON, CLIENT):
        for floor in (FORWARD, BATCHING, ECHO, PLAIN):
            if name in targets and floor in targets:
                mine, its = targets[name].rounds, targets[floor].rounds
                ratios[f"{name} / {floor}"] = {
                    "p50": _latency_ratio(mine, its, "p50"),
                    "p99": _latency_ratio(mine, its, "p99"),
                    "requests_per_s": ratio(
                        [round_.requests_per_s for round_ in mine], [round_.requests_per_s for round_ in its]
                    ),
                }
    return ratios


def _latency_ratio(mine: Sequence[Round], its: Sequence[Round], percentile: str) -> Ratio:
    return ratio([round_.latency_us[percentile] for round_ in mine], [round_.latency_us[percentile] for round_ in its])


def ratio(mine: Iterable[float], its: Iterable[float]) -> Ratio:
    """One over the other, round by round."""
    values = [a / b if b else float("nan") for a, b in zip(mine, its, strict=True)]
    return Ratio(_rounded(np.median(values)), _rounded(min(values)), _rounded(max(values)))


def table(report: CaseReport) -> str:
    """One case, for a terminal."""
    rounds = len(next(iter(report.targets.values())).rounds)
    lines = [
        report.case.title,
        f"  {'us':<14}"
        + "".join(f"{name:>10}" for name in PERCENTILES)
        + f"{'requests/s':>12}{'server CPU':>12}{'client CPU':>12}  errors",
    ]
    for name, summary in report.targets.items():
        errors = ", ".join(f"{count} {code}" for code, count in summary.errors.items()) or "0"
        lines.append(
            f"  {name:<14}"
            + "".join(f"{value:>10.1f}" for value in summary.latency_us.values())
            + f"{summary.requests_per_s:>12.0f}{_cell(summary.server_cpu_us):>12}{_cell(summary.client_cpu_us):>12}"
            + f"  {errors}"
        )
    daemon = report.targets[DAEMON]
    if daemon.stages_us:
        stages = ", ".join(f"{stage} {mean:.1f}" for stage, mean in daemon.stages_us.items())
        devices = ", ".join(daemon.devices)
        lines.append(f"  stages of the daemon, means in us, on {devices}: {stages}")
    if daemon.late_us:
        lines.append(
            f"  sent late by p50 {daemon.late_us['p50']:.0f}, p99 {daemon.late_us['p99']:.0f} us; "
            "the latencies count from when requests were due"
        )
    figures = ("p50", "p99") if report.case.rate else ("p50", "requests_per_s")
    for pair, ratios in report.ratios.items():
        if pair.startswith(DAEMON) or not report.case.rate:
            shown = ",  ".join(f"{figure.replace('_per_s', '/s')} {ratios[figure]}" for figure in figures)
            lines.append(f"  {pair + ':':<30} {shown}")
    if report.ratios:
        lines.append(f"  (ratios: median of {rounds} interleaved rounds, and their range)")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
