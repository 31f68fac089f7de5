"""Inherited listeners: sockets that the service manager holds, and the endpoints of the configuration that they fit."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping, Sequence

from tnxctl.protocol.errors import InvalidArgument

Listener = socket.socket


def listeners(descriptors: Iterable[int]) -> dict[str, Listener]:
    """Listening sockets by their endpoints, as ZeroMQ spells them.

    Raises:
        InvalidArgument: a descriptor is no socket that ZeroMQ could accept connections from.
    """
    found = {}
    for descriptor in descriptors:
        try:
            listener = socket.socket(fileno=descriptor)
            listener.set_inheritable(False)
            # Another process may accept from it, too: the old daemon beside the new one. Who is late must not block.
            listener.setblocking(False)
            listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise InvalidArgument(f"file descriptor {descriptor}, of the service manager: {reason}") from None
        endpoint = _endpoint(listener)
        if not listens or not endpoint:
            listener.close()
            raise InvalidArgument(
                f"file descriptor {descriptor}, of the service manager, is no listening TCP or Unix stream socket: "
                f"tensornext.socket takes ListenStream= alone"
            )
        found[endpoint] = listener
    return found


def assign(bind: Sequence[str], held: Mapping[str, Listener]) -> dict[str, Listener | None]:
    """The endpoints to listen on, each with the listener that is held for it; None: the daemon has to bind it itself.

    Those of the configuration, and every path that is held: who may connect there, the service manager has said. An
    address has to be in the configuration as well, which is where it is decided what the network reaches.

    Args:
        bind: endpoints of the configuration. held: listeners by their endpoints.

    Raises:
        InvalidArgument: an address that is held is not in the configuration: its clients would wait for ever.
    """
    assigned: dict[str, Listener | None] = {}
    left = dict(held)
    for endpoint in bind:
        assigned[endpoint] = left.pop(_literal(endpoint), None)
    for endpoint, listener in left.items():
        if endpoint.startswith("tcp://"):
            raise InvalidArgument(
                f"systemd holds {endpoint} for the daemon, and bind has {', '.join(bind) or 'nothing'}: name it in "
                f"bind, or change ListenStream= by `systemctl edit tensornext.socket`, or do without that unit: "
                f"`systemctl disable --now tensornext.socket`"
            )
        assigned[endpoint] = listener
    return assigned


def _endpoint(listener: Listener) -> str:
    """Its endpoint; "" if ZeroMQ has none for it."""
    if listener.type != socket.SOCK_STREAM:
        return ""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        path = os.fsdecode(address)
        return f"ipc://@{path[1:]}" if path.startswith("\0") else f"ipc://{path}"
    if listener.family == socket.AF_INET6:
        return f"tcp://[{address[0]}]:{address[1]}"
    return f"tcp://{address[0]}:{address[1]}" if listener.family == socket.AF_INET else ""


def _literal(endpoint: str) -> str:
    """An endpoint as `_endpoint` would spell it: `*` is every IPv4 address, and an IPv6 address may be written out."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://"):
        return endpoint
    try:
        address = ipaddress.ip_address("0.0.0.0" if host == "*" else host.strip("[]"))
    except ValueError:
        return endpoint  # a name, or that of an interface
    return f"tcp://[{address}]:{port}" if address.version == 6 else f"tcp://{address}:{port}"
