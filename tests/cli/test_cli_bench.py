"""`tnxctl bench`: what it measures of real daemons and fakes, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import Result

from conftest import Daemon
from fake_daemon import MLP, FakeDaemon, Outputs, row_sums
from patience import longer_each_time
from tnxctl.cli.bench.recording import OUTSIDE, UNSENT
from tnxctl.cli.exits import Exit
from tnxctl.durations import spell
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Internal, ResourceExhausted, Unavailable
from tool import ask, ask_in_vain, fields, run

TOOL = [sys.executable, "-m", "tnxctl.cli"]
PATIENCE_S = 60.0  # far more than any of these takes: only so that nothing waits for ever
SHORT = ("--seconds", "100ms", "--warm-up", "20ms", "--timeout", f"{PATIENCE_S}")

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as running:
        yield running


def measured(first_s: float, *arguments: object) -> tuple[float, Result]:
    """Seconds of each step, and the outcome of a run in which this client has sent all that was due."""
    for seconds in longer_each_time(first_s):
        lengths = ("--seconds", f"{seconds}s", "--warm-up", "20ms", "--timeout", f"{PATIENCE_S}")
        result = run("bench", *arguments, *lengths)
        if UNSENT not in result.output:
            break
    return seconds, result


# --- what is measured ----------------------------------------------------------------------------------------


def test_a_sweep_and_rates_at_a_real_daemon(daemon: Daemon) -> None:
    seconds, result = measured(0.5, "--host", daemon.endpoint, "--concurrency", "1,4", "--rate", "200")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout.splitlines()
    assert text[0].startswith(
        f"mlp version 1 on cpu, input [1,256]; {spell(seconds)} for each line after 20 ms of warm-up"
    )
    assert text[2].split("  ")[0] == "LOAD"
    assert [line.split("  ")[0] for line in text[3:6]] == ["1 at a time", "4 at a time", "200/s"]
    assert all(line.endswith("  -") for line in text[3:6]), "no errors"
    stages = text[7].split()
    assert stages[2:11] == ["RECEIVE", "QUEUE", "GATHER", "H2D", "COMPUTE", "D2H", "REPLY", "TOTAL", "OUTSIDE"]
    assert [line.split("  ")[0] for line in text[8:11]] == ["1 at a time", "4 at a time", "200/s"]


def test_the_document_of_a_real_daemon(daemon: Daemon) -> None:
    _, result = measured(
        *(0.5, "--host", daemon.endpoint, "--model", "digits", "--rows", "3", "--concurrency", "2", "--rate", "300"),
        "--json",
    )
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
        for seconds in longer_each_time(0.1):
            result = ask(fake, "bench", "--concurrency", "1", "--json", *SHORT, "--seconds", f"{seconds}s")
            (step,) = fields(result)["steps"]
            if step["requests"] > 1:  # of which at least one fails
                break
    assert result.exit_code == Exit.FAILED
    assert "requests failed: RESOURCE_EXHAUSTED " in result.stderr
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
        assert ask_in_vain(fake, "bench", "--timeout", "0.2").exit_code == Exit.TIMEOUT


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


# --- ends ----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("load", [("--concurrency", "2,4"), ("--rate", "500"), ("--p99-under", "1s")])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_it_with_what_was_measured(load: tuple[str, str], number: signal.Signals, word: str) -> None:
    arguments = ["bench", *load, "--json", "--seconds", "600s", "--warm-up", "0"]
    answered = 0
    for more in itertools.count(1):  # at a rate, no answer may have come yet
        with FakeDaemon(delay_s=0.002) as fake:
            process = started(fake, *arguments)
            assert fake.wait_for_predicts(50 * more, PATIENCE_S)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 128 + number
        assert stderr.startswith(f"Error: {word} after ")
        assert stderr.count("\n") == 1
        document = json.loads(stdout)
        assert document["interrupted"] is True
        (step,) = document["steps"]
        answered = step["answered"]
        assert answered == step["requests"] - step["unknown"]
        if answered or "--rate" not in load or more == 10:
            break
    assert answered


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
        [*TOOL, *arguments, "--host", fake.endpoint, "--timeout", f"{PATIENCE_S:g}"],
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
    assert result.exit_code == 0 or UNSENT in result.output
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
