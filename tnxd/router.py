"""The ROUTER socket: whole messages in and out. The only place in the daemon that knows ZeroMQ.

Owned by one thread. What the options guard against is measured in docs/architecture.md, "Sockets".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import msgspec
import zmq

from tnxctl.errors import FailedPrecondition, InvalidArgument
from tnxctl.frames import Array
from tnxctl.wire import Limits
from tnxd.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE)
_FIRST = _NOBLOCK | _MORE
_POLLIN = int(zmq.POLLIN)

_EVENT = struct.Struct("=Hi")  # of the monitor: the kind, and a descriptor

# From this size on, handing libzmq a reference beats copying. It wakes a thread of pyzmq's for every frame, which
# costs as much as to copy 512 kB; but what is copied counts against a peer as a message only, whatever its size.
_REFERENCE_FROM_BYTES = 256 * 1024

# A peer that takes no replies: libzmq queues this many messages for it, then they wait in a backlog, within limits.
_PEER_HWM = 256
_PEER_LENT_BYTES = 64 * 1024 * 1024  # of the frames that it sends by reference, since the other limit is in messages
_BACKLOG_BYTES = 64 * 1024 * 1024
_BACKLOG_SECONDS = 60.0  # without progress; a large frame over a slow line shows none until it has gone
_BACKLOG_RETRY_MS = 2

Frames = tuple[bytes, Sequence[Array]]
"""An encoded header and the tensors behind it."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message from a peer.

    Attributes:
        peer: the connection's identity.
        delimited: whether an empty frame came first, as REQ sockets send it; the answer must have one too.
        header: the header frame; None if there was none.
        tensors: the frames behind it, buffers that own their memory; no more than the limit are kept.
        tensor_count: how many frames there were behind the header.
    """

    peer: bytes
    delimited: bool
    header: Buffer | None
    tensors: list[Buffer]
    tensor_count: int


class _Lent:
    """Frames that libzmq sends by reference for one peer, and has not yet let go of."""

    def __init__(self) -> None:
        self.frames: deque[tuple[zmq.MessageTracker, int]] = deque()
        self.nbytes = 0

    def collect(self) -> bool:
        """Forget what has been sent. True if anything was."""
        before = self.nbytes
        while self.frames and self.frames[0][0].done:
            self.nbytes -= self.frames.popleft()[1]
        return self.nbytes < before


class _Backlog:
    """Replies that a peer does not take fast enough."""

    def __init__(self) -> None:
        self.messages: deque[tuple[bool, Frames, int]] = deque()
        self.nbytes = 0
        self.since = time.monotonic()


class Router:
    """A bound ROUTER socket.

    Attributes:
        endpoints: where it really listens, wildcards resolved.
        undeliverable: messages given up because the peer was gone or took nothing for too long.
        closed: connections that have ended.
        max_tensors: frames behind a header that are kept of a message.
    """

    def __init__(self, limits: Limits) -> None:
        self.endpoints: list[str] = []
        self.undeliverable = 0
        self.closed = 0
        self.max_tensors = limits.tensors
        self._backlogs: dict[bytes, _Backlog] = {}
        self._lent: dict[bytes, _Lent] = {}
        self._peers: dict[int, bytes] = {}  # file descriptor of a connection -> its peer
        self._known: set[bytes] = set()
        self._open: set[int] = set()
        self._gone: list[bytes] = []
        self._locks: list[IO[str]] = []
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 64)
        socket = self._socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else a reply to a full or vanished peer is dropped in silence
        socket.setsockopt(zmq.MAXMSGSIZE, max(limits.message_bytes, limits.header_bytes))
        socket.setsockopt(zmq.SNDHWM, _PEER_HWM)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        socket.setsockopt(zmq.BACKLOG, 1024)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_MAXRT, 30_000)  # cuts a peer that stops reading; heartbeats would cut slow uploads
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

    def readable(self) -> bool:
        """Whether a message is waiting. About a microsecond."""
        events: int = self._get(zmq.EVENTS)
        return bool(events & _POLLIN)

    def wait(self, timeout_ms: float) -> bool:
        """Block until a message, a wake-up, news of connections or the timeout comes. True if the wake-up is set."""
        if self._backlogs:
            timeout_ms = min(timeout_ms, _BACKLOG_RETRY_MS)
        # Rounded up: 0 would poll in a tight loop.
        woken = False
        for source, _ in self._poller.poll(int(timeout_ms + 0.999)):
            if source == self._wakeup_fd:
                woken = True
            elif source is self._monitor:
                self.hear()
        return woken

    def receive(self) -> Message | None:
        """The next message; None if none is waiting. Never blocks."""
        recv = self._recv
        try:
            peer = recv(_NOBLOCK)
        except zmq.Again:
            return None
        frame = recv(0, False)  # multipart messages arrive whole: the other parts are here
        if peer not in self._known:
            self._meet(peer, frame)
        delimited = False
        if frame.more and not len(frame):
            delimited = True
            frame = recv(0, False)
        header = frame if frame.more or len(frame) else None
        tensors: list[Buffer] = []
        count = 0
        while frame.more:
            frame = recv(0, False)
            count += 1
            if count <= self.max_tensors:  # read on beyond it: the rest of the message must leave the socket
                tensors.append(frame)
        return Message(peer, delimited, header, tensors, count)

    def resume(self) -> None:
        """Drop the rest of a message that `receive` could not read to its end."""
        while self._get(zmq.RCVMORE):
            self._recv(_NOBLOCK)

    def _meet(self, peer: bytes, frame: zmq.Frame) -> None:
        """Remember which connection a new peer came by: the monitor tells of connections, not of peers."""
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except (zmq.ZMQError, ValueError):
            return  # a peer of ZMTP 1 or 2 has none
        # libzmq's one thread tells that a connection has ended before it closes the descriptor, and that there is one
        # before it reads from it: the news about the descriptor up to this message is here.
        self.hear()
        if descriptor in self._open:
            self._known.add(peer)
            self._peers[descriptor] = peer
        else:  # it sent this and left
            self._gone.append(peer)

    def hear(self) -> None:
        """Take in the news of connections. `wait` does so when there are some; who does not wait calls it at times."""
        while self._monitor.poll(0):
            event, descriptor = _EVENT.unpack(self._monitor.recv_multipart(_NOBLOCK)[0])
            if event == zmq.EVENT_ACCEPTED:
                self._open.add(descriptor)
                continue
            self.closed += 1
            self._open.discard(descriptor)
            peer = self._peers.pop(descriptor, None)
            if peer is not None:
                self._lose(peer)

    def _lose(self, peer: bytes) -> None:
        self._known.discard(peer)
        self._gone.append(peer)

    def vanished(self) -> list[bytes]:
        """Peers of whose end was heard since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def send(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        """Send a message, or keep it for later if the peer takes none now. Counts what cannot be delivered.

        Returns:
            False if the peer is owed too much already: the message is not taken, send a smaller one instead. Messages
            without tensors are taken up to twice that limit.
        """
        backlog = self._backlogs.get(peer) if self._backlogs else None
        if backlog is None:
            self._try_send(peer, delimited, frames)
            return True
        if frames[1] and backlog.nbytes > _BACKLOG_BYTES:
            return False
        self._keep(peer, delimited, frames)
        return True

    def _try_send(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        send = self._send
        if self._lent and peer in self._lent and self._lent[peer].nbytes > _PEER_LENT_BYTES:
            self._keep(peer, delimited, frames)
            return False
        try:
            send(peer, _FIRST)  # only here can a ROUTER refuse; the frames behind it follow without fail
        except zmq.Again:
            self._keep(peer, delimited, frames)
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
            if array.nbytes < _REFERENCE_FROM_BYTES:
                send(array, flags)
            else:
                self._lend(peer, send(array, flags, False, True), array.nbytes)
        return True

    def _lend(self, peer: bytes, tracker: zmq.MessageTracker, nbytes: int) -> None:
        lent = self._lent.setdefault(peer, _Lent())
        lent.frames.append((tracker, nbytes))
        lent.nbytes += nbytes

    def _collect_lent(self) -> None:
        for peer, lent in list(self._lent.items()):
            if lent.collect() and peer in self._backlogs:
                self._backlogs[peer].since = time.monotonic()
            if not lent.frames:
                del self._lent[peer]

    def _keep(self, peer: bytes, delimited: bool, frames: Frames) -> None:
        header, arrays = frames
        # A small slice must not keep the outputs of a whole batch alive.
        arrays = [
            array.copy() if array.base is not None and array.nbytes < _REFERENCE_FROM_BYTES else array
            for array in arrays
        ]
        nbytes = len(header) + sum(array.nbytes for array in arrays)
        backlog = self._backlogs.setdefault(peer, _Backlog())
        if backlog.nbytes > 2 * _BACKLOG_BYTES:
            self.undeliverable += 1
            return
        frames = (header, arrays)
        backlog.messages.append((delimited, frames, nbytes))
        backlog.nbytes += nbytes

    def flush(self) -> bool:
        """Try again what peers did not take. True when nothing is left."""
        if self._lent:
            self._collect_lent()
        if not self._backlogs:
            return True
        now = time.monotonic()
        for peer in list(self._backlogs):
            backlog = self._backlogs.pop(peer)
            while backlog.messages:
                delimited, frames, nbytes = backlog.messages[0]
                if not self._try_send(peer, delimited, frames):
                    self._backlogs[peer] = backlog  # in place of the one that the failed attempt began
                    break
                backlog.messages.popleft()
                backlog.nbytes -= nbytes
                backlog.since = now
            if backlog.messages and now - backlog.since > _BACKLOG_SECONDS:
                self.undeliverable += len(backlog.messages)
                del self._backlogs[peer]
        return not self._backlogs

    def close(self, linger_s: float) -> None:
        """Close, giving what was sent up to `linger_s` seconds to leave. Removes the files of ipc endpoints."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()
        for endpoint in self.endpoints:
            if endpoint.startswith("ipc://"):
                with contextlib.suppress(OSError):
                    os.unlink(endpoint.removeprefix("ipc://"))
        for lock in self._locks:
            lock.close()  # the file stays: to remove it would let two others lock two files of one name
