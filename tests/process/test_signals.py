"""Signals to the daemon, from its first line on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from daemons import ODD, running
from dealer import Dealer

PASSED_OVER = [
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    signal.SIGXFSZ,
    signal.SIGRTMIN,
    signal.SIGRTMIN + 1,
    signal.SIGRTMAX,
]

EARLY = f"""
import os, runpy, sys

class Sends:
    def find_spec(self, name, path, target=None):
        if name in ("tnxd.cli", "click", "zmq"):
            for number in {[int(number) for number in (*PASSED_OVER, signal.SIGHUP)]}:
                os.kill(os.getpid(), number)

sys.meta_path.insert(0, Sends())
runpy.run_module("tnxd", run_name="__main__", alter_sys=True)
"""
"""The daemon, which gets all these signals while its first modules are imported."""


def test_signals_in_the_first_moments_do_not_end_it(tmp_path: Path) -> None:
    with running(tmp_path, program=("-c", EARLY)) as daemon, Dealer(daemon.endpoint) as dealer:
        dealer.await_health(status="ready")
        assert daemon.stop() == 0


@pytest.mark.slow
def test_signals_without_a_meaning_are_passed_over_and_named(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, Dealer(daemon.endpoint) as dealer:
        dealer.await_health(status="ready")
        for number in PASSED_OVER:
            daemon.process.send_signal(number)
        assert dealer.health().status == "ready"
        while "SIGUSR1 is ignored" not in daemon.log or f"signal {signal.SIGRTMIN + 1} is ignored" not in daemon.log:
            assert dealer.health().status == "ready"
        assert daemon.stop() == 0


@pytest.mark.slow
def test_flood_of_signals_hides_none_that_counts(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, Dealer(daemon.endpoint) as dealer:
        dealer.await_health(status="ready")
        for _ in range(20_000):
            daemon.process.send_signal(signal.SIGUSR1)
        assert daemon.stop() == 0
        assert len(daemon.log.splitlines()) < 50


def test_reload_that_is_asked_for_while_models_load_comes_afterwards(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = {"LOAD_FIFO": str(fifo), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with running(tmp_path, "--model", "slow", program=ODD, environment=environment) as daemon:
            with fifo.open("wb"), Dealer(daemon.endpoint) as dealer:  # it is being loaded
                daemon.process.send_signal(signal.SIGHUP)
                daemon.process.send_signal(signal.SIGUSR1)  # the next, in order
                while "SIGUSR1" not in daemon.log:
                    assert dealer.health().status == "starting"
            said = ""
            while "RELOADING=1" not in said:
                said = systemd.recv(4096).decode()
            assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_stop_before_any_request_ends_the_process_without_a_traceback(
    number: signal.Signals, tmp_path: Path
) -> None:
    program = (
        "from tnxd.process import signals; signals.prepare(); print(flush=True)\n"
        "import threading; threading.Event().wait()"
    )
    with running(tmp_path, program=("-c", program), stdout=-1, binds=False) as starting:
        assert starting.process.stdout is not None
        starting.process.stdout.readline()
        assert starting.stop(number) == -number
        assert starting.log == ""


def test_child_processes_have_default_signal_handlers(tmp_path: Path) -> None:
    """An ignored signal would be inherited: a compiler that cannot be stopped."""
    program = "from tnxd.process import signals; signals.prepare(); import subprocess; subprocess.run(['sleep', '60'])"
    with running(tmp_path, program=("-c", program), binds=False) as parent:
        children = Path(f"/proc/{parent.process.pid}/task/{parent.process.pid}/children")
        while not children.read_text().split():
            assert parent.process.poll() is None
        child = int(children.read_text().split()[0])
        status = Path(f"/proc/{child}/status")
        while "sleep" not in status.read_text().splitlines()[0]:
            assert parent.process.poll() is None
        ignored = next(line for line in status.read_text().splitlines() if line.startswith("SigIgn"))
        assert int(ignored.split()[1], 16) & (1 << (signal.SIGUSR1 - 1)) == 0
        os.kill(child, signal.SIGKILL)


FORKS = """
import logging  # as the daemon: it registers what to do at a fork, and must not do so in the middle of one
import os, signal, threading, time
from tnxd.process import signals

signals.prepare()
read = threading.Event()
with signals.handled_signals(lambda: print("stop"), read.set, 20, 20):
    ends = []
    def fork():
        for number in [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1] * 50:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child, number)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number and not read.is_set())
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGHUP)  # goes through the pipe behind all that the children may have written
    print(len(ends), all(ends), read.wait(60), flush=True)
"""


def test_signal_to_a_forked_process_concerns_it_alone_from_its_first_moment() -> None:
    # To fork with threads is what this is about; Python warns of it since 3.12.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("200 True True\n", "")
