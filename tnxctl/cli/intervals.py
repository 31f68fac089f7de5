"""Work of a daemon in an interval, for machines; and in words, why requests became slower."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tnxctl.cli import text
from tnxctl.protocol.errors import NotFound
from tnxctl.protocol.statistics import STAGES
from tnxctl.statistics import GREW_BY, Growth, growth

if TYPE_CHECKING:
    from tnxctl.protocol.histograms import Histogram
    from tnxctl.protocol.statistics import VersionStats
    from tnxctl.statistics import Interval, VersionInterval

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
"""Percentiles that are shown, and the shares of all values below them."""

_CROWDING_LANES = 0.1

_REMARKABLE = (
    "undeliverable",
    "abandoned",
    "resent",
    "connections_refused",
    "connections_cut",
    "log_lines_dropped",
    "spans_dropped",
)


class Slower(NamedTuple):
    """A version that became slower, in a sentence."""

    title: str
    growth: Growth
    sentence: str


def slower(now: Interval, before: Interval | None) -> list[Slower]:
    """The versions whose p99 grew, the one by most first."""
    if before is None:
        return []
    found = []
    for version in now.versions:
        earlier = before.version(version.title)
        grown = growth(earlier, version)
        if earlier is not None and grown is not None:
            found.append(Slower(version.title, grown, _why(grown, earlier, version, before, now)))
    return sorted(found, key=lambda each: -each.growth.added_us)


def _why(grown: Growth, earlier: VersionInterval, version: VersionInterval, before: Interval, now: Interval) -> str:
    whole, usual = (text.micros(each.quantile_us("total", grown.share)) for each in (version, earlier))
    reasons = list(_reasons(grown.stage, earlier, version, before, now))
    because = f": {', '.join(reasons)}" if reasons else ""
    grew = f"{grown.stage} +{text.micros(grown.added_us)}"
    return text.clean(f"{version.title}: p{100 * grown.share:.0f} {whole}, {usual} before; {grew}{because}")


def _reasons(
    stage: str, earlier: VersionInterval, version: VersionInterval, before: Interval, now: Interval
) -> Iterator[str]:
    """Other changes that have to do with a stage, the weightiest first."""
    if stage in ("receive", "reply"):
        turns, usual = (text.micros(each.loop_turns.quantile(0.99)) for each in (now, before))
        yield f"turns of the loop take {turns} (p99), {usual} before"
    else:
        yield from _crowding(version, before, now)
    asked, usual_rate = version.per_second(version.requests), earlier.per_second(earlier.requests)
    if asked >= GREW_BY * usual_rate:
        yield f"{text.rate(asked)} requests/s, {text.rate(usual_rate)} before"
    if version.rows_per_batch >= GREW_BY * earlier.rows_per_batch:
        yield f"{version.rows_per_batch:.1f} rows per batch, {earlier.rows_per_batch:.1f} before"
    elif stage == "compute":
        yield "no larger batches: the device is slower, or shared"
    if stage == "queue" and version.mean_us("compute") >= GREW_BY * earlier.mean_us("compute"):
        yield f"compute {text.micros(version.mean_us('compute'))}, {text.micros(earlier.mean_us('compute'))} before"
    device = max(now.devices, key=lambda each: each.busy_share, default=None)
    if stage == "queue" and device is not None:
        yield f"{device.after.name} {text.percent(device.busy_share)} busy"


def _crowding(version: VersionInterval, before: Interval, now: Interval) -> Iterator[str]:
    """The other version that takes more of the lanes than before, if it takes more of the increase than this one."""

    def more(each: VersionInterval) -> float:
        earlier = before.version(each.title)
        return each.lanes - (earlier.lanes if earlier is not None else 0.0)

    most = max(now.versions, key=more)
    if most is not version and more(most) >= _CROWDING_LANES:
        yield f"{most.title} takes {most.lanes:.1f} lanes, {most.lanes - more(most):.1f} before"


def rates(now: Interval) -> str:
    """Rates of requests, replies and errors, the most frequent of these first, in a line."""
    counts = sorted(now.errors.items(), key=lambda item: (-item[1], item[0]))
    codes = ", ".join(f"{text.clean(code)} {text.rate(now.per_second(count))}" for code, count in counts)
    return (
        f"{text.rate(now.per_second(now.requests))} requests/s, {text.rate(now.per_second(now.replies))} replies/s, "
        f"{text.rate(now.per_second(now.error_count))} errors/s{f' ({codes})' if codes else ''}"
    )


def wait(version: VersionInterval) -> str:
    """The time until one more row would be done; "-" where nobody asked lately."""
    return text.micros(version.after.predicted_wait_us or math.nan)


def named(versions: Iterable[VersionStats], model: str) -> set[str]:
    """Titles of the versions that NAME or NAME@VERSION means; "": all.

    Raises:
        NotFound: none.
    """
    titles = {f"{version.name}@{version.version}": version.name for version in versions}
    found = {title for title, name in titles.items() if model in ("", name, title)}
    if model and not found:
        raise NotFound(f"no counts of a model {model!r}: {', '.join(titles) or 'there are none'}")
    return found


def document(now: Interval, before: Interval | None, titles: Container[str] | None = None) -> dict[str, Any]:
    """An interval for --json. Names end in their units; percentiles of nothing are null.

    Args:
        before: the time that it is held against.
        titles: of the versions that are wanted; None: all.
    """
    after = now.after
    grown = {each.title: each.growth for each in slower(now, before)}
    return {
        "status": after.status,
        "version": after.version,
        "started_s": after.started_s,
        "uptime_s": after.uptime_us / 1e6,
        "seconds": now.seconds,
        "restarted": now.restarted,
        "before_seconds": None if before is None else before.seconds,
        "requests_per_s": now.per_second(now.requests),
        "replies_per_s": now.per_second(now.replies),
        "errors_per_s": {code: now.per_second(count) for code, count in sorted(now.errors.items())},
        **{name: getattr(now, name) for name in _REMARKABLE},
        "queued": after.queued,
        "running": after.running,
        "connections": after.connections,
        "traffic_mb": after.traffic_mb,
        "traffic_owed_mb": after.traffic_owed_mb,
        "traffic_limit_mb": after.traffic_limit_mb,
        "loop_turns_us": _distribution(now.loop_turns),
        "devices": [
            {
                "name": device.after.name,
                "status": device.after.status,
                "lanes": device.after.lanes,
                "busy_share": device.busy_share,
                "inline_share": device.inline_share,
                "queued_rows": device.after.queued_rows,
                "memory_free_mb": device.after.memory_free_mb,
                "memory_total_mb": device.after.memory_total_mb,
            }
            for device in now.devices
        ],
        "models": [
            _version_document(version, before, grown.get(version.title))
            for version in now.versions
            if titles is None or version.title in titles
        ],
        "clients": [
            {
                "name": client.after.name,
                "requests_per_s": client.per_second(client.requests),
                "refused_per_s": client.per_second(client.refused),
                "in_flight": client.after.in_flight,
                "owed_bytes": client.after.owed_bytes,
            }
            for client in now.clients
        ],
    }


def _version_document(version: VersionInterval, before: Interval | None, grown: Growth | None) -> dict[str, Any]:
    earlier = None if before is None else before.version(version.title)
    return {
        "name": version.after.name,
        "version": version.after.version,
        "requests_per_s": version.per_second(version.requests),
        "replies_per_s": version.per_second(version.replies),
        "errors_per_s": {code: version.per_second(count) for code, count in sorted(version.errors.items())},
        "abandoned": version.abandoned,
        "rows_per_s": version.per_second(version.rows),
        "batches_per_s": version.per_second(version.batches),
        "rows_per_batch": version.rows_per_batch,
        "lanes": version.lanes,
        "queued_rows": version.after.queued_rows,
        "predicted_wait_us": version.after.predicted_wait_us,
        "prediction_error_us": _distribution(version.prediction_error),
        "deadlines_met": version.deadlines_met,
        "deadlines_missed": version.deadlines_missed,
        "steals": version.steals,
        "splits": version.splits,
        "evictions": version.evictions,
        "stages_us": {stage: _distribution(version.stage(stage)) for stage in STAGES},
        "before_stages_us": None
        if earlier is None
        else {stage: _distribution(earlier.stage(stage)) for stage in STAGES},
        "grew": None
        if grown is None
        else {"stage": grown.stage, "share": grown.share, "us": grown.now_us, "us_before": grown.before_us},
    }


def _distribution(values: Histogram) -> dict[str, float]:
    return {
        "count": values.count,
        "mean": values.mean(),
        **{name: values.quantile(share) for name, share in SHARES.items()},
    }
