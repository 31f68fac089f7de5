"""Endpoints: the address of a daemon as a user types it, translated into the one spelling that ZeroMQ connects to."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import DEFAULT_PORT

DEFAULT_ENDPOINT = "127.0.0.1"

# sun_path of a Unix socket holds 108 bytes with its final zero (104 on macOS, where the connect says so).
_MAX_IPC_PATH = 107

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_PORT = re.compile(r"[0-9]{1,5}")


def parse_endpoint(text: str) -> str:
    """The ZeroMQ endpoint that `text` means.

    Accepted are an IPv4 or IPv6 address or a host name, each with or without a port and `tcp://`, and
    `ipc://` with a path. The port is `tnxctl.protocol.wire.DEFAULT_PORT` unless given. An IPv6 address with a port
    stands in brackets. A host name is looked up as IPv4. Of several addresses, libzmq tries the first alone; without
    keys, on Linux, each is tried in turn, for five seconds if nothing answers there.

        "192.168.1.100"       -> "tcp://192.168.1.100:5555"
        "gpu-box:6000"        -> "tcp://gpu-box:6000"
        "::1"                 -> "tcp://[::1]:5555"
        "tcp://[::1]:6000"    -> "tcp://[::1]:6000"
        "ipc:///run/tnx.sock" -> "ipc:///run/tnx.sock"

    Raises:
        InvalidArgument: anything else; the sentence names `text` and what is wrong with it.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"endpoint {text!r}: expected a string, got {type(text).__name__}")
    transport, separator, rest = text.partition("://")
    if not separator:
        transport, rest = "tcp", text
    if transport == "tcp":
        host, port = _split_port(text, rest)
        return f"tcp://{_host(text, host)}:{_port(text, port)}"
    if transport == "ipc":
        return f"ipc://{_ipc_path(text, rest)}"
    raise InvalidArgument(f"endpoint {text!r}: unknown transport {transport!r}, use tcp:// or ipc://")


def parse_endpoints(endpoint: str | Sequence[str]) -> list[str]:
    """The ZeroMQ endpoints that one or several texts mean, see `parse_endpoint`.

    Raises:
        InvalidArgument: there is none, or one comes twice, or is none.
    """
    if isinstance(endpoint, str) or not isinstance(endpoint, Sequence):
        return [parse_endpoint(endpoint)]
    endpoints = [parse_endpoint(text) for text in endpoint]
    if not endpoints:
        raise InvalidArgument("endpoint: expected an address or several, got an empty list")
    for each in endpoints:
        if endpoints.count(each) > 1:
            raise InvalidArgument(f"endpoint {each!r} comes twice: each daemon is one")
    return endpoints


def _split_port(text: str, rest: str) -> tuple[str, str]:
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or ":" not in host or (tail and not tail.startswith(":")):
            raise InvalidArgument(f"endpoint {text!r}: expected [IPv6 address] or [IPv6 address]:port")
        return host, tail[1:] if tail else str(DEFAULT_PORT)
    if rest.count(":") > 1:  # a bare IPv6 address: what follows its last colon is no port
        return rest, str(DEFAULT_PORT)
    host, colon, port = rest.partition(":")
    return host, port if colon else str(DEFAULT_PORT)


def _host(text: str, host: str) -> str:
    if ":" in host:
        try:
            return f"[{ipaddress.IPv6Address(host)}]"
        except ValueError as error:
            raise InvalidArgument(f"endpoint {text!r}: {host!r} is not an IPv6 address: {error}") from None
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdecimal():  # no top-level domain is a number, so this is meant as an address
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise InvalidArgument(f"endpoint {text!r}: {host!r} is not an IPv4 address: {error}") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidArgument(f"endpoint {text!r}: {host!r} is not a host name or an IP address")
    return host


def _port(text: str, port: str) -> int:
    if _PORT.fullmatch(port) and 1 <= int(port) <= 65535:
        return int(port)
    raise InvalidArgument(f"endpoint {text!r}: port {port!r} is not a number in 1..65535")


def _ipc_path(text: str, path: str) -> str:
    if not path or "\0" in path:
        raise InvalidArgument(f"endpoint {text!r}: expected ipc:// and the path of a socket, as in ipc:///run/tnx.sock")
    if len(os.fsencode(path)) > _MAX_IPC_PATH:
        raise InvalidArgument(f"endpoint {text!r}: the path is longer than {_MAX_IPC_PATH} bytes")
    return path
