"""Results of a comparison with other servers: rounds put together, ratios, goals, tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from goals import Goal
from report import Ratio, ratio

TENSORNEXT = "TensorNext"

BRIDGE = "TensorNext, bridge"
"""`tnxctl bridge` and a daemon behind it, together."""

FASTAPI_RAW, TRITON = "FastAPI, raw bytes", "Triton, batching"
"""The servers that the bridge is held against."""

NATURAL, LEAN, C = "natural", "lean", "C"

CLIENTS = {
    NATURAL: "each server's natural Python client",
    LEAN: "a lean client in Python: pyzmq's DEALER, HTTP on raw sockets",
    C: "wrk, in C (TensorNext: ZMTP on a raw socket, in Python)",
}
"""Kinds of clients."""


class Round(msgspec.Struct, frozen=True):
    """One round of one load on one server.

    Attributes:
        requests: results received. requests_per_s: of them.
        p50_us, p99_us: latency, NaN of no result.
        server_cpu_us: CPU time of the server's whole process tree per request. client_cpu_us: of the client.
        errors: what came instead of a right result, counted.
    """

    requests: int
    requests_per_s: float
    p50_us: float
    p99_us: float
    server_cpu_us: float
    client_cpu_us: float
    errors: dict[str, int]


FIGURES = ("p50_us", "p99_us", "requests_per_s", "server_cpu_us", "client_cpu_us")


class Row(msgspec.Struct, frozen=True):
    """One server under one load.

    Attributes:
        medians: of the rounds, by figure of `Round`.
        ratios: TensorNext over this server, by figure: the median of the ratios of each round, and their range.
        errors: of all rounds.
    """

    server: str
    medians: dict[str, float]
    ratios: dict[str, Ratio]
    errors: dict[str, int]
    rounds: list[Round]


class Table(msgspec.Struct, frozen=True):
    """All servers under one load: so many requests outstanding by one kind of client."""

    outstanding: int
    client: str
    rows: list[Row]


class Comparison(msgspec.Struct, frozen=True):
    """The document that --json writes.

    Attributes:
        versions: server -> package -> version.
        missing: server -> why it was not measured, or not to the end.
        idle_cpu_percent: server -> CPU time of its process tree while nobody asks, in percent of one core.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]]
    missing: dict[str, str]
    idle_cpu_percent: dict[str, float]
    tables: list[Table]
    goals: list[Goal]


Measured = dict[tuple[str, int, str], list[Round]]
"""(server, outstanding, kind of client) -> its rounds."""


def make_round(
    latency_us: Sequence[float], seconds: float, server_cpu_ns: int, client_cpu_us: float, errors: Counter[str]
) -> Round:
    """A round, from the latencies of its requests."""
    p50, p99 = np.percentile(latency_us, (50, 99)) if len(latency_us) else (float("nan"), float("nan"))
    return finish_round(len(latency_us), seconds, float(p50), float(p99), server_cpu_ns, client_cpu_us, errors)


def finish_round(
    requests: int,
    seconds: float,
    p50_us: float,
    p99_us: float,
    server_cpu_ns: int,
    client_cpu_us: float,
    errors: Counter[str],
) -> Round:
    """A round, where the percentiles are known already."""
    return Round(
        requests=requests,
        requests_per_s=round(requests / seconds, 1),
        p50_us=round(p50_us, 1),
        p99_us=round(p99_us, 1),
        server_cpu_us=round(server_cpu_ns / 1e3 / max(requests, 1), 1),
        client_cpu_us=round(client_cpu_us / max(requests, 1), 1),
        errors=dict(errors),
    )


def tables(measured: Measured, servers: Sequence[str]) -> list[Table]:
    """One table for each number outstanding and each kind of client, TensorNext first."""
    loads = sorted({(outstanding, client) for _, outstanding, client in measured}, key=_order)
    return [
        Table(
            outstanding,
            client,
            [
                _row(server, rounds, measured.get((TENSORNEXT, outstanding, client), []))
                for server in servers
                if (rounds := measured.get((server, outstanding, client)))
            ],
        )
        for outstanding, client in loads
    ]


def _order(load: tuple[int, str]) -> tuple[int, int]:
    return load[0], list(CLIENTS).index(load[1])


def _row(server: str, rounds: list[Round], tensornext: list[Round]) -> Row:
    figures = {figure: [float(getattr(round_, figure)) for round_ in rounds] for figure in FIGURES}
    mine = {figure: [float(getattr(round_, figure)) for round_ in tensornext] for figure in FIGURES}
    return Row(
        server=server,
        medians={figure: round(float(np.median(values)), 1) for figure, values in figures.items()},
        ratios={figure: ratio(mine[figure], values) for figure, values in figures.items()} if tensornext else {},
        errors=dict(sum((Counter(round_.errors) for round_ in rounds), Counter[str]())),
        rounds=rounds,
    )


def goals(measured: Measured) -> list[Goal]:
    """The promises of the project that a comparison can show."""
    by_c = C if any(client == C and server != TENSORNEXT for server, _, client in measured) else LEAN
    counts = {outstanding for _, outstanding, _ in measured}
    many = max(counts, default=0)
    found = []
    if 1 in counts:
        found += [
            _goal(measured, "1 outstanding, p50", "p50_us", 1, NATURAL, _is_peer, 0.33, at_most=True),
            _goal(measured, "1 outstanding, p50", "p50_us", 1, by_c, _is_peer, 1.0, at_most=True),
        ]
    if many > 1:
        load = f"{many} outstanding"
        found += [
            _goal(measured, f"{load}, requests/s", "requests_per_s", many, by_c, _is_mosec, 1.25, at_most=False),
            _goal(measured, f"{load}, server CPU", "server_cpu_us", many, by_c, _is_mosec, 0.8, at_most=True),
            _goal(measured, f"{load}, requests/s", "requests_per_s", many, by_c, _is_peer, 1.0, at_most=False),
        ]
    return found + (_bridge_goals(measured, many, by_c) if any(server == BRIDGE for server, _, _ in measured) else [])


def _bridge_goals(measured: Measured, many: int, by_c: str) -> list[Goal]:
    """The promises about the bridge: by wrk over what one would write instead, by Triton's own client over Triton."""

    def goal(promise: str, figure: str, at: int, client: str, over: str, bound: float, *, at_most: bool) -> Goal:
        promise = f"bridge, {at} outstanding, {promise}"
        return _goal(measured, promise, figure, at, client, over.__eq__, bound, at_most=at_most, mine=BRIDGE)

    counts = {outstanding for _, outstanding, _ in measured}
    found = []
    if 1 in counts:
        found.append(goal("p50", "p50_us", 1, by_c, FASTAPI_RAW, 1.5, at_most=True))
        found.append(goal("p50", "p50_us", 1, NATURAL, TRITON, 1.0, at_most=True))
    if many > 1:
        found.append(goal("requests/s", "requests_per_s", many, by_c, FASTAPI_RAW, 2.0, at_most=False))
    return found


def _is_peer(server: str) -> bool:
    return server not in (TENSORNEXT, BRIDGE)


def _is_mosec(server: str) -> bool:
    return server.startswith("mosec")


def _goal(
    measured: Measured,
    promise: str,
    figure: str,
    outstanding: int,
    client: str,
    counts: Callable[[str], bool],
    bound: float,
    *,
    at_most: bool,
    mine: str = TENSORNEXT,
) -> Goal:
    """TensorNext over the best of some servers. Which one is the best is decided by the medians of the rounds."""
    candidates = {
        server: [float(getattr(round_, figure)) for round_ in rounds]
        for (server, at, by), rounds in measured.items()
        if at == outstanding and by == client and counts(server)
    }
    ours = [float(getattr(round_, figure)) for round_ in measured.get((mine, outstanding, client), [])]
    kind = {NATURAL: "natural Python clients", LEAN: "lean Python clients", C: "wrk"}[client]
    if not candidates or not ours:
        return Goal(promise, f"nobody, by {kind}", bound, at_most, None)
    # Of mosec the configuration that does the most work is the one to beat in CPU time, too.
    pick = min if figure == "p50_us" else max
    deciding = figure if figure == "p50_us" else "requests_per_s"
    best = pick(candidates, key=lambda server: _median(measured[server, outstanding, client], deciding))
    return Goal(promise, f"{best}, by {kind}", bound, at_most, ratio(ours, candidates[best]))


def _median(rounds: Sequence[Round], figure: str) -> float:
    return float(np.median([getattr(round_, figure) for round_ in rounds]))


def table_text(table: Table) -> str:
    """One table, for a terminal."""
    lines = [
        f"{table.outstanding} outstanding, by {CLIENTS[table.client]}",
        f"  {'':<20}{'p50 us':>9}{'p99 us':>9}{'requests/s':>12}{'server CPU':>12}{'client CPU':>12}"
        f"   {'TensorNext / it: p50':<22}{'requests/s':<20}{'server CPU':<20}errors",
    ]
    for row in table.rows:
        medians = row.medians
        errors = ", ".join(f"{count} {name}" for name, count in row.errors.items()) or "0"
        shown = (row.ratios.get(figure) for figure in ("p50_us", "requests_per_s", "server_cpu_us"))
        ratios = ["" if found is None or row.server == TENSORNEXT else str(found) for found in shown]
        lines.append(
            f"  {row.server:<20}{medians['p50_us']:>9.0f}{medians['p99_us']:>9.0f}{medians['requests_per_s']:>12.0f}"
            f"{medians['server_cpu_us']:>12.1f}{medians['client_cpu_us']:>12.1f}"
            f"   {ratios[0]:<22}{ratios[1]:<20}{ratios[2]:<20}{errors}"
        )
    return "\n".join(lines)
