"""Lines of `tnxctl top`: a look at a daemon, laid out for a terminal of any size.

Colours only stress what the text says, so nothing is lost without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import click

from tnxctl.cli import intervals, text
from tnxctl.cli.top.history import Look
from tnxctl.protocol.statistics import STAGES
from tnxctl.statistics import ClientInterval, DeviceInterval, Growth, Interval, VersionInterval

WIDEST = 200
"""Columns where there is no terminal."""

HELP = (
    "q         quit                          space   pause, and go on",
    "s         sort by the next column       h       this help, and back",
    "r p w e g n   sort by rate, P99, queue, errors, growth, name",
    "up, down  choose the model whose stages are shown; Esc: the one that grew most",
    "b         hold it against all since the daemon's start, or the last minute",
    "c         clients in place of stages (for the role admin)",
    "",
    "REQ/s     requests per second           ERR/s   errors per second",
    "BATCH     rows per batch                QUEUED  rows that wait",
    "WAIT      until one more would be done  P50 P99 of the whole time in the daemon",
    "BEFORE    P99 of the time that it is held against, see b",
    "GREW      stage that grew most where the whole grew by a quarter, by P99 or less",
    "LANES     kept busy, about              MISSED  of requests with a deadline",
    "QUEUE     mean time in this stage       COMPUTE mean time in this one",
    "OFF       mean error of predictions     ROWS/s  rows computed per second",
    "BUSY      of the time of all lanes      INLINE  of the serving thread's time",
)


class Row(NamedTuple):
    """A version in the table of models. Attributes: before_us: its p99 before; NaN: there is none."""

    version: VersionInterval
    before_us: float
    growth: Growth | None

    @property
    def p99_us(self) -> float:
        return self.version.quantile_us("total", 0.99)

    @property
    def requests_per_s(self) -> float:
        return self.version.per_second(self.version.requests)

    @property
    def errors_per_s(self) -> float:
        return self.version.per_second(self.version.error_count)


class _Column(NamedTuple):
    """A column of the table of models. Attributes: rank: the higher, the wider the terminal has to be."""

    header: str
    width: int
    cell: Callable[[Row], str]
    rank: int = 0


def _grew(row: Row) -> str:
    return "" if row.growth is None else f"{row.growth.stage} +{text.micros(row.growth.added_us)}"


_COLUMNS = (
    _Column("REQ/s", 6, lambda row: text.rate(row.requests_per_s)),
    _Column("ROWS/s", 6, lambda row: text.rate(row.version.per_second(row.version.rows)), 3),
    _Column("ERR/s", 6, lambda row: text.rate(row.errors_per_s)),
    _Column("MISSED", 6, lambda row: text.percent(row.version.missed_share), 1),
    _Column("BATCH", 5, lambda row: text.rate(row.version.rows_per_batch)),
    _Column("LANES", 5, lambda row: f"{row.version.lanes:.1f}", 1),
    _Column("QUEUED", 6, lambda row: text.rate(row.version.after.queued_rows).removesuffix(".0")),
    _Column("WAIT", 5, lambda row: intervals.wait(row.version)),
    _Column("OFF", 5, lambda row: text.micros(row.version.prediction_error.mean()), 2),
    _Column("QUEUE", 5, lambda row: text.micros(row.version.mean_us("queue")), 1),
    _Column("COMPUTE", 7, lambda row: text.micros(row.version.mean_us("compute")), 1),
    _Column("P50", 5, lambda row: text.micros(row.version.quantile_us("total", 0.5))),
    _Column("P99", 5, lambda row: text.micros(row.p99_us)),
    _Column("BEFORE", 6, lambda row: text.micros(row.before_us)),
    _Column("GREW", 14, _grew),
)

SORTS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "rate": ("REQ/s", lambda row: row.requests_per_s),
    "p99": ("P99", lambda row: row.p99_us),
    "queue": ("QUEUED", lambda row: row.version.after.queued_rows),
    "errors": ("ERR/s", lambda row: row.errors_per_s),
    "grew": ("GREW", lambda row: 0.0 if row.growth is None else row.growth.added_us),
    "name": ("MODEL", lambda row: 0.0),
}
"""Orders of models, the largest first: the column that shows the value, and the value."""

_NAME_WIDTH = 14
_FEWEST_LINES = 4  # of the table of models
_STAGES_LINES = 5
_TALL = 22  # lines for models and what is below them
_STYLES = {"good": {"fg": "green"}, "fair": {"fg": "yellow"}, "bad": {"fg": "red"}}


@dataclass
class Choice:
    """Choices that a user has made.

    Attributes:
        sort: one of `SORTS`. chosen: title of the model whose stages are shown; "": the one that grew most.
        since_start: what it is held against. clients: shown in place of the stages. paused, help: whether they are on.
    """

    sort: str = "rate"
    chosen: str = ""
    since_start: bool = True
    clients: bool = False
    paused: bool = False
    help: bool = False


@dataclass(frozen=True)
class Surroundings:
    """Surroundings of the look.

    Attributes:
        endpoint: of the daemon. clock: the time of day.
        away: a sentence about a daemon that does not answer; "": it does.
        width, height: of the terminal; height None: as many lines as it takes, and no line about keys.
    """

    endpoint: str
    clock: str
    away: str = ""
    width: int = WIDEST
    height: int | None = None


def rows(look: Look, sort: str) -> list[Row]:
    """The versions in their order. Those of one value are in the order of their names."""
    grown = {each.title: each.growth for each in look.slower}
    found = []
    for version in look.now.versions:
        earlier = None if look.before is None else look.before.version(version.title)
        before_us = math.nan if earlier is None else earlier.quantile_us("total", 0.99)
        found.append(Row(version, before_us, grown.get(version.title)))
    value = SORTS[sort][1]
    return sorted(found, key=lambda row: (-value(row) if value(row) > 0 else 0.0, row.version.title))


def shown_of(table: Sequence[Row], chosen: str) -> Row | None:
    """The row whose stages are shown."""
    for row in table:
        if row.version.title == chosen:
            return row
    grown = max(table, key=lambda row: row.growth.added_us if row.growth else 0.0, default=None)
    return grown if grown is not None and grown.growth else next(iter(table), None)


def frame(look: Look | None, choice: Choice, around: Surroundings) -> list[str]:
    """All lines, none longer than the terminal is wide, and no more than it has."""
    width, height = around.width, around.height
    lines = [*_header(look, choice, around), ""]
    footer = [] if height is None else [_footer(look, choice, width)]
    if choice.help:
        lines.extend(text.shorten(line, width) for line in HELP)
    elif look is not None:
        lines.extend(_devices(look.now.devices, width, height))
        lines.append("")
        lines.extend(_lower(look, choice, width, None if height is None else height - len(lines) - len(footer)))
    if height is None:
        return lines
    room = max(height - len(footer), 0)
    return [*lines[:room], *[""] * (room - len(lines)), *footer][:height]


# --- head and foot -------------------------------------------------------------------------------------------


def _header(look: Look | None, choice: Choice, around: Surroundings) -> Iterator[str]:
    width = around.width
    clock = f"PAUSED {around.clock}" if choice.paused else around.clock
    if look is None:
        yield _ends(f"{around.endpoint}", clock, width, {"bold": True})
        yield _styled(text.shorten(text.clean(around.away or "asking ..."), width), bad=bool(around.away))
        return
    now = look.now
    after = now.after
    status = "away" if around.away else text.clean(after.status)
    up = f"up {text.duration(after.uptime_us / 1e6)}{', restarted' if look.restarted else ''}"
    first = f"{status}  tnxd {text.clean(after.version)}, {up}  {around.endpoint}"
    yield _ends(first, clock, width, {"bold": True} | ({"fg": "red"} if around.away else {}))
    if around.away:
        yield _styled(text.shorten(text.clean(around.away), width), bad=True)
    else:
        over = "since the start" if look.before is None else f"over {text.duration(now.seconds)}"
        yield _ends(intervals.rates(now), over, width)
    turns = f"loop p99 {text.micros(now.loop_turns.quantile(0.99))}"
    owed = f", {text.memory(after.traffic_owed_mb)} owed" if after.traffic_owed_mb > 0 else ""
    connections = f"{after.connections} connection{'' if after.connections == 1 else 's'}"
    parts = [f"{after.queued} waiting, {after.running} running", turns, connections]
    parts.append(f"traffic {text.memory(after.traffic_mb)}{owed}")
    parts.extend(f"{count} {what}" for what, count in _troubles(now) if count)
    yield text.shorten("   ".join(parts), width)


def _troubles(now: Interval) -> Iterator[tuple[str, int]]:
    yield "undeliverable", now.undeliverable
    yield "abandoned", now.abandoned
    yield "sent again", now.resent
    yield "cut off", now.connections_cut
    yield "refused", now.connections_refused
    yield "log lines dropped", now.log_lines_dropped
    yield "spans dropped", now.spans_dropped


def _ends(left: str, right: str, width: int, style: dict[str, bool | str] | None = None) -> str:
    """A line with a text at each end."""
    room = width - len(right) - 2
    if room < 20 or width >= WIDEST:
        return click.style(text.shorten(left, width), **(style or {}))  # type: ignore[arg-type]
    return f"{click.style(text.shorten(left, room).ljust(room), **(style or {}))}  {right}"  # type: ignore[arg-type]


def _footer(look: Look | None, choice: Choice, width: int) -> str:
    against = "the start" if choice.since_start else "the last minute"
    if look is not None and look.before is not None and look.against != against:
        against += ", soon"  # it was not watched for long enough
    keys = f"q quit  h help  space pause  s sort: {choice.sort}  b against: {against}  up/down model  c clients"
    return click.style(text.shorten(keys, width).ljust(width), reverse=True)


# --- devices -------------------------------------------------------------------------------------------------


def _devices(devices: Sequence[DeviceInterval], width: int, height: int | None) -> Iterator[str]:
    most = len(devices) if height is None else max(1, height // 8)
    name_width = max(min(max([len("DEVICE"), *(len(text.clean(device.after.name)) for device in devices)]), 12), 6)
    bar_width = max(min(width - name_width - 54, 40), 6)
    header = (
        f"{'DEVICE':{name_width}}  {'STATUS':8}  {'BUSY':{bar_width + 6}}  {'INLINE':>6}  {'QUEUED':>6}  MEMORY USED"
    )
    yield text.heading(text.shorten(header, width))
    shown = devices
    if len(devices) > most:  # those with something to see
        shown = sorted(devices, key=lambda each: (each.after.status == "ready", -each.busy_share))[:most]
    for device in shown:
        after = device.after
        share = device.busy_share
        mood = "bad" if share >= 0.9 else "fair" if share >= 0.7 else "good"
        used_mb = after.memory_total_mb - after.memory_free_mb
        memory = f"{used_mb / 1024:.1f} of {after.memory_total_mb / 1024:.1f} GiB" if after.memory_total_mb else "-"
        name = text.shorten(text.clean(after.name), name_width).ljust(name_width)
        status = text.status(text.shorten(text.clean(after.status), 8).ljust(8))
        bar = click.style(text.bar(share, bar_width), **_STYLES[mood])  # type: ignore[arg-type]
        rest = f"{text.percent(share):>5}  {text.percent(device.inline_share):>6}  {after.queued_rows:>6}  {memory}"
        yield f"{name}  {status}  {bar} {text.shorten(rest, width - name_width - bar_width - 13)}"
    if len(shown) < len(devices):
        yield f"and {len(devices) - len(shown)} more, less busy"


# --- models, and what is shown below them ----------------------------------------------------------------------


def _lower(look: Look, choice: Choice, width: int, height: int | None) -> list[str]:
    """The table of models, why they became slower, and below that stages and clients, as there is room."""
    table = rows(look, choice.sort)
    shown = shown_of(table, choice.chosen)
    models = [*_models(table, shown, choice, width)]
    why = [_styled(line, bad=True) for each in look.slower for line in _wrapped(each.sentence, width)]
    clients = [*_clients(look.now.clients, width)]
    stages = [] if shown is None else [*_stages(shown, look, width)]
    if height is None:
        return [*models, *_panel(why), *_panel(stages), *_panel(clients)]
    least = min(len(models), _FEWEST_LINES)
    told = 2 if height < _TALL else 4
    if len(why) > told:
        why = [*why[: told - 1], _styled(click.unstyle(why[told - 1])[: width - 2] + " …", bad=True)]
    panels = _panel([*why, *[""] * (told - len(why))])  # also where there is nothing to say: so nothing jumps
    if least + len(panels) > height:
        panels = why[: max(height - least, 0)]
    shows_clients = choice.clients and len(clients) > 0
    first = clients[: max(height - least - len(panels) - 1, 0)] if shows_clients else stages
    if least + len(panels) + 1 + len(first) <= height:
        panels.extend(_panel(first))
    room = max(height - len(panels), 1)
    if len(models) > room:
        models = [*models[: room - 1], f"and {len(models) - room + 1} more"]
    left = height - len(models) - len(panels) - 1
    if clients and not shows_clients and left > 1:
        panels.extend(_panel(clients[:left]))
    for row in table:
        if height - len(models) - len(panels) - 1 < _STAGES_LINES:
            break
        if row.version.replies and (row is not shown or shows_clients):
            panels.extend(_panel([*_stages(row, look, width)]))
    return [*models, *panels]


def _panel(lines: list[str]) -> list[str]:
    """Lines with an empty one before them; nothing for none."""
    return ["", *lines] if lines else []


def _models(table: Sequence[Row], shown: Row | None, choice: Choice, width: int) -> Iterator[str]:
    columns = _fitting(width)
    taken = sum(column.width + 1 for column in columns)
    longest = max([len("MODEL"), *(len(text.clean(row.version.title)) + 2 for row in table)])
    name_width = max(min(longest, width - taken), 8)
    sorted_by = SORTS[choice.sort][0]
    cells = [_marked("MODEL".ljust(name_width), sorted_by == "MODEL")]
    for column in columns:
        header = column.header if column.header == "GREW" else column.header.rjust(column.width)
        cells.append(_marked(header, column.header == sorted_by))
    yield " ".join(cells).rstrip()
    for row in table:
        mark = ">" if row is shown else " "
        name = f"{mark}{_title(row.version, name_width - 1)}".ljust(name_width)
        line = [click.style(name, bold=True) if row is shown else name]
        for column in columns:
            cell = text.shorten(column.cell(row), column.width)
            cell = cell if column.header == "GREW" else cell.rjust(column.width)
            is_bad = (column.header in ("P99", "GREW") and row.growth is not None) or (
                column.header == "ERR/s" and row.errors_per_s > 0
            )
            line.append(_styled(cell, bad=is_bad))
        yield " ".join(line).rstrip()


def _title(version: VersionInterval, width: int) -> str:
    """NAME@VERSION, with the middle of the name left out where there is no room."""
    name, number = text.clean(version.after.name), f"@{text.clean(version.after.version)}"
    room = max(width - len(number), 5)
    if len(name) > room:
        tail = room // 3
        name = f"{name[: room - tail - 1]}…{name[len(name) - tail :]}"
    return text.shorten(name + number, width)


def _fitting(width: int) -> list[_Column]:
    """The columns for which there is room, those of a low rank first."""
    room = width - _NAME_WIDTH
    found = []
    for column in sorted(_COLUMNS, key=attrgetter("rank")):
        if column.rank == 0 or column.width + 1 <= room:
            found.append(column)
            room -= column.width + 1
    return [column for column in _COLUMNS if column in found]


def _stages(row: Row, look: Look, width: int) -> Iterator[str]:
    """Stages of a model, where its time goes: each by mean, share and p99, now and before."""
    version = row.version
    earlier = None if look.before is None else look.before.version(version.title)
    title_width = max(min(width - 8 * len(STAGES), 24), 10)
    title = _title(version, title_width - 1).ljust(title_width)
    yield text.heading("".join((title, *(f"{stage:>8}" for stage in STAGES))))
    means = [version.mean_us(stage) for stage in STAGES]
    yield _of_stages("mean", [text.micros(mean) for mean in means], title_width)
    yield _of_stages(
        "share", [text.percent(mean / means[-1] if means[-1] else math.nan) for mean in means], title_width
    )
    p99 = [f"{text.micros(version.quantile_us(stage, 0.99)):>8}" for stage in STAGES]
    if row.growth is not None:
        at = STAGES.index(row.growth.stage)
        p99[at] = _styled(p99[at], bad=True)
    yield _of_stages("p99", p99, title_width)
    if earlier is not None:
        before = [text.micros(earlier.quantile_us(stage, 0.99)) for stage in STAGES]
        yield _of_stages("p99 before", before, title_width)


def _of_stages(name: str, cells: Sequence[str], title_width: int) -> str:
    return "".join((name.ljust(title_width), *(f"{cell:>8}" for cell in cells)))


def _clients(clients: Sequence[ClientInterval], width: int) -> Iterator[str]:
    if not clients:
        return
    names = [text.clean(client.after.name) or "all others" for client in clients]
    name_width = max(min(max(map(len, names)), width - 46), 10)
    yield text.heading(f"{'CLIENT':{name_width}}  {'REQ/s':>8}  {'REFUSED/s':>9}  {'IN FLIGHT':>9}  {'OWED':>10}")
    ordered = sorted(
        zip(names, clients, strict=True), key=lambda item: (item[0] == "all others", -(item[1].requests or 0))
    )
    for name, client in ordered:
        cells = (
            f"{text.rate(client.per_second(client.requests)):>8}",
            f"{text.rate(client.per_second(client.refused)):>9}",
            f"{client.after.in_flight:>9}",
            f"{text.memory(client.after.owed_bytes / 2**20):>10}",
        )
        yield "  ".join((text.shorten(name, name_width).ljust(name_width), *cells))


def _wrapped(line: str, width: int) -> list[str]:
    from textwrap import wrap

    return wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)


def _marked(header: str, is_sorted: bool) -> str:
    return click.style(header, bold=True, underline=is_sorted)


def _styled(cell: str, bad: bool) -> str:
    return click.style(cell, fg="red", bold=True) if bad else cell
