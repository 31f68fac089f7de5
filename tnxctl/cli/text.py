"""Plain text for people: aligned tables, units, styles."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ModelInfo, TensorSpec

STATUS_STYLES: dict[str, dict[str, Any]] = {
    "ready": {"fg": "green"},
    "degraded": {"fg": "yellow"},
    "starting": {"fg": "yellow"},
    "draining": {"fg": "yellow"},
    "evicted": {"fg": "yellow"},
    "unloaded": {"dim": True},
    "failed": {"fg": "red"},
}
_STATUS_COLUMNS = ("STATUS", "STATE")
_GAP = "  "
_TIME_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def clean(text: str) -> str:
    """Text that a peer sent, with whatever could steer the terminal made visible instead."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def string(value: bytes, length: int = 40) -> str:
    """An element of a BYTES tensor, in quotes and with escapes, cut to that length; a blob as Python writes bytes."""
    try:
        shown = repr(value.decode()[: length + 1])
    except UnicodeDecodeError:
        shown = repr(value[: length + 1])
    return shorten(shown, length)


def heading(line: str) -> str:
    return click.style(line, bold=True)


def status(cell: str) -> str:
    """A status word, padded or not, in its colour."""
    return click.style(cell, **STATUS_STYLES.get(cell.strip(), {}))


def pad(cells: Iterable[str], widths: Sequence[int], align: str) -> list[str]:
    """Cells of one line of a table; `align` has a "<" or a ">" per column. A cell that is too long stays whole."""
    return [f"{cell:{side}{width}}" for cell, width, side in zip(cells, widths, align, strict=True)]


def line(padded: Sequence[str]) -> str:
    return _GAP.join(padded).rstrip()


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    align: str,
    width: int | None,
    flexible: Sequence[str] = (),
) -> list[str]:
    """Lines of a table with columns as wide as their cells; the column of a status is coloured.

    Args:
        width: of the terminal. None: lines may have any length.
        flexible: columns that are cut, the widest first, where lines would be longer than that. None of them: the last.
    """
    body = [[clean(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    if width is not None:
        _narrow(widths, [header.index(name) for name in flexible] or [len(header) - 1], width)
    lines = [heading(line(pad(map(shorten, header, widths), widths, align)))]
    for cells in body:
        padded = pad(map(shorten, cells, widths), widths, align)
        for at, name in enumerate(header):
            if name in _STATUS_COLUMNS:
                padded[at] = status(padded[at])
        lines.append(line(padded))
    return lines


def _narrow(widths: list[int], columns: Sequence[int], width: int) -> None:
    """Take from the widest of the columns, again and again, until a line fits or nothing is left of them."""
    for _ in range(sum(widths) + len(_GAP) * (len(widths) - 1) - width):
        widest = max(columns, key=widths.__getitem__)
        widths[widest] = max(widths[widest] - 1, 1)


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def terminal_width(stream: IO[str] | None) -> int | None:
    """Columns of the terminal behind a stream; None when there is none and lines may have any length."""
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def duration(seconds: float) -> str:
    """A time span in its two largest units: "3 d 4 h", "12 min 5 s", "840 ms"; "-" for what is no time."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    whole = int(seconds)
    for size, unit, small_size, small_unit in _TIME_UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small_size} {small_unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def micros(us: float) -> str:
    """A time in at most five characters: "850µs", "2.1ms", "24ms", "1.2s", "12min"; "-" for NaN.

    What a histogram has below 1 µs may be anything there: it is "0µs".
    """
    if math.isnan(us):
        return "-"
    if us < 1:
        return "0µs"
    for below, unit, size in ((999.5, "µs", 1.0), (999.5e3, "ms", 1e3), (599.5e6, "s", 1e6)):
        if us < below:
            number = us / size
            return f"{number:.1f}{unit}" if size > 1 and number < 9.95 else f"{number:.0f}{unit}"
    return f"{us / 60e6:.0f}min"


def rate(per_second: float) -> str:
    """A rate in at most six characters: "4.4", "1,234", "<0.1", "123k"; "-" for NaN."""
    if math.isnan(per_second):
        return "-"
    if 0 < per_second < 0.05:
        return "<0.1"
    if per_second < 9.95:
        return f"{per_second:.1f}" if per_second else "0"
    return f"{per_second:,.0f}" if per_second < 99_999.5 else f"{per_second / 1e3:,.0f}k"


def percent(share: float) -> str:
    """A part of a whole: "62 %"; "-" for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def bar(share: float, width: int) -> str:
    """A part of a whole as a bar of that width; an empty one for NaN."""
    return ("|" * round(min(max(0.0, share), 1.0) * width)).ljust(width)


def shape(lengths: Sequence[int]) -> str:
    """A shape as the protocol's documents write it: "[-1,256]"."""
    return f"[{','.join(map(str, lengths))}]"


def tensor(spec: TensorSpec) -> str:
    """One tensor of a signature: "image FP32 [-1,3,224,224]"."""
    return f"{tensor_name(spec.name)} {spec.datatype} {shape(spec.shape)}"


def tensor_name(name: str) -> str:
    """The name of a tensor as people see it."""
    return name or "(unnamed)"


def title(model: ModelInfo) -> str:
    """NAME@VERSION, or NAME where there is no version."""
    return clean(f"{model.name}@{model.version}" if model.version else model.name)


def failures(models: Iterable[ModelInfo]) -> list[str]:
    """Reasons why versions failed, why newer files of those that serve cannot be loaded, answers that proved wrong."""
    lines = []
    for model in models:
        if model.error:
            lines.append(f"{title(model)}{' failed' * (model.status == 'failed')}: {reason(title(model), model.error)}")
        if model.audit_differences:
            lines.append(
                f"{title(model)}: {model.audit_differences} of {model.audited} requests had another answer when they "
                f"were computed again; the daemon's log has the values"
            )
    return lines


def reason(what: str, why: str) -> str:
    """The reason why something failed, without its name, which stands before it."""
    return clean(why.removeprefix(f"{what}: "))


def remarks(models: Sequence[ModelInfo]) -> list[str]:
    """Remarks on versions beside their tables: errors and notes."""
    return [*failures(models), *(f"{title(model)}: {clean(note)}" for model in models for note in model.notes)]


def memory(mebibytes: float) -> str:
    """An amount of memory: "97.5 MiB", "12.1 GiB", "-" for none."""
    if mebibytes <= 0:
        return "-"
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:.1f} GiB"
    return f"{mebibytes:.1f} MiB" if mebibytes >= 0.05 else "<0.1 MiB"


def traffic(model: ModelInfo) -> str:
    """The part of its name's traffic that a version gets: "95 %", "shadow", "-" for none."""
    share = f"{100 * model.traffic:.3g} %" if model.traffic > 0 else ""
    return " + ".join(filter(None, (share, "shadow" if model.shadow else ""))) or "-"
