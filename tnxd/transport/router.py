"""The ROUTER socket: whole messages in and out. The only place in the daemon that knows ZeroMQ.

Owned by one thread. What the options guard against is measured in docs/architecture.md, "Sockets".
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import socket as socket_module
import stat
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import msgspec
import zmq

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.frames import Array
from tnxctl.protocol.wire import Limits
from tnxd.transport.admission import Admission, Client, Connection
from tnxd.transport.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE)
_FIRST = _NOBLOCK | _MORE
_POLLIN = int(zmq.POLLIN)

_EVENT = struct.Struct("=Hi")  # of the monitor: the kind, and a descriptor

# From this size on, handing libzmq a reference beats copying. It wakes a thread of pyzmq's for every frame, which
# costs as much as to copy 512 kB; but what is copied counts against a peer as a message only, whatever its size.
_REFERENCE_FROM_BYTES = 256 * 1024

# Smaller frames are not counted: with libzmq's limit in messages they come to a megabyte at most.
_COUNTED_FROM_BYTES = 4096
# After so many bytes of copies, a frame is sent by reference, as a mark: once it has left, they have, too.
_MARK_EVERY_BYTES = 1024 * 1024

# A peer that takes no replies: libzmq queues this many messages for it, then they wait in a backlog, within limits.
_PEER_HWM = 256
_PEER_LENT_BYTES = 16 * 1024 * 1024  # what libzmq holds for it, since the other limit is in messages
_BACKLOG_SECONDS = 60.0  # without progress; a large frame over a slow line shows none until it has gone
_RETRY_S = 0.002  # at first, then twice as long each time that nothing could be sent
_MAX_RETRY_S = 0.064
_LENT_S = 0.01

_KEPT_BYTES = 512  # what a reply takes in a backlog beside its frames: many are short

# Parts that one call reads of a message that has far too many: its sender must not hold the others up.
_SKIPPED = 512
_TOO_MANY_PARTS = 10_000

_MOST_LEFT = 4096  # connections

# Nobody who waits for answers has so many frames unread: three times what a client may have in flight.
_MOST_UNREAD_FRAMES = 100_000

# Of what the kernel says has come: at most so much around each frame, and before the first one; what is in its own
# buffer (net.ipv4.tcp_rmem), which need not be a message that does not end.
_FRAME_HEAD_BYTES = 9
_LEAST_FRAME_HEAD_BYTES = 2
_HANDSHAKE_BYTES = 256
_UNREAD_FROM_BYTES = 1024 * 1024
_LOOKED_AT = 100
_KERNEL_BYTES = 8 * 1024 * 1024
_TCP_INFO_BYTES_RECEIVED = 128  # of Linux's struct tcp_info, since 4.1

Frames = tuple[bytes, Sequence[Array]]
"""An encoded header and the tensors behind it."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message from a peer.

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


class _Lent:
    """Bytes that libzmq holds for one peer, as far as they are known not to have left."""

    def __init__(self) -> None:
        self.frames: deque[tuple[zmq.MessageTracker, int]] = deque()
        self.nbytes = 0
        self.copied = 0  # since the last frame that was sent by reference: what comes before that has left with it

    def collect(self) -> int:
        """Forget what has been sent; how many bytes that was."""
        before = self.nbytes
        while self.frames and self.frames[0][0].done:
            self.nbytes -= self.frames.popleft()[1]
        return before - self.nbytes


class _Backlog:
    """Replies that a peer does not take fast enough."""

    def __init__(self) -> None:
        self.messages: deque[tuple[bool, Frames, int]] = deque()
        self.since = time.monotonic()
        self.retry_s = _RETRY_S
        self.retry_at = self.since + _RETRY_S


class Router:
    """A bound ROUTER socket.

    Attributes:
        endpoints: where it really listens, wildcards resolved.
        undeliverable: messages given up because the peer was gone or took nothing for too long.
        closed: connections that have ended.
        max_tensors: frames behind a header that are kept of a message.
    """

    def __init__(self, limits: Limits, admission: Admission) -> None:
        self.endpoints: list[str] = []
        self.undeliverable = 0
        self.closed = 0
        self.max_tensors = limits.tensors
        self._admission = admission
        self._message_bytes = limits.message_bytes + limits.header_bytes
        self._backlogs: dict[bytes, _Backlog] = {}
        self._lent: dict[bytes, _Lent] = {}
        self._lending: set[bytes] = set()
        self._lent_bytes = min(_PEER_LENT_BYTES, admission.max_owed // 4)
        self._mark_every_bytes = min(_MARK_EVERY_BYTES, self._lent_bytes // 4)
        self._retry_at = 0.0
        self._known: dict[bytes, Connection] = {}
        self._open: dict[int, Client] = {}  # by file descriptor
        self._peers: dict[int, list[Connection]] = {}  # likewise; several if it was used again before they were met
        self._gone: list[Connection] = []
        self._shutting: set[int] = set()
        self._left: dict[bytes, Connection] = {}  # the last ones that have ended and of which something came later
        self._rest: Message | None = None
        self._dropping = False
        self._to_look_at: list[int] = []
        self._unread_of: dict[int, int] = {}
        self._locks: list[IO[str]] = []
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 64)
        self._zap = self._context.socket(zmq.ROUTER)
        self._zap.setsockopt(zmq.RCVHWM, 0)
        self._zap.bind("inproc://zeromq.zap.01")
        # libzmq names its peers by counting from a random number that it never seeds, and ends the process where a peer
        # has claimed the name that comes next: nobody must know it.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))
        socket = self._socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else a reply to a full or vanished peer is dropped in silence
        socket.setsockopt(zmq.MAXMSGSIZE, max(limits.message_bytes, limits.header_bytes))
        # Of connections that have ended; `close` says how long the others may take. With the default, which is to wait
        # for ever, one that ends while the socket is being closed keeps it from ever being closed: what was to be sent
        # there waits to be read, and nothing is left that reads it.
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, _PEER_HWM)
        # No limit: where one is reached, libzmq stops reading a connection, and ends the process if that is lost then
        # and a PING comes behind what it had read. `look_at_unread` and the memory of all bound what is not read yet.
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        socket.setsockopt(zmq.BACKLOG, 1024)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_MAXRT, 30_000)  # cuts a peer that stops reading; heartbeats would cut slow uploads
        socket.setsockopt(zmq.ZAP_DOMAIN, b"tnxd")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody gets in whom nobody has asked about
        self._first, self._accepted = self._first_name(), 0
        socket.copy_threshold = 0  # what is to be sent by reference is, however small: its tracker is a mark
        news = f"inproc://connections-{id(self)}"
        socket.monitor(news, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # libzmq's thread would stand still where it is full
        self._monitor.connect(news)
        self._recv: Any = socket.recv  # its stubs do not know that frames are buffers, nor that arrays are
        # Of the compiled class below: what pyzmq wraps around it serves options that nothing here uses, and costs half
        # as much again.
        self._send: Any = super(zmq.Socket, socket).send
        self._get: Any = socket.get

    def bind(self, endpoint: str) -> None:
        """Listen on a tcp:// or ipc:// endpoint.

        Raises:
            FailedPrecondition: it is in use.
            InvalidArgument: it is no address of this machine.
        """
        if endpoint.startswith("ipc://"):
            self._lock_path(endpoint)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise FailedPrecondition(f"{endpoint} is in use by another process") from None
            raise InvalidArgument(f"cannot listen on {endpoint}: {os.strerror(error.errno or 0)}") from None
        self.endpoints.append(self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))

    def _lock_path(self, endpoint: str) -> None:
        """ZeroMQ's bind takes over the path of a live daemon without a word: hold a lock beside it."""
        socket_path = endpoint.removeprefix("ipc://")
        if os.path.lexists(socket_path) and not stat.S_ISSOCK(os.lstat(socket_path).st_mode):
            raise InvalidArgument(f"cannot listen on {endpoint}: there is something else than a socket at that path")
        path = socket_path + ".lock"
        try:
            # Not blocking, for a pipe at that path; and no link, which may lead to what is not ours.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.fdopen(os.open(path, flags, 0o666), "w", encoding="ascii")  # held until close
        except OSError as error:
            raise InvalidArgument(f"cannot listen on {endpoint}: {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise FailedPrecondition(f"{endpoint} is in use by another process") from None
        self._locks.append(lock)

    def watch(self, wakeup: Wakeup) -> None:
        """Let `wait` return when the wake-up is set, too."""
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._wakeup_fd = wakeup.fileno()
        self._poller.register(self._wakeup_fd, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._zap, zmq.POLLIN)

    def readable(self) -> bool:
        """Whether a message is waiting. About a microsecond."""
        events: int = self._get(zmq.EVENTS)
        return bool(events & _POLLIN)

    def wait(self, timeout_ms: float) -> bool:
        """Block until a message, a wake-up, news of connections or the timeout comes. True if the wake-up is set."""
        if self._backlogs or self._lending:
            timeout_ms = min(timeout_ms, max(self._retry_at - time.monotonic(), 0.0) * 1e3)
        # Rounded up: 0 would poll in a tight loop.
        woken = False
        for source, _ in self._poller.poll(int(timeout_ms + 0.999)):
            if source == self._wakeup_fd:
                woken = True
            elif source is self._monitor or source is self._zap:
                self.hear()
        return woken

    def receive(self) -> Message | None:
        """The next message; None if none is waiting, or if more of it has to be read. Never blocks."""
        recv = self._recv
        if self._rest is not None:
            return self._skip(self._rest)
        for _ in range(_SKIPPED):
            try:
                peer = recv(_NOBLOCK)
            except zmq.Again:
                self._dropping = False
                return None
            frame = recv(0, False)  # multipart messages arrive whole: the other parts are here
            connection = self._known.get(peer)
            if connection is None or connection.closed:
                connection = self._left.get(peer) or self._meet(peer, frame)
                if connection.closed and (not self._gone or self._gone[-1] is not connection):
                    self._gone.append(connection)  # once more: here is a request that nobody waits for
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
            elif count > self.max_tensors + _SKIPPED:
                # Read on beyond it, too: the rest of the message must leave the socket.
                self._rest = Message(connection, peer, delimited, header, tensors, count)
                return None
        connection.received += nbytes
        connection.frames += count + 2
        return Message(connection, peer, delimited, header, tensors, count)

    def _drop(self, connection: Connection, peer: bytes, frame: zmq.Frame) -> bool:
        """Read to the end of a message of a connection that was cut off. False if more of it has to be read later."""
        for _ in range(_SKIPPED):
            if not frame.more:
                return True
            frame = self._recv(0, False)
        if frame.more:
            self._rest = Message(connection, peer, False, None, [], _SKIPPED)
        return not frame.more

    def _skip(self, message: Message) -> Message | None:
        """Read on in a message of far too many parts, some at a time; who sends very many is cut off."""
        recv, count = self._recv, message.tensor_count
        for _ in range(_SKIPPED):
            frame = recv(0, False)
            count += 1
            if not frame.more:
                self._rest = None
                if message.connection.cut:
                    return None
                if count > _TOO_MANY_PARTS:
                    log.warning("%s sent a message of %d parts and is cut off", message.connection.client.name, count)
                    self.cut(message.connection)
                return msgspec.structs.replace(message, tensor_count=count)
        self._rest = msgspec.structs.replace(message, tensor_count=count)
        return None

    @property
    def busy(self) -> bool:
        """Whether there may be more though `receive` returned None."""
        return self._rest is not None or self._dropping

    def resume(self) -> None:
        """Drop the rest of a message that `receive` could not read to its end."""
        self._rest = None
        while self._get(zmq.RCVMORE):
            self._recv(_NOBLOCK)

    # --- connections -------------------------------------------------------------------------------------------

    def _meet(self, peer: bytes, frame: zmq.Frame) -> Connection:
        """Remember which connection a new peer came by: the monitor tells of connections, not of peers."""
        # libzmq's one thread tells that a connection has ended before it closes the descriptor, and that there is one
        # before it reads from it: the news about the descriptor up to this message is here.
        self.hear()
        descriptor, address = -1, ""
        with contextlib.suppress(zmq.ZMQError, ValueError):  # what is no ZMTP 3 has none of them
            descriptor = int(frame.get(zmq.SRCFD))
            address = str(frame.get("Peer-Address"))
        connection = Connection(peer, descriptor, self._admission.client(address))
        if descriptor in self._open:
            self._known[peer] = connection
            self._peers.setdefault(descriptor, []).append(connection)
            if self._is_claimed(peer):
                log.warning("%s claims a routing id that begins with a zero byte, and is cut off", address)
                self.cut(connection)
        else:  # it sent this and left
            connection.closed = True
            self._gone.append(connection)
            self._remember(connection)
        return connection

    def _remember(self, connection: Connection) -> None:
        """Know a connection that has ended by what ZeroMQ has received from it, and not handed over yet."""
        self._left[connection.peer] = connection
        if len(self._left) > _MOST_LEFT:
            del self._left[next(iter(self._left))]

    def _first_name(self) -> int:
        """The number that libzmq begins to count its peers from."""
        address = f"inproc://first-{id(self)}"
        self._socket.bind(address)
        with self._context.socket(zmq.DEALER) as first:
            first.connect(address)
            first.send(b"")
            peer = self._socket.recv_multipart()[0]
        self._socket.unbind(address)
        return int.from_bytes(peer[1:], "big")

    def _is_claimed(self, peer: bytes) -> bool:
        """Whether a routing id that only libzmq should give was given by the peer itself, and may yet be needed."""
        if not peer.startswith(b"\0"):
            return False
        return len(peer) != 5 or (int.from_bytes(peer[1:], "big") - self._first) % 2**32 > self._accepted

    def hear(self) -> None:
        """Take in the news of connections, and say who may come in. Who does not `wait` calls it at times."""
        self._take_in_news()
        while self._zap.poll(0):
            request = self._zap.recv_multipart(_NOBLOCK)
            # libzmq's one thread tells of a connection before it asks about it: here is the news of all up to this one.
            self._take_in_news()
            self._decide(request)

    def _take_in_news(self) -> None:
        monitor, admission = self._monitor, self._admission
        while monitor.poll(0):
            event, descriptor = _EVENT.unpack(monitor.recv_multipart(_NOBLOCK)[0])
            if event == zmq.EVENT_ACCEPTED:
                self._accepted += 1
                client = self._open[descriptor] = admission.client(_address(descriptor))
                admission.connected(client)
                continue
            self.closed += 1
            ended = self._open.pop(descriptor, None)
            self._shutting.discard(descriptor)
            for connection in self._peers.pop(descriptor, ()):
                self._lose(connection)
            if ended is not None:
                admission.disconnected(ended)

    def _decide(self, request: list[bytes]) -> None:
        """Answer a question of ZeroMQ's own whether a peer may come in: https://rfc.zeromq.org/spec/27/."""
        if len(request) < 7:
            return
        envelope, _, version, id_, _, address = request[:6]
        why = self._admission.why_not(address.decode("utf-8", "replace"))
        status, text = (b"400", why.encode()) if why else (b"200", b"OK")
        self._zap.send_multipart([envelope, b"", version, id_, status, text, b"", b""])

    def cut(self, connection: Connection) -> None:
        """End a connection. What ZeroMQ has received from it is dropped, and what it is owed."""
        if not connection.closed:
            connection.closed = connection.cut = True
            self._remember(connection)
            self._shut(connection.descriptor, connection)

    def _shut(self, descriptor: int, connection: Connection | None) -> None:
        client = self._open.get(descriptor)
        if client is None or descriptor in self._shutting:
            return
        try:
            own = os.dup(descriptor)
        except OSError:
            return
        # The news that it has ended comes before its descriptor is closed: if there is none, the copy is of that one.
        with socket_module.socket(fileno=own) as copy:
            self.hear()
            known = self._peers.get(descriptor, ())
            if self._open.get(descriptor) is client and (connection in known or (connection is None and not known)):
                self._admission.cut += 1
                self._shutting.add(descriptor)
                with contextlib.suppress(OSError):
                    # Else it would wait for its peer to take or send the rest.
                    copy.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_LINGER, struct.pack("ii", 1, 0))
                    copy.shutdown(socket_module.SHUT_RDWR)

    def _lose(self, connection: Connection) -> None:
        connection.closed = True
        peer = connection.peer
        self._known.pop(peer, None)
        self._gone.append(connection)
        backlog = self._backlogs.pop(peer, None)
        if backlog is not None:
            self.undeliverable += len(backlog.messages)
        if self._lent.pop(peer, None) is not None:
            self._lending.discard(peer)
        if connection.owed:
            self._admission.owe(connection, -connection.owed)

    def vanished(self) -> list[Connection]:
        """Connections of whose end was heard since the last call."""
        gone, self._gone = self._gone, []
        return gone

    # --- out ---------------------------------------------------------------------------------------------------

    def send(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        """Send a message, or keep it for later if the peer takes none now. Counts what cannot be delivered.

        Returns:
            False if the peer is owed too much already: the message is not taken, send a smaller one instead. Messages
            without tensors are taken up to twice that limit; beyond that the peer is cut off.
        """
        if (not self._backlogs or peer not in self._backlogs) and self._attempt(peer, delimited, frames):
            return True
        connection = self._known.get(peer)
        if connection is not None and frames[1] and self._admission.owes_too_much(connection):
            return False
        self._keep(peer, delimited, frames)
        return True

    def _attempt(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        """Hand a message to libzmq. False if the peer takes none now."""
        send = self._send
        if self._lent and peer in self._lent and self._lent[peer].nbytes > self._lent_bytes:
            self._collect(peer)
            if self._lent[peer].nbytes > self._lent_bytes:
                return False
        try:
            send(peer, _FIRST)  # only here can a ROUTER refuse; the frames behind it follow without fail
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.undeliverable += 1
            return True
        if delimited:
            send(b"", _MORE)
        header, arrays = frames
        if not arrays:
            send(header)
            return True
        send(header, _MORE)
        last = len(arrays) - 1
        for position, array in enumerate(arrays):
            flags = _MORE if position < last else 0
            nbytes = array.nbytes
            if nbytes < _COUNTED_FROM_BYTES or (nbytes < _REFERENCE_FROM_BYTES and not self._is_marked(peer, nbytes)):
                send(array, flags)
            else:
                self._lend(peer, send(array, flags, False, True), nbytes)
        return True

    def _is_marked(self, peer: bytes, nbytes: int) -> bool:
        """Count a frame that is sent as a copy, or say that it has to be a mark behind those that were."""
        lent = self._lent.get(peer)
        if lent is None:
            lent = self._lent[peer] = _Lent()
        if lent.copied + nbytes >= self._mark_every_bytes:
            return True
        lent.copied += nbytes
        return False

    def _lend(self, peer: bytes, tracker: zmq.MessageTracker, nbytes: int) -> None:
        lent = self._lent.get(peer)
        if lent is None:
            lent = self._lent[peer] = _Lent()
        nbytes += lent.copied
        lent.copied = 0
        lent.frames.append((tracker, nbytes))
        lent.nbytes += nbytes
        if not self._lending and not self._backlogs:
            self._retry_at = time.monotonic() + _RETRY_S
        self._lending.add(peer)
        connection = self._known.get(peer)
        if connection is not None:
            self._admission.owe(connection, nbytes)

    def _collect(self, peer: bytes) -> None:
        """Forget what has left to a peer."""
        lent = self._lent[peer]
        left = lent.collect()
        if left:
            connection = self._known.get(peer)
            if connection is not None:
                self._admission.owe(connection, -min(left, connection.owed))
            if peer in self._backlogs:
                self._backlogs[peer].since = time.monotonic()
        if not lent.frames:
            self._lending.discard(peer)

    def _keep(self, peer: bytes, delimited: bool, frames: Frames) -> None:
        header, arrays = frames
        connection = self._known.get(peer)
        if connection is None or self._admission.is_hopeless(connection):
            self.undeliverable += 1
            if connection is not None:
                self.cut(connection)
            return
        # A small slice must not keep the outputs of a whole batch alive.
        arrays = [
            array.copy() if array.base is not None and array.nbytes < _REFERENCE_FROM_BYTES else array
            for array in arrays
        ]
        nbytes = _KEPT_BYTES + len(header) + sum(array.nbytes for array in arrays)
        if not self._backlogs:
            self._retry_at = time.monotonic() + _RETRY_S
        backlog = self._backlogs.get(peer)
        if backlog is None:
            backlog = self._backlogs[peer] = _Backlog()
        frames = (header, arrays)
        backlog.messages.append((delimited, frames, nbytes))
        self._admission.owe(connection, nbytes)

    def flush(self) -> bool:
        """Try again what peers did not take, each less often the longer it takes nothing. True when nothing is left."""
        if not self._backlogs and not self._lending:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return not self._backlogs
        for peer in list(self._lending):
            self._collect(peer)
        for peer, backlog in list(self._backlogs.items()):
            if backlog.retry_at <= now:
                self._retry(peer, backlog, now)
        self._retry_at = min([backlog.retry_at for backlog in self._backlogs.values()], default=now + _RETRY_S)
        if self._lending:
            self._retry_at = min(self._retry_at, now + _LENT_S)
        return not self._backlogs

    def _retry(self, peer: bytes, backlog: _Backlog, now: float) -> None:
        connection = self._known.get(peer)
        if connection is None:
            del self._backlogs[peer]
            self.undeliverable += len(backlog.messages)
            return
        moved = False
        while backlog.messages:
            delimited, frames, nbytes = backlog.messages[0]
            if not self._attempt(peer, delimited, frames):
                break
            backlog.messages.popleft()
            self._admission.owe(connection, -min(nbytes, connection.owed))
            moved = True
        if not backlog.messages:
            del self._backlogs[peer]
            return
        if moved:
            backlog.since, backlog.retry_s = now, _RETRY_S
        else:
            backlog.retry_s = min(2 * backlog.retry_s, _MAX_RETRY_S)
        backlog.retry_at = now + backlog.retry_s
        if now - backlog.since > _BACKLOG_SECONDS:
            self.undeliverable += len(backlog.messages)
            del self._backlogs[peer]
            self._admission.owe(connection, -connection.owed)
            self.cut(connection)

    # --- what ZeroMQ holds -------------------------------------------------------------------------------------

    def look_at_unread(self, everywhere: bool) -> None:
        """Count what ZeroMQ has received and not handed over; cut off who has begun a message beyond every limit.

        A message that has not ended is invisible in ZeroMQ, and none of its options bounds one. The kernel knows how
        much came over a TCP connection: what is not here yet is there, or in the kernel's buffer.

        Args:
            everywhere: look at all connections. Otherwise at the next few, so that a call takes half a millisecond.
        """
        hidden = not self.readable()  # whole messages are here
        if everywhere or not self._to_look_at:
            self._unread_of = {}
            self._to_look_at = list(self._open)
        for _ in range(len(self._to_look_at) if everywhere else _LOOKED_AT):
            if not self._to_look_at:
                break
            descriptor = self._to_look_at.pop()
            connections = self._peers.get(descriptor)
            connection = connections[-1] if connections else None
            unread = _bytes_received(descriptor) - _HANDSHAKE_BYTES
            if connection is not None:
                unread -= connection.received + _FRAME_HEAD_BYTES * connection.frames
            if unread > _UNREAD_FROM_BYTES:
                self._unread_of[descriptor] = unread
                if descriptor in self._open and (
                    (hidden and unread > self._message_bytes + _KERNEL_BYTES) or _many_frames(connection, unread)
                ):
                    self._cut_off(descriptor, connection, unread)
        if not self._to_look_at:
            self._admission.unread = sum(self._unread_of.values())

    def cut_worst(self) -> bool:
        """Cut off who takes most memory: sent what is not read yet, or is owed. False if nobody has a megabyte."""
        taken = dict(self._unread_of)
        for connection in self._known.values():
            if connection.owed:
                taken[connection.descriptor] = taken.get(connection.descriptor, 0) + connection.owed
        worst = max(taken, key=taken.__getitem__, default=-1)
        if worst < 0 or taken[worst] < _UNREAD_FROM_BYTES or worst in self._shutting:
            return False
        connections = self._peers.get(worst)
        self._cut_off(worst, connections[-1] if connections else None, taken[worst])
        return True

    def _cut_off(self, descriptor: int, connection: Connection | None, nbytes: int) -> None:
        client = self._open.get(descriptor)
        if client is not None and descriptor not in self._shutting:
            log.warning("%s has %d bytes in memory, unread or owed, and is cut off", client.name, nbytes)
            if connection is not None:
                self.cut(connection)
            else:
                self._shut(descriptor, None)

    def close(self, linger_s: float) -> None:
        """Close, giving what was sent up to `linger_s` seconds to leave. Removes the files of ipc endpoints."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger=int(linger_s * 1000))
        self._zap.close(0)
        self._context.term()
        for endpoint in self.endpoints:
            if endpoint.startswith("ipc://"):
                with contextlib.suppress(OSError):
                    os.unlink(endpoint.removeprefix("ipc://"))
        for lock in self._locks:
            lock.close()  # the file stays: to remove it would let two others lock two files of one name


def _many_frames(connection: Connection | None, unread: int) -> bool:
    """Whether so many bytes are too many frames, if they are as those that were read: each takes 64 bytes and more."""
    if connection is None or not connection.frames:
        return False
    mean = connection.received / connection.frames + _LEAST_FRAME_HEAD_BYTES
    return unread > _MOST_UNREAD_FRAMES * mean


def _address(descriptor: int) -> str:
    """The address that a connection comes from, as ZeroMQ writes it; "" if it has ended."""
    try:
        with _borrowed(descriptor) as connection:
            if connection.family == socket_module.AF_UNIX:
                credentials = connection.getsockopt(socket_module.SOL_SOCKET, socket_module.SO_PEERCRED, 12)
                pid, user, group = struct.unpack("3i", credentials)
                return f"localhost:{user}:{group}:{pid}"
            return str(connection.getpeername()[0])
    except (OSError, AttributeError):
        return ""


def _bytes_received(descriptor: int) -> int:
    """Bytes that came over a TCP connection; -1 if the kernel does not say."""
    try:
        with _borrowed(descriptor) as connection:
            info = connection.getsockopt(socket_module.IPPROTO_TCP, socket_module.TCP_INFO, 192)
    except (OSError, AttributeError):
        return -1
    if len(info) < _TCP_INFO_BYTES_RECEIVED + 8:
        return -1
    return int(struct.unpack_from("=Q", info, _TCP_INFO_BYTES_RECEIVED)[0])


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket_module.socket]:
    """Somebody else's descriptor as a socket, which is not closed."""
    borrowed = socket_module.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()
