"""TensorNext's bridge, one worker, and a daemon behind it, as both start without options.

mlp   the daemon's default model
pass  gives back what it gets, see `passing.py`
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import serving
from targets import daemon_target, start_daemon

_PROGRAMS = {"mlp": ("-m", "tnxd"), "pass": (str(Path(__file__).parents[1] / "passing.py"),)}


def main() -> None:
    model, port, grpc_port = serving.arguments()
    serving.end_with_stdin()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by way of the end of `with`, which ends the daemon
    os.environ.pop("OMP_NUM_THREADS", None)  # which other servers need; this is measured as it comes
    with contextlib.ExitStack() as stack:
        endpoint = daemon_target(start_daemon(stack, program=_PROGRAMS[model], model=model)).endpoint
        where = ["--host", endpoint, "--listen", f"127.0.0.1:{port}", "--grpc", f"127.0.0.1:{grpc_port}"]
        bridge = stack.enter_context(subprocess.Popen([sys.executable, "-m", "tnxctl.cli", "bridge", *where]))
        stack.callback(bridge.terminate)
        bridge.wait()


if __name__ == "__main__":
    main()
