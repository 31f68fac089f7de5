"""ROUTER socket of the daemon: whole messages in and out. Its parts are the other files of this room.

Owned by one thread. What the socket options guard against is measured in docs/architecture.md, "Sockets". No file of
the daemon outside this room knows ZeroMQ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from tnxctl.protocol.wire import Limits
from tnxd.events import event
from tnxd.transport import routing_ids, zap
from tnxd.transport.access import Access
from tnxd.transport.addresses import in_words
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection
from tnxd.transport.connections import Connections
from tnxd.transport.inherited import Listener
from tnxd.transport.listeners import Listeners
from tnxd.transport.monitor import Monitor
from tnxd.transport.outbox import PEER_HWM, Outbox
from tnxd.transport.shared_memory import SharedMemory
from tnxd.transport.unread import UnreadBytes
from tnxd.transport.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)

# Parts that one call reads of a message that has far too many: its sender must not hold the others up.
_PARTS_PER_CALL = 512
_MOST_PARTS = 10_000


class Message(msgspec.Struct, frozen=True, gc=False):
    """Message from a peer.

    Attributes:
        connection: where it came from. peer: the routing id of that.
        delimited: whether an empty frame came first, as REQ sockets send it; the answer must have one too.
        header: the header frame; None if there was none.
        tensors: the frames behind it, buffers that own their memory; no more than the limit are kept.
        tensor_count: how many frames there were behind the header.
    """

    connection: Connection
    peer: bytes
    delimited: bool
    header: Buffer | None
    tensors: list[Buffer]
    tensor_count: int


class Router:
    """ROUTER socket, with all that belongs to it.

    Args:
        limits: of one message. admission: what is counted of each client. access: who gets in, and in which role.
        secret: secret key of the daemon, in Z85, with which tcp:// endpoints ask for keys; "": they ask for none.

    Attributes:
        endpoints: where it really listens, wildcards resolved.
        max_tensors: frames behind a header that are kept of a message.
        dropped: number of messages that were dropped, since their connections were cut off.
        send, flush: those of the `Outbox` itself, so that a reply costs no call more.
        share: that of the `SharedMemory`.
    """

    def __init__(self, limits: Limits, admission: Admission, access: Access | None = None, secret: str = "") -> None:
        access = access or Access()
        self.max_tensors = limits.tensors
        self._unfinished: Message | None = None
        self._dropping = False
        self.dropped = 0
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 64)
        self._zap = zap.ZapHandler(self._context, partial(_judge, access, admission))
        routing_ids.seed()
        socket = self._socket = self._context.socket(zmq.ROUTER)
        _set_options(socket, limits)
        ids = routing_ids.AssignedIds(self._context, socket)
        self._listeners = Listeners(socket, secret)
        self.endpoints = self._listeners.endpoints
        self._monitor = Monitor(self._context, socket)
        connections = self._connections = Connections(self._monitor, self._zap, ids, admission, access)
        outbox = self._outbox = Outbox(socket, connections.by_peer, connections.cut, admission)
        connections.on_end = outbox.drop
        self._shared_memory = SharedMemory(admission.max_shared_bytes)
        self.share = self._shared_memory.share
        self._unread = UnreadBytes(connections, admission, limits.message_bytes + limits.header_bytes)
        # Bound here, since each message looks one of them up.
        self._by_peer = connections.by_peer
        self._backlogs, self._zero_copy_peers = outbox.backlogs, outbox.zero_copy_peers
        self.send, self.flush = outbox.send, outbox.flush
        self._recv: Any = socket.recv  # its stubs do not know that frames are buffers
        self._get: Any = socket.get

    def bind(self, endpoint: str, inherited: Listener | None = None) -> None:
        """Listen on a tcp:// or ipc:// endpoint, by the socket that listens there already or else by one of its own.

        Raises:
            FailedPrecondition: it is in use.
            InvalidArgument: it is no address of this machine.
        """
        self._listeners.bind(endpoint, inherited)

    def watch(self, wakeup: Wakeup) -> None:
        """Let `wait` return when the wake-up is set, too."""
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._wakeup_fd = wakeup.fileno()
        self._poller.register(self._wakeup_fd, zmq.POLLIN)
        self._poller.register(self._monitor.socket, zmq.POLLIN)
        self._poller.register(self._zap.socket, zmq.POLLIN)

    def readable(self) -> bool:
        """Whether a message is waiting. About a microsecond."""
        events: int = self._get(zmq.EVENTS)
        return bool(events & _POLLIN)

    def wait(self, timeout_ms: float) -> bool:
        """Block until a message, a wake-up, an event of a connection or the timeout. True if the wake-up is set."""
        if self._backlogs or self._zero_copy_peers:
            timeout_ms = min(timeout_ms, max(self._outbox.retry_at - time.monotonic(), 0.0) * 1e3)
        # Rounded up: 0 would poll in a tight loop.
        woken = False
        for source, _ in self._poller.poll(int(timeout_ms + 0.999)):
            if source == self._wakeup_fd:
                woken = True
            elif source is not self._socket:
                self._connections.poll_monitor()
        return woken

    def receive(self) -> Message | None:
        """Receive the next message; None if none is waiting, or if more of it has to be read. Never blocks."""
        recv = self._recv
        if self._unfinished is not None:
            return self._skip(self._unfinished)
        for _ in range(_PARTS_PER_CALL):
            try:
                peer = recv(_NOBLOCK)
            except zmq.Again:
                self._dropping = False
                return None
            frame = recv(0, False)  # multipart messages arrive whole: the other parts are here
            connection = self._by_peer.get(peer)
            if connection is None or connection.closed:
                connection = self._connections.resolve(peer, frame)
            if not connection.cut:
                break
            if not self._drop(connection, peer, frame):
                return None
        else:
            self._dropping = True
            return None
        delimited = False
        if frame.more and not len(frame):
            delimited = True
            frame = recv(0, False)
        nbytes = len(frame)
        header = frame if frame.more or nbytes else None
        tensors: list[Buffer] = []
        count = 0
        while frame.more:
            frame = recv(0, False)
            count += 1
            nbytes += len(frame)
            if count <= self.max_tensors:
                tensors.append(frame)
            elif count > self.max_tensors + _PARTS_PER_CALL:
                # Read on beyond it, too: the rest of the message must leave the socket.
                self._unfinished = Message(connection, peer, delimited, header, tensors, count)
                return None
        connection.received += nbytes
        connection.frames += count + 1 + delimited
        return Message(connection, peer, delimited, header, tensors, count)

    def _drop(self, connection: Connection, peer: bytes, frame: zmq.Frame) -> bool:
        """Read to the end of a message of a connection that was cut off. False if more of it has to be read later."""
        self.dropped += 1
        for _ in range(_PARTS_PER_CALL):
            if not frame.more:
                return True
            frame = self._recv(0, False)
        if frame.more:
            self._unfinished = Message(connection, peer, False, None, [], _PARTS_PER_CALL)
        return not frame.more

    def _skip(self, message: Message) -> Message | None:
        """Read on in a message of far too many parts, some at a time; who sends very many is cut off."""
        recv, count = self._recv, message.tensor_count
        for _ in range(_PARTS_PER_CALL):
            frame = recv(0, False)
            count += 1
            if not frame.more:
                self._unfinished = None
                if message.connection.cut:
                    return None
                if count > _MOST_PARTS:
                    client, address = message.connection.client.name, message.connection.address
                    log.warning(
                        "%s sent a message of %d parts and is cut off",
                        *(client, count),
                        extra=event("peer_cut", client=client, address=address, reason="parts", count=count),
                    )
                    self._connections.cut(message.connection)
                return msgspec.structs.replace(message, tensor_count=count)
        self._unfinished = msgspec.structs.replace(message, tensor_count=count)
        return None

    @property
    def busy(self) -> bool:
        """Whether `receive` may have more though it returned None."""
        return self._unfinished is not None or self._dropping

    def resume(self) -> None:
        """Drop the rest of a message that `receive` could not read to its end."""
        self._unfinished = None
        while self._get(zmq.RCVMORE):
            self._recv(_NOBLOCK)

    @property
    def peers(self) -> int:
        """Open connections of which a message came."""
        return len(self._by_peer)

    @property
    def undeliverable(self) -> int:
        """Messages given up because the peer was gone or took nothing for too long."""
        return self._outbox.undeliverable

    @property
    def closed(self) -> int:
        """Connections that have ended since the start."""
        return self._connections.ended

    def poll_monitor(self) -> None:
        """Take in the events of connections, let peers in, and free the memory that they do not share any more.

        To be called at times, since a loop need not `wait`.
        """
        self._connections.poll_monitor()
        self._shared_memory.release()

    def take_disconnected(self) -> list[Connection]:
        """Connections that have ended since the last call, each of which may have requests in flight."""
        return self._connections.take_disconnected()

    def cut(self, connection: Connection) -> None:
        """End a connection. What ZeroMQ has received from it is dropped, and so are its replies."""
        self._connections.cut(connection)

    def reauthorize(self) -> None:
        """Hold all connections against the keys as they are now: roles change, and whose key has gone is cut off."""
        self._connections.reauthorize()

    def connections(self) -> Iterable[Connection]:
        """Open connections of which a message came."""
        return self._by_peer.values()

    def kick(self, name: str, spared: Connection) -> int:
        """Cut all connections of clients of a name but one. Returns their number."""
        return self._connections.kick(name, spared)

    def measure_unread(self, everywhere: bool) -> None:
        """Measure what ZeroMQ has received and not handed over; cut who has begun a message beyond every limit.

        Args:
            everywhere: all connections. Otherwise the next hundred, so that a call takes half a millisecond.
        """
        self._unread.measure(everywhere=everywhere, drained=not self.readable())

    def cut_worst(self) -> bool:
        """Cut the connection that takes most memory, by unread bytes and unsent replies. False if none has a MiB."""
        return self._unread.cut_worst()

    def close(self, linger_s: float) -> None:
        """Close, giving what was sent up to `linger_s` seconds to leave. Removes the files of ipc endpoints."""
        self._monitor.close()
        self._socket.close(linger=int(linger_s * 1000))
        self._zap.close()
        self._context.term()
        self._listeners.close()


def _set_options(socket: zmq.Socket[bytes], limits: Limits) -> None:
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else a reply to a full or vanished peer is dropped in silence
    socket.setsockopt(zmq.MAXMSGSIZE, max(limits.message_bytes, limits.header_bytes))
    # Of connections that have ended; `close` says how long the others may take. With the default, which is to wait for
    # ever, one that ends while the socket is being closed keeps it from ever being closed: what was to be sent there
    # waits to be read, and nothing is left that reads it.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, PEER_HWM)
    # No limit: where one is reached, libzmq stops reading a connection, and ends the process if that is lost then and a
    # PING comes behind what it had read. `UnreadBytes` and the memory of all bound what is not read yet.
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.BACKLOG, 1024)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_MAXRT, 30_000)  # cuts a peer that stops reading; heartbeats would cut slow uploads


def _judge(access: Access, admission: Admission, address: str, key: str) -> tuple[bytes, str]:
    """Status and reason with which a peer is let in or refused."""
    why = access.refusal(address, key)
    if why:
        admission.refused += 1
        about = event("peer_refused", address=address, reason=why)
        # Its subject is the address, so each is told of.
        log.warning("%s may not connect: %s", in_words(address), why, extra=about)
        return zap.REFUSED, why
    why = admission.refusal(address, access.authorized(key))
    return (zap.NO_ROOM, why) if why else (zap.ADMITTED, "OK")
