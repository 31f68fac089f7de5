"""`tnxctl stats`: rates and percentiles over a few seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from tnxctl.cli import options, output, text
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.statistics import Interval, VersionInterval


@click.command("stats", short_help="Show rates and percentiles over a few seconds.")
@common
@options.duration("--seconds", default="5s", help="Length of the interval.", most=3_600.0)
@click.option("--since-start", is_flag=True, help="Show all since the daemon's start instead, at once.")
@options.model("Model, or one version of it.  [default: all that were asked]")
def command(endpoint: str, timeout: float, as_json: bool, seconds: float, since_start: bool, model: str) -> None:
    """Show how much each model was asked, and where the time went, over a few seconds.

    The first table has rates, rows per batch, requests that missed their deadlines, how far predicted times were off,
    and the lanes that each version kept busy, about. The others have the time that the requests with results spent in
    each stage; BEFORE is the p99 of all since the daemon's start until then. The percentiles come from histograms whose
    buckets are an eighth apart.

    \b
    Examples:
      tnxctl stats
      tnxctl stats --seconds 30s --model digits
      tnxctl stats --since-start
      tnxctl stats --json | jq '.models[] | {name, p99: .stages_us.total.p99}'
    """
    from tnxctl.cli import intervals
    from tnxctl.client import Client
    from tnxctl.statistics import Interval

    with Client(endpoint, timeout=timeout) as client:
        first = None
        if not since_start:
            first = client.stats()
            intervals.named(first.models, model)  # an unknown one is told at once
            time.sleep(seconds)
        now = Interval(first, client.stats())
    before = None if first is None or now.restarted else Interval(None, first)
    names = intervals.named(now.after.models, model)
    if as_json:
        output.write_json({"endpoint": endpoint, **intervals.document(now, before, names)})
    else:
        shown = [version for version in now.versions if version.title in names]
        click.echo("\n".join(_lines(endpoint, now, before, shown, is_whole=not model)))


def _lines(
    endpoint: str, now: Interval, before: Interval | None, shown: Sequence[VersionInterval], is_whole: bool
) -> Iterator[str]:
    from tnxctl.cli import intervals

    width = text.terminal_width(sys.stdout)
    after = now.after
    yield (
        f"{text.status(text.clean(after.status))}  {endpoint}  tnxd {text.clean(after.version)}, "
        f"up {text.duration(after.uptime_us / 1e6)}; {'since its start' if before is None else 'over'} "
        f"{text.duration(now.seconds)}"
    )
    if now.restarted:
        yield click.style("It was restarted meanwhile: all numbers are since then.", fg="yellow")
    if is_whole:
        yield intervals.rates(now)
        yield ""
        yield from _devices(now, width)
    asked = [version for version in shown if version.requests or version.batches or version.after.queued_rows]
    yield ""
    if not asked:
        yield f"No request for {'any model' if is_whole else 'it'} in this time."
        return
    yield from text.table(
        ("MODEL", "REQ/s", "REPLIES/s", "ERR/s", "ROWS/s", "BATCH", "LANES", "QUEUED", "WAIT", "MISSED", "OFF"),
        [_row(version) for version in asked],
        "<" + ">" * 10,
        width,
        ("MODEL",),
    )
    for version in asked:
        yield from _errors(version)
    for version in asked:
        if version.replies:
            yield ""
            yield from _stages(version, None if before is None else before.version(version.title), width)
    for each in intervals.slower(now, before):
        if any(version.title == each.title for version in asked):
            yield ""
            yield click.style(each.sentence, fg="red", bold=True)


def _devices(now: Interval, width: int | None) -> Iterator[str]:
    header = ("DEVICE", "STATUS", "BUSY", "INLINE", "QUEUED ROWS", "MEMORY FREE")
    rows = [
        (
            device.after.name,
            device.after.status,
            text.percent(device.busy_share),
            text.percent(device.inline_share),
            str(device.after.queued_rows),
            f"{device.after.memory_free_mb / 1024:.1f} of {device.after.memory_total_mb / 1024:.1f} GiB",
        )
        for device in now.devices
    ]
    yield from text.table(header, rows, "<<>>>>", width)


def _row(version: VersionInterval) -> tuple[str, ...]:
    from tnxctl.cli import intervals

    return (
        version.title,
        text.rate(version.per_second(version.requests)),
        text.rate(version.per_second(version.replies)),
        text.rate(version.per_second(version.error_count)),
        text.rate(version.per_second(version.rows)),
        text.rate(version.rows_per_batch),
        f"{version.lanes:.1f}",
        str(version.after.queued_rows),
        intervals.wait(version),
        text.percent(version.missed_share),
        text.micros(version.prediction_error.mean()),
    )


def _errors(version: VersionInterval) -> Iterator[str]:
    """Words for what else happened to a version, if anything."""
    parts = [
        f"{text.clean(code)} {text.rate(version.per_second(count))}/s" for code, count in sorted(version.errors.items())
    ]
    parts.extend(
        f"{count} {what}"
        for what, count in (
            ("requests abandoned by their clients", version.abandoned),
            ("batches taken over by another device", version.steals),
            ("batches split after they ran out of memory", version.splits),
            ("times evicted", version.evictions),
        )
        if count
    )
    if parts:
        yield f"{text.clean(version.title)}: {', '.join(parts)}"


def _stages(version: VersionInterval, earlier: VersionInterval | None, width: int | None) -> Iterator[str]:
    """A table with a line per stage."""
    from tnxctl.cli.intervals import SHARES
    from tnxctl.protocol.statistics import STAGES

    whole = version.mean_us("total")
    header = (version.title, "mean", "share", *SHARES, *(("BEFORE",) if earlier is not None else ()))
    rows = []
    for stage in STAGES:
        times = version.stage(stage)
        row = [stage, text.micros(times.mean()), text.percent(times.mean() / whole if whole else math.nan)]
        row.extend(text.micros(times.quantile(share)) for share in SHARES.values())
        if earlier is not None:
            row.append(text.micros(earlier.quantile_us(stage, 0.99)))
        rows.append(row)
    yield from text.table(header, rows, "<" + ">" * (len(header) - 1), width, header[:1])
