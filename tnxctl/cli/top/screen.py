"""The terminal as a screen: pictures one over the other, keys one by one, and all as before in the end.

Plain ANSI: the alternate screen, no line wrapping, no cursor. POSIX only; `usable` says where it works. What restores
the terminal runs whatever ends the block: an exception, Ctrl-C and SIGTERM, which the tool raises as exceptions. Ctrl-Z
leaves the screen before it stops the process, and whoever continues it, `fg` for one, gets the screen back.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from select import select
from types import FrameType, TracebackType
from typing import Any, Self

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"
_LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"

_WAKE = b"\0"  # no signal has this number

KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b": "escape",
    b"\x04": "q",  # Ctrl-D
}
"""Keys that have a name, by what a terminal sends for them. Others are what it sends."""

_KEY = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|[\x00-\xff]", re.DOTALL)


def usable() -> bool:
    """Whether standard output is a terminal that can be driven so."""
    return (
        os.name == "posix"
        and sys.stdout is not None
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "")
    )


class Screen:
    """Screen on standard output, with keys of standard input if that is a terminal as well. For the main thread."""

    def __init__(self) -> None:
        self._output = sys.stdout.fileno()
        self._encoding = sys.stdout.encoding or "utf-8"
        self._keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._attributes: list[Any] | None = None
        self._drawn: list[str] = []
        self._handlers: dict[int, Any] = {}
        self._reader, self._writer = -1, -1
        self._old_wakeup = -1

    def __enter__(self) -> Self:
        import termios

        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        try:
            if self._keyboard is not None:
                self._attributes = termios.tcgetattr(self._keyboard)
            for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
                self._handlers[number] = signal.signal(number, _note)
            self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._take()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(self._output)
            if columns > 0 and lines > 0:
                return columns, lines
        return 80, 24

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines, which fit: only those that differ from what is there are sent."""
        pieces = [
            f"\x1b[{number + 1};1H\x1b[K{line}\x1b[0m"
            for number, line in enumerate(lines)
            if number >= len(self._drawn) or line != self._drawn[number]
        ]
        if len(lines) < len(self._drawn):
            pieces.append(f"\x1b[{len(lines) + 1};1H\x1b[J")
        self._drawn = [*lines]
        if pieces:
            self._write("".join(pieces))

    def wait(self, seconds: float | None) -> list[str]:
        """Wait for keys, `wake`, another size of the window or the end of a pause. Returns the keys, by `KEYS`.

        Args:
            seconds: at most; None: for ever.
        """
        sources = [self._reader] if self._keyboard is None else [self._reader, self._keyboard]
        ready, _, _ = select(sources, [], [], seconds)
        if self._reader in ready:
            noted = os.read(self._reader, 1024)
            if signal.SIGTSTP in noted:
                self._stop()
            elif signal.SIGCONT in noted:
                self._take()
            elif signal.SIGWINCH in noted:
                self._write("\x1b[2J")
                self._drawn = []
        if self._keyboard is not None and self._keyboard in ready:
            return self._keys(self._keyboard)
        return []

    def wake(self) -> None:
        """End a `wait`. From any thread, also when the screen is gone."""
        with contextlib.suppress(OSError):
            os.write(self._writer, _WAKE)

    def _keys(self, keyboard: int) -> list[str]:
        """The keys that were pressed. A terminal that is gone is a "q"."""
        try:
            typed = os.read(keyboard, 1024)
        except OSError:
            typed = b""
        if not typed:
            return ["q"]
        return [KEYS.get(key) or key.decode("ascii", "replace") for key in _KEY.findall(typed)]

    def _take(self) -> None:
        """Take the terminal over."""
        if self._keyboard is not None:
            import termios
            import tty

            tty.setcbreak(self._keyboard, termios.TCSANOW)  # waits for nothing, and keeps what was typed already
        self._write(_ENTER)
        self._drawn = []

    def _leave(self) -> None:
        """Give the terminal back as it was."""
        with contextlib.suppress(OSError):
            self._write(_LEAVE)
        if self._keyboard is not None and self._attributes is not None:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._keyboard, termios.TCSANOW, self._attributes)

    def _stop(self) -> None:
        """Stop, as Ctrl-Z asks, without the screen."""
        self._leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # by kill(), other threads might be first to see it
        signal.signal(signal.SIGTSTP, _note)
        self._take()

    def _restore(self) -> None:
        interrupts = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        self._leave()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in (self._handlers | interrupts).items():
            signal.signal(number, handler)
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)
        self._reader = self._writer = -1

    def _write(self, codes: str) -> None:
        rest = codes.encode(self._encoding, "replace")
        while rest:
            rest = rest[os.write(self._output, rest) :]


def _note(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number comes through the pipe."""
