"""A Python program in a process that has a pretended GPU: `python pretended_process.py PROGRAM ARGUMENT...`.

PROGRAM is a path, or -m and a module, as for the interpreter. See `pretended`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

MEMORY_MB = 512
"""MiB of memory of the device. It is memory of this machine as soon as it is written to."""


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # what is pretended runs on the threads of torch, several times over
    sys.path[0] = str(Path(__file__).parent)
    from pretended.installation import Installation

    installation = Installation(devices=1, memory_mb=MEMORY_MB, policy="late", seed=0)
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    installation.remove()


if __name__ == "__main__":
    main()
