"""Leaky daemon, as a program: it leaks what the routing id of a new peer names."""

from __future__ import annotations

import os
import threading

import zmq

from tnxd.cli import main
from tnxd.transport.clients import Connection
from tnxd.transport.connections import Connections

LEFT: list[bytearray] = []

LEAKS = {
    b"a thread": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    b"a descriptor": lambda: os.dup(0),
    b"memory": lambda: LEFT.append(bytearray(os.urandom(1 << 20) * 96)),
}

_meet = Connections._meet


def meet(connections: Connections, peer: bytes, frame: zmq.Frame) -> Connection:
    """Leak what the routing id of a new peer names."""
    if peer in LEAKS:
        LEAKS[peer]()
    return _meet(connections, peer, frame)


if __name__ == "__main__":
    Connections._meet = meet  # type: ignore[method-assign]
    main()
