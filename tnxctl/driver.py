"""Sees calls through for any number of threads, over one `Link`.

The link belongs to whoever holds the lock. A lone caller takes it, sends, waits and reads in its own thread, without
a hand-over to any other. A thread that finds the lock taken puts its call into the outbox and wakes the holder, which
sends it along with its own. When a holder leaves and calls are still under way, an I/O thread takes its
place until none are.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import zmq

from tnxctl.errors import DeadlineExceeded, TensorNextError
from tnxctl.link import Link
from tnxctl.session import Call, Session

T = TypeVar("T")

_MAX_WAIT_MS = 3_600_000.0  # zmq_poll takes 32 bits
_GRACE_S = 0.5  # the thread that reads has the better error message: let it speak first

_log = logging.getLogger("tnxctl")


class ThreadDriver:
    """Moves the calls of a session. `run`, `submit` and `close` may be used from any thread at once."""

    _closed = True  # until __init__ is through: __del__ runs in any case

    def __init__(self, session: Session) -> None:
        self._session = session
        self._poller = poller = zmq.Poller()
        self._link = Link(session, watch=lambda opened: poller.register(opened, zmq.POLLIN), unwatch=poller.unregister)
        self._wakeup = _Wakeup()
        poller.register(self._wakeup.fd, zmq.POLLIN)
        # Reentrant: a callback of a future may use the client in the very thread that drives.
        self._lock = threading.RLock()
        self._outbox: deque[tuple[Callable[[Call[Any]], None], Call[Any]]] = deque()
        self._io_thread: threading.Thread | None = None
        self._io_thread_lock = threading.Lock()
        self._io_work = threading.Event()
        self._polling = False
        self._closed = False

    def run(self, call: Call[T]) -> T:
        """See a call through: in this thread if no other drives, else through the one that does."""
        if not self._lock.acquire(blocking=False):
            return self._await(call)
        try:
            self._start(call)
            while not call.done:
                self._step()
        except BaseException:
            self._give_up(call)
            raise
        finally:
            self._release()
        return call.take()

    def submit(self, call: Call[T]) -> Future[T]:
        """Put a call under way. Cancelling the future withdraws it."""
        future: Future[T] = Future()
        call.waiter = future
        future.add_done_callback(partial(self._on_done, call))
        self._post(self._start, call)
        return future

    def close(self) -> None:
        """Fail every call and close the sockets. Idempotent."""
        self._shut_down()
        thread = self._io_thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_GRACE_S)

    def __del__(self) -> None:
        if not self._closed:
            self._shut_down()  # nobody is left who could hold the lock; the I/O thread ends by itself

    # --- waiting for another thread --------------------------------------------------------------------------

    def _await(self, call: Call[T]) -> T:
        future: Future[T] = Future()
        call.waiter = future
        self._post(self._start, call)
        patience = max(0.0, call.expires - time.monotonic()) + (0.0 if call.strict else _GRACE_S)
        try:
            return future.result(min(patience, threading.TIMEOUT_MAX))
        except TensorNextError:
            raise
        except BaseException as error:
            self._post(self._withdraw, call)
            if isinstance(error, TimeoutError):
                if call.strict:
                    raise self._session.timeout_error(call) from None
                raise DeadlineExceeded(  # the driving thread is stuck in a callback of some future
                    f"{self._session.endpoint}: no answer to {call.verb} was read within {call.patience:g} s, "
                    f"because a callback of a future keeps the reading thread busy"
                ) from None
            raise
        finally:
            del future  # else it, its exception and this frame would keep each other, and the inputs, alive

    def _on_done(self, call: Call[Any], future: Future[Any]) -> None:
        if future.cancelled():
            self._post(self._withdraw, call)

    # --- driving: these run under the lock -------------------------------------------------------------------

    def _start(self, call: Call[Any]) -> None:
        self._link.start(call)
        if call.done:
            _settle(call)

    def _give_up(self, call: Call[Any]) -> None:
        """After an exception from anywhere in the driving of a call, a KeyboardInterrupt for one."""
        if self._polling:
            self._polling = False
            self._link.withdraw(call)
        else:  # a message may have been left half sent or half read
            self._session.forget(call)
            self._link.reset()

    def _withdraw(self, call: Call[Any]) -> None:
        if self._link.withdraw(call):
            call.waiter.set_running_or_notify_cancel()  # concurrent.futures.wait returns only now

    def _flush(self) -> None:
        while self._outbox:
            action, call = self._outbox.popleft()
            action(call)

    def _step(self) -> None:
        """Wait until something happens or is due, and deal with it."""
        if self._closed:
            _settle_all(self._session.close())
        if self._closed or self._outbox:
            self._flush()
            return
        now = time.monotonic()
        wait_ms = (self._session.due - now) * 1e3
        if wait_ms <= 0:
            _settle_all(self._link.on_time(now))
            return
        self._polling = True
        events = self._poller.poll(math.ceil(min(wait_ms, _MAX_WAIT_MS)))
        self._polling = False
        for source, _ in events:
            if source is self._link.dealer:
                finished = self._link.receive()
                if finished is not None:
                    _settle(finished)
            elif source is self._link.monitor:
                _settle_all(self._link.on_monitor())
            elif source == self._wakeup.fd:
                self._wakeup.clear()

    def drive_until_idle(self) -> None:
        """The I/O thread's turn."""
        self._lock.acquire()
        try:
            while self._outbox or not self._session.idle:
                self._step()
        except BaseException:
            self._polling = False
            self._link.reset()
            raise
        finally:
            self._release()

    # --- who drives ------------------------------------------------------------------------------------------

    def _post(self, action: Callable[[Call[Any]], None], call: Call[Any]) -> None:
        """Have `action(call)` done under the lock: here if it is free, else by the thread that holds it.

        A holder looks into the outbox once more after it has let go of the lock, so what is put there before the
        attempt to take the lock is found by one of the two.
        """
        self._outbox.append((action, call))
        self._flush_if_free()

    def _flush_if_free(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._wakeup.set()
            return
        try:
            self._flush()
        finally:
            self._release()

    def _release(self) -> None:
        """Let go of the lock, and see to it that what is left is driven on."""
        self._lock.release()
        if self._closed:
            if self._outbox:
                self._flush_if_free()
        elif self._outbox or not self._session.idle:
            self._call_io_thread()

    def _call_io_thread(self) -> None:
        if self._io_thread is None:
            with self._io_thread_lock:
                if self._io_thread is None:
                    thread = threading.Thread(
                        target=_serve, args=(weakref.ref(self), self._io_work), name="tnxctl-io", daemon=True
                    )
                    thread.start()
                    self._io_thread = thread
        self._io_work.set()

    def _shut_down(self) -> None:
        self._closed = True
        self._wakeup.set()
        self._lock.acquire()
        try:
            _settle_all(self._session.close())
            self._link.close()
            self._wakeup.close()
        finally:
            self._release()
        self._io_work.set()


def _serve(driver_ref: weakref.ref[ThreadDriver], work: threading.Event) -> None:
    """The I/O thread. It holds no driver while there is nothing to do, so a forgotten one can go."""
    while True:
        work.wait()
        work.clear()
        driver = driver_ref()
        if driver is None:
            return
        try:
            driver.drive_until_idle()
        except BaseException:  # SystemExit in a callback, say: the calls of others go on
            _log.exception("the I/O thread of %s met an error", driver)
        if driver._closed:
            return
        del driver


def _settle(call: Call[Any]) -> None:
    """Give a finished call to the future that waits for it. Without one, the thread that drives is its caller."""
    future, call.waiter = call.waiter, None
    if future is None or not future.set_running_or_notify_cancel():
        return
    error = call.error
    if error is None:
        future.set_result(call.take())
    else:
        future.set_exception(error)


def _settle_all(calls: Iterable[Call[Any]]) -> None:
    for call in calls:
        _settle(call)


class _Wakeup:
    """Ends a poll from another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_set = False
        self.fd = self._reader.fileno()

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(OSError):  # full: awake already; closed: nobody polls
                self._writer.send(b"\0")

    def clear(self) -> None:
        """Call this before the look at whatever `set` announces: a later announcement sets it again."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(64)
        self._is_set = False

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
