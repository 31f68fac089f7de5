"""Log of the bridge: lines of bounded length on stderr, as systemd's journal likes them where it reads them."""

from __future__ import annotations

import logging
import os

_MOST_CHARACTERS = 16 * 1024


class _Formatter(logging.Formatter):
    """Formatter of bounded lines. Args: for_journal: it adds the time, and reads a priority from the <N> in front."""

    def __init__(self, for_journal: bool) -> None:
        super().__init__("%(name)s: %(message)s" if for_journal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if len(text) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            text = f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[-half:]}"
        if not self._for_journal:
            return text
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


def install() -> None:
    """Send the log of this process to stderr. What uvicorn tells of each bad request, it tells the client alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(bool(os.environ.get("JOURNAL_STREAM"))))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
