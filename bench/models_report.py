"""Results of `models.py`: what its file holds, the goals, the lines of its table."""

from __future__ import annotations

from pathlib import Path

import msgspec

from real_networks import NETWORKS

DAEMON, BEFORE, PROCESS, BEST = "daemon", "before", "process", "best process"

LEAN = "lean client"
"""The daemon, asked by a client that is as lean as the one that asks the peers."""

OUTSTANDING = 16

# Goals: latency of one request to that of a process, plus a moment for the way there and back; requests per second to
# those of the best process, where two lanes were found to win, and elsewhere.
MOMENT_MS = 0.3
_LATENCY = 1.05
_RATE, _RATE_ELSEWHERE = 1.1, 0.97
_BESIDE = 1.2

_BEFORE_WIDTH = 37


class Cell(msgspec.Struct, frozen=True):
    """One contender with one network and load: medians of rounds.

    Attributes:
        p50_ms, p99_ms: of a request; p99 of all rounds together. per_s: rows per second.
        others: cores that programs outside of this benchmark used meanwhile.
        threads, rows: of the best process; of a peer the threads of each worker, and the most rows in a batch.
        workers: of a peer.
    """

    p50_ms: float
    p99_ms: float
    per_s: float
    others: float
    threads: int = 0
    rows: int = 1
    workers: int = 1


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of two contenders, taken in each round: the median, and the least and the greatest."""

    median: float
    least: float
    most: float


class Ahead(msgspec.Struct, frozen=True):
    """Ratios of the daemon to a peer: of the latency with one outstanding, of the rate with 16."""

    latency: Ratio
    rate: Ratio


class Finding(msgspec.Struct, frozen=True):
    """One network. one, many: with 1 and 16 requests outstanding, by contender.

    Attributes:
        latency: of the daemon with one outstanding, less 0.3 ms, relative to a process with default threads.
        rate: of the daemon with 16 outstanding, relative to the best process. faster: relative to the daemon before.
        ahead: by the names of the peers that took part, of the daemon as `LEAN`.
    """

    network: str
    one: dict[str, Cell]
    many: dict[str, Cell]
    latency: Ratio
    rate: Ratio
    sooner: Ratio | None
    faster: Ratio | None
    ahead: dict[str, Ahead] = {}


class Beside(msgspec.Struct, frozen=True):
    """The small network alone, and beside a large one that is always asked for more, in milliseconds."""

    contender: str
    alone_p50: float
    beside_p50: float
    alone_p99: float
    beside_p99: float
    ratio: Ratio


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes.

    Attributes:
        versions: peer -> package -> version. missing: peer, or peer and network -> why it was not measured.
    """

    command: str
    about: str
    findings: list[Finding]
    beside: list[Beside]
    versions: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}


def completed(report: Report, path: Path) -> Report:
    """The report, with what the file has of other networks, in the order of NETWORKS."""
    if not path.exists():
        return report
    before = msgspec.json.decode(path.read_bytes(), type=Report)
    found = {finding.network: finding for finding in (*before.findings, *report.findings)}
    findings = [found[network.title] for network in NETWORKS.values() if network.title in found]
    measured = {finding.network for finding in report.findings}
    missing = {
        who: why
        for who, why in before.missing.items()
        if who not in report.versions and who.partition(", ")[2] not in measured
    }
    return msgspec.structs.replace(
        report,
        findings=findings,
        beside=report.beside or before.beside,
        versions={**before.versions, **report.versions},
        missing={**missing, **report.missing},
    )


# --- the table -----------------------------------------------------------------------------------------------


def heading(before: bool) -> str:
    """First lines of the table. Args: before: whether the daemon of another tree takes part."""
    columns = f"{'p50 ms':>9}{'process':>9}{'ratio':>7}{'':>14}{'per s':>9}{'best':>9}{'ratio':>7}{'':>14}"
    if before:
        columns += f"{'before ms':>11}{'before/s':>10}{'sooner':>8}{'faster':>8}"
    return f"{'':<20}{'one outstanding':^39}{f'{OUTSTANDING} outstanding':^39}\n{'network':<20}{columns}{'others':>8}"


def lines(found: Finding) -> list[str]:
    """Lines of a network: the daemon beside plain torch, then by a lean client, and each peer with its ratios to it."""
    told = [_line(found)]
    if LEAN in found.one:
        one, many = found.one[LEAN], found.many[LEAN]
        told.append(f"{f'  {LEAN}':<20}{one.p50_ms:>9.2f}{'':>30}{many.per_s:>9.1f}")
    return told + [_peer_line(label, found) for label in found.ahead]


def _peer_line(label: str, found: Finding) -> str:
    one, many, ahead = found.one[label], found.many[label], found.ahead[label]
    behind = ["latency"] * (ahead.latency.median >= 1) + ["rate"] * (ahead.rate.median <= 1)
    setups = _setup(one) if _setup(one) == _setup(many) else f"{_setup(one)}; {_setup(many)}"
    text = f"{f'  {label}':<20}{'':>9}{one.p50_ms:>9.2f}{_told(ahead.latency)}"
    text += f"{'':>9}{many.per_s:>9.1f}{_told(ahead.rate)}{'':>{_BEFORE_WIDTH if found.sooner else 0}}"
    text += f"{max(one.others, many.others):>8.2f}  {setups}"
    return text + "".join(f"; behind it: {goal}" for goal in behind)


def _setup(cell: Cell) -> str:
    """Workers x threads of each, and the most rows of a batch."""
    return f"{cell.workers} x {cell.threads}" + (f", {cell.rows} rows" if cell.rows > 1 else "")


def _line(found: Finding) -> str:
    one, many = found.one, found.many
    text = (
        f"{found.network:<20}{one[DAEMON].p50_ms:>9.2f}{one[PROCESS].p50_ms:>9.2f}{_told(found.latency)}"
        f"{many[DAEMON].per_s:>9.1f}{many[BEST].per_s:>9.1f}{_told(found.rate)}"
    )
    if found.sooner is not None and found.faster is not None:
        text += f"{one[BEFORE].p50_ms:>11.2f}{many[BEFORE].per_s:>10.1f}"
        text += f"{found.sooner.median:>8.2f}{found.faster.median:>8.2f}"
    return f"{text}{max(cell.others for cell in (*one.values(), *many.values())):>8.2f}  {_verdict(found)}"


def _told(ratio: Ratio) -> str:
    return f"{ratio.median:>7.2f}{f'({ratio.least:.2f}-{ratio.most:.2f})':>14}"


def _verdict(found: Finding) -> str:
    wanted = next(
        _RATE if each.lanes_win else _RATE_ELSEWHERE for each in NETWORKS.values() if each.title == found.network
    )
    missed = ["latency"] * (found.latency.median > _LATENCY) + ["rate"] * (found.rate.median < wanted)
    best = found.many[BEST]
    return f"best: {best.threads or 'default'} threads, {best.rows} rows" + "".join(
        f"; missed: {goal}" for goal in missed
    )


def beside_line(found: Beside) -> str:
    """A sentence about the small network beside a large one."""
    missed = "; missed" if found.ratio.median > _BESIDE else ""
    return (
        f"MLP, {found.contender}: p50 {found.alone_p50:.2f} ms alone, {found.beside_p50:.2f} beside ResNet-50, "
        f"{found.ratio.median:.2f} ({found.ratio.least:.2f}-{found.ratio.most:.2f}){missed}; "
        f"p99 {found.alone_p99:.2f} and {found.beside_p99:.2f}"
    )
