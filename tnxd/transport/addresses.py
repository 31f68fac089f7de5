"""Addresses of peers, as ZeroMQ writes them, and the names of clients that are told by nothing else."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether an address, as an endpoint has it, is one that only this host can reach."""
    return identified(host.strip("[]"))[1]


def identified(address: str) -> tuple[str, bool]:
    """Name of a client, and whether it is on this host, from an address as ZeroMQ writes it, ipc:// included."""
    if address.startswith("localhost:"):
        return "uid:" + address.split(":")[1], True
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address or "unknown", False
    if parsed.version == 6:
        if parsed.ipv4_mapped is None and not parsed.is_loopback:  # a host has as many of these as it likes
            return str(ipaddress.ip_network((parsed, 64), strict=False)), False
        parsed = parsed.ipv4_mapped or parsed
    return str(parsed), parsed.is_loopback


def in_words(address: str) -> str:
    """Address of a peer for people: of one on ipc://, which process it is."""
    return f"process {address.rpartition(':')[2]}" if address.startswith("localhost:") else address
