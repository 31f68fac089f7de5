"""Channel of libzmq: a DEALER and its monitor.

libzmq would reconnect a DEALER by itself, but does not say which messages the broken connection took with it, so each
attempt is a fresh socket.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Sequence
from typing import Any

import zmq

from tnxctl.channels.channel import (
    CONNECT_TIMEOUT_S,
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    MAXRT_MS,
    POLLIN,
    Event,
    Target,
    Watcher,
)

Socket = zmq.Socket[bytes]

KEPT_BYTES = 64 * 1024
"""Least size of a received frame that is kept as it came, and not copied."""

_NEVER_MS = 24 * 3_600_000

_EVENTS = (
    zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
)

# Plain integers, as in `tnxctl.channels.channel`.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE_NOBLOCK = int(zmq.SNDMORE | zmq.NOBLOCK)
_RCVMORE = int(zmq.RCVMORE)
_EVENTS_OPTION = int(zmq.EVENTS)

_EVENT = struct.Struct("=Hi")  # event, value; zmq.utils.monitor knows it too, but imports asyncio

_monitor_ids = itertools.count()

_contexts: dict[int, zmq.Context[Socket]] = {}  # by process


def shared_context() -> zmq.Context[Socket]:
    """The one context of all clients in this process: two threads of libzmq, whatever the number of clients.

    It is never terminated, because that waits for a host name that is being resolved; the sockets in it are
    closed with their clients. A forked child gets its own.
    """
    process = os.getpid()
    shared = _contexts.get(process)
    if shared is None:
        made = zmq.Context[Socket]()
        shared = _contexts.setdefault(process, made)  # threads may come here at once; a lock could be held by a fork
        if shared is not made:
            made.term()
    return shared


class LibzmqChannel:
    """See `tnxctl.channels.channel.Channel`, and `tnxctl.channels.opening.open_channel` for the arguments.

    Attributes:
        dealer, monitor: both None, or both open.
    """

    has_events = False  # the monitor is a source of its own
    is_edge_triggered = True
    times_out = True

    def __init__(self, target: Target, watcher: Watcher | None) -> None:
        self.sources: list[tuple[Any, int]] = []
        self.dealer: Socket | None = None
        self.monitor: Socket | None = None
        self._watcher = watcher
        self._max_frames = target.max_frames
        self._is_large = False  # the last tensor that came
        try:
            self._open(target)
        except BaseException:
            self.close()
            raise

    def receive(self) -> list[Any] | None:
        dealer = self.dealer
        if dealer is None:
            return None
        try:
            frames: list[Any] = [dealer.recv(_NOBLOCK)]
        except zmq.Again:
            return None
        while dealer.get(_RCVMORE):
            frame = self._receive_tensor(dealer)
            if len(frames) < self._max_frames:
                frames.append(frame)
        return frames

    def _receive_tensor(self, dealer: Socket) -> bytearray | zmq.Frame:
        """Take the next frame, as memory that can be written to.

        A large one is kept as libzmq has it. A small one may be part of a buffer that it would keep alive as a whole,
        at an odd place in it, and takes longer that way than to be copied. Answers tend to be as large as the last one.
        """
        if not self._is_large:
            frame = bytearray(dealer.recv(_NOBLOCK))
            self._is_large = len(frame) >= KEPT_BYTES
            return frame
        kept = dealer.recv(_NOBLOCK, copy=False)
        self._is_large = len(kept) >= KEPT_BYTES
        return kept if self._is_large else bytearray(kept.buffer)

    def has_input(self) -> bool:
        return _has_input(self.dealer)

    def descriptor(self) -> tuple[int, int]:
        return (-1, 0) if self.dealer is None else (self.dealer.fileno(), POLLIN)

    def events(self) -> list[Event]:
        found: list[Event] = []
        while _has_input(self.monitor):
            assert self.monitor is not None
            found.append(_EVENT.unpack(self.monitor.recv_multipart(zmq.NOBLOCK)[0]))
        return found

    def send(self, frames: Sequence[Any], copy: bool) -> None:
        dealer = self.dealer
        if dealer is None:
            return
        *head, last = frames
        try:
            for frame in head:
                dealer.send(frame, _MORE_NOBLOCK, copy)
            dealer.send(last, _NOBLOCK, copy)
        except zmq.Again:
            pass  # the connection has just broken, and the monitor is about to say so

    def hold(self) -> None:
        """Nothing waits: libzmq's thread takes it all."""

    def flush(self) -> None:
        """Nothing waits."""

    def on_room(self) -> None:
        """There always is."""

    def time_out(self) -> None:
        """libzmq does."""

    def close(self) -> None:
        """Close both sockets. Idempotent: a second call closes those that an interrupt kept the first from closing."""
        dealer, monitor = self.dealer, self.monitor
        if monitor is not None and not monitor.closed:
            assert dealer is not None
            dealer.disable_monitor()  # before its reader goes: libzmq's I/O thread could block on writing events
            self._unwatch(monitor)
            monitor.close(0)
        if dealer is not None and not dealer.closed:
            self._unwatch(dealer)
            dealer.close(0)
        self.dealer, self.monitor, self.sources = None, None, []

    def abandon(self) -> None:
        """Forget the sockets: pyzmq leaves a parent's open here."""
        for socket in (self.dealer, self.monitor):
            if socket is not None:
                with contextlib.suppress(AttributeError):
                    socket._shadow = True  # another's: pyzmq does not warn that it was never closed
        self.dealer, self.monitor, self.sources = None, None, []

    def _open(self, target: Target) -> None:
        self.dealer = dealer = shared_context().socket(zmq.DEALER)
        self._watch(dealer, False)
        dealer.set(zmq.LINGER, 0)
        # For IPv6 addresses only: a name such as localhost would be looked up as IPv6 alone, and its IPv4 never tried.
        dealer.set(zmq.IPV6, "[" in target.endpoint)
        dealer.set(zmq.SNDHWM, 0)  # the session bounds what is under way
        dealer.set(zmq.RCVHWM, 0)
        dealer.set(zmq.MAXMSGSIZE, target.max_frame_bytes)
        dealer.set(zmq.RECONNECT_IVL, _NEVER_MS)
        dealer.set(zmq.CONNECT_TIMEOUT, int(1e3 * CONNECT_TIMEOUT_S))
        dealer.set(zmq.HANDSHAKE_IVL, int(1e3 * CONNECT_TIMEOUT_S))
        shown = target.credentials
        if shown is not None:  # then libzmq connects by CURVE or not at all
            dealer.set(zmq.CURVE_SERVERKEY, shown.server.encode())
            dealer.set(zmq.CURVE_PUBLICKEY, shown.public.encode())
            dealer.set(zmq.CURVE_SECRETKEY, shown.secret.encode())
        dealer.set(zmq.TCP_MAXRT, MAXRT_MS)
        dealer.set(zmq.TCP_KEEPALIVE, 1)
        dealer.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
        dealer.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
        dealer.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT)
        # pyzmq's own address comes from a file descriptor, whose number the last socket may have had just now.
        self.monitor = dealer.get_monitor_socket(_EVENTS, f"inproc://tnx-monitor-{next(_monitor_ids)}")
        self._watch(self.monitor, True)
        self.sources = [(dealer, POLLIN), (self.monitor, POLLIN)]
        dealer.connect(target.endpoint)

    def _watch(self, opened: Socket, is_monitor: bool) -> None:
        if self._watcher is not None:
            self._watcher.watch(opened.fileno(), POLLIN, is_monitor)

    def _unwatch(self, closing: Socket) -> None:
        if self._watcher is not None:
            self._watcher.unwatch(closing.fileno())


def _has_input(socket: Socket | None) -> bool:
    """Whether a message waits. The look also re-arms the edge-triggered file descriptor of the socket."""
    return socket is not None and bool(int(socket.get(_EVENTS_OPTION)) & POLLIN)
