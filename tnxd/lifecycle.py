"""The process around the server: signals, and what systemd is told."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

_NOTIFY_TIMEOUT_S = 1.0
_SECOND_SIGNAL_S = 2.0
_LAST_WORDS_S = 1.0


class Notifier:
    """Speaks sd_notify: one datagram per state, to the socket that systemd names in the environment.

    Protocol: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
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
        """Say that a reload has begun; READY=1 says that it is over."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def send(self, *states: str) -> None:
        """Send states such as "READY=1". A daemon without systemd, or whose systemd does not listen, goes on."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_NOTIFY_TIMEOUT_S)  # a full queue must not lose READY, nor hold the loop for long
            sender.sendto("\n".join(states).encode(), address)


@contextlib.contextmanager
def handled_signals(on_stop: Callable[[], None], on_reload: Callable[[], None], patience_s: float) -> Iterator[None]:
    """Call `on_stop` for each SIGTERM and SIGINT and `on_reload` for SIGHUP, on a thread of its own.

    The old handlers are back at the end.

    A loop that hangs in a model's code does not stop: the process ends with 1 when `patience_s` seconds have passed
    since the first signal to stop, or two since the second. Python's own handlers run on the main thread alone, which
    is the one that may hang; the descriptor that signals are written to is read whatever that does.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    previous_descriptor = signal.set_wakeup_fd(writer.fileno())
    threading.Thread(target=_watch, args=(reader, on_stop, on_reload, patience_s), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()  # which ends the thread


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Without a handler of Python's, a signal would do what it does by default."""


def _watch(
    reader: socket.socket, on_stop: Callable[[], None], on_reload: Callable[[], None], patience_s: float
) -> None:
    signals, ends = 0, float("inf")
    with reader:
        while True:
            # What is left, not all of it again: a signal must not postpone the end.
            reader.settimeout(max(ends - time.monotonic(), 0.001) if signals else None)
            try:
                received = reader.recv(1)
            except TimeoutError:
                _end()
            if not received:
                return
            if received[0] == signal.SIGHUP:
                on_reload()
            elif received[0] in (signal.SIGTERM, signal.SIGINT):
                signals += 1
                on_stop()
                if signals <= 2:
                    ends = min(ends, time.monotonic() + (patience_s if signals == 1 else _SECOND_SIGNAL_S))


def _end() -> NoReturn:
    """The process did not stop in time: say so, and end it."""
    sentence = "the daemon did not stop in time: it ends with 1, and what it had taken in is lost"
    # On a thread of its own: a loop that hangs in writing to the log holds the log's lock.
    thread = threading.Thread(target=log.error, args=(sentence,), daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_S)
    os._exit(1)


def raise_file_limit() -> None:
    """Use all the file descriptors that the system allows: libzmq ends the process when an ipc listener runs out."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
