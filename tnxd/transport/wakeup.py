"""Self-pipe: wakes the serving loop from another thread or a signal handler."""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """Self-pipe whose reading end the loop polls. Many calls of `set` before the loop looks cost one write."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._is_set = False

    def fileno(self) -> int:
        return self._reader

    def set(self) -> None:
        """Wake the loop, from any thread. Make visible before what the loop is to find."""
        if not self._is_set:
            self._is_set = True
            os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Accept the wake-up. Call it before looking for what was left: what comes later wakes the loop again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self._is_set = False

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
