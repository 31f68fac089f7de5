"""Unread bytes: what libzmq has received of connections and not handed over, measured by the kernel's TCP_INFO.

A message that has not ended is invisible in ZeroMQ, and none of its options bounds one. The kernel knows how much came
over a TCP connection: what was not handed over is in libzmq, or in the kernel's buffer.
"""

from __future__ import annotations

import logging

from tnxctl.protocol.wire import MIB
from tnxd.events import event
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection
from tnxd.transport.connections import Connections
from tnxd.transport.descriptors import bytes_received

log = logging.getLogger(__name__)

# Nobody who waits for answers has so many frames unread: three times what a client may have in flight.
_MOST_UNREAD_FRAMES = 100_000

# Of what the kernel says has come: at most so much around each frame, and before the first one; what is in its own
# buffer (net.ipv4.tcp_rmem), which need not be a message that does not end.
_FRAME_HEAD_BYTES = 9
_LEAST_FRAME_HEAD_BYTES = 2
_HANDSHAKE_BYTES = 256
_UNREAD_FROM_BYTES = MIB
_KERNEL_BYTES = 8 * MIB

# Half a millisecond of system calls.
_CONNECTIONS_PER_CALL = 100


class UnreadBytes:
    """Unread bytes of all connections; connections that take too much memory are cut.

    Args:
        message_bytes: largest message that is allowed.
    """

    def __init__(self, connections: Connections, admission: Admission, message_bytes: int) -> None:
        self._connections = connections
        self._admission = admission
        self._message_bytes = message_bytes
        self._to_measure: list[int] = []
        self._by_descriptor: dict[int, int] = {}

    def measure(self, *, everywhere: bool, drained: bool) -> None:
        """Measure connections, and cut those that have begun a message beyond every limit.

        Args:
            everywhere: all connections. Otherwise the next hundred, so that a call takes half a millisecond.
            drained: whether no whole message waits to be received: what is unread is then part of one.
        """
        connections = self._connections
        if everywhere or not self._to_measure:
            self._by_descriptor = {}
            self._to_measure = list(connections.clients)
        for _ in range(len(self._to_measure) if everywhere else _CONNECTIONS_PER_CALL):
            if not self._to_measure:
                break
            descriptor = self._to_measure.pop()
            connection = self._latest(descriptor)
            unread = bytes_received(descriptor) - _HANDSHAKE_BYTES
            if connection is not None:
                unread -= connection.received + (_FRAME_HEAD_BYTES + connection.frame_bytes) * connection.frames
            if unread > _UNREAD_FROM_BYTES:
                self._by_descriptor[descriptor] = unread
                if descriptor in connections.clients and (
                    (drained and unread > self._message_bytes + _KERNEL_BYTES) or _many_frames(connection, unread)
                ):
                    self._cut(descriptor, connection, unread)
        if not self._to_measure:
            self._admission.unread = sum(self._by_descriptor.values())

    def cut_worst(self) -> bool:
        """Cut the connection that takes most memory, by unread bytes and unsent replies. False if none has a MiB."""
        taken = dict(self._by_descriptor)
        for connection in self._connections.by_peer.values():
            if connection.unsent:
                taken[connection.descriptor] = taken.get(connection.descriptor, 0) + connection.unsent
        worst = max(taken, key=taken.__getitem__, default=-1)
        if worst < 0 or taken[worst] < _UNREAD_FROM_BYTES or worst in self._connections.resetting:
            return False
        self._cut(worst, self._latest(worst), taken[worst])
        return True

    def _latest(self, descriptor: int) -> Connection | None:
        """Last connection of a descriptor; None if no message came of it yet."""
        connections = self._connections.by_descriptor.get(descriptor)
        return connections[-1] if connections else None

    def _cut(self, descriptor: int, connection: Connection | None, nbytes: int) -> None:
        client = self._connections.clients.get(descriptor)
        if client is not None and descriptor not in self._connections.resetting:
            log.warning(
                "%s has %d bytes in memory, unread or owed, and is cut off",
                *(client.name, nbytes),
                extra=event("peer_cut", client=client.name, reason="memory", bytes=nbytes),
            )
            if connection is not None:
                self._connections.cut(connection)
            else:
                self._connections.reset(descriptor, None)


def _many_frames(connection: Connection | None, unread: int) -> bool:
    """Whether so many bytes are too many frames, if they are as those that were read: each takes 64 bytes and more."""
    if connection is None or not connection.frames:
        return False
    mean = connection.received / connection.frames + _LEAST_FRAME_HEAD_BYTES + connection.frame_bytes
    return unread > _MOST_UNREAD_FRAMES * mean
