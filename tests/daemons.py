"""Daemon processes with standard streams, limits and surroundings that a test chooses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepared

TESTS = Path(__file__).parent

ODD = (str(TESTS / "odd_models.py"),)
"""The program whose models misbehave on command."""

PATIENT = (str(TESTS / "patient_daemon.py"),)
"""The program for tests that read the last lines of a log."""

ONE_LANE = "[cpu]\nworkers = 1\ninline_limit_us = 0\n"


@dataclass
class Running:
    """Daemon process. Attributes: endpoint: where it listens. folder: of its own."""

    endpoint: str
    process: subprocess.Popen[bytes] | prepared.Process
    folder: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal. Returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def log(self) -> str:
        """Text of its stderr, if that went to the file `log`."""
        return (self.folder / "log").read_text()

    def status(self, field: str) -> str:
        """Line of /proc/PID/status, by its name."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(.*)$", text, re.MULTILINE)
        assert found is not None
        return found[1]


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    program: tuple[str, ...] = ("-m", "tnxd"),
    config: str = "",
    stderr: Any = None,
    stdout: Any = subprocess.DEVNULL,
    before: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    binds: bool = True,
    anew: bool = False,
) -> Iterator[Running]:
    """Daemon that listens on an ipc path in a folder; it may not be ready yet. Killed at the end if it still runs.

    Args:
        binds: whether to wait until it listens, or has ended.
        stdout, stderr: descriptors, or files that are open; of stderr, None is the file `log` in the folder.
        before: called in the new process before the program is.
        anew: as for `conftest.start_daemon`; with a program that prepares the process itself, it is always so.
    """
    endpoint = f"ipc://{folder}/tnx"
    arguments = ("--bind", endpoint, *arguments)
    if config:
        (folder / "tnxd.toml").write_text(config)
        arguments = (*arguments, "--config", str(folder / "tnxd.toml"))
    variables = {**prepared.variables(), **(environment or {})}
    forks = not anew and before is None and stdout != subprocess.PIPE and prepared.can_run(program, variables)
    process: subprocess.Popen[bytes] | prepared.Process

    def prepare() -> None:
        prepared.end_with_parent()
        if before is not None:
            before()

    with (folder / "log").open("wb") as log, open(os.devnull, "wb") as nowhere:
        errors = log if stderr is None else stderr
        if forks:
            output = nowhere if stdout == subprocess.DEVNULL else stdout
            descriptors = [each if isinstance(each, int) else each.fileno() for each in (output, errors)]
            process = prepared.start(program, arguments, variables, stdout=descriptors[0], stderr=descriptors[1])
        else:
            command = [sys.executable, *program, *arguments]
            process = subprocess.Popen(command, stdout=stdout, stderr=errors, preexec_fn=prepare, env=variables)
    try:
        # At intervals, since there is nothing to wait on for a file that appears or else a process that ends, and a
        # connection that waits for its server would be one more in the daemon. The test's own time limit ends this.
        while binds and process.poll() is None and not (folder / "tnx").exists():
            time.sleep(0.02)
        yield Running(endpoint, process, folder)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def freeze(process: subprocess.Popen[Any] | prepared.Process) -> None:
    """Stop a process, so that it does nothing until SIGCONT: on a busy machine, its threads run on for a moment."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        time.sleep(0.01)  # between two looks: nobody but its parent hears of it


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Pipe that takes not one byte more: reader and writer."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        for size in (65536, 1):
            try:
                while True:
                    os.write(writer, bytes(size))
            except BlockingIOError:
                pass
        os.set_blocking(writer, True)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)
