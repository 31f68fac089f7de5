"""`tnxctl bench`: what it measures of real daemons and fakes, how it ends, and the search by itself."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import Daemon
from fake_daemon import MLP, TIMING, FakeDaemon, Outputs, row_sums
from tnxctl import session, wire
from tnxctl.cli import bench as command
from tnxctl.cli.bench import lines, runs
from tnxctl.cli.bench.recording import LOST, OUTSIDE, Load, Recording, Step, grown
from tnxctl.cli.exits import Exit
from tnxctl.errors import Internal, ResourceExhausted, Unavailable
from tool import ask, fields, run

TOOL = [sys.executable, "-m", "tnxctl.cli"]
PATIENCE_S = 30.0  # far more than any of these takes: only so that nothing waits for ever
SHORT = ("--seconds", "100ms", "--warm-up", "20ms")

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as running:
        yield running


# --- what is measured ----------------------------------------------------------------------------------------


def test_a_sweep_and_rates_at_a_real_daemon(daemon: Daemon) -> None:
    result = run("bench", "--host", daemon.endpoint, "--concurrency", "1,4", "--rate", "200", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout.splitlines()
    assert text[0].startswith("mlp version 1 on cpu, input [1,256]; 100 ms for each line after 20 ms of warm-up")
    assert text[2].split("  ")[0] == "LOAD"
    assert [line.split("  ")[0] for line in text[3:6]] == ["1 at a time", "4 at a time", "200/s"]
    assert all(line.endswith("  -") for line in text[3:6]), "no errors"
    stages = text[7].split()
    assert stages[2:11] == ["RECEIVE", "QUEUE", "GATHER", "H2D", "COMPUTE", "D2H", "REPLY", "TOTAL", "OUTSIDE"]
    assert [line.split("  ")[0] for line in text[8:11]] == ["1 at a time", "4 at a time", "200/s"]


def test_the_document_of_a_real_daemon(daemon: Daemon) -> None:
    result = run(
        "bench", "--host", daemon.endpoint, "--model", "digits", "--rows", "3", "--concurrency", "2", "--rate", "300",
        "--json", *SHORT,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    document = fields(result)
    assert (document["model"], document["version"], document["interrupted"]) == ("digits", "1", False)
    assert list(document["settings"]["inputs"].values()) == [[3, 64]]
    closed, opened = document["steps"]
    assert (closed["concurrency"], closed["rate_per_s"]) == (2, None)
    assert (opened["concurrency"], opened["rate_per_s"]) == (None, 300.0)
    assert closed["late_us"] == {}
    assert set(opened["late_us"]) == {"p99", "max"}
    for step in (closed, opened):
        assert step["requests"] == step["answered"] == step["devices"]["cpu"] > 0
        assert (step["failed"], step["unknown"], step["errors"]) == (0, 0, [])
        times = step["latency_us"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["p99.9"] <= times["max"]
        assert times["p99"] == step["p99_of_all_us"]
        assert step["batch_size_mean"] >= 3
        stages = step["stage_means_us"]
        whole = stages.pop("total")
        stages.pop(OUTSIDE)
        assert sum(stages.values()) == pytest.approx(whole, rel=1e-3)
        assert step["client_cpu_us"] > 0
    assert closed["grew_most"] is None


def test_a_search_at_a_real_daemon(daemon: Daemon) -> None:
    result = run("bench", "--host", daemon.endpoint, "--p99-under", "1us", "--json", *SHORT)
    assert (result.exit_code, result.stderr) == (0, ""), "what a search is refused is no failure"
    document = fields(result)
    found = document["search"]
    assert (found["p99_under_us"], found["finished"], found["rate_per_s"]) == (1.0, True, None)
    rates = [step["rate_per_s"] for step in document["steps"]]
    assert rates[0] is None, "one at a time, to begin with"
    assert set(Counter(rates[1:]).values()) <= {2, 3}, "a rate is too high if it is so more than once"
    assert rates[-1] == found["too_high_per_s"]


def test_a_search_says_what_it_found(fake: FakeDaemon) -> None:
    result = ask(fake, "bench", "--p99-under", "1us", *SHORT)
    assert result.exit_code == 0
    assert "UNDER 1 us" in result.stdout
    assert "No rate was found whose p99 stays under 1 us: " in result.stdout.splitlines()[-1]


def test_options_reach_the_daemon(fake: FakeDaemon) -> None:
    arguments = ("--model", "digits@3", "--rows", "5", "--device", "auto", "--deadline", "2s", "--priority", "0")
    result = ask(fake, "bench", *arguments, "--concurrency", "3", *SHORT)
    assert result.exit_code == 0
    assert "image [5,64], deadline 2 s, priority 0" in result.stdout
    probe, *load = fake.predicts
    assert (probe.deadline_us, probe.model) == (None, "digits@3")
    assert load
    assert {(r.model, r.device, r.deadline_us, r.priority) for r in load} == {("digits@3", "auto", 2e6, 0)}
    stamps = [request.sent_us for request in load]
    assert None not in stamps
    assert len({request.id for request in load}) == len(load)
    assert {array.shape for inputs in fake.inputs for array in inputs.values()} == {(5, 64)}


def test_requests_without_a_deadline_have_no_clock(fake: FakeDaemon) -> None:
    assert ask(fake, "bench", "--concurrency", "1", *SHORT).exit_code == 0
    assert {(request.deadline_us, request.sent_us) for request in fake.predicts} == {(None, None)}


def test_given_inputs(fake: FakeDaemon, tmp_path: Path) -> None:
    scans = np.arange(128, dtype=np.float64).reshape(2, 64)
    np.save(tmp_path / "scans.npy", scans)
    arguments = ("--model", "digits", "--input", tmp_path / "scans.npy", "--cast", "--rate", "100")
    assert ask(fake, "bench", *arguments, *SHORT).exit_code == 0
    assert fake.inputs
    for inputs in fake.inputs:
        (array,) = inputs.values()
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, scans)


def test_large_inputs_are_lent(fake: FakeDaemon) -> None:
    assert ask(fake, "bench", "--rows", "300", "--concurrency", "1", *SHORT).exit_code == 0
    first, *others = (inputs["input"] for inputs in fake.inputs)
    assert first.nbytes >= 256 * 1024
    assert others
    assert all(np.array_equal(first, other) for other in others)


# --- errors --------------------------------------------------------------------------------------------------


def failing(error: Exception, when: Callable[[int], bool]) -> Callable[[wire.Predict, Outputs], Outputs]:
    """The computation of a fake that fails the nth request, from 0, where `when` says so."""
    numbers = itertools.count()

    def compute(request: wire.Predict, inputs: Outputs) -> Outputs:
        if when(next(numbers)):
            raise error
        return row_sums(request, inputs)

    return compute


def test_errors_are_counted_by_code() -> None:
    compute = failing(ResourceExhausted("the queue is full"), lambda number: number % 2 == 1)
    with FakeDaemon(compute=compute) as fake:
        result = ask(fake, "bench", "--concurrency", "1", "--json", *SHORT)
    assert result.exit_code == Exit.FAILED
    assert "requests failed: RESOURCE_EXHAUSTED " in result.stderr
    (step,) = fields(result)["steps"]
    (found,) = step["errors"]
    assert (found["code"], found["message"]) == ("RESOURCE_EXHAUSTED", "the queue is full")
    assert found["count"] == step["failed"] > 0
    assert step["answered"] + step["failed"] == step["requests"]
    assert step["p99_of_all_us"] is None, "more than one in a hundred has no result"


def test_what_errors_said_stands_below() -> None:
    with FakeDaemon(compute=failing(Internal("it met a NaN"), lambda number: number > 0)) as fake:
        result = ask(fake, "bench", "--concurrency", "1", *SHORT)
    assert result.exit_code == Exit.FAILED, "INTERNAL alone is that, too"
    assert result.stdout.splitlines()[-1] == "INTERNAL: it met a NaN"


@pytest.mark.parametrize("load", [("--concurrency", "2,4"), ("--rate", "500,1000")])
def test_a_daemon_that_takes_no_more_ends_the_run(load: tuple[str, str]) -> None:
    with FakeDaemon(compute=failing(Unavailable("it is draining"), lambda number: number > 20)) as fake:
        result = ask(fake, "bench", *load, "--json", "--seconds", "60s", "--warm-up", "0")
    assert result.exit_code == Exit.UNREACHABLE
    assert result.stderr == "Error: it is draining\n"
    document = fields(result)
    (step,) = document["steps"]
    assert step["answered"] == 20
    assert document["error"] == {"code": "UNAVAILABLE", "message": "it is draining", "exit_code": Exit.UNREACHABLE}


def test_a_request_that_cannot_work_ends_it_at_once(fake: FakeDaemon) -> None:
    result = ask(fake, "bench", "--input", "[[1, 2, 3]]")
    assert (result.exit_code, result.stdout) == (Exit.REFUSED, "")
    assert "shape [1, 3] does not fit mlp" in result.stderr
    assert len(fake.predicts) == 1


def test_no_such_model(fake: FakeDaemon) -> None:
    result = ask(fake, "bench", "--model", "nobody", "--json")
    assert result.exit_code == Exit.REFUSED
    assert fields(result)["error"]["code"] == "NOT_FOUND"


def test_rows_of_a_model_without_a_batch_axis() -> None:
    with FakeDaemon(models=(msgspec.structs.replace(MLP, max_batch_size=0),)) as fake:
        result = ask(fake, "bench", "--rows", "2")
    assert result.exit_code == Exit.USAGE
    assert "--rows does not apply to model 'mlp'" in result.stderr


def test_nobody_there(tmp_path: Path) -> None:
    result = run("bench", "--host", f"ipc://{tmp_path}/nobody", "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (Exit.UNREACHABLE, "")


def test_a_daemon_that_says_nothing() -> None:
    with FakeDaemon(mute=True) as fake:
        assert ask(fake, "bench", "--timeout", "0.2").exit_code == Exit.TIMEOUT


@pytest.mark.parametrize(
    "arguments",
    [
        ("--concurrency", "0"),
        ("--concurrency", "1,two"),
        ("--concurrency", "1.5"),
        ("--concurrency", "65537"),
        ("--rate", "-1"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--rate", "100,"),
        ("--p99-under", "soon"),
        ("--p99-under", "0"),
        ("--p99-under", "10ms", "--rate", "100"),
        ("--p99-under", "10ms", "--concurrency", "1"),
        ("--rows", "2", "--input", "[[1]]"),
        ("--cast",),
        ("--seconds", "0"),
        ("--seconds", "2h"),
        ("--warm-up", "-1"),
        ("--plot", "latency.svg"),
    ],
    ids=" ".join,
)
def test_wrong_use(arguments: tuple[str, ...]) -> None:
    result = run("bench", *arguments)
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert "Error: " in result.stderr


def test_limits_are_those_of_the_client() -> None:
    assert command.MOST_OUTSTANDING == session.MAX_PENDING_CALLS
    assert command.HIGHEST_RATE == runs.HIGHEST_RATE


# --- ends ----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("load", [("--concurrency", "2,4"), ("--rate", "500"), ("--p99-under", "1s")])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_it_with_what_was_measured(load: tuple[str, str], number: signal.Signals, word: str) -> None:
    arguments = ["bench", *load, "--json", "--seconds", "600s", "--warm-up", "0"]
    with FakeDaemon(delay_s=0.002) as fake:
        process = started(fake, *arguments)
        assert fake.wait_for_predicts(50, PATIENCE_S)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert stderr.startswith(f"Error: {word} after ")
    assert stderr.count("\n") == 1
    document = json.loads(stdout)
    assert document["interrupted"] is True
    (step,) = document["steps"]
    assert 0 < step["answered"] == step["requests"] - step["unknown"]


def test_a_connection_that_breaks_ends_it_with_what_was_measured() -> None:
    with FakeDaemon() as fake:
        process = started(fake, "bench", "--concurrency", "2,4", "--seconds", "600s", "--warm-up", "0")
        assert fake.wait_for_predicts(50, PATIENCE_S)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == Exit.UNREACHABLE
    assert stderr == f"Error: {fake.endpoint}: the connection broke while predict was under way\n"
    assert "2 at a time" in stdout
    assert "GREW MOST" in stdout
    assert "4 at a time" not in stdout


def started(fake: FakeDaemon, *arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TNX_HOST"}
    return subprocess.Popen(
        [*TOOL, *arguments, "--host", fake.endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


# --- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [("--concurrency", "1,2", "--rate", "100,200"), ("--p99-under", "1us")])
def test_a_picture(fake: FakeDaemon, tmp_path: Path, load: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "latency.png"
    result = ask(fake, "bench", *load, "--plot", path, "--seconds", "30ms", "--warm-up", "0")
    assert result.exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(fake: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "latency.png"
    result = ask(fake, "bench", "--plot", path)
    assert (result.exit_code, result.stdout) == (Exit.FILE, "")
    assert f"cannot write {path}: matplotlib, which draws it, is not installed: pip install matplotlib" in result.stderr
    assert not path.exists()
    assert not fake.requests


def test_a_picture_that_cannot_be_written_is_told_first(fake: FakeDaemon, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = ask(fake, "bench", "--plot", tmp_path / "nowhere" / "latency.png")
    assert (result.exit_code, result.stdout) == (Exit.FILE, "")
    assert not fake.requests


# --- numbers -------------------------------------------------------------------------------------------------


def result_header(number: int, **changes: Any) -> bytes:
    timing = msgspec.structs.replace(TIMING, **changes)
    return wire.encode(
        wire.Result(
            v=1, id=number, model="mlp", version="1", outputs=(), device="cpu", reason="", batch_size=4,
            latency_ms=0.1, gpu_memory_mb=0.0, timing=timing,
        )
    )  # fmt: skip


def recorded(latencies_us: list[int], **changes: Any) -> Recording:
    """A recording of requests that were sent 5 µs late, with these latencies from when they were due."""
    recording = Recording()
    with recording.running():
        for number, latency_us in enumerate(latencies_us):
            recording.send(number, 0, 5_000)
            recording.take(result_header(number, **changes), latency_us * 1000)
    return recording


def test_percentiles_are_latencies_that_happened() -> None:
    step = recorded(list(range(1000, 0, -1))).step(Load(rate=10.0))
    assert step.latency_us == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "p99.9": 999.0, "max": 1000.0}
    assert step.late_us == {"p99": 5.0, "max": 5.0}
    assert (step.rows, step.devices) == (4.0, Counter(cpu=1000))
    assert step.stages_us[OUTSIDE] == pytest.approx(500.5 - 150.0)


def test_requests_without_a_result_are_later_than_any_other() -> None:
    recording = recorded([1] * 98)
    recording.give_up(1, LOST, "no answer")
    assert recording.step(Load(rate=10.0)).p99_of_all_us == inf
    recording = recorded([1] * 99)
    recording.give_up(1, LOST, "no answer")
    step = recording.step(Load(rate=10.0))
    assert (step.p99_of_all_us, step.requests, step.failed) == (1.0, 100, 1)


def test_a_result_after_its_deadline_is_an_error() -> None:
    recording = Recording(deadline_ns=1e6)
    recording.send(7, 0, 0)
    recording.take(result_header(7), 1_000_001)
    assert recording.errors == {"DEADLINE_EXCEEDED": 1}


def test_answers_to_earlier_requests_are_left_aside() -> None:
    recording = recorded([1])
    recording.take(result_header(99), 10)
    assert recording.step(Load(concurrency=1)).requests == 1


@pytest.mark.parametrize("header", [b"\xc1", wire.encode(wire.ModelsReport(v=1, id=0, models=()))])
def test_replies_that_are_none_end_it(header: bytes) -> None:
    with pytest.raises(Internal, match="predict got"):
        recorded([1]).take(header, 10)


def test_the_stage_that_grew() -> None:
    first = recorded([200]).step(Load(concurrency=1))
    queued = recorded([1200], queue_us=1020.0, total_us=1150.0).step(Load(concurrency=8))
    outside = recorded([700]).step(Load(concurrency=8))
    same = recorded([201]).step(Load(concurrency=2))
    assert grown(queued, first) == ("queue", 1000.0)
    assert grown(outside, first) == (OUTSIDE, 500.0)
    assert grown(same, first) is None, "by so little"
    assert grown(first, first) is None


# --- the search by itself ------------------------------------------------------------------------------------


class FakeBench:
    """Steps that were not measured: the p99 is 1 ms up to a rate, and 1 s beyond it.

    Attributes:
        tried: rates, in order.
    """

    def __init__(self, most: float, alone_per_s: float = 1000.0, seconds: float = 1.0, flukes: int = 0) -> None:
        self.tried: list[float] = []
        self.seconds = seconds
        self._most = most
        self._alone_per_s = alone_per_s
        self._flukes = flukes

    def measure(self, load: Load) -> Step:
        good = load.rate <= self._most
        if load.rate:
            self.tried.append(load.rate)
        if load.rate and good and self._flukes:
            self._flukes -= 1
            good = False
        step = recorded([1_000 if good else 1_000_000] * 100).step(load)
        return step if load.rate else replace(step, seconds=step.answered / self._alone_per_s)


def searched(bench: FakeBench) -> runs.Search:
    search = runs.Search(bench, 10_000.0)  # type: ignore[arg-type]  # it measures, which is all that is asked of it
    for _ in search:
        pass
    assert search.over
    return search


def test_rates_double_and_then_close_in() -> None:
    bench = FakeBench(3000.0)
    search = searched(bench)
    assert bench.tried == [500, 1000, 2000, 4000, 4000, 3000, 3500, 3500, 3250, 3250, 3120, 3120]
    assert search.best is not None
    assert (search.best.load.rate, search.too_high) == (3000, 3120)
    assert lines.answer(search) == "3000/s is the highest rate whose p99 stays under 10 ms; 3120/s is too high"


def test_rates_are_halved_where_the_first_is_too_high() -> None:
    search = searched(FakeBench(100.0))
    assert search.best is not None
    assert 95 <= search.best.load.rate <= 100
    assert search.too_high is not None
    assert 100 < search.too_high <= 106


def test_one_bad_step_is_no_verdict() -> None:
    bench = FakeBench(3000.0, flukes=1)
    search = searched(bench)
    assert bench.tried[:3] == [500, 500, 1000]
    assert search.best is not None
    assert search.best.load.rate == 3000


def test_steps_in_which_the_client_was_late_count_for_less() -> None:
    bench = FakeBench(3000.0, flukes=2)
    search = runs.Search(bench, 8.0)  # type: ignore[arg-type]  # microseconds: all are over that, and 5 is how late
    rates = [step.load.rate for step in itertools.islice(search, 5)]
    assert rates == [0, 500, 500, 500, 250]


def test_a_search_ends_where_there_are_too_few_requests() -> None:
    search = searched(FakeBench(0.5, alone_per_s=100.0))
    assert search.best is None
    assert search.too_high == 12.5
    assert lines.answer(search) == "No rate was found whose p99 stays under 10 ms: 12.5/s is too high"


def test_a_search_ends_at_the_highest_rate() -> None:
    search = searched(FakeBench(1e9))
    assert search.best is not None
    assert (search.best.load.rate, search.too_high) == (runs.HIGHEST_RATE, None)
    assert lines.answer(search).endswith("; no higher one was tried")


def test_a_search_that_is_ended_early_says_so() -> None:
    search = runs.Search(FakeBench(3000.0), 10_000.0)  # type: ignore[arg-type]
    steps = iter(search)
    for _ in range(3):
        next(steps)
    assert lines.answer(search).startswith("1000/s is the highest rate so far ")
