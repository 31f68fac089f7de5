"""Plain text for people: aligned tables, units, styles."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import IO, Any

import click

STATUS_STYLES: dict[str, dict[str, Any]] = {
    "ready": {"fg": "green"},
    "starting": {"fg": "yellow"},
    "draining": {"fg": "yellow"},
    "failed": {"fg": "red"},
}
_GAP = "  "
_TIME_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def clean(text: str) -> str:
    """Text that a peer sent, with whatever could steer the terminal made visible instead."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def heading(line: str) -> str:
    return click.style(line, bold=True)


def status(cell: str) -> str:
    """A status word, padded or not, in its colour."""
    return click.style(cell, **STATUS_STYLES.get(cell.strip(), {}))


def pad(cells: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    """Cells of one line of a table; `align` has a "<" or a ">" per column. A cell that is too long stays whole."""
    return [f"{cell:{side}{width}}" for cell, width, side in zip(cells, widths, align, strict=True)]


def line(padded: Sequence[str]) -> str:
    return _GAP.join(padded).rstrip()


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str, width: int | None) -> list[str]:
    """Lines of a table with columns as wide as their cells; the column "STATUS" is coloured.

    Args:
        width: of the terminal: what the last column has beyond it is cut off. None: nothing is cut.
    """
    body = [[clean(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    if width is not None:
        room = width - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(room, 0))
    lines = [heading(line(pad(header, widths, align)))]
    for cells in body:
        cells[-1] = shorten(cells[-1], widths[-1])
        padded = pad(cells, widths, align)
        if "STATUS" in header:
            at = header.index("STATUS")
            padded[at] = status(padded[at])
        lines.append(line(padded))
    return lines


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def terminal_width(stream: IO[str] | None) -> int | None:
    """Columns of the terminal behind a stream; None when there is none and lines may have any length."""
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def duration(seconds: float) -> str:
    """A time span in its two largest units: "3 d 4 h", "12 min 5 s", "840 ms"."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    whole = int(seconds)
    for size, unit, small_size, small_unit in _TIME_UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small_size} {small_unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def shape(lengths: Sequence[int]) -> str:
    """A shape as the protocol's documents write it: "[-1,256]"."""
    return f"[{','.join(map(str, lengths))}]"
