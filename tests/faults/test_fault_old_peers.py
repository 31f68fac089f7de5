"""Peers of another age or another protocol: bytes that are no ZMTP 3."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import Daemon
from invariants import needs_proc, unharmed
from zmtp import GREETING, Peer, frame, message

UNVERSIONED = bytes.fromhex("0100020078")
"""A whole message of a ZeroMQ 2 peer: an empty identity, and a frame that holds "x"."""

ZMTP_2 = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x01\x05" + b"\x00\x00" + b"\x00\x01x"
"""Greeting of ZMTP 2.0 by a DEALER, its empty identity, and a message."""

TLS_HELLO = bytes.fromhex("16030100a5010000a10303") + bytes(range(160))

OPENINGS = {
    "unversioned": UNVERSIONED,
    "ZMTP 2": ZMTP_2,
    "TLS": TLS_HELLO,
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "SMB": b"\0\0\0\x85\xffSMBr" + bytes(120),
    "newline": b"\n",
    "nothing": b"",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "half a greeting": GREETING[:11],
    "random": os.urandom(512),
}


def open_with(openings: Iterable[bytes], *addresses: str | tuple[str, int]) -> None:
    """Connect to each address for each opening, side by side, since who is not answered waits for a moment."""
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(_open_with, address, opening) for opening in openings for address in addresses]
    for each in done:
        each.result()


def _open_with(address: str | tuple[str, int], opening: bytes) -> None:
    """Connect, say that, and hang up once the other side has, or soon if it waits for more."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as peer:
        peer.connect(address)
        peer.sendall(opening)
        peer.settimeout(0.3)
        try:
            while peer.recv(4096):
                pass
        except OSError:
            pass


@needs_proc
def test_messages_of_scanners_are_survived(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    path = tmp_path / "tnxd"
    daemon = run_daemon("--bind", "tcp://127.0.0.1:*", "--bind", f"ipc://{path}", "--model", "mlp")
    tcp = ("127.0.0.1", int(daemon.endpoint.rpartition(":")[2]))
    with unharmed(daemon):
        open_with(OPENINGS.values(), tcp, str(path))


@needs_proc
def test_ping_behind_unread_messages_of_a_peer_that_is_gone_is_survived(
    run_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """libzmq answers a PING though it knows that the connection is lost, and ends the process: where its queue was full
    meanwhile, it reads on when there is room, and only then finds the PING."""
    path = tmp_path / "tnxd"
    daemon = run_daemon("--bind", "tcp://127.0.0.1:*", "--bind", f"ipc://{path}", "--model", "mlp")
    ping = frame(b"\x04PING\0\0", command=True)
    with unharmed(daemon):
        for endpoint in (daemon.endpoint, f"ipc://{path}"):
            for _ in range(20):
                with Peer(endpoint) as peer, contextlib.suppress(OSError):
                    peer.greet().write((message(b"x") * 40 + ping) * 200)
                    peer.reset()


@pytest.mark.parametrize("command", ["PING", "SUBSCRIBE", "ERROR", "JOIN"])
def test_commands_after_the_handshake_are_survived(daemon: Daemon, command: str) -> None:
    with unharmed(daemon, settled=False), Peer(daemon.endpoint) as peer:
        body = bytes([len(command)]) + command.encode()
        peer.greet().write(bytes([4, len(body) + 2]) + body + b"\0\0")
        peer.reset()
