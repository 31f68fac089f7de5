"""A throw-away machine that runs a real systemd: for the tests of the service, as installed by `make install`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BOOT_SCRIPT = Path(__file__).with_name("systemd_machine.sh")
SYSTEMD = Path("/lib/systemd/systemd")
ADMINISTRATORS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_TIMEOUT = 90.0
"""Seconds that systemd may take to start."""


def missing() -> str:
    """A reason to skip a test: what this computer lacks for such a machine; "" if it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if not SYSTEMD.exists():
        return f"needs systemd in {SYSTEMD}"
    for tool in ("unshare", "nsenter", "pivot_root", "setpriv"):
        if not shutil.which(tool):
            return f"needs {tool}, of util-linux"
    for filesystem in ("overlay", "cgroup2"):
        if f"\t{filesystem}\n" not in Path("/proc/filesystems").read_text():
            return f"needs the file system {filesystem} in the kernel"
    namespaces = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--net", "--ipc", "--uts", "--cgroup", "true"], capture_output=True
    )
    if namespaces.returncode != 0:
        return "may not make namespaces here"
    cgroups = _cgroup_mount()
    return "" if cgroups and os.access(cgroups, os.W_OK) else "needs a cgroup v2 hierarchy that it may write to"


@dataclass(frozen=True)
class Machine:
    """A running machine.

    Attributes:
        pid: its PID 1, as seen from outside.
    """

    pid: int

    @property
    def root(self) -> Path:
        """Its file system, as seen from outside. Absolute symbolic links in it lead outside."""
        return Path(f"/proc/{self.pid}/root")

    def run(
        self,
        *command: str,
        timeout: float = 90.0,
        check: bool = True,
        network: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command inside, as root, and return what it wrote to stdout and stderr, without the last newline.

        Args:
            command: program and arguments.
            timeout: seconds.
            check: whether an exit status other than 0 is an AssertionError.
            network: give the command the caller's network; what it asks systemd to start has loopback all the same.
            environment: more variables, over PATH and HOME.

        Raises:
            AssertionError: the command failed. It shows the command and its output.
        """
        namespaces = ["--mount", "--pid", "--ipc", "--uts", "--cgroup", *([] if network else ["--net"])]
        completed = subprocess.run(
            ["nsenter", f"--target={self.pid}", *namespaces, *command],
            env={"PATH": ADMINISTRATORS_PATH, "HOME": "/root", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and completed.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit status {completed.returncode}\n{completed.stdout}")
        return completed.stdout.rstrip("\n")


@contextmanager
def booted() -> Iterator[Machine]:
    """A machine that has started, and that is gone afterwards with all that was in it."""
    cgroups = _cgroup_mount()
    assert cgroups, "missing() tells whether a machine can be had"
    cgroup = cgroups / f"tensornext-test-{os.getpid()}"
    cgroup.mkdir()
    with tempfile.TemporaryDirectory(prefix="tensornext-machine-") as work:
        boot = subprocess.Popen(
            ["sh", BOOT_SCRIPT, work, cgroup],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield _wait_for_boot(boot)
        finally:
            boot.kill()
            boot.communicate()
            eventually(lambda: _remove_cgroup(cgroup), "the machine's processes are gone", timeout=60.0)


def eventually(condition: Callable[[], bool], what: str, timeout: float = 90.0) -> None:
    """Return as soon as the condition holds; AssertionError, naming `what`, if it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)  # between two looks: at /proc, cgroups and systemd, which tell nobody here of a change


def _wait_for_boot(boot: subprocess.Popen[bytes]) -> Machine:
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")

    def has_systemd() -> bool:
        assert boot.poll() is None, f"the machine ended at once:\n{boot.communicate()[0].decode()}"
        return any(_is_systemd(int(pid)) for pid in children.read_text().split())

    eventually(has_systemd, "the machine has a systemd", BOOT_TIMEOUT)
    machine = Machine(int(children.read_text()))
    eventually(lambda: (machine.root / "run/systemd/private").exists(), "systemd takes commands", BOOT_TIMEOUT)
    machine.run("systemctl", "is-system-running", "--wait", timeout=BOOT_TIMEOUT, check=False)
    return machine


def _is_systemd(pid: int) -> bool:
    """True if the process has got past the boot script."""
    return os.readlink(f"/proc/{pid}/exe") == os.path.realpath(SYSTEMD)


def _cgroup_mount() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, filesystem, *_ = line.split()
        if filesystem == "cgroup2":
            return Path(path)
    return None


def _remove_cgroup(cgroup: Path) -> bool:
    """Remove the cgroup. False while the last process in it has not ended."""
    try:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)
    except OSError:
        return False
    return True
