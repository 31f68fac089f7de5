"""Service under systemd: notifications by sd_notify, and the limit of open files."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque

_MOST_UNSENT = 16


class Notifier:
    """Client of sd_notify: one datagram per state, to the socket that systemd names in the environment.

    Protocol: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._unsent: deque[bytes] = deque(maxlen=_MOST_UNSENT)
        watchdog_pid = os.environ.get("WATCHDOG_PID", "")
        mine = not watchdog_pid or watchdog_pid == str(os.getpid())
        usec = os.environ.get("WATCHDOG_USEC", "") if mine else ""
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() else 0.0
        """Seconds within which systemd expects a sign of life; 0 if it expects none."""

    @property
    def supervised(self) -> bool:
        """Whether systemd started the daemon, and may start it again."""
        return bool(self._address)

    def reloading(self) -> None:
        """Notify that a reload has begun; READY=1 ends it."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def send(self, *states: str) -> None:
        """Send states such as "READY=1". A daemon without systemd, or whose systemd does not listen, goes on.

        It never blocks: states that find the socket full are sent with the next call, in order.
        """
        self._unsent.append("\n".join(states).encode())
        self.retry()

    def alive(self) -> None:
        """Send a sign of life (WATCHDOG=1). One that finds the socket full is not worth sending later."""
        if self.retry():
            self.send("WATCHDOG=1")
            self._unsent.clear()

    def retry(self) -> bool:
        """Send the states that found the socket full. Returns whether none is left."""
        if not self._address:
            self._unsent.clear()
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        while self._unsent:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                try:
                    sender.sendto(self._unsent[0], address)
                except BlockingIOError:
                    return False
            self._unsent.popleft()
        return True


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard one: libzmq ends the process when an ipc listener runs out."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
