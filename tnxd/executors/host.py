"""Cores and memory of this machine that the process may use, within the limits of its control groups.

A service manager or a container engine bounds a process by control groups (cgroups): `CPUQuota=` and `MemoryMax=` of
systemd, `docker --cpus` and `--memory`, the limits of a Kubernetes pod. None of that shows in the number of CPUs or
in /proc/meminfo. A limit of any group above the own one holds too, so all are looked at, up to the root of the mount.
Both versions of cgroups are read, and both at once where a machine has some controllers in each.

Files are read anew at every call: limits change while a service runs (`systemctl set-property`).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tnxctl.protocol.wire import MIB
from tnxd.lanes import NO_TEAMS, Teams

_PROC = Path("/proc")

# Threads of one batch: where cores are more, several batches at a time can be wide.
_LARGEST_TEAM = 8

_MEMINFO = re.compile(r"^(MemAvailable|MemTotal):\s*(\d+) kB", re.M)
_INACTIVE = re.compile(r"^((?:total_)?inactive_file) (\d+)", re.M)

# Beyond memory.high, processes are slowed down until they give in: no less a limit than memory.max. The last name is
# that of version 1, where no limit is a number beyond all memory.
_MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_UNLIMITED = 1 << 60

# In a line of mountinfo: root of the mount in its file system, mount point, type, options of the file system.
_MOUNT = re.compile(r"\S+ \S+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)")


# --- cores ---------------------------------------------------------------------------------------------------


def available_cores(proc: Path = _PROC) -> int:
    """Cores that this process can keep busy: those of its affinity, or fewer if a CPU quota allows less.

    A quota is rounded up, as the JVM and Go 1.25 do: with 2.5 cores three threads are throttled for a sixth of the
    time, two would leave a fifth of what is allowed unused. Go takes no less than 2; here one core is one core, since
    the serving thread sleeps while a lane works.
    """
    quota = min((_cpu_quota(group) for group in _groups("cpu", proc)), default=math.inf)
    cores = _affinity()
    return max(math.ceil(min(quota, cores)), 1)


def plan_lanes(cores: int, workers: int = 0, threads: int = 0) -> tuple[int, Teams]:
    """Number of lanes, each of one thread, and the teams of threads that some of them have beside.

    As many lanes as cores: the thread that serves the socket works little beside a model that takes long, and one that
    does not runs on that thread itself. Up to eight threads work on one batch, since more gain little; on more cores
    several lanes have a team, of four to eight, and all teams together no more threads than there are cores.

    Args:
        workers, threads: most lanes, and most threads of one batch; 0: as many as the cores are for.
    """
    lanes = workers or cores
    groups = -(-cores // _LARGEST_TEAM)
    team = min(threads or cores // groups, cores)
    if team < 2:
        return lanes, NO_TEAMS
    return lanes, Teams(min(cores // team, lanes), team, cores)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(group: str) -> float:
    """Cores that one control group may use, as a fraction; infinity without a limit."""
    limit = _text(f"{group}/cpu.max").split()  # version 2: "250000 100000" or "max 100000", in microseconds
    if not limit:
        limit = [_text(f"{group}/cpu.cfs_quota_us"), _text(f"{group}/cpu.cfs_period_us")]  # version 1: -1 is none
    try:
        quota, period = int(limit[0]), int(limit[1])
    except (ValueError, IndexError):
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


# --- memory --------------------------------------------------------------------------------------------------


def free_memory(proc: Path = _PROC) -> int:
    """Free memory: bytes that this process can still take; 0 where that is not known.

    The least of what the machine has available, of what is left in each control group, and of the address space that
    `ulimit -v` leaves. Swap does not count.
    """
    return _memory(proc)[0]


def host_memory_mb(proc: Path = _PROC) -> tuple[float, float]:
    """Free and total memory in MiB: `free_memory`, and the memory of the machine or the limit of this process."""
    free, total = _memory(proc)
    return free / MIB, total / MIB


def _memory(proc: Path) -> tuple[int, int]:
    """Free and total memory in bytes."""
    known = dict(_MEMINFO.findall(_text(f"{proc}/meminfo")))
    free, total = (float(known.get(name, 0)) * 1024 for name in ("MemAvailable", "MemTotal"))
    for group in _groups("memory", proc):
        limit = min(_number(f"{group}/{name}") for name in _MEMORY_LIMITS)
        if limit < _UNLIMITED:
            total = min(total, limit)
            free = min(free, limit - _memory_in_use(group))
    return int(max(min(free, _address_space_left(proc)), 0)), int(total)


def _memory_in_use(group: str) -> float:
    """Working set of one control group in bytes, as Kubernetes has it; 0 if that is not known.

    Cached files that nobody has read lately are not in use: they go before anything fails.
    """
    used = min(_number(f"{group}/memory.current"), _number(f"{group}/memory.usage_in_bytes"))
    if not math.isfinite(used):
        return 0
    # In version 1 the fields without total_ leave out the groups below.
    cached: dict[str, str] = dict(_INACTIVE.findall(_text(f"{group}/memory.stat")))
    return used - int(cached.get("total_inactive_file", cached.get("inactive_file", 0)))


def _address_space_left(proc: Path) -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(f"{proc}/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return math.inf
    return max(limit - int(pages[0]) * resource.getpagesize(), 0)


@dataclass
class Peak:
    """The finding of `peak_memory`. Attributes: nbytes: most bytes that became resident at a time."""

    nbytes: int = 0


@contextlib.contextmanager
def peak_memory(proc: Path = _PROC) -> Iterator[Peak]:
    """Peak memory of a block, on top of the memory that the process has: known when the block is over.

    The whole process is measured, so the work of other threads meanwhile counts too. Memory that the C library has kept
    from before and uses again does not count: `tnxctl.malloc.trim` gives it back. The kernel's counts are off by
    a few MiB on machines with many cores.

    Some sandboxes do not let the high-water mark be set back. There only a peak above all earlier ones of the process
    is seen, else the memory that is left at the end: too little rather than too much.
    """
    peak = Peak()
    before = _resident(proc)
    can_reset = _reset_high_water(proc)
    mark = _high_water(proc)
    try:
        yield peak
    finally:
        after = _high_water(proc)
        highest = after if can_reset or after > mark else _resident(proc)
        peak.nbytes = max(highest - before, 0)


def _reset_high_water(proc: Path) -> bool:
    try:
        (proc / "self/clear_refs").write_text("5")  # proc(5), since Linux 4.0: the peak becomes the current value
    except OSError:
        return False
    return True


def _high_water(proc: Path) -> int:
    found = re.search(r"^VmHWM:\s*(\d+) kB", _text(f"{proc}/self/status"), re.M)
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident(proc: Path) -> int:
    pages = _text(f"{proc}/self/statm").split()
    return int(pages[1]) * resource.getpagesize() if pages else 0


# --- control groups ------------------------------------------------------------------------------------------


def _groups(controller: str, proc: Path) -> tuple[str, ...]:
    """Directories of the control groups that this process is in, with all above them. A process may be moved."""
    return _directories(controller, _text(f"{proc}/self/cgroup"), proc)


@lru_cache(maxsize=8)  # the mounts of a machine that runs containers are many
def _directories(controller: str, memberships: str, proc: Path) -> tuple[str, ...]:
    """`_groups` of a process with these memberships.

    Args:
        controller: "cpu" or "memory".
        memberships: /proc/self/cgroup, a line for each hierarchy: number, controllers of version 1, path.
    """
    of_version = {"cgroup": "", "cgroup2": ""}
    for line in memberships.splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            of_version["cgroup"] = path
        elif number == "0" and not controllers:
            of_version["cgroup2"] = path
    groups: dict[str, None] = {}
    for line in _text(f"{proc}/self/mountinfo").splitlines():
        mount = _MOUNT.match(line)
        if mount is None or not of_version[mount[3]]:
            continue
        if mount[3] == "cgroup" and controller not in mount[4].split(","):
            continue
        below = _below(_unescaped(mount[1]), of_version[mount[3]])
        for depth in range(len(below), -1, -1):
            groups["/".join((_unescaped(mount[2]), *below[:depth]))] = None
    return tuple(groups)


def _below(root: str, path: str) -> tuple[str, ...]:
    """The way from the root of a mount to a group, as parts of a path.

    Empty where the group does not lie below the mount, as a container may see it: its own group is mounted there.
    """
    try:
        below = Path(path).relative_to(root).parts
    except ValueError:
        return ()
    return () if ".." in below else below


def _unescaped(path: str) -> str:
    return re.sub(r"\\(\d{3})", lambda escape: chr(int(escape[1], 8)), path)


def _text(path: str) -> str:
    """The text of a file of the kernel; "" if there is none, or none that this process may read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> float:
    """The number in a file; infinity if there is none: "max" stands for no limit."""
    try:
        return int(_text(path))
    except ValueError:
        return math.inf
