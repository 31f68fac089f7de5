"""Restarts under load: no client sees an error, no call is lost, none is answered twice."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from restarts import LAUNCH, restart, started

MANY = 100


@pytest.mark.slow
def test_nobody_notices_a_restart_while_somebody_holds_the_listeners(tmp_path: Path) -> None:
    with started(tmp_path, holds=True) as starter:
        report = restart(starter.endpoints, [starter.kill, starter.replace], 2)
        assert report.is_good, report
        assert (tmp_path / "tnx").is_socket()
        assert not (tmp_path / "tnx.lock").exists(), "it has not bound the path itself"


@pytest.mark.slow
def test_without_a_holder_a_restart_is_a_pause(tmp_path: Path) -> None:
    with started(tmp_path, holds=False) as starter:
        report = restart(starter.endpoints, [starter.terminate], 1)
        assert report.is_good, report


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("holds", "keyed"), [(True, False), (True, True), (False, False)])
def test_nobody_notices_a_hundred_restarts(tmp_path: Path, holds: bool, keyed: bool) -> None:
    with started(tmp_path, holds=holds, keyed=keyed) as starter:
        kinds = [starter.terminate, starter.kill, *([starter.replace] if holds else [])]
        endpoints = starter.endpoints[:1] if keyed else starter.endpoints
        report = restart(endpoints, kinds, MANY, options=starter.options)
        assert report.is_good, report


def launched(listeners: list[socket.socket], names: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A daemon with inherited listeners that ends by itself."""
    numbers = [each.fileno() for each in listeners]
    command = [sys.executable, "-c", LAUNCH, ",".join(map(str, numbers)), names, "-m", "tnxd", *arguments]
    return subprocess.run(command, pass_fds=numbers, capture_output=True, text=True, timeout=60)


def test_a_listener_that_the_configuration_does_not_name_is_refused_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        ended = launched([listener], "tnxd")
    assert ended.returncode == 2, "systemd is not to try again"
    assert f"tnxd: systemd holds {address}" in ended.stderr
    assert "bind has tcp://127.0.0.1:5555: name it in bind, or change ListenStream=" in ended.stderr


def test_what_systemd_holds_for_others_is_left_alone(tmp_path: Path) -> None:
    """A datagram socket, which the daemon could not take: it goes on, and fails at what the test makes it fail at."""
    (tmp_path / "file").touch()
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        ended = launched([other], "metrics", "--bind", f"ipc://{tmp_path}/file")
        assert ended.returncode == 1
        assert "something else than a socket at that path" in ended.stderr
        ended = launched([other], "tnxd", "--bind", f"ipc://{tmp_path}/file")
        assert ended.returncode == 2
        assert "is no listening TCP or Unix stream socket" in ended.stderr


def test_the_program_starts() -> None:
    program = Path(__file__).with_name("restarts.py")
    ended = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
