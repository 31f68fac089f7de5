"""The driver of a client for threads: sends, waits and receives for any number of them, over one `Link`, or
one `Links`.

The lock guards the link. A call that finds no other under way takes the lock, sends, waits and reads in the caller's
own thread, without a hand-over to any other. As soon as a second call comes, all calls are the I/O thread's until none
is left: their actions go into the outbox, and their callers wait for the outcome.

Ctrl-C raises KeyboardInterrupt in the main thread, at the beginning of any function, at the return of any call, at any
turn of a loop: also in between a lock that has been taken and the next line, and from Python 3.14 on even at the head
of a `with` block (python/cpython#148874). So that an interrupted call harms no other:

- A caller's thread touches the link only while no call but its own is under way. Interrupted, it gives up both, the
  call and the connection, in any state.
- It takes the lock inside the `try` whose `finally` begins with the release. An RLock knows its owner and refuses
  others, so nothing else has to remember whether it was taken. A context manager in Python would not do: its
  `__exit__` can be interrupted before its first line.
- A post to the outbox wakes the I/O thread. A release of the lock owes nobody anything.
- Threads wait for each other at plain locks. A `Condition`, and with it `Event` and `Future`, takes its lock in a
  function in Python, which can be interrupted before it returns.

These rules are kept line by line, and whether they are shows only where all the lines that take the lock stand
together: so this is one module.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

from zmq import zmq_poll

from tnxctl import process
from tnxctl.balancer import Balancer
from tnxctl.call import Call
from tnxctl.channels.channel import POLLIN
from tnxctl.durations import spell
from tnxctl.links import link_of
from tnxctl.protocol.errors import DeadlineExceeded
from tnxctl.session import Session
from tnxctl.wakeups import LONGEST_WAIT_S, Signal, Wakeup

T = TypeVar("T")

_MAX_WAIT_MS = 1e3 * LONGEST_WAIT_S
_GRACE_S = 0.5  # the thread that reads has the better error message: let it speak first

_log = logging.getLogger("tnxctl")


class ThreadDriver:
    """Driver of the calls of one client. `run`, `submit` and `close` may be used from any thread at once."""

    _is_open = False  # until __init__ is through: __del__ runs in any case

    def __init__(self, session: Session | Balancer) -> None:
        self._session = session
        self._link = link_of(session)  # each step polls what the link has open
        self._wakeup = Wakeup()
        self._lock = threading.RLock()
        self._outbox: deque[tuple[Callable[[Call[Any]], None], Call[Any]]] = deque()
        self._io_thread: threading.Thread | None = None
        self._io_work = Signal()
        self._io_ident = 0  # of the I/O thread while it drives
        self._polling = False
        self._closing = False
        self._closed = False
        self._used = False
        self._generation = process.forks
        self._is_open = True
        process.register(self)

    def run(self, call: Call[T]) -> T:
        """See a call through: in this thread if no other call is under way, else through the I/O thread.

        Raises:
            FailedPrecondition: the client has come here by a fork.
        """
        self._used = True
        if self._generation != process.forks:
            raise process.fork_error(self._session.endpoint)
        if self._io_ident == get_ident():  # a callback of a future
            self._start(call)
            while not call.done:
                self._turn()
            return call.take()
        self._drive_alone(call)
        waiter = call.waiter  # this first: the I/O thread may settle the call meanwhile
        if not call.done:
            self._await(call, waiter)
        if process.exiting and threading.current_thread() is not threading.main_thread():
            raise SystemExit  # ends a thread without a word: a traceback would tell nobody anything any more
        return call.take()

    def submit(self, call: Call[T]) -> Future[T]:
        """Put a call under way. Cancelling the future cancels it.

        Raises:
            FailedPrecondition: the client has come here by a fork.
        """
        self._used = True
        if self._generation != process.forks:
            raise process.fork_error(self._session.endpoint)
        future: Future[T] = Future()
        call.waiter = future
        future.add_done_callback(partial(self._on_done, call))
        if not self._drive_alone(call):
            self._post(self._start, call)
        elif not call.done:
            self._call_io_thread()
        return future

    def close(self) -> None:
        """Fail every call and close the sockets. Idempotent. In a forked child, the parent's are left alone."""
        if self._generation != process.forks:
            return
        self._shut_down()
        thread = self._io_thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_GRACE_S)

    def __del__(self) -> None:
        if self._is_open and self._generation == process.forks:
            self._shut_down()  # nobody is left who could hold the lock; the I/O thread ends by itself

    def _shut_down(self) -> None:
        self._closing = True
        self._wakeup.set()  # who drives leaves
        try:
            self._lock.acquire()
            self._end()
        finally:
            try:  # noqa: SIM105 - as in `_drive_alone`
                self._lock.release()
            except RuntimeError:
                pass
        self._flush()
        self._io_work.set()

    def at_exit(self) -> None:
        """Give everything up, since the interpreter ends: nobody waits for it any more."""
        if self._generation != process.forks:
            return
        self._closing = True
        self._wakeup.set()
        if self._lock.acquire(timeout=_GRACE_S):  # else a callback of a future keeps it, perhaps for good
            try:
                self._end()
            finally:
                self._lock.release()
        self._io_work.set()
        thread = self._io_thread
        if thread is not None:
            thread.join(_GRACE_S)

    def after_fork(self) -> None:
        """Decide, in a forked child, whose driver this is: the child's if nobody has used it, else the parent's.

        The child has a copy of the parent's calls. Nothing of them goes on here, not even where the fork came in the
        middle of one, from a callback of a future.
        """
        self._lock = threading.RLock()  # who held the old one may not be here
        self._wakeup.close()
        if not (self._used or self._closing):
            self._generation = process.forks
            self._wakeup = Wakeup()  # one of its own: bytes in the old one would reach the parent
            return
        self._link.abandon()
        left = [*self._session.close(), *(call for _, call in self._outbox)]
        self._outbox.clear()
        self._closing = self._closed = True
        for call in left:
            if isinstance(call.waiter, Future):
                process.fail_copied(call.waiter, process.fork_error(self._session.endpoint))

    # --- a call alone ----------------------------------------------------------------------------------------

    def _drive_alone(self, call: Call[Any]) -> bool:
        """Start this call if no other is under way, and see it through until it is done or somebody waits for it.

        That is so from the beginning if it has a future, and else as soon as another call comes: then it is for the
        I/O thread to go on with it. Returns whether it was started.
        """
        started = False
        try:
            if self._lock.acquire(blocking=False) and self._session.idle and not self._outbox:
                started = True
                self._start(call)
                while not call.done and call.waiter is None:
                    if self._outbox:
                        call.waiter = Signal()
                    else:
                        self._step()
        except BaseException:
            if started:
                self._give_up(call)
            raise
        finally:
            try:  # noqa: SIM105 - suppress() could be interrupted before the release
                self._lock.release()
            except RuntimeError:  # not taken
                pass
        return started

    def _give_up(self, call: Call[Any]) -> None:
        """Give up a call after an exception from anywhere in its driving, a KeyboardInterrupt for one."""
        if self._polling:
            self._polling = False
            self._link.cancel(call)
        else:  # a message may have been left half sent or half read
            self._session.forget(call)
            self._link.reset()  # fails none: no other call is under way

    # --- calls in the hands of the I/O thread ----------------------------------------------------------------

    def _await(self, call: Call[Any], waiter: Signal | None) -> None:
        """Return when a call is done. Without a waiter it is not under way yet."""
        wait_s = max(0.0, call.expires - time.monotonic()) + (0.0 if call.firm_deadline else _GRACE_S)
        try:
            if waiter is None:
                waiter = call.waiter = Signal()
                self._post(self._start, call)
            if waiter.wait(min(wait_s, threading.TIMEOUT_MAX)):
                return
        except BaseException:
            self._post(self._cancel, call)
            raise
        self._post(self._cancel, call)
        if call.firm_deadline:
            raise self._session.timeout_error(call)
        raise DeadlineExceeded(
            f"{self._session.endpoint}: no answer to {call.verb} was read within {spell(wait_s)}, "
            f"because a callback of a future keeps the reading thread busy"
        )

    def _on_done(self, call: Call[Any], future: Future[Any]) -> None:
        if future.cancelled():
            self._post(self._cancel, call)

    def _post(self, action: Callable[[Call[Any]], None], call: Call[Any]) -> None:
        """Have the I/O thread do `action(call)`."""
        self._outbox.append((action, call))
        driving = self._io_ident
        if self._closed:
            self._flush()
        elif driving != get_ident():
            self._wakeup.set()
            if not driving:
                self._call_io_thread()

    def _call_io_thread(self) -> None:
        if self._io_thread is None:  # two callers may start one each; the second finds nothing to do
            thread = threading.Thread(
                target=_serve, args=(weakref.ref(self), self._io_work), name="tnxctl-io", daemon=True
            )
            thread.start()
            self._io_thread = thread
        self._io_work.set()

    def drive_until_idle(self) -> None:
        """Drive all calls in the I/O thread, until none is left."""
        with self._lock:  # no signal interrupts this thread
            try:
                while self._outbox or not self._session.idle:
                    self._io_ident = get_ident()
                    while self._outbox or not self._session.idle:
                        self._turn()
                    self._io_ident = 0  # who posts from now on calls; who posted just before finds one more look
                if self._closing:
                    self._end()
                    self._flush()
            except BaseException:
                self._polling = False
                _settle_all(self._link.reset())
                raise
            finally:
                self._io_ident = 0

    def _turn(self) -> None:
        if self._outbox:
            self._flush()
        else:
            self._step()

    def _flush(self) -> None:
        """Run the posted actions: under the lock, or in any thread once the session is closed and all fail."""
        while True:
            try:
                action, call = self._outbox.popleft()
            except IndexError:  # empty
                return
            action(call)

    def _cancel(self, call: Call[Any]) -> None:
        if self._link.cancel(call) and isinstance(call.waiter, Future):
            call.waiter.set_running_or_notify_cancel()  # concurrent.futures.wait returns only now

    # --- either way: these run under the lock ----------------------------------------------------------------

    def _start(self, call: Call[Any]) -> None:
        self._link.start(call)
        if call.done:
            _settle(call)

    def _step(self) -> None:
        """Turn the loop once: wait for an event or a timer, and handle it."""
        if self._closing:
            self._end()
            return
        now = time.monotonic()
        wait_ms = (self._session.next_timer - now) * 1e3
        if wait_ms <= 0:
            _settle_all(self._link.on_timer(now))
            return
        sources: list[tuple[Any, int]] = [(self._wakeup.fd, POLLIN), *self._link.sources]
        self._polling = True
        events = zmq_poll(sources, math.ceil(min(wait_ms, _MAX_WAIT_MS)))
        self._polling = False
        for source, mask in events:
            if source == self._wakeup.fd:
                self._wakeup.clear()
            else:
                _settle_all(self._link.handle(source, mask))

    def _end(self) -> None:
        """Fail the calls under way and every later one, and close the sockets. Idempotent."""
        left = self._session.close()
        if not process.exiting:  # else callbacks would run in an interpreter that is half gone
            _settle_all(left)
        self._closed = True
        self._link.close()
        self._wakeup.close()
        self._is_open = False


def _serve(driver_ref: weakref.ref[ThreadDriver], work: Signal) -> None:
    """The I/O thread. It holds no driver while there is nothing to do, so a forgotten one can go."""
    while True:
        work.wait()
        driver = driver_ref()
        if driver is not None:
            try:
                driver.drive_until_idle()
            except BaseException:  # SystemExit in a callback, say: the calls of others go on
                _log.exception("the I/O thread of %s met an error", driver)
                work.set()
        if driver is None or driver._closed:
            work.set()  # for another I/O thread, should there be one
            return
        del driver


def _settle(call: Call[Any]) -> None:
    """Hand a finished call to its waiter. Without one, the thread that drives is its caller."""
    waiter, call.waiter = call.waiter, None
    if isinstance(waiter, Signal):
        waiter.set()
    elif waiter is not None and waiter.set_running_or_notify_cancel():
        if call.error is None:
            waiter.set_result(call.take())
        else:
            waiter.set_exception(call.error)


def _settle_all(calls: Sequence[Call[Any]]) -> None:
    """Settle each of them, whatever a callback of another one's future raises."""
    with ExitStack() as settling:
        for call in reversed(calls):
            settling.callback(_settle, call)
