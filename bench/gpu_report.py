"""Findings of `gpu.py`, as JSON and as the section "On a GPU" of docs/performance.md.

python bench/gpu_report.py build/gpu/gpu.json                                # print the section
python bench/gpu_report.py build/gpu/gpu.json --into docs/performance.md     # put it there
python bench/gpu_report.py --plan --into docs/performance.md                 # as nothing has been run yet
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from report import Ratio

NOT_RUN = "**not run on a device yet**"

SHARE_ROWS = 64
SHARE_GOAL = 0.97
OVERHEAD_GOAL_US = 60.0

_LONGEST = 360  # characters of an error

BEGIN, END = "<!-- gpu-check begins -->", "<!-- gpu-check ends -->"

USUAL, NO_GRAPHS, NO_OVERLAP, NEITHER = "as configured", "without graphs", "without overlap", "without both"
"""Daemons by their settings."""


class Check(msgspec.Struct, frozen=True):
    """Something that has to happen. Attributes: seen: what did, in words. ok: whether that is it."""

    seen: str
    ok: bool


class Cell(msgspec.Struct, frozen=True):
    """One size of requests to one network. Times are medians.

    Attributes:
        rows: of each request.
        outstanding: requests at full load. batch: rows of the daemon's batches then, and of those in a process.
        p50_ms: of a request with nothing else under way.
        h2d_us, forward_us, d2h_us: of those, on the device, as the daemon says.
        per_s: rows per second at full load. own_per_s: of a pipeline in a process.
        share: the first over the second, round by round.
        own_forward_us: of a forward in a process, called. own_graph_us: replayed; 0 where that cannot be.
        busy: part of the time in which the device computes at `per_s`, by what a forward takes in a process.
        utilization: the same as the driver samples it, 0 to 1; None where it cannot be asked.
    """

    rows: int
    outstanding: int
    batch: int
    p50_ms: float
    h2d_us: float
    forward_us: float
    d2h_us: float
    per_s: float
    own_per_s: float
    share: Ratio
    own_forward_us: float
    own_graph_us: float
    busy: float
    utilization: float | None = None


class Speed(msgspec.Struct):
    """One network. Attributes: difference: of the daemon's answer from plain torch's, of the largest value."""

    title: str
    difference: float
    cells: list[Cell] = []


class Overhead(msgspec.Struct, frozen=True):
    """One request of one row outstanding: microseconds, medians.

    Attributes:
        latency_us: seen by the client. device_us: of it, on the device. echo_us: of a server that does nothing.
        over_us: latency less device less echo, the median of the rounds.
    """

    title: str
    latency_us: float
    device_us: float
    echo_us: float
    over_us: float


class Switch(msgspec.Struct, frozen=True):
    """A daemon with other settings. Attributes: rate: over that as configured, by network and rows."""

    settings: str
    per_s: dict[str, float]
    rate: dict[str, Ratio]


class Part(msgspec.Struct, frozen=True):
    """A part of the run. Attributes: failure: in words, if it failed. left_out: what there was no time for."""

    name: str
    seconds: float
    failure: str = ""
    left_out: list[str] = []
    notes: list[str] = []


class GpuReport(msgspec.Struct):
    """Everything that was found.

    Attributes:
        pretended: whether there was no GPU: then the figures mean nothing, and are never recorded.
        size: of the networks. environment: as `report.environment` has it. device: as the driver calls it.
        checks, speeds, overheads: by name. switches: in order.
    """

    pretended: bool
    size: str
    budget_s: float
    environment: dict[str, Any] = {}
    device: dict[str, Any] = {}
    parts: list[Part] = []
    checks: dict[str, Check] = {}
    speeds: dict[str, Speed] = {}
    overheads: dict[str, Overhead] = {}
    switches: list[Switch] = []


class Line(NamedTuple):
    """A line of the table. Attributes: part: of the run, that it belongs to. key: what it is about in the report."""

    what: str
    goal: str
    part: str
    key: str


TESTS, ASSERT, RESTART, MEMORY, MEMORY_BACK = "tests", "assert", "restart", "memory", "memory back"
LONE, SWITCHES = "lone", "switches"

LINES = (
    Line("Tests of the CUDA lane", "all pass", TESTS, TESTS),
    Line(
        'A device assert (an index out of range in an embedding), `on_device_loss = "continue"`',
        "health tells the loss, the CPU goes on",
        ASSERT,
        ASSERT,
    ),
    Line('The same, `on_device_loss = "restart"`', "exit code 1, and a new daemon answers", ASSERT, RESTART),
    Line("Memory taken away until a batch has none", "right answers, in smaller batches", MEMORY, MEMORY),
    Line("Memory given back", "right answers, in whole batches again", MEMORY, MEMORY_BACK),
    Line(
        "MLP, one row outstanding: latency beyond the GPU's time and an echo",
        f"at most {OVERHEAD_GOAL_US:g} µs",
        LONE,
        "mlp",
    ),
    Line("ResNet-50, the same", f"at most {OVERHEAD_GOAL_US:g} µs", LONE, "resnet50"),
    Line(
        f"ResNet-50 in bfloat16, {SHARE_ROWS} rows: rate over that of a pipeline in a process of its own",
        f"at least {SHARE_GOAL:.0%}",
        "resnet50-64",
        "share",
    ),
    Line("The GPU's busy share meanwhile", "", "resnet50-64", "busy"),
    Line("ResNet-50 in bfloat16, 1 to 256 rows", "", "resnet50", "resnet50"),
    Line("MLP, 1 to 4096 rows", "", "mlp", "mlp"),
    Line("MiniLM, 32 tokens, 1 to 256 rows", "", "minilm", "minilm"),
    Line("Without CUDA graphs: rate over that with", "", SWITCHES, NO_GRAPHS),
    Line("Without overlap: rate over that with", "", SWITCHES, NO_OVERLAP),
    Line("Without both", "", SWITCHES, NEITHER),
)


def markdown(found: GpuReport | None) -> str:
    """The section, from its first line to its last. Args: found: None before anything was run."""
    text = [BEGIN, ""]
    if found is not None:
        text += [_about(found), ""]
    text += ["| What | Goal | Result |", "|---|---|---|"]
    text += [f"| {line.what} | {line.goal} | {_result(line, found)} |" for line in LINES]
    if found is not None:
        text += [*_speed_tables(found), *_overhead_table(found), *_switch_table(found), *_parts(found)]
    return "\n".join([*text, "", END])


def _about(found: GpuReport) -> str:
    device, machine = found.device, found.environment
    name = device.get("device", "no device")
    text = f"{name}, {device.get('memory_mib', 0):,.0f} MiB; {machine.get('cores', '?')} cores of "
    text += f"{machine.get('cpu', '?')}; "
    text += f"torch {device.get('torch', '?')}, CUDA {device.get('cuda', '?')}, Python {machine.get('python', '?')}, "
    text += (
        f"{str(machine.get('time', '?'))[:10]}; `make gpu-check`, {sum(part.seconds for part in found.parts):.0f} s."
    )
    if found.pretended:
        text = f"**PRETENDED: there was no GPU, and no figure here means anything.** {text}"
    return text if found.size == "full" else f"{text} Networks of the size {found.size!r}."


def _result(line: Line, found: GpuReport | None) -> str:
    if found is None:
        return NOT_RUN
    text = _value(line, found)
    if text:
        return text
    for part in found.parts:
        if part.name == line.part:
            if part.failure:
                return f"failed: {_cell(part.failure)}"
            return f"left out: {', '.join(part.left_out) or 'nothing was found'}"
    return NOT_RUN


def _value(line: Line, found: GpuReport) -> str:
    if line.key in found.checks:
        check = found.checks[line.key]
        return f"{'seen' if check.ok else '**missed**'}: {_cell(check.seen)}"
    if line.part == LONE and line.key in found.overheads:
        over = found.overheads[line.key].over_us
        return _judged(f"{over:.0f} µs", over <= OVERHEAD_GOAL_US)
    if line.part == SWITCHES:
        for switch in found.switches:
            if switch.settings == line.key:
                return "; ".join(f"{name} {ratio}" for name, ratio in switch.rate.items())
        return ""
    speed = found.speeds.get(line.part)
    if speed is None or not speed.cells:
        return ""
    largest = speed.cells[-1]
    if line.key == "share":
        return _judged(str(largest.share), largest.share.median >= SHARE_GOAL)
    if line.key == "busy":
        return _busy(largest)
    best = max(speed.cells, key=lambda cell: cell.per_s)
    return f"up to {best.per_s:,.0f} rows/s, {best.share} of the pipeline, with {best.rows} rows a request"


def _judged(text: str, ok: bool) -> str:
    return f"{text}, {'met' if ok else '**missed**'}"


def _busy(cell: Cell) -> str:
    sampled = "" if cell.utilization is None else f", {cell.utilization:.0%} as the driver samples it"
    return f"{cell.busy:.0%}{sampled}"


def _cell(text: str) -> str:
    """Text for a table, in one line. Of a long one, such as an error with a log, its end tells more than its middle."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 3]} … {line[-_LONGEST * 2 // 3 :]}"


_COLUMNS = (
    "rows",
    "p50, ms",
    "to device, µs",
    "forward, µs",
    "back, µs",
    "in a process, called and replayed, µs",
    "outstanding, rows in a batch",
    "rows/s",
    "in a process",
    "share (range)",
    "busy",
)


def _speed_tables(found: GpuReport) -> list[str]:
    text: list[str] = []
    for speed in found.speeds.values():
        if not speed.cells:
            continue
        text += [
            "",
            f"{speed.title}; answers differ from plain torch's by {speed.difference:.1e} of the largest value:",
        ]
        text += ["", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        for cell in speed.cells:
            values = (
                f"{cell.rows}",
                f"{cell.p50_ms:.3f}",
                f"{cell.h2d_us:,.0f}",
                f"{cell.forward_us:,.0f}",
                f"{cell.d2h_us:,.0f}",
                f"{cell.own_forward_us:,.0f}, {f'{cell.own_graph_us:,.0f}' if cell.own_graph_us else '-'}",
                f"{cell.outstanding}, {cell.batch}",
                f"{cell.per_s:,.0f}",
                f"{cell.own_per_s:,.0f}",
                f"{cell.share}",
                _busy(cell),
            )
            text.append(f"| {' | '.join(values)} |")
    return text


def _overhead_table(found: GpuReport) -> list[str]:
    if not found.overheads:
        return []
    text = ["", "One request of one row outstanding, microseconds:", ""]
    text += ["| network | latency | on the device | echo | beyond both |", "|---|---|---|---|---|"]
    for each in found.overheads.values():
        text.append(
            f"| {each.title} | {each.latency_us:.0f} | {each.device_us:.0f} | {each.echo_us:.0f} | {each.over_us:.0f} |"
        )
    return text


def _switch_table(found: GpuReport) -> list[str]:
    names = list(dict.fromkeys(name for switch in found.switches for name in switch.per_s))
    if not names:
        return []
    text = ["", "Rows per second:", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for switch in found.switches:
        cells = [f"{switch.per_s[name]:,.0f}" if name in switch.per_s else "-" for name in names]
        text.append(f"| {switch.settings} | {' | '.join(cells)} |")
    return text


def _parts(found: GpuReport) -> list[str]:
    said: list[str] = []
    for part in found.parts:
        said += [f"- {part.name}, {part.seconds:.0f} s: {_cell(what)}" for what in _told(part)]
    return ["", "Failed, left out, and noticed:", "", *said] if said else []


def _told(part: Part) -> Sequence[str]:
    failure = [f"failed: {part.failure}"] if part.failure else []
    return [*failure, *(f"left out: {each}" for each in part.left_out), *part.notes]


def put_into(document: str, section: str) -> str:
    """A document with the section in place of the one between its marks.

    Raises:
        ValueError: it has no such marks.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"there is no {BEGIN} … {END}")
    return pattern.sub(lambda _: section, document)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--plan", is_flag=True, help="The table as nothing has been run yet.")
@click.option("--into", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Document to change.")
def main(path: Path | None, plan: bool, into: Path | None) -> None:
    """Print what `gpu.py` wrote to PATH as Markdown, or put it into a document."""
    if (path is None) is not plan:
        raise click.UsageError("either PATH or --plan")
    found = None if path is None else msgspec.json.decode(path.read_bytes(), type=GpuReport)
    if into is None:
        click.echo(markdown(found))
        return
    if found is not None and (found.pretended or found.size != "full"):
        raise click.ClickException(f"{path} has no figures of a GPU: it was a trial of the program")
    try:
        into.write_text(put_into(into.read_text(encoding="utf-8"), markdown(found)), encoding="utf-8")
    except ValueError as error:
        raise click.ClickException(f"{into}: {error}") from None


if __name__ == "__main__":
    main()
