"""Programs as child processes: started, waited for, watched and stopped."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

START_SECONDS = 120.0
"""torch takes long to import on a busy machine, CUDA longer."""

STOP_SECONDS = 10.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


class ChildProcess:
    """A Python program in a process of its own. As a context manager it stops it at the end, whatever happens.

    The terminal's Ctrl-C does not reach it: it is stopped from here, in order.

    Args:
        name: for messages.
        arguments: of the interpreter.
        python: the interpreter. environment: None for that of this process.
        log: file that its stderr is appended to; None: one that is gone in the end.

    Attributes:
        pid: its process id.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("ab+")  # noqa: SIM115 - in `stop`
        self._process = subprocess.Popen(
            [str(python), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env=environment,
        )
        self.pid = self._process.pid

    def ready(self, stdin: bytes = b"") -> str:
        """Wait for the first line that it prints, and return that. Its stdin, which is given this, stays open.

        Raises:
            BenchError: it ended before, or took too long; the message holds what it wrote to stderr.
        """
        return self.ask(stdin, START_SECONDS, "was not ready", "ended before it was ready")

    def ask(self, stdin: bytes, seconds: float, late: str = "did not answer", ended: str = "ended") -> str:
        """Write this to its stdin and wait for a line from it.

        Raises:
            BenchError: there was none within so many seconds, or no more are to come: that it is `late` or `ended`.
        """
        self.tell(stdin)
        return self.hear(seconds, late, ended)

    def tell(self, stdin: bytes) -> None:
        """Write this to its stdin. Says nothing if it has ended: `hear` will."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(stdin)
            self._process.stdin.flush()

    def hear(self, seconds: float, late: str = "did not answer", ended: str = "ended") -> str:
        """Wait for a line from it.

        Raises:
            BenchError: as `ask`.
        """
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not readable:
            raise BenchError(f"{self.name} {late} within {seconds:g} s{complaint(self._stderr)}")
        line = self._process.stdout.readline().decode().strip()
        if not line:
            raise BenchError(f"{self.name} {ended}{complaint(self._stderr)}")
        return line

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Wait until it ends by itself. Returns its exit code, negative if a signal ended it.

        Raises:
            BenchError: it did not, within so many seconds.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name} has not ended within {seconds:g} s{complaint(self._stderr)}") from None

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

    def __exit__(self, *_: object) -> None:
        self.stop()


def complaint(file: IO[bytes]) -> str:
    """The end of a message about a program: what it wrote to this file."""
    file.seek(0)
    text = file.read().decode(errors="replace").strip()
    return f"; it said:\n{text[-2000:]}" if text else ""


def cpu_ns(pid: int | None) -> int | None:
    """CPU time in nanoseconds that a process has used, all its threads together; None where it cannot be had."""
    if pid is None or sys.platform != "linux":
        return None
    try:
        # The number that clock_getcpuclockid(3) gives. /proc/PID/stat shows the same time, in steps of 10 ms.
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def machine_cpu_ns() -> int | None:
    """CPU time in nanoseconds that all processes and the kernel have used since the start, in steps of 10 ms.

    None where it cannot be had. What another virtual machine took from this one counts, too.
    """
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.readline().split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) * 10**9 // os.sysconf("SC_CLK_TCK")
