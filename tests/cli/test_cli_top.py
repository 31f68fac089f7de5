"""`tnxctl top` on a real terminal: keys, sizes, signals, and daemons that come and go."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import tool
from conftest import Daemon
from fake_daemon import FakeDaemon
from patience import longer_each_time
from statistics_reports import Counts
from tnxctl import Client
from tnxctl.cli.exits import Exit
from tnxctl.protocol.errors import DeadlineExceeded, PermissionDenied, Unavailable
from tnxctl.protocol.statistics import StatsReport

if os.name != "posix":
    pytest.skip("needs a POSIX terminal", allow_module_level=True)

import daemons
import terminals
from terminals import Terminal

DIGITS = ("digits", "1")
IRIS = ("iris", "2")
ALL_STAGES = [12.0, 200.0, 5.0, 0.0, 400.0, 0.0, 15.0]


class Slowing:
    """Counts of a daemon whose requests wait longer from the second look on; a look takes a second of its time."""

    def __init__(self, started_s: float = 1000.0, **fields: object) -> None:
        self._counts = Counts(started_s=started_s)
        self._fields = fields
        self._counts.passed(3600e9)
        self._counts.replied(DIGITS, ALL_STAGES, 10**8)  # so many that later ones change little
        self._counts.replied(IRIS, ALL_STAGES, 500)

    def __call__(self, nth: int) -> StatsReport:
        if nth > 1:
            self._counts.passed(1e6)
            self._counts.replied(DIGITS, [12.0, 9000.0, *ALL_STAGES[2:]], 300)
            self._counts.replied(IRIS, ALL_STAGES, 400)
            self._counts.ran(DIGITS, 8, 100)
        return self._counts.report(**self._fields)


def start(endpoint: str, *arguments: str, columns: int = 80, lines: int = 24, **extra: str) -> Terminal:
    command = terminals.tool("top", "--host", endpoint, *arguments, **extra)
    return Terminal(**command, columns=columns, lines=lines)


@contextmanager
def load(endpoint: str) -> Iterator[None]:
    """Requests for the digits, one after the other, until the block ends. It begins with the first answer."""
    over, answered = threading.Event(), threading.Event()

    def ask() -> None:
        with Client(endpoint, timeout=5.0) as client:
            while not over.is_set():
                with suppress(Unavailable, DeadlineExceeded):  # of a daemon that takes long to start
                    client.predict(np.zeros((1, 64), np.float32), model="digits")
                    answered.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert answered.wait(terminals.PATIENCE_S)
        yield
    finally:
        over.set()
        thread.join()


def test_a_daemon_under_load_and_keys(daemon: Daemon) -> None:
    with load(daemon.endpoint), start(daemon.endpoint, "--interval", "100ms") as terminal:
        terminal.until("ready  tnxd", "tcp://", "over ", ">digits@1", "sort: rate", "p99 before")
        assert not terminal.cursor
        terminal.press("p")
        terminal.until("sort: p99")
        terminal.press("s")
        terminal.until("sort: queue")
        terminal.press("h")
        terminal.until("rows that wait")
        terminal.press("h ")
        terminal.until("PAUSED", ">digits@1")
        terminal.press(" b")
        terminal.until("against: the last minute")
        terminal.press("c")
        terminal.until("CLIENT", "127.0.0.1")  # this host is admin
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_as_before
        assert terminal.text == ""


def test_why_requests_are_slower_is_told_and_another_model_may_be_looked_at() -> None:
    with FakeDaemon(stats=Slowing()) as fake, start(fake.endpoint, "--interval", "50ms", "--sort", "name") as terminal:
        shown = terminal.until("queue +", "digits@1: p99 ")
        assert "300 requests/s" in shown
        terminal.until(">digits@1")
        terminal.press("\x1b[B")
        terminal.until(">iris@2")
        terminal.press("\x1bOA")
        terminal.until(">digits@1")
        terminal.press("kj\x1b[15~\x1b[1;5C")  # function keys mean nothing
        terminal.until(">iris@2")
        terminal.press("\x1b")
        terminal.until(">digits@1")
        terminal.press("\x1bq")
        assert terminal.end() == 0
        assert terminal.coloured


def test_no_colour_is_wanted() -> None:
    with FakeDaemon(stats=Slowing()) as fake, start(fake.endpoint, "--interval", "50ms", NO_COLOR="1") as terminal:
        terminal.until("digits@1: p99 ")
        terminal.press("q")
        assert terminal.end() == 0
        assert not terminal.coloured


def test_the_picture_follows_the_size_of_the_window() -> None:
    with FakeDaemon(stats=Slowing()) as fake, start(fake.endpoint, "--interval", "50ms") as terminal:
        terminal.until("digits@1: p99 ")

        def ends_in(line: int) -> bool:
            return terminal.screen is not None and "q quit" in terminal.screen[line]

        terminal.wait_for(lambda: ends_in(23), "24 lines")  # the kernel hands a picture on in parts
        assert "COMPUTE" not in terminal.shown
        clears = terminal.clears
        terminal.resize(160, 50)
        terminal.until("COMPUTE", "clients")
        terminal.wait_for(lambda: ends_in(49), "50 lines")
        assert terminal.clears == clears + 1
        terminal.resize(30, 5)
        terminal.wait_for(lambda: ends_in(4), "five lines")
        assert terminal.screen is not None
        assert not any(terminal.screen[5:])
        terminal.press("\x04")
        assert terminal.end() == 0


@pytest.mark.parametrize("number", [*terminals.INTERRUPTS])
def test_a_signal_gives_the_terminal_back(number: signal.Signals) -> None:
    with FakeDaemon() as fake, start(fake.endpoint) as terminal:
        terminal.until("ready")
        if number == signal.SIGINT:
            terminal.press("\x03")
            code = terminal.end()
        else:
            code = terminal.end(number)
        assert code == terminals.INTERRUPTS[number]
        assert terminal.is_as_before


def test_an_error_gives_the_terminal_back_and_is_told() -> None:
    def refuse(_: int) -> StatsReport:
        raise PermissionDenied("not for you")

    with FakeDaemon(stats=refuse) as fake, start(fake.endpoint) as terminal:
        assert terminal.end() == Exit.REFUSED
        assert terminal.is_as_before
        assert "not for you" in terminal.text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ctrl_z_and_fg() -> None:
    with FakeDaemon() as fake:
        found = terminals.tool("top", "--host", fake.endpoint)
        shell = {**found, "command": ["bash", "--norc", "--noprofile", "-i"]}
        shell["environment"] = {**found["environment"], "PS1": "here> ", "LC_ALL": "C", "HISTFILE": ""}
        with Terminal(**shell) as terminal:
            terminal.until("here> ")
            terminal.press(f"{shlex.join(found['command'])}\n")
            terminal.until("ready  tnxd")
            terminal.press("\x1a")
            terminal.until("Stopped", "here> ")
            assert terminal.screen is None
            assert terminal.cursor
            assert terminal.wraps
            terminal.press("stty -a; echo sh''own\n")  # so that the echo of this line is something else
            terminal.until(" icanon", "shown")
            terminal.press("fg\n")
            terminal.wait_for(lambda: terminal.screen is not None, "the screen")
            terminal.until("ready  tnxd")
            terminal.press("h")  # keys come one by one again
            terminal.until("go on")
            terminal.press("q")
            terminal.wait_for(lambda: terminal.screen is None, "the shell")
            terminal.press("echo ended with $?\nexit\n")
            terminal.until("ended with 0")
            terminal.end()


def test_where_nobody_could_continue_it_ctrl_z_stops_nothing() -> None:
    """Its process group is orphaned then, and POSIX ignores the signal."""
    with FakeDaemon() as fake, start(fake.endpoint) as terminal:
        terminal.until("ready  tnxd")
        clears = terminal.clears
        terminal.press("\x1a")
        terminal.wait_for(lambda: terminal.clears > clears and terminal.screen is not None, "the screen again")
        terminal.until("ready  tnxd")
        terminal.press("h")
        terminal.until("go on")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_as_before


def test_a_daemon_that_is_replaced_comes_back(tmp_path: Path) -> None:
    with start(f"ipc://{tmp_path}/tnx", "--interval", "50ms", lines=30) as terminal:
        terminal.until("not reachable since", "nobody")
        with daemons.running(tmp_path) as first:
            with load(first.endpoint):
                terminal.until("ready  tnxd", "digits@1")
            first.stop()
            terminal.until("away  tnxd", "not reachable since")
        with daemons.running(tmp_path) as second, load(second.endpoint):
            terminal.until("ready  tnxd", ", restarted", "digits@1")
            terminal.press("q")
            assert terminal.end() == 0


def test_counts_that_begin_anew_are_a_restart() -> None:
    lives = [Slowing(started_s=1000.0), Slowing(started_s=5000.0)]

    def stats(nth: int) -> StatsReport:
        return lives[0](nth) if nth < 4 else lives[1](nth - 3)

    with FakeDaemon(stats=stats) as fake, start(fake.endpoint, "--interval", "50ms") as terminal:
        terminal.until(", restarted")
        terminal.press("q")
        assert terminal.end() == 0


def test_without_codes_looks_are_printed_one_below_the_other() -> None:
    with FakeDaemon(stats=Slowing()) as fake, start(fake.endpoint, "--interval", "50ms", TERM="dumb") as terminal:
        terminal.wait_for(lambda: terminal.text.count("MODEL") >= 3, "three looks")
        terminal.press("\x03")
        assert terminal.end() == Exit.INTERRUPTED
        assert terminal.is_as_before


def test_without_a_terminal_it_is_one_look() -> None:
    with FakeDaemon(stats=Slowing()) as fake:
        command = [sys.executable, "-m", "tnxctl.cli", "top", "--host", fake.endpoint, "--interval", "10ms"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=terminals.PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert fake.looks_at_stats == 2
    assert "\x1b" not in done.stdout
    assert "digits@1: p99 10ms" in done.stdout
    assert "q quit" not in done.stdout


def test_the_document(daemon: Daemon) -> None:
    """Its shape is a promise: docs/operations.md has it."""
    with load(daemon.endpoint):
        for interval in longer_each_time(1.0, most_s=60.0):
            result = tool.run("top", "--json", "--interval", f"{interval}s", "--host", daemon.endpoint)
            document = json.loads(result.stdout)
            if document["replies_per_s"] > 0:  # else this process has asked nothing meanwhile
                break
    assert {*document} == {
        "endpoint", "status", "version", "started_s", "uptime_s", "seconds", "restarted", "before_seconds",
        "requests_per_s", "replies_per_s", "errors_per_s", "undeliverable", "abandoned", "resent",
        "connections_refused", "connections_cut", "log_lines_dropped", "spans_dropped", "queued", "running",
        "connections", "traffic_mb", "traffic_owed_mb", "traffic_limit_mb", "loop_turns_us", "devices", "models",
        "clients",
    }  # fmt: skip
    (cpu,) = [device for device in document["devices"] if device["name"] == "cpu"]
    assert {*cpu} == {
        "name", "status", "lanes", "busy_share", "inline_share", "queued_rows", "memory_free_mb", "memory_total_mb",
    }  # fmt: skip
    assert 0 < cpu["busy_share"] + cpu["inline_share"] <= 2
    (digits,) = [model for model in document["models"] if model["name"] == "digits"]
    assert {*digits} == {
        "name", "version", "requests_per_s", "replies_per_s", "errors_per_s", "abandoned", "rows_per_s",
        "batches_per_s", "rows_per_batch", "lanes", "queued_rows", "predicted_wait_us", "prediction_error_us",
        "deadlines_met", "deadlines_missed", "steals", "splits", "evictions", "stages_us", "before_stages_us", "grew",
    }  # fmt: skip
    assert digits["replies_per_s"] > 0
    assert [*digits["stages_us"]] == ["receive", "queue", "gather", "h2d", "compute", "d2h", "reply", "total"]
    total = digits["stages_us"]["total"]
    assert {*total} == {"count", "mean", "p50", "p90", "p99", "p99.9"}
    assert 0 < total["p50"] <= total["p90"] <= total["p99"] <= total["p99.9"]
    client = document["clients"][0]
    assert {*client} == {"name", "requests_per_s", "refused_per_s", "in_flight", "owed_bytes"}
    described = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [name for name in (*document, *cpu, *digits, *total, *client) if f"`{name}`" not in described] == []
