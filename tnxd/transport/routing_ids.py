"""Routing ids that libzmq assigns: a zero byte and a number, counted from a random one.

libzmq never seeds that random number, and ends the process where a peer has claimed the id that comes next. So the
number must be one that nobody can foresee, and a peer that claims such an id must go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

import zmq


def seed() -> None:
    """Seed the C library's random numbers, from which libzmq takes the first id. Before the socket is made."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))


class AssignedIds:
    """Ids that libzmq assigns to the peers of one ROUTER socket, which listens on nothing yet."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        address = f"inproc://first-{id(self)}"
        socket.bind(address)
        with context.socket(zmq.DEALER) as first:
            first.connect(address)
            first.send(b"")
            peer = socket.recv_multipart()[0]
        socket.unbind(address)
        self._first = int.from_bytes(peer[1:], "big")

    def is_forged(self, peer: bytes, accepted: int) -> bool:
        """Whether a peer has claimed an id that only libzmq assigns, and that it may yet assign.

        Args:
            accepted: connections that were accepted so far: so many ids have been assigned at most.
        """
        if not peer.startswith(b"\0"):
            return False
        return len(peer) != 5 or (int.from_bytes(peer[1:], "big") - self._first) % 2**32 > accepted
