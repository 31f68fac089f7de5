"""Wake the serving loop from another thread or a signal handler."""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """A pipe whose reading end the loop polls. Many calls of `set` before the loop looks cost one write."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._is_set = False

    def fileno(self) -> int:
        return self._reader

    def set(self) -> None:
        """Wake the loop. Any thread; make what it should find visible before."""
        if not self._is_set:
            self._is_set = True
            os.write(self._writer, b"\0")

    def clear(self) -> None:
        """The loop is awake. Call before looking for what was left: what comes later wakes it again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self._is_set = False

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
