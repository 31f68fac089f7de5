"""`tnxctl explain`: the slowest requests of the last minute, and where their time went."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from tnxctl.cli import options, output, text
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.protocol.wire import SlowRequest

# As in tnxctl.protocol.wire, whose import would make `tnxctl --help` slow; a test compares them.
MAX_ID = 2**63 - 1

_BAR_WIDTH = 40
_TOLD = 3  # requests that are told in full, where several are found
_LISTED = 20


@click.command("explain", short_help="Show the slowest requests of the last minute, and why.")
@click.argument("request", metavar="[ID]", type=click.IntRange(0, MAX_ID), required=False)
@common
@options.model("Model, or one version of it.  [default: all]")
def command(request: int | None, endpoint: str, timeout: float, as_json: bool, model: str) -> None:
    """Show the slowest requests of the last minute: where each spent its time, on which device, in what company, and
    what was predicted for it.

    The daemon keeps a few of the slowest of each version. ID is the number that a client gave its request, as in the
    daemon's log; those of several clients may be the same. Names of clients are shown to admins alone.

    PREDICTED and TOOK are from the queue to the end of the device's copies, without what comes before and after.

    \b
    Examples:
      tnxctl explain
      tnxctl explain --model digits
      tnxctl explain 4711
      tnxctl explain --json | jq '.requests[] | [.id, .timing.queue_us]'
    """
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        found = client.explain(request, model=model)
    if as_json:
        output.write_json({"endpoint": endpoint, "requests": [output.plain(slow) for slow in found]})
    else:
        click.echo("\n".join(_lines(found, request)))


def _lines(found: Sequence[SlowRequest], request: int | None) -> Iterator[str]:
    if not found:
        which = "" if request is None else f" {request}"
        yield f"No request{which} of the last minute is among the slowest that the daemon keeps."
        return
    if len(found) > 1:
        yield from _table(found[:_LISTED])
        if len(found) > _LISTED:
            yield f"and {len(found) - _LISTED} more, less slow: --json has them all"
        yield ""
    for slow in found[:_TOLD]:
        yield from _story(slow)
    if len(found) > _TOLD:
        yield "tnxctl explain ID tells another one."


def _table(found: Sequence[SlowRequest]) -> list[str]:
    names = ("CLIENT",) if any(slow.client for slow in found) else ()
    header = ("ID", "MODEL", "TOTAL", "MOST OF IT", "PREDICTED", "TOOK", "ROWS", "BATCH", "DEVICE", "AGO", *names)
    rows = []
    for slow in found:
        stage, us = _longest(slow)
        row = [
            str(slow.id),
            _title(slow),
            text.micros(slow.timing.total_us),
            f"{stage} {text.micros(us)}",
            text.micros(slow.predicted_us) if slow.predicted_us > 0 else "-",
            text.micros(_taken_us(slow)),
            str(slow.rows),
            str(slow.batch_size),
            slow.device,
            text.duration(slow.age_s),
        ]
        rows.append((*row, *((slow.client,) if names else ())))
    return text.table(header, rows, "><><>>>><>" + "<" * len(names), text.terminal_width(sys.stdout), ("MODEL",))


def _story(slow: SlowRequest) -> Iterator[str]:
    """One request in words, and a line with a bar for each stage."""
    timing = slow.timing
    of = f" of {slow.client}" if slow.client else ""
    yield text.heading(
        text.clean(
            f"request {slow.id}{of} to {_title(slow)}: {text.micros(timing.total_us)}, {text.duration(slow.age_s)} ago"
        )
    )
    yield "".join(("  ", text.clean(", ".join(_circumstances(slow)))))
    yield f"  {_forecast(slow)}"
    longest, _ = _longest(slow)
    for stage, us in _stages(slow):
        share = us / timing.total_us if timing.total_us > 0 else 0.0
        line = f"  {stage:8}{text.micros(us):>7}  {text.percent(share):>5}  {text.bar(share, _BAR_WIDTH).rstrip()}"
        yield click.style(line.rstrip(), bold=stage == longest)
    yield ""


def _circumstances(slow: SlowRequest) -> Iterator[str]:
    yield f"{slow.device} ({slow.reason})" if slow.reason else slow.device
    yield f"{slow.rows} row{'s' * (slow.rows != 1)} in a batch of {slow.batch_size}"
    yield f"priority {slow.priority}"
    if slow.deadline_us is not None:
        late = slow.timing.total_us - slow.deadline_us
        kept = f"missed by {text.micros(late)}" if late > 0 else "kept"
        yield f"deadline of {text.micros(slow.deadline_us)} {kept}"
    if slow.attempt > 1:
        yield f"sent for the {slow.attempt}. time"


def _forecast(slow: SlowRequest) -> str:
    """Sentence about where the time went."""
    stage, us = _longest(slow)
    share = us / slow.timing.total_us if slow.timing.total_us > 0 else 0.0
    most = f"{_MEANINGS[stage]} took {text.percent(share)} of it"
    taken = _taken_us(slow)
    if slow.predicted_us <= 0:
        return f"{most}; nothing was predicted"
    off = taken - slow.predicted_us
    how = f"{text.micros(abs(off))} {'more' if off > 0 else 'less'} than predicted ({text.micros(slow.predicted_us)})"
    return f"{most}; {text.micros(taken)} from queue to device and back, {how}"


_MEANINGS = {
    "receive": "taking it in",
    "queue": "waiting for a lane",
    "gather": "putting it beside the others of its batch",
    "h2d": "the copy to the device",
    "compute": "computing",
    "d2h": "the copy from the device",
    "reply": "making the answer",
}


def _stages(slow: SlowRequest) -> list[tuple[str, float]]:
    return [(stage, getattr(slow.timing, f"{stage}_us")) for stage in _MEANINGS]


def _longest(slow: SlowRequest) -> tuple[str, float]:
    return max(_stages(slow), key=lambda stage: stage[1])


def _taken_us(slow: SlowRequest) -> float:
    """The time that a prediction is about."""
    return sum(us for stage, us in _stages(slow) if stage not in ("receive", "reply"))


def _title(slow: SlowRequest) -> str:
    return f"{slow.model}@{slow.version}"
