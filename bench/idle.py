"""Peers that connect and say nothing: `python bench/idle.py ENDPOINT COUNT`.

Each is a TCP connection with ZeroMQ's handshake done. When all are there, or as many as this process may open, it
prints their number; it ends, and they with it, when stdin does.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from urllib.parse import urlsplit

from zmtpsocket import GREETING, HELLO

_SPARE_FILES = 64  # for Python itself; the daemon needs some, too
_SECONDS = 30.0


def connect(endpoint: str, count: int) -> list[socket.socket]:
    """Open so many connections, or as many as open files are allowed. Each has got the other side's greeting."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    address = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    peers = []
    for _ in range(min(count, most - _SPARE_FILES)):
        peer = socket.create_connection(address, _SECONDS)
        peers.append(peer)
        peer.sendall(HELLO)
        waiting = len(GREETING)
        while waiting:
            part = peer.recv(waiting)
            if not part:
                raise ConnectionError(f"{endpoint} hung up after {len(peers)} connections")
            waiting -= len(part)
    return peers


def main() -> None:
    endpoint, count = sys.argv[1:]
    peers = connect(endpoint, int(count))
    print(len(peers), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
