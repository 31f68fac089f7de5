"""Notification of a service manager that does not listen: the daemon does not wait for it, and sends all later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tnxd.process.systemd import Notifier


def test_notifications_to_a_full_socket_are_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    notifier = Notifier()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(60)
        sent = 0
        while notifier.retry() and sent < 100_000:
            notifier.send(f"STATUS={sent}")
            sent += 1
        assert sent < 100_000, "this kernel's sockets are never full"
        notifier.send("READY=1")
        for _ in range(100):
            notifier.alive()  # these may be lost
        for number in range(sent):
            assert systemd.recv(4096) == f"STATUS={number}".encode()
            notifier.retry()
        assert systemd.recv(4096) == b"READY=1"
        notifier.alive()
        assert systemd.recv(4096) == b"WATCHDOG=1"


def test_notifications_to_a_socket_that_is_gone_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notifier = Notifier()
    notifier.send("READY=1")
    assert notifier.retry()
