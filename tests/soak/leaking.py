"""Daemon of odd models with a leak of memory, descriptors or threads, for a soak to find: run as a program."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import odd_models  # noqa: F401 - it adds its models
from tnxd.cli import main
from tnxd.serving.server import Server

_kept: list[bytes] = []
_predict = Server._predict
_count = 0


def _leaky(server: Server, *arguments: Any) -> None:
    """Leak as little as can be, for each request, or for every 200th."""
    global _count
    _count += 1
    kind = os.environ["LEAK"]
    if kind == "memory":
        _kept.append(os.urandom(1024))
    elif _count % 200 == 0 and kind == "descriptors":
        os.open(os.devnull, os.O_RDONLY)
    elif _count % 200 == 0 and kind == "threads":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    _predict(server, *arguments)


if __name__ == "__main__":
    Server._predict = _leaky  # type: ignore[method-assign]
    main(prog_name="tnxd")
