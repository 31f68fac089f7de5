"""Host names, looked up without blocking whoever polls."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import threading
from typing import Any

Address = tuple[socket.AddressFamily, Any]
"""Family and address of a socket, as `connect` takes it."""


def address_of(endpoint: str) -> Address | None:
    """The address that an endpoint says; None: it has a host name, which is to be looked up."""
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        return socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path
    host, port = _split(endpoint)
    if "%" in host:  # the system knows the number of an interface
        return None
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return socket.AF_INET if version == 4 else socket.AF_INET6, (host, port)


class Lookup:
    """A lookup of the host name in an endpoint, in a thread of its own, since it may take half a minute.

    Raises OSError, when it is made: no file descriptor is left, or no thread.

    Attributes:
        fd: readable once it is over.
        is_over: whether it is.
        found: the addresses, in the order in which the system would have them tried; none, unless it is over.
    """

    def __init__(self, endpoint: str) -> None:
        self.found: list[Address] = []
        self.is_over = False
        self._reader, writer = socket.socketpair()
        self.fd = self._reader.fileno()
        thread = threading.Thread(target=self._run, args=(endpoint, writer), name="tnxctl-lookup", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._reader.close()
            writer.close()
            raise OSError(errno.EAGAIN, str(error)) from None

    def _run(self, endpoint: str, writer: socket.socket) -> None:
        host, port = _split(endpoint)
        family = socket.AF_INET6 if "[" in endpoint else socket.AF_INET  # as libzmq looks names up
        with writer:
            try:
                with contextlib.suppress(OSError, UnicodeError, MemoryError):
                    told = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
                    self.found = [(family, address) for family, _, _, _, address in told]
            finally:
                self.is_over = True
                with contextlib.suppress(OSError):  # nobody waits any more
                    # A forked child may keep a copy of it open: that it is closed would not be seen.
                    writer.send(b"\0")

    def close(self) -> None:
        """Forget it. Idempotent."""
        self._reader.close()


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)
