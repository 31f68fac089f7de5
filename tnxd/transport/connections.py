"""Connections of the ROUTER socket: which are open, which peer each belongs to, and how one is ended.

The monitor tells of file descriptors, messages tell of routing ids. The first message of a peer says which descriptor
it came by.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable

import zmq

from tnxctl.protocol.wire import Role
from tnxd.events import event, machine_event
from tnxd.transport import descriptors
from tnxd.transport.access import Access, is_ipc
from tnxd.transport.addresses import in_words
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Client, Connection
from tnxd.transport.monitor import Monitor
from tnxd.transport.routing_ids import AssignedIds
from tnxd.transport.zap import ZapHandler

log = logging.getLogger(__name__)

_MOST_ENDED = 4096  # connections

# What CURVE adds to a frame: the name of the command, a nonce, the box around it, and its flags.
_CURVE_FRAME_BYTES = 8 + 8 + 16 + 1


class Connections:
    """Open connections by file descriptor, and peers by routing id.

    Attributes:
        by_peer: open connections of which a message came, by routing id.
        by_descriptor: the same ones; several where a descriptor was used again before the first was known to have
            ended.
        clients: whose an open connection is, by descriptor; those of which nothing came yet, too.
        resetting: descriptors of connections that were cut, and of whose end the monitor has not told yet.
        ended: number of connections that have ended.
        on_end: called with each connection that ends, before anybody else learns of it.
    """

    def __init__(
        self, monitor: Monitor, zap: ZapHandler, ids: AssignedIds, admission: Admission, access: Access
    ) -> None:
        self.by_peer: dict[bytes, Connection] = {}
        self.by_descriptor: dict[int, list[Connection]] = {}
        self.clients: dict[int, Client] = {}
        self.resetting: set[int] = set()
        self.ended = 0
        self.on_end: Callable[[Connection], None] = lambda connection: None
        self._monitor = monitor
        self._zap = zap
        self._ids = ids
        self._accepted = 0
        self._admission = admission
        self._access = access
        self._local: dict[int, str] = {}  # addresses of connections on ipc://
        self._disconnected: list[Connection] = []
        self._late: dict[bytes, Connection] = {}  # ended, and ZeroMQ may still hand over messages of theirs

    def poll_monitor(self) -> None:
        """Take in the events of the monitor, and answer the peers that ask to connect. Never blocks."""
        self._take_events()
        self._zap.answer(self._take_events)

    def _take_events(self) -> None:
        """Take in the events of connections."""
        admission = self._admission
        for descriptor, accepted in self._monitor.events():
            if accepted:
                self._accepted += 1
                address = descriptors.peer_address(descriptor)
                client = self.clients[descriptor] = admission.client(address)
                admission.connected(client)
                if is_ipc(address):
                    self._local[descriptor] = address
                    groups, is_open = descriptors.peer_groups(descriptor), descriptors.is_open_to_all(descriptor)
                    self._access.joined(address, groups, is_open)
                continue
            self.ended += 1
            ended = self.clients.pop(descriptor, None)
            self.resetting.discard(descriptor)
            if descriptor in self._local:
                self._access.left(self._local.pop(descriptor))
            for connection in self.by_descriptor.pop(descriptor, ()):
                self._end(connection)
            if ended is not None:
                admission.disconnected(ended)

    def _end(self, connection: Connection) -> None:
        connection.closed = True
        connection.client.received += connection.received
        self.by_peer.pop(connection.peer, None)
        self._disconnected.append(connection)
        self.on_end(connection)

    def take_disconnected(self) -> list[Connection]:
        """Connections that have ended since the last call, each of which may have requests in flight."""
        disconnected, self._disconnected = self._disconnected, []
        return disconnected

    def resolve(self, peer: bytes, frame: zmq.Frame) -> Connection:
        """Connection of a peer that is new, or whose connection has ended or was cut.

        Args:
            frame: of the message that came from it.
        """
        connection = self._late.get(peer) or self._meet(peer, frame)
        if connection.closed and (not self._disconnected or self._disconnected[-1] is not connection):
            self._disconnected.append(connection)  # once more: here is a request that nobody waits for
        return connection

    def _meet(self, peer: bytes, frame: zmq.Frame) -> Connection:
        """Find out which connection a new peer came by."""
        self.poll_monitor()
        descriptor, address, key = -1, "", ""
        with contextlib.suppress(zmq.ZMQError, ValueError):  # what is no ZMTP 3 has none of them
            descriptor = int(frame.get(zmq.SRCFD))
            address = str(frame.get("Peer-Address"))
            key = str(frame.get("User-Id"))  # as the ZAP handler said
        connection = self._identify(peer, descriptor, address, key)
        if descriptor in self.clients:
            self._count_for(connection)
            self.by_peer[peer] = connection
            self.by_descriptor.setdefault(descriptor, []).append(connection)
            if self._ids.is_forged(peer, self._accepted):
                about = event("peer_cut", client=connection.client.name, address=address, reason="routing_id")
                log.warning("%s claims a routing id that begins with a zero byte, and is cut off", address, extra=about)
                self.cut(connection)
            elif self._access.role(address, key) is None:
                about = event("key_revoked", client=connection.client.name, address=address)
                log.warning("%s may not be here any more, and is cut off", in_words(address), extra=about)
                self.cut(connection)
        else:  # it sent this and left
            connection.closed = True
            self._disconnected.append(connection)
            self._remember(connection)
        return connection

    def _identify(self, peer: bytes, descriptor: int, address: str, key: str) -> Connection:
        """Connection of a new peer, with the name and the role that it has."""
        admission, entry = self._admission, self._access.authorized(key)
        return Connection(
            peer,
            descriptor,
            admission.client(address) if entry is None else admission.holder(entry),
            address,
            key,
            self._access.role(address, key) or Role.OBSERVE,
            time.monotonic(),
            _CURVE_FRAME_BYTES if key else 0,
        )

    def _count_for(self, connection: Connection) -> None:
        """Count a connection for its client: until now it counted for its address."""
        before = self.clients[connection.descriptor]
        if before is not connection.client:
            self._admission.disconnected(before)
            self._admission.connected(connection.client)
            self.clients[connection.descriptor] = connection.client

    def reauthorize(self) -> None:
        """Hold all connections against the keys as they are now: roles change, and whose key has gone is cut off."""
        self.poll_monitor()
        for connection in list(self.by_peer.values()):
            entry = self._access.authorized(connection.key)
            if not connection.key or connection.closed:
                continue
            if entry is None or entry.name != connection.client.name:
                client, address = connection.client.name, connection.address
                about = event("key_revoked", client=client, address=address)
                log.warning("%s at %s: its key was removed; cut off", client, address, extra=about)
                self.cut(connection)
                continue
            self._admission.holder(entry)  # its limits
            connection.role = self._access.role(connection.address, connection.key) or Role.OBSERVE

    def kick(self, name: str, spared: Connection) -> int:
        """Cut all connections of clients of a name but one, those of which nothing came too. Returns their number."""
        self.poll_monitor()
        kicked = 0
        for connection in list(self.by_peer.values()):
            if connection.client.name == name and connection is not spared and not connection.closed:
                self.cut(connection)
                kicked += 1
        for descriptor, client in list(self.clients.items()):
            if client.name == name and descriptor not in self.by_descriptor:
                self.reset(descriptor, None)
                kicked += 1
        log.info(
            "%s: %d connections are ended", name, kicked, extra=machine_event("peer_kicked", client=name, count=kicked)
        )
        return kicked

    def _remember(self, connection: Connection) -> None:
        """Keep a connection that has ended, for messages that ZeroMQ has received and not handed over yet."""
        self._late[connection.peer] = connection
        if len(self._late) > _MOST_ENDED:
            del self._late[next(iter(self._late))]

    def cut(self, connection: Connection) -> None:
        """End a connection. What ZeroMQ has received from it is dropped, and so are its replies."""
        if not connection.closed:
            connection.closed = connection.cut = True
            self._remember(connection)
            self.reset(connection.descriptor, connection)

    def reset(self, descriptor: int, connection: Connection | None) -> None:
        """Reset the connection of a descriptor. Its end comes as an event, as any other.

        Args:
            connection: None if no message came of it yet.
        """
        client = self.clients.get(descriptor)
        if client is None or descriptor in self.resetting:
            return
        try:
            own = os.dup(descriptor)
        except OSError:
            return
        # The event of its end comes before the descriptor is closed: without one, the copy is of that very connection.
        with socket.socket(fileno=own) as copy:
            self.poll_monitor()
            known = self.by_descriptor.get(descriptor, ())
            if self.clients.get(descriptor) is client and (connection in known or (connection is None and not known)):
                self._admission.cut += 1
                self.resetting.add(descriptor)
                descriptors.reset(copy)
