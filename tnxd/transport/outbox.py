"""Outbox: replies to peers, and those that a peer does not take yet.

libzmq holds some messages of each peer. Large frames are sent zero-copy, so libzmq holds references to their memory and
says when they have left. What libzmq takes no more waits in a backlog of the peer, within limits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import MIB
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection

_MORE = int(zmq.SNDMORE)
_FIRST = int(zmq.NOBLOCK) | _MORE

# Messages that libzmq queues for one peer.
PEER_HWM = 256

# From this size on, handing libzmq a reference beats copying. It wakes a thread of pyzmq's for every frame, which
# costs as much as to copy 512 kB; but what is copied counts against a peer as a message only, whatever its size.
_ZERO_COPY_FROM_BYTES = 256 * 1024

# Smaller frames are not counted: with libzmq's limit in messages they come to a megabyte at most.
_COUNTED_FROM_BYTES = 4096
# After so many bytes of copies, a frame is sent zero-copy, as a mark: once it has left, they have, too.
_MARK_EVERY_BYTES = MIB

# Bytes that libzmq holds for one peer, since its own limit is in messages.
_PEER_ZERO_COPY_BYTES = 16 * MIB

_BACKLOG_SECONDS = 60.0  # without progress; a large frame over a slow line shows none until it has gone
_RETRY_S = 0.002  # at first, then twice as long each time that nothing could be sent
_MAX_RETRY_S = 0.064
_ZERO_COPY_RETRY_S = 0.01

_BACKLOG_MESSAGE_BYTES = 512  # what a reply takes in a backlog beside its frames: many are short

Frames = tuple[bytes, Sequence[Array]]
"""An encoded header and the tensors behind it."""


class _ZeroCopy:
    """Zero-copy frames of one peer that libzmq is not known to have sent, in order.

    Attributes:
        frames: each with the bytes that have left once it has.
        nbytes: the sum of those.
        copied: bytes of copies since the last zero-copy frame.
    """

    def __init__(self) -> None:
        self.frames: deque[tuple[zmq.MessageTracker, int]] = deque()
        self.nbytes = 0
        self.copied = 0

    def release_sent(self) -> int:
        """Forget the frames that have left. Returns their bytes."""
        before = self.nbytes
        while self.frames and self.frames[0][0].done:
            self.nbytes -= self.frames.popleft()[1]
        return before - self.nbytes


class _Backlog:
    """Replies that libzmq does not take for one peer.

    Attributes:
        messages: whether with a delimiter, the frames, and their bytes.
        since: the time of the last progress, by the monotonic clock in seconds.
        retry_s, retry_at: how long until the next try, and when that is.
    """

    def __init__(self) -> None:
        self.messages: deque[tuple[bool, Frames, int]] = deque()
        self.since = time.monotonic()
        self.retry_s = _RETRY_S
        self.retry_at = self.since + _RETRY_S


class Outbox:
    """Replies on their way out.

    Args:
        socket: the ROUTER socket. by_peer: open connections by routing id, as `Connections` keeps them.
        cut: ends a connection.

    Attributes:
        undeliverable: messages given up because the peer was gone or took nothing for too long.
        backlogs: by routing id. zero_copy_peers: those for which libzmq holds zero-copy frames.
        retry_at: when to call `flush` next, by the monotonic clock in seconds; of no meaning while both are empty.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        by_peer: Mapping[bytes, Connection],
        cut: Callable[[Connection], None],
        admission: Admission,
    ) -> None:
        self.undeliverable = 0
        self.backlogs: dict[bytes, _Backlog] = {}
        self.zero_copy_peers: set[bytes] = set()
        self.retry_at = 0.0
        self._by_peer = by_peer
        self._cut = cut
        self._admission = admission
        self._zero_copy: dict[bytes, _ZeroCopy] = {}
        self._peer_zero_copy_bytes = min(_PEER_ZERO_COPY_BYTES, admission.max_unsent_bytes // 4)
        self._mark_every_bytes = min(_MARK_EVERY_BYTES, self._peer_zero_copy_bytes // 4)
        socket.copy_threshold = 0  # what is to be sent by reference is, however small: its tracker is a mark
        # Of the compiled class below: what pyzmq wraps around it serves options that nothing here uses, and costs half
        # as much again. Its stubs do not know that frames are buffers, nor that arrays are.
        self._send: Any = super(zmq.Socket, socket).send

    def send(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        """Send a message, or keep it for later if the peer takes none now. Counts what cannot be delivered.

        Args:
            delimited: whether an empty frame comes first, as REQ sockets need it.

        Returns:
            False if too many replies to the peer are unsent: the message is not taken, send a smaller one instead.
            Messages without tensors are taken up to twice that limit; beyond that the peer is cut off.
        """
        if (not self.backlogs or peer not in self.backlogs) and self._attempt(peer, delimited, frames):
            return True
        connection = self._by_peer.get(peer)
        if connection is not None and frames[1] and self._admission.is_over_unsent_limit(connection):
            return False
        self._keep(peer, delimited, frames)
        return True

    def _attempt(self, peer: bytes, delimited: bool, frames: Frames) -> bool:
        """Hand a message to libzmq. False if the peer takes none now."""
        send = self._send
        if self._zero_copy and peer in self._zero_copy and self._zero_copy[peer].nbytes > self._peer_zero_copy_bytes:
            self._release_sent(peer)
            if self._zero_copy[peer].nbytes > self._peer_zero_copy_bytes:
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
            if nbytes < _COUNTED_FROM_BYTES or (nbytes < _ZERO_COPY_FROM_BYTES and self._count_copy(peer, nbytes)):
                send(array, flags)
            else:
                self._track(peer, send(array, flags, False, True), nbytes)
        return True

    def _count_copy(self, peer: bytes, nbytes: int) -> bool:
        """Count a frame that is sent as a copy. False if it has to be sent zero-copy, as a mark behind such copies."""
        held = self._zero_copy.get(peer)
        if held is None:
            held = self._zero_copy[peer] = _ZeroCopy()
        if held.copied + nbytes >= self._mark_every_bytes:
            return False
        held.copied += nbytes
        return True

    def _track(self, peer: bytes, tracker: zmq.MessageTracker, nbytes: int) -> None:
        """Count a frame that was sent zero-copy, and the copies before it, until it has left."""
        held = self._zero_copy.get(peer)
        if held is None:
            held = self._zero_copy[peer] = _ZeroCopy()
        nbytes += held.copied
        held.copied = 0
        held.frames.append((tracker, nbytes))
        held.nbytes += nbytes
        if not self.zero_copy_peers and not self.backlogs:
            self.retry_at = time.monotonic() + _RETRY_S
        self.zero_copy_peers.add(peer)
        connection = self._by_peer.get(peer)
        if connection is not None:
            self._admission.add_unsent(connection, nbytes)

    def _release_sent(self, peer: bytes) -> None:
        """Forget the zero-copy frames of a peer that have left."""
        held = self._zero_copy[peer]
        sent = held.release_sent()
        if sent:
            connection = self._by_peer.get(peer)
            if connection is not None:
                self._admission.add_unsent(connection, -min(sent, connection.unsent))
            if peer in self.backlogs:
                self.backlogs[peer].since = time.monotonic()
        if not held.frames:
            self.zero_copy_peers.discard(peer)

    def _keep(self, peer: bytes, delimited: bool, frames: Frames) -> None:
        header, arrays = frames
        connection = self._by_peer.get(peer)
        if connection is None or self._admission.must_be_cut(connection):
            self.undeliverable += 1
            if connection is not None:
                self._cut(connection)
            return
        # A small slice must not keep the outputs of a whole batch alive.
        arrays = [
            array.copy() if array.base is not None and array.nbytes < _ZERO_COPY_FROM_BYTES else array
            for array in arrays
        ]
        nbytes = _BACKLOG_MESSAGE_BYTES + len(header) + sum(array.nbytes for array in arrays)
        if not self.backlogs:
            self.retry_at = time.monotonic() + _RETRY_S
        backlog = self.backlogs.get(peer)
        if backlog is None:
            backlog = self.backlogs[peer] = _Backlog()
        frames = (header, arrays)
        backlog.messages.append((delimited, frames, nbytes))
        self._admission.add_unsent(connection, nbytes)

    def flush(self) -> bool:
        """Try again what peers did not take, each less often the longer it takes nothing. True when nothing is left."""
        if not self.backlogs and not self.zero_copy_peers:
            return True
        now = time.monotonic()
        if now < self.retry_at:
            return not self.backlogs
        for peer in list(self.zero_copy_peers):
            self._release_sent(peer)
        for peer, backlog in list(self.backlogs.items()):
            if backlog.retry_at <= now:
                self._retry(peer, backlog, now)
        self.retry_at = min([backlog.retry_at for backlog in self.backlogs.values()], default=now + _RETRY_S)
        if self.zero_copy_peers:
            self.retry_at = min(self.retry_at, now + _ZERO_COPY_RETRY_S)
        return not self.backlogs

    def _retry(self, peer: bytes, backlog: _Backlog, now: float) -> None:
        connection = self._by_peer.get(peer)
        if connection is None:
            del self.backlogs[peer]
            self.undeliverable += len(backlog.messages)
            return
        moved = False
        while backlog.messages:
            delimited, frames, nbytes = backlog.messages[0]
            if not self._attempt(peer, delimited, frames):
                break
            backlog.messages.popleft()
            self._admission.add_unsent(connection, -min(nbytes, connection.unsent))
            moved = True
        if not backlog.messages:
            del self.backlogs[peer]
            return
        if moved:
            backlog.since, backlog.retry_s = now, _RETRY_S
        else:
            backlog.retry_s = min(2 * backlog.retry_s, _MAX_RETRY_S)
        backlog.retry_at = now + backlog.retry_s
        if now - backlog.since > _BACKLOG_SECONDS:
            self.undeliverable += len(backlog.messages)
            del self.backlogs[peer]
            self._admission.add_unsent(connection, -connection.unsent)
            self._cut(connection)

    def drop(self, connection: Connection) -> None:
        """Forget the replies to a connection that has ended."""
        peer = connection.peer
        backlog = self.backlogs.pop(peer, None)
        if backlog is not None:
            self.undeliverable += len(backlog.messages)
        if self._zero_copy.pop(peer, None) is not None:
            self.zero_copy_peers.discard(peer)
        if connection.unsent:
            self._admission.add_unsent(connection, -connection.unsent)
