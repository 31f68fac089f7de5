"""Writer: a bounded queue of text for a descriptor, which nobody waits for."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable

_MAX_WAITING = 4096  # entries
_MAX_WAITING_BYTES = 1024 * 1024
_RETRY_S = 1.0


class Writer:
    """Queue of text for a descriptor, and the thread that writes it. `put` never blocks.

    Args:
        on_time: called on that thread before it waits. Returns the seconds after which to call it again at the latest,
            or None.

    Attributes:
        dropped: number of entries that found no room, since the descriptor takes too little.
    """

    def __init__(self, descriptor: int, on_time: Callable[[], float | None] = lambda: None) -> None:
        self._descriptor = descriptor
        self._on_time = on_time
        self._queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a finalizer may log in the middle of anything
        # Counters of bytes that were taken and that have gone: each is written by one side alone.
        self._taken_bytes = 0
        self._gone_bytes = 0
        self.dropped = 0

    def start(self) -> Writer:
        """Start the thread. Returns the writer."""
        threading.Thread(target=self._run, name=f"writer {self._descriptor}", daemon=True).start()
        return self

    @property
    def keeps_up(self) -> bool:
        """Whether there is room for much more."""
        return (
            2 * self._queue.qsize() < _MAX_WAITING and 2 * (self._taken_bytes - self._gone_bytes) < _MAX_WAITING_BYTES
        )

    def put(self, text: str, *, needed: bool = False) -> None:
        """Queue a text of whole lines, or count it as dropped.

        An empty text makes the thread call `on_time`.

        Args:
            needed: queue it even where there is no room.
        """
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            waiting = self._taken_bytes - self._gone_bytes
            full = self._queue.qsize() >= _MAX_WAITING or waiting + len(data) > _MAX_WAITING_BYTES
            if full and not needed:
                self.dropped += bool(data)
                return
            self._taken_bytes += len(data)
        self._queue.put(data)

    def flush(self, seconds: float) -> bool:
        """Wait until everything that was put is written, up to so many seconds. Returns whether it is."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(seconds)

    def _run(self) -> None:
        while True:
            try:
                entry = self._queue.get(timeout=self._on_time())
            except queue.Empty:
                continue
            if isinstance(entry, threading.Event):
                entry.set()
                continue
            self._write(entry)
            self._gone_bytes += len(entry)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody who shares it has made it so
                _wait_until_writable(self._descriptor)
            except OSError:  # closed, broken, the disk is full: a log that cannot be written is no reason to stop
                return


def _wait_until_writable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll(_RETRY_S * 1e3)
