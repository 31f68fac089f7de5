"""Ways for one thread of a driver to wake another: one that waits for a call, or one that polls sockets."""

from __future__ import annotations

import socket
import threading
import time

LONGEST_WAIT_S = 1.0
"""Seconds after which a thread that waits looks at Python's signals. One that came in the moment between Python's last
look and the system call does not end that call: Ctrl-C would be seen when the wait is over, maybe a minute later."""


class Signal:
    """A signal from one thread to another that waits for it, once or again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let the waiting thread through, or the next that comes."""
        try:  # noqa: SIM105 - three times as fast as suppress()
            self._lock.release()
        except RuntimeError:  # set already
            pass

    def wait(self, timeout: float = -1) -> bool:
        """Whether it was set within `timeout` seconds; without one, wait until it is. Clears it."""
        if timeout < 0:
            return self._lock.acquire()
        until = time.monotonic() + timeout
        while not self._lock.acquire(timeout=min(timeout, LONGEST_WAIT_S)):
            timeout = until - time.monotonic()
            if timeout <= 0:
                return False
        return True


class Wakeup:
    """Wakeup of a thread that polls sockets, by another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_set = False
        self.fd = self._reader.fileno()

    def set(self) -> None:
        if not self._is_set:
            try:
                self._is_set = True  # nothing may come between this line and the next: the byte would never be sent
                self._writer.send(b"\0")
            except OSError:  # full: awake already; closed: nobody polls
                pass

    def clear(self) -> None:
        """Clear the wakeup, before the look at the announced work: a later announcement sets it again."""
        try:
            self._reader.recv(64)
        except OSError:  # empty; closed by a callback of a future
            pass
        finally:
            self._is_set = False

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
