"""Connections of gRPC that are to end: gRPC itself can end none, nor a call whose client does not read."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket

from tnxctl.descriptors import borrowed

_DESCRIPTORS = "/dev/fd"
"""Folder with the numbers of all open files of a process. Windows has none, and ends no connection this way."""

_Address = tuple[str, int]


class Closer:
    """Ends connections of clients to a port of this process. Args: port: where gRPC listens."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ending: set[_Address] = set()

    def end(self, address: str) -> None:
        """End the connection that comes from an address, HOST:PORT, and with it all its calls; soon."""
        host, _, port = address.rpartition(":")
        if not self._ending:  # one search for all that end at a time
            asyncio.get_running_loop().call_soon(self._search)
        self._ending.add(_plain(host.strip("[]"), int(port)))

    def _search(self) -> None:
        ending, self._ending = self._ending, set()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(_DESCRIPTORS):
                with contextlib.suppress(OSError):  # it is no connection, or has been closed meanwhile
                    self._shut_down(int(name), ending)

    def _shut_down(self, descriptor: int, ending: set[_Address]) -> None:
        with borrowed(descriptor) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                return
            if connection.getsockname()[1] == self._port and _plain(*connection.getpeername()[:2]) in ending:
                connection.shutdown(socket.SHUT_RDWR)


def _plain(host: str, port: int) -> _Address:
    """An address as gRPC and the kernel both have it: of IPv4 if it is that, and without the name of an interface."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found), port
