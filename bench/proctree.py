"""A server and everything that it started, as one: CPU time, standing still, the end. Linux, by way of /proc."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

from processes import cpu_ns

_PARENT, _SESSION, _STARTED = 1, 3, 19  # positions in /proc/PID/stat behind the name; see proc(5)


class _Process(NamedTuple):
    pid: int
    parent: int
    session: int
    started: int


def members(root: int) -> dict[int, int]:
    """Process id -> time of its start, of every process in the session that `root` leads and of all its descendants.

    Both, because a child may begin a session of its own, and a grandchild may have lost the parent that tied it here.
    """
    processes = [process for entry in Path("/proc").iterdir() if (process := _read(entry)) is not None]
    found = {process.pid: process.started for process in processes if root in (process.pid, process.session)}
    grown = True
    while grown:
        new = {p.pid: p.started for p in processes if p.parent in found and p.pid not in found}
        found.update(new)
        grown = bool(new)
    return found


def _read(entry: Path) -> _Process | None:
    if not entry.name.isdigit():
        return None
    try:
        fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:  # it has ended meanwhile
        return None
    return _Process(int(entry.name), int(fields[_PARENT]), int(fields[_SESSION]), int(fields[_STARTED]))


class CpuMeter:
    """CPU time of a tree from now on.

    What a process used that began and ended in between is not seen; no server here works with such.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._before = _cpu_times(root)

    def used_ns(self) -> int:
        """Nanoseconds of CPU time that the tree has used since this object was made."""
        return sum(now - self._before.get(pid, 0) for pid, now in _cpu_times(self._root).items())


def _cpu_times(root: int) -> dict[int, int]:
    times = {pid: cpu_ns(pid) for pid in members(root)}
    return {pid: time for pid, time in times.items() if time is not None}


def send(root: int, number: signal.Signals) -> None:
    """Signal every process of a tree, parents first."""
    for pid in sorted(members(root)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(remembered: dict[int, int]) -> None:
    """End what is left of a tree, where `members` was asked before its root was gone."""
    for pid, started in remembered.items():
        process = _read(Path(f"/proc/{pid}"))
        if process is not None and process.started == started:  # else the number belongs to somebody else by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
