"""Admission: who is connected, what each client still has here, and when that is too much.

A client is an address, or a user of this machine on ipc://; it may have many connections. Limits are per client, so
that nobody gets more by connecting more often. Many may share one address, behind a NAT or on loopback: where a client
is over a limit, those of its connections are refused that have more than an even share of it, and the others go on.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tnxctl.protocol.errors import ResourceExhausted
from tnxd.config import Clients
from tnxd.transport.sender_clock import SenderClock

if TYPE_CHECKING:
    from tnxd.serving.pending import Pending

_MIB = 1024 * 1024

# What a client is told to wait for room, until it is known how long that takes; and the weight of the newest time.
_RETRY_AFTER_S = 0.05
_ROOM_WEIGHT = 0.1

# Whose refused messages take this part of the loop's time does not listen to what it is told.
_FLOOD = 0.25

# A queue that is smaller than this is too small to keep a quarter of it free for others.
_SHARED_FROM = 1024
_SHARED_FROM_BYTES = 64 * _MIB

# Who has no more than this is served even where the memory for traffic is full.
_LITTLE_BYTES = 64 * 1024

# Of one client: each may take minutes, and they run one after the other.
_MAX_COMMANDS = 64
_MAX_COMMANDS_PER_CONNECTION = 16


@dataclass(slots=True, eq=False)
class Client:
    """One address, or one user on ipc://, and what it has here.

    Attributes:
        name: its address, or `uid:` and a number. local: whether it is on this host.
        connections: how many it has. requests, nbytes: in flight, and their inputs. owed: bytes of replies that it has
            not taken yet. commands: of admins, that wait or run.
        refused_ns: time of the loop that its refused messages took since the last look.
        full_since: when a request first found no room, by the monotonic clock; 0 since there is some.
        room_s: how long that takes, as a moving average.
    """

    name: str
    local: bool
    connections: int = 0
    requests: int = 0
    nbytes: int = 0
    owed: int = 0
    commands: int = 0
    refused_ns: int = 0
    full_since: float = 0.0
    room_s: float = _RETRY_AFTER_S


@dataclass(slots=True, eq=False)
class Connection:
    """One peer, from its first message on.

    Attributes:
        peer: its routing id. descriptor: the file descriptor, -1 if unknown. client: whose it is.
        requests: in flight, by id. nbytes: their inputs. commands: of admins, that wait or run.
        owed: bytes of replies that it has not taken yet.
        received, frames: what has been taken from it, in bytes, and in how many frames.
        refused_ns: as of its client.
        clock: of the sender.
        closed: whether it has ended, or is being cut off. cut: whether it was cut off.
    """

    peer: bytes
    descriptor: int
    client: Client
    requests: dict[int, Pending] = field(default_factory=dict)
    nbytes: int = 0
    commands: int = 0
    owed: int = 0
    received: int = 0
    frames: int = 0
    refused_ns: int = 0
    clock: SenderClock = field(default_factory=SenderClock)
    closed: bool = False
    cut: bool = False


class Admission:
    """The one place that says who gets in and what may be taken in from whom.

    Args:
        limits: of each client, and of all together.
        max_requests, max_bytes: what the queue of all holds; one client gets three quarters of that at most.

    Attributes:
        max_owed: bytes of replies that one connection may be owed. ceiling: bytes of all traffic.
        owed: bytes of replies that clients have not taken yet.
        unread: bytes that ZeroMQ has received and not handed over, as of the last look.
        refused: connections. cut: connections that were ended since they took too much.
    """

    def __init__(self, limits: Clients, *, max_requests: int, max_bytes: int) -> None:
        self._max_connections = limits.max_connections
        self._max_requests = limits.max_requests
        if max_requests >= _SHARED_FROM:
            self._max_requests = min(self._max_requests, max_requests * 3 // 4)
        self._max_bytes = int(limits.max_mb * _MIB)
        if max_bytes >= _SHARED_FROM_BYTES:
            self._max_bytes = min(self._max_bytes, max_bytes * 3 // 4)
        self.max_owed = int(limits.max_owed_mb * _MIB)
        self.ceiling = int(limits.memory_mb * _MIB)
        self._easy_bytes = 0
        self._clients: dict[str, Client] = {}
        self.owed = 0
        self.unread = 0
        self.refused = 0
        self.cut = 0
        self._refusing: set[Connection] = set()

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._clients.values()))

    @property
    def clients(self) -> int:
        """The number of clients that are connected or were lately."""
        return len(self._clients)

    @property
    def requests(self) -> int:
        """Requests in flight, of all."""
        return sum(client.requests for client in self._clients.values())

    @property
    def nbytes(self) -> int:
        """Bytes of inputs in flight, of all."""
        return sum(client.nbytes for client in self._clients.values())

    @property
    def held(self) -> int:
        """Bytes of traffic: in flight, owed, and not handed over yet."""
        return self.nbytes + self.owed + self.unread

    # --- connections -------------------------------------------------------------------------------------------

    def client(self, address: str) -> Client:
        """The client at an address as ZeroMQ writes it."""
        name, local = _identified(address)
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, local)
        return client

    def connected(self, client: Client) -> None:
        """It has one more connection."""
        client.connections += 1

    def disconnected(self, client: Client) -> None:
        """It has one less."""
        client.connections -= 1

    def sweep(self) -> None:
        """Forget the clients of whom nothing is left, and see up to where no closer look at the others is needed."""
        left = max(self.ceiling - self.held, 0) // (2 * len(self._clients) + 2)
        self._easy_bytes = min(self._max_bytes, left)
        for client in self:
            if client.connections <= 0 and not (client.requests or client.owed or client.commands):
                del self._clients[client.name]

    def why_not(self, address: str) -> str:
        """The reason why a peer that asks to be let in is not; "" if it is."""
        client = self.client(address)
        if client.connections > self._max_connections:
            self.refused += 1
            return f"{client.name} has {self._max_connections} connections, which is the limit"
        return ""

    # --- requests ----------------------------------------------------------------------------------------------

    def check(self, connection: Connection, nbytes: int) -> None:
        """Check that a request with so many bytes of inputs may be taken in.

        Raises:
            ResourceExhausted: the client has too much in flight, or all together have.
        """
        client = connection.client
        if client.requests >= self._max_requests or client.nbytes + nbytes > self._easy_bytes:
            self._check_closely(connection, nbytes)

    def _check_closely(self, connection: Connection, nbytes: int) -> None:
        client = connection.client
        if client.requests >= self._max_requests and (
            len(connection.requests) * client.connections >= self._max_requests
            or client.requests >= 2 * self._max_requests
        ):
            raise _full(client, f"{client.requests} requests of {client.name} are in flight", self._max_requests)
        if client.nbytes + nbytes > self._max_bytes and (
            connection.nbytes and (connection.nbytes + nbytes) * client.connections > self._max_bytes
        ):
            raise _full(client, f"{client.nbytes} bytes of {client.name} are in flight", self._max_bytes)
        if self.held + nbytes > self.ceiling and connection.nbytes + connection.owed + nbytes > _LITTLE_BYTES:
            raise _full(client, f"{self.held} bytes are received, in flight or owed", self.ceiling)

    def take(self, connection: Connection, request: Pending) -> None:
        """A request is in flight."""
        connection.requests[request.id] = request
        client, nbytes = connection.client, request.nbytes
        connection.nbytes += nbytes
        client.requests += 1
        client.nbytes += nbytes

    def release(self, request: Pending) -> None:
        """A request has been answered, or nobody waits for it any more."""
        connection = request.connection
        del connection.requests[request.id]
        client, nbytes = connection.client, request.nbytes
        connection.nbytes -= nbytes
        client.requests -= 1
        client.nbytes -= nbytes
        if client.full_since:
            client.room_s += _ROOM_WEIGHT * (time.monotonic() - client.full_since - client.room_s)
            client.full_since = 0.0

    def take_command(self, connection: Connection) -> None:
        """An admin command waits. Raises ResourceExhausted."""
        if connection.commands >= _MAX_COMMANDS_PER_CONNECTION:
            raise _over(f"{connection.commands} orders of this connection are waiting", _MAX_COMMANDS_PER_CONNECTION)
        client = connection.client
        if client.commands >= _MAX_COMMANDS and connection.commands:
            raise _over(f"{client.commands} orders of {client.name} are waiting", _MAX_COMMANDS)
        connection.commands += 1
        client.commands += 1

    def release_command(self, connection: Connection) -> None:
        """An admin command has been carried out."""
        connection.commands -= 1
        connection.client.commands -= 1

    # --- replies -----------------------------------------------------------------------------------------------

    def owes_too_much(self, connection: Connection) -> bool:
        """Whether replies of a connection have to wait: it, or its client by an uneven share, does not take them."""
        if connection.owed > self.max_owed:
            return True
        client = connection.client
        return client.owed > 4 * self.max_owed and connection.owed * client.connections > client.owed

    def is_hopeless(self, connection: Connection) -> bool:
        """Whether so much is owed to a connection that it has to be cut off."""
        return connection.owed > 2 * self.max_owed

    def owe(self, connection: Connection, nbytes: int) -> None:
        """Count so many more bytes as owed; negative: they have left, or nobody waits for them any more."""
        connection.owed += nbytes
        connection.client.owed += nbytes
        self.owed += nbytes

    # --- time --------------------------------------------------------------------------------------------------

    def spent(self, connection: Connection, nanoseconds: int) -> None:
        """The loop spent so long on a message of a connection that was refused."""
        connection.refused_ns += nanoseconds
        connection.client.refused_ns += nanoseconds
        self._refusing.add(connection)

    def flooding(self, nanoseconds: int) -> list[Connection]:
        """Connections whose refused messages took much of the loop's time since the last call, which is so long ago."""
        refusing, self._refusing = self._refusing, set()
        found = [
            connection
            for connection in refusing
            if connection.client.refused_ns > _FLOOD * nanoseconds
            and connection.refused_ns > _FLOOD * nanoseconds / 8
            and not connection.closed
        ]
        for connection in refusing:
            connection.refused_ns = connection.client.refused_ns = 0
        return found


def _full(client: Client, what: str, limit: int) -> ResourceExhausted:
    """The refusal of a request that finds no room. Its client is told how long it took lately until there was some."""
    client.full_since = client.full_since or time.monotonic()
    return _over(what, limit, client.room_s)


def _over(what: str, limit: int, retry_after_s: float = _RETRY_AFTER_S) -> ResourceExhausted:
    return ResourceExhausted(f"{what}, the limit is {limit}", retry_after_s=retry_after_s)


def is_loopback(host: str) -> bool:
    """Whether an address, as an endpoint has it, is one that only this host reaches."""
    return _identified(host.strip("[]"))[1]


def _identified(address: str) -> tuple[str, bool]:
    """A client's name, and whether it is on this host. On ipc:// the address is `localhost:UID:GID:PID`."""
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
