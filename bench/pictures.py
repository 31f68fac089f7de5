"""Pictures of what was measured, as PNG files. `schedule_plot` draws those of the simulation, and
`network_pictures` those of networks of real size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import report
from comparison import CLIENTS, LEAN, NATURAL, TENSORNEXT, C, Comparison, Table
from crowd import FLOOD, LIGHT
from overload_figures import Figures
from overload_report import URGENT, Overload, ServerReport
from report import BATCHING, CLIENT, DAEMON, ECHO, FORWARD, Case, CaseReport

Samples = Mapping[str, "np.ndarray[Any, Any]"]
"""Target -> latencies in microseconds of all its requests."""

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_BLUE, _GREEN, _RED, _GREY = "#0072B2", "#009E73", "#D55E00", "#7F7F7F"

_PERCENTILE_LINES = {DAEMON: (_BLUE, "-"), CLIENT: (_GREEN, "-"), FORWARD: (_RED, "--"), ECHO: (_GREY, "--")}
_PERCENTILE_COLUMNS = 2
_MARKED_PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


def draw_percentiles(cases: Sequence[tuple[Case, Samples]], about: str, path: Path) -> None:
    """Draw how latency grows towards the rare requests, one panel per case.

    Args:
        about: what was measured on, see `report.about`.
    """
    pyplot = _pyplot()
    columns = min(_PERCENTILE_COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 3.6 * rows + 0.8), squeeze=False)
    for axes, (case, samples) in zip(grid.flat, cases, strict=False):
        _percentiles(axes, case, samples)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    figure.suptitle(f"Latency by percentile\n{about}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _percentiles(axes: Any, case: Case, samples: Samples) -> None:
    for name, values in samples.items():
        if len(values):
            ordered = np.sort(values)
            rank = np.arange(1, len(ordered) + 1) / (len(ordered) + 1)
            colour, line = _PERCENTILE_LINES[name]
            axes.plot(1 / (1 - rank), ordered, line, color=colour, label=name, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xlim(1.1, 3e4)
    axes.set_xticks([1 / (1 - mark / 100) for mark in _MARKED_PERCENTILES], [f"{m:g} %" for m in _MARKED_PERCENTILES])
    axes.minorticks_off()
    _latency_axis(axes)
    axes.set_title(case.title, fontsize=10)
    axes.set_xlabel("requests at least as fast")


def draw_curve(cases: Sequence[CaseReport], about: str, path: Path) -> None:
    """Latency against rate: closed loops to the left, open loops to the right.

    Args:
        about: what was measured on, see `report.about`.
    """
    pyplot = _pyplot()
    closed = [case for case in cases if not case.case.rate]
    opened = [case for case in cases if case.case.rate]
    panels = [(closed, "closed loops, by requests outstanding", "requests/s reached")]
    if opened:
        panels.append((opened, "open loops, latency from when a request was due", "requests/s offered"))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.8), squeeze=False, sharey=True)
    for axes, (shown, title, label) in zip(grid.flat, panels, strict=True):
        _curve(axes, shown)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.yaxis.set_tick_params(labelleft=True)
    figure.suptitle(f"Rate against latency, one row per request\n{about}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(axes: Any, cases: Sequence[CaseReport]) -> None:
    for name, colour in ((DAEMON, _BLUE), (BATCHING, _RED), (ECHO, _GREY)):
        summaries = [case.targets[name] for case in cases]
        rates = [case.case.rate or summary.requests_per_s for case, summary in zip(cases, summaries, strict=True)]
        for percentile, line, mark in (("p50", "-", "o"), ("p99", "--", "^")):
            values = [summary.latency_us[percentile] for summary in summaries]
            axes.plot(rates, values, line, marker=mark, markersize=4, color=colour, label=f"{name}, {percentile}")
        if not cases[0].case.rate:
            for case, rate, summary in zip(cases, rates, summaries, strict=True):
                axes.annotate(
                    f"{case.case.outstanding}",
                    (rate, summary.latency_us["p50"]),
                    xytext=(4, -10),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
    _latency_axis(axes)
    axes.xaxis.set_major_formatter(_whole)
    axes.set_xlim(left=0)


def draw_comparison(result: Comparison, path: Path) -> None:
    """Latency of the fewest outstanding by natural clients and in C, rate and CPU time of the most."""
    tables = {(table.outstanding, table.client): table for table in result.tables}
    few, many = (pick(at for at, _ in tables) for pick in (min, max))
    by_c = C if (many, C) in tables and len(tables[many, C].rows) > 1 else LEAN
    panels = [
        (tables[few, NATURAL], "p50_us", "p50 in µs (line: to p99); shorter is better"),
        (tables[few, by_c], "p50_us", "p50 in µs (line: to p99); shorter is better"),
        (tables[many, by_c], "requests_per_s", "requests/s; longer is better"),
        (tables[many, by_c], "server_cpu_us", "server CPU per request in µs; shorter is better"),
    ]
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    for axes, (table, figure_name, label) in zip(grid.flat, panels, strict=True):
        _bars(axes, table, figure_name, label)
    about = report.about(result.environment, result.settings["rounds"], result.settings["seconds"])
    figure.suptitle(f"mlp 256-512-512-128, float32, one row per request, medians of the rounds\n{about}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axes: Any, table: Table, figure: str, label: str) -> None:
    rows = list(reversed(table.rows))
    values = [row.medians[figure] for row in rows]
    colours = [_BLUE if row.server == TENSORNEXT else _GREY for row in rows]
    ends = list(values)
    if figure == "p50_us":
        ends = [row.medians["p99_us"] for row in rows]
        axes.hlines(range(len(rows)), values, ends, color="#333333", linewidth=1.2)
    axes.barh(range(len(rows)), values, color=colours, height=0.65)
    for at, (value, end) in enumerate(zip(values, ends, strict=True)):
        text = f" {value:,.0f}" if end == value else f" {value:,.0f}, p99 {end:,.0f}"
        axes.annotate(text, (end, at), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.server for row in rows], fontsize=9)
    axes.set_xlim(0, max(ends) * 1.25)
    axes.xaxis.set_major_formatter(_whole)
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(f"{table.outstanding} outstanding, by\n{CLIENTS[table.client]}", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


# What became of requests, from what is good to what is bad, with colours of the same choice.
_ENDS = (
    ("in time", "#009E73"),
    ("late", "#F0E442"),
    ("expired", "#E69F00"),
    ("refused", "#56B4E9"),
    ("full", "#0072B2"),
    ("held", "#CFE8F7"),
    ("cut", "#D55E00"),
    ("unsent", "#CCCCCC"),
    ("other", "#555555"),
)


def draw_overload(result: Overload, path: Path) -> None:
    """A picture of goodput against what was offered, for each server, and beside it the ends of all requests."""
    pyplot = _pyplot()
    servers = result.servers
    figure, grid = pyplot.subplots(
        len(servers), 2, figsize=(13, 4.2 * len(servers) + 0.8), squeeze=False, layout="constrained"
    )
    for (left, right), (name, found) in zip(grid, servers.items(), strict=True):
        _goodput(left, name, found, result.settings["deadline"] is not None)
        _ends(right, found)
    settings, machine = result.settings, result.environment
    rows = "1 row" if settings["rows"] == 1 else f"{settings['rows']} rows"
    deadline = "no deadline" if settings["deadline"] is None else f"deadline {settings['deadline']:g} ms"
    figure.suptitle(
        f"{settings['model']}, {rows} per request, {deadline}, open loops\n"
        f"{machine['cpu']}, {machine['cores']} cores, {settings['seconds']:g} s for each load",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _goodput(axes: Any, name: str, found: ServerReport, has_deadline: bool) -> None:
    rows = sorted(found.rows, key=lambda row: row.rate)
    offered = [row.groups[FLOOD].offered_per_s for row in rows]
    capacity = found.capacity.requests_per_s
    ends = [min(offered), max(*offered, capacity)]
    axes.plot(ends, [min(rate, capacity) for rate in ends], alpha=0)  # so that capacity is within the axes
    axes.axhline(capacity, color=_GREY, linestyle=":", linewidth=1.2, label="capacity of a closed loop")
    lines = [("-", "in_time_per_s", "results before the load was over")]
    if has_deadline:
        lines = [
            ("-", "in_time_per_s", "in time, from when they were due"),
            ("--", "in_time_sent_per_s", "in time, from when they were sent"),
        ]
    for line, figure_name, label in lines:
        values = [getattr(row.groups[FLOOD], figure_name) for row in rows]
        axes.plot(offered, values, line, marker="o", markersize=4, color=_BLUE, label=label)
    for kind, colour in ((URGENT, _RED), (LIGHT, _GREEN)):
        if kind in rows[0].groups:
            values = [row.groups[kind].in_time_per_s for row in rows]
            axes.plot(offered, values, "-", marker="^", markersize=4, color=colour, label=f"{kind}: in time")
    axes.set_xscale("log")
    axes.set_xticks(offered, [f"{row.multiple:g}×" for row in rows])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(_whole)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"offered, as multiples of capacity, {capacity:,.0f} requests/s")
    axes.set_ylabel("results/s")
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _ends(axes: Any, found: ServerReport) -> None:
    rows = sorted(found.rows, key=lambda row: row.rate)
    below = np.zeros(len(rows))
    for end, colour in _ENDS:
        shares = np.array([100 * _share_of(row.groups[FLOOD], end) for row in rows])
        axes.bar(range(len(rows)), shares, bottom=below, color=colour, width=0.7, label=end)
        below += shares
    axes.set_xticks(range(len(rows)), [f"{row.multiple:g}×" for row in rows])
    axes.set_ylim(0, 100)
    axes.set_xlabel("offered, as multiples of capacity")
    axes.set_ylabel("share of what was offered, %")
    axes.set_title("what became of the requests", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _share_of(found: Figures, end: str) -> float:
    if end == "in time":
        return found.in_time_per_s / found.offered_per_s if found.offered_per_s else 0.0
    if end == "other":
        return found.unavailable + found.failed + found.wrong + found.lost
    share: float = getattr(found, end)
    return share


def _latency_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(_whole)
    axes.set_ylabel("latency in µs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _whole(value: float, _position: object) -> str:
    return f"{value:,.0f}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
