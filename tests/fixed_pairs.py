"""Pairs of keys that are the same in every process: workers of pytest have to collect the same tests."""

from __future__ import annotations

import hashlib

import zmq
from zmq.utils import z85

from tnxctl.keys.pairs import Pair


def fixed_pair(name: str, number: int = 1) -> Pair:
    """A pair of that name. Args: number: of a name's pairs."""
    secret = z85.encode(hashlib.sha256(f"{name} {number}".encode()).digest())
    return Pair(name, zmq.curve_public(secret).decode(), secret.decode())
