"""Pictures of networks of real size, as PNG files: `models.py` and `ragged.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models_report import BEFORE, BEST, DAEMON, LEAN, OUTSTANDING, PROCESS, Cell, Finding

if TYPE_CHECKING:
    from ragged import Line

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_BLUE, _SKY, _GREY, _LINE = "#0072B2", "#56B4E9", "#999999", "#D55E00"
_PEER_COLOURS = {"mosec": "#E69F00", "LitServe": "#009E73"}

_MODEL_LABELS = {
    DAEMON: ("TensorNext", _BLUE),
    LEAN: ("TensorNext", _BLUE),
    BEFORE: ("TensorNext before", _GREY),
}
_MOST_RELATIVE = 3.0  # the MLP takes no time at all in a process, and many times that over any network


def draw_models(findings: Sequence[Finding], about: str, path: Path) -> None:
    """Draw how networks of real size are served, relative to plain torch in a process: latency, and rows per second.

    Args:
        about: what was measured on.
    """
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, 2, figsize=(14, 4.6), layout="constrained")
    for axes, one, process, title in (
        (grid[0], True, PROCESS, "p50 with one request outstanding; shorter is better"),
        (grid[1], False, BEST, f"rows per second with {OUTSTANDING} outstanding; longer is better"),
    ):
        cells = [finding.one if one else finding.many for finding in findings]
        # Beside peers, the daemon is asked as leanly as they are.
        shown = [LEAN if any(LEAN in each for each in cells) else DAEMON, BEFORE, *_PEER_COLOURS]
        shown = [label for label in shown if any(label in each for each in cells)]
        values = {label: [_relative(each.get(label), each[process], one) for each in cells] for label in shown}
        known = [value for each in values.values() for value in each if not np.isnan(value)]
        top = min(max(known), _MOST_RELATIVE)
        width = 0.86 / len(shown)
        for number, label in enumerate(shown):
            places = np.arange(len(findings)) + (number - (len(shown) - 1) / 2) * width
            name, colour = _MODEL_LABELS.get(label, (label, _PEER_COLOURS.get(label, _GREY)))
            axes.bar(places, np.minimum(values[label], top), width, color=colour, label=name)
            for place, value in zip(places, values[label], strict=True):
                if not np.isnan(value):
                    told = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                    axes.annotate(
                        told, (place, min(value, top)), (0, 2), textcoords="offset points", ha="center", fontsize=6.5
                    )
        axes.axhline(1.0, color=_LINE, linestyle="--", linewidth=1, label="plain torch in a process")
        axes.set_xticks(range(len(findings)), [finding.network for finding in findings], fontsize=8)
        cut = f" (cut at {top:g})" if top < max(known) else ""
        axes.set_title(f"{title}, relative to plain torch{cut}", fontsize=9)
        axes.set_ylim(0, 1.08 * max(top, 1.0))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*grid[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(about, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _relative(mine: Cell | None, other: Cell, is_latency: bool) -> float:
    if mine is None:
        return float("nan")
    return mine.p50_ms / other.p50_ms if is_latency else mine.per_s / other.per_s


def draw_ragged(lines: Sequence[Line], about: str, path: Path) -> None:
    """Draw rates and latencies under texts of all lengths, a column for each number of texts outstanding.

    Args:
        about: what was measured on.
    """
    pyplot = _pyplot()
    columns = sorted({line.outstanding for line in lines})
    ways = len({line.way for line in lines})
    size = (6.5 * len(columns), 1.6 + 0.5 * ways)
    figure, grid = pyplot.subplots(2, len(columns), figsize=size, squeeze=False, layout="constrained")
    for (rate, latency), outstanding in zip(grid.T, columns, strict=True):
        shown = [line for line in reversed(lines) if line.outstanding == outstanding]
        places = range(len(shown))
        colours = [_ragged_colour(line.way) for line in shown]
        bars = rate.barh(places, [line.per_s for line in shown], color=colours, height=0.7)
        rate.bar_label(bars, [f"{line.per_s:.1f}" for line in shown], fontsize=7, padding=2)
        rate.set_title(f"{outstanding} outstanding", fontsize=10)
        rate.set_xlabel("texts/s; longer is better", fontsize=9)
        longest = latency.barh(places, [line.p99_ms for line in shown], color=colours, alpha=0.4, height=0.7)
        latency.barh(places, [line.p50_ms for line in shown], color=colours, height=0.7)
        told = [f"{line.p50_ms:,.0f}, p99 {line.p99_ms:,.0f}" for line in shown]
        latency.bar_label(longest, told, fontsize=7, padding=2)
        latency.set_xlabel("latency in ms: p50, and p99 (pale); shorter is better", fontsize=9)
        for axes, margin in ((rate, 0.1), (latency, 0.25)):
            axes.set_yticks(places, [_ragged_label(line.way) for line in shown], fontsize=8)
            axes.margins(x=margin)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
    figure.suptitle(f"all-MiniLM-L6-v2, texts of 29 tokens on average, one thread\n{about}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ragged_label(way: str) -> str:
    return way if "," in way else f"TensorNext, {way}"


def _ragged_colour(way: str) -> str:
    """By who serves: the daemon where texts differ, and where they do not; no server; each peer."""
    who = way.partition(",")[0]
    return _PEER_COLOURS.get(who, {"process": _GREY, "equal lengths": _SKY}.get(who, _BLUE))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
