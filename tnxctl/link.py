"""The sockets under a `Session`: one DEALER and its monitor per connection. Nothing here blocks.

A link makes one attempt to connect per DEALER and tells the session how it went; the session decides when to try
again. libzmq would reconnect a DEALER by itself, but does not say which messages the broken connection took with
it, so each attempt is a fresh socket, and everything unanswered is sent on it once its handshake is done.
An unused client therefore leaves a dead daemon alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import zmq

from tnxctl import handshakes
from tnxctl.call import Call
from tnxctl.greeting import Greeting
from tnxctl.session import Session

Socket = zmq.Socket[bytes]

ZERO_COPY_BYTES = 256 * 1024
"""Least size of tensors that libzmq gets without a copy. Below about this, copying is cheaper than lending memory."""

KEPT_BYTES = 64 * 1024
"""Least size of a received frame that is kept as it came, and not copied."""

_CONNECT_TIMEOUT_MS = 5_000  # also for the ZeroMQ handshake: a port may accept and then stay silent
_NEVER_MS = 24 * 3_600_000
_TCP_MAXRT_MS = 30_000  # data that no host acknowledges for so long: the connection is dead

# Events that end an attempt or a connection. CONNECT_RETRIED, not in fact retried for _NEVER_MS, is
# the only one that tells of a host name that does not resolve.
_OVER = (zmq.Event.DISCONNECTED, zmq.Event.CLOSED, zmq.Event.CONNECT_RETRIED)

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

# Plain integers: pyzmq's are enums, whose operators cost microseconds per message.
_POLLIN = int(zmq.POLLIN)
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


class Link:
    """The sockets of one client: moves messages between its session and the daemon.

    Args:
        session: decides; the link obeys and reports.
        watch, unwatch: called with each socket after it is opened and before it is closed, to have it polled. The
            second argument of `watch` says whether it is a monitor.

    Attributes:
        dealer, monitor: both None, or both open.
        sources: both, as zmq_poll takes them.
    """

    def __init__(
        self,
        session: Session,
        watch: Callable[[Socket, bool], None] | None = None,
        unwatch: Callable[[Socket], None] | None = None,
    ) -> None:
        self._session = session
        self._watch = watch or _ignore
        self._unwatch = unwatch or _ignore
        self.dealer: Socket | None = None
        self.monitor: Socket | None = None
        self.sources: list[tuple[Any, int]] = []
        self._is_large = False  # the last tensor that came
        self._greeting: Greeting | None = None  # of the listener, once a handshake has failed for no reason given
        self._met_at = math.inf  # when the other side accepted the connection, and the handshake began

    def start(self, call: Call[Any]) -> None:
        """Take a call under way; it may be `done` at once."""
        if self._session.start(call):
            self._send(call)

    def cancel(self, call: Call[Any]) -> bool:
        """Drop a call, and tell the daemon. False: it was not under way."""
        if not self._session.forget(call):
            return False
        self._send_cancel(call)
        return True

    def receive(self) -> Call[Any] | None:
        """Take one message, if one waits. Returns the call that it finished, if any."""
        frames = self._receive_frames()
        return None if frames is None else self._session.receive(frames, time.monotonic())

    def drain(self, most: int, settle: Callable[[Call[Any]], None]) -> bool:
        """Take the messages that wait, up to so many, and hand each call that one finished to `settle`.

        Returns whether more may wait. If not, the file descriptor of the socket tells of the next one: the attempt that
        found none has re-armed it, as a look at the events would have, but one look for all instead of one for each.
        """
        for _ in range(most):
            frames = self._receive_frames()
            if frames is None:
                return False
            call = self._session.receive(frames, time.monotonic())
            if call is not None:
                settle(call)
        return True

    def _receive_frames(self) -> list[Any] | None:
        """Take the frames of one message; None if none waits."""
        dealer = self.dealer
        if dealer is None:
            return None
        try:
            frames: list[Any] = [dealer.recv(_NOBLOCK)]
        except zmq.Again:
            return None
        while dealer.get(_RCVMORE):
            frame = self._receive_tensor(dealer)
            if len(frames) < self._session.max_frames:
                frames.append(frame)
        return frames

    def has_input(self) -> bool:
        """Whether a message waits. The look also re-arms the edge-triggered file descriptor of the socket."""
        return has_input(self.dealer)

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

    def poll_monitor(self) -> list[Call[Any]]:
        """Read the events of the monitor: connected, lost, or how far an attempt came. Returns finished calls."""
        finished: list[Call[Any]] = []
        while has_input(self.monitor):
            assert self.monitor is not None
            event, value = _EVENT.unpack(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            self._note(event, value)
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._send_message(self._session.share_message())
                for call in self._session.connected(time.monotonic()):
                    self._send(call)
                self.send_probe()
            elif event in _OVER:
                finished += self._receive_all()  # answers that came before the end still count
                self._close_sockets()
                finished += self._session.lost()
        return finished

    def _note(self, event: int, value: int) -> None:
        """Tell the connection what an event says of it."""
        connection, shown = self._session.connection, self._session.credentials
        now = time.monotonic()
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._greeting = None
        elif event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and self._is_mismatch():
            event, value = zmq.Event.HANDSHAKE_FAILED_PROTOCOL, handshakes.MISMATCH
        if event == zmq.Event.CONNECTED:
            self._met_at = now
            if shown is not None:
                connection.handshake_begun(now)
        timed_out = now - self._met_at >= _CONNECT_TIMEOUT_MS / 2e3  # half of it: this thread may have slept
        trouble = handshakes.trouble(event, value, shown, timed_out=timed_out)
        if trouble is not None:
            connection.note_trouble(trouble, begun=event == zmq.Event.CONNECT_DELAYED)
        if handshakes.is_failure(event, value, shown):
            connection.handshake_failed(refused=handshakes.is_refusal(event, value))

    def _is_mismatch(self) -> bool:
        """Whether one side uses keys and the other none, by the greeting of the listener, which is asked for."""
        if not self._session.endpoint.startswith("tcp://"):
            return False  # no keys are used there
        if self._greeting is None or (self._greeting.is_over and not self._greeting.mechanism):
            self._greeting = Greeting(self._session.endpoint)
        return self._greeting.mechanism == ("CURVE" if self._session.credentials is None else "NULL")

    def on_timer(self, now: float) -> list[Call[Any]]:
        """Fail late calls, close a half-open connection, connect, send deferred calls: whatever the time has come for.

        Returns finished calls.
        """
        finished: list[Call[Any]] = []
        if self._session.connection.is_half_open(now):
            finished += self._receive_all()  # nobody may have looked for a while
            if self._session.connection.is_half_open(now):
                self._close_sockets()
                finished += self._session.give_up()
        expired = self._session.expire(now)
        for call in expired:
            self._send_cancel(call)
        finished += expired
        self.send_probe()
        if self._session.must_connect(now):
            self.connect(now)
        for call in self._session.take_retries(now):
            self._send(call)
        return finished

    def _receive_all(self) -> list[Call[Any]]:
        """Take all messages that wait. Returns the calls that they finished."""
        finished: list[Call[Any]] = []
        while self.has_input():
            call = self.receive()
            if call is not None:
                finished.append(call)
        return finished

    def send_probe(self) -> None:
        """Ask the daemon for its health, where the session wants to know."""
        self._send_message(self._session.probe_message())

    def _send_message(self, message: bytes | None) -> None:
        """Send a header alone, if there is one and that is possible at once."""
        if message is not None and self.dealer is not None:
            with contextlib.suppress(zmq.ZMQError):
                self.dealer.send(message, _NOBLOCK)

    def reset(self) -> list[Call[Any]]:
        """Give up the connection, since an error may have left a message half sent or half read.

        Returns the calls that fail with it: those that change the daemon, which are not sent twice.
        """
        self._close_sockets()
        self._session.connection.trouble = "an error in this process ended it"
        return self._session.disconnected()

    def close(self) -> None:
        """Close the sockets at once, whatever they have still to send. Idempotent."""
        self._close_sockets()

    def abandon(self) -> None:
        """Forget the sockets, in a forked child: they are the parent's, and pyzmq leaves them open here."""
        if self._session.sharing is not None:
            self._session.sharing.lost()
        for socket in (self.dealer, self.monitor):
            if socket is not None:
                with contextlib.suppress(AttributeError):
                    socket._shadow = True  # another's: pyzmq does not warn that it was never closed
        self.dealer, self.monitor, self.sources = None, None, []

    def connect(self, now: float) -> None:
        """Attempt to connect."""
        session = self._session
        session.connection.connecting(now)
        try:
            self._open_sockets()
        except (zmq.ZMQError, OSError) as error:  # no file descriptor left, or a path that the system refuses
            self._close_sockets()
            session.connection.trouble = str(error)
            session.lost()

    def _open_sockets(self) -> None:
        context = shared_context()
        self.dealer = dealer = context.socket(zmq.DEALER)
        self._watch(dealer, False)
        dealer.set(zmq.LINGER, 0)
        # For IPv6 addresses only: a name such as localhost would be looked up as IPv6 alone, and its IPv4 never tried.
        dealer.set(zmq.IPV6, "[" in self._session.endpoint)
        dealer.set(zmq.SNDHWM, 0)  # the session bounds what is under way
        dealer.set(zmq.RCVHWM, 0)
        dealer.set(zmq.MAXMSGSIZE, self._session.max_frame_bytes)
        dealer.set(zmq.RECONNECT_IVL, _NEVER_MS)
        dealer.set(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
        dealer.set(zmq.HANDSHAKE_IVL, _CONNECT_TIMEOUT_MS)
        shown = self._session.credentials
        if shown is not None:  # then libzmq connects by CURVE or not at all
            dealer.set(zmq.CURVE_SERVERKEY, shown.server.encode())
            dealer.set(zmq.CURVE_PUBLICKEY, shown.public.encode())
            dealer.set(zmq.CURVE_SECRETKEY, shown.secret.encode())
        dealer.set(zmq.TCP_MAXRT, _TCP_MAXRT_MS)
        dealer.set(zmq.TCP_KEEPALIVE, 1)
        dealer.set(zmq.TCP_KEEPALIVE_IDLE, 30)
        dealer.set(zmq.TCP_KEEPALIVE_INTVL, 10)
        dealer.set(zmq.TCP_KEEPALIVE_CNT, 3)
        # pyzmq's own address comes from a file descriptor, whose number the last socket may have had just now.
        self.monitor = dealer.get_monitor_socket(_EVENTS, f"inproc://tnx-monitor-{next(_monitor_ids)}")
        self._watch(self.monitor, True)
        self.sources = [(dealer, _POLLIN), (self.monitor, _POLLIN)]
        dealer.connect(self._session.endpoint)

    def _close_sockets(self) -> None:
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

    def _send_cancel(self, call: Call[Any]) -> None:
        """Spare the daemon a computation that nobody waits for, if that is possible at once."""
        self._send_message(self._session.cancel_message(call))

    def _send(self, call: Call[Any]) -> None:
        dealer = self.dealer
        assert dealer is not None
        copy = call.nbytes < ZERO_COPY_BYTES
        sharing = self._session.sharing
        *head, last = call.frames if sharing is None else sharing.outgoing(call)
        try:
            for frame in head:
                dealer.send(frame, _MORE_NOBLOCK, copy)
            dealer.send(last, _NOBLOCK, copy)
        except zmq.Again:
            pass  # the connection has just broken: the monitor is about to say so, and the call goes out on the next


def _ignore(_: Socket, __: bool = False) -> None:
    pass


def has_input(socket: Socket | None) -> bool:
    """Whether a message waits. The look also re-arms the edge-triggered file descriptor of the socket."""
    return socket is not None and bool(int(socket.get(_EVENTS_OPTION)) & _POLLIN)
