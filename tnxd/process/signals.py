"""Signal handling of the daemon, from its first line on. Imports little: code that runs before is not protected.

| signal | what it does |
|---|---|
| SIGTERM, SIGINT | drain and end; while nothing has been taken in, end at once |
| SIGHUP | scan the model repository again, once it has been loaded |
| SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT, real-time signals | a line in the log |
| SIGPIPE, SIGXFSZ | nothing: Python ignores them, and the call that caused them fails |
| SIGQUIT, SIGABRT and faults | end it with a core dump, which is what they are for: systemd's watchdog sends SIGABRT |
| SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU | stop it until SIGCONT, as any process |
| SIGCHLD, SIGURG, SIGWINCH | nothing, as in any process |

A process that a model forks has none of this: signals do there what they do in any process, and it does not outlive the
daemon, whose sockets it holds copies of.
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

_PR_SET_PDEATHSIG = 1

_LAST_WORDS_S = 1.0
_REACTION_S = 2.0  # within which a loop that turns has seen a second signal


def prepare() -> None:
    """Install handlers before anything that takes time: from here on, only signals that are to end the process do.

    SIGHUP may be ignored until `handled_signals`: the repository is scanned after that.
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
    on_stop: Callable[[], None], on_reload: Callable[[], None], stop_timeout_s: float, linger_s: float
) -> Iterator[None]:
    """Call `on_stop` for each SIGTERM and SIGINT and `on_reload` for SIGHUP, on a thread of its own.

    The old handlers are back at the end.

    A loop that hangs in a model's code does not stop: the process ends with 1 when `stop_timeout_s` seconds have passed
    since the first signal to stop, or two and `linger_s` since the second. Python's own handlers run on the main thread
    alone, which is the one that may hang. The pipe that signals are written to is read on a thread of its own.
    """
    global _pipe
    reader, writer = _pipe = os.pipe()
    os.set_blocking(writer, False)
    _Forks.look_after()
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    previous_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    limits = (stop_timeout_s, _REACTION_S + linger_s)
    threading.Thread(target=_watch, args=(reader, on_stop, on_reload, limits), name="signals", daemon=True).start()
    try:
        yield
    finally:
        _pipe = ()
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread


_pipe: tuple[int, ...] = ()
"""Self-pipe that signals are written to while they are handled: reader and writer."""


class _Forks:
    """Fork hooks, which Python calls on the thread that forks.

    A child has the handlers and the pipe of the daemon: SIGTERM, by which a pool ends its processes, would drain the
    daemon and not end the child. subprocess calls none of this unless it is given a `preexec_fn`: a program that is
    executed has default handlers anyway, and none of the descriptors.
    """

    _looked_after = False

    def __init__(self) -> None:
        import ctypes  # here, since a child may not be able to import

        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self._own = threading.local()

    @classmethod
    def look_after(cls) -> None:
        """Register the hooks, once: Python keeps them for good."""
        if not cls._looked_after:
            cls._looked_after = True
            forks = cls()
            os.register_at_fork(
                before=forks._before, after_in_parent=forks._after_in_parent, after_in_child=forks._after_in_child
            )

    def _before(self) -> None:
        # A signal that comes before the child is an ordinary process would be taken for one to the daemon.
        handled = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_MEANINGLESS}
        self._own.mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        self._own.parent = os.getpid()

    def _after_in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._own.mask)

    def _after_in_child(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_MEANINGLESS):
            if signal.getsignal(number) is _ignore:
                signal.signal(number, signal.SIG_DFL)
        for descriptor in _pipe:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        # It is sent when the thread ends that has forked: a lane's, or another one's that lives as long as the daemon.
        self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._own.parent:  # it has ended before that
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._own.mask)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal. Without a handler of Python's, it would do what it does by default."""


def _watch(
    reader: int, on_stop: Callable[[], None], on_reload: Callable[[], None], limits: tuple[float, float]
) -> None:
    import logging
    import select

    from tnxd.events import event

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
                log.warning(
                    "%s is ignored: it means nothing here",
                    _name(number),
                    extra=event("signal_ignored", signal=_name(number)),
                )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"


def _end() -> NoReturn:
    """End a process that did not stop in time, with a line in the log."""
    die("the daemon did not stop in time: it ends with 1, and what it had taken in is lost")


def die(sentence: str) -> NoReturn:
    """End the process with 1, whatever its other threads do. The log gets a second to write the sentence."""
    # On a thread of its own, as whoever hangs may hold a lock of the log's.
    thread = threading.Thread(target=_say, args=(sentence,), daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_S)
    os._exit(1)


def _say(sentence: str) -> None:
    import logging

    from tnxd.events import event
    from tnxd.process import logs

    logging.getLogger(__name__).error("%s", sentence, extra=event("aborted", code=1))
    logs.flush(_LAST_WORDS_S)
