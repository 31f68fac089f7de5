"""Parts that the servers of the peers share: the model, and an end that does not depend on the harness.

A server is started as `python X_server.py CONFIGURATION PORT PORT`, in a session of its own. The second port is for
those who need two.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCH_ROWS = 64
"""Most rows per forward of a configuration that batches: as the daemon's model `mlp` has it."""

_ROOT = Path(__file__).resolve().parents[2]

MODELS = {"mlp": (_ROOT / "tnxd/models/networks.py", 256), "wide": (_ROOT / "bench/wide.py", 768)}
"""The file with the function of that name that makes it, and its columns."""

MODEL = os.environ.get("BENCH_MODEL", "mlp")

_GRACE_SECONDS = 10.0

Array = NDArray[np.float32]


def arguments() -> tuple[str, int, int]:
    """Configuration and ports, from the command line."""
    configuration, port, second_port = sys.argv[1:]
    return configuration, int(port), int(second_port)


def forward() -> Callable[[Array], Array]:
    """The forward of the model, with the weights that it has in the daemon, on one thread.

    `mlp` takes float32 [N, 256] and gives float32 [N, 128].
    """
    import torch

    torch.set_num_threads(1)  # more are slower with so small a model, here as in the daemon
    path, columns = MODELS[MODEL]
    net = getattr(_module(path), MODEL)()

    def run(array: Array) -> Array:
        with torch.inference_mode():
            output: Array = net(torch.from_numpy(array)).numpy()
        return output

    for rows in (1, BATCH_ROWS):
        run(np.zeros((rows, columns), np.float32))
    return run


def _module(path: Path) -> Any:
    """A module of networks, without the rest of the daemon: it needs packages that the peers lack."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(body: bytes) -> Array:
    """The array of a request in the format `raw`, in memory that torch may have."""
    return np.frombuffer(bytearray(body), np.float32).reshape(-1, MODELS[MODEL][1])


def end_with_stdin() -> None:
    """End this process and all that it started when the harness closes their stdin, or dies."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(0, 4096):  # not sys.stdin: the interpreter cannot end while a thread is inside it
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)
