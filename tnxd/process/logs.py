"""Asynchronous, rate-limited logging: no thread that writes to stderr or stdout waits for the descriptor.

A pipe that is not read, a terminal that is stopped, a disk that hangs: a write to such a descriptor blocks, and the
serving loop must not. So all lines go through bounded queues, to one thread for each descriptor. Lines that do not fit
are dropped and counted, and the log tells their number. Failures of one kind are one line, and one traceback, in ten
seconds, with their number.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tnxd import events
from tnxd.events import event
from tnxd.process.json_format import FOREIGN, JournalJsonFormatter, JsonFormatter, priority
from tnxd.process.writer import Writer

INTERVAL_S = 10.0
"""Rate limit: of one kind of warning or error, one line is written in so many seconds."""

# Rate limit of records that are no failure: an operator who routes traffic five times wants to see all five.
_INFO_LINES = 20

_KIND = "tnxd_kind"
"""Attribute of a record that says what it is about, in place of its text."""

_NUMBER = re.compile(r"\d[\d.]*(?:[eE][-+]?\d+)?")

_MAX_KINDS = 1000
_MAX_LINE = 16 * 1024  # characters; journald would cut lines of 48 KiB


class _Kind:
    """Rate limit of one kind of records, within one interval."""

    __slots__ = ("event", "fields", "left", "level", "more", "name", "text", "until")

    def __init__(self, record: logging.LogRecord, text: str, until: float) -> None:
        # Not the record, whose exception would keep the tensors of its frames alive.
        self.name, self.level, self.text = record.name, record.levelno, text
        self.event: str = getattr(record, events.NAME, FOREIGN)
        self.fields: Mapping[str, Any] = getattr(record, events.FIELDS, {})
        self.until = until
        self.left = 1 if record.levelno >= logging.WARNING else _INFO_LINES
        self.more = 0


class Log(logging.Handler):
    """Log handler that writes through a `Writer`, with one line for each kind of failure in each interval.

    The caller starts its writer.

    Records are of one kind if logger, text, first argument and class of exception are the same; the first argument is
    their subject. In a text without arguments, which models like to make, numbers do not count: they may differ each
    time. Category and place are the kind of a warning of Python's. Records after the first one of a kind are counted:
    "... and 1999 more of this kind within 10 s".
    """

    def __init__(self, descriptor: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.setFormatter(TextFormatter("%(message)s"))
        self._clock = clock
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._kinds_lock = threading.RLock()
        self._dropped = 0
        self.writer = Writer(descriptor, self._on_time)

    def createLock(self) -> None:
        """Make no lock around `emit`: the text of an exception may run a model's code, for any time."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        passed = self.filter(record)
        if passed:
            self.emit(record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._is_to_be_told(record):
                self.writer.put(self._text(record))
        except Exception:  # a text that cannot be made is no reason for anything
            self.handleError(record)

    def flush(self, seconds: float = 0.0) -> None:
        """Write all records so far, counts included, within so many seconds."""
        self._close_kinds(float("inf"))
        if seconds > 0:
            self.writer.flush(seconds)

    def _is_to_be_told(self, record: logging.LogRecord) -> bool:
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
        error = record.exc_info[0] if record.exc_info else None
        text, now = record.getMessage(), self._clock()
        said = getattr(record, _KIND, None) or (record.msg if record.args else _NUMBER.sub("#", text))
        kind: tuple[Any, ...] = (record.name, record.levelno, said, str(subject)[:200], error)
        with self._kinds_lock:
            if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
                kind = (record.levelno,)  # too many to tell apart
            known = self._kinds.get(kind)
            if known is None or now >= known.until:
                if known is not None and known.more:
                    self.writer.put(self._summary(known))
                known = self._kinds[kind] = _Kind(record, text, now + INTERVAL_S)
            if known.left:
                known.left -= 1
                return True
            known.more += 1
            first = known.more == 1
        if first:
            self.writer.put("")  # the writer's thread has a time to look at now
        return False

    def _on_time(self) -> float | None:
        """Write the counts of dropped lines, and of kinds whose interval is over. On the writer's thread."""
        dropped = self.writer.dropped - self._dropped
        if dropped and self.writer.keeps_up:
            self._dropped += dropped
            line = f"{dropped} lines of this log were dropped: nobody read them in time"
            self.writer.put(self._line(logging.WARNING, line, event("lines_dropped", count=dropped)), needed=True)
        return self._close_kinds(self._clock())

    def _close_kinds(self, now: float) -> float | None:
        """Write the counts of kinds whose interval is over. Returns the seconds until the next one is."""
        with self._kinds_lock:
            for name, kind in list(self._kinds.items()):
                if now >= kind.until:
                    if kind.more:
                        self.writer.put(self._summary(kind))
                    del self._kinds[name]
            counted = [kind.until for kind in self._kinds.values() if kind.more]
        return max(min(counted) - now, 0.0) if counted else None

    def _summary(self, kind: _Kind) -> str:
        text = f"{kind.text} ... and {kind.more:,} more of this kind within {INTERVAL_S:g} s"
        fields = {**kind.fields, "repeats": kind.event, "count": kind.more, "seconds": INTERVAL_S}
        return self._line(kind.level, text, event("repeated", **fields), kind.name)

    def _line(self, level: int, text: str, extra: Mapping[str, Any], name: str = __name__) -> str:
        return self._text(_record(name, level, text, extra))

    def _text(self, record: logging.LogRecord) -> str:
        return self.format(record) + "\n"


def _record(name: str, level: int, text: str, extra: Mapping[str, Any]) -> logging.LogRecord:
    record = logging.LogRecord(name, level, "", 0, "%s", (text,), None)
    record.__dict__.update(extra)
    return record


class TextFormatter(logging.Formatter):
    """Format for people. A text that is too long loses its middle."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if len(text) > _MAX_LINE:
            half = _MAX_LINE // 2
            text = f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[-half:]}"
        return text


class _Stream(io.TextIOBase):
    """Substitute for sys.stdout or sys.stderr: output of models goes through a `Writer`, line by line.

    Args:
        formatter: makes an event of each line; None: lines go out as they are.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int, writer: Writer, formatter: JsonFormatter | None = None) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._writer = writer
        self._formatter = formatter
        self._own = threading.local()  # the line that a thread has begun

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        begun: str = getattr(self._own, "line", "") + text
        end = len(begun) if len(begun) > _MAX_LINE else begun.rfind("\n") + 1
        if end:
            self._put(begun[:end])
        self._own.line = begun[end:]
        return len(text)

    def say(self, sentence: str, level: int, extra: Mapping[str, Any]) -> None:
        """Write a sentence of the daemon's own. Args: extra: as `tnxd.events.event` makes it."""
        if self._formatter is None:
            self._writer.put(_marked(sentence, error=level >= logging.ERROR) + "\n")
        else:
            self._writer.put(self._formatter.format(_record("tnxd", level, sentence, extra)) + "\n")

    def _put(self, lines: str) -> None:
        if self._formatter is None:
            self._writer.put(lines)
            return
        extra = event("output", events.speaker.model, stream="stdout" if self._descriptor == 1 else "stderr")
        for line in lines.split("\n"):
            if line.strip():
                self._writer.put(self._formatter.format(_record("tnxd.output", logging.INFO, line, extra)) + "\n")


class _JournalFormatter(TextFormatter):
    """Format for journald, which adds the time, and reads a line's priority from the <N> at its beginning."""

    def format(self, record: logging.LogRecord) -> str:
        level = priority(record.levelno)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Substitute for `warnings.showwarning`. That of logging.captureWarnings gives records no kind."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    if file is not None:
        file.write(text)
        return
    kind = (category.__name__, filename, lineno)
    about = event("python_warning", events.speaker.model, category=category.__name__, file=filename, line=lineno)
    logging.getLogger("py.warnings").warning(text.rstrip(), extra={_KIND: kind, **about})


def to_journal() -> bool:
    """Whether stderr goes to systemd's journal."""
    return bool(os.environ.get("JOURNAL_STREAM"))


_installed: tuple[Log, Writer] | None = None


def install(level: str, *, as_json: bool = False) -> None:
    """Send the log of this process, and all its output, through writers.

    Args:
        level: of the log, such as "info".
        as_json: make each line, printed ones too, an event in JSON.
    """
    global _installed
    handler, printed = Log(2), Writer(1).start()
    events_format = (JournalJsonFormatter if to_journal() else JsonFormatter)() if as_json else None
    if events_format is not None:
        handler.setFormatter(events_format)
    else:
        handler.addFilter(lambda record: not hasattr(record, events.FOR_MACHINES))
        handler.setFormatter(
            _JournalFormatter("%(name)s: %(message)s")
            if to_journal()
            else TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
    handler.writer.start()
    logging.basicConfig(level=level.upper(), handlers=[handler])
    warnings.showwarning = _log_warning
    logging.raiseExceptions = False  # a text that cannot be made must not become a text of its own
    sys.stdout = _Stream(1, printed, events_format)
    sys.stderr = _Stream(2, handler.writer, events_format)
    _installed = handler, printed


def say(sentence: str, extra: Mapping[str, Any], *, error: bool = False) -> None:
    """Print a line on stdout that is no record of the log: as an event where the log has those.

    Args:
        extra: as `tnxd.events.event` makes it.
        error: print it on stderr, as an error.
    """
    stream = sys.stderr if error else sys.stdout
    if isinstance(stream, _Stream):
        stream.say(sentence, logging.ERROR if error else logging.INFO, extra)
    else:
        print(_marked(sentence, error=error), file=stream, flush=True)


def _marked(sentence: str, *, error: bool) -> str:
    return f"<{priority(logging.ERROR)}>{sentence}" if error and to_journal() else sentence


def dropped() -> int:
    """Number of texts, of the log and of what is printed, that found no room."""
    return 0 if _installed is None else _installed[0].writer.dropped + _installed[1].dropped


def flush(seconds: float) -> None:
    """Write all lines that wait, within so many seconds. Without `install` there are none."""
    if _installed is not None:
        handler, printed = _installed
        until = time.monotonic() + seconds
        handler.flush(seconds)
        printed.flush(max(until - time.monotonic(), 0.0))
