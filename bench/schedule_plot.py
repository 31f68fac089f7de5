"""A picture of what `schedule.py` found: how many deadlines each policy met, trace by trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73")
_WIDTH = 0.2


def draw(
    shares: Mapping[str, Sequence[float]], bound: Sequence[float], traces: Sequence[str], subtitle: str, path: Path
) -> None:
    """Write a PNG.

    Args:
        shares: policy -> share of the deadlines met, per trace. bound: what no policy can exceed, per trace.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 4.8))
    for number, ((policy, values), colour) in enumerate(zip(shares.items(), _COLOURS, strict=False)):
        offset = (number - (len(shares) - 1) / 2) * _WIDTH
        axes.bar(
            [at + offset for at in range(len(traces))],
            [100 * value for value in values],
            _WIDTH,
            label=policy,
            color=colour,
        )
    for at, value in enumerate(bound):
        axes.hlines(
            100 * value,
            at - 0.45,
            at + 0.45,
            colors="black",
            linewidth=1.5,
            label="_nolegend_" if at else "upper bound",
        )
    axes.set_xticks(range(len(traces)), traces)
    axes.set_ylabel("requests done within their deadlines, %")
    axes.set_ylim(0, 104)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, frameon=False)
    figure.suptitle(f"Deadlines met\n{subtitle}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
