"""Channel: what a `tnxctl.link.Link` expects of one connection to a daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import zmq

from tnxctl.keys.credentials import Credentials

POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
"""Plain integers: pyzmq's are enums, whose operators cost microseconds per message."""

CONNECT_TIMEOUT_S = 5.0
"""Longest time of an attempt to connect, and again of the handshake: a port may accept and then stay silent."""

MAXRT_MS = 30_000
"""Longest time that data which no host acknowledges stays on its way: then the connection is dead."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 30, 10, 3

MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
"""Value of HANDSHAKE_FAILED_PROTOCOL where one side uses keys and the other none."""

Event = tuple[int, int]
"""Event of a channel, as libzmq's monitors tell it: a number of `zmq.Event`, and a value."""


class Watcher(NamedTuple):
    """Poller of a driver that has one of its own, as an event loop.

    Attributes:
        watch: called with a file descriptor, what to watch it for (`POLLIN`, `POLLOUT`) and whether messages never come
            from it; again where what for changes.
        unwatch: called with a file descriptor before it is closed.
    """

    watch: Callable[[int, int, bool], None]
    unwatch: Callable[[int], None]


class Target(NamedTuple):
    """Where a channel leads to, and what it takes from there.

    Attributes:
        endpoint: tcp://HOST:PORT or ipc://PATH.
        credentials: what to show to the daemon, and to expect of it; None: no keys are used.
        max_frame_bytes: most bytes of a frame: a longer one ends the connection.
        max_frames: most frames of a message that are looked at.
    """

    endpoint: str
    credentials: Credentials | None
    max_frame_bytes: int
    max_frames: int


class Channel(Protocol):
    """One attempt to connect, and the connection that comes of it. Nothing here blocks.

    Attributes:
        sources: what to poll, and what for, as `zmq_poll` takes it.
        has_events: whether `events` has something, so far as that is known without a look.
        is_edge_triggered: whether its sources tell of a change once, and any use may swallow it.
        times_out: whether it ends an attempt that takes too long by itself, for now; else `time_out` is to be called.
    """

    sources: list[tuple[Any, int]]
    has_events: bool
    is_edge_triggered: bool
    times_out: bool

    def receive(self) -> list[Any] | None:
        """The frames of one message, if one is here: the first as bytes, the others as memory that can be written."""

    def has_input(self) -> bool:
        """Whether a message waits, for all that is known. Where it is edge-triggered, the look also re-arms it."""

    def descriptor(self) -> tuple[int, int]:
        """A file descriptor that is ready when messages may wait, and what to poll it for; negative: there is none."""

    def events(self) -> list[Event]:
        """The events since the last look."""

    def send(self, frames: Sequence[Any], copy: bool) -> None:
        """Send a message, or keep it until there is room. One that finds no connection is lost, as `events` tells.

        Args:
            copy: its memory may change once this has returned.
        """

    def hold(self) -> None:
        """Have what is sent from now on wait for `flush`, to go out in one piece."""

    def flush(self) -> None:
        """Send what waits, as far as there is room."""

    def on_room(self) -> None:
        """Go on: a source is ready for more than POLLIN."""

    def time_out(self) -> None:
        """End an attempt that has taken too long."""

    def close(self) -> None:
        """Close it at once, whatever it has still to send. Idempotent."""

    def abandon(self) -> None:
        """Forget it, in a forked child: it is the parent's."""
