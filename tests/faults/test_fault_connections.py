"""Connections: very many of them, and those that take nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer
from headers import pack, predict_header
from invariants import check_alive, needs_proc, unharmed
from raw import good
from zmtp import GREETING, Peer, frame, message

HELLO = GREETING + frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER", command=True)


@needs_proc
@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(240)])])
def test_storm_of_connections_leaves_nothing_behind(run_daemon: Callable[..., Daemon], count: int) -> None:
    """Each says hello, sends a request and leaves, so that descriptors are used again before requests are read."""
    daemon = run_daemon("--model", "mlp")
    address = "127.0.0.1", int(daemon.endpoint.rpartition(":")[2])
    with unharmed(daemon):
        for number in range(count):
            with socket.socket() as peer:
                peer.connect(address)
                peer.sendall(HELLO + good() if number % 2 else HELLO)
                if number % 4 == 1:
                    peer.recv(64)
    with Dealer(daemon.endpoint) as dealer:
        while dealer.health().connections > 1:  # this one
            pass


@needs_proc
def test_connections_of_one_client_are_limited(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    config = tmp_path / "tnxd.toml"
    config.write_text("[clients]\nmax_connections = 20\n")
    daemon = run_daemon("--config", str(config), "--model", "mlp")
    with unharmed(daemon), contextlib.ExitStack() as stack:
        refused = 0
        for _ in range(40):
            peer = stack.enter_context(Peer(daemon.endpoint, timeout=60))
            try:
                peer.greet()
            except ConnectionError:
                refused += 1
        assert 20 <= refused < 35  # not fewer: one that asks is counted already
    check_alive(daemon)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(240)  # a million rows are computed, which took 46 seconds on a busy machine
def test_peers_with_full_queues_cost_nothing_while_nothing_happens(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon("--model", "mlp")
    rows, count = 64, 40
    inputs = bytes(rows * 1024)
    with unharmed(daemon), contextlib.ExitStack() as stack:
        for _ in range(count):
            peer = stack.enter_context(Peer(daemon.endpoint, receive_buffer=4096, timeout=60))
            peer.greet()
            for number in range(400):
                peer.write(message(pack(predict_header(id=number, inputs=[["input", "FP32", [rows, 256]]])), inputs))
        with Dealer(daemon.endpoint) as dealer:
            while dealer.health().queued:
                pass
            used, since = _cpu_s(daemon), dealer.health().uptime_s
            while (now := dealer.health().uptime_s) < since + 3:
                dealer.socket.poll(200)  # nothing comes
            print(
                f"{count} full peers: {(_cpu_s(daemon) - used) / (now - since):.1%} of a core, an honest client's too"
            )


def _cpu_s(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
