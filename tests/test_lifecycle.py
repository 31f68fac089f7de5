"""Daemons that start, refuse to start, drain and stop; what health says meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pytest

import prepared
from ahead import Making, makes
from conftest import Daemon, start_daemon
from dealer import Dealer, rows
from tnxctl import AsyncClient, Client, Result
from tnxctl.protocol import wire
from zmtp import Peer, message

ODD = (str(Path(__file__).parent / "odd_models.py"),)
HASTY = (str(Path(__file__).parent / "hasty_daemon.py"),)
TNXD = ("-m", "tnxd")


class Systemd:
    """The socket that systemd would listen on."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)

    def expect(self, state: str) -> None:
        """Read until that state comes."""
        while state not in self.socket.recv(4096).decode().split("\n"):
            pass

    def received(self) -> list[str]:
        """States that have come and were not read yet."""
        states: list[str] = []
        while select.select([self.socket], [], [], 0)[0]:
            states += self.socket.recv(4096).decode().split("\n")
        return states


@dataclass
class Own(Daemon):
    """A daemon of a test's own, in a folder for both, with a gate that its odd models wait at and a service manager."""

    folder: Path
    systemd: Systemd

    def gate(self) -> IO[bytes]:
        """Open the gate for one model; blocks until it is there. It is through when this file is closed."""
        return (self.folder / "fifo").open("wb")

    def printed(self) -> str:
        """All that it still prints, once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def release(self) -> None:
        """Let one model through the gate."""
        self.gate().close()


def own(
    *arguments: str,
    config: str = "",
    program: tuple[str, ...] = TNXD,
    is_ready: bool = True,
    anew: bool = False,
    stdout: str = "",
    **environment: str,
) -> Callable[[Path], AbstractContextManager[Own]]:
    """A way to start a daemon. "{}" in its arguments and variables stands for its folder.

    Args:
        is_ready: whether to wait until it is. Without that its endpoint is the first among the arguments.
        anew: as for `conftest.start_daemon`.
        stdout: a file for what it prints, which else is for the test.
    """

    @contextmanager
    def start(folder: Path) -> Iterator[Own]:
        os.mkfifo(folder / "fifo")
        (folder / "tnxd.toml").write_text(config)
        command = [argument.format(folder) for argument in arguments]
        if config:
            command += ["--config", str(folder / "tnxd.toml")]
        variables = {"RUN_FIFO": "{}/fifo", "LOAD_FIFO": "{}/fifo", **environment}
        variables = {**prepared.variables(), **{name: value.format(folder) for name, value in variables.items()}}
        systemd = Systemd(folder / "notify")
        if is_ready:
            daemon = start_daemon(folder / "log", *command, program=program, environment=variables, anew=anew)
        else:
            process: subprocess.Popen[str] | prepared.Process
            with (folder / "log").open("wb") as log, open(stdout or os.devnull, "wb") as printed:
                if anew or not prepared.can_run(program, variables):
                    process = subprocess.Popen(
                        [sys.executable, *program, *command],
                        stdout=printed if stdout else subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=variables,
                        preexec_fn=prepared.end_with_parent,
                    )
                else:
                    descriptor = printed.fileno() if stdout else None
                    process = prepared.start(program, tuple(command), variables, stdout=descriptor, stderr=log.fileno())
            daemon = Daemon(command[command.index("--bind") + 1], process, folder / "log")
        try:
            yield Own(daemon.endpoint, daemon.process, daemon.log, folder, systemd)
        finally:
            daemon.discard()
            systemd.socket.close()

    return start


@pytest.fixture(scope="module")
def making(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Making]:
    with Making(request, tmp_path_factory) as making:
        yield making


@pytest.fixture
def made(request: pytest.FixtureRequest, making: Making) -> Iterator[Own]:
    """The daemon that a test says it `makes`."""
    with making.of(request.node) as made:
        yield made


def refused(*arguments: str, anew: bool = False, **environment: str) -> tuple[int, str]:
    """Run tnxd, which must end by itself; returns its exit code and its stderr.

    Args:
        anew: as for `conftest.start_daemon`.
    """
    variables = {**prepared.variables(), **environment}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process: subprocess.Popen[bytes] | prepared.Process
        if anew or not prepared.can_run(TNXD, variables):
            process = subprocess.Popen([sys.executable, *TNXD, *arguments], env=variables, stdout=stdout, stderr=stderr)
        else:
            process = prepared.start(TNXD, arguments, variables, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            code = process.wait(60)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        assert stdout.read() == b""
        return code, stderr.read().decode()


# --- starting ------------------------------------------------------------------------------------------------

SLOW = own("--bind", "ipc://{}/tnx", "--model", "slow", program=ODD, is_ready=False)
"""Its model loads for as long as its gate is shut."""


@makes(SLOW)
def test_calls_wait_while_models_load_and_health_answers(made: Own) -> None:
    """Both shells: their calls are answered when the models are loaded. Who does not ask again is refused."""

    async def ask() -> Result:
        async with AsyncClient(made.endpoint, timeout=60.0) as client:
            assert (await client.health()).status == "starting"
            call = asyncio.create_task(client.predict(rows(1, 4)))
            while not (await client.health()).errors.get("UNAVAILABLE", 0) >= 3:
                assert not call.done()
            await asyncio.to_thread(made.release)
            return await call

    with Dealer(made.endpoint) as dealer, Client(made.endpoint, timeout=60.0) as client:
        assert dealer.health().status == "starting"
        dealer.predict(rows(1, 4))
        error = dealer.error()
        assert (error.code, error.message) == ("UNAVAILABLE", "the daemon is starting")
        assert error.retry_after_us
        waiting = client.submit(rows(1, 4))
        assert asyncio.run(ask()).model == "slow"
        assert waiting.result().model == "slow"
        assert made.process.stdout is not None
        assert "ready on" in made.process.stdout.readline()
        assert dealer.health().status == "ready"
    assert made.stop() == 0


HALF = own("--bind", "ipc://{}/tnx", "--model", "broken", "--model", "slow", program=ODD, is_ready=False)
"""Its first model cannot be loaded, and its second is as `SLOW`'s."""


@makes(HALF)
def test_names_are_known_before_weights(made: Own) -> None:
    """Shapes that cannot be told yet are asked for again; what will not change is told at once."""

    def ask(request: wire.Request) -> wire.ErrorReply:
        dealer.socket.send(wire.encode(request))
        return dealer.error()

    with Dealer(made.endpoint) as dealer, Client(made.endpoint, timeout=60.0) as client:
        assert {info.name: info.status for info in client.models()}["slow"] == "starting"
        while client.metadata("broken").status != "failed":  # it waits for its turn
            pass
        waiting = client.submit(rows(1, 4), model="slow")
        for request in (
            wire.Metadata(v=1, id=1, model="slow"),
            wire.Metadata(v=1, id=2),
            wire.Compare(v=1, id=3, model="slow", baseline="1", candidate="2"),
            wire.Reload(v=1, id=4),
        ):
            error = ask(request)
            assert (error.id, error.code, error.message) == (request.id, "UNAVAILABLE", "the daemon is starting")
            assert error.retry_after_us
        dealer.predict(rows(1, 4), model="broken")
        assert "these weights are broken" in dealer.error().message
        dealer.predict(rows(1, 4), model="nosuch")
        assert dealer.error().code == "NOT_FOUND"
        assert ask(wire.Metadata(v=1, id=5, model="nosuch")).code == "NOT_FOUND"
        assert ask(wire.Compare(v=1, id=6, model="nosuch", baseline="1", candidate="2")).code == "NOT_FOUND"
        made.release()
        assert client.metadata("slow").status == "ready"
        assert client.metadata().name == "slow"  # the default: the first model is none that can serve
        assert waiting.result().model == "slow"
        assert client.predict(rows(1, 4)).model == "slow"
    assert made.stop() == 0


@makes(own("--bind", "ipc://{}/tnx", "--model", "slow", program=ODD, is_ready=False, anew=True))
def test_a_stop_while_loading_is_clean(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        assert dealer.health().status == "starting"
    assert made.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--config", "/nonexistent.toml"], 2, "/nonexistent.toml: No such file"),
        (["--bind", "udp://127.0.0.1:1"], 2, "'udp://127.0.0.1:1'"),
        (["--bind", "tcp://203.0.113.1:1"], 2, "insecure = true"),
        (["--bind", "tcp://203.0.113.1:1", "--insecure"], 1, "tcp://203.0.113.1:1"),
        (["--bind", "ipc:///nonexistent/tnx"], 1, "/nonexistent/tnx"),
        (["--bind", "127.0.0.1"], 2, "tcp://127.0.0.1:5555"),
        (["--bind", "203.0.113.1:1", "--insecure"], 1, "tcp://203.0.113.1:1"),
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


def test_an_unknown_key_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tnxd.toml"
    path.write_text("[cpu]\nworkrs = 2\n")
    code, stderr = refused("--config", str(path), anew=True)
    assert (code, stderr.count("\n")) == (2, 1)
    assert str(path) in stderr
    assert "workrs" in stderr


def test_a_port_in_use(daemon: Daemon) -> None:
    code, stderr = refused("--bind", daemon.endpoint, anew=True)
    assert (code, stderr) == (1, f"tnxd: {daemon.endpoint} is in use by another process\n")


@makes(own("--bind", "tcp://127.0.0.1:*", "--model", "broken", program=ODD, is_ready=False))
def test_no_model_at_all(made: Own) -> None:
    assert made.printed() == ""
    assert made.process.wait(60) == 1
    assert "no model can be served" in made.log.read_text()
    assert "these weights are broken" in made.log.read_text()


def test_a_repository_of_which_nothing_can_be_served_is_told_in_one_sentence(tmp_path: Path) -> None:
    for name, file, text in (("one", "1/model.pt2", "nonsense"), ("two", "model.toml", "wrong = 1")):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    code, stderr = refused("--bind", "tcp://127.0.0.1:*", "--model-repository", str(tmp_path))
    assert code == 1
    assert (
        "cannot start: no model can be served: two/model.toml: wrong: unknown key; "
        "one@1: one/1/model.pt2: incomplete, or not a program of torch.export\n"
    ) in stderr


@makes(own("--bind", "tcp://127.0.0.1:*", "--devices", "cuda:99", is_ready=False))
def test_no_device_at_all(made: Own) -> None:
    assert made.printed() == ""
    assert made.process.wait(60) == 1
    assert "no device works: cuda:99: " in made.log.read_text()
    assert "Traceback" not in made.log.read_text()


@makes(own(TNXD_MODEL="digits mlp", TNXD_CPU_WORKERS="3", TNXD_WORKERS="5"))
def test_values_from_the_environment(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        report = dealer.health()
        assert [(model.name, model.default) for model in report.models] == [("digits", True), ("mlp", False)]
        assert report.devices[0].lanes == 3
    made.logged("TNXD_WORKERS is none of the daemon's")


@makes(own("--model", "odd", "--model", "broken", program=ODD, JOURNAL_STREAM="1:2"))
def test_every_line_for_the_journal_has_its_priority(made: Own) -> None:
    lines = made.logged("these weights are broken").splitlines()
    of_error = [line for line in lines if line.startswith("<3>")]
    assert len(of_error) > 5  # a traceback
    assert "these weights are broken" in of_error[-1]
    assert {"<3>", "<6>"} <= {line[:3] for line in lines} <= {"<3>", "<4>", "<6>"}  # this machine may get a warning
    _, stderr = refused("--model", "x", JOURNAL_STREAM="1:2")
    assert stderr.startswith("<3>tnxd: no built-in model")


@pytest.mark.slow
@makes(own("--bind", "ipc://{}/tnx", is_ready=False, stdout="/dev/full"))
def test_an_output_that_nobody_reads_is_no_reason_to_stop(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        dealer.await_health(status="ready")
    assert made.stop() == 0


@makes(own("--devices", "cuda:99,cpu"))
def test_a_device_that_is_not_there_is_reported_and_avoided(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        devices = {device.name: device for device in dealer.health().devices}
        assert devices["cuda:99"].status == "failed"
        assert devices["cuda:99"].error
        assert devices["cpu"].status == "ready"
        dealer.predict(rows(1))
        result, _ = dealer.result()
        assert result.device == "cpu"


@makes(own("--model", "odd", program=ODD))
def test_the_log_tells_what_was_refused(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        for model in ("odd", "nosuch", "", "nosuch"):
            dealer.predict(rows(1, 5), model=model)
            dealer.error()
    assert made.stop() == 0
    lines = [line for line in made.log.read_text().splitlines() if "errors sent within" in line]
    assert all(" INFO " in line for line in lines)
    for code, name in (("INVALID_ARGUMENT", "odd"), ("NOT_FOUND", "nosuch")):
        assert sum(int(count) for line in lines for count in re.findall(rf"{code} (\d+) \({name} \1\)", line)) == 2


# --- ipc -----------------------------------------------------------------------------------------------------


@makes(own("--bind", "ipc://{}/tnx"))
def test_an_ipc_path_belongs_to_one_daemon_until_that_ends(made: Own, tmp_path: Path) -> None:
    code, stderr = refused("--bind", made.endpoint)
    assert (code, stderr) == (1, f"tnxd: {made.endpoint} is in use by another process\n")
    with Dealer(made.endpoint) as dealer:
        dealer.predict(rows(1))
        dealer.result()
    made.stop(signal.SIGKILL)
    with own("--bind", made.endpoint, "--bind", "tcp://127.0.0.1:*")(tmp_path) as following:
        with Dealer(made.endpoint) as dealer:
            assert dealer.health().status == "ready"
        assert following.stop() == 0
    assert not (made.folder / "tnx").exists()


def test_a_file_that_is_no_socket_is_not_taken_for_one(tmp_path: Path) -> None:
    precious = tmp_path / "notes"
    precious.write_text("precious")
    code, stderr = refused("--bind", f"ipc://{precious}")
    assert (code, stderr.count("\n")) == (1, 1)
    assert "something else than a socket" in stderr
    assert precious.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [precious]


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


def waiting(config: str) -> Callable[[Path], AbstractContextManager[Own]]:
    """A way to start a daemon whose model waits at the gate when told to."""
    return own("--model", "wait", config=config, program=ODD)


@makes(waiting("[queue]\nmax_requests = 2\n[cpu]\nworkers = 1\ninline_limit_us = 0\n"))
def test_full_queues_refuse_at_once(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        held = [dealer.predict(rows(1, 4, 1.0))]
        dealer.await_health(running=1)
        held += [dealer.predict(rows(1, 4)) for _ in range(2)]
        refused_id = dealer.predict(rows(1, 4))
        error = dealer.error()
        assert (error.id, error.code) == (refused_id, "RESOURCE_EXHAUSTED")
        report = dealer.health()
        assert (report.queued, report.running) == (2, 1)
        assert report.errors == {"RESOURCE_EXHAUSTED": 1}
        made.release()
        assert [dealer.result()[0].id for _ in held] == held


# However long a batch took while this machine was busy, it runs on the serving thread where no lane is free.
@makes(own(config="[queue]\nmax_requests = 4\n[cpu]\ninline_limit_us = 1e9\n"))
def test_a_burst_larger_than_the_queue_is_served_by_free_lanes(made: Own) -> None:
    with Dealer(made.endpoint) as dealer:
        sent = [dealer.predict(rows(1)) for _ in range(64)]
        assert sorted(dealer.result()[0].id for _ in sent) == sent


# --- stopping ------------------------------------------------------------------------------------------------

HOLDING = waiting("drain_timeout_s = 60.0\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")


@pytest.fixture
def held(made: Own) -> Iterator[Dealer]:
    """The only worker of the daemon holds request 0, and request 1 waits behind it."""
    with Dealer(made.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        dealer.predict(rows(1, 4, 2.0))
        dealer.await_health(running=1, queued=1)
        yield dealer


@makes(HOLDING)
def test_sigterm_finishes_what_is_here_and_refuses_what_is_new(made: Own, held: Dealer) -> None:
    made.process.send_signal(signal.SIGTERM)
    held.await_health(status="draining")
    refused_id = held.predict(rows(1, 4))
    error = held.error()
    assert (error.id, error.code, error.message) == (refused_id, "UNAVAILABLE", "the daemon is draining")
    made.release()
    for index, fill in enumerate((2.0, 4.0)):
        result, (output,) = held.result()
        assert result.id == index
        assert (output == fill).all()
    assert made.process.wait(60) == 0


@makes(HOLDING)
def test_a_second_signal_stops_at_once_and_answers_what_is_left(made: Own, held: Dealer) -> None:
    made.process.send_signal(signal.SIGTERM)
    held.await_health(status="draining")
    made.process.send_signal(signal.SIGINT)
    errors = [held.error() for _ in range(2)]
    assert {error.id for error in errors} == {0, 1}
    assert {error.code for error in errors} == {"UNAVAILABLE"}
    assert made.process.wait(60) == 0


def check_that_a_drain_is_cut(daemon: Own) -> None:
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        daemon.process.send_signal(signal.SIGTERM)
        assert dealer.error().code == "UNAVAILABLE"
        assert daemon.process.wait(60) == 0


@makes(waiting("drain_timeout_s = 0.2\n[cpu]\nworkers = 1\ninline_limit_us = 0\n"))
def test_a_drain_that_takes_too_long_is_cut(made: Own) -> None:
    check_that_a_drain_is_cut(made)


@makes(
    own(
        *("--model", "busy"),
        config="drain_timeout_s = 0.2\n[cpu]\nworkers = 2\ninline_limit_us = 0\n",
        program=ODD,
    )
)
def test_a_drain_that_cuts_a_busy_lane_ends_well(made: Own) -> None:
    """The lane is inside torch when the process ends."""
    check_that_a_drain_is_cut(made)


@makes(own("--model", "wait", config="[cpu]\ninline_limit_us = 1000000.0\n", program=HASTY))
def test_a_second_signal_ends_a_loop_that_hangs(made: Own) -> None:
    """A batch that was predicted to be cheap, and so runs on the loop's own thread, never ends."""
    with Dealer(made.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        with made.gate():
            made.process.send_signal(signal.SIGTERM)
            made.process.send_signal(signal.SIGINT)
            assert made.process.wait(60) == 1


@makes(waiting("[cpu]\ninline_limit_us = 1000000.0\n"))
def test_what_was_sent_before_the_signal_is_answered(made: Own) -> None:
    """More messages than the loop takes in at once wait in the socket when the signal comes."""
    with Dealer(made.endpoint) as dealer:
        dealer.predict(rows(1, 4, 1.0))
        with made.gate():
            for _ in range(800):
                dealer.predict(rows(1, 4))
            made.process.send_signal(signal.SIGTERM)
        answers = [dealer.receive()[0] for _ in range(801)]
        assert sorted(answer.id for answer in answers if answer.id is not None) == list(range(801))
        assert made.process.wait(60) == 0


@makes(own(config="drain_timeout_s = 0.2\n", program=HASTY))
def test_a_client_that_takes_no_replies_makes_no_failure_of_a_stop(made: Own) -> None:
    """They fill its connection and the queue behind: the drain takes all of its time, and so does the flush."""
    count = 500
    array = rows(64)
    with Dealer(made.endpoint) as dealer, Peer(made.endpoint, receive_buffer=4096) as peer:
        peer.greet()
        for index in range(count):
            specs = (wire.TensorSpec("", "FP32", array.shape),)
            header = wire.encode(wire.Predict(v=wire.VERSION, id=index, inputs=specs))
            peer.write(message(header, array.tobytes()))
        dealer.await_health(replies=count)
        assert made.stop() == 0
    assert "stopped" in made.log.read_text()


HANGS = """
import logging, signal, sys, threading
from tnxd.process import signals

logging.basicConfig()
if sys.argv[1] == "computing":
    signals._LAST_WORDS_S = 60  # for a log that can be written, on a busy machine
with signals.handled_signals(lambda: print("stop", flush=True), lambda: print("reload", flush=True), 0.3, 0.3):
    if sys.argv[1] == "logging":
        logging.getLogger().handlers[0].acquire()
    print("ready", flush=True)
    threading.Event().wait()
"""
"""A program whose loop does not turn, perhaps while it writes a line of its log."""


@contextmanager
def hanging(where: str) -> Iterator[subprocess.Popen[str]]:
    """Process of that program, ready for signals."""
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_loop_that_hangs_is_ended_and_the_log_says_so() -> None:
    with hanging("computing") as process:
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "did not stop" in logged


def test_a_loop_that_hangs_in_its_log_is_ended() -> None:
    with hanging("logging") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_more_signals_do_not_postpone_the_end(number: signal.Signals) -> None:
    with hanging("computing") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        while process.stdout.readline():  # one for each signal, until it has ended
            process.send_signal(number)
        assert process.wait() == 1


# --- systemd's side of the conversation ----------------------------------------------------------------------

NOTIFYING = {"NOTIFY_SOCKET": "{}/notify", "WATCHDOG_USEC": "300000"}
PATIENT = 'on_hang = "continue"\n'  # a loop that stands still for 0.2 s is busy, not hung


def test_systemd_hears_ready_signs_of_life_and_stopping(tmp_path: Path) -> None:
    with own(config=PATIENT, **NOTIFYING)(tmp_path) as running:
        running.systemd.expect("READY=1")
        for _ in range(3):
            running.systemd.expect("WATCHDOG=1")
        running.process.send_signal(signal.SIGTERM)
        running.systemd.expect("STOPPING=1")
        assert running.process.wait(60) == 0


def test_a_batch_that_hangs_ends_the_signs_of_life(tmp_path: Path) -> None:
    config = f"{PATIENT}stall_timeout_s = 0.5\n[cpu]\nworkers = 1\ninline_limit_us = 0\n"
    with (
        own("--model", "wait", config=config, program=ODD, **NOTIFYING)(tmp_path) as running,
        Dealer(running.endpoint) as dealer,
    ):
        running.systemd.expect("READY=1")
        dealer.predict(rows(1, 4, 1.0))
        dealer.await_health(running=1)
        error = dealer.error()
        assert (error.code, "ran for over 0.5 s" in error.message) == ("INTERNAL", True)
        running.systemd.received()  # before the batch was given up
        until_s = dealer.health().uptime_s + 1.0
        while dealer.health().uptime_s < until_s:  # with signs of life, one each 0.1 s
            time.sleep(0.02)  # between two looks, which else take two cores
        assert "WATCHDOG=1" not in running.systemd.received()
        running.release()
        running.systemd.expect("WATCHDOG=1")


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
