"""Lines that a process of a model.py prints, on their way to the log."""

from __future__ import annotations

import contextlib
import logging
import os

from tnxd.events import event

log = logging.getLogger(__name__)

MOST_LINE = 16 * 1024
"""Bytes of a line that are logged, and that are read at a time."""


class PrintedLines:
    """Lines that a process prints, on their way to the log."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begun = b""

    def read(self, descriptor: int) -> bool:
        """Log what can be read. Returns whether there was anything."""
        with contextlib.suppress(BlockingIOError):
            part = os.read(descriptor, MOST_LINE)
            self._add(part)
            return bool(part)
        return False

    def _add(self, part: bytes) -> None:
        """Log the lines that end within a part."""
        *lines, self._begun = (self._begun + part).split(b"\n")
        if len(self._begun) > MOST_LINE:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            text = line[:MOST_LINE].decode("utf-8", "replace")
            log.info("%s: %s", self._title, text, extra=event("output", self._title, message=text, stream="process"))

    def end(self) -> None:
        """Log what is left."""
        if self._begun:
            self._add(b"\n")
