"""Fair queue of connections: how long a message may have waited in it, from how many were taken out."""

from __future__ import annotations

from tnxd.transport.clients import Connection

# A connection in which nothing waited takes part again after so many messages at the latest (libzmq's
# `inbound_poll_rate`).
_NOTICED_AFTER = 100


class FairQueue:
    """Bounds of waiting times, from libzmq's rule: a ROUTER takes one message from each connection in turn.

    So a connection of which nothing came for a round had nothing to be read. What comes of it then has waited for a
    round at most, however long there has been something to read from others.

    Attributes:
        connections: how many there are: no round has more messages.
    """

    __slots__ = ("_begin_ns", "_last_ns", "_last_taken", "connections")

    def __init__(self) -> None:
        self.connections = 0
        self._begin_ns = self._last_ns = 0  # the last whole round began, and ended
        self._last_taken = 0

    def went_on(self, taken: int, now_ns: int, connections: int) -> None:
        """Note how far the caller is, at times while there is more to be read.

        Args:
            taken: number of messages that were taken out since the start.
            connections: how many there are.
        """
        self.connections = connections
        if taken - self._last_taken > connections + _NOTICED_AFTER:
            self._begin_ns, self._last_ns = self._last_ns, now_ns
            self._last_taken = taken

    def filled_ns(self, connection: Connection, taken: int) -> int:
        """Time before which nothing of a connection waited, as far as is known; 0: nothing is known.

        To be called for a message of it that was just taken out.
        """
        if taken - connection.heard > self.connections:
            connection.filled_ns = self._begin_ns
        connection.heard = taken
        return connection.filled_ns
