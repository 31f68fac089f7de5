"""Programs on a terminal of their own, and what is to be seen on it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 60.0

_CODE = re.compile(rb"\x1b\[(\??)([0-9;]*)([A-Za-z])|\x1b[=>]")


class Terminal:
    """Terminal with a program on it, which is killed at the end of the block.

    Of the codes, it knows those of `tnxctl.cli.top.screen`, for which the alternate screen has lines; what is written
    beside that is text alone.

    Attributes:
        process: the program. screen: lines of the alternate screen; None: it is not on.
        cursor, wraps: whether the cursor is shown, and lines are wrapped. coloured: whether there ever was a colour.
        text: what was written beside the alternate screen. clears: how often that was cleared.
    """

    def __init__(self, command: list[str], environment: dict[str, str], columns: int = 80, lines: int = 24) -> None:
        self._master, self._slave = os.openpty()
        self.resize(columns, lines)
        self._before = termios.tcgetattr(self._slave)
        self.screen: list[str] | None = None
        self.cursor = self.wraps = True
        self.coloured = False
        self.text = ""
        self.clears = 0
        self._at = (0, 0)
        self._left = b""
        slave = self._slave
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size, of which the kernel tells the program."""
        self._lines = lines
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, *texts: str) -> str:
        """Wait until all of these are on the screen. Returns what is."""
        return self.wait_for(lambda: all(text in self.shown for text in texts), f"{texts}")

    def wait_for(self, happened: Callable[[], bool], what: str) -> str:
        """Wait until something has happened. Returns what is on the screen."""
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert self._read(until - time.monotonic()), f"not seen: {what}\n{self.shown}\n---\n{self.text}"
        return self.shown

    @property
    def shown(self) -> str:
        """Screen as it is seen: the alternate one where that is on, else the text beside it."""
        return self.text if self.screen is None else "\n".join(self.screen).rstrip()

    def end(self, number: int | None = None) -> int:
        """Wait for the end of the program, and read what it still wrote. Args: number: of a signal to send before."""
        if number is not None:
            self.process.send_signal(number)
        self.wait_for(lambda: self.process.poll() is not None, "the end")
        while self._read(0.0):
            pass
        return self.process.returncode

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal is as the program found it."""
        return self.screen is None and self.cursor and self.wraps and termios.tcgetattr(self._slave) == self._before

    def _read(self, seconds: float) -> bool:
        """Read what was written. False: nothing was, and the time is over."""
        until = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self._master], [], [], min(max(until - time.monotonic(), 0.0), 0.1))
            if ready:
                self._take(self._left + os.read(self._master, 65536))
                return True
            if time.monotonic() >= until:
                return False
            if self.process.poll() is not None:
                return seconds > 0

    def _take(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if data[at : at + 1] != b"\x1b":
                end = data.find(b"\x1b", at)
                end = len(data) if end < 0 else end
                self._write(data[at:end])
                at = end
                continue
            found = _CODE.match(data, at)
            if found is None and len(data) - at < 16:
                break  # cut in the middle
            if found is not None and found[3]:
                self._obey(found[1], found[2], found[3])
            at = found.end() if found is not None else at + 1
        self._left = data[at:]

    def _write(self, data: bytes) -> None:
        text = data.decode(errors="replace")  # a character may be cut: no test looks for one that is not ASCII alone
        if self.screen is None:
            self.text += text
            return
        line, column = self._at
        padded = self.screen[line].ljust(column)
        self.screen[line] = padded[:column] + text + padded[column + len(text) :]
        self._at = (line, column + len(text))

    def _obey(self, private: bytes, numbers: bytes, letter: bytes) -> None:
        if private:
            is_on = letter == b"h"
            if numbers == b"1049":
                self.screen = [""] * 300 if is_on else None
                self._at = (0, 0)
            elif numbers == b"25":
                self.cursor = is_on
            elif numbers == b"7":
                self.wraps = is_on
        elif letter == b"m":
            self.coloured |= any(30 <= int(number or 0) < 48 for number in numbers.split(b";"))
        elif self.screen is not None:
            line, column = self._at
            if letter == b"H":
                row, _, place = numbers.partition(b";")
                self._at = (int(row or 1) - 1, int(place or 1) - 1)
            elif letter == b"K":
                self.screen[line] = self.screen[line][:column]
            elif letter == b"J" and numbers == b"2":
                self.clears += 1
                self.screen = [""] * 300
            elif letter == b"J":
                self.screen[line:] = [self.screen[line][:column], *[""] * (299 - line)]


def tool(*arguments: str, **extra: str) -> dict[str, Any]:
    """Command and environment of `tnxctl` on a terminal."""
    import sys

    left = ("TNX_HOST", "NO_COLOR")
    environment = {key: value for key, value in os.environ.items() if key not in left}
    return {
        "command": [sys.executable, "-m", "tnxctl.cli", *arguments],
        "environment": environment | {"TERM": "xterm", "PYTHONUTF8": "1"} | extra,
    }


INTERRUPTS = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of the tool after signals."""
