"""Signals and what they do to the daemon, from its first line on. Imports little: what comes before is not protected.

| signal | what it does |
|---|---|
| SIGTERM, SIGINT | drain and end; while nothing has been taken in, end at once |
| SIGHUP | look at the model repository again, once it has been loaded |
| SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT, real-time signals | a line in the log |
| SIGPIPE, SIGXFSZ | nothing: Python ignores them, and the call that caused them fails |
| SIGQUIT, SIGABRT and faults | end it with a core dump, which is what they are for: systemd's watchdog sends SIGABRT |
| SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU | stop it until SIGCONT, as any process |
| SIGCHLD, SIGURG, SIGWINCH | nothing, as in any process |
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# They would end a process that does not say otherwise, and mean nothing here.
_MEANINGLESS = [
    getattr(signal, name)
    for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")
    if hasattr(signal, name)
]
_MEANINGLESS += range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else []

_LAST_WORDS_S = 1.0
_REACTION_S = 2.0  # within which a loop that turns has seen a second signal


def prepare() -> None:
    """Prepare for signals before anything that takes time: from here on none ends the process but those that are to.

    SIGHUP may be passed over until `handled_signals`: the repository is looked at after that.
    """
    for number in (signal.SIGHUP, *_MEANINGLESS):
        # A handler of Python's, and not SIG_IGN, which the processes that the daemon starts would inherit.
        signal.signal(number, _ignore)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has been taken in: no reason for a traceback
    for descriptor in range(3):  # one that is closed would be the next socket's, and get what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def handled_signals(
    on_stop: Callable[[], None], on_reload: Callable[[], None], patience_s: float, linger_s: float
) -> Iterator[None]:
    """Call `on_stop` for each SIGTERM and SIGINT and `on_reload` for SIGHUP, on a thread of its own.

    The old handlers are back at the end.

    A loop that hangs in a model's code does not stop: the process ends with 1 when `patience_s` seconds have passed
    since the first signal to stop, or two and `linger_s` since the second. Python's own handlers run on the main thread
    alone, which is the one that may hang; the descriptor that signals are written to is read whatever that does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    previous_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    limits = (patience_s, _REACTION_S + linger_s)
    threading.Thread(target=_watch, args=(reader, on_stop, on_reload, limits), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Without a handler of Python's, a signal would do what it does by default."""


def _watch(
    reader: int, on_stop: Callable[[], None], on_reload: Callable[[], None], limits: tuple[float, float]
) -> None:
    import logging
    import select

    log = logging.getLogger(__name__)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    stops, ends = 0, float("inf")
    while True:
        # What is left, not all of it again: a signal must not postpone the end.
        if not poll.poll(max(ends - time.monotonic(), 0.001) * 1e3 if stops else None):
            _end()
        received = os.read(reader, 4096)
        if not received:
            os.close(reader)
            return
        for number in received:
            if number == signal.SIGHUP:
                on_reload()
            elif number in (signal.SIGTERM, signal.SIGINT):
                on_stop()
                if stops < 2:
                    ends = min(ends, time.monotonic() + limits[stops])
                stops += 1
            elif number in _MEANINGLESS:
                log.warning("%s is ignored: it means nothing here", _name(number))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"


def _end() -> NoReturn:
    """The process did not stop in time: say so, and end it."""
    die("the daemon did not stop in time: it ends with 1, and what it had taken in is lost")


def die(sentence: str) -> NoReturn:
    """End the process with 1, whatever its other threads do; the log gets a second for that sentence."""
    # On a thread of its own, as whoever hangs may hold a lock of the log's.
    thread = threading.Thread(target=_say, args=(sentence,), daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_S)
    os._exit(1)


def _say(sentence: str) -> None:
    import logging

    from tnxd import logs

    logging.getLogger(__name__).error("%s", sentence)
    logs.flush(_LAST_WORDS_S)
