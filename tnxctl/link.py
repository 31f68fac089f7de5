"""Link: moves messages between a `Session` and the daemon, over one `Channel` after the other. Nothing here blocks.

A link makes one attempt to connect per channel and tells the session how it went; the session decides when to try
again. Everything unanswered is sent on the new one once its handshake is done. An unused client therefore leaves a dead
daemon alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import zmq

from tnxctl import handshakes
from tnxctl.call import Call
from tnxctl.channels.channel import (
    CONNECT_TIMEOUT_S,
    MISMATCH,
    POLLIN,
    Channel,
    Target,
    Watcher,
)
from tnxctl.channels.opening import open_channel
from tnxctl.greeting import Greeting
from tnxctl.session import Session

ZERO_COPY_BYTES = 256 * 1024
"""Least size of tensors that are sent from where they are. Below about this, copying is cheaper than lending memory."""

# Events that end an attempt or a connection. CONNECT_RETRIED is the only one that tells of a host name that does not
# resolve: libzmq does not in fact try again.
_OVER = (zmq.Event.DISCONNECTED, zmq.Event.CLOSED, zmq.Event.CONNECT_RETRIED)


class Link:
    """Link of one client to one daemon.

    Args:
        session: decides; the link obeys and reports.
        watcher: polls the sources of the channel; None: whoever drives does, with `sources`.

    Attributes:
        channel: the one that is open, or is being opened; None: there is none.
    """

    def __init__(self, session: Session, watcher: Watcher | None = None) -> None:
        self._session = session
        self._watcher = watcher
        self.channel: Channel | None = None
        self._greeting: Greeting | None = None  # of the listener, once a handshake has failed for no reason given
        self._met_at = math.inf  # when the other side accepted the connection, and the handshake began

    @property
    def sources(self) -> list[tuple[Any, int]]:
        """Sources to poll, and what for, as `zmq_poll` takes them."""
        channel = self.channel
        return [] if channel is None else channel.sources

    def start(self, call: Call[Any]) -> None:
        """Take a call under way; it may be `done` at once."""
        if call.changes_daemon and self._session.idle:
            self.look()  # a change is not sent twice: it would fail with a connection that is no more
        if self._session.start(call):
            self._send(call)

    def cancel(self, call: Call[Any]) -> bool:
        """Drop a call, and tell the daemon. False: it was not under way."""
        if not self._session.forget(call):
            return False
        self._send_cancel(call)
        return True

    def handle(self, source: Any, mask: int) -> list[Call[Any]]:
        """Do what a source is ready for, by the mask that a poll gave. Returns finished calls."""
        finished: list[Call[Any]] = []
        channel = self.channel
        if channel is None or not channel.sources:  # what was ready before has closed it
            return finished
        if channel.is_edge_triggered:
            if source is not channel.sources[0][0]:
                return self.poll_events()
            self.drain(1, finished.append)  # a poll looks at it each time
            return finished
        if mask != POLLIN:
            channel.on_room()
        self.drain(sys.maxsize, finished.append)
        return finished

    def on_room(self, source: Any) -> None:
        """Go on where there is room to send, or a connection stands; `poll_events` tells of it."""
        if self.channel is not None and self.channel.sources:  # else what was ready before has closed it
            self.channel.on_room()

    def drain(self, most: int, settle: Callable[[Call[Any]], None]) -> bool:
        """Take the messages that wait, up to so many, and hand each call that one finished to `settle`.

        Returns whether more may wait. If not, a source tells of the next one.
        """
        for _ in range(most):
            channel = self.channel
            frames = None if channel is None else channel.receive()
            if frames is None:
                break
            call = self._session.receive(frames, time.monotonic())
            if call is not None:
                settle(call)
        else:
            return True
        if channel is not None and channel.has_events:
            for call in self.poll_events():
                settle(call)
        return False

    @property
    def is_edge_triggered(self) -> bool:
        """Whether a use of the channel may swallow what its sources tell, see `Channel`."""
        return self.channel is not None and self.channel.is_edge_triggered

    def look(self) -> None:
        """Take note of what happened to the channel of an idle session while nobody polled."""
        self.drain(sys.maxsize, _drop)
        self.poll_events()

    def hold(self) -> None:
        """Have what is sent wait, see `Channel.hold`."""
        if self.channel is not None:
            self.channel.hold()

    def flush(self) -> None:
        """Send what waits, see `Channel.flush`."""
        if self.channel is not None:
            self.channel.flush()

    def has_input(self) -> bool:
        """Whether a message waits, see `Channel.has_input`."""
        return self.channel is not None and self.channel.has_input()

    def poll_events(self) -> list[Call[Any]]:
        """Take note of what happened to the channel: connected, lost, or how far an attempt came.

        Returns finished calls.
        """
        finished: list[Call[Any]] = []
        for event, value in () if self.channel is None else self.channel.events():
            self._note(event, value)
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._send_message(self._session.share_message())
                for call in self._session.connected(time.monotonic()):
                    self._send(call)
                self.send_probe()
            elif event in _OVER:
                finished += self._receive_all()  # answers that came before the end still count
                self.close()
                finished += self._session.lost()
                break
        return finished

    def _note(self, event: int, value: int) -> None:
        """Tell the connection what an event says of it."""
        connection, shown = self._session.connection, self._session.credentials
        now = time.monotonic()
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._greeting = None
        elif event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and self._is_mismatch():
            event, value = zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH
        if event == zmq.Event.CONNECT_DELAYED:  # the host name has been looked up
            self._time_attempt(now)
        if event == zmq.Event.CONNECTED:
            self._met_at = now
            self._time_attempt(now)
            if shown is not None:
                connection.handshake_begun(now)
        timed_out = now - self._met_at >= CONNECT_TIMEOUT_S / 2  # half of it: this thread may have slept
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

    def on_timer(self, now: float, most: int = sys.maxsize) -> list[Call[Any]]:
        """Fail late calls, close a half-open connection, connect, send deferred calls: whatever the time has come for.

        Args:
            most: of the messages that wait, how many are taken where one is looked for; drain what may be left.

        Returns finished calls.
        """
        finished: list[Call[Any]] = []
        connection = self._session.connection
        if connection.is_half_open(now):
            self.drain(most, finished.append)  # nobody may have looked for a while
            if connection.is_half_open(now):
                self.close()
                finished += self._session.give_up()
        if connection.is_late(now) and self.channel is not None:
            self.channel.time_out()
            finished += self.poll_events()
        expired = self._session.expire(now)
        for call in expired:
            self._send_cancel(call)
        finished += expired
        self.send_probe()
        if self._session.must_connect(now):
            finished += self.connect(now)
        for call in self._session.take_retries(now):
            self._send(call)
        return finished

    def _receive_all(self) -> list[Call[Any]]:
        """Take all messages that wait. Returns the calls that they finished."""
        finished: list[Call[Any]] = []
        while self.channel is not None and (frames := self.channel.receive()) is not None:
            call = self._session.receive(frames, time.monotonic())
            if call is not None:
                finished.append(call)
        return finished

    def send_probe(self) -> None:
        """Ask the daemon for its health, where the session wants to know."""
        self._send_message(self._session.probe_message())

    def _send_message(self, message: bytes | None) -> None:
        """Send a header alone, if there is one and a connection."""
        if message is not None and self.channel is not None:
            self.channel.send([message], True)

    def reset(self) -> list[Call[Any]]:
        """Give up the connection, since an error may have left a message half sent or half read.

        Returns the calls that fail with it: those that change the daemon, which are not sent twice.
        """
        self.close()
        self._session.connection.trouble = "an error in this process ended it"
        return self._session.disconnected()

    def close(self) -> None:
        """Close the channel at once, whatever it has still to send. Idempotent, also where an interrupt came."""
        if self.channel is not None:
            self.channel.close()
        self.channel = None

    def abandon(self) -> None:
        """Forget the channel, in a forked child: it is the parent's."""
        if self._session.sharing is not None:
            self._session.sharing.lost()
        if self.channel is not None:
            self.channel.abandon()
        self.channel = None

    def connect(self, now: float) -> list[Call[Any]]:
        """Attempt to connect. Returns finished calls, where that has failed at once."""
        session = self._session
        session.connection.connecting(now)
        target = Target(session.endpoint, session.credentials, session.max_frame_bytes, session.max_frames)
        try:
            self.channel = open_channel(target, self._watcher)
        except (zmq.ZMQError, OSError) as error:  # no file descriptor left, or a path that the system refuses
            session.connection.trouble = str(error)
            return session.lost()
        self._time_attempt(now)
        return self.poll_events() if self.channel.has_events else []

    def _time_attempt(self, now: float) -> None:
        """Have an attempt end in time, where the channel does not see to it."""
        if self.channel is not None and not self.channel.times_out:
            self._session.connection.ends_at = now + CONNECT_TIMEOUT_S

    def _send_cancel(self, call: Call[Any]) -> None:
        """Spare the daemon a computation that nobody waits for, if that is possible at once."""
        self._send_message(self._session.cancel_message(call))

    def _send(self, call: Call[Any]) -> None:
        assert self.channel is not None
        sharing = self._session.sharing
        frames = call.frames if sharing is None else sharing.outgoing(call)
        self.channel.send(frames, call.nbytes < ZERO_COPY_BYTES)


def _drop(call: Call[Any]) -> None:
    """Do nothing with a call: nobody waits for it."""
