"""The sockets under a `Balancer`: one `Link` per daemon, seen by a driver as one. Nothing here blocks."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from tnxctl.balancer import Balancer
from tnxctl.call import Call
from tnxctl.link import Link, Socket
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import Limits
from tnxctl.session import Session, SharedTensors


class Links:
    """The sockets of a client of several daemons: starts attempts where its balancer places them.

    Args:
        balancer: decides; the links obey and report.
        watch, unwatch: as for a `Link`.
    """

    dealer = None
    monitor = None

    def __init__(
        self,
        balancer: Balancer,
        watch: Callable[[Socket, bool], None] | None = None,
        unwatch: Callable[[Socket], None] | None = None,
    ) -> None:
        self._balancer = balancer
        self._links = [Link(session, watch, unwatch) for session in balancer.sessions]
        self._finished: deque[Call[Any]] = deque()  # that `receive` has not handed on yet

    @property
    def sources(self) -> list[tuple[Socket, int]]:
        """The open sockets, as zmq_poll takes them."""
        return [source for link in self._links for source in link.sources]

    def start(self, call: Call[Any]) -> None:
        """Take a call under way; it may be `done` at once."""
        now = time.monotonic()
        if self._balancer.idle:
            for link in self._links:  # nobody has looked for a while: a connection may be no more
                link.poll_monitor()
        self._balancer.begin(call, now)
        if call.done:
            return
        placement = self._balancer.place(call, now)
        while placement is not None:  # a session may refuse it at once
            index, attempt = placement
            self._links[index].start(attempt)
            if not attempt.done:
                self._balancer.started(index, attempt, now)
                return
            if self._balancer.finished(index, attempt, now) is not None:
                return
            placement = self._balancer.place(call, now)

    def cancel(self, call: Call[Any]) -> bool:
        """Drop a call, and tell the daemons. False: it was not under way."""
        for index, attempt in self._balancer.attempts_of(call):
            self._links[index].cancel(attempt)
        return self._balancer.forget(call)

    def has_input(self) -> bool:
        """Whether `receive` has something, see `Link.has_input`."""
        waiting = [link.has_input() for link in self._links]  # of each, since the look re-arms it
        return bool(self._finished) or any(waiting)

    def receive(self) -> Call[Any] | None:
        """Take one message of each daemon, if any waits. Returns a finished call, if there is one."""
        if not self._finished:
            now = time.monotonic()
            for index, link in enumerate(self._links):
                attempt = link.receive() if link.has_input() else None
                if attempt is not None:
                    self._finished += self._take(index, [attempt], now)
            self._finished += self._send_due(now)
        return self._finished.popleft() if self._finished else None

    def drain(self, most: int, settle: Callable[[Call[Any]], None]) -> bool:
        """Take the messages that wait, see `Link.drain`."""
        for _ in range(most):
            if not self.has_input():
                return False
            call = self.receive()
            if call is not None:
                settle(call)
        return True

    def poll_source(self, source: Socket) -> list[Call[Any]]:
        """Take what waits at one of the sources. Returns finished calls."""
        now = time.monotonic()
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            if source is link.dealer:
                attempt = link.receive()
                if attempt is not None:
                    finished += self._take(index, [attempt], now)
            elif source is link.monitor:
                finished += self._take(index, link.poll_monitor(), now)
        return finished + self._send_due(now)

    def poll_monitor(self) -> list[Call[Any]]:
        """Read the events of all monitors, see `Link.poll_monitor`. Returns finished calls."""
        now = time.monotonic()
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            finished += self._take(index, link.poll_monitor(), now)
        return finished + self._send_due(now)

    def on_timer(self, now: float) -> list[Call[Any]]:
        """Do whatever the time has come for, see `Link.on_timer`. Returns finished calls."""
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            finished += self._take(index, link.on_timer(now), now)
        finished += self._balancer.expire(now)
        self._connect(now)
        return finished + self._send_due(now)

    def reset(self) -> list[Call[Any]]:
        """Give up all connections, see `Link.reset`. Returns finished calls; the others go out on new connections."""
        now = time.monotonic()
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            finished += self._take(index, link.reset(), now)
        return finished

    def close(self) -> None:
        """Close the sockets at once. Idempotent."""
        for link in self._links:
            link.close()

    def abandon(self) -> None:
        """Forget the sockets, in a forked child."""
        for link in self._links:
            link.abandon()

    def _connect(self, now: float) -> None:
        for index in self._balancer.reconnects(now):
            self._links[index].connect(now)

    def _take(self, index: int, attempts: Iterable[Call[Any]], now: float) -> list[Call[Any]]:
        """Take finished attempts of one link, and withdraw what is not needed any more. Returns finished calls."""
        finished = []
        for attempt in attempts:
            call = self._balancer.finished(index, attempt, now)
            if call is not None:
                for other, copy in self._balancer.withdrawn(attempt):
                    self._links[other].cancel(copy)
                finished.append(call)
        return finished

    def _send_due(self, now: float) -> list[Call[Any]]:
        """Start the attempts that are to be started now. Returns calls that this has finished."""
        finished: list[Call[Any]] = []
        while placement := self._balancer.due(now):
            index, attempt = placement
            self._links[index].start(attempt)
            if attempt.done:
                finished += self._take(index, [attempt], now)
            else:
                self._balancer.started(index, attempt, now)
        for link in self._links:
            link.send_probe()
        return finished


def sharing_of(wanted: bool, limits: Limits) -> Callable[[str], SharedTensors | None]:
    """Makes what shares memory with the daemon at an address; nothing, unless that is wanted.

    Raises, when it is called:
        InvalidArgument: this system has no such memory, or the daemon may be on another host.
    """

    def share(address: str) -> SharedTensors | None:
        if not wanted:
            return None
        if not hasattr(os, "memfd_create"):
            raise InvalidArgument(f"shared_memory: not available on {platform.system()}, only on Linux")
        if not address.startswith("ipc://"):
            raise InvalidArgument(f"shared_memory: {address} is no address of this host alone, ipc://PATH is one")
        from tnxctl.sharing import Sharing  # numpy takes long to import

        return Sharing(address, limits.header_bytes)

    return share


def link_of(
    session: Session | Balancer,
    watch: Callable[[Socket, bool], None] | None = None,
    unwatch: Callable[[Socket], None] | None = None,
) -> Link | Links:
    """The sockets of a client, of one daemon or of several."""
    if isinstance(session, Balancer):
        return Links(session, watch, unwatch)
    return Link(session, watch, unwatch)
