"""Servers as child processes: started, waited for, watched and stopped."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

START_SECONDS = 120.0
"""torch takes long to import on a busy machine, CUDA longer."""

STOP_SECONDS = 10.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


class ServerProcess:
    """A server in a process of its own. As a context manager it stops it at the end, whatever happens.

    The terminal's Ctrl-C does not reach it: it is stopped from here, in order.

    Args:
        name: for messages.
        arguments: of the Python interpreter.
        stdin_line: written to its stdin, which then stays open until it is stopped.

    Attributes:
        line: the first line that it printed: it is ready.
        pid: its process id.

    Raises:
        BenchError: it ended before it was ready, or took too long; the message holds what it wrote to stderr.
    """

    def __init__(self, name: str, arguments: Sequence[str], stdin_line: bytes = b"") -> None:
        self._name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `stop`
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        self.pid = self._process.pid
        try:
            self.line = self._first_line(stdin_line)
        except BaseException:
            self.stop()
            raise

    def _first_line(self, stdin_line: bytes) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(stdin_line)
            stdin.flush()
        readable, _, _ = select.select([stdout], [], [], START_SECONDS)
        if not readable:
            raise BenchError(f"{self._name} was not ready within {START_SECONDS:g} s{self._complaint()}")
        line = stdout.readline().decode().strip()
        if not line:
            raise BenchError(f"{self._name} ended before it was ready{self._complaint()}")
        return line

    def _complaint(self) -> str:
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; it said:\n{text[-2000:]}" if text else ""

    def stop(self) -> None:
        """End it: ask by SIGTERM, insist after a while. Does nothing the second time."""
        process = self._process
        if process.stdin is None or process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            assert process.stdout is not None
            process.stdout.close()
            self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def cpu_ns(pid: int | None) -> int | None:
    """CPU time in nanoseconds that a process has used, all its threads together; None where it cannot be had."""
    if pid is None or sys.platform != "linux":
        return None
    try:
        # The number that clock_getcpuclockid(3) gives. /proc/PID/stat shows the same time, in steps of 10 ms.
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None
