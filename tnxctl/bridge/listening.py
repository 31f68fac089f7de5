"""Listening sockets of the bridge, one for each worker: the kernel shares connections out among them."""

from __future__ import annotations

import os
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
        raise _cannot_listen(address, error) from None
    return sockets


def reserve(address: tuple[str, int]) -> tuple[tuple[str, int], socket.socket | None]:
    """Take an address for servers that bind it themselves: with a port, if that was 0, and a socket that keeps it.

    The socket is bound and does not listen, so the kernel gives it no connections. Where ports cannot be shared there
    is none.

    Raises:
        FailedPrecondition: it cannot be had, see `listen`.
    """
    (first,) = listen(address, 1)
    with first:
        address = first.getsockname()[:2]
    if not hasattr(socket, "SO_REUSEPORT"):
        return address, None
    keeper = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(address)
    except OSError as error:
        keeper.close()
        raise _cannot_listen(address, error) from None
    return address, keeper


def _cannot_listen(address: tuple[str, int], error: OSError) -> FailedPrecondition:
    # The texts of socket.create_server repeat the address; those of getaddrinfo have numbers of their own.
    if error.errno is None or isinstance(error, socket.gaierror):
        why = error.strerror or str(error)
    else:
        why = os.strerror(error.errno)
    return FailedPrecondition(f"cannot listen on {spell(address)}: {why}")


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET
