"""JSON format of the log: one event per line, with a stable name and typed fields (docs/operations.md has them all)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from tnxd.events import FIELDS, NAME

FOREIGN = "log"
"""Event of records that name none: those of libraries."""

_MOST_TEXT = 16 * 1024  # bytes of the message, and of a traceback; journald would cut lines of 48 KiB
_MOST_FIELD = 2 * 1024  # bytes of any other text
_MOST_ITEMS = 64  # of a list or dict

# They end a line for some readers, though not for JSON.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

_TEXTS = ("message", "traceback", "stack")


class JsonFormatter(logging.Formatter):
    """Format of one line of JSON for each record, whatever it holds: UTF-8, at most some 40 KiB.

    Fields time (RFC 3339, UTC, milliseconds), level, event, message and logger, then those of the event, and traceback
    if there is one. A text that is too long loses its middle. What has no UTF-8 is escaped with a backslash.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": rfc3339(record.created),
            "level": record.levelname.lower(),
            "event": getattr(record, NAME, FOREIGN),
            "message": record.getMessage(),
            "logger": record.name,
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        bounded = {
            name: _bounded(value, _MOST_TEXT if name in _TEXTS else _MOST_FIELD) for name, value in fields.items()
        }
        return msgspec.json.encode(bounded, enc_hook=str).decode().translate(_LINE_ENDS)


class JournalJsonFormatter(JsonFormatter):
    """The same for journald, which reads a line's priority from the <N> at its beginning and takes that off."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{priority(record.levelno)}>{super().format(record)}"


def priority(level: int) -> int:
    """Syslog's priority for a level of Python's."""
    return 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6


def rfc3339(seconds: float) -> str:
    """Time since the epoch as RFC 3339 has it, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _bounded(value: Any, most: int) -> Any:
    """A value of JSON that is not too long."""
    if isinstance(value, str):
        return _shortened(value, most)
    if isinstance(value, Mapping):
        return {_shortened(str(key), 256): _bounded(item, 256) for key, item in [*value.items()][:_MOST_ITEMS]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_bounded(item, 256) for item in [*value][:_MOST_ITEMS]]
    return value if value is None or isinstance(value, (bool, int, float)) else _shortened(str(value), most)


def _shortened(text: str, most: int) -> str:
    """A text in UTF-8 that takes at most so many bytes in JSON, without its middle if it is longer."""
    kept, half = text, min(most, len(text)) // 2
    while True:
        if len(kept) <= most:
            printable = kept.encode("utf-8", "backslashreplace").decode()
            if len(msgspec.json.encode(printable)) <= most + 2:
                return printable
        half = half * 3 // 4
        kept = f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[len(text) - half :]}"
