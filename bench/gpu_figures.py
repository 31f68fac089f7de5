"""Parts of `gpu.py` that measure: networks beside plain torch, one request at a time, and daemons with less."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import zmq

import clientload
import leanload
import report
from gpu_inprocess import Found
from gpu_networks import MLP, PICTURES_64, Array
from gpu_report import USUAL, Cell, Overhead, Speed, Switch
from gpu_run import CALL_S, SETTINGS, Daemon, Run
from loadgen import Connection, Context, closed_loop
from measurement import evaluate
from processes import BenchError
from report import ECHO
from rounds import in_turns
from targets import floor_targets, probe, start_floors
from tnxctl import Result
from tnxctl.protocol import wire
from workload import Workload

_LEAN_BYTES = 1 << 18
"""Requests up to here come from a lean client over TCP, since the public one would be what is measured. Larger ones
come from that one, over ipc, through memory that it shares with the daemon."""

_BATCHES = 4  # under way when the rate is measured
_MOST_OUTSTANDING = 128
_PROBE_SECONDS = 0.15
_DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


class Stages(NamedTuple):
    """Report of a daemon about one request: microseconds on the device, and the rows of its batch."""

    h2d_us: float
    forward_us: float
    d2h_us: float
    rows: int


class Load(NamedTuple):
    """A closed loop. Attributes: p50_ms: of the requests. per_s: rows. stages: of the requests."""

    p50_ms: float
    per_s: float
    stages: list[Stages]

    def median(self, stage: str) -> float:
        return float(statistics.median(getattr(each, stage) for each in self.stages))


def _stages(reply: Result | wire.Result) -> Stages:
    return Stages(reply.timing.h2d_us, 1e3 * reply.latency_ms, reply.timing.d2h_us, reply.batch_size)


def ask(run: Run, daemon: Daemon, name: str, rows: int, outstanding: int, seconds: float) -> Load:
    """Keep so many requests of so many rows outstanding.

    Raises:
        BenchError: one failed, or there was no answer.
    """
    inputs = run.networks[name].example(rows)
    nbytes = sum(array.nbytes for array in inputs.values())
    stages: list[Stages] = []
    if nbytes <= _LEAN_BYTES:
        lean = leanload.closed_loop(daemon.tcp, name, inputs, outstanding, seconds)
        times_ms, per_s = lean.times_ms, len(lean.times_ms) / lean.seconds
        stages = [_stages(reply) for reply in lean.replies]
    else:
        patience = run.patience(seconds + CALL_S)
        times_ms, per_s = clientload.closed_loop(
            daemon.client, name, inputs, outstanding, seconds, patience, lambda result: stages.append(_stages(result))
        )
    return Load(statistics.median(times_ms), rows * per_s, stages)


# --- networks ------------------------------------------------------------------------------------------------


def network(run: Run, name: str, sizes: Sequence[int] = ()) -> None:
    """Measure a network, in requests of all its sizes or of these."""
    asked = run.networks[name]
    daemon = run.best()
    speed = run.report.speeds[name] = Speed(asked.title, _difference(run, daemon, name))
    run.save()
    for rows in sizes or asked.rows:
        if not run.fits(6 * run.lengths.rounds * run.lengths.seconds, f"{rows} rows"):
            continue
        try:
            speed.cells.append(_cell(run, daemon, name, rows))
        except BenchError as error:
            run.notes.append(f"{rows} rows: {error}")
            daemon = run.best()
        run.save()


def _difference(run: Run, daemon: Daemon, name: str) -> float:
    """Largest difference of the daemon's answer from plain torch's, of the largest value of that."""
    rows = run.networks[name].rows[min(1, len(run.networks[name].rows) - 1)]
    theirs = np.array(run.own(name, rows, "answer").output)
    mine = daemon.client.predict(run.networks[name].example(rows), model=name).output.ravel()
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def _cell(run: Run, daemon: Daemon, name: str, rows: int) -> Cell:
    seconds, most = run.lengths.seconds, run.networks[name].rows[-1]
    outstanding = min(max(_BATCHES * most // rows, _BATCHES), _MOST_OUTSTANDING)
    ask(run, daemon, name, rows, 1, _PROBE_SECONDS / 2)
    batch = round(ask(run, daemon, name, rows, outstanding, _PROBE_SECONDS).median("rows"))
    forward, replayed = _forwards(run, name, rows)
    in_batch = _fastest(_forwards(run, name, batch) if batch != rows else (forward, replayed))
    graph = _is_faster_with_graph(run, name, batch)
    alone: list[Load] = []
    loaded: list[Load] = []
    own: list[float] = []
    for _, who in in_turns(("alone", "loaded", "own"), run.lengths.rounds):
        if who == "alone":
            alone.append(ask(run, daemon, name, rows, 1, seconds / 2))
        elif who == "loaded":
            loaded.append(ask(run, daemon, name, rows, outstanding, seconds))
        else:
            own.append(run.own(name, batch, "pipeline", seconds, graph=graph).rows_per_s)
    rates = [load.per_s for load in loaded]
    with _utilization() as sampled:
        ask(run, daemon, name, rows, outstanding, seconds)
    return Cell(
        rows=rows,
        outstanding=outstanding,
        batch=batch,
        p50_ms=statistics.median(load.p50_ms for load in alone),
        h2d_us=statistics.median(load.median("h2d_us") for load in alone),
        forward_us=statistics.median(load.median("forward_us") for load in alone),
        d2h_us=statistics.median(load.median("d2h_us") for load in alone),
        per_s=statistics.median(rates),
        own_per_s=statistics.median(own),
        share=report.ratio(rates, own),
        own_forward_us=forward.forward_us,
        own_graph_us=0.0 if replayed is None else replayed.forward_us,
        busy=statistics.median(rates) / batch * in_batch / 1e6,
        utilization=statistics.mean(sampled) / 100 if sampled else None,
    )


def _forwards(run: Run, name: str, rows: int) -> tuple[Found, Found | None]:
    """Forwards of plain torch, called and replayed; None where they cannot be captured."""
    called = run.own(name, rows, "forward", _PROBE_SECONDS)
    try:
        return called, run.own(name, rows, "forward", _PROBE_SECONDS, graph=True)
    except BenchError as error:
        run.notes.append(str(error))
        return called, None


def _fastest(forwards: tuple[Found, Found | None]) -> float:
    return min(each.forward_us for each in forwards if each is not None)


def _is_faster_with_graph(run: Run, name: str, rows: int) -> bool:
    """Whether the pipeline in a process is faster with graphs: what the daemon is held against is the best there is."""
    called = run.own(name, rows, "pipeline", _PROBE_SECONDS).rows_per_s
    try:
        return run.own(name, rows, "pipeline", _PROBE_SECONDS, graph=True).rows_per_s > called
    except BenchError as error:
        run.notes.append(str(error))
        return False


@contextlib.contextmanager
def _utilization() -> Iterator[list[float]]:
    """Percentages that the driver samples in the block, known when it is over; none where it cannot be asked."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "50"]
    found: list[float] = []
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        except OSError:
            yield found
            return
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        said.seek(0)
        lines = [line.strip() for line in said if line.strip().isdigit()]
        found += [float(line) for line in lines[len(lines) // 3 :]]  # it looks back: the first are of what was before


# --- one request at a time -----------------------------------------------------------------------------------


def lone(run: Run) -> None:
    """One request of one row at a time, beside an echo of the same bytes: what the daemon adds to the device's time."""
    daemon = run.best()
    with contextlib.ExitStack() as stack:
        context: Context = stack.enter_context(zmq.Context())
        for name, key in ((MLP, "mlp"), (PICTURES_64, "resnet50")):
            if run.fits(4 * run.lengths.rounds * run.lengths.seconds, run.networks[name].title):
                run.report.overheads[key] = _overhead(run, daemon, context, name)
                run.save()


def _overhead(run: Run, daemon: Daemon, context: Context, name: str) -> Overhead:
    ((input_name, array),) = run.networks[name].example(1).items()
    outputs: list[Array] = [np.empty((1, *run.networks[name].output), np.float32)]  # nobody looks at them
    workload = Workload(
        name, input_name, [array], outputs, tolerance=0.0, prefer_gpu=True, datatype=_DATATYPES[str(array.dtype)]
    )
    answer = probe(context, daemon.tcp, workload)
    latency: list[float] = []
    device: list[float] = []
    echo: list[float] = []
    with contextlib.ExitStack() as stack:
        (floor,) = floor_targets(start_floors(stack, names=[ECHO]), [answer])
        for _, endpoint in in_turns((daemon.tcp, floor.endpoint), run.lengths.rounds):
            with Connection(context, endpoint, workload) as connection:
                closed_loop(connection, 1, run.lengths.seconds / 4)
                recording = closed_loop(connection, 1, run.lengths.seconds)
            found = evaluate(recording, workload, check=False)
            if found.errors:
                raise BenchError(f"{name}: {dict(found.errors)}")
            if endpoint == floor.endpoint:
                echo.append(float(np.median(found.latency_us)))
            else:
                latency.append(float(np.median(found.latency_us)))
                device.append(float(np.median(found.device_us)))
    over = statistics.median(a - b - c for a, b, c in zip(latency, device, echo, strict=True))
    title = run.networks[name].title
    return Overhead(title, statistics.median(latency), statistics.median(device), statistics.median(echo), over)


# --- daemons with less ---------------------------------------------------------------------------------------


def switches(run: Run) -> None:
    """The same requests to daemons without graphs, without overlap and without both."""
    daemons = run.all_served([*SETTINGS])
    most = run.networks[PICTURES_64].rows[-1]
    cases = {
        "MLP, 1 row at a time": (MLP, 1, 1),
        "ResNet-50, 1 row at a time": (PICTURES_64, 1, 1),
        f"ResNet-50, {most} rows, {2 * _BATCHES} outstanding": (PICTURES_64, most, 2 * _BATCHES),
    }
    rates: dict[str, dict[str, list[float]]] = {settings: {} for settings in daemons}
    for title, case in cases.items():
        if not run.fits(6 * run.lengths.rounds * run.lengths.seconds, title):
            continue
        for daemon in daemons.values():
            ask(run, daemon, *case, _PROBE_SECONDS)
        for _, settings in in_turns([*daemons], run.lengths.rounds):
            load = ask(run, daemons[settings], *case, run.lengths.seconds)
            rates[settings].setdefault(title, []).append(load.per_s)
    run.report.switches = [
        Switch(
            settings,
            {title: statistics.median(each) for title, each in found.items()},
            {title: report.ratio(each, rates[USUAL][title]) for title, each in found.items()},
        )
        for settings, found in rates.items()
        if found
    ]
