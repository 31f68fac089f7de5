"""Limits of clients: connections, requests in flight and memory, for each and for all together.

Limits are per client (`tnxd.transport.clients` says who that is), so that nobody gets more by connecting more often.
Many may share one address, behind a NAT or on loopback: where such a client is over a limit, those of its connections
are refused that have more than an even share of it, and the others go on. A name is one client, however many
connections it has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tnxctl.protocol.errors import ResourceExhausted
from tnxctl.protocol.wire import MIB
from tnxd.config import Clients
from tnxd.transport.addresses import identified
from tnxd.transport.clients import RETRY_AFTER_S, Client, Connection
from tnxd.transport.key_ring import AuthorizedKey
from tnxd.transport.rate_limit import RateLimit

_ROOM_WEIGHT = 0.1  # of the newest time until there was room, in the moving average

# A client floods whose refused messages take this part of the loop's time: it does not listen to what it is told.
_FLOOD_SHARE = 0.25

# What one of them counts at most. Where it took longer, the loop's thread was not let run.
_MOST_REFUSED_NS = 100_000_000

# A queue that is smaller than this is too small to keep a quarter of it free for others.
_SHARED_FROM = 1024
_SHARED_FROM_BYTES = 64 * MIB

# A connection that has no more than this is served even where the memory for traffic is full.
_ALWAYS_ADMITTED_BYTES = 64 * 1024

_KEY = "key:"  # before the names of clients that have a key: an address may look like such a name

# Admin commands of one client: each may take minutes, and they run one after the other.
_MAX_COMMANDS = 64
_MAX_COMMANDS_PER_CONNECTION = 16


class AdmittedRequest(Protocol):
    """Request as admission control counts it.

    Attributes:
        id: of its connection. nbytes: of its inputs, and of what is made on its way. connection: the one that it came
            by.
    """

    id: int
    nbytes: int
    connection: Connection


class Admission:
    """Admission control: counts of all clients, held against their limits.

    Args:
        limits: of each client, and of all together.
        max_requests, max_bytes: size of the queue of all; one client gets three quarters of that at most.

    Attributes:
        max_unsent_bytes: limit of the unsent replies of one connection (`clients.max_owed_mb`).
        max_traffic_bytes: limit of `traffic_bytes` (`clients.memory_mb`).
        max_shared_bytes: limit of the memory that clients share with the daemon (`clients.shared_memory_mb`).
        active: number of clients that have requests in flight.
        unsent: bytes of replies that clients have not taken yet.
        unread: bytes that ZeroMQ has received and not handed over, as last measured.
        recorded: bytes that a recording has not written yet, as last measured.
        refused: number of connections that were not let in, for want of room or of a key. cut: number of those that the
            daemon ended.
        gone_taken, gone_refused: requests that were taken in, and refused, of clients that are forgotten.
    """

    def __init__(self, limits: Clients, *, max_requests: int, max_bytes: int) -> None:
        self._max_connections = limits.max_connections
        self._most_requests = max_requests * 3 // 4 if max_requests >= _SHARED_FROM else sys.maxsize
        self._max_requests = min(limits.max_requests, self._most_requests)
        self._most_bytes = max_bytes * 3 // 4 if max_bytes >= _SHARED_FROM_BYTES else sys.maxsize
        self._max_bytes = min(int(limits.max_mb * MIB), self._most_bytes)
        self.max_unsent_bytes = int(limits.max_owed_mb * MIB)
        self.max_traffic_bytes = int(limits.memory_mb * MIB)
        self.max_shared_bytes = int(limits.shared_memory_mb * MIB)
        self._rate = limits.rate
        self._unchecked_bytes = 0
        self._clients: dict[str, Client] = {}
        self.unsent = 0
        self.unread = 0
        self.recorded = 0
        self.refused = 0
        self.active = 0
        self.cut = 0
        self.gone_taken = self.gone_refused = 0
        self._refusing: set[Connection] = set()

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._clients.values()))

    @property
    def requests(self) -> int:
        """Requests in flight, of all."""
        return sum(client.requests for client in self._clients.values())

    @property
    def nbytes(self) -> int:
        """Bytes of requests in flight, of all."""
        return sum(client.nbytes for client in self._clients.values())

    @property
    def traffic_bytes(self) -> int:
        """Bytes of all traffic: unread messages, inputs in flight, unsent replies, and what a recording holds."""
        return self.nbytes + self.unsent + self.unread + self.recorded

    # --- connections -------------------------------------------------------------------------------------------

    def client(self, address: str) -> Client:
        """Client at an address as ZeroMQ writes it, which has shown no key."""
        name, local = identified(address)
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(
                name, local, max_requests=self._max_requests, max_bytes=self._max_bytes
            )
            self._set_rate(client, self._rate)
        return client

    def holder(self, entry: AuthorizedKey) -> Client:
        """Client that has a key, with the limits that its entry says now."""
        client = self._clients.get(_KEY + entry.name)
        if client is None:
            client = self._clients[_KEY + entry.name] = Client(entry.name, False, has_key=True)
        client.max_requests, client.max_bytes = self.limits_of(entry)
        client.share = entry.share
        self._set_rate(client, self.rate_of(entry))
        return client

    def limits_of(self, entry: AuthorizedKey) -> tuple[int, int]:
        """Most requests in flight of the holder of a key, and most bytes of their inputs."""
        return (
            min(entry.max_requests or self._max_requests, self._most_requests),
            min(entry.max_bytes or self._max_bytes, self._most_bytes),
        )

    def rate_of(self, entry: AuthorizedKey) -> float:
        """Most requests a second of the holder of a key; 0: no limit."""
        return self._rate if entry.rate is None else entry.rate

    def _set_rate(self, client: Client, rate: float) -> None:
        if rate != (client.rate.rate if client.rate else 0.0):
            client.rate = RateLimit(rate, time.monotonic()) if rate else None
        client.checked = client.rate is not None or client.max_bytes < self._max_bytes

    def connected(self, client: Client) -> None:
        """Count a connection that was accepted."""
        client.connections += 1

    def disconnected(self, client: Client) -> None:
        """Count a connection that has ended."""
        client.connections -= 1

    def sweep(self) -> None:
        """Forget the clients of whom nothing is left. To be called at times.

        It also sets how many bytes a client may have without a closer look: its even share of half of what is left.
        """
        left = max(self.max_traffic_bytes - self.traffic_bytes, 0) // (2 * len(self._clients) + 2)
        self._unchecked_bytes = min(self._max_bytes, left)
        for key, client in list(self._clients.items()):
            has_left = client.connections <= 0
            gone = has_left and not (client.requests or client.unsent or client.shared or client.commands)
            # Who leaves and comes back must not have a fresh rate by that.
            if gone and (client.rate is None or client.rate.is_full(time.monotonic())):
                self.gone_taken += client.taken
                self.gone_refused += client.refused
                del self._clients[key]

    def refusal(self, address: str, entry: AuthorizedKey | None = None) -> str:
        """Reason why a peer may not connect, which is counted; "" if it may.

        Args:
            entry: of the key that it has shown.
        """
        # A connection counts for its address until its first message; for the holder of its key only then.
        client = self.client(address)
        if client.connections <= self._max_connections and entry is not None:
            client = self._clients.get(_KEY + entry.name, client)
        if client.connections > self._max_connections - client.has_key:
            self.refused += 1
            return f"{client.name} has {self._max_connections} connections, which is the limit"
        return ""

    # --- requests ----------------------------------------------------------------------------------------------

    def check(self, connection: Connection, nbytes: int) -> None:
        """Check that a request may be taken in.

        Args:
            nbytes: of its inputs.

        Raises:
            ResourceExhausted: the client has too much in flight, or all together have.
        """
        client = connection.client
        if client.requests >= client.max_requests or client.checked or client.nbytes + nbytes > self._unchecked_bytes:
            self._check_closely(connection, nbytes)

    def _check_closely(self, connection: Connection, nbytes: int) -> None:
        client, most = connection.client, connection.client.max_requests
        if client.requests >= most and (
            client.has_key or len(connection.requests) * client.connections >= most or client.requests >= 2 * most
        ):
            raise _full(client, f"{client.requests} requests of {client.name} are in flight", most)
        self._check_bytes(connection, nbytes, 0)
        if client.rate is not None:
            wait_s = client.rate.take(time.monotonic())
            if wait_s:
                raise _over(f"{client.name} asks more often than it may", f"{client.rate.rate:g} a second", wait_s)

    def check_bytes(self, connection: Connection, nbytes: int, own: int = 0) -> None:
        """Check that a request may have so many bytes, without a look at the number of requests, and at their rate.

        Args:
            own: bytes that it has already, beside those.

        Raises:
            ResourceExhausted: the client has too much in flight besides, or all together have.
        """
        client = connection.client
        if client.checked or client.nbytes + nbytes > self._unchecked_bytes:
            self._check_bytes(connection, nbytes, own)

    def _check_bytes(self, connection: Connection, nbytes: int, own: int) -> None:
        client, most_bytes = connection.client, connection.client.max_bytes
        if client.nbytes + nbytes > most_bytes and (
            client.nbytes > own
            if client.has_key
            else connection.nbytes > own and (connection.nbytes + nbytes) * client.connections > most_bytes
        ):
            raise _full(client, f"{client.nbytes} bytes of {client.name} are in flight", most_bytes)
        if (
            client.nbytes + nbytes > self._unchecked_bytes
            and self.traffic_bytes + nbytes > self.max_traffic_bytes
            and connection.nbytes + connection.unsent + nbytes > _ALWAYS_ADMITTED_BYTES
        ):
            raise _full(client, f"{self.traffic_bytes} bytes are received, in flight or owed", self.max_traffic_bytes)

    def take(self, connection: Connection, request: AdmittedRequest) -> None:
        """Count a request as in flight."""
        connection.requests[request.id] = request
        client, nbytes = connection.client, request.nbytes
        connection.nbytes += nbytes
        if not client.requests:
            self.active += 1
        client.requests += 1
        client.taken += 1
        client.nbytes += nbytes

    def grow(self, request: AdmittedRequest, nbytes: int) -> None:
        """Count so many bytes more for a request in flight: what is made on its way takes memory, too.

        Raises:
            ResourceExhausted: as `check_bytes` does.
        """
        connection = request.connection
        self.check_bytes(connection, nbytes, request.nbytes)
        request.nbytes += nbytes
        connection.nbytes += nbytes
        connection.client.nbytes += nbytes

    def release(self, request: AdmittedRequest) -> None:
        """Count a request as done: answered, or nobody waits for it any more."""
        connection = request.connection
        del connection.requests[request.id]
        client, nbytes = connection.client, request.nbytes
        connection.nbytes -= nbytes
        client.requests -= 1
        if not client.requests:
            self.active -= 1
        client.nbytes -= nbytes
        if client.full_since:
            client.room_s += _ROOM_WEIGHT * (time.monotonic() - client.full_since - client.room_s)
            client.full_since = 0.0

    def take_command(self, connection: Connection) -> None:
        """Count an admin command. Raises ResourceExhausted: its client has too many that wait."""
        if connection.commands >= _MAX_COMMANDS_PER_CONNECTION:
            raise _over(f"{connection.commands} orders of this connection are waiting", _MAX_COMMANDS_PER_CONNECTION)
        client = connection.client
        if client.commands >= _MAX_COMMANDS and connection.commands:
            raise _over(f"{client.commands} orders of {client.name} are waiting", _MAX_COMMANDS)
        connection.commands += 1
        client.commands += 1

    def release_command(self, connection: Connection) -> None:
        """Count an admin command as carried out."""
        connection.commands -= 1
        connection.client.commands -= 1

    # --- replies -----------------------------------------------------------------------------------------------

    def is_over_unsent_limit(self, connection: Connection) -> bool:
        """Whether a connection takes too few of its replies: itself, or as part of its client by an uneven share."""
        if connection.unsent > self.max_unsent_bytes:
            return True
        client = connection.client
        return client.unsent > 4 * self.max_unsent_bytes and connection.unsent * client.connections > client.unsent

    def must_be_cut(self, connection: Connection) -> bool:
        """Whether a connection has twice the limit of unsent replies."""
        return connection.unsent > 2 * self.max_unsent_bytes

    def add_unsent(self, connection: Connection, nbytes: int) -> None:
        """Count bytes of replies as unsent; negative: they have left, or nobody waits for them any more."""
        connection.unsent += nbytes
        connection.client.unsent += nbytes
        self.unsent += nbytes

    # --- time --------------------------------------------------------------------------------------------------

    def add_refused(self, connection: Connection, nanoseconds: int) -> None:
        """Count the time that the loop spent on a message that was refused."""
        nanoseconds = min(nanoseconds, _MOST_REFUSED_NS)
        connection.refused_ns += nanoseconds
        connection.client.refused_ns += nanoseconds
        self._refusing.add(connection)

    def take_flooding(self, nanoseconds: int) -> list[Connection]:
        """Connections whose refused messages took much of the loop's time since the last call.

        Args:
            nanoseconds: since the last call.
        """
        refusing, self._refusing = self._refusing, set()
        found = [
            connection
            for connection in refusing
            if connection.client.refused_ns > _FLOOD_SHARE * nanoseconds
            and connection.refused_ns > _FLOOD_SHARE * nanoseconds / 8
            and not connection.closed
        ]
        for connection in refusing:
            connection.refused_ns = connection.client.refused_ns = 0
        return found


def _full(client: Client, what: str, limit: int) -> ResourceExhausted:
    """Refusal of a request that finds no room. Its client is told how long it took lately until there was some."""
    client.full_since = client.full_since or time.monotonic()
    return _over(what, limit, client.room_s)


def _over(what: str, limit: int | str, retry_after_s: float = RETRY_AFTER_S) -> ResourceExhausted:
    return ResourceExhausted(f"{what}, the limit is {limit}", retry_after_s=retry_after_s)
