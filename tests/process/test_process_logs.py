"""Log without a daemon: lines without room, records of one kind, and warnings."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest

from daemons import full_pipe
from tnxd.process import logs


def record(text: str, *arguments: object, level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord("test", level, "", 0, text, arguments, None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def read_all(reader: int) -> list[str]:
    """Lines that are in a pipe now."""
    os.set_blocking(reader, False)
    data = b""
    try:
        while part := os.read(reader, 65536):
            data += part
    except BlockingIOError:
        pass
    return data.decode().splitlines()


def test_lines_without_room_are_counted() -> None:
    count = 20_000
    with full_pipe() as (reader, writer):
        clock = Clock()
        log = logs.Log(writer, clock)
        log.writer.start()
        for _ in range(count):
            log.handle(record("line %s", "x" * 50))
            clock.now += logs.INTERVAL_S
        lines: list[str] = []
        while not log.writer.flush(0.05):
            lines += read_all(reader)
        lines += read_all(reader)  # else the last line might find no room either
        log.writer.put("")  # a look at the time
        assert log.writer.flush(20)
        lines += read_all(reader)
        whole = [line for line in lines if "xxx" in line]
        dropped = [int(found[1]) for line in lines if (found := re.match(r"(\d+) lines of this log were", line))]
        assert len(whole) + sum(dropped) == count
        assert sum(dropped) > 0


def test_what_found_no_room_is_counted_over_log_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logs.dropped() == 0  # nothing is installed here
    log, printed = logs.Log(2), logs.Writer(1)  # nobody writes: their threads are not started
    monkeypatch.setattr(logs, "_installed", (log, printed))
    for writer, more in ((log.writer, 3), (printed, 5)):
        for _ in range(4096 + more):
            writer.put("x\n")
    assert logs.dropped() == 8


def test_records_of_one_kind_are_one_line_and_a_number() -> None:
    reader, writer = os.pipe()
    clock = Clock()
    log = logs.Log(writer, clock)
    log.writer.start()
    for index in range(5):
        log.handle(record("%s failed: %d", "one", index))
        log.handle(record("%s failed: %d", "other", index))
    clock.now = logs.INTERVAL_S
    log.handle(record("%s failed: %d", "one", 5))
    log.flush(20)
    assert read_all(reader) == [
        "one failed: 0",
        "other failed: 0",
        "one failed: 0 ... and 4 more of this kind within 10 s",
        "one failed: 5",
        "other failed: 0 ... and 4 more of this kind within 10 s",
    ]
    os.close(reader)
    os.close(writer)


def test_records_without_arguments_are_of_one_kind_whatever_numbers_they_hold() -> None:
    reader, writer = os.pipe()
    log = logs.Log(writer, Clock())
    log.writer.start()
    for index in range(100):
        log.handle(record(f"the loss is {index / 7}"))
        log.handle(record(f"the gain is {index / 7}"))
    log.flush(20)
    lines = read_all(reader)
    assert [line.split(" ... ")[0] for line in lines] == 2 * ["the loss is 0.0", "the gain is 0.0"]
    assert [line for line in lines if "and 99 more" in line] == lines[2:]
    os.close(reader)
    os.close(writer)


WARNS = """
import warnings
from tnxd.process import logs

logs.install("info")
for index in range(100):
    warnings.warn(f"x is {'a' * index}!", stacklevel=1)
    warnings.warn(f"y is {index}", stacklevel=1)
    warnings.warn(f"y is {index}", FutureWarning, stacklevel=1)
logs.flush(20)
"""


def test_kind_of_a_warning_is_its_category_and_place() -> None:
    ended = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in ended.stderr.splitlines() if "Warning: " in line]
    assert [line.partition("Warning: ")[2].split(" ... ")[0] for line in lines] == 2 * ["x is !", "y is 0", "y is 0"]
    assert sum("and 99 more of this kind" in line for line in ended.stderr.splitlines()) == 3


def test_long_text_is_shortened() -> None:
    reader, writer = os.pipe()
    log = logs.Log(writer)
    log.writer.start()
    log.handle(record("%s", "x" * 1_000_000))
    assert log.writer.flush(20)
    assert sum(map(len, read_all(reader))) < 20_000
    os.close(reader)
    os.close(writer)


IN_THE_JOURNAL = """
import logging, sys
from tnxd.events import event, machine_event
from tnxd.process import logs

logs.install("info", as_json=len(sys.argv) > 1)
log = logging.getLogger("x")
log.error("no %s", "room", extra=event("out_of_memory", "net@2#1", rows=8))
log.info("seen by %s", "machines", extra=machine_event("device_ready", device="cpu"))
logs.say("tnxd: it ends", event("cannot_start", code=1), error=True)
logs.flush(20)
"""


def test_journal_reads_the_priority_before_each_line() -> None:
    def lines(*arguments: str) -> list[str]:
        command = [sys.executable, "-c", IN_THE_JOURNAL, *arguments]
        surroundings = {**os.environ, "JOURNAL_STREAM": "1:1"}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=surroundings)
        return ended.stderr.splitlines()

    assert lines() == ["<3>x: no room", "<3>tnxd: it ends"]
    no_room, ready, ends = lines("json")
    assert [line[:4] for line in (no_room, ready, ends)] == ["<3>{", "<6>{", "<3>{"]
    fields = json.loads(no_room[3:])
    assert (fields["model"], fields["version"], fields["rows"]) == ("net", "2", 8)
    assert json.loads(ready[3:])["event"] == "device_ready"
    assert json.loads(ends[3:])["code"] == 1
