"""Listening sockets of the bridge, one for each worker: the kernel shares connections out among them."""

from __future__ import annotations

import socket
import sys

from tnxctl.bridge.addresses import spell
from tnxctl.protocol.errors import FailedPrecondition

BACKLOG = 1024  # connections that wait to be accepted


def listen(address: tuple[str, int], count: int) -> list[socket.socket]:
    """Sockets that listen on one address: as many as asked for, or one where the kernel does not share out.

    Raises:
        FailedPrecondition: it cannot be had: somebody else listens there, or it is not one of this host.
    """
    shares_out = count > 1 and sys.platform == "linux"  # others give all connections to one of them
    sockets: list[socket.socket] = []
    try:
        # This one shares with nobody, so another program's address is not taken a part of.
        first = socket.create_server(address, family=_family(address), backlog=BACKLOG)
        if not shares_out:
            return [first]
        address = first.getsockname()[:2]
        first.close()
        while len(sockets) < count:
            sockets.append(socket.create_server(address, family=_family(address), backlog=BACKLOG, reuse_port=True))
    except OSError as error:
        for each in sockets:
            each.close()
        raise FailedPrecondition(f"cannot listen on {spell(address)}: {error.strerror or error}") from None
    return sockets


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET
