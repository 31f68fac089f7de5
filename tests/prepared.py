"""Daemons that begin with torch imported: each is forked from one process, which has spent the time on that once.

To import torch takes more than a second of a core, and what a daemon does before it is ready else takes a fraction of
that. Tests of what a daemon does once it serves need not pay for it anew with each daemon. Those of how it starts, and
of the settings of its libraries, start an interpreter as users do; see `conftest.start_daemon`.

What is forked runs `tnxd/__main__.py`, or another program that calls its main, from its first line on, with the
arguments, environment, streams and working directory of its own. It differs in that modules are there already.

    python prepared.py DESCRIPTOR      # the process that forks; DESCRIPTOR is its end of a socket pair
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

MESSAGE_BYTES = 1 << 17
PR_SET_PDEATHSIG = 1

LIBRARIES = ("GLIBC_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NUMEXPR_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH")
"""Beginnings of the names of variables that the interpreter and the libraries read as they are loaded."""


BY_THEMSELVES = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR")
"""Those that scikit-learn and torch set in the process of the tests, where they are imported or export."""


def _of_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(LIBRARIES) and name not in BY_THEMSELVES
    }


_ENVIRONMENT = dict(os.environ)  # of the process that forks


def variables() -> dict[str, str]:
    """A copy of the environment, whatever thread asks: pytest changes it between two tests, and a plain copy fails."""
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends: no daemon outlives tests that are killed."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def can_run(program: tuple[str, ...], environment: Mapping[str, str]) -> bool:
    """Whether a program can be forked that shall have this environment: libraries were loaded with the same."""
    same = _of_libraries(environment) == _of_libraries(_ENVIRONMENT)
    return same and program[0] != "-c" and hasattr(os, "pidfd_open")


class Process:
    """A process that was forked: what `subprocess.Popen` has that tests of daemons need.

    Attributes:
        stdout: what it prints, as text, if that goes to a pipe. returncode: None while nobody knows that it has ended.
    """

    stdin = None
    stderr = None

    def __init__(self, life: socket.socket, stdout: IO[str] | None) -> None:
        self._life = life  # that it has begun, and that it has ended
        self._lock = threading.Lock()
        message, (self._handle,), _, _ = socket.recv_fds(life, MESSAGE_BYTES, 1)
        self.pid = int(message)
        self.stdout = stdout
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, as `subprocess.Popen.wait` says it."""
        ended = select.poll()  # unlike select.select, it takes descriptors above 1023
        with self._lock:
            if self.returncode is not None:
                return self.returncode
            ended.register(self._life, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired("tnxd", timeout or 0)
        with self._lock:
            if self.returncode is None:  # else another thread has waited, too
                self.returncode = int(self._life.recv(MESSAGE_BYTES))
                self._life.close()
                os.close(self._handle)
            return self.returncode

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            with self._lock, contextlib.suppress(ProcessLookupError):
                if self.returncode is None:
                    signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def start(
    program: tuple[str, ...],
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    *,
    stdout: int | None,
    stderr: int,
) -> Process:
    """Fork a process that runs a program: ("-m", module), or a path and first arguments; see `can_run`.

    Args:
        stdout, stderr: descriptors for what it prints; None is a pipe.
    """
    request = {"program": program, "arguments": arguments, "environment": dict(environment), "cwd": os.getcwd()}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe() if stdout is None else (None, os.dup(stdout))
    with theirs:
        socket.send_fds(_forker(), [json.dumps(request).encode()], [theirs.fileno(), writer, stderr])
    os.close(writer)
    return Process(ours, None if reader is None else open(reader))


_starting = threading.Lock()
_forkers: list[socket.socket] = []


def _forker() -> socket.socket:
    """Start the process that forks, unless it has been. It ends when this one ends, or closes its end of the pair."""
    with _starting:
        if not _forkers:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, __file__, str(theirs.fileno())]
                process = subprocess.Popen(command, env=_ENVIRONMENT, pass_fds=[theirs.fileno()])
            _forkers.append(ours)
            atexit.register(process.wait)
            atexit.register(ours.close)  # before that
        return _forkers[0]


# --- the process that forks ----------------------------------------------------------------------------------


def _import() -> None:
    """Import what a daemon imports before it is ready, in its order as far as that matters."""
    from tnxd.process import openmp

    openmp.settle()  # before torch
    for module in (
        "tnxd.daemon",
        "tnxd.executors.devices",
        "tnxd.models.formats.opening",
        "tnxd.models.process_state.drift",
        "torch.fx.experimental.symbolic_shapes",
    ):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # as the daemon does; the children's collections have little to look at then


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request. Returns in that process, with the request; or when no request can come."""
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that says that it has ended
    while True:
        for key, _ in selector.select():
            if key.fd in running:
                pid, life = running.pop(key.fd)
                selector.unregister(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(key.fd)
                with life, contextlib.suppress(OSError):  # nobody may be interested any more
                    life.send(str(status).encode())
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
            if not message:
                return None
            life, stdout, stderr = socket.socket(fileno=descriptors[0]), descriptors[1], descriptors[2]
            pid = os.fork()
            if not pid:
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                selector.close()
                for _, other in running.values():
                    other.close()
                life.close()
                return json.loads(message)
            handle = os.pidfd_open(pid)
            os.close(stdout)
            os.close(stderr)
            selector.register(handle, selectors.EVENT_READ)
            running[handle] = pid, life
            with contextlib.suppress(OSError):
                socket.send_fds(life, [str(pid).encode()], [handle])


def _become(program: list[str], arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Run a program in this process, as `python` does."""
    gc.collect()  # whatever still has a descriptor closes it now, and not when its number is another's
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # there may be room for a billion
        if descriptor > 2:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if program[0] == "-m":
        sys.path[0] = cwd
        sys.argv = ["-m", *arguments]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).parent)
        sys.argv = [*program, *arguments]
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    _import()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = _serve(requests)
    if request is not None:
        end_with_parent()
        _become(**request)
