"""`python bench/models.py`: networks of real size on a CPU, served and in a process of their own. --help says more."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import msgspec

import clientload
import leanload
import network_peers
import real_networks
from contenders import ENVIRONMENTS, versions
from models_report import (
    BEFORE,
    BEST,
    DAEMON,
    LEAN,
    MOMENT_MS,
    OUTSTANDING,
    PROCESS,
    Ahead,
    Beside,
    Cell,
    Finding,
    Ratio,
    Report,
    beside_line,
    completed,
    heading,
    lines,
)
from network_peers import CONTENDERS, NetworkPeer, Setup
from processes import BenchError, ChildProcess, cpu_ns, machine_cpu_ns
from real_networks import NETWORKS
from rounds import in_turns
from tnxctl import Client

_HERE = Path(__file__).resolve().parent
_LOAD_SECONDS = 1200.0  # of all networks; to compile and to compare one takes a minute or two
_THREADS = (1, 0)  # of plain torch; 0 is its default, a thread for each core
_ROWS = (1, 4, 16)
_PROBE_SECONDS = 0.4
_PROBES = 2
_PACE_S = 0.02  # between two requests to the small network beside a large one
_TIMEOUT_S = 60.0


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
@click.option("--dtype", default="", help="For model.toml: what the daemon computes in, as bfloat16.")
@click.option(
    "--option", "options", multiple=True, help="Line for the daemon's tnxd.toml, as 'cpu.scheduling = \"idle\"'."
)
@click.option("--no-peers", is_flag=True, help="Leave out mosec and LitServe even where they are built.")
@click.option(
    "--environments",
    type=click.Path(file_okay=False, path_type=Path),
    default=ENVIRONMENTS,
    help="Where the environments of the peers are.  [default: build/peers]",
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
    dtype: str,
    options: Sequence[str],
    no_peers: bool,
    environments: Path,
    no_beside: bool,
    only_beside: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Ask networks of real size for one row at a time, with 1 and 16 requests outstanding.

    Contenders take turns in every round: the daemon, the one of another tree, and plain torch in a process, with its
    default threads; and, of all numbers of threads and batch sizes, those with the most rows per second. So do mosec
    and LitServe where `make bench-peers` has built them, each in the setups that were tried and found the fastest, one
    for each number outstanding. Ratios are taken within a round, since the machine drifts. Then the small network is
    asked 50 times a second, alone and while ResNet-50 has 8 requests outstanding.
    """
    names = list(names or NETWORKS)
    findings: list[Finding] = []
    beside: list[Beside] = []
    peers, missing = network_peers.built(environments)
    if no_peers or only_beside:
        peers, missing = {}, {}
    found_versions = {label: versions(CONTENDERS[label], python) for label, python in peers.items()}

    def save() -> Report:
        report = Report(" ".join(sys.argv), _about(), findings, beside, found_versions, missing)
        if json_path is not None:
            report = completed(report, json_path)
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        return report

    with contextlib.ExitStack() as stack:
        served = names if no_beside else list(dict.fromkeys([*names, "resnet50", "mlp"]))
        try:
            daemons = {DAEMON: _daemon(stack, _HERE.parent, served, (optimize, dtype), options)}
            if tree is not None:
                daemons[BEFORE] = _daemon(stack, tree.resolve(), served, (optimize, dtype), ())
            click.echo(heading(tree is not None))
            for name in () if only_beside else names:
                findings.append(_examine(name, daemons, peers, missing, rounds, seconds))
                for line in lines(findings[-1]):
                    click.echo(line)
                save()
            for label, reason in missing.items():
                click.echo(f"{label}: not measured, {reason}")
            if not no_beside:
                beside = [_beside(label, *daemon, rounds, seconds) for label, daemon in daemons.items()]
                for one in beside:
                    click.echo(beside_line(one))
        except BenchError as error:
            raise click.ClickException(str(error)) from None
    report = save()
    if plot_path is not None:
        from network_pictures import draw_models

        draw_models(report.findings, report.about, plot_path)


# --- contenders ----------------------------------------------------------------------------------------------


def _daemon(
    stack: contextlib.ExitStack, tree: Path, names: Sequence[str], program: tuple[str, str], options: Sequence[str]
) -> tuple[str, int]:
    """Endpoint and process id of a daemon that is ready, of the sources in a directory.

    Args:
        program: `optimize` and `dtype` of the networks.
    """
    optimize, dtype = program
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx-models-")))
    settings = (tree / "tnxd" / "models" / "settings.py").read_text(encoding="utf-8")
    real_networks.publish(folder / "models", list(names), optimize if "    optimize:" in settings else "", dtype)
    (folder / "tnxd.toml").write_text("\n".join(options) + "\n", encoding="utf-8")
    arguments = ["-m", "tnxd", "--config", str(folder / "tnxd.toml"), "--bind", "tcp://127.0.0.1:*"]
    arguments += ["--model-repository", str(folder / "models"), "--devices", "cpu", "--log-level", "warning"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    child = stack.enter_context(ChildProcess("tnxd", arguments, environment=environment))
    ready = child.hear(_LOAD_SECONDS, "was not ready", "ended before it was ready")
    return ready.split("ready on ", 1)[1].split(";")[0], child.pid


def _start_peers(
    stack: contextlib.ExitStack, label: str, python: Path, name: str, output: network_peers.Array
) -> dict[int, NetworkPeer]:
    """The fastest servers of a peer, by the number of requests outstanding.

    Args:
        output: the right answer to the network's example.
    """
    body = network_peers.body(NETWORKS[name].example())
    packages = network_peers.packages()

    def start(workers: int, threads: int, rows: int) -> NetworkPeer:
        setup = Setup(name, workers, threads, rows, packages=packages)
        return NetworkPeer(CONTENDERS[label], python, setup, [body], [output])

    cores, most_rows = len(os.sched_getaffinity(0)), NETWORKS[name].max_batch
    one, many = network_peers.fastest(stack, start, cores, OUTSTANDING, most_rows, _PROBE_SECONDS)
    return {1: one, OUTSTANDING: many}


def _ask_process(process: ChildProcess, threads: int, rows: int, seconds: float) -> _Sample:
    asked = json.dumps({"threads": threads, "rows": rows, "seconds": seconds}) + "\n"
    with _others(lambda: cpu_ns(process.pid)) as others:
        times_ms: list[float] = json.loads(process.ask(asked.encode(), seconds + _TIMEOUT_S))
    return _Sample(times_ms, 1e3 * rows * len(times_ms) / sum(times_ms), others())


def _ask_peer(peer: NetworkPeer, outstanding: int, seconds: float) -> _Sample:
    with _others(peer.cpu_ns) as others:
        loop = peer.ask(outstanding, seconds)
    return _Sample(loop.latencies_ms, loop.per_s, others())


def _ask_daemon(client: Client, pid: int, name: str, outstanding: int, seconds: float) -> _Sample:
    with _others(lambda: cpu_ns(pid)) as others:
        found = clientload.closed_loop(client, name, NETWORKS[name].example(), outstanding, seconds, _TIMEOUT_S)
    return _Sample(found.times_ms, found.per_s, others())


def _ask_leanly(endpoint: str, pid: int, name: str, outstanding: int, seconds: float) -> _Sample:
    with _others(lambda: cpu_ns(pid)) as others:
        times_ms, lasted, _ = leanload.closed_loop(endpoint, name, NETWORKS[name].example(), outstanding, seconds)
    return _Sample(times_ms, len(times_ms) / lasted, others())


@contextlib.contextmanager
def _others(asked_ns: Callable[[], int | None]) -> Iterator[Callable[[], float]]:
    """Cores that others than this process and the one that is asked use in the block, known when it is over.

    Args:
        asked_ns: CPU time of that one so far.
    """

    def used() -> tuple[float, float]:
        own = time.process_time_ns() + (asked_ns() or 0)
        return time.perf_counter(), ((machine_cpu_ns() or own) - own) / 1e9

    began, before = used()
    found = [0.0]
    yield lambda: found[0]
    ended, after = used()
    found[0] = max(after - before, 0.0) / (ended - began)


# --- measurements --------------------------------------------------------------------------------------------


def _examine(
    name: str,
    daemons: dict[str, tuple[str, int]],
    pythons: dict[str, Path],
    missing: dict[str, str],
    rounds: int,
    seconds: float,
) -> Finding:
    """Measure one network with all contenders, in turns.

    Args:
        pythons: of the peers that are to take part. missing: gets those that cannot, and why.
    """
    network = NETWORKS[name]
    one: dict[str, list[_Sample]] = {label: [] for label in (*daemons, PROCESS)}
    many: dict[str, list[_Sample]] = {label: [] for label in (*daemons, BEST)}
    peers: dict[str, dict[int, NetworkPeer]] = {}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(ChildProcess("plain torch", [str(_HERE / "inprocess.py"), name]))
        process.ready()
        clients = {
            label: stack.enter_context(Client(endpoint, timeout=_TIMEOUT_S)) for label, (endpoint, _) in daemons.items()
        }
        for label, client in clients.items():
            _ask_daemon(client, daemons[label][1], name, 1, _PROBE_SECONDS)
            _ask_daemon(client, daemons[label][1], name, OUTSTANDING, _PROBE_SECONDS)
        choices = [(threads, rows) for threads in _THREADS for rows in _ROWS]
        speeds: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
        for _ in range(_PROBES):
            for choice in choices:
                speeds[choice].append(_ask_process(process, *choice, _PROBE_SECONDS).per_s)
        best = max(choices, key=lambda choice: statistics.median(speeds[choice]))
        output = clients[DAEMON].predict(network.example(), model=name).output
        for label, python in pythons.items():
            try:
                peers[label] = _start_peers(stack, label, python, name, output)
            except BenchError as error:
                missing[f"{label}, {network.title}"] = str(error)

        def measure(label: str) -> tuple[_Sample, _Sample]:
            if label == PROCESS:
                return _ask_process(process, 0, 1, seconds), _ask_process(process, *best, seconds)
            if label in peers:
                first, last = (_ask_peer(peer, outstanding, seconds) for outstanding, peer in peers[label].items())
                return first, last
            if label == LEAN:
                first, last = (_ask_leanly(*daemons[DAEMON], name, each, seconds) for each in (1, OUTSTANDING))
                return first, last
            client, pid = clients[label], daemons[label][1]
            return _ask_daemon(client, pid, name, 1, seconds), _ask_daemon(client, pid, name, OUTSTANDING, seconds)

        for _, label in in_turns([*daemons, PROCESS, *([LEAN] if peers else []), *peers], rounds):
            if f"{label}, {network.title}" in missing:
                continue
            try:
                samples = measure(label)
            except BenchError as error:
                if label not in peers:
                    raise
                missing[f"{label}, {network.title}"] = str(error)
                one.pop(label, None)
                many.pop(label, None)
                continue
            one.setdefault(label, []).append(samples[0])
            many.setdefault(BEST if label == PROCESS else label, []).append(samples[1])
    setups = {label: [peer.setup for peer in each.values()] for label, each in peers.items() if label in one}
    of_one = {label: setup for label, (setup, _) in setups.items()}
    of_many = {label: setup for label, (_, setup) in setups.items()} | {BEST: Setup(name, 1, *best)}
    before = BEFORE in daemons
    return Finding(
        network.title,
        {label: _cell(samples, of_one.get(label)) for label, samples in one.items()},
        {label: _cell(samples, of_many.get(label)) for label, samples in many.items()},
        latency=_ratio(one[DAEMON], one[PROCESS], lambda mine, other: (mine.p50_ms - MOMENT_MS) / other.p50_ms),
        rate=_ratio(many[DAEMON], many[BEST], _rates),
        sooner=_ratio(one[DAEMON], one[BEFORE], _latencies) if before else None,
        faster=_ratio(many[DAEMON], many[BEFORE], _rates) if before else None,
        ahead={
            label: Ahead(
                _ratio(one[LEAN], one[label], _latencies),
                _ratio(many[LEAN], many[label], _rates),
            )
            for label in setups
        },
    )


def _cell(samples: Sequence[_Sample], setup: Setup | None = None) -> Cell:
    times_ms = sorted(millis for sample in samples for millis in sample.times_ms)
    return Cell(
        statistics.median(sample.p50_ms for sample in samples),
        times_ms[int(0.99 * len(times_ms))],
        statistics.median(sample.per_s for sample in samples),
        statistics.median(sample.others for sample in samples),
        *((setup.threads, setup.rows, setup.workers) if setup is not None else ()),
    )


def _latencies(mine: _Sample, other: _Sample) -> float:
    return mine.p50_ms / other.p50_ms


def _rates(mine: _Sample, other: _Sample) -> float:
    return mine.per_s / other.per_s


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
    cells = _cell(alone), _cell(beside)
    return Beside(
        label,
        cells[0].p50_ms,
        cells[1].p50_ms,
        cells[0].p99_ms,
        cells[1].p99_ms,
        _ratio(beside, alone, _latencies),
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


def _about() -> str:
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "a CPU")
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
