"""Pictures of throughput and of comparisons with other servers. `plot` draws those of latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import CLIENTS, LEAN, NATURAL, TENSORNEXT, C, Comparison, Table
from report import DAEMON, ECHO, CaseReport

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_MINE, _OTHERS = "#0072B2", "#999999"


def draw_comparison(result: Comparison, path: Path) -> None:
    """Write a PNG: latency of the fewest outstanding by natural clients and in C, rate and CPU time of the most."""
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
    machine = result.environment
    figure.suptitle(
        f"mlp 256-512-512-128, float32, one row per request\n{machine['cpu']}, {machine['cores']} cores, "
        f"medians of {result.settings['rounds']} rounds of {result.settings['seconds']:g} s",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axes: Any, table: Table, figure: str, label: str) -> None:
    rows = list(reversed(table.rows))
    values = [row.medians[figure] for row in rows]
    colours = [_MINE if row.server == TENSORNEXT else _OTHERS for row in rows]
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
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(f"{table.outstanding} outstanding, by\n{CLIENTS[table.client]}", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curve(cases: Sequence[CaseReport], subtitle: str, path: Path) -> None:
    """Write a PNG: latency against rate, closed loops to the left, open loops to the right."""
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
        axes.set_ylabel("latency in µs")
        axes.yaxis.set_tick_params(labelleft=True)
    figure.suptitle(f"Rate against latency, one row per request\n{subtitle}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(axes: Any, cases: Sequence[CaseReport]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, colour in ((DAEMON, _MINE), (ECHO, _OTHERS)):
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
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
