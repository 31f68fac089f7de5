"""`python bench/models.py`: networks of real size on a CPU, served and in a process of their own. --help says more."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import msgspec

import real_networks
from processes import BenchError, ChildProcess, cpu_ns, machine_cpu_ns
from real_networks import NETWORKS
from rounds import in_turns
from tnxctl import Client

DAEMON, BEFORE, PROCESS, BEST = "daemon", "before", "process", "best process"

_HERE = Path(__file__).resolve().parent
_OUTSTANDING = 16
_THREADS = (1, 0)  # of plain torch; 0 is its default, a thread for each core
_ROWS = (1, 4, 16)
_PROBE_SECONDS = 0.4
_PROBES = 2
_PACE_S = 0.02  # between two requests to the small network beside a large one
_TIMEOUT_S = 60.0

# Goals: latency of one request to that of a process, plus a moment for the way there and back; requests per second to
# those of the best process, where two lanes were found to win, and elsewhere.
_LATENCY, _MOMENT_MS = 1.05, 0.3
_RATE, _RATE_ELSEWHERE = 1.1, 0.97
_BESIDE = 1.2


class Cell(msgspec.Struct, frozen=True):
    """One contender with one network and load: medians of rounds.

    Attributes:
        p50_ms, p99_ms: of a request; p99 of all rounds together. per_s: rows per second.
        others: cores that programs outside of this benchmark used meanwhile.
        threads, rows: of the best process.
    """

    p50_ms: float
    p99_ms: float
    per_s: float
    others: float
    threads: int = 0
    rows: int = 1


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of two contenders, taken in each round: the median, and the least and the greatest."""

    median: float
    least: float
    most: float


class Finding(msgspec.Struct, frozen=True):
    """One network. one, many: with 1 and 16 requests outstanding, by contender.

    Attributes:
        latency: of the daemon with one outstanding, less 0.3 ms, relative to a process with default threads.
        rate: of the daemon with 16 outstanding, relative to the best process. faster: relative to the daemon before.
    """

    network: str
    one: dict[str, Cell]
    many: dict[str, Cell]
    latency: Ratio
    rate: Ratio
    sooner: Ratio | None
    faster: Ratio | None


class Beside(msgspec.Struct, frozen=True):
    """The small network alone, and beside a large one that is always asked for more, in milliseconds."""

    contender: str
    alone_p50: float
    beside_p50: float
    alone_p99: float
    beside_p99: float
    ratio: Ratio


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    command: str
    about: str
    findings: list[Finding]
    beside: list[Beside]


class _Sample(msgspec.Struct, frozen=True):
    """One measurement: latencies in milliseconds, rows per second, cores that others used."""

    times_ms: list[float]
    per_s: float
    others: float

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.times_ms)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--network", "names", type=click.Choice(list(NETWORKS)), multiple=True, help="Only this one, or several.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Of one measurement.")
@click.option(
    "--tree", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Sources of a daemon before."
)
@click.option(
    "--optimize", default="none", show_default=True, help="For model.toml: the daemon may take other programs."
)
@click.option(
    "--option", "options", multiple=True, help="Line for the daemon's tnxd.toml, as 'cpu.scheduling = \"idle\"'."
)
@click.option("--no-beside", is_flag=True, help="Leave out the small network beside a large one.")
@click.option("--only-beside", is_flag=True, help="Measure only that.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write, or complete, this file."
)
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the file to this PNG.")
def main(
    names: Sequence[str],
    rounds: int,
    seconds: float,
    tree: Path | None,
    optimize: str,
    options: Sequence[str],
    no_beside: bool,
    only_beside: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Ask networks of real size for one row at a time, with 1 and 16 requests outstanding.

    Contenders take turns in every round: the daemon, the one of another tree, and plain torch in a process, with its
    default threads; and, of all numbers of threads and batch sizes, those with the most rows per second. Ratios are
    taken within a round, since the machine drifts. Then the small network is asked 50 times a second, alone and while
    ResNet-50 has 8 requests outstanding.
    """
    names = list(names or NETWORKS)
    findings: list[Finding] = []
    beside: list[Beside] = []

    def save() -> Report:
        report = Report(" ".join(sys.argv), _about(), findings, beside)
        if json_path is not None:
            report = _completed(report, json_path)
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        return report

    with contextlib.ExitStack() as stack:
        served = names if no_beside else list(dict.fromkeys([*names, "resnet50", "mlp"]))
        try:
            daemons = {DAEMON: _daemon(stack, _HERE.parent, served, optimize, options)}
            if tree is not None:
                daemons[BEFORE] = _daemon(stack, tree.resolve(), served, optimize, ())
            click.echo(_heading(tree is not None))
            for name in () if only_beside else names:
                findings.append(_examine(name, daemons, rounds, seconds))
                click.echo(_line(findings[-1]))
                save()
            if not no_beside:
                beside = [_beside(label, *daemon, rounds, seconds) for label, daemon in daemons.items()]
                for one in beside:
                    click.echo(_beside_line(one))
        except BenchError as error:
            raise click.ClickException(str(error)) from None
    report = save()
    if plot_path is not None:
        from pictures import draw_models

        draw_models(report.findings, report.about, plot_path)


def _completed(report: Report, path: Path) -> Report:
    """The report, with what the file has of other networks, in the order of NETWORKS."""
    if not path.exists():
        return report
    before = msgspec.json.decode(path.read_bytes(), type=Report)
    found = {finding.network: finding for finding in (*before.findings, *report.findings)}
    findings = [found[network.title] for network in NETWORKS.values() if network.title in found]
    return Report(report.command, report.about, findings, report.beside or before.beside)


# --- contenders ----------------------------------------------------------------------------------------------


def _daemon(
    stack: contextlib.ExitStack, tree: Path, names: Sequence[str], optimize: str, options: Sequence[str]
) -> tuple[str, int]:
    """Endpoint and process id of a daemon that is ready, of the sources in a directory."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx-models-")))
    settings = (tree / "tnxd" / "models" / "settings.py").read_text(encoding="utf-8")
    real_networks.publish(folder / "models", list(names), optimize if "    optimize:" in settings else "")
    (folder / "tnxd.toml").write_text("\n".join(options) + "\n", encoding="utf-8")
    arguments = ["-m", "tnxd", "--config", str(folder / "tnxd.toml"), "--bind", "tcp://127.0.0.1:*"]
    arguments += ["--model-repository", str(folder / "models"), "--devices", "cpu", "--log-level", "warning"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    child = stack.enter_context(ChildProcess("tnxd", arguments, environment=environment))
    return child.ready().split("ready on ", 1)[1].split(";")[0], child.pid


def _ask_process(process: ChildProcess, threads: int, rows: int, seconds: float) -> _Sample:
    asked = json.dumps({"threads": threads, "rows": rows, "seconds": seconds}) + "\n"
    with _others(process.pid) as others:
        times_ms: list[float] = json.loads(process.ask(asked.encode(), seconds + _TIMEOUT_S))
    return _Sample(times_ms, 1e3 * rows * len(times_ms) / sum(times_ms), others())


def _ask_daemon(client: Client, pid: int, name: str, outstanding: int, seconds: float) -> _Sample:
    inputs = NETWORKS[name].example()
    done: queue.SimpleQueue[float] = queue.SimpleQueue()
    times_ms: list[float] = []

    def send() -> None:
        began = time.perf_counter()
        client.submit(inputs, model=name).add_done_callback(
            lambda future: done.put(1e3 * (time.perf_counter() - began) if future.exception() is None else -1.0)
        )

    def receive() -> None:
        millis = done.get(timeout=_TIMEOUT_S)
        if millis < 0:
            raise BenchError(f"a request to {name} failed")
        times_ms.append(millis)

    for _ in range(outstanding):
        send()
    for _ in range(outstanding):  # from nothing at all to batches on all lanes takes as long as a batch or two
        receive()
        send()
    times_ms.clear()
    with _others(pid) as others:
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not times_ms:
            receive()
            send()
        counted = len(times_ms)
    for _ in range(outstanding):
        receive()
    return _Sample(times_ms[:counted], counted / elapsed, others())


@contextlib.contextmanager
def _others(pid: int) -> Iterator[Callable[[], float]]:
    """Cores that others than this process and another one use in the block, known when it is over."""

    def used() -> tuple[float, float]:
        own = time.process_time_ns() + (cpu_ns(pid) or 0)
        return time.perf_counter(), ((machine_cpu_ns() or own) - own) / 1e9

    began, before = used()
    found = [0.0]
    yield lambda: found[0]
    ended, after = used()
    found[0] = max(after - before, 0.0) / (ended - began)


# --- measurements --------------------------------------------------------------------------------------------


def _examine(name: str, daemons: dict[str, tuple[str, int]], rounds: int, seconds: float) -> Finding:
    """Measure one network with all contenders, in turns."""
    network = NETWORKS[name]
    one: dict[str, list[_Sample]] = {label: [] for label in (*daemons, PROCESS)}
    many: dict[str, list[_Sample]] = {label: [] for label in (*daemons, BEST)}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(ChildProcess("plain torch", [str(_HERE / "inprocess.py"), name]))
        process.ready()
        clients = {
            label: stack.enter_context(Client(endpoint, timeout=_TIMEOUT_S)) for label, (endpoint, _) in daemons.items()
        }
        for label, client in clients.items():
            _ask_daemon(client, daemons[label][1], name, 1, _PROBE_SECONDS)
            _ask_daemon(client, daemons[label][1], name, _OUTSTANDING, _PROBE_SECONDS)
        choices = [(threads, rows) for threads in _THREADS for rows in _ROWS]
        speeds: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
        for _ in range(_PROBES):
            for choice in choices:
                speeds[choice].append(_ask_process(process, *choice, _PROBE_SECONDS).per_s)
        best = max(choices, key=lambda choice: statistics.median(speeds[choice]))

        def measure(label: str) -> None:
            if label == PROCESS:
                one[PROCESS].append(_ask_process(process, 0, 1, seconds))
                many[BEST].append(_ask_process(process, *best, seconds))
            else:
                pid = daemons[label][1]
                one[label].append(_ask_daemon(clients[label], pid, name, 1, seconds))
                many[label].append(_ask_daemon(clients[label], pid, name, _OUTSTANDING, seconds))

        for _, label in in_turns([*daemons, PROCESS], rounds):
            measure(label)
    before = BEFORE in daemons
    return Finding(
        network.title,
        {label: _cell(samples, 0, 1) for label, samples in one.items()},
        {label: _cell(samples, *(best if label == BEST else (0, 1))) for label, samples in many.items()},
        latency=_ratio(one[DAEMON], one[PROCESS], lambda mine, other: (mine.p50_ms - _MOMENT_MS) / other.p50_ms),
        rate=_ratio(many[DAEMON], many[BEST], lambda mine, other: mine.per_s / other.per_s),
        sooner=_ratio(one[DAEMON], one[BEFORE], lambda mine, other: mine.p50_ms / other.p50_ms) if before else None,
        faster=_ratio(many[DAEMON], many[BEFORE], lambda mine, other: mine.per_s / other.per_s) if before else None,
    )


def _cell(samples: Sequence[_Sample], threads: int, rows: int) -> Cell:
    times_ms = sorted(millis for sample in samples for millis in sample.times_ms)
    return Cell(
        statistics.median(sample.p50_ms for sample in samples),
        times_ms[int(0.99 * len(times_ms))],
        statistics.median(sample.per_s for sample in samples),
        statistics.median(sample.others for sample in samples),
        threads,
        rows,
    )


def _ratio(mine: Sequence[_Sample], other: Sequence[_Sample], how: Callable[[_Sample, _Sample], float]) -> Ratio:
    ratios = sorted(how(*pair) for pair in zip(mine, other, strict=True))
    return Ratio(statistics.median(ratios), ratios[0], ratios[-1])


def _beside(label: str, endpoint: str, pid: int, rounds: int, seconds: float) -> Beside:
    """Ask the small network at a steady pace, alone and beside a large one, by turns."""
    alone: list[_Sample] = []
    beside: list[_Sample] = []
    with Client(endpoint, timeout=_TIMEOUT_S) as client:
        for _ in range(rounds):
            alone.append(_ask_at_pace(client, seconds))
            load = ChildProcess("load", [str(_HERE / "saturate.py"), endpoint, "resnet50", "8"])
            with load:
                load.ready()
                beside.append(_ask_at_pace(client, seconds))
    cells = _cell(alone, 0, 1), _cell(beside, 0, 1)
    return Beside(
        label,
        cells[0].p50_ms,
        cells[1].p50_ms,
        cells[0].p99_ms,
        cells[1].p99_ms,
        _ratio(beside, alone, lambda mine, other: mine.p50_ms / other.p50_ms),
    )


def _ask_at_pace(client: Client, seconds: float) -> _Sample:
    inputs = NETWORKS["mlp"].example()
    client.predict(inputs, model="mlp")
    times_ms = []
    due = time.perf_counter()
    until = due + seconds
    while due < until:
        time.sleep(max(due - time.perf_counter(), 0.0))
        began = time.perf_counter()
        client.predict(inputs, model="mlp")
        times_ms.append(1e3 * (time.perf_counter() - began))
        due += _PACE_S
    return _Sample(times_ms, len(times_ms) / seconds, 0.0)


# --- words ---------------------------------------------------------------------------------------------------


def _about() -> str:
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "a CPU")
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )


def _heading(before: bool) -> str:
    columns = f"{'p50 ms':>9}{'process':>9}{'ratio':>7}{'':>14}{'per s':>9}{'best':>9}{'ratio':>7}{'':>14}"
    if before:
        columns += f"{'before ms':>11}{'before/s':>10}{'sooner':>8}{'faster':>8}"
    return f"{'':<20}{'one outstanding':^39}{f'{_OUTSTANDING} outstanding':^39}\n{'network':<20}{columns}{'others':>8}"


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


def _beside_line(found: Beside) -> str:
    missed = "; missed" if found.ratio.median > _BESIDE else ""
    return (
        f"MLP, {found.contender}: p50 {found.alone_p50:.2f} ms alone, {found.beside_p50:.2f} beside ResNet-50, "
        f"{found.ratio.median:.2f} ({found.ratio.least:.2f}-{found.ratio.most:.2f}){missed}; "
        f"p99 {found.alone_p99:.2f} and {found.beside_p99:.2f}"
    )


if __name__ == "__main__":
    main()
