"""Results of an overload: what is written, and what is printed."""

from __future__ import annotations

from typing import Any

import msgspec

from crowd import FLOOD
from outcomes import Figures


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
        multiple: of capacity. rate: that is offered, requests per second.
        groups: by who asks.
        cut: connections that the server ended, by kind of client.
        server_cpu_us: per request that was sent, while the load lasted; None if it is not known.
        others_cores: cores that other programs on this machine kept busy meanwhile, and virtual machines beside it.
        calm_before, calm_after: before it, and from 100 ms after it on.
    """

    multiple: float
    rate: float
    groups: dict[str, Figures]
    cut: dict[str, int]
    server_cpu_us: float | None
    others_cores: float | None
    calm_before: Calm
    calm_after: Calm


class Overload(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    capacity: Capacity
    rows: list[Row]


_COLUMNS = (
    ("load", 6),
    ("offered/s", 11),
    ("sent/s", 10),
    ("in time/s", 11),
    ("of sent", 10),
    ("of admitted", 13),
    ("refused", 9),
    ("full", 7),
    ("late", 7),
    ("expired", 9),
    ("lost", 7),
    ("p50 ms", 9),
    ("p99 ms", 9),
    ("refusal p99 ms", 18),
    ("sent late", 11),
    ("CPU us", 9),
    ("others", 8),
    ("calm p50 us", 15),
)


def heading(model: str, rows: int, deadline_ms: float | None, clients: int, capacity: Capacity) -> str:
    """What comes before the rows."""
    deadline = "no deadline" if deadline_ms is None else f"a deadline of {deadline_ms:g} ms"
    return (
        f"{model}, {_many(rows, 'row')} per request, {deadline}, {_many(clients, 'client')}; capacity "
        f"{capacity.requests_per_s:,.0f}/s with {capacity.outstanding} outstanding\n"
        + "".join(f"{name:>{width}}" for name, width in _COLUMNS)
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def row_text(row: Row) -> str:
    """One row, and what it has to say besides."""
    found = row.groups[FLOOD]
    cells = (
        f"{row.multiple:g}",
        f"{found.offered_per_s:,.0f}",
        f"{found.sent_per_s:,.0f}",
        f"{found.in_time_per_s:,.0f}",
        f"{found.in_time_sent_per_s:,.0f}",
        f"{_percent(found.in_time_admitted)} {_percent(found.in_time_sent_admitted)}",
        _percent(found.refused),
        _percent(found.full),
        _percent(found.late),
        _percent(found.expired),
        _percent(found.lost),
        _number(found.result_ms["p50"]),
        _number(found.result_ms["p99"]),
        "-" if found.refusal_ms is None else f"{found.refusal_ms:.1f} ({_ratio(found.refusal_share)})",
        _number(found.late_ms),
        _number(row.server_cpu_us),
        _number(row.others_cores),
        f"{_whole(row.calm_before.p50_us)}>{_whole(row.calm_after.p50_us)}",
    )
    text = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    notes = [
        f"{name} {_percent(getattr(found, name))}"
        for name in ("unavailable", "failed", "wrong", "cut", "unsent")
        if getattr(found, name)
    ]
    notes += [f"{count} connections of {kind} cut" for kind, count in row.cut.items() if count]
    notes += [f"calm {when}: {calm.errors}" for when, calm in _calms(row) if calm.errors]
    return text + "".join(f"\n        {note}" for note in notes)


def _calms(row: Row) -> tuple[tuple[str, Calm], ...]:
    return ("before", row.calm_before), ("after", row.calm_after)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
