"""How a daemon starts, refuses to start, drains and stops; what health says meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Daemon
from dealer import Dealer, rows
from tnxctl import AsyncClient, Client, Result, wire

ODD = (str(Path(__file__).parent / "odd_models.py"),)
RunDaemon = Callable[..., Daemon]


class Fifo:
    """A gate that a model in the daemon waits at."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)

    def release(self) -> None:
        """Let one waiter through; blocks until it is there."""
        with open(self.path, "wb"):
            pass


@pytest.fixture
def fifo(tmp_path: Path) -> Fifo:
    return Fifo(tmp_path / "fifo")


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Write a configuration; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "tnxd.toml"
        path.write_text(text)
        return str(path)

    return write


def waiting_model(run_daemon: RunDaemon, fifo: Fifo, *arguments: str) -> Daemon:
    environment = {**os.environ, "RUN_FIFO": fifo.path}
    return run_daemon("--model", "wait", *arguments, program=ODD, environment=environment)


def refused(*arguments: str) -> tuple[int, str]:
    """Run tnxd, which must end by itself; returns its exit code and its stderr."""
    ended = subprocess.run([sys.executable, "-m", "tnxd", *arguments], capture_output=True, text=True, timeout=60)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


# --- starting ------------------------------------------------------------------------------------------------


def test_health_answers_while_models_load_and_predict_is_refused(tmp_path: Path, fifo: Fifo) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, *ODD, "--bind", endpoint, "--model", "slow"],
        env={**os.environ, "LOAD_FIFO": fifo.path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with Dealer(endpoint) as dealer:
            assert dealer.health().status == "starting"
            dealer.predict(rows(1, 4))
            error = dealer.error()
            assert (error.code, error.message) == ("UNAVAILABLE", "the daemon is starting")
            assert error.retry_after_us
            fifo.release()
            assert process.stdout is not None
            assert "ready on" in process.stdout.readline()
            process.stdout.close()
            assert dealer.health().status == "ready"
            dealer.predict(rows(1, 4))
            dealer.result()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_clients_wait_for_a_daemon_that_starts(tmp_path: Path, fifo: Fifo) -> None:
    """Both shells: their calls are answered when the models are loaded."""
    endpoint = f"ipc://{tmp_path}/tnx"
    process = subprocess.Popen(
        [sys.executable, *ODD, "--bind", endpoint, "--model", "slow"], env={**os.environ, "LOAD_FIFO": fifo.path}
    )

    async def ask() -> Result:
        async with AsyncClient(endpoint, timeout=30.0) as client:
            assert (await client.health()).status == "starting"
            call = asyncio.create_task(client.predict(rows(1, 4)))
            while not (await client.health()).errors.get("UNAVAILABLE", 0) >= 2:
                assert not call.done()
            await asyncio.to_thread(fifo.release)
            return await call

    with Client(endpoint, timeout=30.0) as client:
        waiting = client.submit(rows(1, 4))
        assert asyncio.run(ask()).model == "slow"
        assert waiting.result().model == "slow"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_stop_while_loading_is_clean(fifo: Fifo) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, *ODD, "--bind", endpoint, "--model", "slow"], env={**os.environ, "LOAD_FIFO": fifo.path}
    )
    with Dealer(endpoint) as dealer:
        assert dealer.health().status == "starting"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--config", "/nonexistent.toml"], 2, "/nonexistent.toml: No such file"),
        (["--bind", "udp://127.0.0.1:1"], 2, "'udp://127.0.0.1:1'"),
        (["--bind", "tcp://203.0.113.1:1"], 1, "tcp://203.0.113.1:1"),
        (["--bind", "ipc:///nonexistent/tnx"], 1, "/nonexistent/tnx"),
        (["--bind", "127.0.0.1:5555"], 2, "tcp://127.0.0.1:5555"),
        (["--model", "mlp", "--model", "mlp"], 2, "'mlp' stands there twice"),
        (["--model", "resnet"], 2, "no built-in model 'resnet'"),
        (["--default-model", "resnet"], 2, "'resnet' is not among the models"),
        (["--devices", "tpu"], 2, "'tpu'"),
        (["--cpu-workers", "-1"], 2, "cpu.workers: expected int >= 0, not -1"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_an_exit_code(arguments: list[str], code: int, named: str) -> None:
    got, stderr = refused(*arguments)
    assert (got, stderr.count("\n")) == (code, 1)
    assert named in stderr
    assert "Traceback" not in stderr


def test_an_unknown_key_is_named_with_its_file(config: Callable[[str], str]) -> None:
    path = config("[cpu]\nworkrs = 2\n")
    code, stderr = refused("--config", path)
    assert (code, stderr.count("\n")) == (2, 1)
    assert path in stderr
    assert "workrs" in stderr


def test_a_port_in_use(daemon: Daemon) -> None:
    code, stderr = refused("--bind", daemon.endpoint)
    assert (code, stderr) == (1, f"tnxd: {daemon.endpoint} is in use by another process\n")


def test_no_model_at_all() -> None:
    ended = subprocess.run(
        [sys.executable, *ODD, "--bind", "tcp://127.0.0.1:*", "--model", "broken"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "no model can be loaded" in ended.stderr
    assert "these weights are broken" in ended.stderr


def test_values_from_the_environment(run_daemon: RunDaemon) -> None:
    environment = {**os.environ, "TNXD_MODEL": "digits mlp", "TNXD_CPU_WORKERS": "3", "TNXD_WORKERS": "5"}
    running = run_daemon(environment=environment)
    with Dealer(running.endpoint) as dealer:
        report = dealer.health()
        assert [(model.name, model.default) for model in report.models] == [("digits", True), ("mlp", False)]
        assert report.devices[0].lanes == 3
    assert "TNXD_WORKERS is none of the daemon's" in running.log.read_text()


def test_every_line_for_the_journal_has_its_priority(run_daemon: RunDaemon) -> None:
    environment = {**os.environ, "JOURNAL_STREAM": "1:2"}
    running = run_daemon("--model", "odd", "--model", "broken", program=ODD, environment=environment)
    lines = running.log.read_text().splitlines()
    assert len(lines) > 5  # a traceback
    assert {line[:3] for line in lines} == {"<3>"}
    ended = subprocess.run(
        [sys.executable, "-m", "tnxd", "--model", "x"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.stderr.startswith("<3>tnxd: no built-in model")


def test_an_output_that_nobody_reads_is_no_reason_to_stop(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/tnx"
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, "-m", "tnxd", "--bind", endpoint], stdout=full)
    with Dealer(endpoint) as dealer:
        dealer.await_health(status="ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_no_device_at_all() -> None:
    code, stderr = refused("--bind", "tcp://127.0.0.1:*", "--devices", "cuda:99")
    assert code == 1
    assert "no device works" in stderr
    assert "Traceback" not in stderr


def test_a_device_that_is_not_there_is_reported_and_avoided(run_daemon: RunDaemon) -> None:
    running = run_daemon("--devices", "cuda:99,cpu")
    with Dealer(running.endpoint) as dealer:
        devices = {device.name: device for device in dealer.health().devices}
        assert devices["cuda:99"].status == "failed"
        assert devices["cuda:99"].error
        assert devices["cpu"].status == "ready"
        dealer.predict(rows(1))
        result, _ = dealer.result()
        assert result.device == "cpu"


# --- ipc -----------------------------------------------------------------------------------------------------


def test_a_second_daemon_does_not_take_an_ipc_path(run_daemon: RunDaemon, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/tnx"
    running = run_daemon("--bind", endpoint)
    code, stderr = refused("--bind", endpoint)
    assert (code, stderr) == (1, f"tnxd: {endpoint} is in use by another process\n")
    with Dealer(endpoint) as dealer:
        dealer.predict(rows(1))
        dealer.result()
    assert running.stop() == 0
    assert not (tmp_path / "tnx").exists()


def test_a_file_that_is_no_socket_is_not_taken_for_one(tmp_path: Path) -> None:
    precious = tmp_path / "notes"
    precious.write_text("precious")
    code, stderr = refused("--bind", f"ipc://{precious}")
    assert (code, stderr.count("\n")) == (1, 1)
    assert "something else than a socket" in stderr
    assert precious.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [precious]


def test_the_ipc_path_of_a_killed_daemon_can_be_used_again(run_daemon: RunDaemon, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/tnx"
    run_daemon("--bind", endpoint).stop(signal.SIGKILL)
    run_daemon("--bind", endpoint, "--bind", "tcp://127.0.0.1:*")
    with Dealer(endpoint) as dealer:
        assert dealer.health().status == "ready"


# --- serving -------------------------------------------------------------------------------------------------


def test_the_answer_and_its_stages(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        before = dealer.health()
        for count in (1, 4, 200):
            dealer.predict(rows(count))
            result, (output,) = dealer.result()
            assert output.shape == (count, 128)
            assert np.ptp(output, axis=0).max() < 1e-5  # equal rows in, equal rows out
            assert (result.model, result.version, result.batch_size) == ("mlp", "1", count)
            assert result.latency_ms > 0
            timing = result.timing
            stages = [getattr(timing, name) for name in timing.__struct_fields__ if name != "total_us"]
            assert min(stages) >= 0
            assert sum(stages) == pytest.approx(timing.total_us, rel=0.02)
        after = dealer.health()
        assert after.requests >= before.requests + 3
        assert after.replies >= before.replies + 3
        assert (after.queued, after.running) == (0, 0)


def test_full_queues_refuse_at_once(run_daemon: RunDaemon, fifo: Fifo, config: Callable[[str], str]) -> None:
    path = config("[queue]\nmax_requests = 2\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")
    running = waiting_model(run_daemon, fifo, "--config", path)
    with Dealer(running.endpoint) as dealer:
        held = [dealer.predict(rows(1, 4, 1.0))]
        dealer.await_health(running=1)
        held += [dealer.predict(rows(1, 4)) for _ in range(2)]
        refused_id = dealer.predict(rows(1, 4))
        error = dealer.error()
        assert (error.id, error.code) == (refused_id, "RESOURCE_EXHAUSTED")
        report = dealer.health()
        assert (report.queued, report.running) == (2, 1)
        assert report.errors == {"RESOURCE_EXHAUSTED": 1}
        fifo.release()
        assert [dealer.result()[0].id for _ in held] == held


def test_a_burst_larger_than_the_queue_is_served_by_free_lanes(
    run_daemon: RunDaemon, config: Callable[[str], str]
) -> None:
    running = run_daemon("--config", config("[queue]\nmax_requests = 4\n"))
    with Dealer(running.endpoint) as dealer:
        sent = [dealer.predict(rows(1)) for _ in range(64)]
        assert sorted(dealer.result()[0].id for _ in sent) == sent


# --- stopping ------------------------------------------------------------------------------------------------


@pytest.fixture
def held(run_daemon: RunDaemon, fifo: Fifo, config: Callable[[str], str]) -> Iterator[tuple[Daemon, Dealer]]:
    """A daemon whose only worker holds request 0, with request 1 waiting behind it."""
    path = config("drain_timeout_s = 20.0\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")
    running = waiting_model(run_daemon, fifo, "--config", path)
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        dealer.predict(rows(1, 4, 2.0))
        dealer.await_health(running=1, queued=1)
        yield running, dealer


def test_sigterm_finishes_what_is_here_and_refuses_what_is_new(held: tuple[Daemon, Dealer], fifo: Fifo) -> None:
    running, dealer = held
    running.process.send_signal(signal.SIGTERM)
    dealer.await_health(status="draining")
    refused_id = dealer.predict(rows(1, 4))
    error = dealer.error()
    assert (error.id, error.code, error.message) == (refused_id, "UNAVAILABLE", "the daemon is draining")
    fifo.release()
    for index, fill in enumerate((2.0, 4.0)):
        result, (output,) = dealer.result()
        assert result.id == index
        assert (output == fill).all()
    assert running.process.wait(20) == 0


def test_a_second_signal_stops_at_once_and_answers_what_is_left(held: tuple[Daemon, Dealer]) -> None:
    running, dealer = held
    running.process.send_signal(signal.SIGTERM)
    dealer.await_health(status="draining")
    running.process.send_signal(signal.SIGINT)
    errors = [dealer.error() for _ in range(2)]
    assert {error.id for error in errors} == {0, 1}
    assert {error.code for error in errors} == {"UNAVAILABLE"}
    assert running.process.wait(20) == 0


def test_a_drain_that_takes_too_long_is_cut(run_daemon: RunDaemon, fifo: Fifo, config: Callable[[str], str]) -> None:
    path = config("drain_timeout_s = 0.2\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")
    running = waiting_model(run_daemon, fifo, "--config", path)
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        running.process.send_signal(signal.SIGTERM)
        assert dealer.error().code == "UNAVAILABLE"
        assert running.process.wait(20) == 0


def test_a_drain_that_cuts_a_busy_lane_ends_well(run_daemon: RunDaemon, config: Callable[[str], str]) -> None:
    """The lane is inside torch when the process ends."""
    path = config("drain_timeout_s = 0.2\n[cpu]\nworkers = 2\ninline_limit_us = 0\n")
    running = run_daemon("--model", "busy", "--config", path, program=ODD)
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        running.process.send_signal(signal.SIGTERM)
        assert dealer.error().code == "UNAVAILABLE"
        assert running.process.wait(20) == 0


def test_a_second_signal_ends_a_loop_that_hangs(
    run_daemon: RunDaemon, fifo: Fifo, config: Callable[[str], str]
) -> None:
    """A batch that was predicted to be cheap, and so runs on the loop's own thread, never ends."""
    running = waiting_model(run_daemon, fifo, "--config", config("[cpu]\ninline_limit_us = 1000000.0\n"))
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        with open(fifo.path, "wb"):  # it is there, and goes on waiting for the end of the file
            running.process.send_signal(signal.SIGTERM)
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(20) == 1


def test_what_was_sent_before_the_signal_is_answered(
    run_daemon: RunDaemon, fifo: Fifo, config: Callable[[str], str]
) -> None:
    """More messages than the loop takes in at once wait in the socket when the signal comes."""
    running = waiting_model(run_daemon, fifo, "--config", config("[cpu]\ninline_limit_us = 1000000.0\n"))
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        with open(fifo.path, "wb"):
            for _ in range(800):
                dealer.predict(rows(1, 4))
            running.process.send_signal(signal.SIGTERM)
        answers = [dealer.receive()[0] for _ in range(801)]
        assert sorted(answer.id for answer in answers if answer.id is not None) == list(range(801))
        assert running.process.wait(20) == 0


# --- systemd's side of the conversation ----------------------------------------------------------------------


class Systemd:
    """The socket that systemd would listen on."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)
        self.path = str(path)

    def expect(self, state: str) -> None:
        """Read until that state comes."""
        while state not in self.socket.recv(4096).decode().split("\n"):
            pass

    def count(self, state: str, seconds: float) -> int:
        """How often a state comes before nothing has come for so long."""
        self.socket.settimeout(seconds)
        found = 0
        try:
            while True:
                found += state in self.socket.recv(4096).decode().split("\n")
        except TimeoutError:
            return found


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    listener = Systemd(tmp_path / "notify")
    yield listener
    listener.socket.close()


def test_systemd_hears_ready_signs_of_life_and_stopping(run_daemon: RunDaemon, systemd: Systemd) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.path, "WATCHDOG_USEC": "300000"}
    running = run_daemon(environment=environment)
    systemd.expect("READY=1")
    for _ in range(3):
        systemd.expect("WATCHDOG=1")
    running.process.send_signal(signal.SIGTERM)
    systemd.expect("STOPPING=1")
    assert running.process.wait(20) == 0


def test_a_batch_that_hangs_ends_the_signs_of_life(
    run_daemon: RunDaemon, systemd: Systemd, fifo: Fifo, config: Callable[[str], str]
) -> None:
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": systemd.path,
        "WATCHDOG_USEC": "300000",
        "RUN_FIFO": fifo.path,
    }
    path = config("stall_timeout_s = 0.5\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")
    running = run_daemon("--model", "wait", "--config", path, program=ODD, environment=environment)
    systemd.expect("READY=1")
    with Dealer(running.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        error = dealer.error()
        assert (error.code, "ran for over 0.5 s" in error.message) == ("INTERNAL", True)
        assert systemd.count("WATCHDOG=1", seconds=2.0) <= 8  # those sent before the half second was over
        fifo.release()
        systemd.socket.settimeout(20)
        systemd.expect("WATCHDOG=1")


def test_ids_belong_to_their_connection(daemon: Daemon) -> None:
    """Two clients may use the same ones at the same time."""
    with Dealer(daemon.endpoint) as one, Dealer(daemon.endpoint) as other:
        for dealer in (one, other):
            for index in range(20):
                dealer.predict(rows(1, 256, float(index)), id=index)
        for dealer in (one, other):
            assert sorted(dealer.result()[0].id for _ in range(20)) == list(range(20))


def test_wire_version_is_in_every_answer(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        assert dealer.health().v == wire.VERSION
