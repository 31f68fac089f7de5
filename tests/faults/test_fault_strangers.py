"""Access of strangers: which clients may give orders about models, and what the log says about the others."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer
from headers import pack
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument
from tnxd.config import Clients, load
from tnxd.transport.addresses import is_loopback
from tnxd.transport.client_limits import Admission

ORDER = pack({"type": "reload", "v": 1, "id": 3})


def own_address() -> str:
    """Address of this machine other than loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def test_orders_come_from_the_same_host_unless_configured_otherwise(
    run_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    path, address = tmp_path / "tnxd", own_address()
    if is_loopback(address):
        pytest.skip("this machine has no address but loopback")
    daemon = run_daemon("--bind", f"tcp://{address}:*", "--bind", f"ipc://{path}", "--insecure", "--model", "mlp")
    with Dealer(daemon.endpoint) as stranger, Dealer(f"ipc://{path}") as local:
        stranger.socket.send(ORDER)
        error = stranger.error()
        assert error.code == "PERMISSION_DENIED"
        assert "remote_control" in error.message
        local.socket.send(ORDER)
        assert isinstance(local.receive()[0], wire.ReloadReport)
    said = "anybody who reaches it can run every model, and read"
    log = daemon.logged(said)
    assert log.count(said) == 1, log


@pytest.mark.parametrize(
    ("address", "name", "local"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.9.9.9", "127.9.9.9", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:192.0.2.7", "192.0.2.7", False),
        ("192.0.2.7", "192.0.2.7", False),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", False),
        ("localhost:1000:1000:77", "uid:1000", True),
        ("", "unknown", False),
        ("nonsense", "nonsense", False),
    ],
)
def test_client_of_an_address(address: str, name: str, local: bool) -> None:
    client = Admission(Clients(), max_requests=10, max_bytes=10).client(address)
    assert (client.name, client.local) == (name, local)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("max_connections = 0", "max_connections"),
        ("max_requests = -1", "max_requests"),
        ("max_mb = 0.0", "max_mb"),
        ("max_owed_mb = -3.0", "max_owed_mb"),
        ("memory_mb = 100.0", "clients.memory_mb: 100 MiB"),
        ("max_mb = 1.5", "clients.max_mb: 1.5 MiB"),
        ("memory = 100", "memory"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "tnxd.toml"
    path.write_text(f"[clients]\n{text}\n")
    with pytest.raises(InvalidArgument) as caught:
        load(path, {})
    assert key in caught.value.message
