"""Links: those under a `Balancer`, one per daemon, seen by a driver as one. Nothing here blocks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tnxctl.balancer import Balancer
from tnxctl.call import Call
from tnxctl.channels.channel import Watcher
from tnxctl.link import Link
from tnxctl.session import Session


class Links:
    """Links of a client of several daemons: starts attempts where its balancer places them.

    Args:
        balancer: decides; the links obey and report.
        watcher: as for a `Link`.
    """

    def __init__(self, balancer: Balancer, watcher: Watcher | None = None) -> None:
        self._balancer = balancer
        self._links = [Link(session, watcher) for session in balancer.sessions]

    @property
    def sources(self) -> list[tuple[Any, int]]:
        """Sources to poll, and what for, as `zmq_poll` takes them."""
        return [source for link in self._links for source in link.sources]

    def start(self, call: Call[Any]) -> None:
        """Take a call under way; it may be `done` at once."""
        now = time.monotonic()
        if self._balancer.idle:
            for link in self._links:  # nobody has looked for a while: a connection may be no more
                link.look()
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

    @property
    def is_edge_triggered(self) -> bool:
        """Whether any of the links is, see `Link.is_edge_triggered`."""
        return any(link.is_edge_triggered for link in self._links)

    def has_input(self) -> bool:
        """Whether a message waits, see `Link.has_input`."""
        waiting = [link.has_input() for link in self._links]  # of each, since the look re-arms it
        return any(waiting)

    def drain(self, most: int, settle: Callable[[Call[Any]], None]) -> bool:
        """Take the messages that wait, see `Link.drain`: up to `most` of each daemon."""
        now = time.monotonic()
        is_dry = True
        for index, link in enumerate(self._links):
            attempts: list[Call[Any]] = []
            is_dry &= not link.drain(most, attempts.append)
            for call in self._take(index, attempts, now):
                settle(call)
        for call in self._send_due(now):
            settle(call)
        return not is_dry or self.has_input()  # the messages that were sent may have swallowed what told of others

    def handle(self, source: Any, mask: int) -> list[Call[Any]]:
        """Do what a source is ready for, see `Link.handle`. Returns finished calls."""
        now = time.monotonic()
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            if any(source == each for each, _ in link.sources):
                finished += self._take(index, link.handle(source, mask), now)
                break
        return finished + self._send_due(now)

    def on_room(self, source: Any) -> None:
        """Go on where there is room to send, see `Link.on_room`."""
        for link in self._links:
            if any(source == each for each, _ in link.sources):
                link.on_room(source)

    def poll_events(self) -> list[Call[Any]]:
        """Take note of what happened to all channels, see `Link.poll_events`. Returns finished calls."""
        now = time.monotonic()
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            finished += self._take(index, link.poll_events(), now)
        return finished + self._send_due(now)

    def hold(self) -> None:
        """Have what is sent wait, see `Link.hold`."""
        for link in self._links:
            link.hold()

    def flush(self) -> None:
        """Send what waits, see `Link.flush`."""
        for link in self._links:
            link.flush()

    def on_timer(self, now: float, most: int = sys.maxsize) -> list[Call[Any]]:
        """Do whatever the time has come for, see `Link.on_timer`: `most` holds for each. Returns finished calls."""
        finished: list[Call[Any]] = []
        for index, link in enumerate(self._links):
            finished += self._take(index, link.on_timer(now, most), now)
        finished += self._balancer.expire(now)
        for index in self._balancer.reconnects(now):
            finished += self._take(index, self._links[index].connect(now), now)
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


def link_of(session: Session | Balancer, watcher: Watcher | None = None) -> Link | Links:
    """The link of a client of one daemon, or those of a client of several."""
    if isinstance(session, Balancer):
        return Links(session, watcher)
    return Link(session, watcher)
