"""Child processes that compile: they read a version, and write what was made of its network into a folder.

Exporting, converting and compiling take up to minutes of Python that would hold the GIL, and change torch's global
state: that has no place beside lanes that serve.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from tnxctl.protocol.errors import FailedPrecondition, Unavailable
from tnxd.models.repository import RepositorySource

REFUSED = 41
"""Exit code of a child for a version that cannot be compiled, however often it is tried."""

_PROGRAM = "tnxd.models.formats.compiler"  # not imported: it opens models, and to start it is a part of that


def compile_in_child(
    source: RepositorySource,
    compiler: str,
    device: torch.device,
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Have a child process compile a version into a folder.

    Args:
        compiler: a key of `tnxd.models.formats.compiler.COMPILERS`.
        timeout_s: seconds that it may take.
        environment: of the child; None: this one's.

    Raises:
        FailedPrecondition: it cannot be done; the sentence says why.
        Unavailable: it took too long, was ended, or found no room: at another time it may be done.
    """
    with subprocess.Popen(
        [sys.executable, "-m", _PROGRAM, compiler, str(folder), str(device)],
        stdin=subprocess.PIPE,  # it stays open: its end tells the child that the daemon is gone
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # an interrupt from the terminal is for the daemon
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(pickle.dumps(source))  # from a process to its own child: nothing comes from outside
            child.stdin.flush()
        said, late = _read(child, timeout_s)
        code = child.wait()
    if late:
        raise Unavailable(f"it took longer than {timeout_s:.0f} s")
    if code < 0:
        raise Unavailable(f"the compiler was ended by signal {-code}")
    if code:
        last = said.splitlines()[-1] if said else ""
        if code == REFUSED:
            raise FailedPrecondition(last)
        raise Unavailable(f"the compiler ended with {code}{last and f': {last}'}")


def _read(child: subprocess.Popen[bytes], timeout_s: float) -> tuple[str, bool]:
    """All that a child writes to stderr until its end, and whether it had to be ended for its time."""
    assert child.stderr is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it has started, too: a C++ compiler would hold the pipe open

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        return child.stderr.read().decode("utf-8", "replace").strip(), late.is_set()
    finally:
        timer.cancel()
