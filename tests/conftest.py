"""Real daemons for tests: started as users start them, stopped with a signal."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import prepared

with contextlib.suppress(ImportError):  # on a machine with a GPU, nothing may be installed for these tests
    import hypothesis

    hypothesis.settings.register_profile("tests", deadline=None)  # how long an example takes is the machine's affair
    hypothesis.settings.load_profile("tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # nohup and CI systems start their jobs so, and the tools that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.umask(0o022)  # a model repository that others can write is refused
# Clients of gRPC have threads here. Its handlers for forks, chosen when it is imported, let some processes that are
# started meanwhile hang or die before their program begins.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
OTHERWISE = re.compile(r"OTEL_|TNX_HOST$|TNXD_|NOTIFY_SOCKET$|WATCHDOG_|LISTEN_|COLUMNS$|LINES$|(NO|FORCE)_COLOR$")
"""Variables that are set for what this user runs otherwise, and what tests start would take for meant."""
for name in filter(OTHERWISE.match, [*os.environ]):
    del os.environ[name]
for name in ("no_proxy", "NO_PROXY"):  # clients of HTTP and gRPC reach what the tests start
    os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "localhost", "127.0.0.1", "::1"])
if len(os.fsencode(tempfile.gettempdir())) > 16:  # the path of a socket has room for 107 bytes
    os.environ["PYTEST_DEBUG_TEMPROOT"] = "/tmp"

START_SECONDS = 60
"""torch takes seconds to import on a busy machine."""

LONGEST = ("test_systemd.py", "test_quick_served.py", "test_quick_careful.py", "test_lifecycle.py", "test_swap.py")
"""Files that take long: begun first, so that no worker is left with one of them in the end."""

READY = re.compile(r"ready on ([^;]+);")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector out while tests are collected, and from what is there then: torch, and the tests.

    All of it stays until the end, and each search of it for garbage takes some tenths of a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@dataclass
class Daemon:
    """A running tnxd.

    Attributes:
        endpoint: the first one that it listens on. process: its process. log: where its stderr goes.
    """

    endpoint: str
    process: subprocess.Popen[str] | prepared.Process
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_SECONDS)

    def logged(self, *texts: str) -> str:
        """Its log, as soon as these texts are in it: a thread of its own writes it, later than a reply may come.

        Raises:
            AssertionError: they did not come.
        """
        until = time.monotonic() + START_SECONDS / 2
        while not all(text in (log := self.log.read_text()) for text in texts):
            assert time.monotonic() < until, f"{texts} are not in the log:\n{log}"
            time.sleep(0.02)  # between two looks: nothing tells of a line in a file
        return log

    def discard(self) -> None:
        """Kill it if it still runs, and close its pipe."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_daemon(
    log: Path,
    *arguments: str,
    program: tuple[str, ...] = ("-m", "tnxd"),
    environment: dict[str, str] | None = None,
    anew: bool = False,
) -> Daemon:
    """Start tnxd, or a program that calls its main, and wait for its ready line.

    Args:
        anew: start an interpreter, as users do, where a test looks at what happens before it is ready, or needs it to
            be a child of this process. Without that, the daemon is forked from a process that has imported torch, if
            it can be; see `prepared`.

    Raises:
        AssertionError: it ended before; says what it logged.
    """
    if "--bind" not in arguments:
        arguments = ("--bind", "tcp://127.0.0.1:*", *arguments)
    variables = prepared.variables() if environment is None else environment
    process: subprocess.Popen[str] | prepared.Process
    with log.open("wb") as stderr:
        if not anew and prepared.can_run(program, variables):
            process = prepared.start(program, arguments, variables, stdout=None, stderr=stderr.fileno())
        else:
            command = [sys.executable, *program, *arguments]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
                preexec_fn=prepared.end_with_parent,
            )
    assert process.stdout is not None
    line = process.stdout.readline()  # ends with the process, at the latest: the test's own timeout covers a hang
    found = READY.search(line)
    if found is None:
        Daemon("", process, log).discard()
        raise AssertionError(f"tnxd said {line!r} and logged:\n{log.read_text()}")
    return Daemon(found[1].split(", ")[0], process, log)


@contextmanager
def serving_daemon(log: Path, *arguments: str, **options: Any) -> Iterator[Daemon]:
    """A daemon for tests that do it no harm: at the end it has to be alive, and to stop without an error.

    Args:
        options: of `start_daemon`.
    """
    daemon = start_daemon(log, *arguments, **options)
    try:
        yield daemon
        assert daemon.process.poll() is None, f"the daemon died during the tests:\n{log.read_text()[-5000:]}"
        assert daemon.stop() == 0
    finally:
        daemon.discard()


@pytest.fixture(params=[True, False], ids=["plain socket", "libzmq"])
def each_channel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have a test run with each of the channels that a client without keys may have. Returns `opening.HAS_STREAMS`."""
    from tnxctl.channels import opening

    if request.param and sys.platform != "linux":
        pytest.skip("needs Linux")
    monkeypatch.setattr(opening, "HAS_STREAMS", request.param)
    return bool(request.param)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with its built-in defaults, shared by all tests that do it no harm."""
    with serving_daemon(tmp_path_factory.mktemp("daemon") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def bridge(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One `bridges.Bridge` of that daemon, with default settings, shared likewise."""
    pytest.importorskip("uvicorn", reason="the bridge needs tensornext[http]")
    from bridges import running_bridge

    with running_bridge(tmp_path_factory.mktemp("bridge"), daemon.endpoint) as running:
        yield running


@pytest.fixture
def run_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons of a test's own, as `start_daemon` does; they are killed at its end if they still run."""
    started: list[Daemon] = []

    def run(*arguments: str, **options: Any) -> Daemon:
        running = start_daemon(tmp_path / f"log{len(started)}", *arguments, **options)
        started.append(running)
        return running

    yield run
    for running in started:
        running.discard()
