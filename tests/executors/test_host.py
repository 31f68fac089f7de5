"""Cores and memory, within the limits of control groups: made-up ones, and real ones where they may be made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tnxd.executors import host
from tnxd.executors.host import available_cores, free_memory, host_memory_mb, peak_memory, plan_lanes
from tnxd.lanes import NO_TEAMS, Teams

GIB = 1 << 30
MIB = 1 << 20
CORES = len(os.sched_getaffinity(0))


class Machine:
    """A /proc of files, and control groups beside it."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.mount = root / "sys fs"  # what /proc/self/mountinfo escapes
        self._mounts: list[str] = ["22 1 0:21 / /proc rw - proc proc rw"]
        (self.proc / "self").mkdir(parents=True)
        self.write(self.proc / "meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\n")
        self.write(self.proc / "self/cgroup", "")

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def is_in(self, *memberships: str) -> None:
        """Lines of /proc/self/cgroup."""
        self.write(self.proc / "self/cgroup", "\n".join(memberships) + "\n")

    def mounts(self, kind: str, options: str, place: str = "", root: str = "/") -> None:
        point = str(self.mount / place).rstrip("/").replace(" ", "\\040")
        number = 30 + len(self._mounts)
        self._mounts.append(f"{number} 25 0:26 {root} {point} rw,nosuid shared:9 - {kind} cgroup {options}")
        self.write(self.proc / "self/mountinfo", "\n".join(self._mounts) + "\n")

    def limits(self, group: str, **files: object) -> None:
        """Files of a control group; `memory_max` stands for memory.max."""
        for name, value in files.items():
            self.write(self.mount / group / name.replace("_", ".", 1), f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return Machine(tmp_path)


@pytest.fixture
def service(machine: Machine) -> Machine:
    """A service in a slice, as systemd runs it."""
    machine.is_in("0::/tnx.slice/tnx.service")
    machine.mounts("cgroup2", "rw,nsdelegate")
    return machine


@pytest.mark.parametrize(
    ("cores", "wide", "threads"),
    [(2, 1, 2), (4, 1, 4), (8, 1, 8), (9, 2, 4), (12, 2, 6), (16, 2, 8), (20, 3, 6), (64, 8, 8)],
)
def test_every_core_has_a_lane_and_teams_fill_the_cores(cores: int, wide: int, threads: int) -> None:
    assert plan_lanes(cores) == (cores, Teams(wide, threads, cores))
    assert wide * threads <= cores


def test_one_core_has_no_team() -> None:
    assert plan_lanes(1) == (1, NO_TEAMS)
    assert plan_lanes(1, workers=3, threads=4) == (3, NO_TEAMS)


def test_what_is_given_is_a_ceiling() -> None:
    assert plan_lanes(16, workers=1) == (1, Teams(1, 8, 16))
    assert plan_lanes(16, threads=1) == (16, NO_TEAMS)
    assert plan_lanes(16, threads=4) == (16, Teams(4, 4, 16))
    assert plan_lanes(2, workers=4, threads=4) == (4, Teams(1, 2, 2))


def test_without_control_groups_it_is_the_affinity_and_all_memory(machine: Machine) -> None:
    assert available_cores(machine.proc) == 16
    assert host_memory_mb(machine.proc) == (48 * 1024, 64 * 1024)
    assert free_memory(machine.proc) == 48 * GIB


def test_where_nothing_is_known_memory_is_zero(tmp_path: Path) -> None:
    assert host_memory_mb(tmp_path) == (0.0, 0.0)
    assert available_cores(tmp_path) == CORES


def test_the_real_machine_has_cores_and_memory() -> None:
    assert 1 <= available_cores() <= CORES
    free, total = host_memory_mb()
    assert 0 < free < total


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 16), ("250000 100000", 3), ("200000 100000", 2), ("1000 100000", 1), ("9900000 100000", 16)],
)
def test_a_quota_is_rounded_up_to_whole_cores(service: Machine, limit: str, cores: int) -> None:
    service.limits("tnx.slice/tnx.service", cpu_max=limit)
    assert available_cores(service.proc) == cores


def test_the_quota_of_a_group_above_holds_too(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", cpu_max="800000 100000")
    service.limits("tnx.slice", cpu_max="400000 100000")
    service.limits("", cpu_max="700000 100000")
    assert available_cores(service.proc) == 4


def test_a_changed_limit_is_seen(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", cpu_max="max 100000")
    assert available_cores(service.proc) == 16
    service.limits("tnx.slice/tnx.service", cpu_max="100000 100000")
    assert available_cores(service.proc) == 1


@pytest.mark.parametrize(("limit", "cores"), [(-1, 16), (150000, 2)])
def test_a_quota_of_version_1(machine: Machine, limit: int, cores: int) -> None:
    machine.is_in("5:memory:/other", "3:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc")
    machine.mounts("cgroup", "rw,cpu,cpuacct", "cpu")
    machine.mounts("cgroup", "rw,memory", "memory")
    machine.limits("cpu/docker/abc", cpu_cfs_quota_us=limit, cpu_cfs_period_us=100000)
    machine.limits("memory/docker/abc", cpu_cfs_quota_us=100000, cpu_cfs_period_us=100000)
    assert available_cores(machine.proc) == cores


@pytest.mark.parametrize("root", ["/docker/abc", "/elsewhere", "/../.."])
def test_a_container_may_see_its_own_group_as_the_mount(machine: Machine, root: str) -> None:
    machine.is_in("3:cpu:/docker/abc")
    machine.mounts("cgroup", "rw,cpu", "cpu", root)
    machine.limits("cpu", cpu_cfs_quota_us=300000, cpu_cfs_period_us=100000)
    assert available_cores(machine.proc) == 3


def test_controllers_may_be_spread_over_both_versions(machine: Machine) -> None:
    machine.is_in("4:memory:/box", "0::/box")
    machine.mounts("cgroup", "rw,memory", "memory")
    machine.mounts("cgroup2", "rw", "unified")
    machine.limits("unified/box", cpu_max="200000 100000")
    machine.limits("memory/box", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=GIB)
    assert available_cores(machine.proc) == 2
    assert host_memory_mb(machine.proc) == (3 * 1024, 4 * 1024)


def test_memory_is_what_the_tightest_group_leaves(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", memory_max=16 * GIB, memory_high="max", memory_current=2 * GIB)
    service.limits("tnx.slice", memory_max=20 * GIB, memory_high="max", memory_current=19 * GIB)
    assert host_memory_mb(service.proc) == (1024, 16 * 1024)
    assert free_memory(service.proc) == GIB


def test_the_machine_may_have_less_than_the_limit(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", memory_max=500 * GIB, memory_current=GIB)
    assert host_memory_mb(service.proc) == (48 * 1024, 64 * 1024)


def test_the_soft_limit_counts(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", memory_max=16 * GIB, memory_high=8 * GIB, memory_current=GIB)
    assert host_memory_mb(service.proc) == (7 * 1024, 8 * 1024)


def test_cached_files_do_not_count_as_used(service: Machine) -> None:
    statistics = f"anon {GIB}\nfile {5 * GIB}\ninactive_anon 7\ninactive_file {4 * GIB}\nactive_file {GIB}\n"
    service.limits("tnx.slice/tnx.service", memory_max=8 * GIB, memory_current=6 * GIB, memory_stat=statistics)
    assert free_memory(service.proc) == 6 * GIB


def test_memory_of_version_1_with_the_groups_below(machine: Machine) -> None:
    machine.is_in("4:memory:/box")
    machine.mounts("cgroup", "rw,memory", "memory")
    unlimited = 9223372036854771712
    machine.limits("memory", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=40 * GIB)
    statistics = f"inactive_file {GIB}\ntotal_inactive_file {2 * GIB}\n"
    machine.limits("memory/box", memory_limit_in_bytes=8 * GIB, memory_usage_in_bytes=6 * GIB, memory_stat=statistics)
    assert host_memory_mb(machine.proc) == (4 * 1024, 8 * 1024)


def test_a_group_beyond_its_limit_has_nothing_left(service: Machine) -> None:
    service.limits("tnx.slice/tnx.service", memory_high=GIB, memory_current=2 * GIB)
    assert free_memory(service.proc) == 0


def test_a_limit_of_the_address_space_counts() -> None:
    code = f"""
import resource
from tnxd.executors import host
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {64 * MIB}, -1))
print(host.free_memory())
"""
    assert 0 < int(in_child(code)) <= 64 * MIB


# --- peaks ---------------------------------------------------------------------------------------------------

_GROW = f"""
import numpy
from tnxd.executors.host import peak_memory
def grow(mib):
    numpy.ones(mib * {MIB}, numpy.uint8)  # large arrays are mapped, and unmapped again at once
"""


def in_child(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout.strip()


def test_a_peak_is_seen_though_the_memory_is_free_again() -> None:
    measured = in_child(f"{_GROW}\ngrow(300)\nwith peak_memory() as peak: grow(100)\nprint(peak.nbytes)")
    assert 95 * MIB < int(measured) < 130 * MIB


def test_a_peak_is_known_after_a_failure_too() -> None:
    attempt = "try:\n with peak_memory() as peak: grow(100); grow(1 << 30)\nexcept MemoryError: print(peak.nbytes)"
    assert 95 * MIB < int(in_child(f"{_GROW}\n{attempt}")) < 130 * MIB


@pytest.mark.parametrize(("earlier", "least", "most"), [(0, 95, 130), (300, 0, 30)])
def test_where_marks_cannot_be_set_back_only_new_peaks_are_seen(
    tmp_path: Path, earlier: int, least: int, most: int
) -> None:
    (tmp_path / "self/clear_refs").mkdir(parents=True)  # which cannot be written to
    for name in ("status", "statm"):
        (tmp_path / "self" / name).symlink_to(f"/proc/self/{name}")
    sealed = f"import pathlib; proc = pathlib.Path({str(tmp_path)!r})"
    code = f"{_GROW}\n{sealed}\ngrow({earlier})\nwith peak_memory(proc) as peak: grow(100)\nprint(peak.nbytes)"
    assert least * MIB <= int(in_child(code)) < most * MIB


def test_a_proc_that_says_nothing_gives_no_peak(tmp_path: Path) -> None:
    with peak_memory(tmp_path) as peak:
        pass
    assert peak.nbytes == 0


# --- real control groups -------------------------------------------------------------------------------------


@contextmanager
def control_group(controller: str, **files: int) -> Iterator[Path]:
    """A control group below this process's own with limits, in the version that this machine has the controller in."""
    own = host._groups(controller, host._PROC)
    names = {"cpu": ("cpu.cfs_quota_us", "cpu.max"), "memory": ("memory.limit_in_bytes", "memory.max")}[controller]
    made = next(
        (
            directory
            for directory in (Path(parent, f"tensornext-test-{os.getpid()}") for parent in own)
            if _make(directory, names)
        ),
        None,
    )
    if made is None:
        pytest.skip(f"may not make control groups for {controller} here")
    try:
        for name, value in files.items():
            for file in (path for path in made.iterdir() if path.name.replace(".", "_") == name):
                file.write_text(str(value))
        yield made
    finally:
        made.rmdir()


def _make(directory: Path, wanted: tuple[str, ...]) -> bool:
    """Make a control group. False if it cannot be made, or has none of the files."""
    with suppress(OSError):
        directory.mkdir()
        if any((directory / name).exists() for name in wanted):
            return True
        directory.rmdir()
    return False


def within(group: Path, expression: str) -> str:
    """The value that an expression has for a process in that control group."""
    joined = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')"
    return in_child(f"from tnxd.executors import host\n{joined}\nprint({expression})")


def test_a_real_quota() -> None:
    with control_group("cpu", cpu_max=50000, cpu_cfs_quota_us=50000) as group:  # of 100000
        assert within(group, "host.available_cores()") == "1"


def test_a_real_limit_of_memory() -> None:
    limit = 512 * MIB
    with control_group("memory", memory_max=limit, memory_limit_in_bytes=limit) as group:
        free, total = within(group, "*host.host_memory_mb()").split()
        assert float(total) == 512
        assert 256 < float(free) < 512
