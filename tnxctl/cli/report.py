"""Answers of `tnxctl predict` and their summary, for people and for machines."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import click
import msgspec

from tnxctl.cli import text
from tnxctl.cli.exits import Exit
from tnxctl.cli.tally import KEPT, STEP_TIMES, Tally
from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import Array, datatype_of
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.cli.workload import Answer
    from tnxctl.results import Result

DATA_UP_TO = 4096
"""Elements of an output that a JSON document shows; of a larger one it gives datatype and shape alone."""

STRINGS_UP_TO = 1 << 20
"""Bytes of strings that it shows."""

_HEADER = ("#", "DEVICE", "BATCH", "TRIP ms", "DAEMON µs", "COMPUTE µs", "OUTPUT", "VALUES")
_ALIGN = "><>>>><<"
_PREVIEWED = 3  # values, where no terminal's width says how many


Show: TypeAlias = Callable[["Answer"], None]
"""Function that gets each answer as it comes."""


def view(count: int, stream: IO[str] | None, explain: bool) -> AbstractContextManager[Show]:
    """The view of `count` answers while they come: a list of them, or a progress bar if they are many.

    Args:
        stream: where the list goes; None: no list.
        explain: whether it says with each answer what was predicted for it, and why it ran where it did.
    """
    if count > KEPT:
        return _progress(count)
    return nullcontext(_silence if stream is None else _Listing(stream, count, explain).show)


def _silence(_: Answer) -> None:
    """Show nothing."""


@contextmanager
def _progress(count: int) -> Iterator[Show]:
    """A progress bar on standard error if that is a terminal, else nothing."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _silence
        return
    # Drawn anew about 500 times in all: drawing costs more than a fast answer takes.
    with click.progressbar(length=count, file=sys.stderr, show_pos=True, update_min_steps=max(1, count // 500)) as bar:
        yield lambda _: bar.update(1)


class _Listing:
    """A table with one line per answer, and perhaps one that explains it, printed as the answers come."""

    def __init__(self, stream: IO[str], count: int, explain: bool) -> None:
        self._stream = stream
        self._explain = explain
        self._terminal = text.terminal_width(stream)
        self._widths = [len(str(count)), *map(len, _HEADER[1:])]
        self._headed = False

    def show(self, answer: Answer) -> None:
        if isinstance(answer.outcome, TensorNextError):
            code = click.style(answer.outcome.code, fg="red")
            number = str(answer.index).rjust(self._widths[0])
            click.echo(text.line([number, f"{code}: {text.clean(answer.outcome.message)}"]), self._stream)
            return
        cells = _cells(answer.index, answer.round_trip_ms, answer.outcome)
        if not self._headed:
            self._headed = True
            # Nobody knows the later lines yet: the columns are those of the first.
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, cells, strict=True)]
            click.echo(text.heading(text.line(text.pad(_HEADER, self._widths, _ALIGN))), self._stream)
        padded = text.pad(cells, self._widths, _ALIGN)
        padded[-1] = ""
        room = None if self._terminal is None else self._terminal - len("  ".join(padded))
        padded[-1] = preview(next(iter(answer.outcome.outputs.values()), None), room)
        click.echo(text.line(padded), self._stream)
        if self._explain:
            click.echo(text.line([" " * self._widths[0], explanation(answer.outcome)]), self._stream)


def explanation(result: Result) -> str:
    """The time predicted for an answer against the time it took, and why it ran where it did."""
    return f"{_forecast(result)}; {text.clean(result.device)}: {text.clean(result.reason)}"


def _forecast(result: Result) -> str:
    predicted, actual = result.predicted_us, result.actual_us
    if not predicted > 0 or not math.isfinite(predicted - actual):
        return f"took {actual:.0f} µs, nothing was predicted"
    off = round(actual) - round(predicted)
    how = "as predicted" if not off else f"{abs(off)} µs {'more' if off > 0 else 'less'} than predicted"
    return f"predicted {predicted:.0f} µs, took {actual:.0f} µs, {how}"


def _cells(index: int, round_trip_ms: float, result: Result) -> list[str]:
    """Cells of one line. The last, the preview, is left empty: it takes the room that the others leave."""
    shapes = [text.shape(array.shape) for array in result.outputs.values()]
    more = f" +{len(shapes) - 1}" if len(shapes) > 1 else ""
    return [
        str(index),
        text.clean(result.device),
        str(result.batch_size),
        f"{round_trip_ms:.2f}",
        f"{result.timing.total_us:.0f}",
        f"{result.timing.compute_us:.0f}",
        f"{shapes[0] if shapes else 'none'}{more}",
        "",
    ]


def preview(array: Array | None, room: int | None) -> str:
    """The first values of an array: as many as go into `room` characters; None: a few."""
    if array is None or not array.size:
        return ""
    most = _PREVIEWED if room is None else max(0, room // 2 + 1)
    values = [_value(value) for value in islice(array.flat, most)]
    whole = " ".join(values)
    if len(values) == array.size and (room is None or len(whole) <= room):
        return whole
    while values and room is not None and len(" ".join(values)) + len(" …") > room:
        values.pop()
    return " ".join([*values, "…"])


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return text.string(value)
    return str(value) if value.dtype.kind in "biu" else f"{float(value):.3g}"


def summary(tally: Tally, explain: bool = False) -> Iterator[str]:
    """Lines for people: how many, how fast, where and why, and where the time went.

    Args:
        explain: whether they say how far the predictions were off.
    """
    several = tally.planned > 1
    if several:
        if tally.answers:
            yield ""  # below the list
        only = next(iter(tally.versions)) if len(tally.versions) == 1 else None
        by = f" by {_model(*only)}" if only else ""
        yield f"{tally.answered} of {tally.planned} requests answered{by} in {text.duration(tally.elapsed_s)}"
        if not only:
            for version, count in tally.versions.most_common():
                yield f"answered    {count} by {_model(*version)}"
    if several and tally.answered:
        yield f"rate        {tally.rate:.1f}/s with {tally.concurrency} outstanding"
    for code, count in tally.error_counts.most_common():
        yield f"failed      {count} {code}: {text.clean(tally.errors[code].message)}"
    if tally.unknown:
        yield f"unknown     {tally.unknown} under way when the run ended"
    for device, count in tally.devices.most_common():
        share = f" ({count})" if several else ""
        yield f"device      {text.clean(device)}{share}: {text.clean(tally.reasons[device])}"
    if not tally.answered:
        return
    if several:
        times = "   ".join(f"{name} {value:.2f}" for name, value in tally.percentiles_ms().items())
        yield f"round trip  {times}   ms"
        yield f"batch       {tally.batch_mean():.1f} rows on average"
        if explain:
            yield from _prediction(tally)
    means = tally.stage_means_us()
    widths = [10, *(max(len(stage), 6) for stage in means)]
    align = "<" + ">" * len(means)
    yield text.heading(text.line(text.pad(["stage", *means], widths, align)))
    yield text.line(
        text.pad(["µs (mean)" if several else "µs", *(f"{mean:.1f}" for mean in means.values())], widths, align)
    )
    yield from _steps(tally)


def _steps(tally: Tally) -> Iterator[str]:
    """A table of the steps of a pipeline, if it is one."""
    rows = [
        (name, title, f"{batch:.1f}", *(f"{mean:.1f}" for mean in means.values()))
        for name, title, batch, means in tally.step_means()
    ]
    if rows:
        header = ("step", "model", "batch", *STEP_TIMES)
        yield ""
        yield from text.table(header, rows, "<<" + ">" * (len(header) - 2), None)


def _prediction(tally: Tally) -> Iterator[str]:
    errors = tally.prediction_errors_us()
    if not errors:
        yield "prediction  the daemon made none"
        return
    times = "   ".join(f"{name} {value:.0f}" for name, value in errors.items())
    yield f"prediction  off by  {times}   µs"
    predicted, actual = tally.prediction_means_us()
    yield f"            {predicted:.0f} µs predicted and {actual:.0f} µs taken on average"


def _model(name: str, version: str) -> str:
    return text.clean(f"{name} version {version}")


def shortfall(tally: Tally) -> str:
    """One sentence for standard error about a run that did not go as planned."""
    done = tally.answered + tally.failed
    failures = ", ".join(f"{count} {code}" for code, count in tally.error_counts.most_common())
    sentence = f"{tally.failed} of {done} requests failed: {failures}" if failures else "no request failed"
    if tally.unknown:
        sentence += f"; of {tally.unknown} under way the outcome is not known"
    if tally.interrupt is not None:
        how = "terminated" if tally.interrupt is Exit.TERMINATED else "interrupted"
        return f"{how} after {done} of {tally.planned} requests; {sentence}"
    return sentence if done == tally.planned else f"given up after {done} of {tally.planned} requests; {sentence}"


def document(tally: Tally) -> dict[str, Any]:
    """The summary for --json, and the answers if they are few. Names of times and amounts end in their units.

    Of the requests that were planned, `sent` went out, and each of these is answered, failed or unknown. `model` and
    `version` are what answered most of them.
    """
    name, version = max(tally.versions, key=tally.versions.__getitem__, default=("", ""))
    return {
        "model": name,
        "version": version,
        "versions": [
            {"model": name, "version": version, "count": count}
            for (name, version), count in tally.versions.most_common()
        ],
        "planned": tally.planned,
        "concurrency": tally.concurrency,
        "interrupted": tally.interrupt is not None,
        "sent": tally.sent,
        "answered": tally.answered,
        "failed": tally.failed,
        "unknown": tally.unknown,
        "errors": [
            {"code": code, "count": count, "message": tally.errors[code].message}
            for code, count in tally.error_counts.most_common()
        ],
        "devices": [
            {"device": device, "count": count, "reason": tally.reasons[device]}
            for device, count in tally.devices.most_common()
        ],
        "elapsed_s": tally.elapsed_s,
        "rate_per_s": tally.rate,
        "batch_size_mean": tally.batch_mean(),
        "round_trip_ms": tally.percentiles_ms(),
        "stage_means_us": tally.stage_means_us(),
        "step_means": [
            {"step": name, "model": title, "batch_size": batch, **{f"{time}_us": mean for time, mean in means.items()}}
            for name, title, batch, means in tally.step_means()
        ],
        "prediction_error_us": tally.prediction_errors_us(),
        "answers": [_answer_document(answer) for answer in tally.answers],
    }


def _answer_document(answer: Answer) -> dict[str, Any]:
    """One answer for --json."""
    head = {"index": answer.index, "round_trip_ms": answer.round_trip_ms}
    if isinstance(answer.outcome, TensorNextError):
        return {**head, "error": {"code": answer.outcome.code, "message": answer.outcome.message}}
    result = answer.outcome
    return {
        **head,
        "device": result.device,
        "reason": result.reason,
        "batch_size": result.batch_size,
        "latency_ms": result.latency_ms,
        "gpu_memory_mb": result.gpu_memory_mb,
        "predicted_us": result.predicted_us,
        "actual_us": result.actual_us,
        "timing": msgspec.to_builtins(result.timing),
        "steps": msgspec.to_builtins(result.steps),
        "outputs": [_output(name, array) for name, array in result.outputs.items()],
    }


def _output(name: str, array: Array) -> dict[str, Any]:
    described = {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape}
    if array.size > DATA_UP_TO:
        return described
    if not array.dtype.hasobject:
        return {**described, "data": array.tolist()}
    if strings.nbytes_of(array) > STRINGS_UP_TO:
        return described
    if strings.not_text(array):
        return {**described, "encoding": "base64", "data": array.tolist()}  # as msgspec writes bytes
    return {**described, "data": strings.as_text(array).tolist()}
