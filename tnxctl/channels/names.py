"""Host names, looked up without blocking whoever polls."""

from __future__ import annotations

import contextlib
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

    Attributes:
        fd: readable once it is over.
    """

    def __init__(self, endpoint: str) -> None:
        self._found: Address | None = None
        self._reader, writer = socket.socketpair()
        self.fd = self._reader.fileno()
        threading.Thread(target=self._run, args=(endpoint, writer), name="tnxctl-lookup", daemon=True).start()

    def _run(self, endpoint: str, writer: socket.socket) -> None:
        host, port = _split(endpoint)
        family = socket.AF_INET6 if "[" in endpoint else socket.AF_INET  # as libzmq looks names up
        with writer, contextlib.suppress(OSError, UnicodeError):
            family, _, _, _, address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0]
            self._found = family, address

    def result(self) -> Address | None:
        """The address that was found, once `fd` is readable; None: there is none."""
        return self._found

    def close(self) -> None:
        """Forget it. Idempotent."""
        self._reader.close()


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)
