"""Several workers: they share an address, are started again when they die, and end together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from bridges import SECONDS, Bridge, running_bridge
from conftest import Daemon


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def workers_of(bridge: Bridge) -> set[int]:
    """Process ids of the workers."""
    return children_of(bridge.process.pid)


def await_workers(bridge: Bridge, count: int, without: int = 0) -> set[int]:
    """The workers, once there are so many, and one is not among them."""
    until = time.monotonic() + SECONDS
    while len(found := workers_of(bridge)) != count or without in found:
        assert time.monotonic() < until, (found, bridge.log.read_text())
        time.sleep(0.02)  # between two looks: nothing tells of the child of another process
    return found


def test_a_worker_that_dies_is_started_again(daemon: Daemon, tmp_path: Path) -> None:
    with running_bridge(tmp_path, daemon.endpoint, "--workers", "2") as bridge:
        before = await_workers(bridge, 2)
        for _ in range(8):
            assert bridge.ask("GET", "/health").status == 200
        victim = min(before)
        with os.fdopen(os.pidfd_open(victim)) as descriptor:
            os.kill(victim, signal.SIGKILL)
            assert_ends(descriptor.fileno())
        for _ in range(8):  # some of them wait for the new one
            assert bridge.ask("GET", "/health").status == 200
        after = await_workers(bridge, 2, without=victim)
        assert len(before & after) == 1
        assert f"worker {victim} ended with SIGKILL, and is started again" in bridge.log.read_text()


def test_a_reload_waits_for_a_worker_that_starts(daemon: Daemon, tmp_path: Path) -> None:
    """Before it has its handler, the signal would end it."""
    with running_bridge(tmp_path, daemon.endpoint, "--workers", "2") as bridge:
        victim = min(await_workers(bridge, 2))
        os.kill(victim, signal.SIGKILL)
        await_workers(bridge, 2, without=victim)
        bridge.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + SECONDS
        while (log := bridge.log.read_text()).count("read tokens and certificate again") < 2:
            assert "SIGHUP" not in log
            assert time.monotonic() < until, log
            time.sleep(0.02)  # between two looks: nothing tells of a line in a file


def test_an_interrupt_from_the_terminal_reaches_workers_once(daemon: Daemon, tmp_path: Path) -> None:
    """It goes to a whole process group, and workers take a second one as a hurry."""
    with running_bridge(tmp_path, daemon.endpoint, "--workers", "2") as bridge:
        group = os.getpgid(bridge.process.pid)
        assert all(os.getpgid(worker) != group for worker in await_workers(bridge, 2))


def test_all_workers_end_with_the_process_that_started_them(daemon: Daemon, tmp_path: Path) -> None:
    """The pipe to each of them ends then, whatever ended it."""
    command = [sys.executable, "-m", "tnxctl.cli", "bridge", "--host", daemon.endpoint, "--listen", "127.0.0.1:0"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert "ready" in process.stdout.readline()
        children = children_of(process.pid)
        assert len(children) == 2
        descriptors = [os.pidfd_open(child) for child in children]
        process.kill()
        process.wait()
    for descriptor in descriptors:
        with os.fdopen(descriptor):
            assert_ends(descriptor)


def assert_ends(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(SECONDS * 1e3)


def test_workers_that_cannot_start_end_the_bridge(tmp_path: Path) -> None:
    """Keys are looked up by each worker."""
    (tmp_path / "tensornext").mkdir()
    (tmp_path / "tensornext" / "known_hosts.toml").write_text("[hosts")
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tnxctl.cli", "bridge", "--listen", "127.0.0.1:0", "--host", "gpu-box"]
    for workers in ("1", "2"):
        ended = subprocess.run(
            [*command, "--workers", workers], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert ended.returncode != 0
        assert "known_hosts.toml: not TOML" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""
