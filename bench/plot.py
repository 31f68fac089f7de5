"""A picture of a report: how latency grows towards the rare requests, one panel per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from report import CLIENT, DAEMON, ECHO, FORWARD, Case

Samples = Mapping[str, "np.ndarray[Any, Any]"]
"""Target -> latencies in microseconds of all its requests."""

_COLUMNS = 2
_MARKS = (50.0, 90.0, 99.0, 99.9, 99.99)

# Colours that stay apart for colour-blind readers (Okabe and Ito); the floors are dashed.
_STYLES: dict[str, tuple[str, str]] = {
    DAEMON: ("#0072B2", "-"),
    CLIENT: ("#009E73", "-"),
    FORWARD: ("#D55E00", "--"),
    ECHO: ("#7F7F7F", "--"),
}


def draw(cases: Sequence[tuple[Case, Samples]], subtitle: str, path: Path) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 3.6 * rows + 0.8), squeeze=False)
    for axes, (case, samples) in zip(grid.flat, cases, strict=False):
        _panel(axes, case, samples)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    figure.suptitle(f"Latency by percentile\n{subtitle}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, case: Case, samples: Samples) -> None:
    from matplotlib.ticker import LogLocator

    for name, values in samples.items():
        if len(values):
            ordered = np.sort(values)
            rank = np.arange(1, len(ordered) + 1) / (len(ordered) + 1)
            colour, line = _STYLES[name]
            axes.plot(1 / (1 - rank), ordered, line, color=colour, label=name, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1.1, 3e4)
    axes.set_xticks([1 / (1 - mark / 100) for mark in _MARKS], [f"{mark:g} %" for mark in _MARKS])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(case.title, fontsize=10)
    axes.set_xlabel("requests at least as fast")
    axes.set_ylabel("latency in µs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
