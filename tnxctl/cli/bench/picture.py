"""A picture of steps, where matplotlib is installed: latency against rate and against concurrency."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from tnxctl.cli.bench.recording import Step
from tnxctl.cli.exits import FileProblem

_LINES = (("p99", "#D55E00", "-"), ("p50", "#0072B2", "--"))  # colours that colour-blind readers tell apart


def check(path: str) -> None:
    """Check that a picture can be drawn. Raises FileProblem, which says what is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FileProblem(
            f"cannot write {path}: matplotlib, which draws it, is not installed: pip install matplotlib"
        ) from None


def draw(steps: Sequence[Step], title: str, bound_us: float | None) -> bytes:
    """The picture, as PNG. Steps without a result are left out.

    Args:
        bound_us: of a search, as a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [step for step in steps if step.latency_us]
    opened = _best(step for step in shown if step.load.rate)
    closed = _best(step for step in shown if step.load.concurrency)
    panels: list[tuple[str, list[tuple[float, Step]]]] = []
    if closed and bound_us is None:
        panels.append(("requests outstanding", [(step.load.concurrency, step) for step in closed]))
    if opened:
        panels.append(("requests/s offered", [(step.load.rate, step) for step in opened]))
    columns = max(len(panels), 1)
    figure, grid = pyplot.subplots(1, columns, figsize=(6.5 * columns, 4.8), squeeze=False, layout="constrained")
    for axes, (label, points) in zip(grid.flat, panels, strict=False):
        _panel(axes, label, points, bound_us)
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    pyplot.close(figure)
    return content.getvalue()


def _best(steps: Iterable[Step]) -> list[Step]:
    """Steps by their load. Of one load that was measured again, as a search does, the better one."""
    best: dict[float, Step] = {}
    for step in steps:
        place = step.load.rate or step.load.concurrency
        if place not in best or step.p99_of_all_us < best[place].p99_of_all_us:
            best[place] = step
    return [best[place] for place in sorted(best)]


def _panel(axes: Any, label: str, points: Sequence[tuple[float, Step]], bound_us: float | None) -> None:
    from matplotlib.ticker import LogLocator

    places = [place for place, _ in points]
    for name, colour, line in _LINES:
        values = [step.latency_us[name] / 1e3 for _, step in points]
        axes.plot(places, values, line, marker="o", markersize=4, color=colour, label=name)
    if bound_us is not None:
        axes.axhline(bound_us / 1e3, color="#7F7F7F", linestyle=":", label="bound of the p99")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(lambda _value, _: "")
    axes.set_xlabel(label)
    axes.set_ylabel("latency in ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
