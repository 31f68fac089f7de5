"""Text for people about two versions of a model, as `tnxctl models compare` shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tnxctl.cli import text

if TYPE_CHECKING:
    from tnxctl.protocol.wire import Comparison, OutputDifference, Percentiles


def lines(found: Comparison, width: int | None) -> Iterator[str]:
    """Lines about how much was compared, how the outputs differ, and how long both take."""
    name, baseline, candidate = map(text.clean, (found.model, found.baseline, found.candidate))
    yield f"{name} version {candidate} against {baseline}: {found.requests} requests compared"
    yield f"{found.errors} failed in version {candidate}, {found.skipped} skipped because there was no free capacity"
    if found.last_error:
        yield f"last failure: {text.clean(found.last_error)}"
    if not found.requests:
        yield "There is nothing to compare yet."
        return
    yield ""
    yield from differences(found.outputs, width)
    yield ""
    rows = [_times(baseline, found.baseline_us), _times(candidate, found.candidate_us)]
    yield from text.table(("VERSION", "BATCHES", "P50 ms", "P90 ms", "P99 ms"), rows, "<>>>>", width, ("VERSION",))


def differences(outputs: Iterable[OutputDifference], width: int | None) -> Iterator[str]:
    """A table of how outputs differ."""
    header = ("OUTPUT", "ELEMENTS", "MAX ABS DIFF", "MEAN ABS DIFF", "ARG-MAX AGREES", "MISFITS")
    yield from text.table(header, map(_difference, outputs), "<>>>>>", width, ("OUTPUT",))


def _difference(output: OutputDifference) -> tuple[str, ...]:
    agreement = "-" if output.argmax_agreement is None else _percent(output.argmax_agreement)
    return (
        text.tensor_name(output.name),
        str(output.elements),
        f"{output.max_abs:.3g}",
        f"{output.mean_abs:.3g}",
        agreement,
        str(output.misfits),
    )


def _times(version: str, times: Percentiles) -> tuple[str, ...]:
    milliseconds = (micros / 1e3 for micros in (times.p50_us, times.p90_us, times.p99_us))
    return (version, str(times.count), *(f"{time:.3f}" for time in milliseconds))


def _percent(share: float) -> str:
    """A share; 100 % and 0 % mean exactly that."""
    rounded = f"{100 * share:.2f}"
    if rounded == "100.00" and share < 1:
        return "<100 %"
    if rounded == "0.00" and share > 0:
        return ">0 %"
    return f"{float(rounded):g} %"
