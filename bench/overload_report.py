"""Results of an overload: what is written, and what is printed."""

from __future__ import annotations

from typing import Any

import msgspec

from crowd import FLOOD
from overload_figures import Figures, Waiting

URGENT, REST = "urgent", "not urgent"
"""Parts of the flood."""


class Capacity(msgspec.Struct, frozen=True):
    """The best rate of a closed loop. by_outstanding: of all that were tried."""

    requests_per_s: float
    outstanding: int
    by_outstanding: dict[int, float]


class Calm(msgspec.Struct, frozen=True):
    """A closed loop with one request at a time. p50_us: of the results, None of none. errors: by code."""

    p50_us: float | None
    requests: int
    errors: dict[str, int]


class Row(msgspec.Struct, frozen=True):
    """One load.

    Attributes:
        multiple: of capacity. rate: that is offered, requests per second, without the light client.
        groups: by who asks. waiting: of the flood.
        cut: connections that the server ended, by kind of client.
        server_cpu_us: per request that was sent, while the load lasted; None if it is not known.
        others_cores: cores that other programs on this machine kept busy meanwhile, and virtual machines beside it.
        calm_before, calm_after: before it, and from 100 ms after it on.
    """

    multiple: float
    rate: float
    groups: dict[str, Figures]
    waiting: Waiting
    cut: dict[str, int]
    server_cpu_us: float | None
    others_cores: float | None
    calm_before: Calm
    calm_after: Calm


class ServerReport(msgspec.Struct, frozen=True):
    """One server under all loads."""

    capacity: Capacity
    rows: list[Row]


class Overload(msgspec.Struct, frozen=True):
    """The document that --json writes. servers: by name. missing: peers that could not be measured, and why."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    servers: dict[str, ServerReport]
    missing: dict[str, str]


_GROUP = (
    ("load", 11),
    ("offered/s", 10),
    ("sent/s", 10),
    ("in time/s", 11),
    ("of sent", 10),
    ("admitted: in time", 19),
    ("refused", 9),
    ("full", 8),
    ("held", 8),
    ("late", 8),
    ("expired", 9),
    ("lost", 8),
    ("p50 ms", 9),
    ("p99 ms", 9),
    ("refusal p99 ms", 22),
    ("sent late", 11),
)
_WHOLE = (("CPU us", 11), ("others", 8), ("calm p50 us", 23))

_RARE = ("unavailable", "failed", "wrong", "cut", "unsent")


def heading(model: str, rows: int, deadline_ms: float | None, clients: int) -> str:
    """The lines before the rows."""
    deadline = "no deadline" if deadline_ms is None else f"a deadline of {deadline_ms:g} ms"
    return f"{model}, {_many(rows, 'row')} per request, {deadline}, {_many(clients, 'client')}\n" + "".join(
        f"{name:>{width}}" for name, width in (*_GROUP, *_WHOLE)
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def capacity_text(name: str, capacity: Capacity) -> str:
    """The line before the rows of one server."""
    return f"{name}: capacity {capacity.requests_per_s:,.0f}/s with {capacity.outstanding} outstanding"


def row_text(row: Row) -> str:
    """One load: a line for the flood, one for each other group, and what else there is to say."""
    whole = (
        "-" if row.server_cpu_us is None else f"{row.server_cpu_us:,.1f}",
        _number(row.others_cores),
        f"{_count(row.calm_before.p50_us)} > {_count(row.calm_after.p50_us)}",
    )
    lines = [_group_text(f"{row.multiple:g}", row.groups[FLOOD]) + _cells(whole, _WHOLE)]
    lines += [_group_text(name, found) for name, found in row.groups.items() if name != FLOOD]
    notes = [
        f"{name}: " + ", ".join(f"{kind} {_percent(getattr(found, kind))}" for kind in _RARE if getattr(found, kind))
        for name, found in row.groups.items()
        if any(getattr(found, kind) for kind in _RARE)
    ]
    notes += [f"connections cut: {kind} {count}" for kind, count in row.cut.items() if count]
    notes += [
        f"calm {when}: {', '.join(f'{count} {code}' for code, count in calm.errors.items())}"
        for when, calm in (("before", row.calm_before), ("after", row.calm_after))
        if calm.errors
    ]
    queue, retry = row.waiting.queue_ms, row.waiting.retry_ratio
    if queue["p50"] is not None:
        notes.append(
            f"queued: p50 {_number(queue['p50'])}, p99 {_number(queue['p99'])}, max {_number(queue['max'])} ms"
        )
    if row.waiting.retry_ms is not None:
        notes.append(
            f"retry after {_number(row.waiting.retry_ms)} ms, over what it took: p50 {_number(retry['p50'])} "
            f"(p10 {_number(retry['p10'])}, p90 {_number(retry['p90'])}, of {row.waiting.retries:,})"
        )
    return "\n".join([*lines, *(f"{'':>12}{note}" for note in notes)])


def _group_text(name: str, found: Figures) -> str:
    share = "" if found.refusal_share is None else f" ({found.refusal_share:.2f} of it)"
    return _cells(
        (
            name,
            _count(found.offered_per_s),
            _count(found.sent_per_s),
            _count(found.in_time_per_s),
            _count(found.in_time_sent_per_s),
            f"{_percent(found.in_time_admitted)} {_percent(found.in_time_sent_admitted)}",
            _percent(found.refused),
            _percent(found.full),
            _percent(found.held),
            _percent(found.late),
            _percent(found.expired),
            _percent(found.lost),
            _number(found.result_ms["p50"]),
            _number(found.result_ms["p99"]),
            "-" if found.refusal_ms is None else f"{found.refusal_ms:.1f}{share}",
            _number(found.late_ms),
        ),
        _GROUP,
    )


def _cells(cells: tuple[str, ...], columns: tuple[tuple[str, int], ...]) -> str:
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
