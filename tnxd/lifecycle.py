"""The process around the server: signals, and what systemd is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

_NOTIFY_TIMEOUT_S = 1.0


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

    def send(self, *states: str) -> None:
        """Send states such as "READY=1". A daemon without systemd, or whose systemd does not listen, goes on."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_NOTIFY_TIMEOUT_S)  # a full queue must not lose READY, nor hold the loop for long
            sender.sendto("\n".join(states).encode(), address)


@contextlib.contextmanager
def stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """Call `on_stop` for each SIGTERM and SIGINT; put the old handlers back at the end."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        on_stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_file_limit() -> None:
    """Use all the file descriptors that the system allows: libzmq ends the process when an ipc listener runs out."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
