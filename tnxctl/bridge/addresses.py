"""Addresses that the bridge listens on: as a user types them, and which of them stay within this host."""

from __future__ import annotations

import ipaddress
import re

from tnxctl.protocol.errors import InvalidArgument

_BRACKETED = re.compile(r"\[(?P<host>[0-9A-Fa-f:.%]+)\](?::(?P<port>\d{1,5}))?")
_PLAIN = re.compile(r"(?P<host>[A-Za-z0-9._-]+)(?::(?P<port>\d{1,5}))?")


def parse(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of "host", "host:port", "::1" or "[::1]:port". Port 0 is any that is free.

    Raises:
        InvalidArgument: it is none.
    """
    found = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    host, port = (text, None) if found is None else found.group("host", "port")
    looks_numeric = ":" in host or host.rpartition(".")[2].isdecimal()
    if found is None or looks_numeric:
        try:
            host = str(ipaddress.ip_address(host))
        except ValueError:
            host = ""
    if not host or int(port or 0) > 65535:
        raise InvalidArgument(f"address {text!r}: expected a host and a port, such as 127.0.0.1:{default_port}")
    return host, default_port if port is None else int(port)


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
