"""Drivers of an asyncio client: they send and receive in callbacks of the event loop, or in a thread beside it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from tnxctl import process
from tnxctl.balancer import Balancer
from tnxctl.busypoll import BusyPoll
from tnxctl.call import Call
from tnxctl.channels.channel import POLLIN, POLLOUT, Watcher
from tnxctl.driver import ThreadDriver
from tnxctl.link import Link
from tnxctl.links import link_of
from tnxctl.session import Session

T = TypeVar("T")

REPLIES_PER_TURN = 64
"""Most replies of a daemon that are taken in one turn of the loop: then other tasks get it."""

_MAX_WAIT_S = 86_400.0
_GRACE_S = 0.5  # for a loop in another thread, when the interpreter ends


def driver_of(
    session: Session | Balancer, loop: asyncio.AbstractEventLoop, busy_poll_s: float
) -> LoopDriver | OtherThreadDriver:
    """The driver for a loop: its own callbacks, unless it cannot watch file descriptors."""
    if _can_watch(loop):
        return LoopDriver(session, loop, busy_poll_s)
    return OtherThreadDriver(session, loop)


class LoopDriver:
    """Driver of calls in callbacks of the event loop.

    libzmq's file descriptors are edge-triggered: they tell of a change once, and any use of the socket may swallow
    it. So each use of such a socket is followed by a look at its events, also if no reply is due: one that nobody waits
    for any more, once its event is gone, keeps those that follow from telling of themselves.

    A call that finds no other under way is sent at once. What is sent beside others in one turn of the loop goes out
    together at its end: a system call for each would cost more than all else that a client does for a call.
    """

    def __init__(self, session: Session | Balancer, loop: asyncio.AbstractEventLoop, busy_poll_s: float) -> None:
        self.loop = loop
        self._session = session
        self._busy_poll = BusyPoll(loop, busy_poll_s) if busy_poll_s else None
        self._link = link_of(session, Watcher(self._watch, self._unwatch))
        self._is_single = isinstance(self._link, Link)  # of several daemons, a reply may be the cue for another message
        self._flush_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
        self._turn_is_due = False
        self._ended = threading.Event()
        process.register(self)

    async def run(self, call: Call[T]) -> T:
        """The result of a call. Raises its error."""
        future: asyncio.Future[T] = self.loop.create_future()
        call.waiter = future
        link = self._link
        is_alone = self._session.idle
        if not is_alone:
            self._flush_soon()
        link.start(call)
        if call.done:
            _settle(call)
        elif link.is_edge_triggered and (not is_alone or link.has_input()):
            self._check_again()  # alone, a look is cheaper than another turn of the loop
        self._set_timer()
        busy_poll = self._busy_poll if is_alone else None
        if busy_poll is not None:
            busy_poll.sent()
        began = time.monotonic()
        try:
            return await future
        except asyncio.CancelledError:
            link.cancel(call)
            if link.is_edge_triggered:
                self._check_again()
            raise
        finally:
            if busy_poll is not None:
                busy_poll.answered(time.monotonic() - began)
            del future  # else it, its exception and this frame would keep each other, and the inputs, alive

    def close(self) -> None:
        """Close the connection. Calls under way fail with Cancelled. Idempotent."""
        _settle_all(self._session.close())
        self._close_link()

    def forget(self) -> None:
        """Close after the client has gone: the loop may be over, or run in another thread than this one.

        Whoever may have waited has gone, too, as he had the client.
        """
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self.loop.call_soon_threadsafe(self._end)
        else:
            self._end()

    def at_exit(self) -> None:
        """Give everything up, since the interpreter ends: nobody waits for it any more."""
        self.forget()
        self._ended.wait(_GRACE_S)  # another thread may run the loop, and a callback may keep it

    def after_fork(self) -> None:
        """Leave all to the parent, in a forked child: the loop's poller is the parent's as well."""
        self._link.abandon()

    def _end(self) -> None:
        """Close without a word to those who wait."""
        self._session.close()
        self._close_link()
        self._ended.set()

    def _close_link(self) -> None:
        self._link.close()
        self._cancel_timer()
        if self._busy_poll is not None:
            self._busy_poll.end()

    def _flush_soon(self) -> None:
        """Have what is sent in this turn of the loop go out together, in the next."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._link.hold()
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        self._link.flush()

    def _check_again(self) -> None:
        """Check for messages once more after sending one, which may have cleared the event of one that came.

        One check will do for all that are sent in one turn of the loop.
        """
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self._turn_again)

    def _turn_again(self) -> None:
        self._turn_is_due = False
        self._receive()

    def _turn(self) -> None:
        """Handle all events that wait, without blocking."""
        _settle_all(self._link.poll_events())
        self._receive()

    def _receive(self) -> None:
        """Take the replies that wait, without blocking; or have them wait for the turn that is due anyway."""
        if not self._turn_is_due and self._link.drain(REPLIES_PER_TURN, _settle):
            self._check_again()
        self._set_timer()

    def _on_time(self) -> None:
        self._timer, self._timer_due = None, math.inf
        _settle_all(self._link.on_timer(time.monotonic(), REPLIES_PER_TURN))
        self._turn()  # sockets opened just now may hold events already

    def _set_timer(self) -> None:
        due = self._session.next_timer
        if due < self._timer_due:  # a timer that goes off early does no harm
            self._cancel_timer()
            self._timer_due = due
            self._timer = self.loop.call_later(min(max(0.0, due - time.monotonic()), _MAX_WAIT_S), self._on_time)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_due = None, math.inf

    def _watch(self, source: int, mask: int, has_no_messages: bool) -> None:
        if mask & POLLIN:
            self.loop.add_reader(source, self._receive if self._is_single and not has_no_messages else self._turn)
        else:
            self.loop.remove_reader(source)
        if mask & POLLOUT:
            self.loop.add_writer(source, self._go_on, source)
        else:
            self.loop.remove_writer(source)

    def _go_on(self, source: int) -> None:
        """Go on where there is room to send, or a connection stands."""
        self._link.on_room(source)
        self._turn()

    def _unwatch(self, closing: int) -> None:
        if not self.loop.is_closed():
            self.loop.remove_reader(closing)
            self.loop.remove_writer(closing)


class OtherThreadDriver:
    """A driver for loops that cannot watch a file descriptor, as the default one of Windows: an I/O thread does it."""

    def __init__(self, session: Session | Balancer, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._driver = ThreadDriver(session)

    async def run(self, call: Call[T]) -> T:
        """The result of a call. Raises its error."""
        return await asyncio.wrap_future(self._driver.submit(call), loop=self.loop)

    def close(self) -> None:
        """Close the connection. Calls under way fail with Cancelled. Idempotent."""
        self._driver.close()

    def forget(self) -> None:
        """Nothing is left to do: the thread driver closes itself."""


def _can_watch(loop: asyncio.AbstractEventLoop) -> bool:
    reader, writer = socket.socketpair()
    try:
        loop.add_reader(reader, lambda: None)
        loop.remove_reader(reader)
    except NotImplementedError:
        return False
    finally:
        reader.close()
        writer.close()
    return True


def _settle(call: Call[Any]) -> None:
    """Give a finished call to its future, unless the task that waited has been cancelled."""
    future, call.waiter = call.waiter, None
    if future.done():
        return
    error = call.error
    if error is None:
        future.set_result(call.take())
    else:
        future.set_exception(error)


def _settle_all(calls: Iterable[Call[Any]]) -> None:
    for call in calls:
        _settle(call)
