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
    """Watchdog of the thread that makes it: it looks once a period.

    Args:
        look: called on the watchdog's thread. Returns in words where the loop hangs; "" if it does not.
        bark: called there with those words and the stack of the watched thread, once for each hang.
        period_s: in seconds.
    """

    def __init__(self, look: Callable[[], str], bark: Callable[[str, str], None], period_s: float = _PERIOD_S) -> None:
        self._look = look
        self._bark = bark
        self._period_s = period_s
        self._watched = threading.get_ident()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        looks = 0
        while True:
            time.sleep(self._period_s)
            why = self._look()
            # Twice, since a process that was stopped and goes on has hung for as long, and means nothing by it.
            looks = looks + 1 if why else 0
            if looks == 2:
                self._bark(why, self._stack())

    def _stack(self) -> str:
        """Innermost frames of the watched thread."""
        frame = sys._current_frames().get(self._watched)
        return "".join(traceback.format_stack(frame, _FRAMES)) if frame is not None else ""
