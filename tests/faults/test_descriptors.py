"""File descriptors run out: new peers have to wait, old ones are served, and the process stays alive.

On tcp. When an ipc listener runs out of them, libzmq 4.3.5 ends the process, and nothing can be done about it but to
raise the limit and to admit few: docs/architecture.md, "Sockets".
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
from pathlib import Path

import pytest

from daemons import running
from dealer import Dealer, rows

MOST = 80
"""Descriptors that the process may have. It needs some 40 itself."""


def few() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))


@pytest.mark.slow
def test_connections_beyond_the_descriptors_wait(tmp_path: Path) -> None:
    arguments = ("--bind", "tcp://127.0.0.1:*")
    with running(tmp_path, *arguments, before=few, stdout=subprocess.PIPE) as daemon:
        assert daemon.process.stdout is not None
        line = daemon.process.stdout.readline().decode()
        tcp = next(word.strip(",;") for word in line.split() if word.startswith("tcp://"))
        host, _, port = tcp.removeprefix("tcp://").rpartition(":")
        with Dealer(daemon.endpoint) as here, contextlib.ExitStack() as stack:
            here.await_health(status="ready")
            for _ in range(2 * MOST):
                peer = stack.enter_context(socket.socket())
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    peer.connect((host, int(port)))
                here.predict(rows(1))
                here.result()
            assert len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= MOST
        with Dealer(tcp) as late:  # they have gone
            late.predict(rows(1))
            late.result()
        assert daemon.stop() == 0
