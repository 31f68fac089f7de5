"""Channel over a plain socket, which the thread that calls reads and writes by itself."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

import zmq

from tnxctl.channels.channel import (
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    MAXRT_MS,
    POLLIN,
    POLLOUT,
    Event,
    Target,
    Watcher,
)
from tnxctl.channels.names import Address, Lookup, address_of
from tnxctl.channels.zmtp import BUFFER_BYTES, Handshake, Inbox, ProtocolError, parts_of

_TURN_BYTES = 1024 * 1024
"""Bytes after which a channel lets others have their turn, and its own answers. A daemon that gets more than is read
from it has to keep the answers, and refuses what is too much."""

_PIECES = 256  # handed to the system at a time, which takes 1,024
_READS = 4  # in a row: one who sends without end must not keep this thread from its timers
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)  # a program may have given SIGPIPE its default meaning, which is to die

_ENDS = (zmq.Event.CLOSED, zmq.Event.CONNECT_RETRIED, zmq.Event.DISCONNECTED)


class StreamChannel:
    """See `tnxctl.channels.channel.Channel`, and `tnxctl.channels.opening.open_channel` for the arguments.

    It looks a host name up, connects, shakes hands and is open, one after the other. Where a name has several
    addresses, it goes on to the next one if nobody accepts at the last. Whatever ends it is told as an event, once all
    that came before has been received.
    """

    is_edge_triggered = False

    def __init__(self, target: Target, watcher: Watcher | None) -> None:
        self.sources: list[tuple[Any, int]] = []
        self.has_events = False
        self.times_out = False
        self._watcher = watcher
        self._events: list[Event] = []
        self._lookup: Lookup | None = None
        self._addresses: deque[Address] = deque()  # that were not tried
        self._socket: socket.socket | None = None
        self._is_connected = False  # as far as the socket knows
        self._is_over = False
        self._handshake: Handshake | None = Handshake()
        self._inbox = Inbox(target.max_frame_bytes, target.max_frames)
        self._is_dry = False  # the last read took all that there was, or is the last for now
        self._reads = 0  # in a row that left more to read
        self._queue: deque[bytes | memoryview] = deque()  # pieces that wait for room, or for `flush`
        self._is_holding = False
        self._is_full = False  # there was no room
        address = address_of(target.endpoint)
        try:
            if address is None:
                self.times_out = True  # the system ends a lookup, after as long as it takes to ask all servers
                self._lookup = Lookup(target.endpoint)
                self._poll(self._lookup.fd, POLLIN)
            else:
                self._addresses.append(address)
                self._connect()
        except BaseException:
            self.close()
            raise

    # --- what a link asks -------------------------------------------------------------------------------------

    def receive(self) -> list[Any] | None:
        inbox = self._inbox
        try:
            frames = inbox.take()
            if frames is not None:
                return frames
            while not self._is_dry and self._read():
                frames = inbox.take()
                if frames is not None:
                    return frames
        except ProtocolError as error:
            self._end(error.event)
        except MemoryError:  # for a frame as long as announced
            self._end((zmq.Event.DISCONNECTED, errno.ENOMEM))
        self._is_dry = False  # a poll tells of more
        if inbox.pongs:
            pongs, inbox.pongs = inbox.pongs, b""
            if not self._is_full:  # else what waits will show that this side lives
                self._send_bytes(pongs)
        return None

    def has_input(self) -> bool:
        return False  # a poll tells

    def descriptor(self) -> tuple[int, int]:
        return self.sources[0] if self.sources else (-1, 0)

    def events(self) -> list[Event]:
        self.has_events = False
        found, self._events = self._events, []
        return found

    def send(self, frames: Sequence[Any], copy: bool) -> None:
        parts = parts_of(frames)
        if copy:
            self._queue.append(b"".join(parts))
        else:
            self._queue += parts
        if not (self._is_holding or self._is_full):
            self._write()

    def hold(self) -> None:
        self._is_holding = True

    def flush(self) -> None:
        self._is_holding = False
        if self._queue and not self._is_full:
            self._write()

    def on_room(self) -> None:
        if self._is_connected:
            self._is_full = False
            self._write()
        elif self._socket is not None and not self._is_over:
            self._connected()

    def time_out(self) -> None:
        if self._is_connected:
            self._end((zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, errno.ETIMEDOUT))
        else:
            self._unreached(0)

    def close(self) -> None:
        self._forget_sources()
        lookup, held = self._lookup, self._socket
        if lookup is not None:
            lookup.close()
        if held is not None:
            held.close()
        self._lookup = self._socket = None
        self._is_over = True

    def abandon(self) -> None:
        self._watcher = None  # its poller is the parent's, too
        self.close()  # here alone: the parent has the same socket

    # --- to connect -------------------------------------------------------------------------------------------

    def _looked_up(self) -> None:
        assert self._lookup is not None
        if not self._lookup.is_over:
            return
        self._addresses += self._lookup.found
        self._forget_sources()
        self._lookup.close()
        self._lookup, self.times_out = None, False
        if not self._addresses:
            self._end((zmq.Event.CONNECT_RETRIED, 0))
            return
        self._unreached(0)

    def _unreached(self, error: int) -> None:
        """Go on with the next address; where there is none, end with what the last one met."""
        self._forget_sources()
        try:
            self._connect(error)
        except OSError:
            self._end((zmq.Event.CLOSED, 0))

    def _connect(self, error: int = 0) -> None:
        """Attempt the next address, and those after it while each fails at once; end where none is left.

        Raises OSError: no file descriptor is left, or the system refuses the path.
        """
        while self._addresses:
            if self._socket is not None:
                self._socket.close()
            family, where = self._addresses.popleft()
            self._socket = made = socket.socket(family, socket.SOCK_STREAM)
            _set_up(made)
            error = made.connect_ex(where)
            if error == errno.EINPROGRESS:
                self._tell((zmq.Event.CONNECT_DELAYED, 0))
                self._poll(made.fileno(), POLLOUT)
                return
            if not error:
                self._connected()
                return
        self._end((zmq.Event.CLOSED, error))

    def _connected(self) -> None:
        assert self._socket is not None
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._unreached(error)
            return
        try:
            self._socket.getpeername()
        except OSError:  # not yet: what was ready had this file descriptor before
            return
        self._is_connected = True
        self._tell((zmq.Event.CONNECTED, 0))
        self._poll(self._socket.fileno(), POLLIN)
        self._send_bytes(Handshake.first)

    # --- to receive and to send -------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Read what is there. Returns whether the inbox has got something."""
        if self._lookup is not None:
            self._looked_up()
            return False
        held = self._socket
        if held is None or self._is_over or not self._is_connected:
            return False
        try:
            if self._handshake is None:
                space = self._inbox.space()
                nbytes = held.recv_into(space)
                if nbytes < len(space) and not self._inbox.is_in_long_frame:
                    self._is_dry, self._reads = True, 0
                else:
                    self._reads += 1
                    self._is_dry = self._reads % _READS == 0
                self._inbox.filled(nbytes)
            else:
                received = held.recv(BUFFER_BYTES)
                nbytes = len(received)
                if nbytes:
                    self._shake(received)
        except BlockingIOError:
            return False
        except OSError as error:
            self._broken(error.errno or 0)
            return False
        if not nbytes:
            self._broken(errno.EPIPE)
        return nbytes > 0

    def _shake(self, received: bytes) -> None:
        """Go on with the handshake. Raises ProtocolError."""
        handshake = self._handshake
        assert handshake is not None
        answer, rest = handshake.take(received)
        self._send_bytes(answer)
        if handshake.is_done:
            self._handshake = None
            self._inbox.put(rest)
            self._tell((zmq.Event.HANDSHAKE_SUCCEEDED, 0))

    def _send_bytes(self, data: bytes) -> None:
        if data:
            self._queue.append(data)
            if not self._is_full:
                self._write()

    def _write(self) -> None:
        """Send what waits, as far as there is room."""
        held, queue = self._socket, self._queue
        if held is None or self._is_over:
            queue.clear()
            return
        try:
            left = _TURN_BYTES
            while queue and left > 0:
                if len(queue) == 1:
                    sent = held.send(queue[0], _NO_SIGNAL)
                else:
                    sent = held.sendmsg(self._next_pieces(), (), _NO_SIGNAL)
                left -= sent
                while sent:
                    piece = queue.popleft()
                    size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
                    if sent < size:
                        queue.appendleft(memoryview(piece).cast("B")[sent:])
                        left = 0
                        break
                    sent -= size
            self._is_full = bool(queue)
        except BlockingIOError:
            self._is_full = True
        except OSError:
            queue.clear()
            with contextlib.suppress(OSError):  # a message may be half sent: no other may follow
                held.shutdown(socket.SHUT_RDWR)  # reading will tell, once all that came before has been read
        self._poll(held.fileno(), POLLIN | POLLOUT if self._is_full else POLLIN)

    def _next_pieces(self) -> list[Any]:
        """The pieces that are sent now: so few that what the daemon sends meanwhile is read as fast."""
        pieces: list[Any] = []
        nbytes = 0
        for piece in islice(self._queue, _PIECES):
            pieces.append(piece)
            nbytes += piece.nbytes if isinstance(piece, memoryview) else len(piece)
            if nbytes >= _TURN_BYTES:
                break
        return pieces

    # --- events and sources -----------------------------------------------------------------------------------

    def _broken(self, error: int) -> None:
        if self._handshake is not None:
            self._tell((zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, error))
        self._end((zmq.Event.DISCONNECTED, error))

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self.has_events = True

    def _end(self, event: Event) -> None:
        """Tell what ends this channel, once."""
        if self._is_over:
            return
        self._is_over = True
        self._tell(event)
        if event[0] not in _ENDS:
            self._tell((zmq.Event.DISCONNECTED, 0))
        self._forget_sources()  # a socket that is at its end would be readable for good

    def _poll(self, fd: int, mask: int) -> None:
        """Have a source polled for what `mask` says."""
        if self.sources and self.sources[0][1] == mask:
            return
        self.sources = [(fd, mask)]
        if self._watcher is not None:
            self._watcher.watch(fd, mask, False)

    def _forget_sources(self) -> None:
        sources, self.sources = self.sources, []
        if self._watcher is not None:
            for source, _ in sources:
                self._watcher.unwatch(source)


def _set_up(made: socket.socket) -> None:
    """Set the options of a new socket."""
    made.setblocking(False)
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MAXRT_MS)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
