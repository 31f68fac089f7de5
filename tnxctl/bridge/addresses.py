"""Addresses that the bridge listens on: as a user types them, and which of them stay within this host."""

from __future__ import annotations

import ipaddress

from tnxctl.endpoint import parse_endpoint
from tnxctl.protocol.errors import InvalidArgument


def parse(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of "host:port", "host", "[::1]:port" or ":port", all addresses of this host.

    Raises:
        InvalidArgument: it is none; the sentence says what is wrong.
    """
    if "://" in text:
        raise InvalidArgument(f"address {text!r}: expected a host and a port, such as 127.0.0.1:{default_port}")
    host, colon, port = text.rpartition(":")
    if not colon or host.endswith(":") or ("]" in port) or (":" in host and not host.endswith("]")):
        host, port = text, str(default_port)
    if port == "0" and host:
        return parse_endpoint(host)[len("tcp://") :].rpartition(":")[0].strip("[]"), 0
    endpoint = parse_endpoint(f"{host or '0.0.0.0'}:{port}" if not _is_bare_ipv6(host) else f"[{host}]:{port}")
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this host can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may stand for anything


def spell(address: tuple[str, int]) -> str:
    """An address as a user types it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_bare_ipv6(host: str) -> bool:
    return ":" in host and not host.startswith("[")
