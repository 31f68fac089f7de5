"""Watchdog thread: notices that the serving loop hangs, as in a model's code that does not return."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable

_PERIOD_S = 1.0
_FRAMES = 12


class Watchdog:
    """Watchdog of the thread that makes it: it asks once a period whether that thread hangs.

    Args:
        find_hang: called on the watchdog's thread. Returns in words where the loop hangs; "" if it does not.
        on_hang: called there with those words and the stack of the watched thread, once for each hang.
        period_s: in seconds.
    """

    def __init__(
        self, find_hang: Callable[[], str], on_hang: Callable[[str, str], None], period_s: float = _PERIOD_S
    ) -> None:
        self._find_hang = find_hang
        self._on_hang = on_hang
        self._period_s = period_s
        self._watched = threading.get_ident()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        found = 0
        while True:
            time.sleep(self._period_s)
            why = self._find_hang()
            # Twice, since a process that was stopped and goes on has hung for as long, and means nothing by it.
            found = found + 1 if why else 0
            if found == 2:
                self._on_hang(why, self._stack())

    def _stack(self) -> str:
        """Innermost frames of the watched thread."""
        frame = sys._current_frames().get(self._watched)
        return "".join(traceback.format_stack(frame, _FRAMES)) if frame is not None else ""
