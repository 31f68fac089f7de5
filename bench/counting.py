"""`python bench/counting.py`: what it costs the serving loop to count requests, and to tell its counts.

Counting is called as the loop calls it, for batches of several sizes; now and then it makes histograms of a piece of
what has gathered. Reports are those of `stats` with their headers, about versions that were all asked since the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from tnxctl.protocol.statistics import StatsReport, VersionStats
from tnxctl.protocol.wire import Result, Timing, encode
from tnxd.scheduling.request import NEVER
from tnxd.serving.pending import Answer, Pending
from tnxd.serving.version_counts import RecentError, VersionCounts

_SENT_TOGETHER = 16  # answers that the loop makes before it sends them
_REQUESTS = 4096


def answers(count: int) -> list[Answer]:
    """Answers to requests that took random times."""
    made: list[Answer] = []
    others: Any = {
        "version": None,
        "served": SimpleNamespace(name="net", version="1"),
        "arrays": (),
        "connection": SimpleNamespace(client=SimpleNamespace(name="bench")),
    }
    for stages in np.random.default_rng(0).exponential(100.0, (count, 7)):
        request = Pending(
            "net@1",
            64,
            predicted_us=float(stages[1:6].sum()) * 1.1,
            deadline_ns=NEVER,
            delimited=False,
            id=1,
            max_reply_bytes=1,
            received_ns=1,
            queued_ns=1,
            **others,
        )
        result = Result(
            v=1,
            id=1,
            model="net",
            version="1",
            outputs=(),
            device="cpu",
            reason="",
            batch_size=1,
            latency_ms=0.0,
            gpu_memory_mb=0.0,
            timing=Timing(*map(float, (*stages, stages.sum()))),
        )
        made.append((request, result, b"", ()))
    return made


def count_batches(counts: VersionCounts, batches: list[list[Answer]]) -> None:
    """Count batches as the loop does."""
    for batch in batches:
        for start in range(0, len(batch), _SENT_TOGETHER):
            counts.add_results(batch[start : start + _SENT_TOGETHER])
        counts.add_batch(len(batch))


def micros(call: Callable[..., object], *arguments: object) -> float:
    """Microseconds of this thread's CPU time that a call takes."""
    begin = time.thread_time_ns()
    call(*arguments)
    return (time.thread_time_ns() - begin) / 1e3


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=21, show_default=True)
@click.option("--versions", type=int, multiple=True, default=(1, 30, 300), show_default=True)
def main(rounds: int, versions: tuple[int, ...]) -> None:
    made = answers(_REQUESTS)
    batches = {size: [made[start : start + size] for start in range(0, _REQUESTS, size)] for size in (1, 4, 16, 64)}
    each: dict[int, list[float]] = {size: [] for size in batches}
    longest: dict[int, list[float]] = {size: [] for size in batches}
    for _ in range(rounds):
        for size, some in batches.items():  # by turns
            each[size].append(micros(count_batches, VersionCounts(RecentError()), some) / _REQUESTS)
            counts = VersionCounts(RecentError())
            longest[size].append(max(micros(count_batches, counts, [batch]) for batch in some))
    click.echo("CPU time, the least of the rounds\n")
    click.echo("| requests in a batch | counting, µs per request | longest time for one batch, µs |")
    click.echo("|---|---|---|")
    for size in batches:
        click.echo(f"| {size} | {min(each[size]):.2f} | {min(longest[size]):.0f} |")

    click.echo("\n| versions asked | a report, ms | bytes | once more, ms |")
    click.echo("|---|---|---|---|")
    for number in versions:
        all_counts = [VersionCounts(RecentError()) for _ in range(number)]
        busy, idle = [], []
        for _ in range(rounds):
            for counts in all_counts:
                count_batches(counts, [made[:150]])
            busy.append(micros(_report, all_counts) / 1e3)
            idle.append(micros(_report, all_counts) / 1e3)
        click.echo(f"| {number} | {min(busy):.2f} | {len(_report(all_counts)):,} | {min(idle):.2f} |")


def _report(all_counts: list[VersionCounts]) -> bytes:
    models: list[VersionStats] = [
        counts.report("net", str(number), 0, 0, 0.0) for number, counts in enumerate(all_counts)
    ]
    report = StatsReport(v=1, id=1, status="ready", version="", started_s=0.0, uptime_us=0.0, models=tuple(models))
    return encode(report)


if __name__ == "__main__":
    main()
