"""Deliveries: answers that clients of gRPC are taking; connections end whose clients take them too slowly."""

from __future__ import annotations

import asyncio

from tnxctl.bridge.grpc.closing import Closer
from tnxctl.bridge.settings import HttpLimits


class Deliveries:
    """Deliveries of one server.

    Each may take `message_timeout_s`, and a second for each `body_rate` bytes that its connection is to take meanwhile.
    Those of other calls count as well: they go out by turns.
    """

    def __init__(self, closer: Closer, limits: HttpLimits) -> None:
        self._closer = closer
        self._limits = limits
        self._connections: dict[str, _Connection] = {}

    def begin(self, address: str, nbytes: int) -> Delivery:
        """Begin a delivery of so many bytes to an address, HOST:PORT. It lasts until its context is left."""
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = _Connection(address)
        return Delivery(self, connection, nbytes)

    def allowed_s(self, nbytes: int) -> float:
        """Seconds that so many bytes may take."""
        return self._limits.message_timeout_s + nbytes / self._limits.body_rate

    def forget(self, address: str) -> None:
        """Forget a connection that has none any more."""
        del self._connections[address]

    def give_up(self, address: str) -> None:
        """End a connection, soon."""
        self._closer.end(address)


class _Connection:
    """Connection with deliveries.

    Attributes:
        begun, ended: bytes of all that have begun, and of those that are over. open: number of the others.
    """

    __slots__ = ("address", "begun", "ended", "open")

    def __init__(self, address: str) -> None:
        self.address = address
        self.begun = self.ended = self.open = 0


class Delivery:
    """Delivery of one answer, as a context."""

    __slots__ = ("_before", "_connection", "_deliveries", "_loop", "_nbytes", "_since", "_timer")

    def __init__(self, deliveries: Deliveries, connection: _Connection, nbytes: int) -> None:
        self._deliveries = deliveries
        self._connection = connection
        self._nbytes = nbytes
        self._before = connection.ended
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        connection.begun += nbytes
        connection.open += 1
        self._timer = self._loop.call_at(self._due, self._look)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        connection = self._connection
        connection.ended += self._nbytes
        connection.open -= 1
        if not connection.open:
            self._deliveries.forget(connection.address)

    @property
    def _due(self) -> float:
        """Time of the loop until which it is to be over: later with each that has begun beside it."""
        return self._since + self._deliveries.allowed_s(self._connection.begun - self._before)

    def _look(self) -> None:
        due = self._due
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self._deliveries.give_up(self._connection.address)
